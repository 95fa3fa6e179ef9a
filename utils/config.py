"""Settings: a flag over a YAML key over a default, read once, frozen; every mistake ends in one line."""
import argparse
import importlib.util
import math
import re
import reprlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml


class ConfigError(Exception):
    """A mistake in a flag or in a config file, told in one line that names it."""


# Datasets and how many labels each has: a task's labels are 0 .. n-1, or whatever the files hold (None).
DATASETS = {
    "cifar100": 200,  # label + 100 is the same class with randomised training labels
    "cifar10": 10,
    "mnist": 10,
    "rotated_mnist": 360,  # 10x + y: digit y rotated by 10x degrees
    "permuted_mnist": 10_000,  # 10x + y: digit y, pixels permuted by seed 1000x
    "mini_imagenet": 100,
    "digits": 10,
    "rotated_digits": 360,
    "npz": None,
    "image_folder": None,
}
ALIASES = {"rotmnist": "rotated_mnist", "permnist": "permuted_mnist"}
DATASET_KEYS = {"npz": ("path",), "image_folder": ("path", "size")}  # beyond dataset, tasks and names
MODELS = ("conv", "wrn16_4", "wrn28_10")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OBJECTIVES = ("multihead", "zoo")
ZOO_ROUNDS = 5  # of the short continual zoo that a search may train

# The values that a hyper-parameter key may have, as `check` takes them.
RANGES = {
    "batch": {"kind": int, "low": 1, "high": 10**6},
    "lr": {"kind": float, "above": 0, "below": math.inf},
    "l2_reg": {"kind": float, "low": 0, "below": math.inf},
    "dropout": {"kind": float, "low": 0, "below": 1},
}
# What a search tries where a hyper-parameter file's `search:` says nothing else: one of some values, or a number
# between two ends, uniformly or on a logarithmic scale.
SPACE = {
    "batch": ("choice", (8, 16, 32, 128)),
    "lr": ("log", (1e-4, 1e-1)),
    "l2_reg": ("log", (1e-6, 1e-2)),
    "dropout": ("uniform", (0.1, 0.5)),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Only the entry files see it whole; functions take what they use, by name."""

    # from the dataset file
    dataset: str
    tasks: tuple[tuple, ...]  # source labels of each task
    names: tuple[str, ...] | None  # one a task
    path: str | None  # npz, image_folder: below data_dir
    size: int | None  # image_folder: side in pixels
    # from the hyper-parameter file
    model: str
    batch: int
    lr: float
    l2_reg: float
    dropout: float
    epochs: int  # flag over file over 100
    schedule: str
    augment: bool  # never with one epoch
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
    continual: bool = False
    num_rounds: int = 1
    tasks_per_round: int = 0
    replay_frac: float = 1.0
    naive: bool = False
    warm_start: bool = False
    resume: bool = False
    save_nets: bool = False
    tensorboard: bool = False
    extend: str | None = None  # run folder whose learners this run begins with


@dataclass(frozen=True)
class Search:
    """How hpo.py searches; what a trial trains is a `Settings`."""

    space: dict[str, tuple]  # of each key searched: how (choice, log, uniform) and the values or the two ends
    objective: str  # multihead, zoo
    num_samples: int  # trials
    max_concurrent: int | None  # trials at once at most (None: as many as fit)
    cpus_per_trial: float
    gpus_per_trial: float | None  # None: a whole one where there are any
    address: str | None  # of a running Ray cluster (None: this machine)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Numbers as in YAML 1.2: 1e-5 is one; 010 and 1:30, which YAML 1.1 takes for 8 and 90, are not.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?$"
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(_NUMBER + r"|[-+]?\.inf$|\.nan$"), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for something else, such as 1e-3, or YAML 1.1, such as 010."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + forms
        for first, forms in _Loader.yaml_implicit_resolvers.items()
    }


def dump_yaml(value, **layout):
    """The YAML text from which `load_yaml` reads `value`, a dict of plain values; `layout` is as for `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **layout)


def load_yaml(path):
    """Read a YAML file that holds one mapping with words as keys.

    Raises:
        ConfigError: no such file, not readable, not YAML, or not a mapping.
    """
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except yaml.MarkedYAMLError as e:
        where = f" at line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}: not a valid YAML file{where}: {_one_line(e.problem)}") from e
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as e:
        raise ConfigError(f"{path}: not a valid YAML file: {_one_line(e)}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'batch: 16'")
    return value


def _one_line(text, limit=200):
    return " ".join(str(text).split())[:limit]


def check(where, value, kind, low=-math.inf, high=math.inf, *, above=-math.inf, below=math.inf, choices=None):
    """Return `value` as `kind` (int, float, bool or str) if it is one and lies in low..high, above < value < below.

    Raises:
        ConfigError: it does not; the line opens with `where` (a file and key, or a flag).
    """
    if choices is not None:
        if not (isinstance(value, str) and value in choices):
            raise ConfigError(f"{where}: {reprlib.repr(value)} is not one of {', '.join(choices)}")
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{where}: {reprlib.repr(value)} is not {words[kind]}")
    try:
        value = kind(value)
    except OverflowError:  # a whole number of over 308 digits, where a float is due
        value = math.inf
    if kind in (int, float) and not (low <= value <= high and above < value < below):
        bounds = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (above > -math.inf)
        bounds += [f"at most {high}"] * (high < math.inf) + [f"below {below}"] * (below < math.inf)
        raise ConfigError(f"{where}: {_one_line(value)} must be {' and '.join(bounds)}")
    return value


def _check_keys(file, found, required, optional=()):
    known = (*required, *optional)
    for key in found:
        if key not in known:
            raise ConfigError(f"{file}: unknown key {_one_line(key)}; the keys are {', '.join(known)}")
    for key in required:
        if key not in found:
            raise ConfigError(f"{file}: key {key} is missing")


def read_dataset(file):
    """Read a dataset file: dict with dataset (no alias), tasks, names, path and size (None where they do not apply).

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be right.
    """
    found = load_yaml(file)
    name = None
    if "dataset" in found:
        name = check(f"{file}: dataset", found["dataset"], str, choices=(*DATASETS, *ALIASES))
        name = ALIASES.get(name, name)
    extra = DATASET_KEYS.get(name, ())
    _check_keys(file, found, ("dataset", "tasks", *extra), ("names",))
    tasks, names = found["tasks"], found.get("names")
    if not isinstance(tasks, list) or not tasks:
        raise ConfigError(f"{file}: tasks: must be a list of tasks, each a list of labels, such as [[0, 1], [2, 3]]")
    for i, task in enumerate(tasks):
        where = f"{file}: tasks: task {i} (counted from 0)"
        if not isinstance(task, list) or len(task) < 2:
            raise ConfigError(f"{where}: must be a list of at least two labels")
        for label in task:
            if name == "image_folder" and isinstance(label, str):
                continue
            top = DATASETS[name]
            check(f"{where}: label", label, int, 0, 2**31 if top is None else top - 1)
        repeated = next((label for label in task if task.count(label) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{where}: label {repeated} is there twice")
    if names is not None:
        if not isinstance(names, list) or len(names) != len(tasks):
            raise ConfigError(f"{file}: names: must be a list of {len(tasks)} names, one a task")
        names = tuple(check(f"{file}: names: name {i}", n, str) for i, n in enumerate(names))
        repeated = next((n for n in names if names.count(n) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{file}: names: {reprlib.repr(repeated)} is there twice")
        odd = next((name for name in names if not name.isprintable()), None)
        if odd is not None:
            raise ConfigError(f"{file}: names: {reprlib.repr(odd)} cannot be printed on one line")
    path = check(f"{file}: path", found["path"], str) if "path" in extra else None
    size = check(f"{file}: size", found["size"], int, 8, 1024) if "size" in extra else None
    return {"dataset": name, "tasks": tuple(map(tuple, tasks)), "names": names, "path": path, "size": size}


def read_space(file):
    """Read the space that a search tries: `SPACE`, changed by what the hyper-parameter file's `search:` says.

    Raises:
        ConfigError: see `read_hyperparam`.
    """
    found = load_yaml(file).get("search", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: search: must hold keys, each with what to try, such as 'lr: {{log: [1e-4, 1e-1]}}'")
    _check_keys(f"{file}: search", found, (), SPACE)
    space = dict(SPACE)
    for key, entry in found.items():
        where = f"{file}: search: {key}"
        hows = ("choice",) if key == "batch" else ("choice", "log", "uniform")
        if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in hows:
            raise ConfigError(f"{where}: must hold one of {', '.join(hows)}, such as '{{{hows[-1]}: [16, 32]}}'")
        ((how, values),) = entry.items()
        if not isinstance(values, list) or not values or how != "choice" and len(values) != 2:
            raise ConfigError(f"{where}: {how}: must be a list of {'values' if how == 'choice' else 'two ends'}")
        values = tuple(check(f"{where}: {how}", value, **RANGES[key]) for value in values)
        if how != "choice" and not values[0] < values[1]:
            raise ConfigError(f"{where}: {how}: {values[0]} must be below {values[1]}")
        if how == "log" and values[0] == 0:
            raise ConfigError(f"{where}: log: 0 has no logarithm; 'uniform' can begin there")
        space[key] = (how, values)
    return space


def read_hyperparam(file, epochs=None):
    """Read a hyper-parameter file: dict with every training setting; `epochs` (the flag) goes over the file's.

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be right.
    """
    found = load_yaml(file)
    _check_keys(file, found, ("model", *RANGES), ("epochs", "schedule", "augment", "search"))
    read_space(file)
    if epochs is None:
        epochs = check(f"{file}: epochs", found.get("epochs", 100), int, 1, 10**6)
    augment = check(f"{file}: augment", found.get("augment", True), bool)
    return {
        "model": check(f"{file}: model", found["model"], str, choices=MODELS),
        **{key: check(f"{file}: {key}", found[key], **values) for key, values in RANGES.items()},
        "epochs": epochs,
        "schedule": check(f"{file}: schedule", found.get("schedule", "cosine"), str, choices=SCHEDULES),
        "augment": augment and epochs > 1,
    }


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are a `ConfigError`."""

    def error(self, message):
        raise ConfigError(_one_line(message, 500))


def make_parser(prog, method):
    """Build the `Parser` of `method` (modelzoo, multihead, hpo); a misspelt flag is an error, not a guess."""
    about = {
        "modelzoo": "Grow a Model Zoo: an ensemble of multi-head networks, one a round.",
        "multihead": "Train one network with a head a task on all tasks at once: the joint baseline.",
        "hpo": "Search training settings on rows held out of the training set, on this machine or on a Ray cluster.",
    }
    p = Parser(prog=prog, description=about[method], allow_abbrev=False)
    p.add_argument("--data_config", required=True, help="dataset file: config/dataset/*.yaml")
    p.add_argument("--hp_config", required=True, help="hyper-parameter file: config/hyperparam/*.yaml")
    p.add_argument("--samples", type=int, help="training rows a class at most (default: all)")
    p.add_argument("--epochs", type=int, help="passes over a learner's rows (default: the file's, else 100)")
    p.add_argument("--seed", type=int, default=0, help="decides every random choice (default: 0)")
    p.add_argument("--data_dir", default="data", help="where the data lie or are downloaded to (default: data)")
    p.add_argument("--out", default="runs", help="folder of the run folders (default: runs)")
    p.add_argument("--name", help="the run folder's name (default: made of the settings)")
    p.add_argument("--resume", action="store_true", help="go on with what has this name, or start it")
    p.add_argument("--device", default="auto", help="auto (CUDA if there, else CPU), cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", default="auto", help="auto (bf16 where native, else fp32), fp32, bf16 or fp16")
    if method != "hpo":
        p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into the run folder")
    if method == "modelzoo":
        p.add_argument("--continual", action="store_true", help="tasks arrive one a round, in the file's order")
        p.add_argument("--num_rounds", type=int, help="learners to train (default: 10; continual: one a task)")
        p.add_argument("--tasks_per_round", type=int, help="tasks a learner trains on (default: 10; continual: 5)")
        p.add_argument("--replay_frac", type=float, help="share of a past task's rows that is kept (default: 1)")
        p.add_argument("--naive", action="store_true", help="draw tasks uniformly, not by the zoo's loss")
        p.add_argument("--warm_start", action="store_true", help="before round 0, one learner on all tasks joins")
        p.add_argument("--save_nets", action="store_true", help="keep the networks' weights in the run folder")
        p.add_argument("--extend", metavar="RUN", help="begin with the learners of this run folder (continual)")
    if method == "multihead":
        p.add_argument("--num_tasks", type=int, help="train on the dataset file's first tasks only (default: all)")
    if method == "hpo":
        p.add_argument("--objective", default="multihead",
                       help=f"train multihead (the default), or zoo: a continual zoo of {ZOO_ROUNDS} rounds at most")
        p.add_argument("--num_samples", type=int, default=81, help="trials (default: 81)")
        p.add_argument("--max_concurrent", type=int, help="trials at once at most (default: as many as fit)")
        p.add_argument("--cpus_per_trial", type=float, default=1, help="CPU cores of a trial (default: 1)")
        p.add_argument("--gpus_per_trial", type=float,
                       help="GPUs of a trial, 0.25: four share one (default: 1 where there are GPUs, else 0)")
        p.add_argument("--address", help="a running Ray cluster, HOST:PORT or auto (default: this machine alone)")
    return p


def read_settings(prog, method, argv=None):
    """Read the command line and both files of a run.

    Raises:
        ConfigError: anything missing, unknown, out of range or contradictory.
    """
    return make_settings(method, vars(make_parser(prog, method).parse_args(argv)))


def read_search(prog, argv=None):
    """Read the command line and both files of a search.

    Returns:
        settings: `Settings` of a trial, as they are before the search changes them.
        search: `Search`.

    Raises:
        ConfigError: see `read_settings`.
    """
    flags = vars(make_parser(prog, "hpo").parse_args(argv))
    objective = check("--objective", flags["objective"], str, choices=OBJECTIVES)
    for flag in ("num_samples", "max_concurrent"):
        if flags[flag] is not None:
            check(f"--{flag}", flags[flag], int, 1, 10**6)
    check_shares("trial", flags["cpus_per_trial"], flags["gpus_per_trial"], flags["device"])
    if flags["name"] is None:
        flags["name"] = _default_name("hpo" if objective == "multihead" else "hpo-zoo", flags)
    if objective == "zoo":
        zoo = {"continual": True, "warm_start": False, "num_rounds": None, "tasks_per_round": None, "replay_frac": None,
               "extend": None}  # fmt: skip
        settings = make_settings("modelzoo", flags | zoo)
        settings = replace(settings, num_rounds=min(ZOO_ROUNDS, settings.num_rounds))
    else:
        settings = make_settings("multihead", flags)
    space = read_space(settings.hp_config)
    return settings, Search(space=space, **{f.name: flags[f.name] for f in fields(Search) if f.name != "space"})


def check_shares(what, cpus, gpus, device):
    """Refuse shares of a machine that Ray would not grant to a `what` (trial, run), or that contradict `device`.

    Raises:
        ConfigError: the line names the flag.
    """
    check(f"--cpus_per_{what}", cpus, float, above=0, high=10**4)
    for name, share in (("cpus", cpus), ("gpus", gpus or 0.0)):
        check(f"--{name}_per_{what}", share, float, 0, 10**4)
        if share > 1 and share != int(share):
            raise ConfigError(f"--{name}_per_{what}: {share} must be a whole number where it is above 1")
    if gpus == 0 and device.startswith("cuda"):
        raise ConfigError(f"--gpus_per_{what} 0 contradicts --device {device}")
    if gpus and device == "cpu":
        raise ConfigError(f"--gpus_per_{what} {gpus} contradicts --device cpu")


def make_settings(method, flags, kind=Settings):
    """Check the flags of a command line, read both files and put them together.

    Args:
        method: what makes the run, as result.json will name it.
        flags: dict of the flags' values.
        kind: `Settings`, or a dataclass made of it with more flags.

    Raises:
        ConfigError: see `read_settings`.
    """
    for flag, low in (("samples", 1), ("epochs", 1), ("num_rounds", 1), ("tasks_per_round", 1), ("num_tasks", 1)):
        if flags.get(flag) is not None:
            check(f"--{flag}", flags[flag], int, low, 10**6)
    if flags.get("tensorboard") and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: the package is missing; pip install tensorboard brings it")
    check("--seed", flags["seed"], int, 0, 2**63 - 1)
    check("--precision", flags["precision"], str, choices=PRECISIONS)
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", flags["device"]):
        raise ConfigError(f"--device: {flags['device']!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    data = read_dataset(flags["data_config"])
    if flags.get("num_tasks"):
        data = _keep_tasks(data, flags["num_tasks"])
    hyper = read_hyperparam(flags["hp_config"], flags["epochs"])
    if flags["name"] is None:
        flags["name"] = _default_name(method, flags, [f.name for f in fields(kind)[len(fields(Settings)) :]])
    if not re.fullmatch(r"\w[\w.,=+-]{0,199}", flags["name"]):
        raise ConfigError(f"--name: {reprlib.repr(flags['name'])} is not a plain folder name of at most 200 characters")
    if method == "modelzoo":
        flags.update(_check_rounds(flags, len(data["tasks"])))
    known = {f.name for f in fields(kind)}
    flags = {k: v for k, v in flags.items() if k in known}
    return kind(**{**flags, **data, **hyper, "method": method})


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


def _default_name(method, flags, more=()):
    """Name a run by its files and by every flag given that changes what it computes, those in `more` too."""
    parts = [Path(flags["data_config"]).stem, Path(flags["hp_config"]).stem, method]
    for flag in ("continual", "naive", "warm_start"):
        parts += [flag] if flags.get(flag) else []
    for flag in ("num_tasks", "num_rounds", "tasks_per_round", "replay_frac", "samples", "epochs", *more):
        parts += [f"{flag}={flags[flag]}"] if flags.get(flag) is not None else []
    name = "-".join([*parts, f"seed={flags['seed']}"])
    return re.sub(r"[^\w.,=+-]", "_", name).lstrip(".,=+-")

