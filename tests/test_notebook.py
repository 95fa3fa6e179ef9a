"""modelzoo_minimal.ipynb runs top to bottom, and again; and on CIFAR-100 after a change of its first line."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CONV, make_arrays, write_yaml

ROOT = Path(__file__).parent.parent
FILE = ROOT / "modelzoo_minimal.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

matplotlib = pytest.importorskip("matplotlib")


def execute(first_line, **settings):
    """Run the code cells in one namespace, with other settings than the first cell's where given; return it."""
    from matplotlib import pyplot

    matplotlib.use("Agg")
    found = {}
    try:
        exec(CELLS[0].replace(CELLS[0].partition("\n")[0], first_line), found)
        assert settings.keys() <= found.keys()
        found.update(settings)
        for i, cell in enumerate(CELLS[1:], 1):
            exec(compile(cell, f"cell {i}", "exec"), found)
        return found | {"open_figures": len(pyplot.get_fignums())}
    finally:
        pyplot.close("all")


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_visible()]


def test_top_to_bottom_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    line = CELLS[0].partition("\n")[0]
    write_yaml(tmp_path / "hp.yaml", CONV | {"epochs": 3})
    settings = {"OUT": str(tmp_path / "runs"), "HYPER": str(tmp_path / "hp.yaml"), "SAMPLES": 5, "DEVICE": "cpu"}
    found = execute(line, **settings)
    names = [f"{x} degrees" for x in (0, 10, 20, 30, 40)]
    zoo, isolated, inherited = found["zoo"], found["isolated"], found["inherited"]
    assert found["names"] == names
    assert min(zoo["accuracy"] + isolated["accuracy"] + inherited["accuracy"]) > 0.5  # chance is 0.1
    assert [len(r["tasks"]) for r in zoo["rounds"]] == [1, 2, 3, 3, 3] and len(isolated["rounds"]) == 5
    assert [len(result["accuracy"]) for result in found["joint_results"]] == [5, 4, 3, 2, 1]
    # The weights of the demonstration, by hand: m = 0.375, exp(0.425 / 0.375) = 3.10599.
    assert found["weights"][3].item() == pytest.approx(3.10599, abs=1e-4)
    seen, joint = found["seen"], found["joint"]
    assert titles(seen) == titles(joint) == names
    assert list(seen.axes[0].lines[0].get_ydata()) == pytest.approx([100 * row[0] for row in zoo["accuracy_matrix"]])
    assert list(joint.axes[0].lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert "Model Zoo" in titles(found["matrix"]) and found["draws_figure"].axes and found["open_figures"] == 2
    torch.testing.assert_close(found["probabilities"], found["stored"], rtol=1e-5, atol=1e-6)
    assert found["stored"].sum().item() == pytest.approx(1)
    files = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*.pt")}
    assert len(files) == 5 + 5 + 5 + 5 + 8 + 8  # learners, and the test labels and the rows of each run
    printed = capsys.readouterr().out
    assert "test accuracy on 10 degrees" in printed
    assert inherited["accuracy_matrix"][0] == zoo["accuracy_matrix"][0]
    frame = found["frame"].set_index("group")
    assert frame.average_accuracy["Model Zoo, inherit"] == pytest.approx(sum(inherited["accuracy"]) / 5)
    gains = [zoo["accuracy_matrix"][t][t] - isolated["accuracy"][t] for t in range(1, 5)]
    assert frame.forward_transfer["Model Zoo"] == pytest.approx(sum(gains) / 4)
    assert frame.average_accuracy["Isolated"] == pytest.approx(sum(isolated["accuracy"]) / 5)
    again = execute(line, **settings)
    assert again["zoo"]["accuracy_matrix"] == zoo["accuracy_matrix"]
    assert {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*.pt")} == files


def test_one_line_makes_it_cifar100(tmp_path, monkeypatch):
    """The line that the first cell names, on images that look like CIFAR-100 to the loader."""
    monkeypatch.chdir(ROOT)
    np.savez(tmp_path / "cifar100.npz", **make_arrays(classes=100, train=2, test=1, size=32, channels=3))
    write_yaml(tmp_path / "hp.yaml", CONV | {"epochs": 1})
    line, other = re.match(r'(DATA = )".*"  # for CIFAR-100: (".*")\n', CELLS[0]).groups()
    found = execute(line + other, OUT=str(tmp_path / "runs"), HYPER=str(tmp_path / "hp.yaml"), DATA_DIR=str(tmp_path),
                    DEVICE="cpu")
    assert found["T"] == 20 and found["names"][1] == "fish" and len(found["zoo"]["rounds"]) == 20
    assert titles(found["seen"]) == found["names"]
    assert [len(result["accuracy"]) for result in found["joint_results"]] == [20, 16, 12, 8, 4]
    torch.testing.assert_close(found["probabilities"], found["stored"], rtol=1e-5, atol=1e-6)


def test_what_is_stored_is_small_and_without_errors():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert str(Path.home()) not in text and "runs/notebook" in CELLS[0]
