"""The benchmark measures what it says."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from tools import bench
from utils.config_files import ConfigError
from utils.run_folder import RunError


def test_bench_counts_floating_point_work(tmp_path, capsys):
    """Forward and backward of a row of 32 x 32: 0.072 GFLOP with conv."""
    file = tmp_path / "bench.json"
    flags = ["--models", "conv", "--batches", "4", "--seconds", "0.1", "--device", "cpu", "--json", str(file)]
    assert bench.main(bench.read_flags(flags)) == 0
    (found,) = json.loads(file.read_text())["training"]
    assert found["flop_per_row"] == pytest.approx(0.072e9, rel=0.02)
    assert found["rows_per_s"] == pytest.approx(4 / (found["ms"][0] / 1000))
    assert found["flop_per_s"] == pytest.approx(found["rows_per_s"] * found["flop_per_row"])
    assert 0 < found["share"] < 1 and "conv" in capsys.readouterr().out


def test_bench_refuses():
    with pytest.raises(ConfigError, match="--models: 'resnet' is not one of"):
        bench.read_flags(["--models", "resnet"])
    with pytest.raises(ConfigError, match="--batches: 0 must be at least 1"):
        bench.read_flags(["--batches", "0"])
    with pytest.raises(ConfigError, match="--batches: 5001 must be at least 1 and at most 5000"):
        bench.read_flags(["--batches", "5001"])
    with pytest.raises(ConfigError, match="--models: model squeezenet1_0 has no linear head to replace; the rows here"):
        bench.read_flags(["--models", "squeezenet1_0"])
    for file in ("nowhere/x.json", "."):
        with pytest.raises(ConfigError, match=f"--json: {file} must be a file in a folder that is there"):
            bench.read_flags(["--json", file])


def fake_clock(monkeypatch):
    """A clock for bench.py that goes only where it is told to."""
    now = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_ms_are_of_a_step(monkeypatch):
    """Steps of 2, 3 and 7 s in turn, whatever their number in an epoch."""
    now, seconds = fake_clock(monkeypatch), itertools.cycle((3.0, 2.0, 7.0))

    def train_net(net, images, rows, heads, labels, *, batch, **_):
        yield
        for step in seconds:
            now[0] += step * len(rows) / batch
            yield

    monkeypatch.setattr(bench, "train_net", train_net)
    found = bench.measure_training("conv", 4, torch.device("cpu"), "fp32", 0.1)
    assert found["ms"] == pytest.approx([3000, 2000, 7000])
    assert found["rows_per_s"] == pytest.approx(4 / 3)


def test_matrix_products_count_2_n_cubed(monkeypatch):
    now = fake_clock(monkeypatch)
    monkeypatch.setattr(bench, "wait", lambda device: now.__setitem__(0, now[0] + 4.0))
    monkeypatch.setattr(torch, "randn", lambda n, *_, **__: torch.zeros(n, 1).expand(n, n)[:1, :1])
    assert bench.measure_matrix_rate(torch.device("cpu"), "fp32") == 2 * 2048**3 / 4


def test_ratio_is_how_much_longer_the_textbook_takes(monkeypatch):
    now = fake_clock(monkeypatch)
    took = {"multihead.py": iter((2.0, 4.0, 2.0)), "tools/bench.py": iter((6.0, 20.0, 8.0))}
    monkeypatch.setattr(bench.subprocess, "run", lambda argv, **_: now.__setitem__(0, now[0] + next(took[argv[3]])))
    found = bench.compare_textbook("conv", torch.device("cpu"), "fp32", 3)
    assert (found["ours"], found["textbook"], found["ratio"]) == ([2, 4, 2], [6, 20, 8], 4)  # of 3, 5 and 4


def test_a_textbook_that_fails_is_one_line(monkeypatch):
    def fail(argv, **_):
        raise bench.subprocess.CalledProcessError(1, argv)

    monkeypatch.setattr(bench.subprocess, "run", fail)
    with pytest.raises(RunError, match="^multihead.py ended with exit status 1, for what stands above$"):
        bench.compare_textbook("conv", torch.device("cpu"), "fp32", 1)
