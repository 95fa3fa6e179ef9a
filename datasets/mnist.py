"""MNIST: 60,000 + 10,000 images of handwritten digits, 28 x 28."""
from datasets.npz import load_or_download


def load_mnist(data_dir):
    """(train_images, train_labels), (test_images, test_labels), as `load_npz` gives them; label = digit.

    Raises:
        DataError: see `load_or_download`.
    """
    return load_or_download("mnist", "MNIST", "MNIST/raw", data_dir, (28, 28, 1), 10)
