"""tools/report.py --ensemble: averaged predictions by hand, damaged run folders, and real runs of every kind."""
import json
import shutil

import numpy as np
import pytest
import torch

import modelzoo
import multihead
from tests.commands import start
from tests.conftest import make_arrays
from tests.runfolders import assert_one_line, make_predictions, make_run, report_of, squeeze
from tools.runs import load_log_probs, make_ensemble, read_run
from utils.command import command
from utils.learner import Learner, learner_path, save_learner
from utils.run_folder import save_tensors

A = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]
B = [[0.4, 0.6], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]]
LABELS = [0, 1, 1, 0]  # A is right on rows 0, 2 and 3, B on row 1; their mean (.65 .45 .45 .45 for class 0) on 0, 1, 2


def make_pair(tmp_path, **config):
    a = make_predictions(make_run(tmp_path / "a", [[0.75]], 0, **config), [A], LABELS)
    return a, make_predictions(make_run(tmp_path / "b", [[0.25]], 1, **config), [B], LABELS)


def test_ensemble_by_hand(tmp_path):
    run = make_ensemble(make_pair(tmp_path, tasks_per_round=1))
    assert run.kind == "ensemble of 2 Isolated"
    assert run.matrix == [[0.75]]
    assert run.seed == (0, 1)
    assert run.cost == {"networks": 2, "seconds": 4.0, "rows_trained": 600, "parameters": 80, "stored_rows": None}
    assert make_ensemble(make_pair(tmp_path / "joint", method="multihead")).kind == "ensemble of 2 Multi-Head"
    # Once: one that inherits and one that does not were two of the paper's Isolated.
    inherits = make_run(tmp_path / "inherits", [[0.75]], tasks_per_round=1, inherit=True)
    make_predictions(inherits, [A], LABELS)
    assert make_ensemble([inherits, tmp_path / "b"]).kind == "ensemble of 2 runs"


def test_ensemble_stands_beside_other_groups(tmp_path, capsys):
    pair = make_pair(tmp_path, tasks_per_round=1)
    assert report_of(*pair, "--ensemble", *pair, "--format", "markdown") == 0
    out = squeeze(capsys.readouterr().out)
    assert "| ensemble of 2 Isolated | 1 | 75.00 | – | – | – | 2.0 | 600 | 80 | 4 |" in out
    assert "| ensemble of 2 Isolated | 0+1 |" in out
    assert report_of("--ensemble", *pair) == 0


def test_ensembles_are_a_group_and_told_when_they_share_runs(tmp_path, capsys):
    pair = make_pair(tmp_path, tasks_per_round=1)
    third = make_predictions(make_run(tmp_path / "c", [[0.75]], 2, tasks_per_round=1), [A], LABELS)
    assert report_of("--ensemble", *pair, "--ensemble", pair[0], third) == 0
    out = capsys.readouterr().out
    assert "the ensembles share runs" in out
    assert "ensemble of 2 Isolated: n = 2" in out


@pytest.mark.parametrize(("breakage", "message"), [
    (lambda a, b: (b / "test_labels.pt").unlink(), "test_labels.pt: cannot be read"),
    (lambda a, b: (b / "learners" / "000.pt").unlink(), "000.pt: cannot be read"),
    (lambda a, b: (b / "learners" / "000.pt").write_bytes(b"PK\x03\x04 cut"), "damaged or foreign"),
    (lambda a, b: (b / "learners" / "000.pt").write_bytes(b"cos\nsystem\n(S'touch EXECUTED'\ntR."), "damaged"),
    (lambda a, b: save_tensors(b / "test_labels.pt", [torch.tensor([0, 1])]), "damaged or foreign"),
    (lambda a, b: save_tensors(b / "test_labels.pt", 7), "damaged or foreign"),
    (lambda a, b: shutil.copy(a / "learners" / "000.pt", b / "learners"), "do not have the accuracy"),
    (lambda a, b: save_tensors(b / "learners" / "000.pt", {"tasks": [1]}), "damaged or foreign"),
])
def test_ensemble_of_damaged_runs_is_one_line(tmp_path, capsys, monkeypatch, breakage, message):
    monkeypatch.chdir(tmp_path)
    a, b = make_pair(tmp_path)
    breakage(a, b)
    assert report_of("--ensemble", a, b) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "EXECUTED").exists()
    assert report_of(a, "--ensemble", a, b) == 0  # the rest goes on
    assert message in capsys.readouterr().err


def test_ensemble_refuses_other_tasks_other_rows_and_twins(tmp_path, capsys):
    a, b = make_pair(tmp_path)
    other = make_run(tmp_path / "other", [[0.5, 0.5]] * 2)
    assert report_of("--ensemble", a, other) == 2
    assert_one_line(capsys, "are not over the same tasks")
    assert report_of("--ensemble", a, a) == 2
    assert_one_line(capsys, "are the same run")
    save_tensors(b / "test_labels.pt", [torch.tensor([0, 0, 1, 1])])  # B is right on one row of four here, too
    assert report_of("--ensemble", a, b) == 2
    assert_one_line(capsys, "were tested on different rows")


@pytest.fixture
def one_thread():
    """Networks this small wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_real_runs_of_every_kind_end_to_end(tmp_path, capsys):
    """A run's stored predictions give its own accuracy again, whatever weights its learners have."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 8), ("test", 6)):
        labels = np.repeat(np.arange(4), n).astype(np.uint8)
        images = 50 * labels[:, None, None] + random.integers(0, 100, (len(labels), 24, 24))
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "toy.npz", **arrays)
    (tmp_path / "data.yaml").write_text("dataset: npz\npath: toy.npz\ntasks: [[0, 1], [2, 3], [0, 3]]\n")
    (tmp_path / "hp.yaml").write_text("{model: conv, batch: 8, lr: 0.01, l2_reg: 0, dropout: 0}")
    flags = ["--data_config", str(tmp_path / "data.yaml"), "--hp_config", str(tmp_path / "hp.yaml"), "--data_dir",
             str(tmp_path), "--out", str(tmp_path / "runs"), "--epochs", "1", "--device", "cpu"]
    zoo = ["modelzoo.py", "modelzoo", modelzoo.run]
    joint = ["multihead.py", "multihead", multihead.run]
    for script, more in ((zoo, ["--continual"]), (zoo, ["--continual", "--replay_frac", "0.5"]), (joint, []),
                         (zoo, ["--continual", "--weigh_by_round"]),
                         (zoo, ["--num_rounds", "2", "--tasks_per_round", "2", "--warm_start"]),
                         (joint, ["--num_tasks", "2"])):
        assert command(*script, flags + more) == 0
    for folder in (tmp_path / "runs").iterdir():
        run, ensemble = read_run(folder), make_ensemble([folder])
        assert ensemble.matrix == [pytest.approx(run.matrix[-1], abs=1e-12)]
        result = json.loads((folder / "result.json").read_text())
        assert run.metrics()["average_accuracy"] == result["average_accuracy"]
        if "num_tasks" in folder.name:
            assert len(result["classes"]) == 2
            assert result["rows_trained"] == 2 * 2 * 8
        elif result["method"] == "multihead":
            assert result["rows_trained"] == 3 * 2 * 8
        elif "warm_start" in folder.name:
            assert result["rows_trained"] == (3 + 2 + 2) * 2 * 8
            assert run.cost["networks"] == pytest.approx((3 + 2 + 2) / 3)
        elif "replay_frac" in folder.name:
            # 16 rows of the new task; of each past one 8, repeated max(floor(1 / ((n - 1) 0.5)), 1) = 2, 1 times
            assert result["rows_trained"] == 16 + (16 + 2 * 8) + (16 + 2 * 8)
        else:
            assert result["rows_trained"] == (1 + 2 + 3) * 16
    capsys.readouterr()
    assert command(*joint, [*flags, "--num_tasks", "4"]) == 2
    assert_one_line(capsys, "--num_tasks: 4 must be at most 3")


def test_ensemble_averages_probabilities_and_not_their_logarithms(tmp_path):
    """Class 0 has (0.99 + 0.3 + 0.2) / 3 = 0.497 and loses; by the product, 0.0594 to 0.0056, it would win."""
    folders = [make_predictions(make_run(tmp_path / f"{s}", [[float(p < 0.5)]], s), [[[p, 1 - p]]], [1])
               for s, p in enumerate((0.99, 0.3, 0.2))]
    assert make_ensemble(folders).matrix == [[1.0]]


def test_members_of_limited_replay_weigh_their_learners_as_the_run_did(tmp_path):
    """r = 1/4: a task's first learner weighs 4. Class 0 of task 0 has (4 x 0.7 + 0.1) / 5 = 0.58; equally 0.4."""
    folder = make_run(tmp_path / "zoo", [[1.0, 0], [1.0, 1.0]], replay_frac=0.25)
    (folder / "learners").mkdir()
    for k, rows in enumerate(([[0.7, 0.3]], [[0.1, 0.9], [0.8, 0.2]])):
        logits = tuple(torch.tensor([row]).log() for row in rows)
        save_learner(learner_path(folder, k), Learner(tuple(range(k + 1)), logits, logits, 1.0, 10, 20))
    save_tensors(folder / "test_labels.pt", [torch.tensor([0]), torch.tensor([0])])
    predictions, _ = load_log_probs(read_run(folder))
    assert predictions[0].exp()[0].tolist() == pytest.approx([0.58, 0.42])


def test_a_task_that_no_learner_knows_has_the_accuracy_of_a_guess(workspace):
    """Once it was that of class 0, here 5 of 6 test rows, and the run was called damaged."""
    arrays = make_arrays()
    keep = np.ones(30, bool)
    for label in (1, 3, 5):
        keep[np.flatnonzero(arrays["test_labels"] == label)[1:]] = False
    test = {key: arrays[key][keep] for key in ("test_images", "test_labels")}
    np.savez(workspace / "data/toy.npz", **arrays | test)
    result = start(workspace, "a", "--num_rounds", "1", "--tasks_per_round", "1")
    log_probs, _ = load_log_probs(read_run(workspace / "runs/a"))
    guessed = [t for t in range(3) if t not in result["rounds"][0]["tasks"]]
    assert [result["accuracy"][t] for t in guessed] == [0.5, 0.5]
    assert all(log_probs[t].exp().eq(0.5).all() for t in guessed)


def test_an_ensemble_keeps_the_order_of_its_members_tasks_and_none_of_no_rows(tmp_path):
    """Once: ensembles in another order stood beside those in the file's, and four times no rows were unknown."""
    pair = make_pair(tmp_path, tasks_per_round=1, task_order=3)
    for folder in pair:
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"stored_rows": 0}))
    run = make_ensemble(pair)
    assert (run.order, run.trial, run.cost["stored_rows"]) == (3, "(0, 1) in order 3", 0)
