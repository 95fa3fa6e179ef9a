"""From run folders to tables: mean, spread and interval of every metric, paired differences, cost.

    python tools/report.py runs/zoo-seed=* runs/isolated-seed=* --ensemble runs/isolated-seed=*

Runs that differ in seed only are one group. Reads run folders and nothing else.
"""
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich import box
from rich.table import Table as RichTable
from rich.text import Text
from utils.logger import make_console

from tools.page import make_page
from tools.runs import METRICS, differing, group_runs, read_runs, setting_text
from tools.stats import FEWEST, compare, find_outlier, measure, summarise
from utils.command import guard
from utils.config import Parser
from utils.config_files import ConfigError


@dataclass(frozen=True)
class Table:
    """A table before it has a format.

    Attributes:
        title: a line.
        columns: of pairs, a heading and the format of its numbers.
        rows: of cells, a text, a number or None each.
    """

    title: str
    columns: tuple
    rows: list


MANY = 4  # groups from which only the differences to the first are shown: those between all grow with the square


def choose_shown(groups, differences):
    """Of `compare`'s differences all, but of MANY groups over the same tasks only those to the first of these."""
    alike = {}
    for group in groups:
        alike.setdefault(group.runs[0].tasks, []).append(group.label)
    kept = {label for labels in alike.values() for label in (labels if len(labels) < MANY else labels[:1])}
    return [difference for difference in differences if difference[0] in kept]


def warnings(groups, found, differences):
    """A line for whatever a reader of the numbers and of the `differences` shown should not overlook."""
    lines = []
    for group in groups:
        n = len(group.runs)
        if n < FEWEST:
            lines.append(f"{group.label}: n = {n} is below {FEWEST}: no interval; run more seeds")
        seed = find_outlier(found[group.label]["average_accuracy"])
        if seed is not None:
            lines.append(f"{group.label}: seed {seed} is an outlier (Grubbs' test at 5 %): find out why before "
                         "anything is made of the mean; it is counted here")  # fmt: skip
        transferred = len(found[group.label].get("forward_transfer", ()))
        if group.runs[0].kind == "Model Zoo" and not transferred and len(group.runs[0].names) > 1:
            lines.append(f"{group.label}: no forward transfer: no Isolated run of the same settings and seeds is here")
        elif 0 < transferred < n:
            lines.append(f"{group.label}: forward transfer is of {transferred} of {n} seeds: Isolated has no others")
        for key, what in (("commit", "commits"), ("hardware", "machines"), ("torch", "versions of torch")):
            if len({run.about[key] for run in group.runs}) > 1:
                lines.append(f"{group.label}: its runs are of different {what}")
    for a, b, metric, test, _ in differences:
        of_a, of_b = found[a][metric], found[b][metric]
        shared, n = len(of_a.keys() & of_b.keys()), max(len(of_a), len(of_b))
        if metric == METRICS[0] and 0 < shared < n:
            how = {"paired": ": the differences are on these", "Welch": ", too few for pairs: Welch's test is on all"}
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


def make_tables(groups, found, differences, shown):
    """The report's tables, accuracies in per cent; `shown` are those of the differences that are."""
    spread = (("n", "d"), ("mean", "z.2f"), ("sd", "z.2f"), ("95 % from", "z.2f"), ("to", "z.2f"))

    def cells(s):
        return [s.n, *(None if x is None else 100 * x for x in (s.mean, s.sd, s.low, s.high))]

    accuracy, others, settings = [], [], []
    differ = differing([g.runs[0] for g in groups])
    costs = {"networks": ("networks a task", ".1f"), "rows_trained": ("rows trained", ",.0f"),
             "stored_rows": ("rows stored", ",.0f"), "stored_numbers": ("numbers stored", ",.0f"),
             "parameters": ("parameters", ",.0f"), "seconds": ("seconds", ",.0f")}  # fmt: skip
    if not any("stored_rows" in of_group for of_group in found.values()):
        del costs["stored_rows"]
    if not any(any(of_group.get("stored_numbers", {}).values()) for of_group in found.values()):
        del costs["stored_numbers"]
    for g in groups:
        cost = [summarise(list(found[g.label].get(key, {}).values())).mean for key in costs]
        accuracy.append([g.label, *cells(summarise(list(found[g.label]["average_accuracy"].values()))), *cost])
        for metric, values in found[g.label].items():
            if metric not in ("average_accuracy", *g.runs[0].cost):
                others.append([g.label, words(metric), *cells(summarise(list(values.values())))])
        seeds = ["+".join(map(str, r.seed)) if isinstance(r.seed, tuple) else str(r.seed) for r in g.runs]
        origin = [f"{key} {'; '.join(dict.fromkeys(run.about[key] for run in g.runs))}" for key in g.runs[0].about]
        texts = [text for key in differ if (text := setting_text(g.runs[0], key))]
        settings.append([g.label, " ".join(seeds), ", ".join(texts), ", ".join(origin)])
    found_differences = [[a, b, words(m), test, *cells(s), s.p] for a, b, m, test, s in shown]
    title = "Differences (percentage points; p not corrected for many tests)"
    if len(shown) < len(differences):
        title = ("Differences to the first group over the same tasks (percentage points; p not corrected for many "
                 "tests; --format csv has all pairs)")  # fmt: skip
    return [table for table in (
        Table("Average accuracy (%) and what it costs", (("group", ""), *spread, *costs.values()), accuracy),
        Table("Other metrics (%)", (("group", ""), ("metric", ""), *spread), others),
        Table(title, (("group", ""), ("minus", ""), ("metric", ""), ("t-test", ""), *spread, ("p", ".2g")),
              found_differences),
        Table("Settings that differ, and where the numbers come from",
              (("group", ""), ("seeds", ""), ("settings", ""), ("made with", "")), settings),
    ) if table.rows]  # fmt: skip


def words(key):
    """A key of result.json as words."""
    return key.replace("_", " ")


def show(value, spec):
    """A table's cell as a text."""
    return "–" if value is None else value if isinstance(value, str) else format(value, spec)


def print_text(tables, notes):
    """Print tables and notes for people: on a terminal texts are folded to its width, and numbers never."""
    console = make_console()
    terminal = console.width if console.is_terminal else 10_000  # of which a table takes what it needs
    gap = int(terminal >= 100)  # two spaces between columns, where there is room for them, else one
    for table in tables:
        rich = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
                         padding=(0, gap), collapse_padding=True)  # fmt: skip
        rows = [[show(x, s) for x, (_, s) in zip(row, table.columns, strict=True)] for row in table.rows]
        for (heading, spec), *cells in zip(table.columns, *rows, strict=True):
            lines = wrap(heading, 8, break_long_words=False) if spec else [heading]
            width = max(map(len, lines + cells))
            rich.add_column("\n".join(lines), justify="right" if spec else "left", no_wrap=bool(spec), overflow="fold",
                            min_width=width if spec else min(width, 10))  # fmt: skip
        for row in rows:
            rich.add_row(*map(Text, row))
        least = sum(column.min_width + gap + 1 for column in rich.columns) - gap - 1
        console.width = max(terminal, least)  # in less rich leaves a column out
        console.print(rich, crop=False)
        console.print()
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def to_markdown(tables, notes):
    """Tables and notes in GitHub's Markdown."""
    lines = []
    for table in tables:
        cells = [[show(x, s) for x, (_, s) in zip(row, table.columns, strict=True)] for row in table.rows]
        lines += [f"**{table.title}**", "", _markdown_row(heading for heading, _ in table.columns),
                  _markdown_row("---:" if spec else "---" for _, spec in table.columns)]  # fmt: skip
        lines += [*map(_markdown_row, cells), ""]
    return "\n".join(lines + [f"- {note}" for note in notes])


def _markdown_row(cells):
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


LATEX = {"\\": r"\textbackslash{}", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
         **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def to_latex(tables, notes):
    """Tables as LaTeX tabulars that need no package; notes as comments."""

    def row(cells):
        return " & ".join("".join(LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    lines = []
    for table in tables:
        lines += [f"% {table.title}", r"\begin{tabular}{" + "".join("lr"[bool(s)] for _, s in table.columns) + "}",
                  r"\hline", row(heading for heading, _ in table.columns), r"\hline"]  # fmt: skip
        lines += [row(show(x, s) for x, (_, s) in zip(r, table.columns, strict=True)) for r in table.rows]
        lines += [r"\hline", r"\end{tabular}", ""]
    return "\n".join(lines + [f"% {note}" for note in notes])


def to_csv(groups, found, differences):
    """Everything as one table for programs: a line a group (or difference) and metric; accuracies in [0, 1]."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("group", "minus", "metric", "test", "n", "mean", "sd", "low", "high", "p"))
    for group in groups:
        for metric, values in found[group.label].items():
            s = summarise(list(values.values()))
            # No p-value: whether an accuracy is 0 is no question, and a transfer has its interval.
            writer.writerow((group.label, None, metric, None, s.n, s.mean, s.sd, s.low, s.high, None))
    for a, b, metric, test, s in differences:
        writer.writerow((a, b, metric, test, s.n, s.mean, s.sd, s.low, s.high, s.p))
    return text.getvalue().rstrip("\n")


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
    differences = compare(groups, found)
    shown = choose_shown(groups, differences)
    notes += warnings(groups, found, shown)
    tables = make_tables(groups, found, differences, shown)
    if flags.html:
        texts = [(t.title, [h for h, _ in t.columns], [bool(s) for _, s in t.columns],
                  [[show(x, s) for x, (_, s) in zip(r, t.columns, strict=True)] for r in t.rows]) for t in tables]
        write(flags.html, make_page(texts, notes, make_figures(groups)))
    if flags.format == "text":
        print_text(tables, notes)
    elif flags.format == "csv":
        print(to_csv(groups, found, differences))
        for note in notes:
            print(f"report.py: note: {note}", file=sys.stderr)
    else:
        print({"markdown": to_markdown, "latex": to_latex}[flags.format](tables, notes))
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
