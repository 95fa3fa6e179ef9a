"""What people see of a run, and what is kept of it: lines, bars, tables, TensorBoard events."""
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from wcwidth import wcswidth

from tests.commands import start
from tests.conftest import flags, write_yaml
from utils import log
from utils.config import read_settings
from utils.config_files import ConfigError
from utils.log import RunLog, print_result, shorten

ROOT = Path(__file__).parent.parent


def test_output_names_tasks_and_says_where_everything_is(workspace, capsys):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]],
                                         "names": ["night", "dusk [early]", "day"]})
    result = start(workspace, "a", "--continual")
    out = capsys.readouterr().out
    assert "\x1b" not in out  # not a terminal: no bars, no colours
    mean = 100 * result["accuracy_matrix"][0][0]
    assert f"\nround 1/3   {mean:6.2f} %   " in out and " s   new: night\n" in out
    assert "   new: day   with: " in out
    assert "2 day" in out and "1 dusk [early]" in out and str(workspace / "runs/a") in out
    for key in ("average accuracy", "learning accuracy", "forgetting", "backward transfer"):
        assert key in out


def read_events(folder):
    """{TensorBoard run: {tag: [(step, value)]}} of a run folder."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for part in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(part)).Reload()
        found[part.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def test_tensorboard_holds_what_the_log_holds(workspace):
    start(workspace, "a", "--continual", "--tensorboard")
    folder = workspace / "runs" / "a"
    expected = {}
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        which, step = f"learner_{line['round']:03}" if "epoch" in line else "zoo", line.get("epoch", line["round"])
        for key, value in line.items():
            if key == "accuracy":
                for t, x in enumerate(value):
                    tag = f"accuracy/{t} {('0 1', '2 3', '4 5')[t]}"
                    expected[which].setdefault(tag, []).append((step, pytest.approx(x)))
            elif key not in ("round", "epoch", "tasks"):
                expected.setdefault(which, {}).setdefault(key, []).append((step, pytest.approx(value)))
    assert read_events(folder) == expected
    assert set(expected) == {"zoo", "learner_000", "learner_001", "learner_002"}
    # A learner that is trained again takes its numbers back first.
    (folder / "result.json").unlink()
    (folder / "learners" / "002.pt").unlink()
    start(workspace, "a", "--continual", "--tensorboard", "--resume")
    again = read_events(folder)
    assert set(again) == set(expected)
    assert again["learner_002"]["train_loss"] == expected["learner_002"]["train_loss"]
    assert [step for step, _ in again["zoo"]["test_accuracy"]] == [0, 1, 2]


def test_points_of_a_curve_are_in_order_whatever_happened(workspace):
    """Once: 12 rounds came as 0, 5 ... 11, 1 ... 4, by the names of a curve's several files."""
    more = ("--num_rounds", "12", "--tasks_per_round", "1", "--epochs", "1", "--samples", "5", "--tensorboard")
    folder = workspace / "runs" / "a"

    def check(epochs=1):
        found = read_events(folder)
        assert [step for step, _ in found["zoo"]["test_accuracy"]] == list(range(12))
        assert all(len(found[f"learner_{k:03}"]["train_loss"]) == epochs for k in range(12))
        assert {len(list(part.iterdir())) for part in (folder / "tensorboard").iterdir()} == {1}

    start(workspace, "a", *more)
    check()
    start(workspace, "a", *more, "--resume")
    check()
    (folder / "learners" / "003.pt").write_bytes(b"damaged")  # trained again after the others are found
    (folder / "learners" / "007.pt").unlink()
    start(workspace, "a", *more, "--resume")
    check()


def test_tensorboard_without_the_package_is_one_line(workspace, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--tensorboard: .*pip install tensorboard"):
        read_settings("x", "multihead", flags(workspace, "--tensorboard"))


def test_table_of_a_result_by_hand(capsys):
    """Task 0 falls from 90 to 70 %, task 1 rises from 50 to 80 %, task 2 is new."""
    result = {"accuracy": [0.7, 0.8, 0.4], "accuracy_matrix": [[0.9, None, None], [0.6, 0.5, None], [0.7, 0.8, 0.4]],
              "rounds": [{"tasks": [0]}, {"tasks": [0, 1]}, {"tasks": [1, 2]}], "average_accuracy": 1.9 / 3,
              "learning_accuracy": 0.6, "forgetting": -0.05, "backward_transfer": None, "seconds": 12.34}
    print_result(result, ["night", "dusk", "day"], "runs/a")
    out = " ".join(capsys.readouterr().out.split())
    assert "0 night 90.00 70.00 -20.00 1 dusk 50.00 80.00 +30.00 2 day 40.00 40.00 +0.00" in out
    assert "average accuracy 63.33 % learning accuracy 60.00 % forgetting -5.00 % seconds 12.3 run folder runs/a" in out


class Clock:
    """A clock that moves by hand, in the place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Loss:
    """A sum of losses that counts how often it is read, which on a GPU waits for the device."""

    def __init__(self):
        self.read = 0

    def item(self):
        self.read += 1
        return 30.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def watch(run_log, clock, batches=10, rows=10, seconds=5.0):
    """Let an epoch of that many batches go by, each in so many seconds; returns its loss."""
    loss = Loss()
    for _ in run_log.watch([range(rows)] * batches, loss):
        clock.now += seconds
    return loss


def test_lines_where_there_is_no_terminal(tmp_path, capsys, clock):
    """At most one every 30 s, and never silence for minutes: also within an epoch."""
    with RunLog(tmp_path, 2, 400) as run_log:
        run_log.start_round(0, epochs=2, rows=100)
        loss = watch(run_log, clock)
        # After 30 s 60 of the 400 rows are trained on: 340 are left, at 2 a second.
        assert capsys.readouterr().out == "round 1/2   epoch 1/2, 60 % of it   loss 0.500   02:50 left\n"
        run_log.log_epoch(0, epoch=0, train_loss=0.4)
        assert loss.read == 1 and capsys.readouterr().out == ""  # 20 s after the last line
        watch(run_log, clock, seconds=1.0)
        # 10 s later another is due; then 200 - 90 rows have been trained on in 50 + 10 s.
        assert capsys.readouterr().out == "round 1/2   epoch 2/2, 100 % of it   loss 0.300   01:00 left\n"


def test_rows_that_an_earlier_process_trained_say_nothing_of_the_speed(tmp_path, capsys, clock):
    with RunLog(tmp_path, 3, 600) as run_log:
        run_log.skip(200)  # the first learner is on disk
        clock.now += 7.0  # reading it takes a while
        run_log.start_round(1, epochs=2, rows=100, first=1)  # and half of the second
        watch(run_log, clock)
    # 60 rows in 30 s, 240 left; with those of the earlier process as speed it would be 00:19.
    assert capsys.readouterr().out == "round 2/3   epoch 2/2, 60 % of it   loss 0.500   02:00 left\n"


def test_watching_costs_next_to_nothing():
    """A step takes a millisecond and more; its share of the watching must stay below 1 %."""
    run_log = RunLog(Path("/nonexistent"), 1, 1)
    run_log.due = float("inf")
    batches = [range(16)] * 20_000
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in run_log.watch(batches, None):
            pass
        times.append((time.perf_counter() - began) / len(batches))
    assert min(times) < 5e-6


@pytest.mark.parametrize("columns", [60, 120])
def test_bars_on_a_terminal(workspace, columns):
    """In a real one: what stands on a line fits it, loss and time left are shown, and the bars are gone in the end."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]],
                                         "names": ["the first task", "the second task", "日本" * 9]})
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "modelzoo.py", *flags(workspace, "--continual", "--epochs", "100")],
                               cwd=ROOT, stdout=slave, stderr=slave,
                               env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")})
    os.close(slave)
    out = b""
    with contextlib.suppress(OSError):  # Linux says so where the other end is closed
        while part := os.read(master, 65536):
            out += part
    os.close(master)
    assert process.wait() == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode()))
    runs = [line for line in lines if re.match(r"round [123]/3 +\d+ % \|.*\| \d\d:\d\d, .* left", line)]
    epochs = [line for line in lines if re.match(r"epoch \d+/100 +\d+ % \|.*\| loss \d\.\d\d\d", line)]
    assert runs and epochs
    wide = [line for line in lines if wcswidth(line.rstrip()) > columns and "run folder" not in line]
    assert wide == []
    rounds = [line.rstrip() for line in lines if re.match(r"round [123]/3   ", line) and "|" not in line]
    assert [line[:9] for line in rounds] == ["round 1/3", "round 2/3", "round 3/3"]
    assert ("…" in rounds[2]) == (columns == 60)
    assert "average accuracy" in "".join(lines[lines.index(rounds[2]) :])


def test_multi_task_mean_is_of_the_tasks_that_a_learner_knows(workspace, capsys):
    result = start(workspace, "a", "--num_rounds", "2", "--tasks_per_round", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    known = result["rounds"][0]["tasks"]
    mean = 100 * result["accuracy_matrix"][0][known[0]]
    assert f"round 1/2   {mean:6.2f} % on 1 known task, 2 not yet known   " in lines[0]
    assert lines[0].endswith(f"tasks: {2 * known[0]} {2 * known[0] + 1}")
    with_both = {*known, *result["rounds"][1]["tasks"]}
    mean = sum(100 * result["accuracy_matrix"][1][t] for t in with_both) / len(with_both)
    assert f" {mean:.2f} % on {len(with_both)} known task" in lines[1]


def test_rounds_that_were_found_are_counted_and_not_shown_as_if_trained(workspace, capsys):
    start(workspace, "a", "--continual")
    first = capsys.readouterr().out
    (workspace / "runs/a/learners/002.pt").unlink()
    start(workspace, "a", "--continual", "--resume")
    again = capsys.readouterr().out
    assert first.count("\nround ") == 3 and "rounds found" not in first
    assert again.count("\nround ") == 1 and "\nround 3/3   " in again and "; 2 of 3 rounds found\n" in again
    start(workspace, "b", "--continual", "--num_rounds", "2")
    capsys.readouterr()
    write_yaml(workspace / "more.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3]]})
    start(workspace, "c", "--continual", "--data_config", str(workspace / "more.yaml"))
    capsys.readouterr()
    start(workspace, "d", "--continual", "--extend", str(workspace / "runs/c"), "--tasks_per_round", "2")
    out = capsys.readouterr().out
    assert f"; 2 rounds come from {workspace / 'runs/c'}\n" in out and out.count("\nround ") == 1


def test_opening_says_what_is_about_to_happen(workspace, capsys):
    start(workspace, "a", "--continual", "--tasks_per_round", "2")
    opening = capsys.readouterr().out.splitlines()[:2]
    # 20 rows in each task of an epoch: 1, 2 and 2 tasks, 2 epochs; a backbone of 116,400 and 2 heads of 2 classes
    assert opening[0] == ("Model Zoo, continual: 3 tasks, 3 rounds, 2 tasks per learner at most, 200 rows to train on "
                          "(2 epochs), conv with 116,724 parameters per learner")
    assert re.fullmatch(rf"cpu, \w+, 1 thread; run folder {workspace / 'runs/a'}", opening[1])
    start(workspace, "b", method="multihead")
    out = capsys.readouterr().out
    assert out.startswith("Multi-Head, joint training on all tasks: 3 tasks, 1 learner, 120 rows to train on (2 ")
    assert "first seen" not in out and "change" not in out and "accuracy %" in out
    start(workspace, "c", "--num_rounds", "1")
    assert capsys.readouterr().out.startswith("Model Zoo, multi-task: all tasks are known: 3 tasks, 1 learner, ")


@pytest.mark.parametrize("text, width, short", [
    ("round 1", 7, "round 1"), ("round 12", 7, "round…"), ("abc", None, "abc"),
    ("日本語", 6, "日本語"), ("日本語", 5, "日本…"), ("日本語", 4, "日…"), ("e\u0301e\u0301", 2, "e\u0301e\u0301"),
])
def test_lines_are_shortened_to_columns_not_letters(text, width, short):
    assert shorten(text, width) == short
