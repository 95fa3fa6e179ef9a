"""tools/plot.py: what is drawn, by hand; files of every kind; bad input."""
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runfolders import make_run, make_seeds
from tools import plot
from tools.points import read_points
from tools.runs import group_runs, read_run
from utils.command import guard
from utils.learner import Learner, learner_path, save_learner
from utils.run_folder import save_tensors

matplotlib = pytest.importorskip("matplotlib")
colors = pytest.importorskip("matplotlib.colors")

MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def plot_of(*arguments):
    """Exit status of plot.py."""
    return guard("plot.py", lambda: plot.main([str(a) for a in arguments]))


def figure_of(kind, folders):
    chosen, skipped = plot.choose(kind, group_runs([read_run(folder) for folder in folders])[0])
    assert skipped == []
    return plot.draw(kind, chosen)


@pytest.fixture
def zoo(tmp_path):
    """Three seeds on three tasks, the last of them higher by 0.03, 0.03 and 0.06 throughout."""
    rows = [[0.5, 0, 0], [0.6, 0.7, 0], [0.62, 0.72, 0.8]]
    return [make_run(tmp_path / f"zoo{s}", [[x + 0.03 * s for x in row] for row in rows], seed=s) for s in range(3)]


@pytest.fixture
def isolated(tmp_path):
    return [make_run(tmp_path / "iso", [[0.5, 0.6, 0.7]] * 3, tasks_per_round=1)]


@pytest.fixture
def joint(tmp_path):
    rows = {1: [0.5], 3: [0.6, 0.7, 0.8], 2: [0.55, 0.65]}
    return [make_run(tmp_path / f"joint{n}", [row], method="multihead") for n, row in rows.items()]


def test_seen_draws_means_bands_and_crosses(zoo, isolated):
    figure = figure_of("seen", zoo + isolated)
    assert [axis.get_title() for axis in figure.axes] == ["0 1", "2 3", "4 5"]
    first, second, third = figure.axes
    curve = first.lines[0]
    assert list(curve.get_xdata()) == [1, 2, 3]
    assert list(curve.get_ydata()) == pytest.approx([53, 63, 65])
    # sd 0.03, n = 3: 95 % half width 4.302653 x 3 / sqrt(3) = 7.45241
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (pytest.approx(53 - 7.45241), pytest.approx(65 + 7.45241))
    assert list(second.lines[0].get_xdata()) == [2, 3]
    cross = third.collections[-1].get_offsets()
    assert [list(p) for p in cross] == [[3, pytest.approx(70)]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Model Zoo", "Isolated"]
    assert "95 %" in figure.legends[0].get_title().get_text()


def test_one_run_has_no_band(zoo):
    figure = figure_of("seen", zoo[:1])
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([50, 60, 62])
    assert figure.legends[0].get_title().get_text() in ("", "None")


def test_joint_draws_accuracy_against_the_number_of_tasks(joint):
    figure = figure_of("joint", joint)
    for axis, xs, ys in zip(figure.axes, ([1, 2, 3], [2, 3], [3]), ([50, 55, 60], [65, 70], [80]), strict=True):
        assert list(axis.lines[0].get_xdata()) == xs
        assert list(axis.lines[0].get_ydata()) == pytest.approx(ys)


def test_joint_finds_tasks_that_came_in_another_order(tmp_path):
    """Once: the accuracies of other tasks were averaged, by place, under the names of the first run's."""
    tasks, values = [[0, 1], [2, 3], [4, 5]], {0: 0.9, 2: 0.7, 4: 0.5}
    runs = [make_run(tmp_path / "one", [[0.8]], method="multihead", tasks=tasks)]
    for order, of_run in ((0, tasks), (1, tasks[::-1])):
        row = [values[task[0]] for task in of_run]
        runs.append(make_run(tmp_path / f"all{order}", [row], method="multihead", tasks=of_run, task_order=order))
    ys = [list(axis.lines[0].get_ydata()) for axis in figure_of("joint", runs).axes[:3]]
    assert ys == [pytest.approx([80, 90]), pytest.approx([70]), pytest.approx([50])]


def test_two_isolated_groups_have_two_marks(tmp_path, zoo):
    isolated = [make_run(tmp_path / f"iso{lr}", [[0.5] * 3] * 3, tasks_per_round=1, lr=lr) for lr in (0.1, 0.2)]
    figure = figure_of("seen", [isolated[0], *zoo, isolated[1]])
    crosses = [c for c in figure.axes[0].collections if type(c).__name__ == "PathCollection"]
    marks = [cross.get_paths()[0].vertices.tolist() for cross in crosses]
    assert len(marks) == 2 and marks[0] != marks[1]


def test_dots_are_means_with_intervals_on_an_axis_that_starts_where_the_data_are(zoo, joint):
    figure = figure_of("dots", [*zoo, joint[1]])
    axis = figure.axes[0]
    # zoo's averages 71.33, 74.33 and 77.33; Multi-Head's 70
    means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() in plot.MARKS]
    assert means == [pytest.approx(74 + 1 / 3), pytest.approx(70)]
    assert [t.get_text() for t in axis.texts] == ["74.3 ± 7.5  (n = 3)", "70.0  (n = 1)"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["Model Zoo", "Multi-Head"]
    assert len({line.get_marker() for line in axis.lines if line.get_marker() in plot.MARKS}) == 2
    low, high = axis.get_xlim()
    assert 60 < low < 74.33333 - 7.45241 and 74.33333 + 7.45241 < high < 90
    assert axis.get_xlabel() == "average accuracy (%); mean over seeds, whisker and ±: 95 % interval, grey: each seed"


def test_dots_keep_their_text_where_the_interval_passes_100(tmp_path):
    """Once: the text stood where the interval ends, beyond the axis, and was clipped away."""
    figure = figure_of("dots", make_seeds(tmp_path, "zoo", [0.97, 0.999, 0.93]))
    figure.draw_without_rendering()
    (text,) = figure.axes[0].texts
    # mean 96.63, sd 3.465, half width 4.302653 x 3.465 / sqrt(3) = 8.6
    assert text.get_text() == "96.6 ± 8.6  (n = 3)"
    assert text.get_annotation_clip() is False
    assert figure.axes[0].bbox.x1 < text.get_window_extent().x0 < text.get_window_extent().x1 <= figure.bbox.x1


def test_compute_by_hand(tmp_path):
    """conv on digits of 28 x 28: 26 x 26, 11 x 11 and 3 x 3 places of 80 filters, and a head of 5 classes.

    A product is two operations; a step takes it three times, the first layer's twice: images have no gradient.
    """
    first, second, third, head = 26 * 26 * 80 * 9, 11 * 11 * 80 * 720, 3 * 3 * 80 * 720, 80 * 5
    row = 2 * (2 * first + 3 * second + 3 * third + 3 * head)
    assert row == 46_877_280
    runs = []
    for epochs, rows, finals in ((5, 500, (0.72, 0.7, 0.74)), (1, 100, (0.5, 0.6, 0.7))):
        for seed, x in enumerate(finals):
            cost = (1.0, rows, 40)
            settings = {"seed": seed, "epochs": epochs, "augment": epochs > 1}  # a single epoch is not augmented
            runs.append(make_run(tmp_path / f"{epochs}-{seed}", [[x]], cost=cost, **settings))
    other = make_run(tmp_path / "other", [[0.9]], method="multihead", epochs=5, augment=True, cost=(1.0, 200, 80))
    figure = figure_of("compute", [*runs, other])
    work, parameters, _ = figure.axes
    zoo, joint = work.lines
    assert list(zoo.get_xdata()) == [100 * row, 500 * row] and list(zoo.get_ydata()) == pytest.approx([60, 72])
    assert list(joint.get_xdata()) == [200 * row] and list(joint.get_ydata()) == pytest.approx([90])
    assert [list(line.get_xdata()) for line in parameters.lines] == [[40, 40], [80]]
    assert [text.get_text() for text in work.texts] == ["1", "5", "5"]
    assert work.get_xscale() == "log" and [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Model Zoo", "Multi-Head"]
    figure.canvas.draw()
    ticks = {text.get_text() for axis in (work, parameters) for text in axis.get_xticklabels(which="both")}
    assert {"10G", "20G", "50"} <= ticks and not any("$" in text for text in ticks)
    # The band of three seeds at 5 epochs: 72 ± 4.302653 x 2 / sqrt(3); whiskers where points stand above each other.
    band = work.collections[0].get_paths()[0].vertices[:, 1]
    assert max(band[band > 72]) == pytest.approx(60 + 24.8414) and 72 + 4.96828 in [pytest.approx(y) for y in band]
    assert len(parameters.collections) == 2


def test_no_two_lines_have_one_colour_and_mark():
    """Once, with nine methods: the eighth had the first's blue dots."""
    points = read_points([Path(__file__).parents[1] / "results/compute.csv"])
    lines = plot.draw("compute", [], points).axes[0].lines
    assert len(lines) == points["method"].nunique() > len(plot.COLOURS)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines)


@pytest.mark.parametrize(("first", "change"), [
    (0, lambda r: r["config"].update(model="perceptron")), (0, lambda r: r["config"].pop("model")),
    (1, lambda r: r.update(image_shape=[1, 8, 8])), (1, lambda r: r.update(rows_trained=None)),
])
def test_compute_leaves_out_networks_that_cannot_be_built(tmp_path, zoo, joint, capsys, first, change):
    """Once: tracebacks; the last two also where only a seed after the group's first is so."""
    others = [make_run(tmp_path / f"other{s}", [[0.5] * 3], s, method="multihead", lr=0.5) for s in range(2)]
    for folder in others[first:]:
        result = json.loads((folder / "result.json").read_text())
        change(result)
        (folder / "result.json").write_text(json.dumps(result))
    assert plot_of("compute", *zoo, joint[1], *others, "--file", tmp_path / "a.csv") == 0
    err = capsys.readouterr().err
    assert err.startswith("plot.py: skipped: Multi-Head, ") and err.count("\n") == 1
    assert "this kind of run has no place in the figure compute" in err
    assert read_points([tmp_path / "a.csv"])["method"].tolist() == ["Model Zoo", "Multi-Head"]
    assert plot_of("dots", *zoo, *others, "--file", tmp_path / "a.svg") == 0


def test_a_users_settings_and_backend_change_nothing(tmp_path, zoo, monkeypatch):
    """Once a figure had the user's colours, or was a traceback where a notebook's backend is not installed."""
    assert plot_of("matrix", *zoo, "--file", tmp_path / "a.svg") == 0
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plot_of("matrix", *zoo, "--file", tmp_path / "b.svg") == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    words = [sys.executable, "tools/plot.py", "matrix", *map(str, zoo), "--file", str(tmp_path / "c.svg")]
    done = subprocess.run(words, cwd=Path(plot.__file__).parents[1], capture_output=True, text=True,
                          env=os.environ | {"MPLBACKEND": "module://nowhere"})
    assert (done.returncode, done.stderr) == (0, "")


def test_confusion_leaves_out_runs_without_their_learners(tmp_path, zoo, capsys):
    (Path(zoo[0]) / "learners").mkdir()
    assert plot_of("confusion", zoo[0], "--file", tmp_path / "a.svg") == 2
    err = capsys.readouterr().err
    assert "this kind of run has no place in the figure confusion" in err and "ensemble" not in err


def test_a_task_that_comes_twice_has_two_confusions(tmp_path):
    """Once: a KeyError. The second run has other names and another order; its shares are the same."""
    tasks = {"all 0": ([0, 1], [[0.9, 0.1]] * 2), "right": ([2, 3], [[0.9, 0.1], [0.1, 0.9]]),
             "all 1": ([0, 1], [[0.1, 0.9]] * 2)}
    runs = []
    for order, keys in enumerate((["all 0", "right", "all 1"], ["right", "all 0", "all 1"])):
        labels, rows = zip(*map(tasks.get, keys), strict=True)
        folder = make_run(tmp_path / str(order), [[1.0 if key == "right" else 0.5 for key in keys]], method="multihead",
                          tasks=labels, task_order=order, names=["x", "y", "z"] if order else None)
        logits = tuple(torch.tensor(of_task).log() for of_task in rows)
        (folder / "learners").mkdir()
        save_learner(learner_path(folder, 0), Learner((0, 1, 2), logits, logits, 1.0, 10, 20))
        save_tensors(folder / "test_labels.pt", [torch.tensor([0, 1])] * 3)
        runs.append(folder)
    for folders in (runs[:1], runs):
        panels = figure_of("confusion", folders).axes[:3]
        assert [axis.get_title() for axis in panels] == ["0 1", "2 3", "0 1"]
        assert [[text.get_text() for text in axis.texts] for axis in panels] == [
            ["100", "0", "100", "0"], ["100", "0", "0", "100"], ["0", "100", "0", "100"]]


def test_compute_leaves_out_what_does_not_say_its_cost(tmp_path, zoo, capsys):
    unknown = make_run(tmp_path / "own", [[0.5, 0.5, 0.5]], dataset="npz", method="multihead")
    assert plot_of("compute", *zoo, unknown, "--file", tmp_path / "a.csv") == 0  # one group alone, to be joined later
    assert "Multi-Head: this kind of run has no place in the figure compute" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path, zoo, capsys, monkeypatch):
    file = tmp_path / "a.svg"
    file.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    assert plot_of("dots", *zoo, "--file", file) == 2
    assert f"{file}: cannot be written (No space left" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert file.read_text() == "before" and not list(tmp_path.glob(".*"))


def test_draws_show_shares_and_weights(zoo):
    figure = figure_of("draws", zoo)
    shares, weights = (axis.collections[0].get_array() for axis in figure.axes[:2])
    assert shares.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert weights.filled(math.nan)[2].tolist()[:2] == [0.5, 1.5]
    assert weights.mask.tolist() == [[True] * 3, [False, True, True], [False, False, True]]


def test_matrix_shows_means_of_what_was_seen(zoo, joint):
    figure = figure_of("matrix", [*zoo, joint[1]])
    shown = [[text.get_text() for text in axis.texts] for axis in figure.axes[:2]]
    assert shown == [["53.0", "63.0", "73.0", "65.0", "75.0", "83.0"], ["60.0", "70.0", "80.0"]]


@pytest.mark.parametrize(("kind", "ending"), [
    *((k, "svg") for k in [*plot.KINDS, "schematic"] if k != "confusion"), ("seen", "png"), ("seen", "pdf"),
])
def test_every_kind_becomes_the_same_file_every_time(tmp_path, capsys, zoo, isolated, joint, kind, ending):
    runs = {"joint": joint, "draws": zoo, "schematic": []}.get(kind, zoo + isolated)
    files = [tmp_path / f"{i}.{ending}" for i in range(1 + (ending == "svg"))]
    for file in files:
        assert plot_of(kind, *runs, "--file", file) == 0
    data = files[0].read_bytes()
    assert data.startswith(MAGIC[ending])
    assert all(file.read_bytes() == data for file in files)
    assert capsys.readouterr() == ("", "")


def test_many_tasks_have_their_names(tmp_path):
    names = [f"superclass number {t}, and a long name" for t in range(23)]
    folders = [make_run(tmp_path / f"{s}", [[0.5] * 23] * 23, seed=s, names=names) for s in range(2)]
    for kind in ("methods", "seen", "matrix", "draws"):
        assert plot.save(figure_of(kind, folders), "png").startswith(MAGIC["png"])
    assert figure_of("seen", folders).axes[22].get_title() == "superclass number 22, and…"


def test_what_does_not_fit_costs_a_line(tmp_path, capsys, zoo, joint):
    out = tmp_path / "figure.svg"
    other = make_run(tmp_path / "two", [[0.5] * 2] * 2)
    assert plot_of("seen", *zoo, other, joint[1], "--file", out) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "not over the same tasks as Model Zoo, 3 tasks of toy" in lines[0]
    assert "Multi-Head: this kind of run has no place in the figure seen" in lines[1]
    faster = make_run(tmp_path / "faster", [[0.5] * 2], method="multihead", lr=0.1)
    assert plot_of("joint", *joint, faster, "--file", out) == 0
    assert "or settings differ" in capsys.readouterr().err
    # Once: alike on the first task, on which the first run is, and then not.
    fork = make_run(tmp_path / "fork", [[0.2, 0.1]], method="multihead", tasks=[[0, 1], [4, 5]])
    chosen, (line,) = plot.choose("joint", group_runs([read_run(run) for run in [*joint, fork]])[0])
    assert len(chosen) == 3 and "do not begin alike" in line


def test_dollars_in_names_are_no_mathematics(tmp_path):
    """Once: a traceback, or italics."""
    run = make_run(tmp_path / "run", [[0.5, 0.5]] * 2, names=["$_$ b", "costs $5 to $10"])
    for kind in ("methods", "seen", "matrix", "draws", "dots"):
        assert plot.save(figure_of(kind, [run]), "png").startswith(MAGIC["png"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["seen", "nowhere", "--file", "a.png"], "no such run folder"), (["pie", "--file", "a.png"], "invalid choice"),
    (["seen", "--file", "a.png"], "no run folder"), (["seen", "zoo0"], "required"),
    (["seen", "zoo0", "--file", "a.jpg"], "must end in .svg, .pdf, .png"),
    (["seen", "zoo0", "--file", "no/a.png"], "cannot be written"), (["draws", "iso", "--file", "a.png"], "nothing to"),
    (["seen", "iso", "--file", "a.png"], "nothing to draw"), (["joint", "joint1", "--file", "a.png"], "nothing to"),
])
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, zoo, isolated, joint, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert plot_of(*arguments) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.err.count("\n") == 1
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("package", ["matplotlib", "pandas"])
def test_missing_packages_are_one_line(tmp_path, capsys, monkeypatch, zoo, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert plot_of("seen", *zoo, "--file", tmp_path / "a.png") == 2
    assert capsys.readouterr().err == f"plot.py: {package} is not installed: pip install -r requirements.txt\n"


def test_groups_over_other_tasks_and_single_tasks_have_their_places(tmp_path):
    folders = make_seeds(tmp_path, "zoo", [0.5, 0.6]) + [make_run(tmp_path / "one", [[0.5]])]
    groups = group_runs([read_run(folder) for folder in folders])[0]
    assert plot.choose("dots", groups)[0] == groups[:1]
    assert plot.save(plot.draw("seen", groups[1:]), "svg").startswith(MAGIC["svg"])


def test_dots_have_whiskers_of_the_interval_and_a_dot_for_each_seed(zoo):
    axis = figure_of("dots", zoo).axes[0]
    (whisker,) = axis.containers[-1].lines[2][0].get_segments()
    # mean 74.333, sd 3, n = 3: half width 4.302653 x 3 / sqrt(3) = 7.45241
    assert whisker[:, 0].tolist() == pytest.approx([74.33333 - 7.45241, 74.33333 + 7.45241])
    dots = axis.collections[0].get_offsets()
    assert dots[:, 0].tolist() == pytest.approx([71.33333, 74.33333, 77.33333])


def test_matrix_has_every_number_in_its_cell_and_rounds_from_1_down(zoo, joint):
    figure = figure_of("matrix", [*zoo, joint[1]])
    axis = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert (cells[0.5, 1.5], cells[1.5, 1.5], cells[0.5, 2.5], cells[2.5, 2.5]) == ("63.0", "73.0", "65.0", "83.0")
    for panel, rows in zip(figure.axes, ([[53], [63, 73], [65, 75, 83]], [[60, 70, 80]]), strict=False):
        shown = panel.collections[0].get_array()
        assert [row.compressed().tolist() for row in shown] == [pytest.approx(row) for row in rows]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "3"] and axis.get_ylim() == (3, 0)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0 1", "2 3", "4 5"]
    assert [panel.get_title() for panel in figure.axes[:2]] == ["Model Zoo", "Multi-Head"]


def test_draws_are_means_over_seeds(tmp_path, zoo):
    """Weights 0.5 and 1.5 in round 3 of three seeds; here the last seed's are 3.5 and 1.5, and it drew task 1."""
    file = zoo[2] / "result.json"
    result = json.loads(file.read_text())
    result["rounds"][2] |= {"weights": [3.5, 1.5], "tasks": [1, 2]}
    file.write_text(json.dumps(result))
    shares, weights = (axis.collections[0].get_array() for axis in figure_of("draws", zoo).axes[:2])
    assert shares[2].tolist() == pytest.approx([2 / 3, 1 / 3, 1])
    assert weights[2].compressed().tolist() == pytest.approx([1.5, 1.5])


def test_isolated_has_a_whisker_of_the_interval(tmp_path, zoo):
    isolated = [make_run(tmp_path / f"iso{s}", [[0.5 + 0.03 * s] * 3] * 3, s, tasks_per_round=1) for s in range(3)]
    axis = figure_of("seen", zoo + isolated).axes[1]
    ((low, high),) = axis.collections[-1].get_segments()
    # mean 53, sd 3, n = 3: half width 7.45241; at the task's own place, the second
    assert [*low, *high] == pytest.approx([2, 53 - 7.45241, 2, 53 + 7.45241])


def test_methods_draws_each_task_and_the_mean_of_those_seen(zoo, isolated, joint):
    """A panel per method; the zoo's rows are 53; 63, 73; 65, 75, 83 as means over its three seeds."""
    figure = figure_of("methods", [*zoo, *isolated, joint[1]])
    first, second, third = figure.axes[:3]
    assert [axis.get_title().splitlines() for axis in (first, second, third)] == [
        ["Model Zoo", "53.0 → 74.3 ± 7.5"], ["Isolated", "50.0 → 60.0"], ["Multi-Head", "at the end 70.0"]]
    *tasks, mean = first.lines
    assert [list(line.get_xdata()) for line in tasks] == [[1, 2, 3], [2, 3], [3]]
    assert [list(line.get_ydata()) for line in tasks] == [pytest.approx(y) for y in ([53, 63, 65], [73, 75], [83])]
    assert list(mean.get_ydata()) == pytest.approx([53, 68, 74 + 1 / 3])
    band = first.collections[-1].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (pytest.approx(53 - 7.45241), pytest.approx(74.33333 + 7.45241))
    assert list(second.lines[-1].get_ydata()) == pytest.approx([50, 55, 60])
    assert list(third.lines[0].get_ydata()) == pytest.approx([70, 70])  # nothing arrives: its end, all along
    assert "95 % interval" in figure.get_suptitle()


def test_one_seed_has_neither_band_nor_mean_over_seeds(zoo, isolated):
    figures = [figure_of(kind, [zoo[0], *isolated][: 1 + (kind != "draws")]) for kind in plot.KINDS
               if kind not in ("joint", "confusion")]
    for figure in figures:
        figure.draw_without_rendering()
        words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert not [text for text in words if "over seeds" in text or "interval" in text or "share" in text]
        assert figure.get_supxlabel().endswith("; 1 seed")


def test_every_figure_says_what_it_is_of(zoo):
    for kind in ("methods", "seen", "dots", "draws", "matrix"):
        assert figure_of(kind, zoo).get_supxlabel().splitlines()[-1] == "toy, 3 tasks; conv, 2 epochs; 3 seeds"


def test_what_has_no_curve_stands_at_its_end(tmp_path, zoo, joint):
    """A multi-task zoo has rounds, and is worth what it has after the last."""
    multi = make_run(tmp_path / "multi", [[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]], num_rounds=2, continual=False)
    figure = figure_of("methods", [joint[1], multi, zoo[0]])
    assert [axis.get_title().splitlines()[-1] for axis in figure.axes] == ["at the end 70.0", "at the end 80.0",
                                                                          "50.0 → 71.3"]
    assert list(figure.axes[1].lines[0].get_ydata()) == pytest.approx([80, 80])
    assert list(figure.axes[0].get_xlim()) == [0.5, 3.5]


def test_panels_that_do_not_fill_their_rows_have_numbers_below(tmp_path):
    runs = [make_run(tmp_path / f"{n}", [[0.5] * 3] * 3, lr=0.1 * n) for n in range(1, 6)]
    figure = figure_of("methods", runs)
    shown = [axis.get_visible() and axis.xaxis.get_tick_params()["labelbottom"] for axis in figure.axes]
    assert shown == [False, False, True, True, True, False]


def test_schematic_has_the_learners_that_speak_for_a_task():
    (axis,) = plot.draw("schematic", []).axes
    squares = [box for box in axis.patches if box.get_height() < 1]
    boxes = {(round(x), -round(y)): box.get_facecolor() for box in squares for x, y in [box.get_center()]}
    new, past = map(colors.to_rgba, (plot.COLOURS[1], plot.COLOURS[0]))
    trained = [[k + 1 for k in range(5) if boxes[t + 1, k] in (new, past)] for t in range(5)]
    assert trained == [[1, 2, 4], [2, 3, 5], [3, 4, 5], [4], [5]]
    assert all(boxes[t + 1, t] == new for t in range(5))
    assert "predict task 3:\nmean of learners\n3, 4 and 5" in [text.get_text() for text in axis.texts]


@pytest.fixture
def fonts(monkeypatch):
    """Makes a machine that has matplotlib's DejaVu Sans under other names, a font that went, and no other."""
    font_manager = pytest.importorskip("matplotlib.font_manager")
    own = Path(font_manager.findfont("DejaVu Sans"))

    def make(*files):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [
            font_manager.FontEntry(fname=str(own.with_name(file)), name=name, weight=400)
            for name, file in [("Gone", "gone.ttf"), ("Last Resort X", "LastResortHE-Regular.ttf"), *files]])

    plot._report_missing.cache_clear()
    return make


def test_letters_that_no_font_has_are_one_line(tmp_path, capsys, fonts):
    """Once: dozens of warnings."""
    fonts(("DejaVu Sans", "DejaVuSans.ttf"))
    run = make_run(tmp_path / "run", [[0.5] * 5] * 5, names=["grüße", "日本", "שלום", "e\u0301", "👍"])
    assert plot_of("methods", run, "--file", tmp_path / "a.png") == 0
    assert capsys.readouterr().err == ""  # the tasks' names are not in this figure
    for kind in ("matrix", "seen"):
        assert plot_of(kind, run, "--file", tmp_path / "a.png") == 0
        err = capsys.readouterr().err
        plot._report_missing.cache_clear()
        assert err == "plot.py: no font of this machine has 日本👍; install one that has, such as fonts-noto-cjk\n"


def test_letters_that_matplotlibs_font_lacks_come_from_another(fonts):
    fonts(("Another", "DejaVuSans.ttf"), ("DejaVu Sans", "cmr10.ttf"))  # as if its own had few letters
    assert plot.find_fonts("abc\n") == (["DejaVu Sans"], "")
    assert plot.find_fonts("aßж") == (["DejaVu Sans", "Another"], "")
    assert plot.find_fonts("aж日") == (["DejaVu Sans", "Another"], "日")


def test_texts_take_the_fonts_that_have_their_letters(tmp_path, fonts, capsys):
    fonts(("Another", "DejaVuSans.ttf"), ("DejaVu Sans", "cmr10.ttf"))
    run = make_run(tmp_path / "run", [[0.5] * 2] * 2, names=["ж", "b"])
    figure = figure_of("seen", [run])
    assert figure.axes[0].title.get_fontfamily() == ["DejaVu Sans", "Another"]
    plot.save(figure, "png")  # no warning, which would be an error
    assert capsys.readouterr() == ("", "")
