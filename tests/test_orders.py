"""--task_order: other orders of the tasks, and the means over them; predictions class by class."""
import io
import json

import numpy as np
import pandas as pd
import pytest

import modelzoo
import multihead
from tests.conftest import flags, write_yaml
from tests.runfolders import make_run
from tools import plot, report
from tools.runs import group_runs, load_frame, read_run
from utils.command import command, guard
from utils.config import read_settings
from utils.config_files import ConfigError


def order_of(workspace, order, *more):
    words = ["--task_order", str(order)] if order is not None else []
    return read_settings("x", "modelzoo", flags(workspace, "--continual", *words, *more))


@pytest.fixture
def many(workspace):
    """Seven tasks with names."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "names": list("abcdefg"),
                                         "tasks": [[t % 6, (t + 1) % 6] for t in range(7)]})
    return workspace


def test_an_order_is_a_permutation_of_tasks_and_names_that_its_seed_alone_decides(many):
    plain = order_of(many, None)
    assert order_of(many, 0) == plain and plain.names == tuple("abcdefg")
    found = set()
    for order in range(1, 6):
        s = order_of(many, order)
        assert s == order_of(many, order) and order_of(many, order, "--seed", "5").tasks == s.tasks
        assert sorted(zip(s.names, s.tasks, strict=True)) == list(zip(plain.names, plain.tasks, strict=True))
        assert s.name.endswith(f"-task_order={order}-seed=0")
        found.add(s.tasks)
    assert len(found) == 5 and plain.tasks not in found
    # On every machine and in every version: written down.
    assert "".join(order_of(many, 1).names) == ORDER_1
    words = flags(many, "--task_order", "1", "--num_tasks", "3")
    assert "".join(read_settings("x", "multihead", words).names) == ORDER_1[:3]
    with pytest.raises(ConfigError, match="--task_order: -1 must be at least 0"):
        order_of(many, -1)


ORDER_1 = "beacfgd"


def test_a_run_in_another_order(workspace, capsys):
    """Of the same tasks; a run is not gone on with in another order."""
    for order in (0, 1):
        words = flags(workspace, "--continual", "--task_order", str(order), "--name", f"zoo-{order}")
        assert command("x", "modelzoo", modelzoo.run, words) == 0
    results = [json.loads((workspace / f"runs/zoo-{order}/result.json").read_text()) for order in (0, 1)]
    first, second = (result["classes"] for result in results)
    assert sorted(first) == sorted(second) and first != second
    assert results[1]["config"]["task_order"] == 1
    capsys.readouterr()
    words = flags(workspace, "--continual", "--task_order", "0", "--name", "zoo-1", "--resume")
    assert command("x", "modelzoo", modelzoo.run, words) == 2
    assert "was run with" in capsys.readouterr().err


TASKS = [[0, 1], [2, 3], [4, 5]]


@pytest.fixture
def orders(tmp_path):
    """Two orders x two seeds of a zoo and of Isolated; finals by hand."""
    made = []
    for method, finals in (("zoo", [0.5, 0.7, 0.6, 0.8]), ("isolated", [0.4, 0.5, 0.5, 0.6])):
        for i, (order, seed) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            tasks = TASKS if order == 0 else [TASKS[2], TASKS[0], TASKS[1]]
            rows = [[finals[i]] * 3] * 3
            made.append(make_run(tmp_path / f"{method}-{order}-{seed}", rows, seed, tasks=tasks, task_order=order,
                                 tasks_per_round=2 if method == "zoo" else 1))
    return made


def test_runs_of_other_orders_are_one_group_and_the_report_says_so(orders, capsys):
    groups, notes = group_runs([read_run(path) for path in reversed(orders)])
    assert [(g.label, len(g.runs)) for g in groups] == [("Isolated", 4), ("Model Zoo", 4)] and not notes
    assert [(run.order, run.seed) for run in groups[1].runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert guard("report.py", lambda: report.main(list(map(str, orders)))) == 0
    out, err = capsys.readouterr()
    assert "Model Zoo: n = 4 runs are of 2 orders of the tasks" in out + err
    assert "0 1 0 in order 1 1 in order 1" in out
    assert guard("report.py", lambda: report.main([*map(str, orders), "--format", "csv"])) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    means = frame[(frame["metric"] == "average_accuracy") & frame["minus"].isna()].set_index("group")["mean"]
    assert means.to_dict() == pytest.approx({
        "Model Zoo": 0.65, "Isolated": 0.5, "Model Zoo, task_order 0": 0.6, "Model Zoo, task_order 1": 0.7,
        "Isolated, task_order 0": 0.45, "Isolated, task_order 1": 0.55})
    # Pairs share the seed and the order: 0.1, 0.2, 0.1, 0.2.
    (pair,) = frame[(frame["metric"] == "average_accuracy") & frame["minus"].notna()].itertuples()
    assert (pair.group, pair.test, int(pair.n)) == ("Model Zoo", "paired", 4) and pair.mean == pytest.approx(0.15)


def test_the_same_seed_and_order_of_two_files_are_two_groups(tmp_path):
    a = make_run(tmp_path / "a", [[0.5] * 3] * 3, tasks=TASKS)
    b = make_run(tmp_path / "b", [[0.6] * 3] * 3, tasks=TASKS[::-1])
    groups, _ = group_runs([read_run(a), read_run(b)])
    assert len(groups) == 2


def test_figures_of_several_orders_name_places_not_tasks(orders):
    groups, _ = group_runs([read_run(path) for path in orders])
    chosen, skipped = plot.choose("matrix", groups)
    assert len(chosen) == 2 and not skipped
    texts = [text.get_text() for text in plot.draw("matrix", chosen).axes[0].get_xticklabels()]
    assert texts == ["task 1 to come", "task 2 to come", "task 3 to come"]


# -- class by class


@pytest.fixture
def trained(workspace):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3, 4]]})
    for seed in ("0", "1"):
        words = flags(workspace, "--continual", "--seed", seed, "--name", seed, "--epochs", "1")
        assert command("x", "modelzoo", modelzoo.run, words) == 0
    return [workspace / "runs/0", workspace / "runs/1"]


def test_accuracy_per_class_and_confusion_from_the_stored_predictions(trained):
    frame = load_frame(trained, rows="class")
    assert list(frame["class"]) == ["0", "1", "2", "3", "4"] * 2 and set(frame["rows"]) == {5}
    for folder in trained:
        zoo = modelzoo.Zoo.load(folder, "cpu")
        for t in range(2):
            predicted, labels = zoo.predict_log_probs(t).argmax(1).numpy(), zoo.test_labels[t].numpy()
            rows = frame[(frame["run"] == str(folder)) & (frame["task"] == t)]
            for c, (_, row) in enumerate(rows.iterrows()):
                assert row["accuracy"] == pytest.approx((predicted[labels == c] == c).mean())
                counts = np.bincount(predicted[labels == c], minlength=len(rows))
                assert [row[f"as_{i}"] for i in range(len(rows))] == counts.tolist()
    # Classes of equal size: their mean is the task's accuracy.
    means = frame.groupby(["run", "task"])["accuracy"].mean()
    tasks = load_frame(trained, rows="task").set_index(["run", "task"])["accuracy"]
    assert means.to_dict() == pytest.approx(tasks.to_dict())


def test_the_figure_shows_shares_of_a_classs_test_rows(trained, tmp_path, capsys):
    file = tmp_path / "a.png"
    assert guard("plot.py", lambda: plot.main(["confusion", *map(str, trained), "--file", str(file)])) == 0
    assert file.stat().st_size > 1000 and not capsys.readouterr().err
    figure = plot.draw("confusion", group_runs([read_run(path) for path in trained])[0])
    shown = [float(text.get_text()) for text in figure.axes[0].texts]
    assert shown[0] + shown[1] == pytest.approx(100, abs=1) and len(shown) == 4
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["2", "3", "4"]


def test_a_run_without_predictions_has_no_confusion(tmp_path, capsys):
    folder = make_run(tmp_path / "a", [[0.5, 0.5]] * 2)
    assert guard("plot.py", lambda: plot.main(["confusion", str(folder), "--file", str(tmp_path / "a.png")])) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_multihead_has_classes_too(workspace):
    assert command("x", "multihead", multihead.run, flags(workspace, "--name", "a")) == 0
    assert len(load_frame(workspace / "runs/a", rows="class")) == 6
