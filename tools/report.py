"""From run folders to tables: mean, spread and interval of every metric, paired differences, cost.

    python tools/report.py runs/zoo-seed=* runs/isolated-seed=* --ensemble runs/isolated-seed=*

Runs that differ in seed only are one group. Reads run folders and nothing else.
"""
import sys
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.page import make_page
from tools.runs import (
    COSTS,
    METRICS,
    TRANSFER,
    describe_groups,
    differing,
    group_runs,
    make_frame,
    printable,
    read_runs,
    require,
    setting_text,
)
from tools.stats import FEWEST, SPREAD, compare, find_outlier, measure
from utils.command import guard
from utils.config import Parser
from utils.config_files import ConfigError
from utils.log import say, say_folded, terminal_width

MANY = 4  # groups from which only the differences to the first are shown: those between all grow with the square
# The columns of numbers, by heading, and their formats; the others are texts and stand before them.
FORMATS = {"n": "", "mean": "z.2f", "sd": "z.2f", "95 % from": "z.2f", "to": "z.2f", "p": ".2g",
           "networks per task": ".1f", **dict.fromkeys(
               ("rows trained", "rows stored", "numbers stored", "parameters", "seconds"), ",.0f")}  # fmt: skip
NAMES = {"networks": "networks per task", "stored_rows": "rows stored", "stored_numbers": "numbers stored",
         "low": "95 % from", "high": "to", "test": "t-test"}  # fmt: skip


def words(key):
    """A metric or a column of a frame in words."""
    return NAMES.get(key, key.replace("_", " "))


def choose_shown(groups, numbers):
    """Of the differences in `compare`'s frame all, but of MANY groups over the same tasks only those to the first."""
    alike = {}
    for group in groups:
        alike.setdefault(group.runs[0].tasks, []).append(group.label)
    kept = {label for labels in alike.values() for label in (labels if len(labels) < MANY else labels[:1])}
    return numbers[numbers["minus"].notna() & numbers["group"].isin(kept)]


def warnings(groups, found, shown):
    """A line for whatever a reader of the numbers and of the differences shown should not overlook."""
    lines = []
    for group in groups:
        n, transferred = len(group.runs), len(found[group.label].get(TRANSFER, ()))
        seed = find_outlier(found[group.label]["average_accuracy"])
        alone = group.runs[0].kind == "Model Zoo" and len(group.runs[0].names) > 1 and not transferred
        origins = {"commit": "commits", "hardware": "machines", "torch": "versions of torch"}
        differ = [origins[key] for key in origins if len({run.about[key] for run in group.runs}) > 1]
        lines += [f"{group.label}: {line}" for holds, line in (
            (n < FEWEST, f"n = {n} is below {FEWEST}: no interval; run more seeds"),
            (seed is not None, f"seed {seed} is an outlier (Grubbs' test at 5 %): find out why before anything is made "
                               "of the mean; it is counted here"),
            (alone, "no forward transfer: no Isolated run of the same settings and seeds is here"),
            (0 < transferred < n, f"forward transfer is of {transferred} of {n} seeds: Isolated has no others"),
            *((True, f"its runs are of different {what}") for what in differ)) if holds]  # fmt: skip
    how = {"paired": ": the differences are on these", "Welch": ", too few for pairs: Welch's test is on all"}
    for a, b, test in shown[shown["metric"] == METRICS[0]][["group", "minus", "test"]].itertuples(index=False):
        seeds_a, seeds_b = (found[label][METRICS[0]].keys() for label in (a, b))
        shared, n = len(seeds_a & seeds_b), max(len(seeds_a), len(seeds_b))
        if 0 < shared < n:
            lines.append(f"{a} minus {b}: {shared} of {n} seeds are shared{how[test]}")
    if len(tasks := name_tasks(groups)) > 1:
        lines.append(f"groups over different tasks are not compared with each other: {'; '.join(tasks.values())}")
    return lines


def name_tasks(groups):
    """What the groups are over, in words: dict `Run.tasks` -> text."""
    names = {}
    for group in groups:
        names.setdefault(group.runs[0].tasks, group.runs[0].settings.get("tasks", "other tasks"))
    return names


def make_tables(groups, numbers, shown):
    """The report's tables: dict title -> frame of texts, accuracies in per cent.

    Args:
        groups: as `group_runs` gives them.
        numbers: `compare`'s frame.
        shown: those of its differences that are.
    """
    costs = make_frame(groups).groupby("group", sort=False)[list(COSTS)].mean().reset_index()
    few = {"stored_rows": costs["stored_rows"].isna().all(), "stored_numbers": not costs["stored_numbers"].any()}
    costs = costs.drop(columns=[key for key in few if few[key]])
    alone = numbers["minus"].isna()
    accuracy = numbers[alone & (numbers["metric"] == METRICS[0])].drop(columns=["minus", "metric", "test", "p"])
    others = numbers[alone & numbers["metric"].isin([*METRICS[1:], TRANSFER])].drop(columns=["minus", "test", "p"])
    title = "Differences (percentage points; p not corrected for many tests)"
    if len(shown) < (~alone).sum():
        title = ("Differences to the first group over the same tasks (percentage points; p not corrected for many "
                 "tests; --format csv has all pairs)")  # fmt: skip
    differ = differing([g.runs[0] for g in groups])
    settings = [{
        "group": g.label,
        "seeds": " ".join("+".join(map(str, r.seed)) if r.members else str(r.seed) for r in g.runs),
        "settings": ", ".join(text for key in differ if (text := setting_text(g.runs[0], key))),
        "made with": ", ".join(f"{k} {'; '.join(dict.fromkeys(r.about[k] for r in g.runs))}" for k in g.runs[0].about),
    } for g in groups]  # fmt: skip
    tables = {"Average accuracy (%) and what it costs": accuracy.merge(costs, on="group"),
              "Other metrics (%)": others, title: shown,
              "Settings that differ, and where the numbers come from": require("pandas").DataFrame(settings)}
    return {title: to_texts(table) for title, table in tables.items() if len(table)}


def to_texts(table):
    """A frame with headings in words and every cell a text: accuracies in per cent, a dash for what is unknown."""
    table = table.copy()
    ends = table.columns.intersection(["mean", "sd", "low", "high"])
    table[ends] *= 100
    if "metric" in table:
        table["metric"] = table["metric"].map(words)
    table.columns = map(words, table.columns)
    for heading in table.columns.intersection(list(FORMATS)):
        table[heading] = ["–" if x != x or x is None else format(x, FORMATS[heading]) for x in table[heading]]
    return table


def count_texts(table):
    """How many columns of texts stand before those of numbers."""
    return sum(heading not in FORMATS for heading in table.columns)


def to_grid(table, width):
    """The table in columns: in a terminal of `width` (None: any) texts are folded, to 10 at least; numbers never."""
    from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate
    from wcwidth import wcswidth

    texts = count_texts(table)
    headings = [h if i < texts else "\n".join(wrap(h, 8, break_long_words=False)) for i, h in enumerate(table.columns)]
    rows = [headings, *table.itertuples(index=False)]
    widths = [max(wcswidth(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]
    gap = " " if width and width < 100 else "  "
    for _ in range(sum(widths) + len(gap) * (len(widths) - 1) - width if width else 0):
        widest = max(range(texts), key=widths.__getitem__)
        widths[widest] -= widths[widest] > 10
    row = DataRow("", gap, "")
    layout = TableFormat(None, Line("", "-", gap, ""), None, None, row, row, 0, None)
    align = ["left"] * texts + ["right"] * (len(widths) - texts)
    return tabulate([headings, SEPARATING_LINE, *rows[1:]], tablefmt=layout, colalign=align,
                    maxcolwidths=widths[:texts], disable_numparse=True, break_on_hyphens=False)  # fmt: skip


def print_text(head, tables, notes):
    """Print the report for people."""
    for line in head:
        say_folded(line)
    for title, table in tables.items():
        say()
        say_folded(title)
        say(to_grid(table, terminal_width()))
    say()
    for note in notes:
        say_folded(f"note: {note}")


def to_markdown(head, tables, notes):
    """The report in GitHub's Markdown."""
    parts = [f"{line}\n" for line in head]
    for title, table in tables.items():
        texts, n = table.replace(r"\|", r"\|", regex=True), count_texts(table)
        align = ["left"] * n + ["right"] * (len(table.columns) - n)
        parts.append(f"**{title}**\n\n{texts.to_markdown(index=False, colalign=align, disable_numparse=True)}\n")
    return "\n".join(parts + [f"- {note}" for note in notes])


def to_latex(head, tables, notes):
    """The report's tables as LaTeX tabulars; all else as comments."""
    require("jinja2")
    parts = [*(f"% {line}" for line in head), r"% The tables need \usepackage{booktabs}."]
    for title, table in tables.items():
        columns = "l" * count_texts(table)
        columns += "r" * (len(table.columns) - len(columns))
        parts += [f"% {title}", table.to_latex(index=False, escape=True, column_format=columns).replace("–", "--")]
    return "\n".join(parts + [f"% {note}" for note in notes])


def make_figures(groups):
    """The page's figures: a list of (title, SVG)."""
    from tools import plot  # matplotlib is needed here alone

    figures, names = [], name_tasks(groups)
    for tasks, name in names.items():
        alike = [g for g in groups if g.runs[0].tasks == tasks]
        for kind, (title, _, _) in plot.KINDS.items():
            if kind == "joint":
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
                   help="also average these runs' predictions; several times: that many ensembles")  # fmt: skip
    p.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text", help="default: text")
    p.add_argument("--html", metavar="FILE", help="also write one self-contained page with tables and figures")
    flags = p.parse_args(argv)
    groups, notes = group_runs(read_runs("report.py", flags.runs, flags.ensemble))
    found = measure(groups)
    numbers = compare(groups, found)
    shown = choose_shown(groups, numbers)
    head = [describe_groups(groups), SPREAD]
    notes = list(map(printable, notes + warnings(groups, found, shown)))
    tables = make_tables(groups, numbers, shown)
    if flags.html:
        texts = [(title, table, count_texts(table)) for title, table in tables.items()]
        write(flags.html, make_page(head, texts, notes, make_figures(groups)))
    if flags.format == "csv":  # all numbers, in one table for programs, accuracies in [0, 1]
        say(numbers.to_csv(index=False).rstrip("\n"))
        for line in [*head, *(f"note: {note}" for note in notes)]:
            print(f"report.py: {line}", file=sys.stderr)
    elif flags.format == "text":
        print_text(head, tables, notes)
    else:
        say({"markdown": to_markdown, "latex": to_latex}[flags.format](head, tables, notes))
    return 0


def write(file, text):
    """Write a text file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{file}: cannot be written ({e.strerror})") from e


if __name__ == "__main__":
    sys.exit(guard("report.py", main))
