"""The two YAML files of a run, read and checked: the dataset file and the hyper-parameter file."""
import difflib
import math
import re
import reprlib
from pathlib import Path

import yaml

from datasets.data import one_line
from net.build_net import read_model


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
    "torchvision": None,
}
ALIASES = {"rotmnist": "rotated_mnist", "permnist": "permuted_mnist"}
# Keys beyond dataset, tasks and names: those that must be there, and those that may.
DATASET_REQUIRED = {"npz": ("path",), "image_folder": ("path", "size"), "torchvision": ("name",)}
DATASET_OPTIONAL = {"npz": ("flip",), "image_folder": ("flip",), "torchvision": ("size", "flip")}
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# The values that a hyper-parameter key may have, as `check` takes them.
RANGES = {
    "batch": {"kind": int, "low": 1, "high": 10**6},
    "lr": {"kind": float, "above": 0, "below": math.inf},
    "l2_reg": {"kind": float, "low": 0, "below": math.inf},
    "dropout": {"kind": float, "low": 0, "below": 1},
}
# Keys that may be left out: as `check` takes them, and the default.
HYPER_OPTIONAL = {
    "optimiser": ({"kind": str, "choices": ("sgd", "adamw")}, "sgd"),
    "momentum": ({"kind": float, "low": 0, "below": 1}, 0.9),
    "warmup": ({"kind": float, "low": 0, "below": math.inf}, 0.0),
    "lr_min": ({"kind": float, "low": 0, "below": math.inf}, 0.0),
    "clip_norm": ({"kind": float, "above": 0, "below": math.inf}, None),
    "label_smoothing": ({"kind": float, "low": 0, "below": 1}, 0.0),
    "class_weights": ({"kind": str, "choices": ("balanced",)}, None),
    "best_epoch": ({"kind": bool}, False),
    "weights": ({"kind": str}, None),
    "freeze": ({"kind": bool}, False),
}
# What a search tries where a hyper-parameter file's `search:` says nothing else: one of some values, or a number
# between two ends, uniformly or on a logarithmic scale.
SPACE = {
    "batch": ("choice", (8, 16, 32, 128)),
    "lr": ("log", (1e-4, 1e-1)),
    "l2_reg": ("log", (1e-6, 1e-2)),
    "dropout": ("uniform", (0.1, 0.5)),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        # A merge, "<<: *other", brings keys that may be there already.
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for key in keys:
            if not isinstance(key, str):
                line = f"key {key!r} is not a word; put it in quotes if it is one"
                raise yaml.constructor.ConstructorError(None, None, line, node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} appears twice", node.start_mark)
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
        value = yaml.load(Path(path).read_bytes(), Loader=_Loader)  # UTF-8, or UTF-16 where its first bytes say so
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except yaml.MarkedYAMLError as e:
        where = f" at line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}: not a valid YAML file{where}: {one_line(e.problem)}") from e
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, LookupError, TypeError, AttributeError) as e:
        raise ConfigError(f"{path}: not a valid YAML file: {one_line(e)}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'batch: 16'")
    return value


def check(where, value, kind, low=-math.inf, high=math.inf, *, above=-math.inf, below=math.inf, choices=None):
    """Return `value` as `kind` (int, float, bool or str) if it is one and lies in low..high, above < value < below.

    Raises:
        ConfigError: it does not; the line opens with `where` (a file and key, or a flag).
    """
    if choices is not None:
        if not (isinstance(value, str) and value in choices):
            raise ConfigError(f"{where}: {reprlib.repr(value)} is not one of {', '.join(choices)}")
        return value
    if value is None:
        raise ConfigError(f"{where}: has no value")
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text; put it in quotes"}
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
        raise ConfigError(f"{where}: {one_line(value)} must be {' and '.join(bounds)}")
    return value


def check_device(text):
    """Refuse what is no device that we know, by its name."""
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", text):
        raise ConfigError(f"--device: {text!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")


def check_model(where, text):
    """Return `text` if `build_net` makes a network of it; else a `ConfigError` that opens with `where`."""
    try:
        read_model(text)
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from e
    return text


def check_keys(file, found, required, optional=()):
    """Refuse a mapping of `file` that lacks a required key, or has one that is neither required nor optional.

    Raises:
        ConfigError: it names the key, and one that is spelt nearly so.
    """
    known = (*required, *optional)
    for key in found:
        if key not in known:
            near = "".join(f"did you mean {word}? " for word in difflib.get_close_matches(key, known, 1))
            raise ConfigError(f"{file}: unknown key {one_line(key)}; {near}the keys are {', '.join(known)}")
    for key in required:
        if key not in found:
            raise ConfigError(f"{file}: key {key} is missing")


def read_dataset(file):
    """Read a dataset file: dict with dataset (no alias), tasks, names, path, size, flip and keywords.

    The last four are None where they do not apply or the file leaves them to the dataset. `keywords` is of torchvision:
    (("name", of its class), ...) with every key that is not one of ours, which its class has to know.

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be right.
    """
    found = load_yaml(file)
    name = None
    if "dataset" in found:
        name = check(f"{file}: dataset", found["dataset"], str, choices=(*DATASETS, *ALIASES))
        name = ALIASES.get(name, name)
    extra, optional = DATASET_REQUIRED.get(name, ()), ("names", *DATASET_OPTIONAL.get(name, ()))
    theirs = found.keys() - {"dataset", "tasks", *extra, *optional} if name == "torchvision" else ()
    check_keys(file, found, ("dataset", "tasks", *extra), (*optional, *theirs))
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
            if name == "image_folder" and type(label) is not int:
                raise ConfigError(f"{where}: {reprlib.repr(label)} is not a class name; YAML reads yes, no, null, "
                                  "dates and 1e3 as other things than texts: put such a name in quotes")
            top = DATASETS[name]
            check(f"{where}: label", label, int, 0, 2**31 if top is None else top - 1)
        repeated = next((label for label in task if task.count(label) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{where}: label {repeated} appears twice")
    if names is not None:
        if not isinstance(names, list) or len(names) != len(tasks):
            raise ConfigError(f"{file}: names: must be a list of {len(tasks)} names, one a task")
        names = tuple(check(f"{file}: names: name {i}", n, str) for i, n in enumerate(names))
        repeated = next((n for n in names if names.count(n) > 1), None)
        if repeated is not None:
            raise ConfigError(f"{file}: names: {reprlib.repr(repeated)} appears twice")
        odd = next((name for name in names if not name.isprintable()), None)
        if odd is not None:
            raise ConfigError(f"{file}: names: {reprlib.repr(odd)} cannot be printed on one line")
    keywords = None
    if name == "torchvision":
        keywords = tuple((key, _check_keyword(f"{file}: {key}", found[key])) for key in ("name", *sorted(theirs)))
        if not isinstance(found["name"], str) or not found["name"].isidentifier():
            raise ConfigError(f"{file}: name: {reprlib.repr(found['name'])} is not a class of torchvision.datasets, "
                              "such as FashionMNIST")
    path = check(f"{file}: path", found["path"], str) if "path" in extra else None
    size = check(f"{file}: size", found["size"], int, 8, 1024) if "size" in found else None
    flip = check(f"{file}: flip", found["flip"], bool) if "flip" in found else None
    return {"dataset": name, "tasks": tuple(map(tuple, tasks)), "names": names, "path": path, "size": size,
            "flip": flip, "keywords": keywords}


def _check_keyword(where, value):
    """`value` as torchvision takes it from a dataset file: a text, a number, true or false."""
    if not isinstance(value, (str, int, float)) or len(str(value)) > 60:
        raise ConfigError(f"{where}: {reprlib.repr(value)} is not a short text, a number, true or false")
    return value


def read_space(file, found):
    """Read the space that a search tries: `SPACE`, changed by what the hyper-parameter file's `search:` says.

    Args:
        file: its path.
        found: what it holds.

    Raises:
        ConfigError: see `read_hyperparam`.
    """
    model, found = found.get("model"), found.get("search", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: search: must hold keys, each with what to try, such as 'lr: {{log: [1e-4, 1e-1]}}'")
    check_keys(f"{file}: search", found, (), SPACE)
    space = {key: entry for key, entry in SPACE.items() if key != "dropout" or not str(model).startswith("conv")}
    for key, entry in found.items():
        where = f"{file}: search: {key}"
        if key not in space:
            raise ConfigError(f"{where}: model {model} has none")
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


def _read_network(file, found):
    """The network of a hyper-parameter file, as `build_net` takes it.

    `model: conv` with `width: 160` is conv_160, and `model: resnet18` with `weights: DEFAULT` resnet18:IMAGENET1K_V1.
    """
    model = check(f"{file}: model", found["model"], str)
    if "width" in found:
        width = check(f"{file}: width", found["width"], int, 1, 9999)
        if model != "conv":
            raise ConfigError(f"{file}: width: only model conv has one, not {reprlib.repr(model)}; leave it out")
        model += f"_{width}" * (width != 80)
    weights = found.get("weights")
    if not isinstance(weights, str) or Path(weights).suffix:  # none, or a file
        return check_model(f"{file}: model", model)
    check_model(f"{file}: weights", f"{model}:{weights}")
    return ":".join(read_model(f"{model}:{weights}")[1:])


def read_hyperparam(file, over=()):
    """Read a hyper-parameter file: a dict with every training setting.

    Args:
        file: its path.
        over: dict of flags that go over the file's keys: epochs, batch, lr; None where they were not given.

    Raises:
        ConfigError: an unknown or missing key, a value that cannot be right, or keys that contradict each other.
    """
    found = load_yaml(file)
    check_keys(file, found, ("model", *RANGES), ("epochs", "schedule", "augment", "search", "width", *HYPER_OPTIONAL))
    read_space(file, found)
    over = {key: value for key, value in dict(over).items() if value is not None}

    def read(key, default=None, **values):
        where = f"--{key}" if key in over else f"{file}: {key}"
        return check(where, over.get(key, found.get(key, default)), **values)

    epochs = read("epochs", 100, kind=int, low=1, high=10**6)
    settings = {
        "model": _read_network(file, found),
        **{key: read(key, **values) for key, values in RANGES.items()},
        "epochs": epochs,
        "schedule": read("schedule", "cosine", kind=str, choices=SCHEDULES),
        "augment": read("augment", True, kind=bool) and epochs > 1,
        **{key: read(key, **values) if key in found else default for key, (values, default) in HYPER_OPTIONAL.items()},
    }
    settings["augment"] = settings["augment"] and not settings["freeze"]  # features are taken once
    for wrong, line in (
        ("momentum" in found and settings["optimiser"] != "sgd", "momentum: only optimiser sgd has one; leave it out"),
        (settings["warmup"] >= epochs, f"warmup: {settings['warmup']:g} must be below the number of epochs, {epochs}"),
        (settings["lr_min"] > settings["lr"], f"lr_min: {settings['lr_min']:g} must be at most lr, {settings['lr']:g}"),
        (settings["freeze"] and settings["weights"] is None, "freeze: needs weights, which stay as they are"),
        (settings["lr_min"] and settings["schedule"] == "constant",
         "lr_min: schedule constant does not use it; leave it out, or take cosine"),
    ):
        if wrong:
            raise ConfigError(f"{file}: {line}")
    return settings
