"""tools/report.py and tools/page.py: formats, widths, what stands in them, flags, the page."""
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from html import unescape

import numpy as np
import pandas as pd
import pytest

from tests.runfolders import assert_one_line, make_run, make_seeds, report_of, squeeze
from tools import report
from tools.runs import load_frame

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_too_few_seeds_warn_and_give_no_interval(tmp_path, capsys):
    assert report_of(*make_seeds(tmp_path, "zoo", [0.7, 0.8]), "--format", "markdown") == 0
    out = squeeze(capsys.readouterr().out)
    assert "- Model Zoo: n = 2 is below 3: no interval" in out
    assert "| Model Zoo | 2 | 75.00 | 7.07 | – | – | 1.5 | 300 | 40 | 2 |" in out


def test_unknown_costs_are_dashes(tmp_path, capsys):
    assert report_of(make_run(tmp_path / "old", [[0.5, 0.5]] * 2, cost=(2.0, None, None)), "--format", "markdown") == 0
    assert "| Model Zoo | 1 | 50.00 | – | – | – | 1.5 | – | – | 2 |" in squeeze(capsys.readouterr().out)


def test_different_tasks_stand_in_one_report_uncompared(tmp_path, capsys):
    two = make_seeds(tmp_path, "two", [0.7, 0.7, 0.8])
    three = make_run(tmp_path / "three", [[0.6] * 3] * 3)
    elsewhere = make_run(tmp_path / "npz", [[0.6] * 2] * 2, dataset="npz", path="a.npz")
    assert report_of(*two, three, elsewhere) == 0
    out = capsys.readouterr().out
    assert "groups over different tasks are not compared with each other: 2 tasks of toy; 3 tasks of toy" in out
    assert "Differences" not in out


def test_different_commits_in_a_group_are_told(tmp_path, capsys):
    a = make_run(tmp_path / "a", [[0.6, 0.6]] * 2, 0, about={"commit": "a" * 40 + "+", "hardware": "a CPU"})
    b = make_run(tmp_path / "b", [[0.6, 0.6]] * 2, 1, about={"commit": "b" * 40, "hardware": "a CPU"})
    assert report_of(a, b) == 0
    out = capsys.readouterr().out
    assert "Model Zoo: its runs are of different commits" in out
    assert "aaaaaaaaaa+; bbbbbbbbbb" in " ".join(out.split())
    assert "different machines" not in out


def test_latex_and_markdown_keep_their_signs(tmp_path, capsys):
    folders = [*make_seeds(tmp_path, "a", [0.5], data_config="x|y_z%.yaml"), make_run(tmp_path / "b", [[0.5] * 3] * 3)]
    assert report_of(*folders, "--format", "latex") == 0
    out = capsys.readouterr().out
    assert r"x|y\_z\%" in out
    assert out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 3
    assert report_of(*folders, "--format", "markdown") == 0
    assert r"x\|y_z%" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 80, 100, None])
def test_numbers_keep_their_digits_on_any_terminal(tmp_path, capsys, monkeypatch, width):
    """Once: on 80 columns 812,500 was 812,… and on 120 the settings were folded where nothing need be."""
    if width:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8], cost=(12345678.0, 812500, 1871925), samples=100)
    folders += make_seeds(tmp_path, "iso", [0.7, 0.72, 0.81], cost=(12.0, 187500, 1791675), tasks_per_round=1)
    assert report_of(*folders) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    # deviations -4, -2 and 6: sd sqrt(28) = 5.29, half width 4.302653 x 5.2915 / sqrt(3) = 13.145
    for number in ("74.00", "5.29", "60.86", "87.14", "1.5", "812,500", "1,871,925", "12,345,678"):
        assert f" {number} " in out.replace("\n", " ")
    tables = [line for line in out.splitlines() if not line.startswith("note: ")]
    first = tables[tables.index("Average accuracy (%) and what it costs") :]
    assert any(line.startswith("Isolated ") for line in first[: first.index("")])
    if width == 50:  # too narrow for the numbers alone: the terminal breaks the lines
        assert max(map(len, tables)) > width
    elif width:
        assert max(map(len, tables)) <= width
    else:
        assert "seconds\n" in re.sub(" +\n", "\n", out)
        assert any("Model Zoo" in line and "tasks_per_round 2" in line and "torch" in line for line in tables)


def test_no_runs_and_bad_flags_are_one_line(tmp_path, capsys):
    for arguments in ([], ["--format", "word"], ["--what"]):
        assert report_of(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_every_format_opens_with_what_the_runs_are_of_and_what_the_spread_means(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "make_figures", lambda groups: [])
    folders = [*make_seeds(tmp_path, "zoo", [0.5, 0.6, 0.8], samples=20), make_run(tmp_path / "b", [[0.5] * 3] * 3)]
    said = ["toy, 2 or 3 tasks; conv, 2 epochs, samples 20",
            "mean over seeds; sd: standard deviation with n - 1; 95 %: confidence interval of the mean by Student's t; "
            "±: half its width"]
    for form, mark in (("text", ""), ("markdown", ""), ("latex", "% "), ("csv", "report.py: ")):
        assert report_of(*folders, "--format", form, "--html", tmp_path / "page.html") == 0
        out, err = capsys.readouterr()
        lines = [line for line in (err if form == "csv" else out).splitlines() if line]
        assert lines[:2] == [mark + line for line in said]
    page = (tmp_path / "page.html").read_text()
    for line in said:
        assert f"<p>{line}</p>" in unescape(page)


@pytest.mark.parametrize(("width", "lines"), [
    (40, ["group        metric       95 %      rows",
          "                          from   trained",
          "------------ ------------ ---- ---------",
          "Model Zoo,   forgetting   5.00 1,234,567",
          "lr 0.1",
          "Isolated     average         –         8",
          "             accuracy"]),
    (100, ["group              metric            95 %       rows",
           "                                     from    trained",
           "-----------------  ----------------  ----  ---------",
           "Model Zoo, lr 0.1  forgetting        5.00  1,234,567",
           "Isolated           average accuracy     –          8"])])
def test_a_table_on_a_terminal_by_hand(width, lines):
    """Texts give way, the longest first, and headings of numbers take as little as they need."""
    table = pd.DataFrame({"group": ["Model Zoo, lr 0.1", "Isolated"], "metric": ["forgetting", "average_accuracy"],
                          "low": [0.05, None], "rows_trained": [1234567, 8]})
    assert [line.rstrip() for line in report.to_grid(*report.to_texts(table), width).splitlines()] == lines


def test_letters_of_east_asia_take_two_columns():
    table = report.to_texts(pd.DataFrame({"group": ["旋转数字旋转数字", "toy"], "n": [3, 12]}))
    assert report.to_grid(*table, 13).splitlines() == [
        "group       n", "---------- --", "旋转数字旋  3", "转数字", "toy        12"]


def test_control_characters_of_paths_and_names_do_not_reach_the_terminal(tmp_path, capsys):
    folders = [make_run(tmp_path / f"{x}\x1b[2J", [[0.5, 0.5]] * 2, names=["a\x1b[2J", "b"], data_config="\x1b[2J.yaml")
               for x in "ab"]
    for form in ("text", "markdown", "latex", "csv"):
        assert report_of(*folders, tmp_path / "none\x1b[2J", "--format", form) == 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        assert "left out" in out + err and "no such run folder" in err


def test_folders_whose_names_are_not_utf_8_are_read(tmp_path, capsys):
    """Once: a UnicodeEncodeError of pandas. Two such folders stay two."""
    folders = [make_run(tmp_path / os.fsdecode(b"o" + byte), [[x, x]] * 2, s)
               for s, (byte, x) in enumerate(((b"\xff", 0.5), (b"\xfe", 0.7)))]
    assert report_of(*folders) == 0 and "60.00" in capsys.readouterr().out
    assert load_frame(folders)["run"].tolist() == [f"{tmp_path}/o\\udcff", f"{tmp_path}/o\\udcfe"]
    page = tmp_path / "page.html"
    assert report_of(*folders, "--html", page) == 0 and page.stat().st_size > 1000


@pytest.mark.parametrize(("package", "words"), [
    ("pandas", []), ("jinja2", ["--format", "latex"]), ("jinja2", ["--html", "page.html"]),
    ("matplotlib", ["--html", "page.html"])])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(tmp_path, capsys, monkeypatch, package, words):
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "jinja2":
        monkeypatch.setattr(report, "make_figures", lambda groups: [])
    assert report_of(folder, *words) == 2
    assert_one_line(capsys, package)
    assert not (tmp_path / "page.html").exists()


def test_page_is_self_contained_and_escaped(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8], names=["<script>alert(1)</script>", "b & c"],
                         data_config="<b>.yaml")
    folders.append(make_run(tmp_path / "iso", [[0.6] * 3] * 3, tasks_per_round=1))
    folders.append(make_run(tmp_path / "joint2", [[0.6] * 2], method="multihead"))
    folders.append(make_run(tmp_path / "joint3", [[0.6] * 3], method="multihead"))
    assert report_of(*folders, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert re.findall(r'(?:src|href)="(?!data:image/svg)', page) == []
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    # of two tasks: methods, dots, compute, curves, matrix, draws; of three: methods, dots, compute, matrix; joint
    assert page.count("<img ") == 11
    # Once: headings stood there twice without a word of which tasks.
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert len(set(headings)) == len(headings)
    assert {"Average accuracy: 2 tasks of &lt;b&gt;", "Average accuracy: 3 tasks of toy"} <= set(headings)
    assert report_of(folders[0], "--html", tmp_path / "page.html") == 0
    assert "<h2>Average accuracy</h2>" in (tmp_path / "page.html").read_text()
    assert report_of(*folders, "--html", tmp_path / "no" / "page.html") == 2
    assert "page.html: cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_in_a_browser(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    assert report_of(*make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8]), "--html", tmp_path / "page.html") == 0
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3400"]
    subprocess.run([*browser, f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()],
                   check=True, capture_output=True, timeout=60)
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The figures were drawn: the blue of a dot and its whisker, and the heat map's darkest blue and lightest yellow.
    for colour, least in (((0, 114, 178), 50), ((0, 34, 78), 500), ((254, 232, 56), 500)):
        assert (abs(pixels - colour).max(2) < 12).sum() > least


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_fits_a_screen_and_a_telephone(tmp_path, monkeypatch):
    """What is wide scrolls inside its own box: the page itself is as wide as the window."""
    monkeypatch.setattr(report, "make_figures", lambda groups: [("a figure", b"<svg width='900' height='9'/>")])
    folders = [make_run(tmp_path / ("long" * 50) / f"{lr}-{s}", [[lr, lr]] * 2, s, lr=lr, cost=(12345678, 9, 1871925))
               for lr in (0.1, 0.2) for s in (0, 1)]
    assert report_of(*folders, folders[0], "--html", tmp_path / "page.html") == 0
    frames = "".join(f"<iframe src='page.html' width='{width}' height='900'></iframe>" for width in (420, 1280))
    look = ("onload = () => document.title = [...document.querySelectorAll('iframe')].map(f => f.contentDocument)"
            ".map(d => [d.documentElement.scrollWidth - d.documentElement.clientWidth, "
            "[...d.querySelectorAll('.wide')].some(w => w.scrollWidth > w.clientWidth)]).join(' ')")
    (tmp_path / "frames.html").write_text(f"{frames}<script>{look}</script>")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        check=True, capture_output=True, text=True, timeout=60)
    assert "<title>0,true 0,false</title>" in done.stdout


def test_every_format_has_the_numbers_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "make_figures", lambda groups: [])
    # Differences 4, 2 and 6 points: mean 4, sd 2, half width 4.302653 x 2 / sqrt(3) = 4.968; t = 3.4641, p = 0.0742.
    # Forgetting of a zoo that ends at x and began 0.1 higher is 0.1, and Isolated's is 0.
    folders = [make_run(tmp_path / f"zoo{s}", [[x + 0.1, 0], [x, x]], s) for s, x in enumerate((0.70, 0.72, 0.74))]
    folders += [make_run(tmp_path / f"iso{s}", [[x, x]] * 2, s, tasks_per_round=1, cost=(s, 10 * s, 100 * s))
                for s, x in enumerate((0.66, 0.70, 0.68))]
    rows = (
        # of costs the mean: seconds 0, 1 and 2, rows ten times, parameters a hundred times that
        ("Isolated", "3", "68.00", "2.00", "63.03", "72.97", "1.0", "10", "100", "1"),
        ("Model Zoo", "forgetting", "3", "10.00", "0.00", "10.00", "10.00"),
        ("Model Zoo", "forward transfer", "3", "4.00", "2.00", "-0.97", "8.97"),
        ("Model Zoo", "Isolated", "average accuracy", "paired", "3", "4.00", "2.00", "-0.97", "8.97", "0.074"),
    )
    assert report_of(*folders, "--format", "markdown", "--html", tmp_path / "page.html") == 0
    out, page = squeeze(capsys.readouterr().out), (tmp_path / "page.html").read_text()
    assert report_of(*folders[:-1], "--format", "latex", "--html", tmp_path / "fewer.html") == 0
    assert "<li>Model Zoo minus Isolated: 2 of 3 seeds are shared" in (tmp_path / "fewer.html").read_text()
    capsys.readouterr()
    assert report_of(*folders, "--format", "latex") == 0
    latex = squeeze(capsys.readouterr().out)
    for row in rows:
        assert "| " + " | ".join(row) + " |\n" in out
        assert " & ".join(row) + r" \\" in latex
        assert re.search("<tr>" + "".join(rf"\s*<td>{re.escape(cell)}</td>" for cell in row) + r"\s*</tr>", page)
    assert report_of(*folders, "--format", "csv") == 0
    line = next(r for r in csv.DictReader(io.StringIO(capsys.readouterr().out)) if r["group"] == "Isolated")
    numbers = [float(line[key]) for key in ("mean", "sd", "low", "high")]
    assert numbers == pytest.approx([0.68, 0.02, 0.63032, 0.72968], abs=1e-5)
