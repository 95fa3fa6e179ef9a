"""--dry_run: rows, steps, time and memory by hand; no run folder is written."""
import math
import re
from pathlib import Path

import pytest

from tests.commands import MAIN, start
from tests.conftest import flags, write_yaml
from utils import command as cli
from utils import dry_run, run_net
from utils.config import read_settings
from utils.run import plan_rounds, prepare


def try_out(workspace, *more, method="modelzoo"):
    """Exit status of a command with --dry_run."""
    return cli.command(f"{method}.py", method, MAIN[method], flags(workspace, "--dry_run", *more))


def files(workspace):
    return {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}


def test_a_dry_run_by_hand(workspace, monkeypatch, capsys):
    """3 tasks of 20 training and 10 test rows; learners of 1, 2 and 3 of them; 2 epochs; batches of 8."""
    monkeypatch.setattr(dry_run, "time_step", lambda net, settings, precision, train, most, size: float(size))
    monkeypatch.setattr(dry_run, "time_prediction", lambda *_: 0.5)
    before = files(workspace)
    assert try_out(workspace, "--continual") == 0
    assert files(workspace) == before
    out = capsys.readouterr().out
    # 20, 40 and 60 rows an epoch are 3 (the last of 4), 5 and 8 (the last of 4) steps; a row costs a second here, and
    # half a second once more afterwards (batch norm), like each of 30 rows a task: 65, 130 and 195 s.
    assert "240 rows in 32 steps, about 2 min per round (1 min to 3 min), 6 min in all (8000.0 ms per batch of 8" in out
    # images of 24 x 24, 90 rows; logits of two classes, 30 rows for each of 6 tasks learned, 4 bytes each
    assert f"images {90 * 24 * 24 / 1e6:.1f} MB, learners' files {6 * 30 * 2 * 4 / 1e6:.1f} MB\n" in out
    assert out.endswith("the run folder is free\n")
    # With 4 of a task's 20 rows held out, batch norm's share is of each of the 2 epochs, and so is the prediction of
    # these 4: 32 + 16 + 13 + 4 = 65, 130 and 195 s.
    assert try_out(workspace, "--continual", "--val_frac", "0.2") == 0
    out = capsys.readouterr().out
    assert "192 rows in 24 steps, about 2 min per round (1 min to 3 min), 6 min in all" in out
    assert f"images {90 * 24 * 24 / 1e6:.1f} MB" in out


def test_a_dry_run_of_limited_replay_and_of_a_warm_start(workspace):
    def plan(*more):
        settings = read_settings("x", "modelzoo", flags(workspace, *more))
        return plan_rounds(settings, prepare(settings)[2])

    # a fifth of 20 rows, five times (floor(1 / 0.2)) with one past task, twice (floor(1 / 0.4)) with two
    assert plan("--continual", "--replay_frac", "0.2") == [(1, 20), (2, 40), (3, 20 + 2 * 8)]
    assert plan("--continual", "--tasks_per_round", "1") == [(1, 20)] * 3
    assert plan("--warm_start", "--num_rounds", "2", "--tasks_per_round", "2") == [(3, 60), (2, 40), (2, 40)]
    # what a run then trains on, is that
    result = start(workspace, "a", "--continual", "--replay_frac", "0.2")
    assert result["rows_trained"] == 2 * (20 + 40 + 36)


def test_a_dry_run_says_what_becomes_of_a_folder_that_is_there(workspace, capsys):
    start(workspace, "a", "--continual")
    (workspace / "runs/a/learners/002.pt").unlink()
    before = files(workspace)
    capsys.readouterr()
    assert try_out(workspace, "--name", "a", "--continual") == 0
    assert "would be refused: " in (out := capsys.readouterr().out) and "already exists: --resume goes on with" in out
    assert try_out(workspace, "--name", "a", "--continual", "--resume") == 0
    out = capsys.readouterr().out
    assert out.endswith("2 of 3 rounds found\n") and " in all that is left " in out
    assert try_out(workspace, "--name", "a", "--continual", "--resume", "--seed", "1") == 0
    assert "would be refused: --resume: " in (out := capsys.readouterr().out) and "with seed 0, not 1" in out
    assert files(workspace) == before


def test_a_dry_run_counts_what_is_left(workspace, capsys):
    """Of an extended run the new learners; a warm start that is there is one of those found."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3]]})
    start(workspace, "old", "--continual")
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]]})
    assert try_out(workspace, "--continual", "--extend", str(workspace / "runs/old")) == 0
    assert "written: 120 rows in 16 steps" in (out := capsys.readouterr().out) and " in all that is left " in out
    words = ("--warm_start", "--num_rounds", "2", "--tasks_per_round", "2")
    start(workspace, "warm", *words)
    (workspace / "runs/warm/learners/001.pt").unlink()
    capsys.readouterr()
    assert try_out(workspace, "--name", "warm", "--resume", *words) == 0
    assert "written: 80 rows in 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize("model, batch", [("conv", 8), ("wrn16_4", 7)])
def test_a_dry_run_times_real_steps(workspace, capsys, monkeypatch, model, batch):
    monkeypatch.setattr(run_net, "renew_batch_norm", lambda *_: pytest.fail("timed with the steps"))
    hyper = {"model": model, "batch": batch, "lr": 0.01, "l2_reg": 0, "dropout": 0.1, "epochs": 2, "augment": True}
    write_yaml(workspace / "hp.yaml", hyper)
    assert try_out(workspace, method="multihead") == 0
    out = capsys.readouterr().out
    ms, size = re.search(r"\(([\d.]+) ms per batch of (\d+)\)", out).groups()
    assert int(size) == batch and 0 < float(ms) < 60_000
    assert f"120 rows in {2 * math.ceil(60 / batch)} steps" in out


def test_a_dry_run_refuses_what_the_run_would_refuse(workspace, capsys):
    assert try_out(workspace, "--epochs", "0") == 2
    assert try_out(workspace, "--continual", "--extend", str(workspace / "nowhere")) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not Path(workspace / "runs").exists()


@pytest.mark.parametrize("seconds, words", [
    (0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (60, "1 min"), (3569, "59 min"), (3600, "1 h 0 min"),
    (7500, "2 h 5 min"),
])
def test_times_in_words(seconds, words):
    assert dry_run.clock(seconds) == words
