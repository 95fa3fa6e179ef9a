"""Settings: a flag over a YAML key over a default, read once, frozen; every mistake ends in one line."""
import argparse
import difflib
import importlib.util
import os
import random
import re
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path

from datasets.data import one_line
from utils.config_files import PRECISIONS, ConfigError, check, check_device, read_dataset, read_hyperparam

PATHS = ("data_config", "hp_config", "data_dir", "out", "extend")  # flags


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run.

    It goes whole through the entry files and utils/; `train_net`, datasets/ and net/ take plain values, by name.
    """

    # from the dataset file
    dataset: str
    tasks: tuple[tuple, ...]  # source labels of each task
    names: tuple[str, ...] | None  # one a task
    path: str | None  # npz, image_folder: below data_dir
    size: int | None  # image_folder, torchvision: side in pixels
    # from the hyper-parameter file
    model: str
    batch: int
    lr: float
    l2_reg: float
    dropout: float
    epochs: int  # flag over file over 100
    schedule: str
    augment: bool  # never with one epoch
    optimiser: str
    momentum: float
    warmup: float  # epochs
    lr_min: float
    clip_norm: float | None
    label_smoothing: float
    class_weights: str | None
    best_epoch: bool
    weights: str | None  # torchvision's name, or a file below data_dir
    freeze: bool
    # flags
    method: str  # modelzoo, multihead, avalanche-naive, ...
    data_config: str
    hp_config: str
    samples: int | None  # training rows a class at most
    seed: int
    data_dir: str
    out: str
    name: str
    device: str
    precision: str
    task_order: int = 0  # seed of the order of the file's tasks; 0: as written
    threads: int | None = None  # None: those of the run that is resumed, else by machine and network
    val_frac: float | str | None = None  # of the training rows of every class, held out; or "file": the file's own
    continual: bool = False
    num_rounds: int = 1
    tasks_per_round: int = 0
    replay_frac: float = 1.0
    naive: bool = False
    warm_start: bool = False
    inherit: bool = False
    weigh_by_round: bool = False
    resume: bool = False
    save_nets: bool = False
    tensorboard: bool = False
    dry_run: bool = False
    capture: str = "auto"
    extend: str | None = None  # run folder whose learners this run begins with
    # from the dataset file, too
    keywords: tuple | None = None  # torchvision: (("name", its class), (a keyword, its value), ...)
    flip: bool | None = None  # whether images may be mirrored; None: as is usual for the dataset

    @property
    def folder(self):
        """The run folder."""
        return Path(self.out) / self.name


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are a `ConfigError`."""

    def error(self, message):
        flag = re.search(r"unrecognized arguments: (--\w+)", message)
        if flag and (flag[1], self.prog) == ("--num_tasks", "modelzoo.py"):
            message += "; with --continual, --num_rounds N trains on the first N tasks"
        elif flag:
            for near in difflib.get_close_matches(flag[1], self._option_string_actions, 1):
                message += f"; did you mean {near}?"
        raise ConfigError(one_line(message, 500))


def share(text):
    """What --val_frac takes: a number, or "file"."""
    try:
        return text if text == "file" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is neither a share, such as 0.1, nor file") from None


def make_parser(prog, about):
    """Build the `Parser` of the flags that every script has; a misspelt flag is an error, not a guess."""
    p = Parser(prog=prog, description=about, allow_abbrev=False)
    p.add_argument("--data_config", required=True, help="dataset file: config/dataset/*.yaml")
    p.add_argument("--hp_config", required=True, help="hyper-parameter file: config/hyperparam/*.yaml")
    p.add_argument("--samples", type=int, help="training rows per class at most (default: all)")
    p.add_argument("--epochs", type=int, help="passes over a learner's rows (default: the file's, else 100)")
    p.add_argument("--seed", type=int, default=0, help="decides every random choice (default: 0)")
    p.add_argument("--data_dir", default="data", help="where the data lie or are downloaded to (default: data)")
    p.add_argument("--out", default="runs", help="folder of the run folders (default: runs)")
    p.add_argument("--name", help="the run folder's name (default: made of the settings)")
    p.add_argument("--resume", action="store_true", help="go on with what has this name, or start it")
    p.add_argument("--device", default="auto", help="auto (CUDA if there, else CPU), cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", default="auto", help="auto (bf16 where native, else fp32), fp32, bf16 or fp16")
    return p


def add_run_flags(p):
    """The flags of every script that trains in a run folder."""
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into the run folder")
    p.add_argument("--task_order", type=int, default=0, metavar="SEED",
                   help="shuffle the order of the dataset file's tasks (default: 0, as written)")
    p.add_argument("--capture", default="auto", help="auto (a GPU's steps in a CUDA graph), off")
    p.add_argument("--threads", type=int, help="CPU threads (default: by cores and network; a resumed run's own)")
    p.add_argument("--batch", type=int, help="rows per step (default: the hyper-parameter file's)")
    p.add_argument("--lr", type=float, help="learning rate (default: the hyper-parameter file's)")


def add_multihead_flags(p):
    """The flags of a script that trains on all tasks of a file, or on its first ones."""
    add_run_flags(p)
    p.add_argument("--num_tasks", type=int, help="train on the dataset file's first tasks only (default: all)")


def add_modelzoo_flags(p):
    """The flags of modelzoo.py."""
    add_run_flags(p)
    p.add_argument("--continual", action="store_true", help="tasks arrive one per round, in the file's order")
    p.add_argument("--num_rounds", type=int, help="learners to train (default: 10; continual: one per task)")
    p.add_argument("--tasks_per_round", type=int, help="tasks that a learner trains on (default: 10; continual: 5)")
    p.add_argument("--replay_frac", type=float, help="share of a past task's rows that is kept (default: 1)")
    p.add_argument("--naive", action="store_true", help="draw tasks uniformly, not by the zoo's loss")
    p.add_argument("--warm_start", action="store_true", help="before round 1, one learner on all tasks joins")
    p.add_argument("--inherit", action="store_true",
                   help="a learner's backbone starts as the one before it ended (default: afresh)")
    p.add_argument("--weigh_by_round", action="store_true",
                   help="the n-th learner weighs n times as much in the zoo's mean (default: all alike)")
    p.add_argument("--save_nets", action="store_true", help="keep the networks' weights in the run folder")
    p.add_argument("--extend", metavar="RUN", help="begin with the learners of this run folder (continual)")


def read_settings(prog, method, argv=None):
    """Read the command line and both files of a run of `method` (modelzoo, multihead): its `Settings`.

    Raises:
        ConfigError: anything missing, unknown, out of range or contradictory.
    """
    about, add_flags = {
        "modelzoo": ("Grow a Model Zoo: an ensemble of multi-head networks, one per round. Without --continual all "
                     "tasks are known from the start (multi-task mode).", add_modelzoo_flags),
        "multihead": ("Train one network with a head per task on all tasks at once: the joint baseline.",
                      add_multihead_flags),
    }[method]
    p = make_parser(prog, about)
    add_flags(p)
    p.add_argument("--val_frac", type=share,
                   help="share of the training rows of every class that is held out; file: the val rows of an npz file")
    p.add_argument("--dry_run", action="store_true", help="say what the run would take; no run folder, no training")
    return make_settings(method, vars(p.parse_args(argv)))


def make_settings(method, flags, kind=Settings):
    """Check the flags of a command line, read both files and put them together.

    Args:
        method: what makes the run, as result.json will name it.
        flags: dict of the flags' values.
        kind: `Settings`, or a dataclass made of it with more flags.

    Raises:
        ConfigError: see `read_settings`.
    """
    for flag in PATHS:
        if flags.get(flag) is not None:
            flags[flag] = read_path(flags[flag])
    for flag, low in (("samples", 1), ("epochs", 1), ("num_rounds", 1), ("tasks_per_round", 1), ("num_tasks", 1),
                      ("threads", 1)):
        if flags.get(flag) is not None:
            check(f"--{flag}", flags[flag], int, low, 10**6)
    if flags.get("tensorboard") and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: the package is missing; pip install tensorboard brings it")
    check("--seed", flags["seed"], int, 0, 2**63 - 1)
    if "capture" in flags:
        check("--capture", flags["capture"], str, choices=("auto", "off"))
    check("--precision", flags["precision"], str, choices=PRECISIONS)
    check_device(flags["device"])
    data = read_dataset(flags["data_config"])
    if flags.get("task_order"):
        check("--task_order", flags["task_order"], int, 0, 2**63 - 1)
        order = random.Random(flags["task_order"]).sample(range(len(data["tasks"])), len(data["tasks"]))
        data |= {key: data[key] and tuple(data[key][t] for t in order) for key in ("tasks", "names")}
    if flags.get("num_tasks"):
        data = _keep_tasks(data, flags["num_tasks"])
    hyper = read_hyperparam(flags["hp_config"], {key: flags.get(key) for key in ("epochs", "batch", "lr")})
    if flags.get("val_frac") == "file":
        if data["dataset"] != "npz":
            raise ConfigError(f"--val_frac: file: only an npz file brings rows for it; {flags['data_config']} has "
                              f"dataset {data['dataset']}: give a share, such as 0.1")
    elif flags.get("val_frac") is not None:
        check("--val_frac", flags["val_frac"], float, above=0, below=1)
    elif hyper["best_epoch"] and "val_frac" not in flags:
        raise ConfigError(f"{flags['hp_config']}: best_epoch: only modelzoo.py and multihead.py have it; leave it out")
    elif hyper["best_epoch"]:
        raise ConfigError(f"{flags['hp_config']}: best_epoch: needs --val_frac, for rows to look at")
    if flags["name"] is None:
        flags["name"] = default_name(method, flags, [f.name for f in fields(kind)[len(fields(Settings)) :]])
    if not re.fullmatch(r"\w[\w.,=+-]{0,199}", flags["name"]):
        raise ConfigError(f"--name: {reprlib.repr(flags['name'])} is not a plain folder name of at most 200 characters")
    if method == "modelzoo":
        flags.update(_check_rounds(flags, len(data["tasks"])))
    known = {f.name for f in fields(kind)}
    flags = {k: v for k, v in flags.items() if k in known}
    return kind(**{**flags, **data, **hyper, "method": method})


def read_path(text):
    """A path as people write it: with ~ or $HOME, which a shell replaces in some places alone, or on Windows."""
    text = os.path.expandvars(os.path.expanduser(text))
    return text.replace("\\", "/") if "\\" in text and not os.path.lexists(text) else text


def _keep_tasks(data, n):
    """What `read_dataset` returned, with its first `n` tasks alone."""
    if n > len(data["tasks"]):
        raise ConfigError(f"--num_tasks: {n} must be at most {len(data['tasks'])}, the number of tasks")
    return data | {"tasks": data["tasks"][:n], "names": data["names"] and data["names"][:n]}


def _check_rounds(flags, num_tasks):
    """Fill in the defaults of the zoo's flags and refuse those that contradict each other."""
    continual, frac = flags["continual"], flags["replay_frac"]
    if frac is not None:
        check("--replay_frac", frac, float, 1e-6, 1)
    if frac is not None and frac < 1 and not continual:
        raise ConfigError("--replay_frac below 1 needs --continual: without it no task is ever past")
    if flags["extend"] is not None and not continual:
        raise ConfigError("--extend needs --continual: without it there is no newest task")
    if flags["warm_start"] and continual:
        raise ConfigError("--warm_start contradicts --continual: it trains on all tasks before the first round")
    rounds = flags["num_rounds"] or (num_tasks if continual else 10)
    if continual and rounds > num_tasks:
        raise ConfigError(f"--num_rounds: {rounds} must be at most {num_tasks}, the number of tasks, with --continual")
    per_round = min(flags["tasks_per_round"] or (5 if continual else 10), num_tasks)
    return {"num_rounds": rounds, "tasks_per_round": per_round, "replay_frac": 1.0 if frac is None else frac}


def default_name(method, flags, more=()):
    """Name a run by its files and by the flags given that say what is trained, those in `more` too.

    Not by --device, --precision, --threads and --extend.
    """
    parts = [Path(flags["data_config"]).stem, Path(flags["hp_config"]).stem, method]
    for flag in ("continual", "naive", "warm_start", "inherit", "weigh_by_round"):
        parts += [flag] if flags.get(flag) else []
    for flag in ("num_tasks", "num_rounds", "tasks_per_round", "replay_frac", "samples", "epochs", "batch", "lr",
                 "val_frac", *more):
        parts += [f"{flag}={flags[flag]}"] if flags.get(flag) is not None else []
    parts += [f"task_order={flags['task_order']}"] if flags.get("task_order") else []
    name = "-".join([*parts, f"seed={flags['seed']}"])
    return re.sub(r"[^\w.,=+-]", "_", name).lstrip(".,=+-")

