"""Avalanche's methods under our conditions: Naive, Replay, EWC, A-GEM, LwF, DER, PackNet, PNN and joint training.

    python tools/peers.py naive replay ewc agem lwf der packnet pnn joint --data_config ... --hp_config ...

Each method leaves a run folder that report.py sets beside ours. Tasks, rows, labels, network and its first weights,
augmentation, epochs, batch size, SGD and schedule (begun anew with every task) and evaluation are ours. Avalanche's are
the loop, the memory and what is done with it, at its defaults: Replay and DER add to every batch of the new task one as
large from memory; A-GEM takes a reference gradient on at most 64 stored rows at every step; EWC keeps a penalty a task.
tools/peer_methods.py says what had to be fitted.
"""
import importlib.util
import math
import random
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import before_torch  # noqa: F401  # isort: skip
import torch
from torch.utils.data import TensorDataset

from multihead import require_finite
from net.build_net import build_net, set_dropout_generator
from utils import metrics
from utils.command import guard, name_batch
from utils.config import Settings, add_multihead_flags, make_parser, make_settings
from utils.config_files import HYPER_OPTIONAL, ConfigError, check
from utils.run import finish, open_run, place, prepare
from utils.run_folder import RunError
from utils.run_net import (
    derive_seed,
    keep_freed_memory,
    learning_rate,
    make_generator,
    predict_logits,
    sample_crops,
)

# The methods, the names that Avalanche gives them, and the flags of single ones.
METHODS = {"naive": "Naive", "replay": "Replay", "ewc": "EWC", "agem": "AGEM", "lwf": "LwF", "der": "DER",
           "packnet": "PackNet", "pnn": "PNN", "joint": "JointTraining"}
FLAGS = {"memory": ("replay", "agem", "der"), "ewc_lambda": ("ewc",), "lwf_alpha": ("lwf",),
         "lwf_temperature": ("lwf",), "der_alpha": ("der",), "der_beta": ("der",), "prune_share": ("packnet",),
         "prune_epochs": ("packnet",)}
REFERENCE = 64  # rows of A-GEM's reference gradient, as Avalanche has it; at least one a task

# Avalanche takes many seconds to import and is not needed elsewhere, so the functions that use it import it.


@dataclass(frozen=True)
class PeerSettings(Settings):
    """A run of one method; None where the method has no use for it."""

    memory: int | None = None  # rows stored in all (None: all of them)
    ewc_lambda: float | None = None
    lwf_alpha: float | None = None
    lwf_temperature: float | None = None
    der_alpha: float | None = None
    der_beta: float | None = None
    prune_share: float | None = None
    prune_epochs: int | None = None


def read_peers(argv=None):
    """Read the command line and both files: a list of `PeerSettings`, one a method.

    Raises:
        ConfigError: see `read_settings` in utils/config.py.
    """
    p = make_parser("peers.py", "Run Avalanche's methods on the same tasks, rows, network and settings as ours.")
    add_multihead_flags(p)
    p.add_argument("methods", nargs="+", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    p.add_argument("--memory", type=int, help="rows that replay, agem and der store in all (default: every row)")
    p.add_argument("--ewc_lambda", type=float, default=1.0, help="weight of EWC's penalty (default: 1)")
    p.add_argument("--lwf_alpha", type=float, default=1.0, help="weight of LwF's penalty (default: 1)")
    p.add_argument("--lwf_temperature", type=float, default=2.0, help="temperature of LwF's soft targets (default: 2)")
    p.add_argument("--der_alpha", type=float, default=0.1, help="weight of DER's stored logits (default: 0.1)")
    p.add_argument("--der_beta", type=float, default=0.5, help="weight of DER's stored labels (default: 0.5)")
    p.add_argument("--prune_share", type=float, default=0.5,
                   help="share of a task's weights that PackNet frees for later ones (default: 0.5)")
    p.add_argument("--prune_epochs", type=int, help="epochs after PackNet's pruning (default: a third of all)")
    flags = vars(p.parse_args(argv))
    methods = list(dict.fromkeys(flags["methods"]))
    if flags["name"] is not None and len(methods) > 1:
        raise ConfigError(f"--name: one name cannot serve {len(methods)} methods; leave it out, or give one METHOD")
    if flags["precision"] == "fp16":
        raise ConfigError("--precision: fp16 needs its losses scaled, which Avalanche does not do; take fp32 or bf16")
    if flags["memory"] is not None:
        check("--memory", flags["memory"], int, 1, 10**9)
    for flag in ("ewc_lambda", "lwf_alpha", "der_alpha", "der_beta"):
        check(f"--{flag}", flags[flag], float, 0, below=math.inf)
    check("--lwf_temperature", flags["lwf_temperature"], float, above=0, below=math.inf)
    check("--prune_share", flags["prune_share"], float, above=0, below=1)
    found = []
    for method in methods:
        own = {flag: flags[flag] if method in users else None for flag, users in FLAGS.items()}
        settings = make_settings(f"avalanche-{method}", flags | own, PeerSettings)
        n = len(settings.tasks)
        for key, (_, default) in HYPER_OPTIONAL.items():
            if key not in ("warmup", "lr_min") and getattr(settings, key) != default:
                raise ConfigError(f"{settings.hp_config}: {key}: Avalanche's methods run without it; leave it out")
        if method == "agem" and own["memory"] is not None and own["memory"] < n:
            raise ConfigError(f"--memory: {own['memory']} must be at least {n}, the number of tasks, with agem")
        if method == "packnet":
            settings = _plan_pruning(settings)
        found.append(settings if method == "joint" else replace(settings, continual=True, num_rounds=n))
    return found


def _plan_pruning(settings):
    """`settings` with the epochs after pruning, of which at least one has to come before it."""
    if settings.epochs < 2:
        raise ConfigError("--epochs: 1 must be at least 2 with packnet, which prunes between two epochs")
    epochs = max(1, settings.epochs // 3) if settings.prune_epochs is None else settings.prune_epochs
    check("--prune_epochs", epochs, int, 1, settings.epochs - 1)
    return replace(settings, prune_epochs=epochs)


class Conditions:
    """Our schedule and our log in Avalanche's loop, which calls a plugin's methods by their names.

    Args:
        settings: the run's.
        log: the `RunLog`.
    """

    def __init__(self, settings, log):
        self.settings = settings
        self.log = log
        self.round = -1

    def before_training_exp(self, strategy, **_):
        self.round += 1
        self.began = time.perf_counter()
        self.log.start_round(self.round, self.settings.epochs, len(strategy.adapted_dataset))

    def before_training_epoch(self, strategy, **_):
        self.rows, self.loss_sum = 0, torch.zeros((), dtype=torch.float64, device=strategy.device)

    def before_training_iteration(self, strategy, **_):
        s, steps = self.settings, self.settings.epochs * len(strategy.dataloader)
        (group,) = strategy.optimizer.param_groups
        group["lr"] = self.lr = learning_rate(s.schedule, s.lr, strategy.clock.train_exp_iterations, steps,
                                                round(s.warmup * len(strategy.dataloader)), s.lr_min)

    def after_training_iteration(self, strategy, **_):
        self.rows += len(strategy.mb_y)
        self.loss_sum += strategy.loss.detach().double().sum() * len(strategy.mb_y)

    def after_training_epoch(self, strategy, **_):
        epoch, loss = strategy.clock.train_exp_epochs, self.loss_sum.item() / self.rows
        where, precision = f"round {self.round + 1}, epoch {epoch + 1}: the training loss", strategy.model.precision
        require_finite(loss, where, self.lr, precision)
        self.log.log_epoch(self.round, epoch=epoch, train_loss=loss, lr=self.lr,
                           seconds=time.perf_counter() - self.began)
        if epoch + 1 == self.settings.epochs:
            strategy.model.renew(draw_batches(strategy))


def draw_batches(strategy):
    """The row numbers of an epoch's batches, with those that DER adds from memory."""
    replay = getattr(strategy, "replay_loader", None)
    for rows, *_ in strategy.dataloader:
        yield rows if replay is None else torch.cat([next(replay)[0], rows])


def wrap_net(method, make_net, train, augment, precision, generator):
    """Our network as the model that a method of Avalanche trains.

    Args:
        method: avalanche-naive, ...
        make_net: k -> `MultiHead` on the device of `train`, with its own first weights for every k; only PNN needs
            more than the first.
        train: `TaskData` that the rows are numbered in.
        augment: whether to crop (and mirror) in training.
        precision: fp32 or bf16, of the backbone.
        generator: of the augmentation, on the same device.

    Returns:
        A `Wrapped` of tools/peer_methods.py.
    """
    from tools.peer_methods import Packed, Progressive, Wrapped

    def read_images(rows, training):
        x = train.images[rows.to(train.images.device)].to(train.device)
        return sample_crops(x, train.flip, generator) if augment and training else x

    tasks = range(len(train.classes))
    heads = torch.cat([torch.full_like(train.labels[train.rows(t)], t) for t in tasks])
    if method == "avalanche-pnn":
        return Progressive(lambda k: make_net(k).backbone, train.classes, read_images, heads, precision)
    return (Packed if method == "avalanche-packnet" else Wrapped)(make_net(0), read_images, heads, precision)


def make_experiences(train):
    """The tasks of `train` as Avalanche's experiences, of (row number, label, task label) each."""
    from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
    from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareClassificationDataset

    datasets = []
    for t in range(len(train.classes)):
        rows = train.rows(t).cpu()
        labels = train.labels[train.rows(t)].cpu()
        attributes = [DataAttribute(labels.tolist(), "targets"), TaskLabels(ConstantSequence(t, len(rows)))]
        # LwF asks it for its `task_set`.
        datasets.append(TaskAwareClassificationDataset([TensorDataset(rows, labels)], data_attributes=attributes))
    return list(with_task_labels(benchmark_from_datasets(train=datasets)).train_stream)


def make_strategy(settings, model, train, device, plugin):
    """Avalanche's strategy of `settings.method`, silent."""
    from avalanche.training import AGEM, EWC, Naive, Replay

    from tools.peer_methods import Dark, Distilled, Joint, Pruner

    num_tasks = len(train.classes)
    # Shared equally between tasks, or by DER between classes, of which any may then hold all rows.
    memory = settings.memory or len(train.labels) * max(num_tasks, *train.classes)
    plugins = [plugin]
    if settings.method == "avalanche-packnet":
        plugins.append(Pruner(settings.prune_epochs, settings.prune_share))
    make, own = {
        "avalanche-replay": (Replay, {"mem_size": memory}),
        "avalanche-ewc": (EWC, {"ewc_lambda": settings.ewc_lambda}),
        "avalanche-agem": (AGEM, {"patterns_per_exp": memory // num_tasks, "sample_size": max(REFERENCE, num_tasks)}),
        "avalanche-lwf": (Distilled, {"alpha": settings.lwf_alpha, "temperature": settings.lwf_temperature}),
        "avalanche-der": (Dark, {"mem_size": memory, "alpha": settings.der_alpha, "beta": settings.der_beta}),
        "avalanche-joint": (Joint, {}),
    }.get(settings.method, (Naive, {}))  # PackNet is a plugin, PNN a network
    optimiser = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, nesterov=True,
                                weight_decay=settings.l2_reg, fused=True)
    return make(model=model, optimizer=optimiser, criterion=torch.nn.CrossEntropyLoss(), train_mb_size=settings.batch,
                train_epochs=settings.epochs, device=device, plugins=plugins,
                evaluator=None, **own)


def count_stored(strategy, train):
    """How many training rows a strategy holds, after its last task, to train on them again."""
    for holder in (strategy, *strategy.plugins):
        if hasattr(holder, "storage_policy"):  # DER; Replay
            return len(holder.storage_policy.buffer)
        if hasattr(holder, "buffers"):  # A-GEM
            return sum(map(len, holder.buffers))
    return len(train.labels) if type(strategy).__name__ == "Joint" else 0


def count_numbers(strategy, model):
    """How many numbers a strategy keeps beside the networks' parameters and the rows.

    EWC's two a parameter for every task, LwF's old network, DER's logits of each row, PackNet's task of each weight.
    """
    kept = list(getattr(model, "masks", []))
    for plugin in strategy.plugins:
        if hasattr(plugin, "importances"):
            kept += [tensor.data for by_task in (plugin.saved_params, plugin.importances)
                     for tensors in by_task.values() for tensor in tensors.values()]
        if hasattr(plugin, "lwf"):
            kept += plugin.lwf.prev_model.parameters()
    if hasattr(strategy, "storage_policy"):
        kept += [logits for *_, logits in strategy.storage_policy.buffer]
    return sum(tensor.numel() for tensor in kept)


def evaluate(net, test, t, precision, where):
    """Accuracy on the test rows of task t.

    Raises:
        RunError: a logit is not finite.
    """
    rows = test.rows(t)
    logits = predict_logits(net, test.images, rows, t, test.classes[t], precision)
    if not torch.isfinite(logits).all():
        raise RunError(f"{where}: after training a logit is not finite; try a lower lr")
    return metrics.accuracy(logits, test.labels[rows])


def train_peer(settings, precision, train, test, log):
    """Let Avalanche learn the tasks one after the other (joint: all at once).

    Args:
        settings: `PeerSettings`.
        precision: fp32 or bf16.
        train, test: `TaskData` on the training device.
        log: the `RunLog`.

    Returns:
        matrix, rounds, cost: see `grow_zoo` in modelzoo.py.
    """
    device, seed, num_tasks = train.device, settings.seed, len(train.classes)
    random.seed(derive_seed(seed, 0, "avalanche"))  # Avalanche draws from the global generators
    torch.manual_seed(derive_seed(seed, 0, "avalanche"))
    keep_freed_memory()
    dropout = make_generator(seed, 0, "dropout", device)

    def make_net(k):
        net = build_net(settings.model, train.images.shape[1:], train.classes, settings.dropout,
                        derive_seed(seed, k, "init"))
        net.to(device)  # not in channels_last: Avalanche's A-GEM cannot flatten such gradients
        set_dropout_generator(net, dropout)
        return net

    model = wrap_net(settings.method, make_net, train, settings.augment, precision,
                     make_generator(seed, 0, "augment", device))
    strategy = make_strategy(settings, model, train, device, Conditions(settings, log))
    experiences = make_experiences(train)
    matrix, rounds = [], []
    for k, tasks in enumerate([t] for t in range(num_tasks)) if settings.continual else [(0, list(range(num_tasks)))]:
        began = time.perf_counter()
        model.activate_task(tasks[-1])
        strategy.train([experiences[t] for t in tasks], eval_streams=[], reset_optimizer_state=True)
        seen = tasks[-1] + 1
        accuracy = []
        for t in range(seen):
            model.activate_task(t)
            accuracy.append(evaluate(model.net, test, t, precision, f"round {k + 1}"))
        seconds = time.perf_counter() - began
        matrix.append(accuracy + [None] * (num_tasks - seen))
        rounds.append({"tasks": tasks, "weights": [], "train_loss": [], "seconds": seconds})
        log.log_round(k, tasks=tasks, accuracy=accuracy, seconds=seconds)
    cost = {"seconds": sum(r["seconds"] for r in rounds), "rows_trained": model.rows_trained,
            "parameters": sum(p.numel() for net in model.columns for p in net.parameters()),
            "stored_rows": count_stored(strategy, train), "stored_numbers": count_numbers(strategy, model)}
    return matrix, rounds, cost


def run(settings):
    """Train one method in its run folder and return its result; None where --resume finds it done."""
    device, precision, train, test = prepare(settings)
    train, test = place(device, train, test)
    sizes = [(len(train.classes), len(train.rows(t))) for t in range(len(train.classes))]  # one network has all heads
    plan = sizes if settings.continual else [(len(sizes), len(train.labels))]
    # Avalanche warns of its own parts, and of solvers that nothing here uses; it changes filters, hence `record`.
    with (
        open_run(settings, device, precision, train, test, plan) as (folder, log),
        warnings.catch_warnings(record=True, action="ignore"),
    ):
        if (folder / "result.json").exists():
            log.print(f"{folder}: done already")
            return None
        for k in range(settings.num_rounds):
            log.forget(k)
        outcome = train_peer(settings, precision, train, test, log)
        return finish(settings, device, precision, train, *outcome)


def main(argv=None):
    """Run every method asked for; return the exit status."""
    all_settings = read_peers(argv)
    if importlib.util.find_spec("avalanche") is None:
        raise ConfigError("the package avalanche-lib is missing; pip install -r requirements-peers.txt brings it")
    for settings in all_settings:
        with name_batch(settings):
            run(settings)
    return 0


if __name__ == "__main__":
    sys.exit(guard("peers.py", main))
