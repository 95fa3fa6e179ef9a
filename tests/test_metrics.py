"""Every metric against numbers worked out by hand."""
import math

import pytest
import torch

from utils import metrics

# Task 0 falls from 0.9 to 0.6 and recovers to 0.7; task 1 rises from 0.5 to 0.8; task 2 has only its own round.
R = [[0.9, None, None], [0.6, 0.5, None], [0.7, 0.8, 0.4]]


def test_metrics_by_hand():
    assert metrics.average_accuracy(R) == pytest.approx((0.7 + 0.8 + 0.4) / 3)
    assert metrics.learning_accuracy(R) == pytest.approx((0.9 + 0.5 + 0.4) / 3)
    # Best before the last round: task 0: 0.9, task 1: 0.5; the newest task and the last round do not take part.
    assert metrics.forgetting(R) == pytest.approx(((0.9 - 0.7) + (0.5 - 0.8)) / 2)
    assert metrics.backward_transfer(R) == pytest.approx(((0.7 - 0.9) + (0.8 - 0.5)) / 2)
    # Isolated's 0.1 on task 0 must not matter: its own round comes before any transfer.
    assert metrics.forward_transfer(R, [0.1, 0.45, 0.5]) == pytest.approx(((0.5 - 0.45) + (0.4 - 0.5)) / 2)


def test_forgetting_takes_the_best_of_the_past_not_the_first():
    assert metrics.forgetting([[0.5, None], [0.9, 0.5], [0.6, 0.5]][:2]) == pytest.approx(0.5 - 0.9)
    later_best = [[0.5, None, None], [0.9, 0.5, None], [0.6, 0.5, 0.5]]
    assert metrics.forgetting(later_best) == pytest.approx(((0.9 - 0.6) + 0) / 2)


def test_one_task_leaves_transfer_undefined():
    assert metrics.forgetting([[0.5]]) is None
    assert metrics.backward_transfer([[0.5]]) is None
    assert metrics.forward_transfer([[0.5]], [0.5]) is None
    assert metrics.learning_accuracy([[0.5]]) == 0.5


def test_accuracy_and_loss_of_predictions():
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    assert metrics.accuracy(p, labels) == pytest.approx(1 / 3)
    expected = -(math.log(0.7) + math.log(0.4) + math.log(0.1)) / 3
    assert metrics.negative_log_likelihood(p.log(), labels) == pytest.approx(expected)
