"""Multi-Head: one learner on all tasks at once, the joint baseline; and the learner that a Model Zoo is made of."""
import contextlib
import math
import sys
import time
from dataclasses import replace
from functools import partial

import before_torch  # noqa: F401  # isort: skip
import torch

from net.build_net import build_net, set_dropout_generator
from utils import metrics
from utils.command import command
from utils.dry_run import estimate
from utils.learner import (
    COST,
    WARM,
    Learner,
    describe_net,
    drop_net,
    learner_path,
    load_backbone,
    load_checkpoint,
    load_learner,
    save_checkpoint,
    save_learner,
)
from utils.pretrained import freeze_backbone, load_weights
from utils.run import finish, open_run, place, prepare, split_val
from utils.run_folder import RunError, set_aside
from utils.run_net import BadSnapshot, derive_seed, make_generator, predict_logits, train_net

# What of the settings goes to `train_net` as it is.
RECIPE = ("epochs", "batch", "lr", "l2_reg", "schedule", "augment", "optimiser", "momentum", "warmup", "lr_min",
          "clip_norm", "label_smoothing", "best_epoch", "capture")
CHECKPOINT_SECONDS = 60  # between two checkpoints of a learner in training, at least


def train_epochs(settings, precision, train, tasks, rows, round, start=None, watch=None, *, backbone=None, val=None):
    """Train a network with a head per task.

    Args:
        settings: the run's.
        precision: fp32, bf16 or fp16.
        train: `TaskData` on the training device.
        tasks: [n] indices of the tasks.
        rows: [n] tensors, the rows of `train` to train on for each of them; a row may stand there several times.
        round: which learner of the run this is; it decides every random choice together with the seed.
        start: a snapshot to go on from (None: from the beginning).
        watch: as for `train_net`.
        backbone: state dict that the backbone begins with (None: it begins afresh, as the heads always do).
        val: `TaskData` of the rows held out, to evaluate the network on after each epoch (None: there are none).

    Yields:
        (net, values, snapshot) after each epoch: the `MultiHead`, and what `train_net` yields.

    Raises:
        RunError: the training loss is not finite.
        BadSnapshot: `start` is of another network.
    """
    device, seed = train.device, settings.seed
    classes = [train.classes[t] for t in tasks]
    net = build_net(settings.model, train.images.shape[1:], classes, settings.dropout, derive_seed(seed, round, "init"))
    if backbone:
        net.backbone.load_state_dict(backbone)
    net.to(device)
    purposes = ("shuffle", "augment", "dropout")
    generators = {purpose: make_generator(seed, round, purpose, device) for purpose in purposes}
    set_dropout_generator(net, generators["dropout"])
    heads = torch.cat([torch.full_like(r, head) for head, r in enumerate(rows)])
    rows = torch.cat(tuple(rows))
    epochs = train_net(
        net, train.images, rows, heads, train.labels[rows], flip=train.flip, precision=precision, generators=generators,
        weights=balance(heads, train.labels[rows]) if settings.class_weights else None, start=start, watch=watch,
        validate=val and (lambda: validate(net, val, tasks, precision, 2 * settings.batch)),
        **{key: getattr(settings, key) for key in RECIPE},
    )
    for values, snapshot in epochs:
        where = f"round {round + 1}, epoch {values['epoch'] + 1}"
        require_finite(values["train_loss"], f"{where}: the training loss", values["lr"], precision)
        yield net, values, snapshot


def validate(net, val, tasks, precision, max_batch):
    """dict(val_loss, val_accuracy): means over the tasks, each on its rows of `val`, at most `max_batch` at once."""
    loss, accuracy = [], []
    for head, t in enumerate(tasks):
        logits = predict_logits(net, val.images, val.rows(t), head, val.classes[t], precision, max_batch)
        labels = val.labels[val.rows(t)]
        loss.append(metrics.negative_log_likelihood(metrics.log_probs(logits), labels))
        accuracy.append(metrics.accuracy(logits, labels))
    return {"val_loss": sum(loss) / len(loss), "val_accuracy": sum(accuracy) / len(accuracy)}


def balance(heads, labels):
    """A weight [n] for each row such that every class of a head weighs alike: rows / (classes * rows of the class).

    Those of a head have mean 1, as scikit-learn's "balanced".
    """
    of_head, of_class = heads.cpu(), labels.cpu()  # a few counts, once a learner
    pairs, each, rows = torch.stack([of_head, of_class], 1).unique(dim=0, return_inverse=True, return_counts=True)
    classes = pairs[:, 0].bincount()
    return (of_head.bincount()[of_head].float() / (classes[of_head] * rows[each])).to(heads.device)


def require_finite(value, what, lr, precision):
    """Stop a run whose learner diverges, before it joins the zoo.

    Raises:
        RunError: `value` is infinite or not a number.
    """
    if not math.isfinite(value):
        raise RunError(f"{what} is {value} at learning rate {lr:.3g}; the learners before this one are safe; "
                       f"try a lower lr{' or --precision fp32' * (precision != 'fp32')}")


def train_learner(settings, precision, train, test, tasks, rows, loss_rows, round, log, checkpoint=None, backbone=None,
                  val=None):
    """Train a learner and evaluate it.

    Args:
        settings, precision, train, tasks, rows, round, backbone, val: see `train_epochs`.
        test: `TaskData` on the same device.
        loss_rows: [n] tensors, the rows of `train` that the zoo's loss is taken over, and so the logits are kept of.
        log: the `RunLog`.
        checkpoint: a file that is kept up to date between epochs while training takes long, and from which training
            goes on where it is there (None: no such file).

    Returns:
        A `Learner`.

    Raises:
        RunError: the training loss or a logit is not finite, or the disk refuses.
    """
    first, seconds, start = load_checkpoint(checkpoint, tasks, settings.epochs, log)
    began = time.perf_counter() - seconds
    n = sum(map(len, rows))
    log.forget(round, first)
    log.start_round(round, settings.epochs, n, first)
    due = time.perf_counter() + CHECKPOINT_SECONDS
    epochs = train_epochs(settings, precision, train, tasks, rows, round, start, log.watch, backbone=backbone, val=val)
    for net, values, snapshot in epochs:  # noqa: B007 (net is evaluated below)
        log.log_epoch(round, **values, seconds=time.perf_counter() - began)
        done = values["epoch"] + 1
        if checkpoint and time.perf_counter() >= due and done < settings.epochs:
            now = time.perf_counter()
            save_checkpoint(checkpoint, tasks, done, now - began, snapshot())
            # A hundred times what writing costs: under 1 % of the time goes into it.
            due = time.perf_counter() + max(CHECKPOINT_SECONDS, 100 * (time.perf_counter() - now))
    classes = [train.classes[t] for t in tasks]
    train_logits, test_logits = [], []
    for head, (t, of_task) in enumerate(zip(tasks, loss_rows, strict=True)):
        rest = (head, classes[head], precision, 2 * settings.batch)
        train_logits.append(predict_logits(net, train.images, of_task, *rest))
        test_logits.append(predict_logits(net, test.images, test.rows(t), *rest))
        for logits in (train_logits[-1], test_logits[-1]):
            largest = f"round {round + 1}: after training the largest logit"
            require_finite(logits.abs().max().item(), largest, values["lr"], precision)
    cost = (time.perf_counter() - began, settings.epochs * n, sum(p.numel() for p in net.parameters()))
    keep = settings.save_nets or settings.inherit
    saved = describe_net(settings, precision, train.images.shape[1:], classes, net) if keep else None
    return Learner(tuple(tasks), tuple(train_logits), tuple(test_logits), *cost, saved)


def train_or_load(settings, precision, train, test, tasks, rows, loss_rows, round, folder, log, val=None):
    """The learner of `round`: from its file in the run folder where that is whole, else trained and saved there.

    Args and errors as of `train_learner`, with `folder` the run folder, in which the learner before lies, too.
    """
    path, before = learner_path(folder, round), learner_path(folder, round - 1)
    inherits = settings.inherit and round > (WARM if settings.warm_start else 0)
    checkpoint = path.with_suffix(".checkpoint")
    learner = load_learner(path, train, test, tasks, loss_rows, log)
    if learner is None:
        shape = train.images.shape[1:]
        pretrained = settings.weights and not settings.freeze
        backbone = load_backbone(before) if inherits else load_weights(settings, shape) if pretrained else None
        train_it = partial(train_learner, settings, precision, train, test, tasks, rows, loss_rows, round, log,
                           checkpoint=checkpoint, backbone=backbone, val=val)
        try:
            learner = train_it()
        except BadSnapshot as e:
            set_aside(checkpoint, e, log)
            learner = train_it()
        save_learner(path, learner)
    else:
        log.skip(settings.epochs * sum(map(len, rows)))
    with contextlib.suppress(OSError):
        checkpoint.unlink()
    if inherits and not settings.save_nets:
        drop_net(before)
    return replace(learner, net=None)  # on disk; a run that grows needs the logits alone


def run(settings, loaded=None):
    """Train Multi-Head in its run folder and return its result; `loaded` and errors as of `modelzoo.run`."""
    device, precision, train, test = prepare(settings, loaded)
    train, val = split_val(settings, train)
    train, test, val = place(device, train, test, val)
    tasks = list(range(len(settings.tasks)))
    rows = [train.rows(t) for t in tasks]
    plan = [(len(tasks), len(train.labels))]
    if settings.dry_run:
        return estimate(settings, device, precision, train, test, plan, val)
    with open_run(settings, device, precision, train, test, plan, val) as (folder, log):
        data, frozen = train, 0  # the images; with `freeze` the learner trains on their features
        if settings.freeze:
            train, test, val, frozen = freeze_backbone(settings, precision, folder, train, test, val)
        learner = train_or_load(settings, precision, train, test, tasks, rows, rows, 0, folder, log, val)
        accuracy = [metrics.accuracy(learner.test_logits[t], test.labels[test.rows(t)]) for t in tasks]
        log_probs = map(metrics.log_probs, learner.train_logits)
        loss = [metrics.negative_log_likelihood(p, train.labels[rows[t]]) for t, p in enumerate(log_probs)]
        log.log_round(0, tasks=tasks, accuracy=accuracy, seconds=learner.seconds)
        rounds = [{"tasks": tasks, "weights": [], "train_loss": loss, "seconds": learner.seconds}]
        cost = {key: getattr(learner, key) for key in COST} | {"stored_rows": len(train.labels)}
        cost["parameters"] += frozen
        return finish(settings, device, precision, data, [accuracy], rounds, cost)


if __name__ == "__main__":
    sys.exit(command("multihead.py", "multihead", run))
