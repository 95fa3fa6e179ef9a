"""The points of accuracy against compute: of run folders and of files; what is no file of points."""
import csv
from dataclasses import replace

import pytest

from tests.runfolders import make_run
from tests.test_plot import figure_of, plot_of
from tools import plot
from tools.points import NUMBERS, TEXTS, count_work, list_points, read_points
from tools.runs import group_runs, read_run, read_runs
from utils.config_files import ConfigError


def test_points_of_several_machines_make_one_figure(tmp_path):
    """The numbers of two lots of runs, each written where it ran, join lines as the runs themselves do."""
    lots = {epochs: [make_run(tmp_path / f"{kind}-{epochs}-{seed}", [[x + 0.1 * (kind == "multihead")]], seed=seed,
                              method=kind, epochs=epochs, augment=True, cost=(1.0, 100 * epochs, 40))
                     for kind in ("modelzoo", "multihead") for seed, x in enumerate(finals)]
            for epochs, finals in ((5, (0.72, 0.7, 0.74)), (20, (0.8,)))}
    for epochs, runs in lots.items():
        assert plot_of("compute", *runs, "--file", tmp_path / f"{epochs}.csv") == 0
    header, *rows = (tmp_path / "5.csv").read_text(encoding="utf-8").splitlines()
    assert header.split(",")[:6] == ["epochs", "n", "mean", "sd", "low", "high"] and len(rows) == 2
    # 72 ± 4.302653 x 2 / sqrt(3), and 500 rows of 46,877,280 operations (by hand in test_plot.py)
    values = dict(zip(header.split(","), rows[0].split(","), strict=True))
    assert [float(values[key]) for key in ("mean", "low", "high")] == pytest.approx([0.72, 0.6703173, 0.7696827])
    assert float(values["operations"]) == 23_438_640_000 and values["method"] == "Model Zoo"
    together = figure_of("compute", lots[5] + lots[20])
    read = plot.draw("compute", [], read_points([tmp_path / "20.csv", tmp_path / "5.csv"]))
    for one, other in zip(together.axes, read.axes, strict=True):
        for a, b in zip(one.lines, other.lines, strict=True):
            assert a.get_xydata() == pytest.approx(b.get_xydata())
        assert len(one.collections) == len(other.collections)
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (together, read)]
    assert legends == [["Model Zoo", "Multi-Head"]] * 2
    assert read.get_supxlabel() == together.get_supxlabel() and "; 1 or 3 seeds" in read.get_supxlabel()
    assert plot_of("compute", tmp_path / "20.csv", tmp_path / "5.csv", "--file", tmp_path / "both.csv") == 0
    assert plot_of("compute", tmp_path / "both.csv", "--file", tmp_path / "both.svg") == 0


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read (No such file"), ("", "not a table of points"), ("a,b\n1,2\n", "no column epochs"),
    (b"\xff\xfe\x00", "not a table of points"), ("HEADER\n", "holds no points"),
    ("HEADER\nx" + ",1" * 16 + "\n", "line 2: epochs must be a number"),
    ("HEADER\n1" + ",1" * 16 + "\n2" + ",1" * 16 + "\n" + "1," * 7 + "inf" + ",1" * 9, "line 4: operations must be"),
])
def test_points_that_are_none_are_one_line(text, message, tmp_path, capsys):
    file, header = tmp_path / "points.csv", ",".join(NUMBERS + TEXTS)
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.replace("HEADER", header).encode())
    assert plot_of("compute", file, "--file", tmp_path / "a.png") == 2
    assert f"{file}: {message}" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert plot_of("compute", file, tmp_path, "--file", tmp_path / "a.png") == 2
    assert "make no figure together" in capsys.readouterr().err
    assert plot_of("dots", tmp_path, "--file", tmp_path / "a.csv") == 2
    assert "must end in .svg, .pdf, .png" in capsys.readouterr().err and not (tmp_path / "a.png").exists()


POINT = dict(zip(NUMBERS + TEXTS, ["5", "3", "0.73", "0.01", "0.7", "0.76", "500", "2e10", "40", "100", "Model Zoo",
                                   "2 tasks of toy", "conv", "all samples", "abc", "a, b", "2.0"], strict=True))


def write_points(file, *rows, head="", end=""):
    """A file of points, each POINT but for what its dict in `rows` says."""
    with open(file, "w", encoding="utf-8", newline="") as opened:
        opened.write(head)
        writer = csv.DictWriter(opened, POINT)
        writer.writeheader()
        writer.writerows(POINT | row for row in rows)
        opened.write(end)
    return file


def test_points_may_have_empty_cells_blank_lines_and_a_byte_order_mark(tmp_path):
    empty = dict.fromkeys(("sd", "low", "high", "rows_trained", "parameters", "stored_rows"), "")
    rows = [{"low": "-0.1", "high": "1.2"}, empty | {"mean": "0.0", "epochs": "6"}]
    file = write_points(tmp_path / "a.csv", *rows, head="\ufeff", end="\n\n")
    points = read_points([file])
    assert points["low"].tolist()[0] == -0.1 and points["epochs"].tolist() == [5, 6]
    assert points[list(empty)].iloc[1].isna().all() and points["hardware"].tolist() == ["a, b"] * 2


@pytest.mark.parametrize(("cells", "message"), [
    ({"rows_trained": "594,150"}, "rows_trained must be a number of 0 or more, such as 594150, or empty; not"),
    ({"mean": "0,73"}, "mean must be a share in [0, 1]"), ({"mean": ""}, "mean must be a share in [0, 1]"),
    ({"n": "0"}, "n must be a number above 0"), ({"operations": "nan"}, "operations must be a number above 0"),
    ({"sd": "-0.1"}, "sd must be a number of 0 or more"), ({"stored_rows": "inf"}, "stored_rows must be a number of 0"),
    ({"low": "x"}, "low must be a number, such as 0.73"), ({"high": "-inf"}, "high must be a number, such as"),
    ({"parameters": "1_000"}, "parameters must be a number of 0"),
    ({"mean": "73", "low": "70", "high": "76"}, "mean must be a share in [0, 1], such as 0.73, and not per cent; not"),
    ({"low": "0.74"}, "mean 0.73 must lie from low to high, not 0.74 to 0.76"),
    ({"high": ""}, "mean 0.73 must lie from low to high, not 0.7 to empty"),
])
def test_numbers_that_cannot_be_are_one_line(tmp_path, capsys, cells, message):
    """Once: they became empty cells or wrong points, and the line told was not the file's."""
    file = write_points(tmp_path / "a.csv", {"hardware": "two\nlines"}, {"epochs": "6"} | cells)
    assert plot_of("compute", file, "--file", tmp_path / "a.svg") == 2
    err = capsys.readouterr().err
    assert f"plot.py: {file}: line 4: {message}" in err and err.count("\n") == 1


@pytest.mark.parametrize(("end", "message"), [
    ("1,2,3\n", "line 3: 3 cells, but 17 columns in line 1"), ("\n" + "1," * 18 + "1\n", "line 4: 19 cells, but 17"),
    ('"1"2,3\n', "line 3: not a table of points ("), ('1,"2\n', "line 3: not a table of points ("),
])
def test_rows_of_other_lengths_and_stray_quotes_are_one_line(tmp_path, capsys, end, message):
    """Once: pandas filled short rows, and of longer ones made an index."""
    file = write_points(tmp_path / "a.csv", {}, end=end)
    assert plot_of("compute", file, "--file", tmp_path / "a.svg") == 2
    err = capsys.readouterr().err
    assert f"{file}: {message}" in err and err.count("\n") == 1


@pytest.mark.parametrize(("cells", "message"), [
    ({"tasks": "3 tasks of toy", "method": "Isolated"},
     "tasks '3 tasks of toy' differs from '2 tasks of toy' in {a}, line 2; all points must have the same"),
    ({"model": "conv_9"}, "model 'conv_9' differs from 'conv' in {a}, line 2; the points of 'Model Zoo' must"),
    ({"samples": "samples 9"}, "samples 'samples 9' differs from 'all samples' in {a}, line 2; the points of 'Model"),
])
def test_points_that_do_not_belong_together_are_one_line(tmp_path, cells, message):
    """Once: one line joined points of other tasks, models and samples."""
    a, b = write_points(tmp_path / "a.csv", {}), write_points(tmp_path / "b.csv", {"epochs": "6"}, cells)
    with pytest.raises(ConfigError) as caught:
        read_points([a, b])
    assert str(caught.value).startswith(f"{b}: line 3: " + message.format(a=a))
    twice = write_points(tmp_path / "b.csv", {"epochs": "6"}, {})
    with pytest.raises(ConfigError, match=f"b.csv: line 3: 'Model Zoo' has 5 epochs in {a}, line 2 too; leave one out"):
        read_points([a, twice])
    other = write_points(tmp_path / "b.csv", {"method": "Isolated", "model": "conv_9", "samples": "samples 9"})
    assert len(read_points([a, other])) == 2


def test_the_same_tasks_under_two_names_are_points_of_one_text(tmp_path):
    """Or the file that plot.py writes would be one that it refuses."""
    runs = [make_run(tmp_path / name, [[0.5]], method=method, data_config=f"{name}.yaml")
            for name, method in (("a", "modelzoo"), ("b", "multihead"))]
    assert plot_of("compute", *runs, "--file", tmp_path / "points.csv") == 0
    assert read_points([tmp_path / "points.csv"])["tasks"].tolist() == ["1 task of a or 1 task of b"] * 2


def test_points_are_of_all_seeds_and_members(tmp_path):
    """Seeds that trained on 100, 300 and 200 rows; an ensemble of two networks; a frozen one is left out."""
    row = 46_877_280  # of conv on digits, by hand in test_plot.py
    zoo = [make_run(tmp_path / f"zoo{seed}", [[0.5]], seed=seed, cost=(1.0, rows, 40))
           for seed, rows in enumerate((100, 300, 200))]
    joint = [make_run(tmp_path / model, [[0.5]], method="multihead", model=model, cost=(1.0, 10, 40))
             for model in ("conv", "conv_20")]
    frozen = make_run(tmp_path / "frozen", [[0.5]], method="multihead", freeze=True)
    groups, _ = group_runs(read_runs("x", zoo))
    points = list_points(groups)
    assert points.rows_trained.tolist() == [200] and points.operations.tolist() == [200 * row]
    conv, small = (count_work(read_run(path)) for path in joint)
    assert conv == 10 * row and 0 < small < conv
    runs = [read_run(path) for path in joint]
    both = replace(runs[0], members=tuple(runs), cost=runs[0].cost | {"rows_trained": 20})
    assert count_work(both) == conv + small
    assert list_points(group_runs([both])[0]).model.tolist() == ["conv; conv_20"]
    assert plot.choose("compute", group_runs([read_run(frozen)])[0])[0] == []
