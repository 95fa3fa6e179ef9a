"""The number of threads is the run's own: recorded, and taken again when it is resumed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelzoo
from tests.conftest import flags
from utils import device
from utils.command import command
from utils.config_files import dump_yaml, load_yaml
from utils.run import recorded_threads
from utils.run_folder import load_tensors

ROOT = Path(__file__).parent.parent


def start(workspace, *more, threads):
    done = subprocess.run([sys.executable, "modelzoo.py", *flags(workspace, "--continual", "--name", "a", *more)],
                          cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((workspace / "runs/a/result.json").read_text())


def test_a_run_resumed_where_another_number_is_the_default_ends_in_the_same_bits(workspace):
    whole = start(workspace, threads="1")
    assert load_yaml(workspace / "runs/a/config.yaml")["settings"]["threads"] == 1
    path = workspace / "runs/a/learners/002.pt"
    before = load_tensors(path, "cpu")["test_logits"]
    for name in ("result.json", "learners/001.pt", "learners/002.pt"):
        (workspace / "runs/a" / name).unlink()
    resumed = start(workspace, "--resume", threads="2")
    assert resumed["config"]["threads"] == 1
    assert resumed["accuracy_matrix"] == whole["accuracy_matrix"]
    assert [r["train_loss"] for r in resumed["rounds"]] == [r["train_loss"] for r in whole["rounds"]]
    assert all(x.equal(y) for x, y in zip(load_tensors(path, "cpu")["test_logits"], before, strict=True))


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def status(workspace, *more):
    return command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--num_rounds", "1", "--name", "a", *more))


def test_another_number_is_refused_on_resume_and_the_flag_goes_before_the_default(
    workspace, capsys, threads_as_before
):
    assert status(workspace, "--threads", "2") == 0 and torch.get_num_threads() == 2
    assert status(workspace, "--resume", "--threads", "1") == 2
    assert "was run with threads 2, not 1; take another --name" in capsys.readouterr().err
    assert status(workspace, "--resume") == 0 and torch.get_num_threads() == 2
    for bad in ("0", "-1", "two"):
        assert status(workspace, "--threads", bad) == 2
        assert "--threads" in capsys.readouterr().err


def test_older_runs_said_it_among_their_hardware(workspace, capsys, threads_as_before):
    assert status(workspace, "--threads", "2") == 0
    file = workspace / "runs/a/config.yaml"
    about = load_yaml(file)
    del about["settings"]["threads"]
    file.write_text(dump_yaml(about))
    assert "2 threads" in about["hardware"]
    torch.set_num_threads(1)
    assert status(workspace, "--resume") == 0 and torch.get_num_threads() == 2


@pytest.mark.parametrize("about", [{}, {"settings": 3, "hardware": 7}, {"settings": {"threads": "many"}}])
def test_a_foreign_config_says_nothing(workspace, about):
    from utils.config import read_settings

    (workspace / "runs/a").mkdir(parents=True)
    (workspace / "runs/a/config.yaml").write_text(dump_yaml(about or {"x": 1}))
    settings = read_settings("x", "modelzoo", flags(workspace, "--name", "a", "--resume"))
    assert recorded_threads(settings) is None


def test_default(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert device.default_threads("conv") == 3
    for unset in ("", "0", "all"):
        monkeypatch.setenv("OMP_NUM_THREADS", unset)
        monkeypatch.setattr(device, "count_cores", lambda: 64)
        assert (device.default_threads("conv"), device.default_threads("wrn16_4")) == (4, 16)
        monkeypatch.setattr(device, "count_cores", lambda: 2)
        assert (device.default_threads("conv"), device.default_threads("wrn16_4")) == (2, 2)


def test_cores_are_those_of_the_process_and_of_its_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    read_text = Path.read_text
    for limit, cores in (("max 100000", 12), ("250000 100000", 3), ("50000 100000", 1), ("9999999 100000", 12)):
        monkeypatch.setattr(Path, "read_text", lambda self, *a, limit=limit, **k:
                            limit if self.name == "cpu.max" else read_text(self, *a, **k))
        assert device.count_cores() == cores


@pytest.mark.parametrize("given, waits", [
    ({}, "PASSIVE 3000"),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
    ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
])
def test_threads_wait_without_their_cores_unless_told_otherwise(given, waits):
    """Before torch is loaded."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in names} | given
    code = f"import os, sys, before_torch; print(*map(os.environ.get, {names}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f"{waits} False", done.stderr


def test_files_that_are_run_say_so_before_they_import_torch():
    for script in ("modelzoo.py", "multihead.py", "hpo.py", "tools/peers.py", "tools/bench.py"):
        lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
        imports = [line.split()[1] for line in lines if line.startswith("import ")]
        assert imports.index("before_torch") < imports.index("torch")
