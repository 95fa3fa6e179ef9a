"""Model Zoo (Ramesh & Chaudhari, ICLR 2022): an ensemble that grows by one multi-head learner per round.

Each round draws tasks with a probability that rises with the zoo's training loss on them, as boosting does, trains a
learner on them, and predicts a task by averaging the learners that know it.
"""
import math
import sys

import before_torch  # noqa: F401  # isort: skip
import torch

from datasets.data import replay_repeats, sample_replay
from datasets.images import make_images
from multihead import train_or_load
from utils.command import command
from utils.config_files import ConfigError
from utils.device import choose_device
from utils.dry_run import estimate
from utils.extend import check_extension, find_loss_rows
from utils.learner import COST, WARM, load_run
from utils.log import task_names
from utils.metrics import accuracy, log_probs, negative_log_likelihood
from utils.pretrained import freeze_backbone
from utils.run import finish, open_run, place, plan_rounds, prepare, split_val
from utils.run_net import make_generator, predict_logits


def ensemble_log_probs(logits, weights):
    """Log of the weighted mean of the learners' class probabilities.

    Taken in logarithms and float64, so that a probability too small for a float never makes a loss infinite.

    Args:
        logits: a tensor [N, C] for each learner.
        weights: a positive weight for each learner.

    Returns:
        [N, C] float64.
    """
    each = torch.stack([log_probs(x) for x in logits])
    log_weights = torch.tensor(weights, dtype=torch.float64, device=each.device).log()
    return (each + log_weights[:, None, None]).logsumexp(0) - math.log(sum(weights))


def join(mean, weight, logits, share):
    """The mean of some learners, whose weights sum to `weight`, and of one more, whose weight is `share`.

    Args:
        mean: [N, C] log probabilities (whatever, where `weight` is 0: there are no learners yet).
        logits: [N, C], of the one more.

    Returns:
        [N, C] float64, log probabilities.
    """
    return ensemble_log_probs([mean, logits], [weight, share]) if weight else log_probs(logits)


class Zoo:
    """The ensemble of all learners so far; a learner speaks only for the tasks that it was trained on.

    Args:
        train_labels: [T] tensors [N_t], labels of the training rows that may still be looked at; [] where `loss` is
            not wanted.
        test_labels: [T] tensors [M_t].
        classes: [T], how many classes each task has.
        replay_frac: r; the first learner trained on a task saw all of it and weighs 1/r in its mean.
        weigh_by_round: whether the n-th learner weighs n times as much (ours, not the paper's).

    Attributes:
        loss: [T] mean negative log likelihood of the zoo's prediction on those training rows.
        accuracy: [T] on the test rows.
        shares: for each learner, its weight in the mean of each of its tasks.
        names, class_names, nets: of a zoo that was loaded, see `load`; else None.
    """

    def __init__(self, train_labels, test_labels, classes, replay_frac=1.0, weigh_by_round=False):
        self.train_labels = train_labels
        self.test_labels = test_labels
        self.classes = classes
        self.replay_frac = replay_frac
        self.weigh_by_round = weigh_by_round
        self.learners = []
        self.shares = []
        # Of the learners that know a task: the sum of their weights, and the log of their mean class probabilities.
        self.weights = [0.0] * len(classes)
        self.train_means, self.test_means = [None] * len(classes), [None] * len(classes)
        # Without learners a task's prediction is uniform.
        self.loss = [math.log(c) for c in classes]
        self.accuracy = [1 / c for c in classes]
        self.names = self.class_names = self.nets = None

    def add(self, learner):
        """Let one more learner speak, and bring loss and accuracy of its tasks up to date.

        A mean goes on from the one before, so that a late round costs what an early one costs.
        """
        self.learners.append(learner)
        n = len(self.learners) if self.weigh_by_round else 1
        self.shares.append([n / (1 if self.weights[t] else self.replay_frac) for t in learner.tasks])
        for i, (t, share) in enumerate(zip(learner.tasks, self.shares[-1], strict=True)):
            if self.train_labels:
                self.train_means[t] = join(self.train_means[t], self.weights[t], learner.train_logits[i], share)
                self.loss[t] = negative_log_likelihood(self.train_means[t], self.train_labels[t])
            self.test_means[t] = join(self.test_means[t], self.weights[t], learner.test_logits[i], share)
            self.accuracy[t] = accuracy(self.test_means[t], self.test_labels[t])
            self.weights[t] += share

    def predict_log_probs(self, t):
        """The zoo's log class probabilities for task t, [N, C_t] float64, on its test rows."""
        labels = self.test_labels[t]
        return self.test_means[t] if self.weights[t] else self._uniform(t, len(labels), labels.device)

    def _uniform(self, t, n, device):
        return torch.full((n, self.classes[t]), -math.log(self.classes[t]), dtype=torch.float64, device=device)

    @classmethod
    def load(cls, folder, device="auto"):
        """The zoo of a run folder: all learners that it holds so far.

        Its `loss` is not brought up to date; `names` has a text for each task, `class_names` for each of its classes,
        and `nets` a `MultiHead` for each learner, or None where the run did not keep it.

        Args:
            folder: a run of modelzoo.py; with --save_nets, for `predict`.
            device: auto, cpu, cuda, cuda:1, ...

        Raises:
            ConfigError: no run folder, no learner, or a damaged or foreign file.
        """
        settings, labels, learners, nets = load_run(folder, choose_device(device))
        n = len(labels)
        zoo = cls([], labels, [len(task) for task in settings["tasks"]][:n], settings["replay_frac"],
                  settings["weigh_by_round"])
        zoo.class_names = settings["class_names"]
        zoo.names = task_names(settings["tasks"], settings["names"], zoo.class_names)[:n]
        for learner in learners:
            zoo.add(learner)
        zoo.nets = nets
        return zoo

    def predict(self, images, task):
        """Class probabilities of new images, by a zoo that was loaded.

        Args:
            images: as `make_images` takes them: uint8 arrays or tensors, Pillow images, files, a list, or one image.
            task: its index in the config, or its name.

        Returns:
            [N, C_t] float64 on the CPU; column c is of the c-th label that the config lists for the task.

        Raises:
            ConfigError: the run did not keep every network, no such task, or several of that name.
            DataError: images of another type or shape.
        """
        t = self.names.index(task) if task in self.names else task
        if not hasattr(t, "__index__") or t not in range(len(self.names)):
            raise ConfigError(f"task: {task!r} is not one of {', '.join(self.names)}, nor an index of one")
        if self.names.count(task) > 1:
            raise ConfigError(f"task: {task!r} names {self.names.count(task)} tasks; give the index of one")
        if None in self.nets:
            raise ConfigError("the run did not keep every network, as --save_nets does; what it stored can be read")
        device = self.test_labels[t].device
        images = make_images(images, self.learners[0].net["image_shape"]).to(device)
        rows, mean, weight = torch.arange(len(images), device=device), None, 0.0
        for learner, net, shares in zip(self.learners, self.nets, self.shares, strict=True):
            if t in learner.tasks:
                i = learner.tasks.index(t)
                precision = learner.net["precision"]
                if device.type == "cpu" and precision == "fp16":
                    precision = "fp32"  # the nearest that a CPU is good at
                logits = predict_logits(net, images, rows, i, self.classes[t], precision)
                mean, weight = join(mean, weight, logits, shares[i]), weight + shares[i]
        return (mean if weight else self._uniform(t, len(images), device)).exp().cpu()


def task_weights(losses):
    """w_t = clip(exp((loss_t - m) / m), 1e-4, 1e3) with m the mean of `losses`; equal weights where m is 0.

    Args:
        losses: [n] the zoo's loss on each task that may be drawn, 0 or more.

    Returns:
        [n] float64, in [1e-4, 1e3].
    """
    losses = torch.tensor(losses, dtype=torch.float64)
    mean = losses.mean()
    return ((losses - mean) / mean).exp().clip(1e-4, 1e3) if mean > 0 else torch.ones_like(losses)


def sample_tasks(weights, n, generator):
    """Draw n tasks without replacement, with probability proportional to their weights ([T] above 0): n indices."""
    return torch.multinomial(weights, n, replacement=False, generator=generator).tolist() if n else []


def choose_tasks(zoo, k, continual, tasks_per_round, naive, generator):
    """The tasks of round k and the weights that they were drawn with.

    Args:
        zoo: the `Zoo` of the rounds before.
        k: counted from 0.
        continual: whether task k is new in round k.
        tasks_per_round: tasks that the learner trains on, the new one included.
        naive: draw with equal weights.
        generator: on the CPU.

    Returns:
        tasks: indices into the config; in continual mode the new task, k, last.
        weights: of the tasks that could be drawn: 0 .. k - 1 in continual mode, else all.
    """
    drawable = k if continual else len(zoo.classes)
    n = min(tasks_per_round - 1, k) if continual else tasks_per_round
    equal = naive or not zoo.learners
    weights = torch.ones(drawable, dtype=torch.float64) if equal else task_weights(zoo.loss[:drawable])
    tasks = sample_tasks(weights, n, generator)
    return [*tasks, k] if continual else tasks, weights.tolist()


def run(settings, loaded=None):
    """Grow a zoo in its run folder and return its result; `loaded` is as for `build_dataset`.

    Raises:
        ConfigError, DataError: a mistake in settings or data; nothing was written.
        RunError: training diverged or the disk refused; what was written before is safe.
    """
    device, precision, train, test = prepare(settings, loaded)
    train, val = split_val(settings, train)
    train, test, val = place(device, train, test, val)
    old = check_extension(settings, device, precision, train, test)
    plan = plan_rounds(settings, train)
    if settings.dry_run:
        return estimate(settings, device, precision, train, test, plan, val, len(old))
    with open_run(settings, device, precision, train, test, plan, val) as (folder, log):
        matrix, rounds, cost = grow_zoo(settings, precision, train, test, folder, log, old, val)
        return finish(settings, device, precision, train, matrix, rounds, cost)


def grow_zoo(settings, precision, train, test, folder, log, old=(), val=None):
    """The paper's algorithm, a round each turn of the loop; a learner already on disk is not trained again.

    Args:
        settings: the run's.
        precision: fp32, bf16 or fp16.
        train, test, val: `TaskData` on the training device; val of the rows held out (None: there are none).
        folder, log: the run folder and its `RunLog`.
        old: tasks of the learners that are there from the run that this one extends.

    Returns:
        matrix: [rounds][tasks] the zoo's test accuracy after each round, None where a task is not yet seen.
        rounds: a dict per round, as in result.json.
        cost: of all learners together: seconds, rows_trained, parameters; and stored_rows.
    """
    continual, seed, r = settings.continual, settings.seed, settings.replay_frac
    num_tasks = settings.num_rounds if continual else len(settings.tasks)
    kept = [sample_replay(train, t, r, make_generator(seed, t, "replay")) for t in range(num_tasks)]
    loss_rows = kept if r < 1 else find_loss_rows(folder, train, num_tasks)
    frozen = 0
    if settings.freeze:
        train, test, val, frozen = freeze_backbone(settings, precision, folder, train, test, val)
    zoo = Zoo([train.labels[rows] for rows in loss_rows], [test.labels[test.rows(t)] for t in range(num_tasks)],
              train.classes[:num_tasks], r, settings.weigh_by_round)

    def train_rows(k, tasks, t):
        """The rows of task t that the learner of round k trains on: all of a new task, the kept ones of a past task."""
        return kept[t].repeat(replay_repeats(len(tasks), r)) if continual and r < 1 and t != k else train.rows(t)

    matrix, rounds = [], []
    for k in range(WARM if settings.warm_start else 0, settings.num_rounds):
        if k == WARM:
            tasks, weights = list(range(num_tasks)), []
        else:
            tasks, weights = choose_tasks(zoo, k, continual, settings.tasks_per_round, settings.naive,
                                          make_generator(seed, k, "draw"))
            tasks = list(old[k]) if k < len(old) else tasks  # a draw on another machine may have gone otherwise
        learner = train_or_load(settings, precision, train, test, tasks, [train_rows(k, tasks, t) for t in tasks],
                                [loss_rows[t] for t in tasks], k, folder, log, val)
        zoo.add(learner)
        seen = k + 1 if continual else num_tasks
        unseen = [None] * (num_tasks - seen)
        if k != WARM:
            matrix.append(zoo.accuracy[:seen] + unseen)
            rounds.append({"tasks": tasks, "weights": weights, "train_loss": zoo.loss[:seen] + unseen,
                           "seconds": learner.seconds})
        log.log_round(k, tasks=tasks, accuracy=zoo.accuracy[:seen], seconds=learner.seconds,
                      known=[t for t in range(seen) if zoo.weights[t]])
    cost = {key: sum(getattr(learner, key) for learner in zoo.learners) for key in COST}
    cost["parameters"] += frozen
    replays = not continual or settings.tasks_per_round > 1  # Isolated never takes a past row
    return matrix, rounds, cost | {"stored_rows": sum(map(len, kept)) if replays else 0}


if __name__ == "__main__":
    sys.exit(command("modelzoo.py", "modelzoo", run))
