"""--dry_run: what a run would take, from two timed batches of each size that it will have; no run folder is written."""
import statistics
import time

import torch

from net.build_net import build_net, set_dropout_generator
from utils.config_files import ConfigError
from utils.learner import WARM, learner_path
from utils.log import say_folded
from utils.pretrained import freeze_backbone
from utils.run import count_parameters, describe, find_run
from utils.run_folder import RunError
from utils.run_net import NORM_BATCHES, derive_seed, make_generator, predict_logits, train_net


def estimate(settings, device, precision, train, test, plan, val=None, copied=0):
    """Print what the run would train, its time, the size of its images and files, and whether its folder is free.

    The times are of the first tasks' rows, on a machine that does what it does now.

    Args:
        settings, device, precision, train, test, plan, val: see `open_run`.
        copied: learners of the run that this one extends.
    """
    try:
        folder, _, found = find_run(settings, device, precision, train, test, val)
        end = f"{found} of {settings.num_rounds} rounds found" if settings.resume else "the run folder is free"
        there = max(found, copied) + (settings.warm_start and learner_path(folder, WARM).exists())
    except (ConfigError, RunError) as e:
        there, end = copied, f"the run itself would be refused: {e}"
    for line in describe(settings, device, precision, train, plan):
        say_folded(line)
    if settings.freeze:
        train, test, val, _ = freeze_backbone(settings, precision, None, train, test, val)
    batch, epochs = settings.batch, settings.epochs
    sizes = {size for _, rows in plan for size in (min(batch, rows), rows % batch) if size}
    max_tasks = max(n for n, _ in plan)
    net = build_net(settings.model, train.images.shape[1:], train.classes[:max_tasks], settings.dropout,
                    derive_seed(settings.seed, 0, "init")).to(device)
    step = {size: time_step(net, settings, precision, train, max_tasks, size) for size in sorted(sizes)}
    per_row = time_prediction(net, precision, train)

    rows_per_task = (len(train.labels) + len(test.labels)) / len(train.classes)
    # After training, and before each validation, come batch norm's statistics, which cost what predicting as many rows
    # does; then the predictions, and those of each validation.
    renewals = epochs if val else 1
    held_per_task = epochs * len(val.labels) / len(val.classes) if val else 0
    seconds = []
    for n, rows in plan:
        training = epochs * (rows // batch * step.get(batch, 0) + (step[rows % batch] if rows % batch else 0))
        predicted = renewals * min(rows, NORM_BATCHES * batch) + n * (rows_per_task + held_per_task)
        seconds.append(training + predicted * per_row)
    left = plan[there:]
    steps = epochs * sum(-(-rows // batch) for _, rows in left)
    in_all = clock(sum(seconds[there:])) + " in all" + " that is left" * bool(there)
    logits = sum(n for n, _ in plan) * rows_per_task * statistics.mean(train.classes) * 4
    nets = count_parameters(settings.model, train.images.shape[1:], train.classes[:max_tasks], settings.dropout) * 4
    files = logits + nets * (len(plan) if settings.save_nets else settings.inherit)
    images = sum(data.images.nbytes for data in (train, test, val) if data)
    timed = f"{1000 * step[max(step)]:.1f} ms per batch of {max(step)}"
    say_folded(f"dry run, no run folder written: {epochs * sum(rows for _, rows in left):,} rows in {steps:,} steps, "
        f"about {clock(statistics.mean(seconds))} per round ({clock(min(seconds))} to {clock(max(seconds))}), "
        f"{in_all} ({timed}); images {images / 1e6:.1f} MB, learners' files "
        f"{files / 1e6:.1f} MB")
    say_folded(end)


def time_step(net, settings, precision, train, max_tasks, size):
    """Seconds of a training step on `size` rows of the first `max_tasks` tasks: the mean of two, once warm."""
    device = train.device
    ends = torch.tensor(train.starts[1 : max_tasks + 1], device=device)
    rows = torch.arange(2 * size, device=device) % train.starts[max_tasks]
    heads = torch.bucketize(rows, ends, right=True)
    generators = {key: make_generator(0, 0, key, device) for key in ("shuffle", "augment", "dropout")}
    set_dropout_generator(net, generators["dropout"])
    warm = 4 if device.type == "cuda" else 1  # a GPU captures its fourth step
    # After the last epoch, which is never asked for, batch norm's statistics would be set anew.
    epochs = train_net(net, train.images, rows, heads, train.labels[rows], epochs=warm + 2, batch=size, lr=settings.lr,
                       l2_reg=settings.l2_reg, schedule=settings.schedule, augment=settings.augment, flip=train.flip,
                       precision=precision, generators=generators, optimiser=settings.optimiser,
                       momentum=settings.momentum, clip_norm=settings.clip_norm,
                       label_smoothing=settings.label_smoothing, capture=settings.capture,
                       weights=torch.ones(len(rows), device=device) if settings.class_weights else None)
    for _ in range(warm):
        next(epochs)
    start = time.perf_counter()
    next(epochs)  # ends by reading the losses, and so waits for the device
    return (time.perf_counter() - start) / 2


def time_prediction(net, precision, train):
    """Seconds per row of predicting, as a learner does once it is trained."""
    rows = train.rows(0)[:256]
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        predict_logits(net, train.images, rows, 0, train.classes[0], precision).sum().item()
    return (time.perf_counter() - start) / len(rows)


def clock(seconds):
    """A time in words: 0.4 s, 12 s, 3 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
