"""Points of accuracy against compute: of run folders, or of files in which they were kept."""
import functools
import math
import statistics

from tools.runs import join_lengths, printable, require, setting_text
from tools.stats import measure, summarise
from utils.config_files import ConfigError

# A point's columns. Accuracies are in [0, 1].
NUMBERS = ["epochs", "n", "mean", "sd", "low", "high", "rows_trained", "operations", "parameters", "stored_rows"]
TEXTS = ["method", "tasks", "model", "samples", "commit", "hardware", "torch"]


def list_points(groups):
    """The points of the figure compute, a frame of NUMBERS and TEXTS: a row a group; those of a method make a line.

    Costs are means over the group's runs.
    """
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
            rows.append({**settings, **vars(s), **cost, **about, "method": method})
    return require("pandas").DataFrame(rows, columns=NUMBERS + TEXTS)


def mean_or_none(values):
    """The mean of numbers; None where one of them is unknown."""
    return None if None in values else statistics.mean(values)


def read_points(paths):
    """The points that files hold, one file's after the other's.

    Raises:
        ConfigError: a file cannot be read, or is not one that the figure compute wrote.
    """
    pandas, frames = require("pandas"), []
    for path in paths:
        try:
            frame = pandas.read_csv(path, encoding="utf-8", dtype=str, keep_default_na=False)
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
        except ValueError as e:  # of pandas' parser, and of other encodings
            raise ConfigError(f"{path}: not a table of points ({printable(e)})") from e
        if not len(frame):
            raise ConfigError(f"{path}: holds no points")
        if missing := [key for key in NUMBERS + TEXTS if key not in frame]:
            raise ConfigError(f"{path}: no column {missing[0]}; plot.py compute RUN... --file {path} writes them all")
        for key in NUMBERS:
            frame[key] = pandas.to_numeric(frame[key], errors="coerce").where(lambda column: column < math.inf)
            if key in ("epochs", "n", "mean", "operations") and not (frame[key] > 0).all():
                line = 2 + (frame[key] > 0).argmin()
                raise ConfigError(f"{path}: line {line}: {key} must be a number above 0")
        frames.append(frame)
    return pandas.concat(frames)


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
