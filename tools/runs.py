"""Run folders, read, grouped, named and as pandas frames, for report, plots and notebooks; nothing in one is executed.

    from tools.runs import load_frame
    load_frame(["runs/a", "runs/b"])  # a row per run; rows="task": per run and task; "round", "class": per these, too
"""
import importlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from modelzoo import Zoo, ensemble_log_probs
from tools import peers
from utils import metrics
from utils.config_files import ConfigError, load_yaml
from utils.device import out_of_memory
from utils.learner import COST, WARM, learner_path, make_learner
from utils.log import first_seen, task_names
from utils.run_folder import LATER, MAY_CHANGE, load_tensors

APART = (*MAY_CHANGE, "save_nets", "threads", "seed", "task_order", "names")  # settings that may differ within a group
DATA = ("dataset", "keywords", "path", "size", "tasks")  # of these is the setting "tasks" of a `Run`, a text
SHAPES = {"cifar100": (3, 32, 32), "cifar10": (3, 32, 32), "mini_imagenet": (3, 84, 84)} | dict.fromkeys(
    ("mnist", "rotated_mnist", "permuted_mnist", "digits", "rotated_digits"), (1, 28, 28))
# They mean nothing for other kinds.
ZOO_FLAGS = ("num_rounds", "tasks_per_round", "replay_frac", "naive", "warm_start", "inherit", "weigh_by_round")
OWN = ("inherit", "weigh_by_round")  # what the paper does not have, which a label always says
PEER_KINDS = {f"avalanche-{method}": f"Avalanche {name}" for method, name in peers.METHODS.items()}
METRICS = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer")
TRANSFER = "forward_transfer"  # the metric that takes the Isolated group as well
COSTS = ("networks", "rows_trained", "stored_rows", "stored_numbers", "parameters", "seconds")


@dataclass(frozen=True)
class Run:
    """A finished run, or an ensemble of several.

    Attributes:
        path: of its folder (an ensemble: of all, in one text).
        kind: Model Zoo, Isolated, Multi-Head, Avalanche Replay, ...
        seed: whole number (an ensemble: a tuple of those of its members, in their order).
        order: --task_order.
        settings: what decides the run, without the seed; the keys of DATA stand as one, tasks.
        names: [T] of the tasks seen.
        class_names: [T] tuples of texts.
        tasks: what was learned: dataset, keywords, path, size and the source labels of each task seen, in one text.
        matrix: [rounds][T] test accuracy in [0, 1], None where a task was not yet seen.
        rounds: a dict a round, with tasks and weights, as in result.json; none in an ensemble.
        cost: networks (that speak for a task, mean over tasks), seconds, rows_trained, parameters,
            stored_rows, stored_numbers (not of ensembles); None where unknown.
        about: commit, hardware and torch's version, as texts.
        data: checksum of rows, labels and tasks; None where unknown, and in an ensemble.
        members: the runs of an ensemble, in the order of their settings and seeds; none in a run.
        image_shape: (C, H, W); None where unknown.
    """

    path: str
    kind: str
    seed: int | tuple
    settings: dict
    names: tuple
    tasks: str
    matrix: list
    rounds: list
    cost: dict
    about: dict
    data: str | None = None
    members: tuple = ()
    order: int = 0
    class_names: tuple = ()
    image_shape: tuple | None = None

    @property
    def trial(self):
        """What tells the runs of a group apart: the seed, and the order of the tasks where it is not the file's."""
        return f"{self.seed} in order {self.order}" if self.order else self.seed

    @property
    def over(self):
        """As `tasks`, in whatever order they came."""
        *data, tasks = json.loads(self.tasks)
        return json.dumps([*data, sorted(tasks, key=json.dumps)])

    def metrics(self):
        """Each of METRICS in [0, 1], None where it is undefined."""
        continual = self.settings.get("continual") and self.rounds
        return {m: getattr(metrics, m)(self.matrix) if continual or m == METRICS[0] else None for m in METRICS}


@dataclass(frozen=True)
class Group:
    """Runs that differ in --task_order and seed only, sorted by these; `label` tells them from others read too."""

    label: str
    runs: list


def load_frame(paths, ensembles=(), rows="run"):
    """Run folders, and an ensemble of each list in `ensembles`, as a frame; accuracies in [0, 1], NaN where undefined.

    A row per "run" (metrics, cost, origin, settings), run and "task" (accuracy when first seen and at the end), run,
    "round" and task seen (accuracy; whether it was trained on; weight in the draw), or run, task and "class" (accuracy,
    test rows, and how many were predicted as each class: as_0, as_1, ...). `ConfigError`: nothing can be read.
    """
    groups, notes = group_runs(read_runs("load_frame", [paths] if isinstance(paths, (str, Path)) else paths, ensembles))
    for note in notes:
        print(f"load_frame: note: {printable(note)}", file=sys.stderr)
    return make_frame(groups, rows)


def make_frame(groups, rows="run"):
    """As `load_frame`, of groups that are read already."""
    make = {"run": _run_rows, "task": _task_rows, "round": _round_rows, "class": _class_rows}[rows]
    cells = [
        {"run": run.path, "group": group.label, "kind": run.kind, "seed": run.seed, "task_order": run.order, **row}
        for group in groups for run in group.runs for row in make(run, group, groups)]
    # A path need not be UTF-8, which pandas wants. Not `printable`: two folders must not become one.
    frame = require("pandas").DataFrame([
        {key: x.encode(errors="backslashreplace").decode() if isinstance(x, str) else x for key, x in row.items()}
        for row in cells])
    numbers = frame.columns.intersection([*METRICS, TRANSFER, *COSTS, "first_seen", "accuracy", "weight"])
    return frame.astype(dict.fromkeys(numbers, float))


def _run_rows(run, group, groups):
    row = {**run.metrics(), TRANSFER: None, **{key: run.cost.get(key) for key in COSTS}, **run.about}
    for isolated in find_isolated(group, groups):
        if (isolated.trial, isolated.tasks) == (run.trial, run.tasks):
            row[TRANSFER] = metrics.forward_transfer(run.matrix, isolated.matrix[-1])
    ours = (*row, "run", "group", "kind", "seed", "task_order", "all_tasks")
    settings = {**dict(zip(DATA, json.loads(run.tasks)[:-1], strict=False)), **run.settings}
    return [row | {key: value for key, value in settings.items() if key not in ours}]


def _task_rows(run, *_):
    return [{"task": t, "name": name, "first_seen": first_seen(run.matrix, run.rounds, t) if run.rounds else None,
             "accuracy": run.matrix[-1][t]} for t, name in enumerate(run.names)]


def _round_rows(run, *_):
    """An ensemble is one round in which nothing was trained."""
    rounds = run.rounds or [{"tasks": [], "weights": []}]
    return [{"round": k + 1, "task": t, "name": run.names[t], "accuracy": accuracy, "trained": t in r["tasks"],
             "weight": r["weights"][t] if t < len(r["weights"]) else None}
            for k, (row, r) in enumerate(zip(run.matrix, rounds, strict=True))
            for t, accuracy in enumerate(row) if accuracy is not None]


def _class_rows(run, *_):
    """From the stored predictions of a run's test rows."""
    rows = []
    for t, (p, y) in enumerate(zip(*load_log_probs(run), strict=True)):
        n = p.shape[1]
        counts = (y * n + p.argmax(1)).bincount(minlength=n * n).view(n, n)
        rows += [{"task": t, "name": run.names[t], "class": run.class_names[t][c], "rows": int(of_class.sum()),
                  "accuracy": of_class[c].item() / max(int(of_class.sum()), 1),
                  **{f"as_{i}": count for i, count in enumerate(of_class.tolist())}}
                 for c, of_class in enumerate(counts)]
    return rows


def task_labels(runs):
    """[T] texts: the tasks' names; where the runs have them in several orders, their places."""
    names = max((run.names for run in runs), key=len)
    alike = all(run.names == names[: len(run.names)] for run in runs)
    return names if alike else tuple(f"task {t + 1} to come" for t in range(len(names)))


def find_isolated(group, groups):
    """The runs of Isolated groups, without --inherit, whose settings else are `group`'s.

    Those that change nothing in Isolated do not count, nor does the order of the tasks.
    """

    def rest(run):
        return run.over, {k: v for k, v in run.settings.items() if k not in ("tasks", "all_tasks", *ZOO_FLAGS)}

    if group.runs[0].kind != "Model Zoo":
        return []
    fresh = [other for other in groups if other.runs[0].kind == "Isolated" and not other.runs[0].settings["inherit"]]
    return [run for other in fresh if rest(other.runs[0]) == rest(group.runs[0]) for run in other.runs]


def describe_groups(groups):
    """What the groups are runs of, in a line: "rotated_digits, 5 tasks; conv, 5 or 20 epochs, samples 20"."""
    runs = [member for group in groups for run in group.runs for member in run.members or [run]]

    def either(values, unit=""):
        *most, last = dict.fromkeys(printable(x) for x in values if x not in (None, "")) or [""]
        text = f"{', '.join(most)} or {last}" if most else last
        return f"{text} {unit}" + "s" * (text != "1") if text and unit else text

    of_data = (either(run.settings["tasks"].partition(" of ")[2] for run in runs),
               either(sorted(len(run.names) for run in runs), "task"))
    of_training = (either(run.settings.get("model") for run in runs),
                   either((run.settings.get("epochs") for run in runs), "epoch"),
                   either(setting_text(run, "samples") for run in runs))
    return "; ".join(", ".join(filter(None, part)) for part in (of_data, of_training))


def require(module):
    """Import what a run does without; a `ConfigError` with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ConfigError(f"{e.name} is not installed: pip install -r requirements.txt") from e


def read_runs(prog, paths, ensembles=()):
    """Read the run folders `paths` and an ensemble of each list in `ensembles`; what cannot be read costs a line.

    Raises:
        ConfigError: nothing could be read.
    """
    runs, problems = [], []
    for read, argument in [(read_run, p) for p in paths] + [(make_ensemble, e) for e in ensembles]:
        try:
            runs.append(read(argument))
        except ConfigError as e:
            problems.append(str(e))
    for problem in problems if runs else problems[:-1]:
        print(f"{prog}: skipped: {printable(problem)}", file=sys.stderr)
    if not runs:
        raise ConfigError(problems[-1] if problems else "no run folder given")
    return runs


def read_run(path):
    """Read one run folder.

    Raises:
        ConfigError: there is none, the run is not finished, or the files are not of this code.
    """
    folder = Path(path)
    file = folder / "result.json"
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such run folder")
    if not file.is_file():
        unfinished = (folder / "config.yaml").is_file()
        raise ConfigError(f"{path}: {'not finished' if unfinished else 'not a run folder'}: it holds no result.json")
    about = load_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    try:
        return _parse(str(path), json.loads(file.read_text(encoding="utf-8")), about)
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read ({e.strerror})") from e
    except KeyError as e:
        raise ConfigError(f"{file}: not a result of this code: no key {e}") from e
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(f"{file}: not a result of this code ({printable(e)[:120]})") from e


def _parse(path, result, about):
    """The `Run` of a result.json; whatever is not as this code writes it raises one of `read_run`'s exceptions."""

    def number(x, high=1e18):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= high

    config, matrix, rounds, classes = (result[key] for key in ("config", "accuracy_matrix", "rounds", "classes"))
    config = LATER | config
    continual, size = config["continual"], len(classes)
    seen = [k + 1 if continual else size for k in range(len(rounds))]
    cost = {"networks": (sum(len(r["tasks"]) for r in rounds) + size * config["warm_start"]) / max(size, 1)}
    cost |= {key: result.get(key) for key in (*COST, "stored_rows", "stored_numbers")}
    checksum = (about.get("settings") or {}).get("data")
    names = tuple(map(printable, task_names(config["tasks"][:size], config["names"], result.get("class_names"))[:size]))
    class_names = tuple(tuple(map(printable, task)) for task in result.get("class_names") or classes)
    shape = result.get("image_shape") or SHAPES.get(config["dataset"])  # runs did not record it at first
    for what, holds in {
        "classes": 0 < size == len(names) and all(isinstance(task, list) and len(task) > 1 for task in classes),
        "class_names": list(map(len, class_names)) == list(map(len, classes)),
        "config": isinstance(continual, bool) and isinstance(config["seed"], int),
        "method": config["method"] == result["method"],
        "model": isinstance(config.get("model", ""), str),
        "epochs": isinstance(config.get("epochs", 0), int),
        "samples": isinstance(config.get("samples"), int | None),
        "task_order": isinstance(config["task_order"], int),
        "rounds": len(matrix) == len(rounds) > 0 and (not continual or len(rounds) == size),
        "rounds: tasks": all(isinstance(t, int) and 0 <= t < size for r in rounds for t in r["tasks"]),
        "rounds: weights": all(len(r["weights"]) <= size and all(map(number, r["weights"])) for r in rounds),
        "accuracy_matrix": all(len(row) == size and all(number(x, 1) if t < n else x is None for t, x in enumerate(row))
                               for n, row in zip(seen, matrix, strict=True)),
        "image_shape": shape is None or len(shape) == 3 and all(isinstance(x, int) and 0 < x < 10**5 for x in shape),
        "cost": all(x is None or number(x) for x in cost.values()),
        "data": checksum is None or isinstance(checksum, str),
    }.items():
        if not holds:
            raise ValueError(what)
    zoo = "Model Zoo, multi-task" if not continual else "Isolated" if config["tasks_per_round"] == 1 else "Model Zoo"
    kind = {"modelzoo": zoo, "multihead": "Multi-Head", **PEER_KINDS}[config["method"]]
    data = [config[key] for key in DATA]
    tasks = f"{size} task{'s' * (size > 1)} of {printable(Path(config['data_config']).stem)}"
    unused = [key for key in peers.FLAGS if config.get(key) is None]  # runs did not record all of them at first
    settings = {key: value for key, value in config.items() if key not in (*APART, *DATA, *unused)}
    versions = about.get("versions") or result.get("versions") or {}
    commit, hardware, torch = (printable(x or "unknown") for x in (*map(about.get, ("commit", "hardware")),
                                                                   versions.get("torch")))
    about = {"commit": commit[:10] + "+" * commit.endswith("+"), "hardware": hardware, "torch": torch}
    return Run(path, kind, config["seed"], {"tasks": tasks, **settings, "all_tasks": data}, names,
               json.dumps([*data[:-1], classes]), matrix, rounds, cost, about, checksum, class_names=class_names,
               order=config["task_order"], image_shape=shape and tuple(shape))


def printable(value):
    """`value` as one line without control characters: what a foreign file says must not steer a terminal."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in str(value)).split())


def load_log_probs(run):
    """A run's predictions and what they should have been, from its folder.

    Returns:
        log_probs: [T] tensors [M_t, C_t] float64, log class probabilities of the test rows.
        labels: [T] tensors [M_t] int64.

    Raises:
        ConfigError: a file is missing, damaged, or not of this run.
    """
    folder, classes = Path(run.path), [len(task) for task in json.loads(run.tasks)[-1]]
    try:
        labels = load_tensors(folder / "test_labels.pt", "cpu")[: len(classes)]
        zoo = Zoo([], labels, classes, run.settings["replay_frac"], run.settings["weigh_by_round"])
        learners = [(WARM, list(range(len(classes))))] * run.settings["warm_start"]
        learners += [(k, r["tasks"]) for k, r in enumerate(run.rounds)]
        for k, _ in learners:
            zoo.add(make_learner(load_tensors(learner_path(folder, k), "cpu")))
        if [learner.tasks for learner in zoo.learners] != [tuple(tasks) for _, tasks in learners]:
            raise ValueError("learners of other tasks")
        log_probs = [zoo.predict_log_probs(t) for t in range(len(classes))]
    except OSError as e:
        raise ConfigError(f"{e.filename or folder}: cannot be read ({e.strerror}); an ensemble needs it") from e
    except Exception as e:  # what another program wrote raises nearly anything
        if out_of_memory(e):
            raise MemoryError from e
        raise ConfigError(f"{folder}: its predictions are damaged or foreign ({printable(e)[:80]})") from e
    # A hundredth, because devices may break ties between classes in different ways.
    if any(abs(a - b) > 0.01 for a, b in zip(zoo.accuracy, run.matrix[-1], strict=True)):
        raise ConfigError(f"{folder}: its predictions do not have the accuracy that its result.json states")
    return log_probs, labels


def make_ensemble(paths):
    """Average the predictions of the runs in the folders `paths` into one `Run`: the mean of their probabilities.

    Raises:
        ConfigError: a run that cannot be read, runs over different tasks, or a run that stands there twice.
    """
    runs = [read_run(path) for path in paths]
    first = runs[0]
    for i, run in enumerate(runs):
        if run.tasks != first.tasks:
            raise ConfigError(f"--ensemble: {first.path} and {run.path} are not over the same tasks")
        if twin := next((other for other in runs[:i] if _member(other) == _member(run)), None):
            raise ConfigError(f"--ensemble: {twin.path} and {run.path} are the same run: settings and seed agree")
    predictions, all_labels = zip(*map(load_log_probs, runs), strict=True)
    for run, labels in zip(runs, all_labels, strict=True):
        if not all(a.equal(b) for a, b in zip(labels, all_labels[0], strict=True)):
            raise ConfigError(f"--ensemble: {first.path} and {run.path} were tested on different rows")
    row = [metrics.accuracy(ensemble_log_probs(p, [1.0] * len(p)), y)
           for *p, y in zip(*predictions, all_labels[0], strict=True)]
    costs = {key: [run.cost[key] for run in runs] for key in ("networks", *COST, "stored_rows")}
    cost = {key: None if None in values else sum(values) for key, values in costs.items()}
    # Members that keep rows of their own keep more together than one of them, and less than the sum.
    if cost["stored_rows"] is not None:
        alike = len({(run.data, *_data_key(run)) for run in runs}) == 1 and runs[0].data
        whole = all(run.settings["replay_frac"] == 1 for run in runs)
        none = not any(costs["stored_rows"])
        cost["stored_rows"] = max(costs["stored_rows"]) if none or alike and whole else None
    kind = first.kind if len(set(map(_name, runs))) == 1 else "runs"
    about = {key: "; ".join(dict.fromkeys(run.about[key] for run in runs)) for key in first.about}
    settings = {k: v for k, v in first.settings.items() if all(run.settings.get(k) == v for run in runs)}
    members = tuple(sorted(runs, key=_member))
    return Run(" ".join(map(str, paths)), f"ensemble of {len(runs)} {kind}", tuple(run.seed for run in members),
               settings, first.names, first.tasks, [row], [], cost, about, members=members, order=first.order,
               image_shape=first.image_shape)


def _key(run):
    """What the runs of a group have in common: of ensembles, the settings of each of their members."""
    settings = {k: v for k, v in run.settings.items() if k != "tasks"}  # which names the file
    *data, tasks = settings.pop("all_tasks", [[]])
    settings["all_tasks"] = [*data, sorted(tasks, key=json.dumps)]
    return json.dumps([run.kind, run.over, [*map(_key, run.members)] or settings], sort_keys=True)


def _member(run):
    return _key(run), run.tasks, run.order, run.seed


def _data_key(run):
    """All that decides a run's data but the files: runs that agree in it should have the same checksum."""
    return json.dumps(run.settings["all_tasks"]), run.settings.get("samples")


def _on_other_data(runs, key=_data_key):
    """Two of `runs` that agree in `key` and whose checksums differ; None where there are none."""
    first = {}
    for run in runs:
        if run.data and first.setdefault(key(run), run).data != run.data:
            return first[key(run)], run
    return None


def group_runs(runs):
    """Gather the runs that differ in seed and in the order of the tasks only.

    Returns:
        groups: in the order of their first runs.
        notes: a line for each thing that whoever reads the numbers must know.
    """
    found, notes = {}, []
    for run in runs:
        seeds = found.setdefault(_key(run), {})
        if run.trial in seeds and seeds[run.trial].tasks != run.tasks:  # two files, of the same tasks in other orders
            seeds = found.setdefault(_key(run) + run.tasks, {})
        if run.trial in seeds:
            notes.append(f"{run.path} left out: {seeds[run.trial].path} has the same settings and seed")
        else:
            seeds[run.trial] = run
    members = [sorted(seeds.values(), key=lambda run: (run.order, run.seed)) for seeds in found.values()]
    groups = []
    for label, runs in zip(tell_apart([runs[0] for runs in members]), members, strict=True):
        groups.append(Group(label, runs))
        drawn = [_member(member) for run in runs for member in run.members]
        if len(set(drawn)) < len(drawn):
            notes.append(f"{label}: the ensembles share runs, so they are alike by more than chance and the spread "
                         "between them is too small")
        if any(_on_other_data(run.members) for run in runs):
            notes.append(f"{label}: its members were trained on different rows, so that it gains by more data as well "
                         "as by averaging")
    singles = [one for runs in members for run in runs for one in run.members or [run]]
    if pair := _on_other_data(singles, lambda run: (run.trial, *_data_key(run))):
        notes.append(f"{pair[0].path} and {pair[1].path} have the same tasks, samples and seed, but were run on "
                     "different data: what stands beside each other here is not comparable")
    return groups, notes


def tell_apart(runs):
    """A label for each of `runs`, of which no two are of the same group."""
    labels = [_label(run, runs[:i] + runs[i + 1 :]) for i, run in enumerate(runs)]
    return [label + f" ({labels[:i].count(label) + 1})" * (label in labels[:i]) for i, label in enumerate(labels)]


def join_lengths(groups):
    """Groups that differ in the length of training only, as lines: a list of (label, groups by their epochs).

    A single epoch is never augmented, and joins longer ones that are.
    """
    longer = {group.runs[0].settings.get("augment") for group in groups if group.runs[0].settings.get("epochs") != 1}

    def rest(run):
        left_out = ("epochs", "augment") if len(longer) == 1 else ("epochs",)
        settings = {key: value for key, value in run.settings.items() if key not in left_out}
        return replace(run, settings=settings, members=tuple(map(rest, run.members)))

    lines = {}
    for group in groups:
        lines.setdefault(_key(rest(group.runs[0])), []).append(group)
    labels = tell_apart([rest(line[0].runs[0]) for line in lines.values()])
    return [(label, sorted(line, key=lambda group: group.runs[0].settings.get("epochs", 0)))
            for label, line in zip(labels, lines.values(), strict=True)]


def _name(run):
    """The kind of `run`, and what it does that the paper does not: "Model Zoo, inherit"."""
    return ", ".join([run.kind, *(key for key in OWN if setting_text(run, key) == key)])


def _label(run, others):
    """The name of `run`, and of its settings one after the other while a run in `others` has the same."""
    words, alike = [_name(run)], [other for other in others if other.kind == run.kind]
    for key in [key for key in run.settings if key != "all_tasks"]:
        text = setting_text(run, key)
        left = [other for other in alike if setting_text(other, key) == text]
        # A flag of the zoo that is off goes without saying.
        off = key in ZOO_FLAGS and run.settings[key] is False
        if len(left) < len(alike) and text and not off and key not in OWN:
            words.append(text)
        alike = left
    return ", ".join(words)


def differing(runs):
    """The settings in which `runs` are not all alike, but for those that the kind's name tells."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in ("method", "continual", "all_tasks"))
    return [key for key in keys if len({setting_text(run, key) for run in runs} - {""}) > 1]


def setting_text(run, key):
    """A setting in words; "" where it means nothing for this kind of run."""
    value, other = run.settings.get(key), run.settings.get("method") in ("multihead", *PEER_KINDS)
    if key not in run.settings or (key in ZOO_FLAGS and other) or (key in peers.FLAGS and value is None):
        return ""
    if key == "samples" and value is None:
        return "all samples"
    if value is None or isinstance(value, bool):
        return key if value else f"no {key}"
    return value if key == "tasks" else f"{key} {printable(value)}"
