"""Points of accuracy against compute: of run folders, or of files in which they were kept."""
import csv
import functools
import math
import reprlib
import statistics

from tools.runs import join_lengths, printable, require, setting_text
from tools.stats import measure, summarise
from utils.config_files import ConfigError

# A point's columns. Accuracies are in [0, 1].
NUMBERS = ["epochs", "n", "mean", "sd", "low", "high", "rows_trained", "operations", "parameters", "stored_rows"]
TEXTS = ["method", "tasks", "model", "samples", "commit", "hardware", "torch"]
NEEDED = ("epochs", "n", "operations")  # never empty or 0: every point has a place


def list_points(groups):
    """The points of the figure compute, a frame of NUMBERS and TEXTS: a row a group; those of a method make a line.

    Costs are means over the group's runs.
    """
    first = [(group.runs[0].members or group.runs)[0] for group in groups]
    # One text for all, or `read_points` would take files of the same tasks under two names for different ones.
    tasks = " or ".join(dict.fromkeys(run.settings["tasks"] for run in first))
    rows = []
    for method, line in join_lengths(groups):
        for group in line:
            run, s = group.runs[0], summarise(list(measure([group])[group.label]["average_accuracy"].values()))
            about = {key: "; ".join(dict.fromkeys(run.about[key] for run in group.runs)) for key in run.about}
            members = run.members or [run]
            settings = {**members[0].settings, "samples": setting_text(run, "samples"),
                        "model": "; ".join(dict.fromkeys(member.settings["model"] for member in members))}
            costs = [run.cost | {"operations": count_work(run)} for run in group.runs]
            cost = {key: mean_or_none([cost[key] for cost in costs]) for key in costs[0]}
            rows.append({**settings, **vars(s), **cost, **about, "tasks": tasks, "method": method})
    return require("pandas").DataFrame(rows, columns=NUMBERS + TEXTS)


def mean_or_none(values):
    """The mean of numbers; None where one of them is unknown."""
    return None if None in values else statistics.mean(values)


def read_points(paths):
    """The points that files hold, one file's after the other's.

    Raises:
        ConfigError: a file cannot be read, or is not one that the figure compute wrote; points of different tasks, or
            of one method with different models or samples.
    """
    pandas, points, first = require("pandas"), [], {}
    for path in paths:
        for line, row in _read_rows(path):
            point = row | {key: pandas.to_numeric(row[key], errors="coerce") for key in NUMBERS}
            if problem := _find_problem(row, point):
                raise ConfigError(f"{path}: line {line}: {problem}")
            for key, method in (("tasks", None), ("model", row["method"]), ("samples", row["method"])):
                value, place = first.setdefault((key, method), (row[key], f"{path}, line {line}"))
                if row[key] != value:
                    whose = "all points" if method is None else f"the points of {method!r:.80}"
                    raise ConfigError(f"{path}: line {line}: {key} {row[key]!r:.80} differs from {value!r:.80} in "
                                      f"{place}; {whose} must have the same")
            method, epochs = row["method"], point["epochs"]
            place = first.setdefault((method, epochs), f"{path}, line {line}")
            if place != f"{path}, line {line}":
                raise ConfigError(f"{path}: line {line}: {method!r:.80} has {epochs:g} epochs in {place} too; leave "
                                  "one out")
            points.append(point)
    return pandas.DataFrame(points)


def _read_rows(path):
    """A list of (number of its line, dict column -> text), one a row of a file; `ConfigError` as `read_points`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                header, rows = reader.fieldnames, [(reader.line_num, row) for row in reader]
            except csv.Error as e:
                raise ConfigError(f"{path}: line {reader.reader.line_num}: not a table of points ({e})") from e
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:  # of other encodings
        raise ConfigError(f"{path}: not a table of points ({printable(e)})") from e
    if not header:
        raise ConfigError(f"{path}: not a table of points (its first line is empty)")
    if missing := [key for key in NUMBERS + TEXTS if key not in header]:
        raise ConfigError(f"{path}: no column {missing[0]}; plot.py compute RUN... --file {path} writes them all")
    for line, row in rows:
        if None in row or None in row.values():  # where DictReader puts what is too many, and what lacks
            cells = len(header) + len(row.get(None, ())) - list(row.values()).count(None)
            raise ConfigError(f"{path}: line {line}: {cells} cells, but {len(header)} columns in line 1")
    if not rows:
        raise ConfigError(f"{path}: holds no points")
    return rows


def _find_problem(row, point):
    """What is wrong with the numbers of a point, read from the texts in `row`; None where nothing is."""
    for key in NUMBERS:
        x, what = point[key], "a number of 0 or more, such as 594150, or empty"
        right = row[key] == "" or 0 <= x < math.inf
        if key in NEEDED:
            right, what = 0 < x < math.inf, "a number above 0, such as 594150"
        elif key == "mean":
            right, what = 0 <= x <= 1, "a share in [0, 1], such as 0.73, and not per cent"
        elif key in ("low", "high"):  # an interval may pass 0 and 1
            right, what = row[key] == "" or abs(x) < math.inf, "a number, such as 0.73, or empty"
        if not right:
            return f"{key} must be {what}; not {reprlib.repr(row[key])}"
    low, mean, high = (point[key] for key in ("low", "mean", "high"))
    if (row["low"] or row["high"]) and not low <= mean <= high:
        return f"mean {row['mean']} must lie from low to high, not {row['low'] or 'empty'} to {row['high'] or 'empty'}"
    return None


def count_work(run):
    """Floating-point operations of a run's training: its rows, each forward and backward, by torch's counter.

    Evaluation is not in it, nor what a method does beyond a step on its rows (A-GEM's second gradient, EWC's penalty,
    PNN's passes through earlier columns).
    """
    if run.members:
        return sum(map(count_work, run.members))
    return run.cost["rows_trained"] * _count_flops(run.settings["model"], run.image_shape)


@functools.cache
def _count_flops(model, image_shape):
    import torch

    from net.build_net import build_net
    from tools.bench import count_flops

    return count_flops(build_net(model, image_shape, [5], 0.0, seed=0), torch.zeros(2, *image_shape, dtype=torch.uint8))
