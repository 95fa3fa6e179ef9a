"""The sweep: the runs of a grid are those of the ordinary commands, wherever they are made."""
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import modelzoo
import multihead
from datasets.build_dataset import load_whole
from tools import sweep
from utils.cluster import connect
from utils.config import read_settings
from utils.config_files import ConfigError

ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "optuna")),
    reason="Ray or Optuna is not installed: pip install -r requirements-hpo.txt",
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A dataset of two tasks and a hyper-parameter file, in an empty working folder; small networks like one thread."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 8), ("test", 4)):
        labels = np.arange(4).repeat(n)
        images = rng.integers(0, 100, (4 * n, 24, 24)) + 40 * labels[:, None, None]
        arrays |= {f"{split}_labels": labels, f"{split}_images": images.astype(np.uint8)}
    np.savez("data/two.npz", **arrays)
    Path("two.yaml").write_text("dataset: npz\npath: two.npz\ntasks: [[0, 1], [2, 3]]\n")
    Path("small.yaml").write_text("model: conv\nbatch: 16\nlr: 0.01\nl2_reg: 1e-5\ndropout: 0\nepochs: 2\n")
    return ["--data_config", "two.yaml", "--hp_config", "small.yaml"]


@pytest.fixture(scope="module")
def local_ray():
    """One Ray of this machine's cores for all sweeps of this file."""
    import ray

    connect(None)
    yield
    ray.shutdown()


def read_result(folder):
    """What result.json says of a run, less when and where it was made."""
    result = json.loads((folder / "result.json").read_text())
    for record in (result, *result["rounds"]):
        del record["seconds"]
    for key in ("resume", "out", "precision", "device"):
        del result["config"][key]
    return result


def names(argv):
    """The run folders' names of a grid."""
    return [settings.name for settings in sweep.read_grid(argv)[0]]


def test_a_grid_is_every_method_on_every_file_with_every_seed(files):
    argv = ["--methods", "modelzoo --continual --num_rounds 1", "isolated", "multihead", "--seeds", "0-1,7"]
    assert names([*argv, "--samples", "5", *files]) == [
        f"two-small-{method}-samples=5-seed={seed}" for seed in (0, 1, 7)
        for method in ("modelzoo-continual-num_rounds=1", "modelzoo-continual-tasks_per_round=1", "multihead")
    ]


def test_a_grid_file_says_the_same_as_flags_which_go_over_it(files):
    Path("grid.yaml").write_text(
        "methods: [isolated, multihead]\ndata_config: two.yaml\nhp_config: [small.yaml]\nseeds: 0-1\n"
        "flags: --samples 5\n"
    )
    flags = ["--methods", "isolated", "multihead", "--seeds", "0-1", "--samples", "5", *files]
    assert names(["--grid", "grid.yaml"]) == names(flags)
    over = ["--grid", "grid.yaml", "--seeds", "3", "--methods", "multihead"]
    assert names(over) == ["two-small-multihead-samples=5-seed=3"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--methods", "zoo"], "--methods: 'zoo' does not begin with one of modelzoo, isolated, multihead"),
        (["--methods", "multihead", "--seeds", "0-"], "--seeds: '0-' is not a list of seeds"),
        (["--methods", "multihead", "--seeds", "1,4-0"], "--seeds: 4-0 runs backwards; write 0-4"),
        (["--methods", "multihead", "--continual"], "unrecognized arguments: --continual"),
        (["--methods", "multihead", "--dry_run"], "--dry_run: works on one run, not on a sweep: python multihead.py"),
        (["--methods", "modelzoo --replay_frac 0.5"], "--replay_frac below 1 needs --continual"),
        (["--methods", "multihead", "multihead"], "would be the folder of two runs"),
        (["--methods", "multihead", "--seeds", "0-1", "--name", "x"], "would be the folder of two runs"),
        (["--grid", "grid.yaml"], "grid.yaml: unknown key method"),
        ([], "--methods is missing"),
        (["--methods", "multihead", "--cpus_per_run", "0"], "--cpus_per_run: 0.0 must be above 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(files, capsys, argv, line):
    Path("grid.yaml").write_text("method: [multihead]\n")
    assert sweep.main([*argv, *files]) == 2
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and not out and not Path("runs").exists()


@needs_ray
def test_a_sweep_makes_the_runs_of_the_ordinary_commands(files, local_ray, capsys, monkeypatch):
    """One run is unfinished and goes on; one folder is of other settings: that one fails, and the rest do not."""
    ordinary = [*files, "--device", "cpu", "--out", "ordinary"]
    modelzoo.run(read_settings("modelzoo.py", "modelzoo", [*ordinary, "--continual"]))
    multihead.run(read_settings("multihead.py", "multihead", ordinary))
    argv = ["--methods", "modelzoo --continual", "isolated", "multihead", "--device", "cpu", *files]
    zoo, isolated, joint = [Path("runs") / name for name in names(argv)]
    Path("runs").mkdir()
    (Path("ordinary") / zoo.name).rename(zoo)  # unfinished: its second learner is missing
    wanted = read_result(zoo)
    (zoo / "result.json").unlink()
    (zoo / "learners" / "001.pt").unlink()
    first = (zoo / "learners" / "000.pt").stat().st_mtime_ns
    other = ["--device", "cpu", "--continual", "--tasks_per_round", "1", "--epochs", "1", "--name", isolated.name]
    modelzoo.run(read_settings("modelzoo.py", "modelzoo", [*files, *other]))

    loads = []

    def load_once(*data):
        """Leave the runs no data but those that they are given."""
        loads.append(data)
        splits = load_whole(*data)
        Path("data/two.npz").rename("data/away.npz")
        return splits

    monkeypatch.setattr(sweep, "load_whole", load_once)
    capsys.readouterr()
    assert sweep.main(argv) == 1
    out = capsys.readouterr().out
    assert f"{isolated}: was run with epochs 1, not 2" in out and "2 done, 1 failed" in out
    assert len(loads) == 1
    assert read_result(zoo) == wanted and (zoo / "learners" / "000.pt").stat().st_mtime_ns == first
    assert read_result(joint) == read_result(Path("ordinary") / joint.name)
    assert sweep.main(argv) == 1  # all are finished or of other settings: there is nothing to load
    assert "2 skipped, 1 failed" in capsys.readouterr().out and len(loads) == 1


@pytest.mark.parametrize("content", [
    "[1]", "{", '{"config": [], "average_accuracy": 0.5, "seconds": 1}',
    '{"config": null, "average_accuracy": 0.5, "seconds": 1}', '{"config": {}, "average_accuracy": "x", "seconds": 1}',
])
def test_a_damaged_result_is_one_line(files, content):
    """Once: a traceback ended the whole sweep."""
    settings = read_settings("multihead.py", "multihead", [*files, "--name", "damaged"])
    Path("runs/damaged").mkdir(parents=True)
    Path("runs/damaged/result.json").write_text(content)
    with pytest.raises(ConfigError, match="damaged"):
        sweep.read_finished(settings)


@needs_ray
def test_a_run_that_breaks_is_reported_with_its_line(files, local_ray, capsys):
    Path("wild.yaml").write_text(Path("small.yaml").read_text().replace("0.01", "1e30"))
    argv = ["--methods", "multihead", "--device", "cpu", *files, "--hp_config", "small.yaml", "wild.yaml"]
    assert sweep.main(argv) == 1
    out = capsys.readouterr().out
    assert "the training loss is" in out and "1 done, 1 failed" in out and "Traceback" not in out
    Path("none.yaml").write_text(Path("two.yaml").read_text().replace("two.npz", "none.npz"))
    assert sweep.main([*argv, "--data_config", "none.yaml"]) == 1
    assert capsys.readouterr().out.count("data/none.npz: no such file") == 2


@needs_ray
def test_files_of_a_node_that_does_not_share_the_folder_come_through_ray(files, local_ray):
    import ray

    connect(None)  # pytest has undone what it did about Ray's warnings
    settings, _ = sweep.read_grid(["--methods", "multihead", "--device", "cpu", *files])
    loaded = load_whole("npz", settings[0].tasks, "data", "two.npz")
    task = ray.remote(sweep.execute).options(num_returns=2)
    outcome, brought = task.remote(settings[0], loaded, "/a folder that no node has", 1)
    row = sweep.Row(settings[0].folder)
    sweep.collect(outcome, row, brought)
    assert row.state == "done" and row.accuracy == read_result(row.folder)["average_accuracy"]
    assert (row.folder / "config.yaml").exists() and (row.folder / "log.jsonl").exists()


@contextlib.contextmanager
def node(environment, *flags):
    """A Ray node of one core as processes of their own; kills them all, by the group that they are in."""
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", "--num-cpus=1",
               "--object-store-memory=100000000", *flags]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(what, condition, seconds=120):
    """Wait until `condition()` holds, and return what it gave."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(0.2)
    return found


def listens(port):
    """Whether somebody answers at a port of this machine."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def begun(grid):
    """The names of the run folders that have a log but no result."""
    return [name for name in grid if (Path("runs") / name / "log.jsonl").exists()
            and not (Path("runs") / name / "result.json").exists()]


@needs_ray
@pytest.mark.cluster
def test_a_killed_nodes_runs_are_finished_on_the_other(files):
    """A head and a node that joins it by address; the node is killed while both have a run in hand."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                                "RAY_USAGE_STATS_ENABLED": "0"}
    flags = ["--seeds", "0-3", "--device", "cpu", "--epochs", "60"]
    argv = ["--methods", "modelzoo --continual", "isolated", *flags, *files]
    grid = names(argv)
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *argv]
    with (
        tempfile.TemporaryDirectory() as state,  # pytest's own is too long for the path of a socket
        node(environment, "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={state}"),
        contextlib.ExitStack() as second,
    ):
        address = f"127.0.0.1:{port}"
        wait_for("head", lambda: listens(port))
        lost = second.enter_context(node(environment, f"--address={address}", "--node-ip-address=127.0.0.2"))
        wait_for("second node", lambda: count_nodes(environment, address) == 2)
        with subprocess.Popen([*command, "--address", address], env=environment, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT) as process:
            wait_for("run on each node", lambda: len(begun(grid)) == 2)
            os.killpg(lost.pid, signal.SIGKILL)
            out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "8 done" in out
    cluster = [read_result(Path("runs") / name) for name in grid]
    Path("runs").rename("cluster")
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert cluster == [read_result(Path("runs") / name) for name in grid]


def count_nodes(environment, address):
    """How many nodes of the cluster at `address` are alive, asked from a process of its own."""
    code = (f"import ray; ray.init('{address}', log_to_driver=False, logging_level=40);"
            "print(sum(node['Alive'] for node in ray.nodes()))")
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return int(asked.stdout or 0)


def test_table_of_a_sweep_is_in_per_cent(capsys):
    sweep.print_rows([sweep.Row(Path("runs/a"), "done", 0.8125, 3.0, "node"), sweep.Row(Path("runs/b"), "failed")])
    out = " ".join(capsys.readouterr().out.split())
    assert " a 81.25 3.0 done node b failed 1 done, 1 failed" in out


def test_a_finished_run_of_another_precision_is_not_taken_for_this_one(files):
    settings = read_settings("multihead.py", "multihead", [*files, "--name", "a", "--device", "cpu"])
    config = json.loads(json.dumps(asdict(settings))) | {"precision": "bf16"}
    del config["inherit"], config["weigh_by_round"]  # which runs did not record at first
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/result.json").write_text(json.dumps({"config": config, "average_accuracy": 0.5, "seconds": 1}))
    assert sweep.read_finished(settings)["average_accuracy"] == 0.5  # auto is what it came to
    with pytest.raises(ConfigError, match="was run with precision bf16, not fp32"):
        sweep.read_finished(replace(settings, precision="fp32"))


@pytest.mark.parametrize("words", [
    ["--methods", "multihead", "--seed", "5"], ["--methods", "multihead --seed=5"],
    ["--methods", "multihead --hp_config other.yaml"],
])
def test_what_the_grid_would_override_is_refused(files, words):
    """Once: --seed 5 went to every run, and then the grid's own seed, 0, over it."""
    with pytest.raises(ConfigError, match="a run has that of the grid; give --(seeds|hp_config) outside"):
        sweep.read_grid([*words, *files])
