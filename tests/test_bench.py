"""The benchmark measures what it says."""
import json

import pytest

from tools import bench
from utils.config import ConfigError


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
