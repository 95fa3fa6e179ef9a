"""Accuracy and loss of predictions, and the metrics of an accuracy matrix.

R[k][t] is the test accuracy on task t after round k, None where t is not yet seen. In continual mode row k holds tasks
0 .. k and the rows are as many as the tasks seen by the end (T). Every metric is an unweighted mean over tasks and None
where it is undefined. docs/run_folder.md names the sources.
"""
from torch.nn import functional as F


def accuracy(scores, labels):
    """Share of rows, in [0, 1], whose highest score, of scores [N, C], is that of their label ([N] int64)."""
    return (scores.argmax(1) == labels).double().mean().item()


def log_probs(logits):
    """Log class probabilities [N, C] float64 of logits [N, C]; log probabilities stay as they are."""
    return F.log_softmax(logits.double(), dim=1)


def negative_log_likelihood(log_probs, labels):
    """Mean over rows of -log p(label) in nats, of log_probs [N, C] and labels [N] int64."""
    return F.nll_loss(log_probs, labels).item()


def _mean(values):
    return sum(values) / len(values) if values else None


def average_accuracy(matrix):
    """mean_t R[T-1][t]: the last row's mean. The name is used for nothing else."""
    return _mean(matrix[-1])


def learning_accuracy(matrix):
    """mean_t R[t][t] (Riemer et al. 2019): how well a task goes in the round that brings it."""
    return _mean([row[t] for t, row in enumerate(matrix)])


def forgetting(matrix):
    """Mean over t < T-1 of max over t <= k < T-1 of R[k][t], minus R[T-1][t] (Chaudhry et al. 2018).

    Negative where the past got better.
    """
    last = len(matrix) - 1
    return _mean([max(matrix[k][t] for k in range(t, last)) - matrix[last][t] for t in range(last)])


def backward_transfer(matrix):
    """Mean over t < T-1 of R[T-1][t] - R[t][t] (Lopez-Paz & Ranzato 2017)."""
    last = len(matrix) - 1
    return _mean([matrix[last][t] - matrix[t][t] for t in range(last)])


def forward_transfer(matrix, isolated):
    """Mean over 1 <= t < T of R[t][t] - I_t; I_t = `isolated`[t] is Isolated's accuracy with the same settings."""
    return _mean([matrix[t][t] - isolated[t] for t in range(1, len(matrix))])
