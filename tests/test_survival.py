"""Kills, full disks, damaged files, two writers: at most the learner in training is lost, and the result is the same.

`python -m pytest -m kills` kills 70 runs; the plain suite kills one.
"""
import codecs
import contextlib
import errno
import fcntl
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import modelzoo
import multihead
from tests.commands import MAIN, checkpoint_every_epoch, numbers, start
from tests.conftest import CONV, flags, write_yaml
from utils import command as cli
from utils import learner
from utils.config import read_settings
from utils.log import RunLog
from utils.run import prepare
from utils.run_folder import load_tensors, save_tensors

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_survival"])
ROOT = Path(__file__).parent.parent


def slow_writes():
    """Widen the moments in which a file is half-written or not yet renamed."""
    fsync, replace = os.fsync, os.replace
    os.fsync = lambda file: (time.sleep(0.03), fsync(file))
    os.replace = lambda a, b: (time.sleep(0.03), replace(a, b), time.sleep(0.03))


def small_disk(size=2000):
    """No file may grow beyond `size` bytes: writing on fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def nobody():
    """A user without the right to write, even where the tests run as root."""
    # What is otherwise imported only when it is needed: that user may not be able to read it.
    codecs.lookup("cp437")
    importlib.import_module("torch._dynamo")
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def child(argv, method, setups, output):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for setup in setups:
        setup()
    raise SystemExit(cli.command(f"{method}.py", method, MAIN[method], argv))


def spawn(workspace, *more, method="modelzoo", setups=()):
    """Start a command in a process of its own."""
    output = workspace / f"output{random.random()}"
    process = CONTEXT.Process(target=child, args=(flags(workspace, *more), method, setups, output))
    process.output = output
    process.start()
    return process


def finish(process):
    """Wait for its end; returns exit status and output."""
    process.join(120)
    return process.exitcode, process.output.read_text()


def wait_for(path, process):
    """Wait until a child has written `path`."""
    while not path.exists():
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.01)


@pytest.fixture
def digits(tmp_path):
    """A workspace of rotated digits, 5 tasks, a second or two a run."""
    shutil.copy(ROOT / "config/dataset/rotated_digits.yaml", tmp_path / "data.yaml")
    write_yaml(tmp_path / "hp.yaml", {**CONV, "batch": 16, "augment": True, "schedule": "cosine", "epochs": 3})
    return tmp_path


def kill_and_resume(workspace, count, seed, *more):
    """Kill `count` runs at random moments, resume each, and compare with a run that was left alone.

    Returns:
        The sets of files that the kills left.
    """
    command = ("--continual", "--samples", "4", *more)
    whole = numbers(start(workspace, "whole", *command))
    began = time.perf_counter()
    assert finish(spawn(workspace, *command, "--name", "timed", setups=[slow_writes, checkpoint_every_epoch]))[0] == 0
    length = time.perf_counter() - began
    chance, places, killed = random.Random(seed), set(), 0
    while killed < count:
        name = f"run{killed}"
        setups = [f for f in (slow_writes, checkpoint_every_epoch) if chance.random() < 0.7]
        process = spawn(workspace, *command, "--name", name, "--resume", setups=setups)
        time.sleep(chance.uniform(0, length))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was through before the kill
            shutil.rmtree(workspace / "runs" / name)
            continue
        killed += 1
        places.add(tuple(sorted(p.name for p in (workspace / "runs").glob(f"{name}/**/*"))))
        assert numbers(start(workspace, name, *command, "--resume")) == whole
        assert not list((workspace / "runs" / name).rglob("*.damaged"))
        shutil.rmtree(workspace / "runs" / name)
    return places


def test_killed_runs_resume_to_the_same_result(digits):
    kill_and_resume(digits, 1, seed=0)


@pytest.mark.kills
def test_fifty_killed_runs_resume_to_the_same_result(digits):
    assert len(kill_and_resume(digits, 50, seed=1)) > 10


@pytest.mark.kills
def test_twenty_killed_runs_whose_learners_inherit_resume_to_the_same_result(digits):
    assert len(kill_and_resume(digits, 20, 2, "--inherit")) > 5


@pytest.mark.parametrize("method, more", [
    ("multihead", ()),
    ("modelzoo", ("--continual", "--num_rounds", "2")),
])
def test_learner_goes_on_from_its_checkpoint(workspace, monkeypatch, capsys, method, more):
    """Dropout, augmentation, momentum, order and the learning rate all go on where they stood."""
    write_yaml(workspace / "hp.yaml", {**CONV, "model": "wrn10_1", "dropout": 0.3, "augment": True, "epochs": 4,
                                       "schedule": "cosine"})
    more = (*more, "--samples", "3")
    whole = start(workspace, "a", *more, method=method)
    last = len(whole["rounds"]) - 1
    for name in ("CHECKPOINT_SECONDS", "time"):
        monkeypatch.setattr(multihead, name, getattr(multihead, name))  # as they were, afterwards
    checkpoint_every_epoch()
    log_epoch = RunLog.log_epoch

    def stop_in_the_third(self, round, *args, **values):
        if (round, values["epoch"]) == (last, 2):
            raise cli.Stopped(signal.SIGTERM)
        log_epoch(self, round, *args, **values)

    command = flags(workspace, "--name", "b", *more)
    with monkeypatch.context() as m:
        m.setattr(RunLog, "log_epoch", stop_in_the_third)
        assert cli.command("x", method, MAIN[method], command) == 128 + signal.SIGTERM
    checkpoint = workspace / f"runs/b/learners/00{last}.checkpoint"
    assert checkpoint.exists()
    epochs = []

    def note(self, round, *args, **values):
        epochs.append((round, values["epoch"]))
        log_epoch(self, round, *args, **values)

    with monkeypatch.context() as m:
        m.setattr(RunLog, "log_epoch", note)
        assert numbers(start(workspace, "b", "--resume", *more, method=method)) == numbers(whole)
    assert epochs == [(last, 2), (last, 3)] and not checkpoint.exists()
    out = " ".join(capsys.readouterr().out.split())
    assert f"; {last} of {last + 1} rounds found, and a checkpoint of the next" in out
    lines = [json.loads(line) for line in (workspace / "runs/b/log.jsonl").read_text().splitlines()]
    expected = [(k, epoch) for k in range(last + 1) for epoch in (0, 1, 2, 3, None)]
    assert [(x["round"], x.get("epoch")) for x in lines] == expected


def test_checkpoints_cost_under_one_percent(workspace, monkeypatch):
    """By the clock: a write that takes a second is followed by at least a hundred without one."""
    now, writes = [0.0], []

    def save(path, tree):
        if path.suffix == ".checkpoint":
            writes.append(now[0])
            now[0] += 1.0

    class Clock:
        @staticmethod
        def perf_counter():
            now[0] += 0.5
            return now[0]

    monkeypatch.setattr(multihead, "time", Clock)
    monkeypatch.setattr(learner, "save_tensors", save)
    start(workspace, "a", "--epochs", "1000", "--samples", "1", "--num_rounds", "1", "--tasks_per_round", "1")
    gaps = [b - a for a, b in zip(writes, writes[1:], strict=False)]
    assert writes[0] >= 60 and len(gaps) > 2 and all(100 < gap < 250 for gap in gaps)


def test_full_disk_is_one_line_and_loses_nothing(workspace):
    whole = start(workspace, "a", "--continual")
    code, output = finish(spawn(workspace, "--continual", "--name", "b", setups=[small_disk]))
    assert code == 2 and output.count("\n") == 1
    assert ".pt: cannot be written (File too large); what was written before it is safe" in output
    assert not list((workspace / "runs/b").rglob("*.part"))
    assert numbers(start(workspace, "b", "--continual", "--resume")) == numbers(whole)


def lacks(call, number, step=1):
    """The file system answers every `step`-th call of fsync or flock with an error."""
    module, count = {"fsync": os, "flock": fcntl}[call], [0]
    real = getattr(module, call)

    def fail(*arguments):
        count[0] += 1
        if count[0] % step == 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    setattr(module, call, fail)


@pytest.mark.parametrize("call, number, step, note", [
    # A user's: every second flush is a folder's.
    ("fsync", errno.EINVAL, 2, None), ("fsync", errno.EPERM, 2, None),
    ("fsync", errno.EINVAL, 1, "does not support flushing files to disk: after a power cut the last ones may be"),
    ("fsync", errno.ENOTSUP, 1, "does not support flushing files to disk"),
    ("fsync", errno.ENOSYS, 1, "does not support flushing files to disk"),
    ("flock", errno.ENOLCK, 1, "does not support locks: start no other run in this folder meanwhile"),
    ("flock", errno.ENOTSUP, 1, "does not support locks"), ("flock", errno.ENOSYS, 1, None),
])
def test_file_systems_of_clusters_that_lack_a_call(workspace, call, number, step, note):
    whole = start(workspace, "a", "--continual")
    code, output = finish(spawn(workspace, "--continual", "--name", "b", setups=[partial(lacks, call, number, step)]))
    assert code == 0 and output.count("does not support") == (note is not None) and (note or "") in output
    assert numbers(json.loads((workspace / "runs/b/result.json").read_text())) == numbers(whole)


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output error"),
                                           (errno.EDQUOT, "quota exceeded")])
def test_a_flush_that_failed_is_never_passed_over(workspace, number, words):
    """NFS tells of a full disk only then."""
    code, output = finish(spawn(workspace, "--name", "b", setups=[partial(lacks, "fsync", number)]))
    assert code == 2 and output.count("\n") == 1 and "config.yaml: cannot be written" in output and words in output
    assert not (workspace / "runs/b/config.yaml").exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_flushes_that_the_kernel_refuses(workspace):
    trace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=fsync", "-e", "inject=fsync:error=EINVAL:when=2+2"]
    command = [sys.executable, "modelzoo.py", *flags(workspace, "--num_rounds", "2", "--name", "a")]
    done = subprocess.run([*trace, *command], cwd=ROOT, capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip("may not trace processes")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", [".", "b", "b/learners"])
def test_folder_that_may_not_be_written(workspace, where):
    start(workspace, "b", "--continual", "--num_rounds", "1")
    (workspace / "runs/b/result.json").unlink()
    (workspace / "runs/b/learners/000.pt").unlink()
    if where == ".":
        shutil.rmtree(workspace / "runs/b")
    for parent in (workspace, *workspace.parents[:2]):
        parent.chmod(0o777 if parent == workspace else 0o755)
    for path in (workspace / "runs").rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    (workspace / "runs" / where).chmod(0o555)
    process = spawn(workspace, "--continual", "--num_rounds", "1", "--name", "b", "--resume", setups=[nobody])
    code, output = finish(process)
    (workspace / "runs" / where).chmod(0o755)
    errors = [line for line in output.splitlines() if line.startswith("modelzoo.py: ")]
    assert code == 2 and len(errors) == 1 and "Permission denied" in output.splitlines()[-1], output
    assert "Traceback" not in output


def test_folder_removed_meanwhile(workspace, monkeypatch, capsys):
    train_learner = multihead.train_learner

    def remove(*args, **named):
        trained = train_learner(*args, **named)
        shutil.rmtree(workspace / "runs")
        return trained

    monkeypatch.setattr(multihead, "train_learner", remove)
    assert cli.command("x", "modelzoo", modelzoo.run, flags(workspace, "--name", "a")) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "cannot be written (No such file or directory)" in err


def test_second_writer_is_refused_and_the_lock_dies_with_its_process(workspace, capsys):
    process = spawn(workspace, "--continual", "--name", "a", "--epochs", "1000")
    wait_for(workspace / "runs/a/log.jsonl", process)
    again = flags(workspace, "--continual", "--name", "a", "--epochs", "1000", "--resume")
    assert cli.command("x", "modelzoo", modelzoo.run, again) == 2
    assert "runs/a: another process is writing it; wait for it or take another --name\n" in capsys.readouterr().err
    process.kill()
    process.join()
    with open(workspace / "runs/a/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_with_one_line(workspace, number):
    whole = start(workspace, "a", "--continual", "--epochs", "5")
    process = spawn(workspace, "--continual", "--name", "b", "--epochs", "5", setups=[slow_writes])
    wait_for(workspace / "runs/b/learners/000.pt", process)
    os.kill(process.pid, number)
    code, output = finish(process)
    last = output.splitlines()[-1]
    assert code == 128 + number and "Traceback" not in output
    assert last == f"modelzoo.py: stopped by {number.name}; the same command with --resume goes on"
    assert numbers(start(workspace, "b", "--continual", "--epochs", "5", "--resume")) == numbers(whole)


@pytest.mark.parametrize("damage", [
    lambda data: data[:100],
    lambda data: b"",
    lambda data: data[:-1],
    lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    lambda data: b"not a learner",
])
def test_damaged_learner_is_set_aside_and_trained_again(workspace, capsys, damage):
    whole = start(workspace, "a", "--continual")
    file = workspace / "runs/a/learners/001.pt"
    file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert numbers(start(workspace, "a", "--continual", "--resume")) == numbers(whole)
    assert "001.pt: damaged; kept as 001.pt.damaged, trained again" in capsys.readouterr().out


def test_learner_that_is_trained_again_leaves_the_other_rounds_lines(workspace):
    def read_log():
        lines = map(json.loads, (workspace / "runs/a/log.jsonl").read_text().splitlines())
        return sorted((line["round"], line.get("epoch", 9), line.get("train_loss", 0)) for line in lines)

    start(workspace, "a", "--continual")
    before = read_log()
    assert [line[:2] for line in before] == [(round, epoch) for round in range(3) for epoch in (0, 1, 9)]
    (workspace / "runs/a/learners/001.pt").unlink()
    start(workspace, "a", "--continual", "--resume")
    assert read_log() == before


def test_learner_of_another_run_is_not_mixed_in(workspace, capsys):
    whole = start(workspace, "a", "--continual")
    start(workspace, "b", "--continual", "--samples", "3")
    shutil.copy(workspace / "runs/b/learners/002.pt", workspace / "runs/a/learners/002.pt")
    capsys.readouterr()
    assert numbers(start(workspace, "a", "--continual", "--resume")) == numbers(whole)
    assert "002.pt: not of this run; kept as" in capsys.readouterr().out


@pytest.mark.parametrize("change", [
    {"seconds": "x"}, {"tasks": 7}, {"test_logits": 3}, {"parameters": None},
    {"train_logits": [torch.full((20, 2), float("nan"))]},
])
def test_whole_files_with_foreign_content_are_trained_again(workspace, capsys, change):
    """A checksum proves that a file is whole, not that it is ours."""
    whole = start(workspace, "a", "--continual", "--num_rounds", "1")
    file = workspace / "runs/a/learners/000.pt"
    save_tensors(file, load_tensors(file, "cpu") | change)
    capsys.readouterr()
    assert numbers(start(workspace, "a", "--continual", "--num_rounds", "1", "--resume")) == numbers(whole)
    assert "000.pt: not of this run; kept as" in capsys.readouterr().out


@pytest.mark.parametrize("out_of_memory", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_whole_learner_that_memory_has_no_room_for_is_kept(workspace, capsys, monkeypatch, out_of_memory):
    start(workspace, "a", "--continual")
    before = (workspace / "runs/a/learners/001.pt").read_bytes()

    def load(*args, **kwargs):
        raise out_of_memory

    monkeypatch.setattr(torch, "load", load)
    capsys.readouterr()
    argv = flags(workspace, "--name", "a", "--continual", "--resume")
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, argv) == 2
    assert "too little memory with batch 8; try less" in capsys.readouterr().err
    assert (workspace / "runs/a/learners/001.pt").read_bytes() == before


@pytest.mark.parametrize("work, line", [
    (lambda: torch.empty(2**50), "too little memory with batch 8"),
    (lambda: torch.empty(-1), None),
])
def test_a_cpu_without_room_is_one_line_and_other_errors_stay(workspace, monkeypatch, capsys, work, line):
    monkeypatch.setattr(multihead, "train_net", lambda *args, **kwargs: work())
    argv = flags(workspace, "--device", "cpu")
    if line is None:
        with pytest.raises(RuntimeError, match="negative dimension"):
            cli.command("multihead.py", "multihead", multihead.run, argv)
    else:
        assert cli.command("multihead.py", "multihead", multihead.run, argv) == 2
        assert line in capsys.readouterr().err


def test_half_a_line_of_the_log_costs_no_other(workspace):
    start(workspace, "a", "--continual")
    log = workspace / "runs/a/log.jsonl"
    whole = log.read_text()
    *lines, last = whole.splitlines(keepends=True)
    assert "epoch" not in last  # the last round's own
    log.write_text("".join(lines) + last[:10])
    start(workspace, "a", "--continual", "--resume")
    assert log.read_text() == whole


def test_log_that_cannot_be_read(workspace, capsys):
    start(workspace, "a", "--continual")
    log = workspace / "runs/a/log.jsonl"
    log.write_text("[" * 100_000 + '\n{"round": 0, "epoch": "x"}\n7\n')
    start(workspace, "a", "--continual", "--resume")
    log.unlink()
    log.mkdir()
    command = flags(workspace, "--name", "a", "--continual", "--resume")
    assert cli.command("x", "modelzoo", modelzoo.run, command) == 2
    assert "log.jsonl: cannot be read (Is a directory)" in capsys.readouterr().err


def test_foreign_folder_is_left_alone(workspace, capsys):
    (workspace / "runs/mine").mkdir(parents=True)
    (workspace / "runs/mine/thesis.tex").write_text("x")
    (workspace / "runs/file").write_text("x")
    for name, message in (("mine", "is not a run folder"), ("file", "it is not a run folder")):
        command = flags(workspace, "--name", name, "--resume")
        assert cli.command("x", "modelzoo", modelzoo.run, command) == 2
        with contextlib.suppress(FileNotFoundError):
            assert [p.name for p in (workspace / "runs/mine").iterdir()] == ["thesis.tex"]
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ({"tasks": [1]}, "not of this run"),
    ({"tasks": [0, 1, 2]}, "not of this run"),
    ({"tasks": [0, 1, 2], "epoch": 9, "seconds": 0.0, "snapshot": {}}, "not of this run"),
    (7, "not of this run"),
    ({"tasks": [0, 1, 2], "epoch": 1, "seconds": 0.0, "snapshot": {"epoch": 1}}, "not of this network"),
])
def test_foreign_checkpoint_is_set_aside(workspace, capsys, content, message):
    whole = start(workspace, "a", method="multihead")
    for name in ("result.json", "learners/000.pt"):
        (workspace / "runs/a" / name).unlink()
    save_tensors(workspace / "runs/a/learners/000.checkpoint", content)
    capsys.readouterr()
    assert numbers(start(workspace, "a", "--resume", method="multihead")) == numbers(whole)
    assert f"000.checkpoint: {message}; kept as" in capsys.readouterr().out


@pytest.mark.parametrize("split", [0, 1])  # training, test
def test_learner_that_diverges_in_its_last_step_does_not_join_the_zoo(workspace, monkeypatch, capsys, split):
    """The last epoch's loss is finite still, the logits are not: they would make every later draw fail."""
    predict, calls = multihead.predict_logits, itertools.count()
    spoilt = lambda *args: predict(*args) * (float("nan") if next(calls) % 2 == split else 1.0)  # noqa: E731
    monkeypatch.setattr(multihead, "predict_logits", spoilt)
    assert cli.command("x", "modelzoo", modelzoo.run, flags(workspace, "--name", "a")) == 2
    err = capsys.readouterr().err
    assert "round 1: after training the largest logit is nan at learning rate 0.01" in err and err.count("\n") == 1
    assert not list((workspace / "runs/a/learners").iterdir())


class Evil:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def test_a_sealed_file_that_asks_for_code_is_refused_and_never_run(tmp_path, monkeypatch):
    """A checksum proves that a file is whole, not that it is harmless."""
    monkeypatch.chdir(tmp_path)
    save_tensors(tmp_path / "000.pt", {"tasks": Evil()})
    with pytest.raises(ValueError, match="not a learner's file"):
        load_tensors(tmp_path / "000.pt", "cpu")
    assert not (tmp_path / "EXECUTED").exists()


def test_seconds_before_an_interruption_count(workspace):
    settings = read_settings("x", "multihead", flags(workspace))
    _, precision, train, test = prepare(settings)
    rows, file = [train.rows(0)], workspace / "000.checkpoint"
    _, _, snapshot = next(multihead.train_epochs(settings, precision, train, [0], rows, 0))
    save_tensors(file, {"tasks": [0], "epoch": 1, "seconds": 1000.0, "snapshot": snapshot()})
    with RunLog(workspace, 1, 1) as log:
        trained = multihead.train_learner(settings, precision, train, test, [0], rows, rows, 0, log, file)
    assert 1000 < trained.seconds < 1100
