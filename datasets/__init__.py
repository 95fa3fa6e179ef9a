"""Files to tensors: loaders turn files into (images, labels), one function makes the tasks."""
