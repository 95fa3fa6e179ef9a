"""Figures of run folders, for print and screen: PNG, PDF or SVG by the file's ending.

    python tools/plot.py seen runs/zoo-seed=* runs/isolated-seed=* --file figure.pdf

Runs that differ in seed only are one group, as in report.py. Reads run folders and nothing else; the figure compute
also reads files of its points, which it writes where --file ends in .csv: so runs of several machines make one figure.
"""
import functools
import io
import itertools
import json
import math
import os
import sys
import textwrap
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.points import count_work, list_points, read_points
from tools.runs import describe_groups, group_runs, make_frame, printable, read_runs, require, task_labels
from tools.stats import FEWEST, LEVEL, Summary, measure, summarise
from utils.command import guard
from utils.config import Parser
from utils.config_files import ConfigError
from utils.learner import learner_path
from utils.run_folder import write_file

WIDTH = 7.2  # inches, of a page's text
SMALL_WIDTH = 5.2  # of the figures that a README shows, also on a telephone: larger letters
# Okabe and Ito's colours, which people with any colour vision tell apart; lines and marks differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "*")
COLOUR_MAP = "cividis"  # light to dark in grey as well
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.3, "lines.markersize": 3.5,
    "savefig.dpi": 200, "legend.frameon": False,
    "text.parse_math": False,  # a $ in a task's name is a $
    "pdf.fonttype": 42,  # fonts that journals accept
    "svg.hashsalt": "modelzoo",  # the same runs give the same file
}
INTERVAL = f"{100 * LEVEL:.0f} % interval"
NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def find_fonts(text):
    """Font families of this machine that share the letters of `text`, matplotlib's first, and the letters none has."""
    from matplotlib import font_manager, ft2font

    fonts, missing = [], set(text) - {"\n"}
    for font in sorted(font_manager.fontManager.ttflist,
                       key=lambda font: (font.name != "DejaVu Sans", font.weight != 400, font.name)):
        if not missing or font.name.startswith("Last Resort"):  # which has a box for every letter
            continue
        try:
            letters = set(map(chr, ft2font.FT2Font(font.fname).get_charmap()))
        except (OSError, RuntimeError):  # a font that went, or a broken one
            continue
        fonts += [font.name] * bool(missing & letters)
        missing -= letters
    return fonts, "".join(sorted(missing))


def make_figure(height, width=WIDTH):
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def choose_style(i):
    """Colour, line and mark of the i-th of several methods; a colour that comes again comes with another mark."""
    return COLOURS[i % len(COLOURS)], LINES[i % len(LINES)], MARKS[(i + i // len(COLOURS)) % len(MARKS)]


def choose(kind, groups):
    """The groups that a figure of this kind can show together.

    Args:
        kind: a key of KINDS.
        groups: as `group_runs` gives them.

    Returns:
        chosen: groups.
        skipped: a line for each of the others.
    """
    _, fits, _ = KINDS[kind]
    chosen, skipped = [], []
    for group in groups:
        run = group.runs[0]
        unfit = next((other for other in group.runs if not fits(other)), None)
        if unfit:
            skipped.append(f"{group.label}: this kind of run has no place in the figure {kind} ({unfit.path})")
        elif kind == "joint" and not all(_nested(run, other.runs[0]) for other in chosen):
            skipped.append(f"{group.label}: its tasks and those of {', '.join(g.label for g in chosen)} do not begin "
                           "alike, or settings differ")
        elif kind != "joint" and run.over != (chosen or [group])[0].runs[0].over:
            skipped.append(f"{group.label}: not over the same tasks as {chosen[0].label}")
        else:
            chosen.append(group)
    alone = {"joint": len(chosen) < 2,
             "seen": all(group.runs[0].kind == "Isolated" for group in chosen),
             "methods": not any(map(_has_curves, (group.runs[0] for group in chosen)))}
    if alone.get(kind):
        return [], skipped + [f"{group.label}: alone it makes no figure {kind}" for group in chosen]
    return chosen, skipped


def _nested(a, b):
    """Whether two Multi-Head runs are alike but for how many of the same tasks they train on."""
    (*data_a, tasks_a), (*data_b, tasks_b) = json.loads(a.tasks), json.loads(b.tasks)
    n = min(len(tasks_a), len(tasks_b))
    rest_a, rest_b = ({k: v for k, v in r.settings.items() if "tasks" not in k} for r in (a, b))
    return data_a == data_b and tasks_a[:n] == tasks_b[:n] and rest_a == rest_b


def draw_methods(groups):
    """A panel per method: a thin line for each task from where it arrives, and the mean over the tasks seen so far."""
    frame = make_frame(groups, "round")
    last = max(len(group.runs[0].matrix) for group in groups if _has_curves(group.runs[0]))
    columns = 2 if len(groups) == 4 else math.ceil(len(groups) / math.ceil(len(groups) / 4))
    figure, axes = _panels(len(groups), columns, last, "tasks seen", WIDTH if columns == 4 else SMALL_WIDTH)
    thin, order = (1, 3) if last <= 10 else (0.6, 5)  # the mean stands behind a few lines and before many
    for i, (axis, group) in enumerate(zip(axes, groups, strict=True)):
        rows, colour = frame[frame["group"] == group.label], COLOURS[i % len(COLOURS)]
        at = _summarise(rows.groupby(["run", "round"], as_index=False)["accuracy"].mean(), "round")
        end = _mean_text(at[max(at)])
        if _has_curves(group.runs[0]):
            for _, of_task in rows.groupby("task"):
                means = 100 * of_task.groupby("round")["accuracy"].mean()
                axis.plot(means.index, means, color=colour, linewidth=thin, marker="o", markersize=2 * thin, zorder=4)
            axis.plot(list(at), [100 * s.mean for s in at.values()], color="black", linewidth=2.5, zorder=order)
            _band(axis, at, "black", 0.15)
            end = f"{100 * at[1].mean:.1f} → {end}"
        else:  # all tasks at once: nothing arrives
            axis.axhline(100 * at[max(at)].mean, color="black", linewidth=2.5, linestyle="--")
            end = f"at the end {end}"
        axis.set_title(f"{_fold(group.label, 22)}\n{end}", fontsize=9)
    _limit(axes)
    several = max(len(group.runs) for group in groups) >= FEWEST
    figure.suptitle("thick: mean over the tasks seen so far; thin: each task" + f"\nband, ±: {INTERVAL}" * several,
                    fontsize=8)
    return figure


def draw_seen(groups):
    """Every task's accuracy against the number of tasks seen; Isolated's as a cross where the task arrives."""
    frame = make_frame(groups, "round").rename(columns={"round": "x"})
    frame = frame[(frame["kind"] != "Isolated") | (frame["x"] == frame["task"] + 1)]
    return _draw_tasks(frame, task_labels([run for group in groups for run in group.runs]), "tasks seen")


def draw_joint(groups):
    """Multi-Head's accuracy of each task against how many tasks it was trained on at once."""
    frame = make_frame(groups, "task").assign(group="Multi-Head")
    # The task's place in the longest run: others may have had the tasks in another order.
    tasks = max((_identify(group.runs[0]) for group in groups), key=len)
    frame["task"] = [tasks.index(task) for group in groups for run in group.runs for task in _identify(run)]
    frame["x"] = frame.groupby("run")["task"].transform("size")
    return _draw_tasks(frame, max((group.runs[0].names for group in groups), key=len), "tasks trained on at once")


def _draw_tasks(frame, names, xlabel):
    """A panel a task of the accuracy in `frame` against its column x, a line or (Isolated) a cross a group."""
    figure, axes = _panels(len(names), 5, frame["x"].max(), xlabel)
    handles, several, crosses = {}, False, itertools.cycle("x+1234")
    for i, (label, of_group) in enumerate(frame.groupby("group", sort=False)):
        colour, line, mark = choose_style(i)
        if isolated := of_group["kind"].iloc[0] == "Isolated":
            mark = next(crosses)
        for t, axis in enumerate(axes):
            at = _summarise(of_group[of_group["task"] == t], "x")
            means = [100 * s.mean for s in at.values()]
            several |= any(s.low is not None for s in at.values())
            if isolated:
                axis.axhline(means[0], color="black", linestyle=line, linewidth=0.6)
                handles[label] = axis.scatter(list(at), means, marker=mark, color="black", s=30, zorder=3)
                _band(axis, at, "black", 0.2)
            else:
                handles[label], = axis.plot(list(at), means, color=colour, marker=mark, linestyle=line, markersize=2.5)
                _band(axis, at, colour, 0.2)
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(_shorten(name), fontsize=8 if len(name) <= 20 else 6.5)
    _limit(axes)
    title = f"mean over seeds; band, whisker: {INTERVAL}" if several else None
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, title=title, title_fontsize=8)
    return figure


def _summarise(frame, by):
    """Dict value of the column `by` -> `Summary` of the accuracies in `frame`."""
    return {x: summarise(list(values)) for x, values in frame.groupby(by)["accuracy"]}


def _panels(n, columns, last, xlabel, width=WIDTH):
    """A figure of `n` panels in rows of `columns`, with accuracy against x from 1 to `last`; and the panels."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = make_figure(1.2 + 1.35 * rows, width)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis in axes[n:]:
        axis.set_visible(False)
    for axis in axes[max(n - columns, 0) : n]:
        axis.xaxis.set_tick_params(labelbottom=True)
    for axis in axes:
        axis.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes[0].set_xlim(0.5, last + 0.5)
    axes[0].set_xticks(range(1, last + 1, math.ceil(last / 6)))
    figure.supxlabel(xlabel)
    figure.supylabel("test accuracy (%)", fontsize=8)
    return figure, axes[:n]


def _limit(axes):
    """Panels that share an axis of accuracies end not far outside 0 and 100, wherever intervals go."""
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, -2), min(high, 102))


def _band(axis, at, colour, alpha):
    """The intervals of `at`, x -> `Summary`, as a band, where they have one."""
    ends = {x: (100 * s.low, 100 * s.high) for x, s in at.items() if s.low is not None}
    if len(ends) == 1:  # a band of no width would not be seen
        axis.vlines(list(ends), *next(iter(ends.values())), color=colour, linewidth=0.8)
    elif ends:
        axis.fill_between(list(ends), *zip(*ends.values(), strict=True), color=colour, alpha=alpha, linewidth=0)


def draw_dots(groups):
    """Average accuracy of every group: its mean and 95 % interval, and a small dot for each seed."""
    found = measure(groups)
    labels = [_fold(group.label) for group in groups]
    figure = make_figure(0.8 + (0.2 + 0.14 * max(label.count("\n") + 1 for label in labels)) * len(groups))
    axis = figure.subplots()
    for i, group in enumerate(groups):
        colour, _, mark = choose_style(i)
        values = [100 * x for x in found[group.label]["average_accuracy"].values()]
        s = summarise(values)
        if s.n > 1:
            axis.scatter(values, [i + 0.22] * s.n, s=7, color="#888888", linewidth=0)
        axis.errorbar(s.mean, i, xerr=None if s.low is None else s.high - s.mean, color=colour, marker=mark,
                      markersize=6, capsize=3, linewidth=1.5, zorder=3)
        text = f"{_mean_text(s, 1)}  (n = {s.n})"
        axis.annotate(text, (1, i), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                      annotation_clip=False)
    axis.set_yticks(range(len(groups)), labels)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    several = max(len(group.runs) for group in groups)
    words = "; mean over seeds" + f", whisker and ±: {INTERVAL}" * (several >= FEWEST) + ", grey: each seed"
    axis.set_xlabel("average accuracy (%)" + words * (several > 1))
    return figure


def _mean_text(s, scale=100):
    """A `Summary` in words: its mean, and half the width of its interval where it has one."""
    return f"{scale * s.mean:.1f}" + (f" ± {scale * (s.high - s.mean):.1f}" if s.low is not None else "")


def _fold(label, width=34):
    """A long label on several lines, cut at its commas."""
    lines = [""]
    for part in label.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines[:-1], lines[-1] + ",", part]
    return "\n".join(lines)


def draw_compute(points):
    """Average accuracy against what it costs to train and to keep; a line joins several lengths of training.

    Args:
        points: as `list_points` gives them.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    figure = make_figure(3.9)
    axes = figure.subplots(1, 3, sharey=True)
    handles = {}
    titles = {"operations": "floating-point operations of training", "parameters": "parameters stored",
              "stored_rows": "training rows stored"}
    for i, (label, line) in enumerate(points.groupby("method", sort=False)):
        colour, style, mark = choose_style(i)
        line = line.sort_values("epochs")
        for axis, key in zip(axes, titles, strict=True):
            if line[key].notna().all():
                handles[label], = axis.plot(line[key], 100 * line["mean"], color=colour, marker=mark, linestyle=style)
                at = [(getattr(p, key), Summary(p.n, p.mean, p.sd, *((p.low, p.high) if p.low == p.low else ())))
                      for p in line.itertuples()]
                for band in [at] if line[key].nunique() > 1 else [[p] for p in at]:  # one above another: whiskers
                    _band(axis, dict(band), colour, 0.2)
        for point in line.itertuples():
            axes[0].annotate(f"{point.epochs:.0f}", (point.operations, 100 * point.mean), (0, 4), fontsize=5.5,
                             textcoords="offset points", ha="center", color=colour)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set_title(title)
        axis.grid(color="#dddddd", linewidth=0.5)
    for axis in axes[:2]:
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1, 3)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20T, 5M: the usual one needs mathematical text
        axis.xaxis.set_minor_formatter("")
    axes[2].xaxis.set_major_formatter("{x:,.0f}")
    axes[2].locator_params(axis="x", nbins=4)
    axes[0].set_ylabel("average accuracy (%)")
    title = "small numbers: epochs" + f"; band, whisker: {INTERVAL} over seeds" * bool(points["low"].notna().any())
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, title=title, title_fontsize=8)
    return figure


def draw_draws(groups):
    """Which tasks the learner of each round trained on, and the weights with which they were drawn."""
    from matplotlib.colors import LogNorm

    frame, names = make_frame(groups, "round"), task_labels([run for group in groups for run in group.runs])
    heights = [max(1.2, 0.17 * len(group.runs[0].rounds)) for group in groups]
    figure = make_figure(1.1 + sum(heights) + 0.35 * len(groups))
    axes = figure.subplots(len(groups), 2, sharex=True, squeeze=False, height_ratios=heights)
    drawn = frame["weight"][frame["weight"] > 0]
    norm = LogNorm(min([*drawn, 0.8]), max([*drawn, 1.25]))
    for (left, right), group in zip(axes, groups, strict=True):
        trained, weights = (_mean_over_seeds(frame, group, key) for key in ("trained", "weight"))
        shares = _heat_map(left, trained.fillna(0), f"{group.label}: trained on", names, cmap="Greys", vmin=0, vmax=1)
        colours = _heat_map(right, weights[weights > 0], "weight in the draw", names, cmap=COLOUR_MAP, norm=norm)
        if group.runs[0].settings["continual"]:
            middles = [t + 0.5 for t in range(len(names))]
            left.plot(middles, middles, "o", color="white", markersize=2)
        left.set_ylabel("round")
    several = max(len(group.runs) for group in groups) > 1
    words = "share of seeds" if several else "trained on"
    words += "; dot: the new task" * any(group.runs[0].settings["continual"] for group in groups)
    figure.colorbar(shares, ax=axes[:, 0].tolist(), location="bottom", aspect=40, label=words)
    ticks = [norm.vmin, math.sqrt(norm.vmin * norm.vmax), norm.vmax]
    bar = figure.colorbar(colours, ax=axes[:, 1].tolist(), location="bottom", aspect=40, ticks=ticks, format="{x:.2g}",
                          label="weight w" + ", mean over seeds" * several)
    bar.minorticks_off()
    return figure


def draw_matrix(groups):
    """Test accuracy on every task (column) after every round (row), mean over seeds; those of many rounds first."""
    groups = sorted(groups, key=lambda group: -len(group.runs[0].matrix))
    names, columns = task_labels([run for group in groups for run in group.runs]), min(len(groups), 2)
    heights = [max(0.3, 0.17 * len(group.runs[0].matrix)) for group in groups[::columns]]
    figure = make_figure(2.1 + sum(heights) + 0.3 * len(heights))
    axes = figure.subplots(len(heights), columns, sharex=True, squeeze=False, height_ratios=heights).flatten()
    frame = make_frame(groups, "round")
    means = [100 * _mean_over_seeds(frame, group, "accuracy") for group in groups]
    low = min(matrix.min(axis=None) for matrix in means)
    high = max(low + 1, *(matrix.max(axis=None) for matrix in means))
    digits, size = (1, 7) if len(names) <= 10 else (0, 5.5)
    for i, (axis, group, matrix) in enumerate(zip(axes, groups, means, strict=False)):
        image = _heat_map(axis, matrix, _fold(group.label), names, cmap=COLOUR_MAP, vmin=low, vmax=high)
        axis.xaxis.set_tick_params(labelbottom=i + columns >= len(groups))
        axis.set_ylabel("round" if i % columns == 0 else "")
        for (k, t), x in matrix.stack().dropna().items() if len(names) <= 25 else ():
            colour = "white" if x - low < (high - low) / 2 else "black"
            axis.text(t + 0.5, k - 0.5, f"{x:.{digits}f}", ha="center", va="center", color=colour, fontsize=size)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    label = "test accuracy (%)" + ", mean over seeds" * (max(len(group.runs) for group in groups) > 1)
    figure.colorbar(image, ax=list(axes), location="bottom", label=label, aspect=60)
    return figure


def draw_confusion(groups):
    """What each class of each task (row) was predicted as (column), in per cent of its test rows, of all seeds."""
    frame = make_frame(groups, "class")
    panels = [(group, t) for group in groups for t in range(len(group.runs[0].names))]
    columns = min(len(panels), 3)
    figure = make_figure(0.8 + 2.3 * math.ceil(len(panels) / columns))
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (group, t) in zip(axes, panels, strict=False):
        # The task's place in each run: a name may come twice, and runs may have other orders.
        places = {(run.seed, run.order): _identify(run).index(_identify(group.runs[0])[t]) for run in group.runs}
        rows = frame[frame["group"] == group.label]
        rows = rows[[places[s, o] == i for s, o, i in zip(*map(rows.get, ("seed", "task_order", "task")), strict=True)]]
        classes = rows["class"][rows["run"] == rows["run"].iloc[0]].map(_shorten)
        counts = rows.groupby(rows.groupby("run").cumcount())[[f"as_{i}" for i in range(len(classes))]].sum()
        shares = 100 * counts.div(counts.sum(axis=1), axis=0)
        image = axis.pcolormesh(shares, cmap="Greys", vmin=0, vmax=100, edgecolor="white", linewidth=0.4)
        ticks, size = [c + 0.5 for c in range(len(classes))], min(8, 110 / len(classes))
        axis.set_xticks(ticks, classes, rotation=90, fontsize=size)
        axis.set_yticks(ticks, classes, fontsize=size)
        axis.set_ylim(len(classes), 0)
        axis.set_title(_fold(f"{group.label}, {group.runs[0].names[t]}" if len(groups) > 1 else group.runs[0].names[t]))
        axis.tick_params(length=0)
        for (c, i), x in shares.rename(columns=lambda key: int(key[3:])).stack().items() if len(classes) <= 10 else ():
            axis.text(i + 0.5, c + 0.5, f"{x:.0f}", ha="center", va="center", color="white" if x > 50 else "black",
                      fontsize=6)
    figure.supylabel("class", fontsize=8)
    several = max(len(group.runs) for group in groups) > 1
    figure.colorbar(image, ax=list(axes), location="bottom", aspect=60,
                    label="predicted as, % of the class's test rows" + ", all seeds together" * several)
    return figure


def _identify(run):
    """What each task is, whatever the order: its source labels, and how many tasks before it have the same."""
    tasks = json.loads(run.tasks)[-1]
    return [(labels, tasks[:t].count(labels)) for t, labels in enumerate(tasks)]


def _mean_over_seeds(frame, group, key):
    """The mean over a group's seeds of the column `key`: a frame [rounds, tasks], NaN where nothing is."""
    rows = frame[frame["group"] == group.label].astype({key: float})
    return rows.pivot_table(index="round", columns="task", values=key, dropna=False)


def _heat_map(axis, cells, title, names, **colours):
    """A frame [rounds, tasks] as coloured cells, rounds from the top down with at most about ten numbers."""
    image = axis.pcolormesh(cells, edgecolor="white", linewidth=0.4, **colours)
    ticks = range(0, len(cells), math.ceil(len(cells) / 10)) if len(cells) > 1 else ()
    axis.set_yticks([k + 0.5 for k in ticks], [k + 1 for k in ticks])
    axis.set_ylim(len(cells), 0)
    axis.set_xticks([t + 0.5 for t in range(len(names))], map(_shorten, names), rotation=90,
                    fontsize=min(8, 400 / len(names)))
    axis.set_title(title)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def draw_schematic(_):
    """What a zoo is, without any run: the tasks, which of them each learner trained on, and the mean that predicts."""
    from matplotlib.patches import Rectangle

    trained = [(0,), (0, 1), (1, 2), (0, 2, 3), (1, 2, 4)]
    figure = make_figure(2.6, SMALL_WIDTH)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set(aspect="equal", xlim=(-1.5, 10.4), ylim=(-4.7, 1.1))

    def box(x, y, colour, edge="#bbbbbb", width=0.8, height=0.8):
        axis.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=edge))

    for k, tasks in enumerate(trained):
        axis.text(0.4, -k, f"learner {k + 1}", ha="right", va="center")
        for t in range(len(trained)):
            box(t + 1, -k, COLOURS[1] if t == tasks[-1] else COLOURS[0] if t in tasks else "white")
            axis.text(t + 1, 0.75, ("task " if t == 0 else "") + str(t + 1), ha="center", va="center")
    box(3, -2, "none", "black", 1.0, 5.1)
    axis.annotate("", (6.6, -3.5), (3.6, -3.5), arrowprops={"arrowstyle": "->", "linewidth": 1.2})
    axis.text(6.7, -3.5, "predict task 3:\nmean of learners\n3, 4 and 5", va="center")
    for y, colour, words in ((0, COLOURS[1], "the new task"), (-1, COLOURS[0], "past tasks, drawn\nby training loss")):
        box(7, y, colour, width=0.5, height=0.5)
        axis.text(7.45, y, words, va="center")
    return figure


def _shorten(name, limit=26):
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def _has_curves(run):
    return bool(run.settings.get("continual") and run.rounds)


def _counts_work(run):
    """Of frozen backbones no operations are counted: their epochs train heads alone.

    Nor are those of networks that cannot be built here: unknown ones, and images too small for them.
    """
    for one in run.members or [run]:
        if one.settings.get("freeze") or None in (one.image_shape, one.cost["rows_trained"], one.settings.get("model")):
            return False
    try:
        count_work(run)
    except ValueError:
        return False
    return True


# kind: (title, which runs it can show, how it is drawn)
KINDS = {
    "methods": ("Every task's accuracy as tasks arrive, method by method", lambda run: True, draw_methods),
    "dots": ("Average accuracy", lambda run: True, draw_dots),
    "compute": ("Average accuracy against operations of training, parameters and rows stored",
                _counts_work, draw_compute),
    "seen": ("Accuracy of every task as tasks arrive", _has_curves, draw_seen),
    "matrix": ("Accuracy on every task after every round", lambda run: True, draw_matrix),
    "draws": ("Which tasks each learner trained on, and the weights of the draw",
              lambda run: any(r["weights"] for r in run.rounds) and run.kind != "Isolated", draw_draws),
    "confusion": ("What each class was predicted as",
                  lambda run: not run.members and all(learner_path(Path(run.path), k).is_file()
                                                  for k in range(len(run.rounds))), draw_confusion),
    "joint": ("Multi-Head's accuracy of every task as more are trained on at once",
              lambda run: run.kind == "Multi-Head", draw_joint),
}


def _style():
    """matplotlib's own settings and STYLE, whatever the user's files say: the same runs give the same figure."""
    matplotlib = require("matplotlib")
    own = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    return matplotlib.rc_context(own | STYLE)


def draw(kind, groups, points=None):
    """A matplotlib figure of groups that `choose` lets stand together, labelled by what tells these apart.

    The figure compute is of `points` (see `list_points`), by default of those of the groups.

    Below it stands what the groups are runs of. A letter that no font of this machine has becomes a box, and a line on
    standard error names such letters.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    groups = group_runs([run for group in groups for run in group.runs])[0]
    with _style():
        from matplotlib.text import Text

        if kind == "compute":
            points = list_points(groups) if points is None else points
            figure, seeds = draw_compute(points), sorted(set(points["n"].astype(int)))
            texts = (" or ".join(points[key].unique()) for key in ("tasks", "model", "samples"))
            about = "; ".join(filter(None, texts))
        else:
            figure = (draw_schematic if kind == "schematic" else KINDS[kind][2])(groups)
            seeds = sorted({len(group.runs) for group in groups})
            about = describe_groups(groups) if groups else ""
        if about:
            about += f"; {' or '.join(map(str, seeds)) if len(seeds) < 3 else f'{seeds[0]} to {seeds[-1]}'}"
            about += " seed" + "s" * (seeds != [1])
            figure.supxlabel("\n".join([figure.get_supxlabel(), *textwrap.wrap(about, 75)]).strip(), fontsize=8)
        texts = figure.findobj(Text)
        fonts, missing = find_fonts("".join(text.get_text() for text in texts))
        for text in texts:
            text.set_fontfamily(fonts)
        if missing:
            _report_missing(missing)
    return figure


@functools.cache  # of the many figures of a report, the first says it
def _report_missing(letters):
    print(f"plot.py: no font of this machine has {printable(letters)[:60]}; install one that has, such as "
          "fonts-noto-cjk", file=sys.stderr)


def save(figure, ending):
    """The figure as the bytes of a file; `ending` is png, pdf or svg."""
    data = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(data, format=ending, metadata=NO_DATE[ending])
    return data.getvalue()


def main(argv=None):
    """Draw one figure; return the exit status.

    Raises:
        ConfigError: nothing to draw, or a wrong flag or file.
    """
    p = Parser(prog="plot.py", description="Figures of run folders; several seeds of the same settings are averaged.",
               epilog="kinds: " + "; ".join(f"{kind}: {title}" for kind, (title, _, _) in KINDS.items())
               + "; schematic: what a zoo is, of no run")
    p.add_argument("kind", choices=[*KINDS, "schematic"])
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders; of the figure compute also files of its points")
    p.add_argument("--ensemble", nargs="+", action="append", default=[], metavar="RUN", help="as in report.py")
    p.add_argument("--file", required=True, help="figure.pdf, figure.png or figure.svg; of the figure compute also "
                   "points.csv, its numbers")
    flags = p.parse_args(argv)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    ending, endings = Path(flags.file).suffix[1:].lower(), [*NO_DATE, *["csv"] * (flags.kind == "compute")]
    if ending not in endings:
        raise ConfigError(f"--file: {flags.file} must end in .{', .'.join(endings)}")
    chosen, notes, skipped, points = [], [], [], None
    files = [path for path in flags.runs if path.lower().endswith(".csv")] if flags.kind == "compute" else []
    if files and (len(files) < len(flags.runs) or flags.ensemble):
        raise ConfigError(f"{files[0]}: run folders and files of points make no figure together; --file x.csv writes "
                          "the points of the folders")
    if files:
        points = read_points(files)
    elif flags.kind != "schematic":
        groups, notes = group_runs(read_runs("plot.py", flags.runs, flags.ensemble))
        chosen, skipped = choose(flags.kind, groups)
        if not chosen:
            raise ConfigError(f"nothing to draw: {'; '.join(skipped)}")
    for line in notes + [f"skipped: {line}" for line in skipped]:
        print(f"plot.py: {line}", file=sys.stderr)
    if ending == "csv":
        data = (list_points(chosen) if points is None else points).to_csv(index=False).encode()
    else:
        data = save(draw(flags.kind, chosen, points), ending)
    write_file(Path(flags.file), data)
    return 0


if __name__ == "__main__":
    sys.exit(guard("plot.py", main))
