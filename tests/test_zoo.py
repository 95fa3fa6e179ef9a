"""Task weights, the draw, the ensemble and replay against arithmetic done by hand."""
import itertools
import math
from collections import Counter

import pytest
import torch

from datasets.data import make_tasks
from modelzoo import Zoo, choose_tasks, ensemble_log_probs, replay_repeats, sample_replay, sample_tasks, task_weights
from utils.learner import Learner
from utils.run_net import derive_seed, make_generator


def learner(tasks, logits):
    logits = tuple(torch.tensor(x) for x in logits)
    return Learner(tuple(tasks), logits, logits, 0.0, 0, 0)


def test_task_weights_by_hand():
    # m = 1, so w = exp(loss - 1).
    assert task_weights([0.5, 1.0, 1.5]).tolist() == pytest.approx([math.exp(-0.5), 1, math.exp(0.5)])
    # m = 2, so w = exp((loss - 2) / 2).
    assert task_weights([1.0, 3.0]).tolist() == pytest.approx([math.exp(-0.5), math.exp(0.5)])


def test_task_weights_are_clipped_and_equal_without_loss():
    assert task_weights([0.0, 0.0, 0.0]).tolist() == [1, 1, 1]
    losses = [0.0] * 9 + [1.0]  # m = 0.1: exp(-1) and exp(9) = 8103
    assert task_weights(losses).tolist() == pytest.approx([math.exp(-1)] * 9 + [1e3])
    # The lower bound cannot be reached (loss >= 0 means w >= 1/e); the upper one holds where exp overflows.
    assert task_weights([0.0] * 999 + [1.0])[-1] == 1e3


def test_draw_frequencies_match_probabilities():
    """Against the probability of every ordered pair, drawn one after the other without replacement."""
    weights, draws = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 40_000
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(sample_tasks(weights, 2, generator)) for _ in range(draws))
    chi2 = 0.0
    for a, b in itertools.permutations(range(4), 2):
        p = (a + 1) / 10 * (b + 1) / (10 - (a + 1))
        chi2 += (counts[a, b] - draws * p) ** 2 / (draws * p)
    assert sum(counts.values()) == draws and all(a != b for a, b in counts)
    assert chi2 < 31.3  # 11 degrees of freedom: exceeded once in 1,000 seeds


def choose(zoo, k, **kwargs):
    defaults = {"continual": True, "tasks_per_round": 5, "naive": False, "generator": make_generator(0, k, "draw")}
    return choose_tasks(zoo, k, **{**defaults, **kwargs})


def test_continual_task_counts_are_1_2_3_4_5_5():
    zoo = Zoo([], [], [2] * 8)
    zoo.learners.append(None)
    for k, count in enumerate([1, 2, 3, 4, 5, 5, 5, 5]):
        tasks, weights = choose(zoo, k)
        assert len(tasks) == len(set(tasks)) == count
        assert tasks[-1] == k and all(t < k for t in tasks[:-1])
        assert len(weights) == k


def test_weights_of_a_round_come_from_the_losses_of_the_tasks_that_may_be_drawn():
    zoo = Zoo([], [], [2] * 4)
    zoo.learners.append(None)
    zoo.loss = [0.5, 1.0, 1.5, 99.0]
    assert choose(zoo, 3)[1] == pytest.approx([math.exp(-0.5), 1, math.exp(0.5)])  # the new task's 99 has no say
    assert choose(zoo, 3, naive=True)[1] == [1, 1, 1]
    tasks, weights = choose(zoo, 0, continual=False, tasks_per_round=4)
    assert sorted(tasks) == [0, 1, 2, 3] and weights == pytest.approx(task_weights(zoo.loss).tolist())


def test_weights_decide_the_draw():
    zoo = Zoo([], [], [2] * 11)
    zoo.learners.append(None)
    # Of the ten that may be drawn m = 0.1: nine weigh 1/e and task 9 weighs 1000, so P(task 9) = 0.997.
    zoo.loss = [0.0] * 9 + [1.0, 0.0]

    def draws(naive):
        return [choose(zoo, 10, tasks_per_round=2, naive=naive, generator=make_generator(seed, 10, "draw"))[0][0]
                for seed in range(20)]

    assert draws(naive=False).count(9) >= 18
    assert draws(naive=True).count(9) < 10  # 2 are expected


def test_weights_are_equal_before_the_first_learner_even_where_class_counts_differ():
    assert choose(Zoo([], [], [2, 10]), 0, continual=False, tasks_per_round=2)[1] == [1, 1]


def test_seed_and_round_reach_the_draw():
    draws = {tuple(sample_tasks(torch.ones(10), 5, make_generator(seed, k, "draw")))
             for seed in range(3) for k in range(3)}
    assert len(draws) == 9
    assert len({derive_seed(seed, k, use) for seed in (0, 1) for k in (0, 1) for use in ("draw", "init")}) == 8


def test_ensemble_is_the_weighted_mean_of_probabilities():
    a = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    b = torch.tensor([[0.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    for weights in ([1.0, 1.0], [10.0, 1.0]):
        mean = (weights[0] * a.double().softmax(1) + weights[1] * b.double().softmax(1)) / sum(weights)
        torch.testing.assert_close(ensemble_log_probs([a, b], weights).exp(), mean)


def test_ensemble_survives_a_probability_of_zero():
    sure = torch.tensor([[1000.0, 0.0]])
    log_probs = ensemble_log_probs([sure, sure], [1.0, 1.0])
    assert log_probs.tolist() == [[0.0, -1000.0]]


def test_zoo_speaks_with_the_learners_that_know_the_task():
    labels = [torch.tensor([0, 1]), torch.tensor([0])]
    zoo = Zoo(labels, labels, [2, 4])
    assert zoo.loss == pytest.approx([math.log(2), math.log(4)])  # uniform
    assert zoo.accuracy == [1 / 2, 1 / 4]
    assert zoo.predict_log_probs(1).exp().tolist() == [[0.25] * 4]
    zoo.add(learner([0], [[[0.0, 0.0], [0.0, math.log(3)]]]))  # probabilities (1/2, 1/2), (1/4, 3/4)
    assert zoo.loss == pytest.approx([-(math.log(1 / 2) + math.log(3 / 4)) / 2, math.log(4)])
    zoo.add(learner([1, 0], [[[0.0, 0.0, 0.0, 9.0]], [[math.log(3), 0.0], [0.0, 0.0]]]))  # (3/4, 1/4), (1/2, 1/2)
    assert zoo.predict_log_probs(0).exp().tolist() == [pytest.approx([5 / 8, 3 / 8]), pytest.approx([3 / 8, 5 / 8])]
    assert zoo.loss[0] == pytest.approx(-math.log(5 / 8))
    assert zoo.accuracy == [1, 0]


@pytest.mark.parametrize("r, weigh_by_round, mean", [
    (1.0, False, 0.45), (0.5, False, 0.525),  # (.75 + .5 + .1) / 3, (2 * .75 + .5 + .1) / 4
    (1.0, True, 2.15 / 7), (0.5, True, 0.3625),  # (.75 + 2 * .5 + 4 * .1) / 7, (2 * .75 + 2 * .5 + 4 * .1) / 8
])
def test_three_learners(r, weigh_by_round, mean):
    """And one of another task, which comes third."""
    labels = [torch.tensor([0])] * 2
    zoo = Zoo(labels, labels, [2, 2], r, weigh_by_round)
    for t, p in ((0, 0.75), (0, 0.5), (1, 0.9), (0, 0.1)):
        zoo.add(learner([t], [[[math.log(p), math.log(1 - p)]]]))
    assert zoo.predict_log_probs(0).exp()[0, 0].item() == pytest.approx(mean)
    assert zoo.loss[0] == pytest.approx(-math.log(mean))


def test_loss_is_of_training_rows_and_accuracy_of_test_rows():
    zoo = Zoo([torch.tensor([0])], [torch.tensor([1, 1])], [2])
    train, test = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(9)], [5.0, 0.0]])
    zoo.add(Learner((0,), (train,), (test,), 0.0, 0, 0))
    assert zoo.loss[0] == pytest.approx(-math.log(3 / 4))
    assert zoo.accuracy == [0.5]


def test_first_learner_on_a_task_weighs_1_over_r():
    labels = [torch.tensor([0])]
    zoo = Zoo(labels, labels, [2], replay_frac=0.1)
    zoo.add(learner([0], [[[math.log(3), 0.0]]]))  # (3/4, 1/4)
    assert zoo.predict_log_probs(0).exp().tolist() == [pytest.approx([3 / 4, 1 / 4])]
    zoo.add(learner([0], [[[0.0, 0.0]]]))
    assert zoo.predict_log_probs(0).exp()[0, 0].item() == pytest.approx((10 * 3 / 4 + 1 / 2) / 11)


def test_replay_counts():
    # max(floor(1 / ((n - 1) r)), 1)
    counts = {(2, 0.1): 10, (3, 0.1): 5, (5, 0.1): 2, (5, 0.05): 5, (5, 0.5): 1, (2, 0.3): 3, (11, 0.01): 10}
    assert {key: replay_repeats(*key) for key in counts} == counts


def test_replay_keeps_its_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 7 + [2] * 2 + [3] * 50)
    data = make_tasks(torch.zeros(159, 1, 1, 1, dtype=torch.uint8), labels, [(3, 0), (0, 1, 2)], flip=False)
    for frac, counts in ((0.29, [29, 2, 1]), (0.1, [10, 1, 1]), (0.01, [1, 1, 1])):
        rows = sample_replay(data, 1, frac, make_generator(0, 1, "replay"))
        assert data.labels[rows].bincount().tolist() == counts
        assert len(rows.unique()) == len(rows) and rows.min() >= data.starts[1] and rows.max() < data.starts[2]
        assert rows.equal(sample_replay(data, 1, frac, make_generator(0, 1, "replay")))
    assert not rows.equal(sample_replay(data, 1, frac, make_generator(1, 1, "replay")))
    assert sample_replay(data, 1, 1.0, None).equal(data.rows(1))
