"""Settings, the training loop, the run folder and the metrics."""
