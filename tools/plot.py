"""Figures of run folders, for print and screen: PNG, PDF or SVG by the file's ending.

    python tools/plot.py seen runs/zoo-seed=* runs/isolated-seed=* --file figure.pdf

Runs that differ in seed only are one group, as in report.py. Reads run folders and nothing else.
"""
import contextlib
import io
import json
import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.runs import describe_groups, group_runs, make_frame, printable, read_runs, require
from tools.stats import FEWEST, LEVEL, measure, summarise
from utils.command import guard
from utils.config import Parser
from utils.config_files import ConfigError

WIDTH = 7.2  # inches, of a page's text
# Okabe and Ito's colours, which people with any colour vision tell apart; lines and bars differ in pattern as well.
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
}  # fmt: skip
INTERVAL = f"{100 * LEVEL:.0f} % interval"
NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


@contextlib.contextmanager
def style():
    """Matplotlib with this file's style; only here is it imported, so that reports need it for --html alone.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with require("matplotlib").rc_context(STYLE):
        yield


def find_fonts(text):
    """Fonts of this machine that between them have every letter of `text`, and the letters that none has.

    Returns:
        fonts: families, matplotlib's own first.
        missing: a text.
    """
    from matplotlib import font_manager, ft2font

    fonts, missing = ["DejaVu Sans"], set(text) - set("\n")
    own = font_manager.findfont(fonts[0])
    for entry in [own, *sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.weight != 400, entry.name))]:
        if not missing:
            break
        try:
            has = ft2font.FT2Font(getattr(entry, "fname", entry)).get_charmap()
        except (OSError, RuntimeError):  # a font that went, or a broken one
            continue
        if entry != own and any(ord(c) in has for c in missing):
            fonts.append(entry.name)
        missing = {c for c in missing if ord(c) not in has}
    return fonts, "".join(sorted(missing))


def make_figure(height, **layout):
    """An empty figure of the page's width and `height` inches."""
    from matplotlib.figure import Figure

    return Figure((WIDTH, height), layout="constrained", **layout)


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
        if not fits(run):
            skipped.append(f"{group.label}: this kind of run has no place in the figure {kind}")
        elif kind == "joint" and not all(_nested(run, other.runs[0]) for other in chosen):
            skipped.append(f"{group.label}: its tasks and those of {', '.join(g.label for g in chosen)} do not begin "
                           "alike, or settings differ")  # fmt: skip
        elif kind != "joint" and run.tasks != (chosen or [group])[0].runs[0].tasks:
            skipped.append(f"{group.label}: not over the same tasks as {chosen[0].label}")
        else:
            chosen.append(group)
    alone = {"joint": len(chosen) < 2, "seen": all(group.runs[0].kind == "Isolated" for group in chosen),
             "methods": not any(map(_has_curves, (group.runs[0] for group in chosen)))}  # fmt: skip
    if alone.get(kind):
        return [], skipped + [f"{group.label}: alone it makes no figure {kind}" for group in chosen]
    return chosen, skipped


def _nested(a, b):
    """Whether two Multi-Head runs are alike but for how many of the same tasks they train on."""
    (*data_a, tasks_a), (*data_b, tasks_b) = json.loads(a.tasks), json.loads(b.tasks)
    n = min(len(tasks_a), len(tasks_b))
    rest_a, rest_b = ({k: v for k, v in r.settings.items() if "tasks" not in k} for r in (a, b))
    return data_a == data_b and tasks_a[:n] == tasks_b[:n] and rest_a == rest_b


def draw_seen(groups):
    """Every task's accuracy against the number of tasks seen; Isolated's as a cross where the task arrives."""
    curves, crosses = {}, {}
    for group in groups:
        for t in range(len(group.runs[0].names)):
            if group.runs[0].kind == "Isolated":
                crosses.setdefault(group.label, {})[t] = [run.matrix[-1][t] for run in group.runs]
            else:
                at = {k + 1: [run.matrix[k][t] for run in group.runs] for k in range(t, len(group.runs[0].matrix))}
                curves.setdefault(group.label, {})[t] = at
    return _panels(curves, crosses, groups[0].runs[0].names, "tasks seen")


def draw_joint(groups):
    """Multi-Head's accuracy of each task against how many tasks it was trained on at once."""
    at = {}
    for group in groups:
        for t in range(len(group.runs[0].names)):
            at.setdefault(t, {})[len(group.runs[0].names)] = [run.matrix[-1][t] for run in group.runs]
    names = max((group.runs[0].names for group in groups), key=len)
    return _panels({"Multi-Head": {t: dict(sorted(at[t].items())) for t in at}}, {}, names, "tasks trained on at once")


def _panels(curves, crosses, names, xlabel):
    """A panel a task.

    Args:
        curves: dict label -> task -> x -> values over seeds, in [0, 1].
        crosses: dict label -> task -> values over seeds, in [0, 1], drawn at x = task + 1.
        names: [T].
        xlabel: what x is.
    """
    columns = min(len(names), 5)
    rows = math.ceil(len(names) / columns)
    figure = make_figure(0.7 + 1.35 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles = {}
    banded = any(len(v) >= FEWEST for by_task in curves.values() for at in by_task.values() for v in at.values())
    for t, axis in enumerate(axes.flat):
        if t >= len(names):
            axis.set_visible(False)
            axes[-2, t % columns].xaxis.set_tick_params(labelbottom=True)
            continue
        axis.set_title(_shorten(names[t]), fontsize=8 if len(names[t]) <= 20 else 6.5)
        axis.grid(axis="y", color="#dddddd", linewidth=0.5)
        for i, (label, by_task) in enumerate(curves.items()):
            at = {x: summarise(values) for x, values in by_task.get(t, {}).items()}
            colour = COLOURS[i % len(COLOURS)]
            line, = axis.plot(list(at), [100 * s.mean for s in at.values()], color=colour, marker=MARKS[i % len(MARKS)],
                              linestyle=LINES[i % len(LINES)], markersize=2.5)  # fmt: skip
            handles.setdefault(label, line)
            _band(axis, at, colour, 0.2)
        for i, (label, by_task) in enumerate(crosses.items()):
            s = summarise(by_task[t])
            axis.axhline(100 * s.mean, color="black", linestyle=LINES[-1 - i % len(LINES)], linewidth=0.6)
            cross = axis.scatter([t + 1], [100 * s.mean], marker="x+"[i % 2], color="black", s=30, zorder=3)
            handles.setdefault(label, cross)
            if s.low is not None:
                _whisker(axis, t + 1, s, "black")
    last = max(x for by_task in curves.values() for at in by_task.values() for x in at)
    axes[0, 0].set_xlim(0.5, last + 0.5)
    axes[0, 0].set_ylim(max(axes[0, 0].get_ylim()[0], -2), min(axes[0, 0].get_ylim()[1], 102))
    if last <= 6:
        axes[0, 0].set_xticks(range(1, last + 1))
    else:
        axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel(xlabel, fontsize=8)
    figure.supylabel("test accuracy (%)", fontsize=8)
    title = f"mean over seeds; band, whisker: {INTERVAL}" if banded else None
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, title=title, title_fontsize=8)
    return figure


def _band(axis, at, colour, alpha):
    """The intervals of `at`, x -> `Summary`, as a band, where they have one."""
    ends = {x: s for x, s in at.items() if s.low is not None}
    axis.fill_between(list(ends), [100 * s.low for s in ends.values()], [100 * s.high for s in ends.values()],
                      color=colour, alpha=alpha, linewidth=0)  # fmt: skip
    if len(ends) == 1:  # a band of no width would not be seen
        _whisker(axis, *ends.popitem(), colour)


def _whisker(axis, x, summary, colour):
    axis.vlines(x, 100 * summary.low, 100 * summary.high, color=colour, linewidth=0.8)


def draw_methods(groups):
    """A panel per method: a thin line for each task from where it arrives, and the mean over the tasks seen so far."""
    frame = make_frame(groups, "round")
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)
    figure = make_figure(0.9 + 1.75 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    last = max(len(group.runs[0].matrix) for group in groups)
    seeds = {len(group.runs) for group in groups}
    for i, (axis, group) in enumerate(zip(axes.flat, groups, strict=False)):
        of_group, colour = frame[frame.group == group.label], COLOURS[i % len(COLOURS)]
        means = of_group.groupby(["run", "round"]).accuracy.mean().groupby("round")
        if _has_curves(group.runs[0]):
            tasks = of_group.groupby(["task", "round"]).accuracy.mean()
            for _, of_task in tasks.groupby("task"):
                axis.plot(of_task.index.get_level_values("round"), 100 * of_task, color=colour, alpha=0.6,
                          linewidth=0.8, marker="o", markersize=2)  # fmt: skip
            at = {k: summarise(list(values)) for k, values in means}
            axis.plot(list(at), [100 * s.mean for s in at.values()], color="black", linewidth=2.0, marker="o")
            _band(axis, at, "black", 0.15)
        else:  # all tasks at once: nothing arrives
            at = {1: summarise([mean for _, values in means for mean in values])}
            axis.axhline(100 * at[1].mean, color="black", linewidth=2.0, linestyle="--")
        axis.set_title(_fold(group.label, 28), fontweight="bold")
        end = 100 * at[max(at)].mean
        axis.annotate(f"{end:.1f}", (1, end), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontweight="bold", va="center", annotation_clip=False)  # fmt: skip
        axis.grid(axis="y", color="#dddddd", linewidth=0.5)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    axes[0, 0].set_xlim(0.7, last + 0.3)
    axes[0, 0].set_ylim(top=min(axes[0, 0].get_ylim()[1], 102))
    axes[0, 0].set_xticks(range(1, last + 1, math.ceil(last / 10)))
    figure.supxlabel("tasks seen", fontsize=8)
    figure.supylabel("test accuracy (%)", fontsize=8)
    words = "black: mean over the tasks seen so far; thin: each task"
    figure.suptitle(words + f"; band: {INTERVAL}" * (max(seeds) >= FEWEST), fontsize=8)
    return figure


def draw_dots(groups):
    """Average accuracy of every group: its mean and 95 % interval, and a small dot for each seed."""
    found = measure(groups)
    labels = [_fold(group.label) for group in groups]
    figure = make_figure(0.8 + (0.2 + 0.14 * max(label.count("\n") + 1 for label in labels)) * len(groups))
    axis = figure.subplots()
    for i, group in enumerate(groups):
        values = [100 * x for x in found[group.label]["average_accuracy"].values()]
        s = summarise(values)
        half = None if s.low is None else s.high - s.mean
        if s.n > 1:
            axis.scatter(values, [i + 0.22] * s.n, s=7, color="#888888", linewidth=0)
        axis.errorbar(s.mean, i, xerr=half, color=COLOURS[i % len(COLOURS)], marker=MARKS[i % len(MARKS)], markersize=6,
                      capsize=3, linewidth=1.5, zorder=3)  # fmt: skip
        text = f"{s.mean:.1f}" + f" ± {half or 0:.1f}" * (half is not None) + f"  (n = {s.n})"
        axis.annotate(text, (1, i), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                      annotation_clip=False)  # fmt: skip
    axis.set_yticks(range(len(groups)), labels)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    several = max(len(group.runs) for group in groups)
    words = f"; mean over seeds, whisker and ±: {INTERVAL}, grey: each seed" * (several >= FEWEST)
    axis.set_xlabel("average accuracy (%)" + (words or "; mean over seeds, grey: each seed" * (several > 1)))
    return figure


def draw_schematic(_):
    """What a zoo is, without any run: the tasks, which of them each learner trained on, and the mean that predicts."""
    trained = [(0,), (0, 1), (1, 2), (0, 2, 3), (1, 2, 4)]
    figure = make_figure(2.7)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_aspect("equal")
    boxed = {"ha": "center", "va": "center"}
    for k, tasks in enumerate(trained):
        axis.text(0.6, -k, f"round {k + 1}: learner {k + 1}", ha="right", va="center")
        for t in range(5):
            new, known = t == tasks[-1], t in tasks
            colour = COLOURS[1] if new else COLOURS[0] if known else "white"
            axis.add_patch(_square(1.1 + t, -k, colour, "#bbbbbb"))
    for t in range(5):
        axis.text(1.1 + t, 0.75, f"task {t + 1}", **boxed)
    axis.add_patch(_square(3.1, -2, "none", "black", height=5.1, width=1.0))
    axis.annotate("", (7.6, -2), (3.7, -2), arrowprops={"arrowstyle": "->", "linewidth": 1.2})
    axis.text(7.8, -2, "prediction for task 3:\nmean of the probabilities of\nlearners 3, 4 and 5", va="center")
    for i, (colour, words) in enumerate(((COLOURS[1], "the new task"), (COLOURS[0], "past tasks, drawn where the\n"
                                        "zoo's training loss is high"))):  # fmt: skip
        axis.add_patch(_square(8.05, -3.6 - 0.9 * i, colour, "#bbbbbb", height=0.5, width=0.5))
        axis.text(8.5, -3.6 - 0.9 * i, words, va="center")
    axis.set_xlim(-2.4, 12.6)
    axis.set_ylim(-5.0, 1.1)
    return figure


def _square(x, y, colour, edge, height=0.8, width=0.8):
    from matplotlib.patches import Rectangle

    return Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=edge, linewidth=1.0)


def _fold(label, width=34):
    """A long label on several lines, cut at its commas."""
    lines = [""]
    for part in label.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines[:-1], lines[-1] + ",", part]
    return "\n".join(lines)


def draw_draws(groups):
    """Which tasks the learner of each round trained on, and the weights with which they were drawn."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator

    num_tasks = len(groups[0].runs[0].names)
    heights = [max(1.2, 0.17 * len(g.runs[0].rounds)) for g in groups]
    figure = make_figure(1.0 + sum(heights) + 0.35 * len(groups))
    axes = figure.subplots(len(groups), 2, sharex=True, squeeze=False, height_ratios=heights)
    drawn = [w for g in groups for run in g.runs for r in run.rounds for w in r["weights"] if w > 0]
    norm = LogNorm(min([*drawn, 0.8]), max([*drawn, 1.25]))
    for (left, right), group in zip(axes, groups, strict=True):
        runs, rounds = group.runs, range(len(group.runs[0].rounds))
        trained = [[sum(t in run.rounds[k]["tasks"] for run in runs) / len(runs) for t in range(num_tasks)]
                   for k in rounds]  # fmt: skip
        weights = [[summarise([w[t] for run in runs if t < len(w := run.rounds[k]["weights"])]).mean or math.nan
                    for t in range(num_tasks)] for k in rounds]  # fmt: skip
        shares = left.pcolormesh(trained, cmap="Greys", vmin=0, vmax=1, edgecolor="white", linewidth=0.4)
        colours = right.pcolormesh(weights, cmap=COLOUR_MAP, norm=norm, edgecolor="white", linewidth=0.4)
        if runs[0].settings["continual"]:
            left.plot([k + 0.5 for k in rounds], [k + 0.5 for k in rounds], "o", color="white", markersize=2)
        left.set_title(f"{group.label}: trained on")
        right.set_title("weight in the draw")
        left.set_ylabel("round")
        for axis in (left, right):
            _rounds_axis(axis, len(rounds))
    for axis in axes[-1]:
        _tasks_axis(axis, groups[0].runs[0].names)
    several = max(len(group.runs) for group in groups) > 1
    words = "share of seeds" if several else "trained on"
    words += "; dot: the new task" * any(g.runs[0].settings["continual"] for g in groups)
    figure.colorbar(shares, ax=axes[:, 0].tolist(), location="bottom", aspect=40, label=words)
    ticks = LogLocator(10, subs=(1, 1.2, 1.5, 2, 3, 5, 8) if norm.vmax < 20 * norm.vmin else (1,))
    bar = figure.colorbar(colours, ax=axes[:, 1].tolist(), location="bottom", aspect=40, ticks=ticks, format="{x:g}",
                          label="weight w" + ", mean over seeds" * several)  # fmt: skip
    bar.ax.xaxis.set_minor_locator(NullLocator())
    return figure


def draw_matrix(groups):
    """Test accuracy on every task (column) after every round (row), mean over seeds; those of many rounds first."""
    groups = sorted(groups, key=lambda group: -len(group.runs[0].matrix))
    names, columns = groups[0].runs[0].names, min(len(groups), 2)
    slots = [None] * (columns * math.ceil(len(groups) / columns) - len(groups))
    slots = [groups[0], *slots, *groups[1:]]  # a gap stands in the first row, so that the last one has all the names
    heights = [max(0.3, 0.17 * len(group.runs[0].matrix)) for group in slots[::columns]]
    figure = make_figure(2.0 + sum(heights) + 0.3 * len(heights))
    axes = figure.subplots(len(heights), columns, sharex=True, squeeze=False, height_ratios=heights)
    panels = [axis for axis, group in zip(axes.flat, slots, strict=True) if group]
    means = []
    for group in groups:
        rows = zip(*(run.matrix for run in group.runs), strict=True)
        means.append([[math.nan if None in xs else 100 * sum(xs) / len(xs) for xs in zip(*row, strict=True)]
                      for row in rows])  # fmt: skip
    values = [x for matrix in means for row in matrix for x in row if x == x]
    low, high = min(values), max(max(values), min(values) + 1)
    digits = 1 if len(names) <= 10 else 0
    for axis, group, matrix in zip(panels, groups, means, strict=True):
        image = axis.pcolormesh(matrix, cmap=COLOUR_MAP, vmin=low, vmax=high, edgecolor="white", linewidth=0.4)
        axis.set_title(_fold(group.label))
        _rounds_axis(axis, len(matrix))
        if len(matrix) == 1:
            axis.set_yticks([])
        elif axis in axes[:, 0]:
            axis.set_ylabel("round")
        cells = [(k, t, x) for k, row in enumerate(matrix) for t, x in enumerate(row) if x == x and len(names) <= 25]
        for k, t, x in cells:
            colour = "white" if x - low < (high - low) / 2 else "black"
            axis.text(t + 0.5, k + 0.5, f"{x:.{digits}f}", ha="center", va="center", color=colour, fontsize=5.5)
    for axis in set(axes.flat) - set(panels):
        axis.set_visible(False)
    for axis in axes[-1]:
        _tasks_axis(axis, names)
    label = "test accuracy (%)" + ", mean over seeds" * (max(len(group.runs) for group in groups) > 1)
    figure.colorbar(image, ax=axes.ravel().tolist(), location="bottom", label=label, aspect=60)
    return figure


def _rounds_axis(axis, rounds):
    """Rounds from the top down, counted from 1, with at most about ten numbers."""
    ticks = range(0, rounds, math.ceil(rounds / 10))
    axis.set_yticks([k + 0.5 for k in ticks], [k + 1 for k in ticks])
    axis.set_ylim(rounds, 0)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _tasks_axis(axis, names):
    """Task names upright under the columns."""
    short = map(_shorten, names)
    axis.set_xticks([t + 0.5 for t in range(len(names))], short, rotation=90, fontsize=min(8, 400 / len(names)))


def _shorten(name, limit=26):
    return name if len(name) <= limit else name[: limit - 1].rstrip() + "…"


def _has_curves(run):
    return bool(run.settings.get("continual") and run.rounds)


# kind: (title, which runs it can show, how it is drawn)
KINDS = {
    "methods": ("Every task's accuracy as tasks arrive, method by method", lambda run: True, draw_methods),
    "dots": ("Average accuracy", lambda run: True, draw_dots),
    "seen": ("Accuracy of every task as tasks arrive", _has_curves, draw_seen),
    "matrix": ("Accuracy on every task after every round", lambda run: True, draw_matrix),
    "draws": ("Which tasks each learner trained on, and the weights of the draw",
              lambda run: any(r["weights"] for r in run.rounds) and run.kind != "Isolated", draw_draws),
    "joint": ("Multi-Head's accuracy of every task as more are trained on at once",
              lambda run: run.kind == "Multi-Head", draw_joint),
}  # fmt: skip


def draw(kind, groups):
    """A matplotlib figure of groups that `choose` lets stand together, labelled by what tells these apart.

    Below it stands what the groups are runs of. A letter that no font of this machine has becomes a box, and a line on
    standard error names such letters.
    """
    groups = group_runs([run for group in groups for run in group.runs])[0]
    with style():
        from matplotlib.text import Text

        figure = (draw_schematic if kind == "schematic" else KINDS[kind][2])(groups)
        if groups:
            seeds = sorted({len(group.runs) for group in groups})
            about = f"{describe_groups(groups)}; {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}"
            figure.text(1, 0, about + " ", ha="right", va="bottom", fontsize=6, color="#666666")
            below = 0.14 / figure.get_figheight()
            figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
        texts = figure.findobj(Text)
        fonts, missing = find_fonts("".join(text.get_text() for text in texts))
        for text in texts if len(fonts) > 1 else ():
            text.set_fontfamily(fonts)
        if missing:
            print(f"plot.py: no font of this machine has {printable(missing)[:60]}; install one that has, such as "
                  "fonts-noto-cjk", file=sys.stderr)  # fmt: skip
        with warnings.catch_warnings():  # of the letters that were named
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.draw_without_rendering()
    return figure


def save(figure, ending):
    """The figure as the bytes of a file; `ending` is png, pdf or svg."""
    data = io.BytesIO()
    with style(), warnings.catch_warnings():
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
               + "; schematic: what a zoo is, of no run")  # fmt: skip
    p.add_argument("kind", choices=[*KINDS, "schematic"])
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    p.add_argument("--ensemble", nargs="+", action="append", default=[], metavar="RUN", help="as in report.py")
    p.add_argument("--file", required=True, help="figure.pdf, figure.png or figure.svg")
    flags = p.parse_args(argv)
    ending = Path(flags.file).suffix[1:].lower()
    if ending not in NO_DATE:
        raise ConfigError(f"--file: {flags.file} must end in .{', .'.join(NO_DATE)}")
    if flags.kind == "schematic":
        chosen, notes, skipped = [], [], []
    else:
        groups, notes = group_runs(read_runs("plot.py", flags.runs, flags.ensemble))
        chosen, skipped = choose(flags.kind, groups)
        if not chosen:
            raise ConfigError(f"nothing to draw: {'; '.join(skipped)}")
    for line in notes + [f"skipped: {line}" for line in skipped]:
        print(f"plot.py: {line}", file=sys.stderr)
    data = save(draw(flags.kind, chosen), ending)
    try:
        Path(flags.file).write_bytes(data)
    except OSError as e:
        raise ConfigError(f"{flags.file}: cannot be written ({e.strerror})") from e
    return 0


if __name__ == "__main__":
    sys.exit(guard("plot.py", main))
