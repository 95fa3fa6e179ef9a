"""Multi-Head: one learner on all tasks at once, the joint baseline; and the learner that a Model Zoo is made of."""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.build_dataset import build_dataset
from datasets.data import DataError
from net.build_net import build_net, set_dropout_generator
from utils import metrics
from utils.config import ConfigError, read_settings
from utils.logger import RunError, RunLog, describe_hardware, open_run, print_result, task_names, versions, write_file
from utils.run_net import choose_device, choose_precision, derive_seed, make_generator, predict_logits, train_net


@dataclass(frozen=True)
class Learner:
    """One trained network's word on the tasks that it was trained on.

    Attributes:
        tasks: [n] indices into the config; head i is of task tasks[i].
        train_logits: [n] tensors [N_t, C_t] float32, on the training rows of the task that may still be looked at.
        test_logits: [n] tensors [M_t, C_t] float32, on its test rows.
        seconds: of training and evaluation.
        net: the network's weights, where --save_nets asks for them.
    """

    tasks: tuple[int, ...]
    train_logits: tuple[Tensor, ...]
    test_logits: tuple[Tensor, ...]
    seconds: float
    net: dict | None = None


def train_learner(settings, precision, train, test, tasks, rows, seen, round, log):
    """Train a network with a head a task from a fresh start, and evaluate it.

    Args:
        settings: the run's.
        precision: fp32, bf16 or fp16.
        train, test: `TaskData` on the training device.
        tasks: [n] indices of the tasks.
        rows: [n] tensors, the rows of `train` to train on for each of them; a row may stand there several times.
        seen: [n] tensors, the rows of `train` on which the learner's logits are kept.
        round: which learner of the run this is; it decides every random choice together with the seed.
        log: the `RunLog`.

    Returns:
        A `Learner`.

    Raises:
        RunError: the training loss is not finite, or the device's memory does not suffice.
    """
    began = time.perf_counter()
    device = train.images.device
    seed = settings.seed
    classes = [train.classes[t] for t in tasks]
    net = build_net(settings.model, train.images.shape[1:], classes, settings.dropout, derive_seed(seed, round, "init"))
    net.to(device)
    set_dropout_generator(net, make_generator(seed, round, "dropout", device))
    heads = torch.cat([torch.full_like(r, head) for head, r in enumerate(rows)])
    rows = torch.cat(tuple(rows))
    log.start_round(round, settings.epochs)
    epochs = train_net(
        net, train.images, rows, heads, train.labels[rows], epochs=settings.epochs, batch=settings.batch,
        lr=settings.lr, l2_reg=settings.l2_reg, schedule=settings.schedule, augment=settings.augment, flip=train.flip,
        precision=precision, shuffle_generator=make_generator(seed, round, "shuffle", device),
        augment_generator=make_generator(seed, round, "augment", device),
    )  # fmt: skip
    try:
        for epoch, values in enumerate(epochs):
            if not math.isfinite(values["train_loss"]):
                raise RunError(
                    f"round {round}, epoch {epoch}: the training loss is {values['train_loss']} at learning rate "
                    f"{values['lr']:.3g}; the learners before it are whole; try a lower lr or --precision fp32"
                )
            log.log_epoch(round, epoch, settings.epochs, len(rows), **values, seconds=time.perf_counter() - began)
        train_logits, test_logits = [], []
        for head, (t, looked_at) in enumerate(zip(tasks, seen, strict=True)):
            args = (head, train.classes[t], precision)
            train_logits.append(predict_logits(net, train.images, looked_at, *args))
            test_logits.append(predict_logits(net, test.images, test.rows(t), *args))
    except torch.OutOfMemoryError as e:
        raise RunError(f"round {round}: {device} has too little memory for batch {settings.batch}; try less") from e
    weights = {k: v.cpu() for k, v in net.state_dict().items()} if settings.save_nets else None
    return Learner(tuple(tasks), tuple(train_logits), tuple(test_logits), time.perf_counter() - began, weights)


def prepare(settings):
    """Choose the device, load the data onto it, and refuse what cannot work, before anything is written.

    Returns:
        device, precision, train, test.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    generator = make_generator(settings.seed, 0, "data")
    train, test = build_dataset(settings.dataset, settings.tasks, settings.data_dir, generator, settings.samples,
                                settings.path, settings.size)  # fmt: skip
    try:
        build_net(settings.model, train.images.shape[1:], train.classes[:1], settings.dropout, seed=0)
    except ValueError as e:
        size = " x ".join(map(str, train.images.shape[2:]))
        raise ConfigError(f"{settings.hp_config}: {e}; those of {settings.data_config} have {size}") from e
    return device, precision, train.to(device), test.to(device)


def open_folder(settings, device, precision):
    """Make the run folder, or check that the one that is there may be gone on with, and return its path."""
    folder = Path(settings.out) / settings.name
    open_run(folder, record(settings, device, precision), settings.resume, describe_hardware(device))
    return folder


def record(settings, device, precision):
    """The settings as JSON and YAML know them, with the device and the precision that auto stood for."""
    return json.loads(json.dumps(asdict(settings) | {"device": device.type, "precision": precision}))


def finish(settings, device, precision, folder, matrix, rounds, seconds):
    """Write result.json, the last file of a run; README.md defines every key. Print and return it."""
    result = {
        "method": settings.method,
        "average_accuracy": metrics.average_accuracy(matrix),
        "accuracy": matrix[-1],
        "accuracy_matrix": matrix,
        "learning_accuracy": metrics.learning_accuracy(matrix) if settings.continual else None,
        "forgetting": metrics.forgetting(matrix) if settings.continual else None,
        "backward_transfer": metrics.backward_transfer(matrix) if settings.continual else None,
        "rounds": rounds,
        "classes": [list(task) for task in settings.tasks[: len(matrix[-1])]],
        "config": record(settings, device, precision),
        "versions": versions(),
        "seconds": seconds,
    }
    write_file(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print_result(result, task_names(settings.tasks, settings.names), folder)
    return result


def run(settings):
    """Train Multi-Head and return its result."""
    device, precision, train, test = prepare(settings)
    folder = open_folder(settings, device, precision)
    tasks = list(range(len(settings.tasks)))
    rows = [train.rows(t) for t in tasks]
    with RunLog(folder, 1, settings.epochs * len(train.labels)) as log:
        learner = train_learner(settings, precision, train, test, tasks, rows, rows, 0, log)
    accuracy = [metrics.accuracy(learner.test_logits[t], test.labels[test.rows(t)]) for t in tasks]
    log_probs = [F.log_softmax(logits.double(), dim=1) for logits in learner.train_logits]
    loss = [metrics.negative_log_likelihood(log_probs[t], train.labels[rows[t]]) for t in tasks]
    rounds = [{"tasks": tasks, "weights": [], "train_loss": loss, "seconds": learner.seconds}]
    return finish(settings, device, precision, folder, [accuracy], rounds, learner.seconds)


def command(prog, method, run, argv=None):
    """Run one command and return its exit status: 2, after one line, where the user must mend something."""
    try:
        run(read_settings(prog, method, argv))
    except (ConfigError, DataError, RunError) as e:
        print(f"{prog}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command("multihead.py", "multihead", run))
