"""Model Zoo (Ramesh & Chaudhari, ICLR 2022): an ensemble that grows by one multi-head learner a round.

Each round draws tasks with a probability that rises with the zoo's training loss on them, as boosting does, trains a
learner on them, and predicts a task by averaging the learners that know it.
"""
import math
import sys
from fractions import Fraction
from pathlib import Path

import torch

from datasets.data import checksum, make_images
from multihead import (
    COST,
    command,
    finish,
    learner_path,
    load_net,
    make_learner,
    open_folder,
    prepare,
    record,
    train_or_load,
)
from utils.config import ConfigError, load_yaml
from utils.logger import FREE, RunLog, load_tensors, task_names, write_file
from utils.metrics import accuracy, log_probs, negative_log_likelihood
from utils.run_net import choose_device, make_generator, predict_logits

WARM = -1  # the "round" of the learner that --warm_start trains before round 0


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


class Zoo:
    """The ensemble of all learners so far; a learner speaks only for the tasks that it was trained on.

    Args:
        train_labels: [T] tensors [N_t], labels of the training rows that may still be looked at.
        test_labels: [T] tensors [M_t].
        classes: [T], how many classes each task has.
        replay_frac: r; the first learner trained on a task saw all of it and weighs 1/r in its mean.

    Attributes:
        loss: [T] mean negative log likelihood of the zoo's prediction on those training rows.
        accuracy: [T] on the test rows.
    """

    def __init__(self, train_labels, test_labels, classes, replay_frac=1.0):
        self.train_labels = train_labels
        self.test_labels = test_labels
        self.classes = classes
        self.replay_frac = replay_frac
        self.learners = []
        # Of the learners that know a task: the sum of their weights, and the log of their mean class probabilities.
        self.weights = [0.0] * len(classes)
        self.means = {"train_logits": [None] * len(classes), "test_logits": [None] * len(classes)}
        # Without learners a task's prediction is uniform.
        self.loss = [math.log(c) for c in classes]
        self.accuracy = [1 / c for c in classes]

    def add(self, learner):
        """Let one more learner speak, and bring loss and accuracy of its tasks up to date.

        A mean goes on from the one before, so that a late round costs what an early one costs.
        """
        self.learners.append(learner)
        for i, t in enumerate(learner.tasks):
            before = self.weights[t]
            for key, means in self.means.items():
                means[t], self.weights[t] = self._join(means[t], before, getattr(learner, key)[i])
            if self.train_labels:
                self.loss[t] = negative_log_likelihood(self.means["train_logits"][t], self.train_labels[t])
            self.accuracy[t] = accuracy(self.means["test_logits"][t], self.test_labels[t])

    def predict_log_probs(self, t, logits="test_logits"):
        """The zoo's log class probabilities for task t, [N, C_t] float64, on its train_logits or test_logits rows."""
        if self.weights[t]:
            return self.means[logits][t]
        labels = self.train_labels[t] if logits == "train_logits" else self.test_labels[t]
        return self._uniform(t, len(labels), labels.device)

    def _join(self, mean, weight, logits):
        """The mean of one more learner, and its weight: 1/r for the first of a task, 1 for each later one."""
        if not weight:
            return log_probs(logits), 1 / self.replay_frac
        return ensemble_log_probs([mean, logits], [weight, 1.0]), weight + 1

    def _uniform(self, t, n, device):
        return torch.full((n, self.classes[t]), -math.log(self.classes[t]), dtype=torch.float64, device=device)

    @classmethod
    def load(cls, folder, device="auto"):
        """The zoo of a run folder: all learners that it holds so far.

        Its `loss` is not brought up to date; `names` has a text for each task.

        Args:
            folder: a run of modelzoo.py; with --save_nets, for `predict`.
            device: auto, cpu, cuda, cuda:1, ...

        Raises:
            ConfigError: no run folder, no learner, or a damaged or foreign file.
        """
        folder, device = Path(folder), choose_device(device)
        path = folder / "config.yaml"
        try:
            settings = load_yaml(path)["settings"]
            n = settings["num_rounds"] if settings["continual"] else len(settings["tasks"])
            path = folder / "test_labels.pt"
            labels = load_tensors(path, device)[:n]
            zoo = cls([], labels, [len(task) for task in settings["tasks"]][:n], settings["replay_frac"])
            zoo.names = task_names(settings["tasks"], settings["names"])[:n]
            zoo.nets = []
            for k in range(WARM if settings["warm_start"] else 0, settings["num_rounds"]):
                path = learner_path(folder, k)
                if not path.exists() and zoo.learners:
                    break  # the run is not finished
                learner = make_learner(load_tensors(path, device))
                zoo.add(learner)
                zoo.nets.append(learner.net and load_net(learner.net, device))
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise ConfigError(f"{path}: damaged or foreign ({' '.join(str(e).split())[:80]})") from e
        return zoo

    def predict(self, images, task):
        """Class probabilities of new images, by a zoo that was loaded.

        Args:
            images: as `make_images` takes them: a uint8 array or tensor, or a list of image files.
            task: its index in the config, or its name.

        Returns:
            [N, C_t] float64 on the CPU; column c is of the c-th label that the config lists for the task.

        Raises:
            ConfigError: the run kept no networks, no such task, or several of that name.
            DataError: images of another type or shape.
        """
        t = self.names.index(task) if task in self.names else task
        if not hasattr(t, "__index__") or t not in range(len(self.names)):
            raise ConfigError(f"task: {task!r} is not one of {', '.join(self.names)}, nor an index of one")
        if self.names.count(task) > 1:
            raise ConfigError(f"task: {task!r} names {self.names.count(task)} tasks; give the index of one")
        if None in self.nets:
            raise ConfigError("the run kept no networks, which --save_nets does; only what it stored can be read")
        device = self.test_labels[t].device
        images = make_images(images, self.learners[0].net["image_shape"]).to(device)
        rows, mean, weight = torch.arange(len(images), device=device), None, 0.0
        for learner, net in zip(self.learners, self.nets, strict=True):
            if t in learner.tasks:
                precision = learner.net["precision"]
                if device.type == "cpu" and precision == "fp16":
                    precision = "fp32"  # the nearest that a CPU is good at
                logits = predict_logits(net, images, rows, learner.tasks.index(t), self.classes[t], precision)
                mean, weight = self._join(mean, weight, logits)
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
    return sample_tasks(weights, n, generator) + [k] * continual, weights.tolist()


def sample_replay(train, t, replay_frac, generator):
    """Rows of task t that may be looked at once it is past: floor(replay_frac x rows) of every class, at least 1.

    Args:
        train: `TaskData`.
        t: index of the task.
        replay_frac: in (0, 1].
        generator: on the CPU.

    Returns:
        [n] int64, ascending.
    """
    if replay_frac == 1:
        return train.rows(t)
    rows, kept = train.rows(t), []
    for c in range(train.classes[t]):
        of_class = rows[train.labels[rows] == c]
        # The fraction as it was written: 0.29 of 100 rows is 29, though in floats 0.29 * 100 < 29.
        n = max(math.floor(Fraction(repr(replay_frac)) * len(of_class)), 1)
        kept.append(of_class[torch.randperm(len(of_class), generator=generator)[:n].to(rows.device)])
    return torch.cat(kept).sort().values


def replay_repeats(num_tasks, replay_frac):
    """How often a kept row of a past task stands in an epoch of a learner on n tasks: max(floor(1/((n-1)r)), 1).

    So about half of every batch is the new task. `num_tasks` is n, at least 2; `replay_frac` is r, in (0, 1].
    """
    return max(math.floor(1 / ((num_tasks - 1) * Fraction(repr(replay_frac)))), 1)


def run(settings, loaded=None):
    """Grow a zoo in its run folder and return its result; `loaded` is as for `build_dataset`.

    Raises:
        ConfigError, DataError: a mistake in settings or data; nothing was written.
        RunError: training diverged or the disk refused; what was written before is safe.
    """
    device, precision, train, test = prepare(settings, loaded)
    old = []
    if settings.extend is not None:
        old = check_extension(settings, record(settings, device, precision), train, test)
    with open_folder(settings, device, precision, train, test) as folder:
        for k in range(len(old)):
            if not learner_path(folder, k).exists():
                write_file(learner_path(folder, k), learner_path(Path(settings.extend), k).read_bytes())
        return finish(settings, device, precision, *grow_zoo(settings, precision, train, test, folder, old))


def check_extension(settings, mine, train, test):
    """Whether the learners of the run folder `settings.extend` are those that this run would begin with.

    Args:
        settings: this run's.
        mine: the same, as `record` gives them.
        train, test: `TaskData`.

    Returns:
        A tuple of tasks for each of its learners.

    Raises:
        ConfigError: they are not: other settings, other data, tasks that do not come first here; or a damaged file.
    """
    zoo, folder = Zoo.load(settings.extend, "cpu"), Path(settings.extend)
    theirs = load_yaml(folder / "config.yaml")["settings"]
    n = len(theirs["tasks"])
    # A precision and a device may change on the way.
    apart = (*FREE, "num_rounds", "device", "precision", "data", "names", "save_nets")
    now = mine | {"tasks": mine["tasks"][:n], "tasks_per_round": min(mine["tasks_per_round"], n)}
    for key in now:
        if key not in apart and now[key] != theirs.get(key):
            what = f"the first {n} tasks are" if key == "tasks" else f"{key} is {now[key]!r:.40}"
            was = "other tasks" if key == "tasks" else f"{theirs.get(key)!r:.40}"
            raise ConfigError(f"--extend: {what} not as in {folder}, which was run with {was}")
    if settings.save_nets and None in zoo.nets:
        raise ConfigError(f"--save_nets: {folder} kept no networks, so the run that extends it cannot keep all")
    if checksum(train.first(n), test.first(n)) != theirs.get("data"):
        raise ConfigError(f"--extend: the data of the first {n} tasks are not those that {folder} was run on")
    if len(zoo.learners) > settings.num_rounds:
        raise ConfigError(f"--extend: {folder} holds {len(zoo.learners)} learners; --num_rounds must be at least that")
    return [learner.tasks for learner in zoo.learners]


def grow_zoo(settings, precision, train, test, folder, old=()):
    """The paper's algorithm, a round each turn of the loop; a learner already on disk is not trained again.

    Args:
        settings: the run's.
        precision: fp32, bf16 or fp16.
        train, test: `TaskData` on the training device.
        folder: the run folder.
        old: tasks of the learners that are there from the run that this one extends.

    Returns:
        matrix: [rounds][tasks] the zoo's test accuracy after each round, None where a task is not yet seen.
        rounds: a dict a round, as in result.json.
        cost: of all learners together: seconds, rows_trained, parameters; and stored_rows.
    """
    continual, seed, r = settings.continual, settings.seed, settings.replay_frac
    num_tasks = settings.num_rounds if continual else len(settings.tasks)
    names = task_names(settings.tasks, settings.names)
    kept = [sample_replay(train, t, r, make_generator(seed, t, "replay")) for t in range(num_tasks)]
    zoo = Zoo([train.labels[rows] for rows in kept], [test.labels[test.rows(t)] for t in range(num_tasks)],
              train.classes[:num_tasks], r)  # fmt: skip

    def train_rows(k, tasks, t):
        """The rows of task t that the learner of round k trains on: all of a new task, the kept ones of a past task."""
        return kept[t].repeat(replay_repeats(len(tasks), r)) if continual and r < 1 and t != k else train.rows(t)

    per_round = [min(settings.tasks_per_round, k + 1 if continual else num_tasks) for k in range(settings.num_rounds)]
    learned = sum(per_round) + num_tasks * settings.warm_start
    matrix, rounds = [], []
    work = settings.epochs * learned * len(train.labels) / len(train.classes)
    with RunLog(folder, settings.num_rounds, work, settings.tensorboard) as log:
        for k in range(WARM if settings.warm_start else 0, settings.num_rounds):
            if k == WARM:
                tasks, weights = list(range(num_tasks)), []
            else:
                tasks, weights = choose_tasks(zoo, k, continual, settings.tasks_per_round, settings.naive,
                                              make_generator(seed, k, "draw"))  # fmt: skip
                tasks = list(old[k]) if k < len(old) else tasks  # a draw on another machine may have gone otherwise
            learner = train_or_load(settings, precision, train, test, tasks, [train_rows(k, tasks, t) for t in tasks],
                                    [kept[t] for t in tasks], k, folder, log)  # fmt: skip
            zoo.add(learner)
            seen = k + 1 if continual else num_tasks
            unseen = [None] * (num_tasks - seen)
            mean = sum(zoo.accuracy[:seen]) / seen
            if k != WARM:
                matrix.append(zoo.accuracy[:seen] + unseen)
                rounds.append({"tasks": tasks, "weights": weights, "train_loss": zoo.loss[:seen] + unseen,
                               "seconds": learner.seconds})  # fmt: skip
            log.log_round(k, tasks=tasks, test_accuracy=mean, seconds=learner.seconds)
            log.print(f"{'warm start' if k == WARM else f'round {k + 1}/{settings.num_rounds}'}: "
                      f"{', '.join(names[t] for t in tasks)}: zoo's test accuracy {100 * mean:.2f} % on {seen} "
                      f"task{'s' * (seen > 1)} seen, {learner.seconds:.1f} s")  # fmt: skip
    cost = {key: sum(getattr(learner, key) for learner in zoo.learners) for key in COST}
    revisits = not continual or settings.tasks_per_round > 1
    return matrix, rounds, cost | {"stored_rows": revisits * sum(map(len, kept))}


if __name__ == "__main__":
    sys.exit(command("modelzoo.py", "modelzoo", run))
