"""CONTRIBUTING.md: its walkthroughs, applied to a copy of the code, train; its commands, files and names are there."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets.digits import load_digits

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = [block.partition("\n") for block in TEXT.split("```")[1::2]]  # language, newline, content
DIFFS = [content for language, _, content in BLOCKS if language == "diff"]
COMMANDS = [shlex.split(content.replace("\\\n", " ")) for _, _, content in BLOCKS if content.startswith("python ")]


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A copy of the code with the edits of both walkthroughs; returns its folder."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    copy = tmp_path_factory.mktemp("edited")
    for name in ("config", "datasets", "net", "utils"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("before_torch.py", "modelzoo.py", "multihead.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for diff in DIFFS:
        done = subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def train(copy, command, *more):
    """Run a command of CONTRIBUTING.md in the copy, with more flags; returns its result.json."""
    words = [sys.executable, *command[1:], "--device", "cpu", "--name", "a", "--samples", "10", *more]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((copy / "runs/a/result.json").read_text())
    shutil.rmtree(copy / "runs")
    return result


def test_there_are_two_walkthroughs_of_less_than_20_lines():
    assert len(DIFFS) == len(COMMANDS) == 2
    for diff in DIFFS:
        added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert len([line for line in added if line != "+"]) < 20


def test_a_new_dataset(edited):
    (edited / "data").mkdir()
    arrays = [array.numpy() for split in load_digits() for array in split]  # in the place of the characters
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = dict(zip(names, arrays, strict=True))
    np.savez(edited / "data/kmnist.npz", **{k: v[:, 0] if v.ndim == 4 else v for k, v in arrays.items()})
    result = train(edited, COMMANDS[0])
    assert result["config"]["dataset"] == "kmnist" and result["classes"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert result["average_accuracy"] > 0.8  # chance is 0.5


def test_a_new_network(edited):
    result = train(edited, COMMANDS[1])
    assert result["config"]["model"] == "perceptron" and result["config"]["epochs"] == 5
    assert result["average_accuracy"] > 0.8  # chance is 0.5
    # Round 0 has one head of two classes, the four others have 2 to 5; all have a hidden layer of 256.
    assert result["parameters"] == 5 * (28 * 28 + 1) * 256 + (1 + 2 + 3 + 4 + 5) * 2 * 257


def test_edited_code_is_as_ours(edited):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=edited, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_what_it_names_is_there():
    for name in re.findall(r"`([\w/.]+\.(?:py|md|yaml)|[\w/]+/|\.ci/run)`", TEXT):
        if name not in ("config/dataset/split_kmnist.yaml", "config/hyperparam/perceptron.yaml"):
            assert (ROOT / name).exists(), name
    for name, file in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", TEXT):
        assert re.search(rf"^(def |class |){name}\b", (ROOT / file).read_text(), re.M), f"{name} in {file}"
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in re.findall(r"make ([\w-]+)[ `]", TEXT))
    results = {f"results/{file.name}" for file in (ROOT / "results").glob("*.md")}
    assert results == set(re.findall(r"results/\w+\.md", TEXT))  # every table has its line


def test_map_of_the_code():
    section = TEXT.partition("## Reading the code")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:4] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for file, names in rows:
        text = (ROOT / file.strip(" `")).read_text()
        for name in names.strip(" `").split("`, `"):
            assert re.search(rf"^(def|class) {name}\b", text, re.M), f"{name} in {file}"
