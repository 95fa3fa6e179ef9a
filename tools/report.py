"""From run folders to tables: mean, spread and interval of every metric, paired differences, cost.

    python tools/report.py runs/zoo-seed=* runs/isolated-seed=* --ensemble runs/isolated-seed=*

Runs that differ in seed only are one group. Reads run folders and nothing else.
"""
import os
import sys
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import runs
from tools.page import make_page
from tools.stats import FEWEST, SPREAD, compare, find_outlier, measure
from utils.command import guard
from utils.config import Parser
from utils.log import say, say_folded, terminal_width
from utils.run_folder import write_file

MANY = 4  # groups from which only the differences to the first are shown: those between all grow with the square
# Columns of numbers: heading and format, "z.2f" being of accuracies, in per cent. All others are texts and stand first.
NUMBERS = {
    "n": ("n", ""), "mean": ("mean", "z.2f"), "sd": ("sd", "z.2f"), "low": ("95 % from", "z.2f"),
    "high": ("to", "z.2f"), "p": ("p", ".2g"), "networks": ("networks per task", ".1f"),
    **{key: (heading, ",.0f") for key, heading in (
        ("rows_trained", "rows trained"), ("stored_rows", "rows stored"), ("stored_numbers", "numbers stored"),
        ("parameters", "parameters"), ("seconds", "seconds"))},
}


def choose_shown(groups, numbers):
    """Of the differences in `compare`'s frame all, but of MANY groups over the same tasks only those to the first."""
    alike = {}
    for group in groups:
        alike.setdefault(group.runs[0].over, []).append(group.label)
    kept = {label for labels in alike.values() for label in (labels if len(labels) < MANY else labels[:1])}
    return numbers[numbers["minus"].notna() & numbers["group"].isin(kept)]


def warnings(groups, found, shown):
    """A line for whatever a reader of the numbers and of the differences shown should not overlook."""
    lines = []
    for group in groups:
        n, transferred = len(group.runs), len(found[group.label].get(runs.TRANSFER, ()))
        seed = find_outlier(found[group.label]["average_accuracy"])
        alone = group.runs[0].kind == "Model Zoo" and len(group.runs[0].names) > 1 and not transferred
        origins = {"commit": "commits", "hardware": "machines", "torch": "versions of torch"}
        differ = [origins[key] for key in origins if len({run.about[key] for run in group.runs}) > 1]
        orders = len({run.tasks for run in group.runs})
        lines += [f"{group.label}: {line}" for holds, line in (
            (orders > 1, f"n = {n} runs are of {orders} orders of the tasks; means and intervals are over both, orders "
                         "and seeds"),
            (n < FEWEST, f"n = {n} is below {FEWEST}: no interval; run more seeds"),
            (seed is not None, f"seed {seed} is an outlier (Grubbs' test at 5 %): find out why before anything is made "
                               "of the mean; it is counted here"),
            (alone, "no forward transfer: no Isolated run of the same settings and seeds is here"),
            (0 < transferred < n, f"forward transfer is of {transferred} of {n} seeds: Isolated has no others"),
            *((True, f"its runs are of different {what}") for what in differ)) if holds]
    how = {"paired": ": the differences are on these", "Welch": ", too few for pairs: Welch's test is on all"}
    main = shown[shown["metric"] == "average_accuracy"]
    for a, b, test in zip(main["group"], main["minus"], main["test"], strict=True):
        of_a, of_b = (found[label]["average_accuracy"].keys() for label in (a, b))
        shared, n = len(of_a & of_b), max(len(of_a), len(of_b))
        if 0 < shared < n:
            lines.append(f"{a} minus {b}: {shared} of {n} seeds are shared{how[test]}")
    if len(tasks := name_tasks(groups)) > 1:
        lines.append(f"groups over different tasks are not compared with each other: {'; '.join(tasks.values())}")
    return lines


def split_orders(groups):
    """A group for each order of the tasks, of those groups that have several."""
    orders = [(group, sorted({run.order for run in group.runs})) for group in groups]
    return [runs.Group(f"{group.label}, task_order {order}", [run for run in group.runs if run.order == order])
            for group, found in orders if len(found) > 1 for order in found]


def name_tasks(groups):
    """What the groups are over, in words: dict `Run.over` -> text."""
    names = {}
    for group in groups:
        names.setdefault(group.runs[0].over, group.runs[0].settings.get("tasks", "other tasks"))
    return names


def make_tables(groups, numbers, shown):
    """The report's tables.

    Args:
        groups: as `group_runs` gives them.
        numbers: `compare`'s frame.
        shown: those of its differences that are.

    Returns:
        dict title -> (frame of texts, how each of its columns is aligned: left for texts, right for numbers).
    """
    alone, main = numbers["minus"].isna(), numbers["metric"] == "average_accuracy"
    costs = numbers[alone].pivot(index="group", columns="metric", values="mean").reindex(columns=runs.COSTS)
    unused = {"stored_rows": costs["stored_rows"].isna(), "stored_numbers": costs["stored_numbers"].fillna(0) == 0}
    costs = costs.drop(columns=[key for key, of_groups in unused.items() if of_groups.all()])
    accuracy = numbers[alone & main].drop(columns=["minus", "metric", "test", "p"])
    others = numbers[alone & ~main & ~numbers["metric"].isin(runs.COSTS)].drop(columns=["minus", "test", "p"])
    title = "Differences (percentage points; p not corrected for many tests)"
    if len(shown) < (~alone).sum():
        title = ("Differences to the first group over the same tasks (percentage points; p not corrected for many "
                 "tests; --format csv has all pairs)")
    differ = runs.differing([group.runs[0] for group in groups])
    settings = [{
        "group": group.label,
        "seeds": " ".join("+".join(map(str, r.seed)) if r.members else str(r.trial) for r in group.runs),
        "settings": ", ".join(text for key in differ if (text := runs.setting_text(group.runs[0], key))),
        "made with": ", ".join(f"{key} {'; '.join(dict.fromkeys(run.about[key] for run in group.runs))}"
                               for key in group.runs[0].about),
    } for group in groups]
    tables = {"Average accuracy (%) and what it costs": accuracy.join(costs, "group"), "Other metrics (%)": others,
              title: shown.rename(columns={"test": "t-test"}),
              "Settings that differ, and where the numbers come from": runs.require("pandas").DataFrame(settings)}
    return {title: to_texts(table) for title, table in tables.items() if len(table)}


def to_texts(table):
    """A frame with every cell as a text, and the alignment of its columns: a pair of `make_tables`."""
    texts = {}
    for key, column in table.items():
        heading, spec = NUMBERS.get(key, (key, None))
        if spec is None:
            texts[heading] = [x.replace("_", " ") if key == "metric" else x for x in column]
        else:
            cells = column * 100 if spec == "z.2f" else column
            texts[heading] = ["–" if x is None or x != x else format(x, spec) for x in cells]
    return runs.require("pandas").DataFrame(texts), ["right" if key in NUMBERS else "left" for key in table]


def to_grid(table, align, width):
    """A table in columns; in a terminal of `width` (None: any) texts are folded, to 10 at least, and numbers never."""
    from tabulate import simple_separated_format, tabulate
    from wcwidth import wcswidth, wrap

    texts, gap = align.count("left"), " " if width and width < 100 else "  "
    folded = [[h] if i < texts else wrap(h, 8, break_long_words=False) for i, h in enumerate(table)]
    widths = [max(map(wcswidth, [*lines, *table[h]])) for lines, h in zip(folded, table, strict=True)]
    for _ in range(sum(widths) + len(gap) * (len(widths) - 1) - width if width else 0):
        widest = max(range(texts), key=widths.__getitem__)
        widths[widest] -= widths[widest] > 10

    def fold(cells):
        return zip_longest(*map(wrap, cells, widths), fillvalue="")

    rows = [*fold(table), ["-" * w for w in widths], *(line for cells in table.to_numpy() for line in fold(cells))]
    return tabulate(rows, tablefmt=simple_separated_format(gap), colalign=align, disable_numparse=True)


def print_text(head, tables, notes):
    """Print the report for people."""
    for line in head:
        say_folded(line)
    for title, (table, align) in tables.items():
        say()
        say_folded(title)
        say(to_grid(table, align, terminal_width()))
    say()
    for note in notes:
        say_folded(f"note: {note}")


def to_markdown(head, tables, notes):
    """The report in GitHub's Markdown."""
    parts = [f"{line}\n" for line in head]
    for title, (table, align) in tables.items():
        table = table.replace(r"\|", r"\|", regex=True)
        parts.append(f"**{title}**\n\n{table.to_markdown(index=False, colalign=align, disable_numparse=True)}\n")
    return "\n".join(parts + [f"- {note}" for note in notes])


def to_latex(head, tables, notes):
    """The report's tables as LaTeX tabulars; all else as comments."""
    runs.require("jinja2")
    parts = [f"% {line}" for line in [*head, r"The tables need \usepackage{booktabs}."]]
    for title, (table, align) in tables.items():
        tabular = table.to_latex(index=False, escape=True, column_format="".join(side[0] for side in align))
        parts += [f"% {title}", tabular.replace("–", "--")]
    return "\n".join(parts + [f"% {note}" for note in notes])


def make_figures(groups):
    """The page's figures: a list of (title, SVG)."""
    from tools import plot  # matplotlib is needed here alone

    figures, names = [], name_tasks(groups)
    for tasks, name in names.items():
        alike = [g for g in groups if g.runs[0].over == tasks]
        for kind, (title, _, _) in plot.KINDS.items():
            if kind in ("joint", "confusion"):
                continue
            if chosen := plot.choose(kind, alike)[0]:
                figures.append((title + f": {name}" * (len(names) > 1), plot.draw(kind, chosen)))
    if chosen := plot.choose("joint", groups)[0]:
        figures.append((plot.KINDS["joint"][0], plot.draw("joint", chosen)))
    return [(title, plot.save(figure, "svg")) for title, figure in figures]


def main(argv=None):
    """Print the report; return the exit status."""
    p = Parser(prog="report.py", description="Tables of run folders: spread, intervals, differences, cost.")
    p.add_argument("runs", nargs="*", metavar="RUN", help="run folders; those that differ in seed only are a group")
    p.add_argument("--ensemble", nargs="+", action="append", default=[], metavar="RUN",
                   help="also average these runs' predictions; several times: that many ensembles")
    p.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text", help="default: text")
    p.add_argument("--html", metavar="FILE", help="also write one self-contained page with tables and figures")
    flags = p.parse_args(argv)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    groups, notes = runs.group_runs(runs.read_runs("report.py", flags.runs, flags.ensemble))
    found = measure(groups)
    numbers = compare(groups, found)
    shown = choose_shown(groups, numbers)
    head = [runs.describe_groups(groups), SPREAD]
    notes = list(map(runs.printable, notes + warnings(groups, found, shown)))
    tables = make_tables(groups, numbers, shown)
    if flags.html:
        write_file(Path(flags.html), make_page(head, tables, notes, make_figures(groups)).encode())
    if flags.format == "csv":  # all numbers, in one table for programs, accuracies in [0, 1]
        by_order = split_orders(groups)
        if by_order:
            of_orders = compare(by_order, measure(by_order))
            numbers = runs.require("pandas").concat([numbers, of_orders[of_orders["minus"].isna()]])
        say(numbers.to_csv(index=False).rstrip("\n"))
        for line in [*head, *(f"note: {note}" for note in notes)]:
            print(f"report.py: {line}", file=sys.stderr)
    elif flags.format == "text":
        print_text(head, tables, notes)
    else:
        say({"markdown": to_markdown, "latex": to_latex}[flags.format](head, tables, notes))
    return 0


if __name__ == "__main__":
    sys.exit(guard("report.py", main))
