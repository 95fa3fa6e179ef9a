"""results/*.sh: every command that they give works, at toy size; without data they end in the one line of the data."""
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import modelzoo
import multihead
from results import pretrained, variants
from tests.conftest import CONV, make_arrays, write_yaml
from tools import peers, plot, report
from tools.points import read_points
from utils.command import command, guard
from utils.learner import learner_path
from utils.run_folder import load_tensors

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "results").glob("*.sh") if path.name != "common.sh")
AVALANCHE = importlib.util.find_spec("avalanche") is not None
MAIN = {
    "modelzoo.py": functools.partial(command, "modelzoo.py", "modelzoo", modelzoo.run),
    "multihead.py": functools.partial(command, "multihead.py", "multihead", multihead.run),
    "results/pretrained.py": pretrained.main,
    "results/variants.py": variants.main,
    **{f"tools/{module.__name__.rpartition('.')[2]}.py": functools.partial(
        lambda main, argv: guard("x", lambda: main(argv)), module.main) for module in (peers, plot, report)},
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Data of CIFAR-100's and MNIST's shapes, and two tasks of either; what the scripts get from the environment."""
    for name in ("load_backbone", "build_net", "train_epochs"):  # which variants.py replaces
        monkeypatch.setattr(multihead, name, getattr(multihead, name))
    monkeypatch.chdir(ROOT)
    np.savez(tmp_path / "cifar100.npz", **make_arrays(classes=100, train=5, test=1, size=32, channels=3))
    np.savez(tmp_path / "mnist.npz", **make_arrays(classes=10, train=5, test=1, size=28))
    write_yaml(tmp_path / "hp.yaml", {**CONV, "epochs": 1})
    return {"DATA_DIR": str(tmp_path), "OUT": str(tmp_path / "my runs"), "SEEDS": "0", "PEERS": "replay" * AVALANCHE,
            "FIGURE": str(tmp_path / "figure.png"), "TABLE": str(tmp_path / "table.md"), "EPOCHS": "1", "ORDERS": "0 1",
            "ISOLATED": "0 1 2 3", "FIRST": "1", "SHORT": "2", "ZOOS": "0", "FIGURES": str(tmp_path)}


def read_commands(script, toy, tmp_path):
    """The commands that a script gives Python, a list of words each; none of them is run."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >> "$LIST"; echo >> "$LIST"\n')
    python.chmod(0o755)
    environment = os.environ | toy | {"PYTHON": str(python), "LIST": str(tmp_path / "list")}
    subprocess.run([ROOT / "results" / script], env=environment, check=True, capture_output=True)
    return [shlex.split(line) for line in (tmp_path / "list").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_works_at_toy_size(script, toy, tmp_path, capsys):
    commands = read_commands(script, toy, tmp_path)
    tasks = {"cifar100": [[1, 2], [3, 4]], "digits": [[1, 2], [3, 4]], "mnist": [[1, 2], [3, 4]]}
    assert commands[-1][0] in ("tools/report.py", "results/variants.py")
    for file, *words in commands:
        if "--data_config" in words:
            i = words.index("--data_config") + 1
            whole = (ROOT / words[i]).read_text()
            kind = next(kind for kind in tasks if kind in words[i])
            lines = [line for line in whole.splitlines() if line.startswith(("dataset:", "path:", "size:"))]
            own = "[[c1, c2], [c3, c4]]" if "path:" in whole else tasks[kind]
            (tmp_path / Path(words[i]).name).write_text("\n".join([*lines, f"tasks: {own}"]))
            words[i] = str(tmp_path / Path(words[i]).name)
            hyper = Path(words[words.index("--hp_config") + 1])
            keys = yaml.safe_load((ROOT / hyper).read_text())
            toy_model = {"model": "conv_8" if hyper.stem == "wide" else "conv"}
            write_yaml(tmp_path / hyper.name, {**keys, **CONV, **toy_model})
            words[words.index("--hp_config") + 1] = str(tmp_path / hyper.name)
        for flag in {"--num_rounds", "--num_tasks"} & set(words):
            i = words.index(flag) + 1
            words[i] = str(min(int(words[i]), 2))
        assert MAIN[file](words) == 0, (file, words, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert "|" in out.splitlines()[-1] or "±" in out


@pytest.mark.parametrize("script", ["inherit.sh", "variants.sh"])  # the others begin as the first does
def test_without_data_a_script_ends_in_the_line_of_the_data(script, toy, tmp_path):
    environment = os.environ | toy | {"PYTHON": sys.executable, "DATA_DIR": str(tmp_path / "none"),
                                      "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([ROOT / "results" / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and ("cifar100.npz" in lines[0] or "mnist.npz" in lines[0])


def test_hold_out_takes_every_fifth_training_row_of_a_class_and_no_test_row(toy, tmp_path):
    assert variants.main(["hold_out", str(tmp_path), str(tmp_path / "new")]) == 0
    old, new = np.load(tmp_path / "cifar100.npz"), np.load(tmp_path / "new/cifar100.npz")
    for c in (0, 57):
        rows = old["train_images"][old["train_labels"] == c]
        assert np.array_equal(new["test_images"][new["test_labels"] == c], rows[:1])
        assert np.array_equal(new["train_images"][new["train_labels"] == c], rows[1:])


@pytest.fixture
def grow(toy, tmp_path):
    """A function that grows a zoo of two tasks in one of the ways and returns what its learners hold."""
    write_yaml(tmp_path / "data.yaml", {"dataset": "cifar100", "tasks": [[1, 2], [3, 4], [5, 6]]})

    def grow(way, *more):
        words = ["--data_config", str(tmp_path / "data.yaml"), "--hp_config", str(tmp_path / "hp.yaml"), "--data_dir",
                 str(tmp_path), "--out", str(tmp_path / "runs"), "--name", way, "--continual", "--inherit",
                 "--save_nets", *more]
        status = MAIN["modelzoo.py"](words) if way == "chain" else variants.main([way, *words])
        assert status == 0
        folder = tmp_path / "runs" / way
        return [load_tensors(learner_path(folder, k), "cpu") for k in range(3)]

    return grow


@pytest.mark.parametrize("way", variants.WAYS)
def test_each_way_changes_what_it_says(grow, monkeypatch, way):
    chain = grow("chain")
    starts, original = [], multihead.train_net

    def note(net, *arguments, **settings):
        starts.append(({key: x.clone() for key, x in net.state_dict().items()}, settings["lr"]))
        return original(net, *arguments, **settings)

    monkeypatch.setattr(multihead, "train_net", note)
    other = grow(way)
    assert other[0]["test_logits"][0].equal(chain[0]["test_logits"][0])
    first, last = (other[k]["net"]["state"] for k in (0, 1))
    start, rate = starts[2]
    key = "backbone.layers.3.weight"
    fresh = multihead.build_net("conv", (3, 32, 32), [2] * 3, 0, multihead.derive_seed(0, 2, "init")).state_dict()
    kept = {"perturb-0.8": 0.8, "perturb-0.4": 0.4}.get(way)
    mixed = last[key] if kept is None else kept * last[key] + (1 - kept) * fresh[key]
    expected = first[key] if way == "star" else mixed
    torch.testing.assert_close(start[key], expected)
    assert rate == pytest.approx(0.003 if way == "rate-0.3" else 0.01)
    if way == "heads":
        tasks = other[2]["tasks"]
        for t in (0, 1):
            i = other[1]["tasks"].index(t)
            assert start["heads.weight"][tasks.index(t)].equal(last["heads.weight"][i])
        assert start["heads.weight"][2].equal(fresh["heads.weight"][2])


def test_members_by_hand(tmp_path, capsys, monkeypatch):
    """Three learners of one task, whose probabilities of class 1 on three rows of class 1 are given."""
    chances = ([0.9, 0.1, 0.3], [0.8, 0.6, 0.2], [0.3, 0.6, 0.9])
    logits = [torch.tensor([[1 - x, x] for x in row]).log() for row in chances]
    learners = [SimpleNamespace(tasks=(0,), train_logits=(x,), test_logits=(x,)) for x in logits]
    settings = {"tasks": [["0", "1"]], "class_names": [["0", "1"]], "names": None, "replay_frac": 1.0}

    def members(of, weigh_by_round=False):
        settings["weigh_by_round"] = weigh_by_round
        monkeypatch.setattr(modelzoo, "load_run", lambda path, _: (settings, [torch.tensor([1, 1, 1])], of, []))
        status = variants.main(["members", "a/run"])
        caught = capsys.readouterr()
        return status, (caught.out if status == 0 else caught.err).splitlines()[-1]

    # Means 0.667, 0.433, 0.467; by rounds 1, 2, 3 (0.9 + 1.6 + 0.9) / 6 = 0.567, 0.517, 0.567; the last 0, 1, 1;
    # a member 1/3, 2/3 and 2/3; they differ in 1, 3 and 2 of 3 rows.
    assert members(learners) == (0, "| run | 33.33 | 100.00 | 66.67 | 55.56 | 66.67 |")
    # The first column is the run's own accuracy; of a single member no two differ.
    assert members(learners, weigh_by_round=True) == (0, "| run | 100.00 | 100.00 | 66.67 | 55.56 | 66.67 |")
    assert members(learners[:1]) == (0, "| run | 33.33 | 33.33 | 33.33 | 33.33 | – |")
    assert members([]) == (2, "variants.py: a/run: no learner knows 0 1 yet; finish the run with --resume first")


def test_what_variants_does_not_know_is_one_line(capsys):
    assert variants.main(["moon"]) == 2
    assert capsys.readouterr().err.startswith("variants.py: give hold_out DATA NEW, members RUN ..., or one of star, ")
    assert variants.main(["heads", "--continual", "--inherit"]) == 2
    assert capsys.readouterr().err == "variants.py: heads needs --inherit and --save_nets\n"


def test_the_table_of_compute_is_what_its_figure_is_drawn_from():
    """Per method and length: mean, spread, and the number of seeds where it is not three."""
    text = (ROOT / "results/inherit.md").read_text(encoding="utf-8").partition("## Accuracy against compute")[2]
    text = text.partition("\n## ")[0]
    header, _, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    epochs = [int(re.match(r" (\d+) epoch", cell)[1]) for cell in header[2:]]
    points = read_points([ROOT / "results/compute.csv"]).set_index(["method", "epochs"])
    shown = 0
    for name, work, *cells in rows:
        for n, cell in zip(epochs, cells, strict=True):
            method = name.strip().replace("`--inherit`", "inherit")
            if cell.strip() != "–":
                point, shown = points.loc[(method, n), :], shown + 1
                spread = f" ± {100 * point.sd:.2f}" if point.n > 1 else ""
                seeds = f" ({point.n:.0f})" if point.n != 3 else ""
                assert cell.strip().strip("*") == f"{100 * point['mean']:.2f}{spread}{seeds}"
                assert f"{point.operations / n / 1e12:.1f}" == work.strip()
    assert shown == len(points)
