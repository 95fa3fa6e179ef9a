"""Multi-Head: one learner on all tasks at once, the joint baseline; and the learner that a Model Zoo is made of."""
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.build_dataset import build_dataset
from datasets.data import DataError, checksum
from net.build_net import build_net, set_dropout_generator
from utils import metrics
from utils.config import ConfigError, read_settings
from utils.logger import (
    RunError,
    RunLog,
    describe_hardware,
    load_tensors,
    load_whole,
    open_run,
    print_result,
    save_tensors,
    set_aside,
    task_names,
    versions,
    write_file,
)
from utils.run_net import (
    MEAN,
    STD,
    BadSnapshot,
    choose_device,
    choose_precision,
    derive_seed,
    make_generator,
    predict_logits,
    train_net,
)

CHECKPOINT_SECONDS = 60  # between two checkpoints of a learner in training, at least
COST = ("seconds", "rows_trained", "parameters")  # of a learner; a run's are the sums over its learners


@dataclass(frozen=True)
class Learner:
    """One trained network's word on the tasks that it was trained on.

    Attributes:
        tasks: [n] indices into the config; head i is of task tasks[i].
        train_logits: [n] tensors [N_t, C_t] float32, on the training rows of the task that may still be looked at.
        test_logits: [n] tensors [M_t, C_t] float32, on its test rows.
        seconds: of training and evaluation.
        rows_trained: training rows times epochs; a row that stands several times in an epoch counts as often.
        parameters: of the network with its heads.
        net: what `load_net` makes the network from, where --save_nets asks for it.
    """

    tasks: tuple[int, ...]
    train_logits: tuple[Tensor, ...]
    test_logits: tuple[Tensor, ...]
    seconds: float
    rows_trained: int
    parameters: int
    net: dict | None = None


def train_epochs(settings, precision, train, tasks, rows, round, start=None):
    """Train a network with a head a task from a fresh start.

    Args:
        settings: the run's.
        precision: fp32, bf16 or fp16.
        train: `TaskData` on the training device.
        tasks: [n] indices of the tasks.
        rows: [n] tensors, the rows of `train` to train on for each of them; a row may stand there several times.
        round: which learner of the run this is; it decides every random choice together with the seed.
        start: a snapshot to go on from (None: from the beginning).

    Yields:
        (net, values, snapshot) after each epoch: the `MultiHead`, and what `train_net` yields.

    Raises:
        RunError: the training loss is not finite.
        BadSnapshot: `start` is of another network.
    """
    device, seed = train.images.device, settings.seed
    classes = [train.classes[t] for t in tasks]
    net = build_net(settings.model, train.images.shape[1:], classes, settings.dropout, derive_seed(seed, round, "init"))
    net.to(device)
    purposes = ("shuffle", "augment", "dropout")
    generators = {purpose: make_generator(seed, round, purpose, device) for purpose in purposes}
    set_dropout_generator(net, generators["dropout"])
    heads = torch.cat([torch.full_like(r, head) for head, r in enumerate(rows)])
    rows = torch.cat(tuple(rows))
    epochs = train_net(
        net, train.images, rows, heads, train.labels[rows], epochs=settings.epochs, batch=settings.batch,
        lr=settings.lr, l2_reg=settings.l2_reg, schedule=settings.schedule, augment=settings.augment, flip=train.flip,
        precision=precision, generators=generators, start=start,
    )  # fmt: skip
    for values, snapshot in epochs:
        where = f"round {round}, epoch {values['epoch']}"
        require_finite(values["train_loss"], f"{where}: the training loss", values["lr"])
        yield net, values, snapshot


def require_finite(value, what, lr):
    """Stop a run whose learner diverges, before it joins the zoo.

    Raises:
        RunError: `value` is infinite or not a number.
    """
    if not math.isfinite(value):
        raise RunError(f"{what} is {value} at learning rate {lr:.3g}; the learners before this one are safe; "
                       "try a lower lr or --precision fp32")  # fmt: skip


def train_learner(settings, precision, train, test, tasks, rows, seen, round, log, checkpoint=None):
    """Train a learner and evaluate it.

    Args:
        settings, precision, train, tasks, rows, round: see `train_epochs`.
        test: `TaskData` on the same device.
        seen: [n] tensors, the rows of `train` on which the learner's logits are kept.
        log: the `RunLog`.
        checkpoint: a file that is kept up to date between epochs while training takes long, and from which training
            goes on where it is there (None: no such file).

    Returns:
        A `Learner`.

    Raises:
        RunError: the training loss or a logit is not finite, or the disk refuses.
    """
    saved = load_whole(checkpoint, "cpu", log) if checkpoint else None
    kinds = {"tasks": list, "epoch": int, "seconds": float, "snapshot": dict}
    whole = isinstance(saved, dict) and all(isinstance(saved.get(key), kind) for key, kind in kinds.items())
    if saved is not None and not (whole and saved["tasks"] == list(tasks) and 0 < saved["epoch"] < settings.epochs):
        set_aside(checkpoint, "not of this run", log)
        saved = None
    first, seconds, start = (saved[key] for key in ("epoch", "seconds", "snapshot")) if saved else (0, 0.0, None)
    began = time.perf_counter() - seconds
    n = sum(map(len, rows))
    log.forget(round, first)
    log.start_round(round, settings.epochs)
    log.skip(first * n, first, settings.epochs)
    due = time.perf_counter() + CHECKPOINT_SECONDS
    epochs = train_epochs(settings, precision, train, tasks, rows, round, start)
    for net, values, snapshot in epochs:  # noqa: B007 (net is evaluated below)
        log.log_epoch(round, settings.epochs, n, **values, seconds=time.perf_counter() - began)
        done = values["epoch"] + 1
        if checkpoint and time.perf_counter() >= due and done < settings.epochs:
            now = time.perf_counter()
            saved = {"tasks": list(tasks), "epoch": done, "seconds": now - began, "snapshot": snapshot()}
            save_tensors(checkpoint, saved)
            # A hundred times what writing costs: under 1 % of the time goes into it.
            due = time.perf_counter() + max(CHECKPOINT_SECONDS, 100 * (time.perf_counter() - now))
    train_logits, test_logits = [], []
    for head, (t, looked_at) in enumerate(zip(tasks, seen, strict=True)):
        args = (head, train.classes[t], precision)
        train_logits.append(predict_logits(net, train.images, looked_at, *args))
        test_logits.append(predict_logits(net, test.images, test.rows(t), *args))
        for logits in (train_logits[-1], test_logits[-1]):
            require_finite(logits.abs().max().item(), f"round {round}: after training the largest logit", values["lr"])
    cost = (time.perf_counter() - began, settings.epochs * n, sum(p.numel() for p in net.parameters()))
    saved = None
    if settings.save_nets:
        saved = {"model": settings.model, "image_shape": list(train.images.shape[1:]),
                 "classes": [train.classes[t] for t in tasks], "dropout": settings.dropout, "mean": MEAN, "std": STD,
                 "precision": precision, "state": {k: v.cpu() for k, v in net.state_dict().items()}}  # fmt: skip
    return Learner(tuple(tasks), tuple(train_logits), tuple(test_logits), *cost, saved)


def load_net(saved, device):
    """Make the network of a `Learner.net` on `device`, ready to predict: a `MultiHead`.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it was written by another program.
    """
    if (saved["mean"], saved["std"]) != (MEAN, STD):
        raise ValueError(f"its images had mean {saved['mean']} and deviation {saved['std']}, not {MEAN} and {STD}")
    net = build_net(saved["model"], tuple(saved["image_shape"]), saved["classes"], saved["dropout"], seed=0)
    net.load_state_dict(saved["state"])
    return net.to(device, memory_format=torch.channels_last).eval()


def train_or_load(settings, precision, train, test, tasks, rows, seen, round, folder, log):
    """The learner of `round`: from its file in the run folder where that is whole, else trained and saved there.

    Args and errors as of `train_learner`, with `folder` the run folder.
    """
    path = learner_path(folder, round)
    checkpoint = path.with_suffix(".checkpoint")
    learner = load_learner(path, train, test, tasks, seen, log)
    if learner is None:
        arguments = (settings, precision, train, test, tasks, rows, seen, round, log, checkpoint)
        try:
            learner = train_learner(*arguments)
        except BadSnapshot as e:
            set_aside(checkpoint, e, log)
            learner = train_learner(*arguments)
        save_learner(path, learner)
    else:
        log.skip(settings.epochs * sum(map(len, rows)))
    with contextlib.suppress(OSError):
        checkpoint.unlink()
    return replace(learner, net=None)  # on disk; a run that grows needs the logits alone


def learner_path(folder, round):
    """Where a run folder keeps the learner of `round`; -1 is the one of --warm_start."""
    return folder / "learners" / ("warm.pt" if round < 0 else f"{round:03}.pt")


def save_learner(path, learner):
    """Write all that a `Learner` holds; a `RunError` where the disk refuses."""
    logits = {key: [x.cpu() for x in getattr(learner, key)] for key in ("train_logits", "test_logits")}
    rest = {key: getattr(learner, key) for key in (*COST, "net")}
    save_tensors(path, {"tasks": list(learner.tasks), **rest, **logits})


def make_learner(saved):
    """The `Learner` of what `save_learner` wrote.

    Raises:
        KeyError, TypeError, ValueError: it was written by another program.
    """
    logits = (tuple(saved[key]) for key in ("train_logits", "test_logits"))
    return Learner(tuple(saved["tasks"]), *logits, *(saved[key] for key in (*COST, "net")))


def load_learner(path, train, test, tasks, seen, log):
    """Read a learner that an earlier process trained; None where there is none that is whole and of these tasks.

    Arguments as of `train_learner`; a file that does not fit is set aside, one that cannot be read is a `RunError`.
    """
    saved = load_whole(path, train.images.device, log)
    if saved is None:
        return None
    shapes = {"train_logits": [(len(rows), train.classes[t]) for t, rows in zip(tasks, seen, strict=True)],
              "test_logits": [(len(test.rows(t)), test.classes[t]) for t in tasks]}  # fmt: skip
    try:
        learner = make_learner(saved)
        found = {key: [tuple(x.shape) for x in getattr(learner, key) if x.dtype == torch.float32] for key in shapes}
        finite = all(torch.isfinite(x).all() for key in shapes for x in getattr(learner, key))
        counted = all(isinstance(getattr(learner, key), (int, float)) for key in COST)
        if learner.tasks == tuple(tasks) and found == shapes and finite and counted:
            return learner
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # a file of another program
    set_aside(path, "not of this run", log)
    return None


def prepare(settings, loaded=None):
    """Choose the device, load the data onto it, and refuse what cannot work, before anything is written.

    Args:
        settings: the run's.
        loaded: as for `build_dataset`.

    Returns:
        device, precision (fp32, bf16 or fp16), and train and test, `TaskData` on the device.

    Raises:
        ConfigError: no such device, or images too small for the model.
        DataError: see `build_dataset`.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    generator = make_generator(settings.seed, 0, "data")
    train, test = build_dataset(settings.dataset, settings.tasks, settings.data_dir, generator, settings.samples,
                                settings.path, settings.size, loaded)  # fmt: skip
    try:
        build_net(settings.model, train.images.shape[1:], train.classes[:1], settings.dropout, seed=0)
    except ValueError as e:
        size = " x ".join(map(str, train.images.shape[2:]))
        raise ConfigError(f"{settings.hp_config}: {e}; those of {settings.data_config} have {size}") from e
    return device, precision, train.to(device), test.to(device)


@contextlib.contextmanager
def open_folder(settings, device, precision, train, test):
    """Hold the run folder as its only writer, and yield its path.

    The test labels lie in it, so that a new metric, or an ensemble of runs, needs run folders alone; and a checksum of
    the data, so that a run is never gone on with on others. Errors as of `open_run`.
    """
    folder = Path(settings.out) / settings.name
    about = record(settings, device, precision) | {"data": checksum(train, test)}
    with open_run(folder, about, settings.resume, describe_hardware(device)):
        labels = [test.labels[test.rows(t)].cpu() for t in range(len(settings.tasks))]
        try:
            load_tensors(folder / "test_labels.pt", "cpu")
        except (FileNotFoundError, ValueError):  # not yet there, or damaged
            save_tensors(folder / "test_labels.pt", labels)
        yield folder


def record(settings, device, precision):
    """The settings as JSON and YAML know them, with the device and the precision that auto stood for."""
    return json.loads(json.dumps(asdict(settings) | {"device": device.type, "precision": precision}))


def finish(settings, device, precision, matrix, rounds, cost):
    """Write result.json, the last file, of what `grow_zoo` returned; README.md defines its keys. Print, return it."""
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
        **cost,
    }
    folder = Path(settings.out) / settings.name
    write_file(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print_result(result, task_names(settings.tasks, settings.names), folder)
    return result


def run(settings, loaded=None):
    """Train Multi-Head in its run folder and return its result; `loaded` and errors as of `modelzoo.run`."""
    device, precision, train, test = prepare(settings, loaded)
    tasks = list(range(len(settings.tasks)))
    rows = [train.rows(t) for t in tasks]
    work = settings.epochs * len(train.labels)
    with (
        open_folder(settings, device, precision, train, test) as folder,
        RunLog(folder, 1, work, settings.tensorboard) as log,
    ):
        learner = train_or_load(settings, precision, train, test, tasks, rows, rows, 0, folder, log)
        accuracy = [metrics.accuracy(learner.test_logits[t], test.labels[test.rows(t)]) for t in tasks]
        log_probs = map(metrics.log_probs, learner.train_logits)
        loss = [metrics.negative_log_likelihood(p, train.labels[rows[t]]) for t, p in enumerate(log_probs)]
        log.log_round(0, tasks=tasks, test_accuracy=sum(accuracy) / len(tasks), seconds=learner.seconds)
        rounds = [{"tasks": tasks, "weights": [], "train_loss": loss, "seconds": learner.seconds}]
        cost = {key: getattr(learner, key) for key in COST} | {"stored_rows": len(train.labels)}
        return finish(settings, device, precision, [accuracy], rounds, cost)


class Stopped(BaseException):
    """A signal asks this process to end."""


def _stop(number, _):
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_DFL)  # a second one ends the process whatever it does
    raise Stopped(number)


def guard(prog, work):
    """Do `work`, a function without arguments, and return the exit status.

    What it returns, or 0; 2, after one line, where the user must mend something; 128 + n after signal n, which loses at
    most the learner in training.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a task's name may have letters that the terminal lacks
    try:
        return work() or 0
    except (ConfigError, DataError, RunError) as e:
        line, status = str(e), 2
    except OSError as e:
        line, status = f"{e.filename or 'output'}: cannot be read or written ({e.strerror})", 2
    except Stopped as e:
        number = signal.Signals(e.args[0])
        line, status = f"stopped by {number.name}; the same command with --resume goes on", 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # File and class names may hold line ends and worse, and be of any length.
    print("".join(c if c.isprintable() else " " for c in f"{prog}: {line}"[:900]), file=sys.stderr)
    return status


@contextlib.contextmanager
def name_batch(settings):
    """Where memory runs out inside, on whichever device, raise a `RunError` that names the batch size."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        # A CPU's allocator raises a plain RuntimeError.
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e):
            raise RunError(f"{settings.device}: too little memory with batch {settings.batch}; try less") from e
        raise


def command(prog, method, run, argv=None):
    """Read the settings of one command, run it, and return the exit status as `guard` does."""

    def work():
        settings = read_settings(prog, method, argv)
        with name_batch(settings):
            run(settings)

    return guard(prog, work)


if __name__ == "__main__":
    sys.exit(command("multihead.py", "multihead", run))
