"""Whole runs on small data: the limits that must hold, and the run folder."""
import contextlib
import functools
import itertools
import json
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import modelzoo
import multihead
from net.wideresnet import Dropout
from tests.commands import numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from utils import command as cli
from utils import run
from utils.config import Settings, read_settings
from utils.config_files import ConfigError
from utils.device import choose_precision
from utils.learner import learner_path
from utils.log import RunLog
from utils.run import finish, prepare
from utils.run_folder import load_tensors, open_folder
from utils.run_net import make_generator

ROOT = Path(__file__).parent.parent


def test_continual_run_folder(workspace):
    result = start(workspace, "a", "--continual", "--save_nets")
    folder = workspace / "runs/a"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "000.pt", "001.pt", "002.pt", "config.yaml", "lock", "log.jsonl", "result.json",
        "rows.pt", "test_labels.pt"]
    assert result["method"] == "modelzoo" and result["classes"] == [[0, 1], [2, 3], [4, 5]]
    matrix = result["accuracy_matrix"]
    assert [[x is None for x in row] for row in matrix] == [[False, True, True], [False, False, True], [False] * 3]
    assert result["accuracy"] == matrix[-1]
    assert result["average_accuracy"] == pytest.approx(sum(matrix[-1]) / 3)
    assert result["learning_accuracy"] == pytest.approx(sum(matrix[t][t] for t in range(3)) / 3)
    assert [r["tasks"][-1] for r in result["rounds"]] == [0, 1, 2]
    assert [len(r["tasks"]) for r in result["rounds"]] == [1, 2, 3]
    assert result["rounds"][1]["weights"] == [1.0]
    # The next round's weights are those of this round's losses.
    expected = modelzoo.task_weights(result["rounds"][1]["train_loss"][:2]).tolist()
    assert result["rounds"][2]["weights"] == pytest.approx(expected)
    assert result["config"]["tasks_per_round"] == 3
    assert result["config"]["precision"] == choose_precision("auto", torch.device("cpu"))
    assert result["seconds"] == pytest.approx(sum(r["seconds"] for r in result["rounds"]))
    assert result["rows_trained"] == 2 * 20 * (1 + 2 + 3)  # epochs x rows a task x tasks a round
    backbone = 117_840 - 2 * 9 * 80  # one channel instead of three
    assert result["parameters"] == 3 * backbone + (1 + 2 + 3) * 2 * (80 + 1)
    labels = torch.load(folder / "test_labels.pt", weights_only=True)
    assert [y.tolist() for y in labels] == [[0] * 5 + [1] * 5] * 3

    about = yaml.safe_load((folder / "config.yaml").read_text())
    assert about["settings"].pop("data") and about["settings"] == result["config"]
    assert about["versions"] == result["versions"] and about["hardware"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(x["round"], x.get("epoch")) for x in lines] == [(k, e) for k in range(3) for e in (0, 1, None)]
    assert {"train_loss", "train_accuracy", "lr", "seconds"} < set(lines[0])

    saved = torch.load(folder / "learners/001.pt", weights_only=True)
    assert saved["tasks"] == [0, 1]
    assert [x.shape for x in saved["train_logits"] + saved["test_logits"]] == [(20, 2)] * 2 + [(10, 2)] * 2
    assert saved["net"]["state"]["heads.weight"].shape == (2, 2, 80)


def test_stored_logits_give_the_accuracies(workspace):
    """Predictions are saved, metrics computed afterwards: the matrix again, from the files alone."""
    result = start(workspace, "a", "--continual")
    labels = [0] * 5 + [1] * 5
    known = {t: [] for t in range(3)}
    for k in range(3):
        saved = torch.load(workspace / f"runs/a/learners/00{k}.pt", weights_only=True)
        for t, logits in zip(saved["tasks"], saved["test_logits"], strict=True):
            known[t].append(logits.softmax(1))
        for t in range(k + 1):
            predicted = torch.stack(known[t]).mean(0).argmax(1).tolist()
            accuracy = sum(p == y for p, y in zip(predicted, labels, strict=True)) / 10
            assert result["accuracy_matrix"][k][t] == pytest.approx(accuracy)


def test_same_seed_same_result_and_another_seed_another(workspace):
    seeds = {"a": "0", "b": "0", "c": "1"}
    runs = [start(workspace, name, "--continual", "--seed", seed) for name, seed in seeds.items()]
    assert numbers(runs[0]) == numbers(runs[1])
    assert runs[0]["rounds"][0]["train_loss"] != runs[2]["rounds"][0]["train_loss"]


def test_every_random_choice_derives_from_the_runs_seed_and_its_round(workspace, monkeypatch):
    asked = []

    def note(original, seed, round, purpose, *device):
        asked.append((seed, round, purpose))
        return original(seed, round, purpose, *device)

    for module, name in ((modelzoo, "make_generator"), (multihead, "make_generator"), (multihead, "derive_seed"),
                         (run, "make_generator")):
        monkeypatch.setattr(module, name, functools.partial(note, getattr(module, name)))
    start(workspace, "a", "--continual", "--replay_frac", "0.2", "--seed", "7", "--epochs", "1")
    purposes = ("replay", "draw", "init", "shuffle", "augment", "dropout")
    assert Counter(asked) == Counter([(7, 0, "data")] + [(7, k, purpose) for k in range(3) for purpose in purposes])


def test_what_a_learner_is_trained_with(workspace, monkeypatch):
    """Every setting, and each row with the head of its own task: not the newest one's."""
    hyper = {"model": "wrn16_4", "batch": 6, "lr": 0.03, "l2_reg": 0.5, "dropout": 0.4, "epochs": 3}
    write_yaml(workspace / "hp.yaml", hyper | {"schedule": "cosine", "augment": True})
    settings = read_settings("x", "modelzoo", flags(workspace, "--continual"))
    _, _, train, _ = prepare(settings)
    given = {}

    def note(net, images, rows, heads, labels, **more):
        given.update(net=net, rows=rows.tolist(), heads=heads.tolist(), labels=labels.tolist(), **more)
        return iter(())

    monkeypatch.setattr(multihead, "train_net", note)
    list(multihead.train_epochs(settings, "fp32", train, [2, 0], [train.rows(2), train.rows(0)[8:12].repeat(2)], 1))
    assert given["rows"] == [*range(40, 60), 8, 9, 10, 11, 8, 9, 10, 11]
    assert given["heads"] == [0] * 20 + [1] * 8
    assert given["labels"] == [0] * 10 + [1] * 10 + [0, 0, 1, 1] * 2
    keys = ("epochs", "batch", "lr", "l2_reg", "schedule", "augment", "flip", "precision", "start")
    assert [given[key] for key in keys] == [3, 6, 0.03, 0.5, "cosine", True, False, "fp32", None]
    drops = [m for m in given["net"].modules() if isinstance(m, Dropout)]
    assert len(drops) == 6 and all((m.p, m.generator) == (0.4, given["generators"]["dropout"]) for m in drops)
    assert len(set(map(id, given["generators"].values()))) == 3


def test_losses_of_a_run_are_of_the_stored_training_logits(workspace):
    result = start(workspace, "a", "--continual")
    known, labels = {t: [] for t in range(3)}, torch.arange(2).repeat_interleave(10)
    for k in range(3):
        saved = load_tensors(workspace / f"runs/a/learners/00{k}.pt", "cpu")
        for t, logits in zip(saved["tasks"], saved["train_logits"], strict=True):
            known[t].append(logits.double().softmax(1))
        for t in range(k + 1):
            right = torch.stack(known[t]).mean(0)[torch.arange(20), labels]
            assert result["rounds"][k]["train_loss"][t] == pytest.approx(-right.log().mean().item())


def test_metrics_of_a_result_by_hand(workspace):
    settings = read_settings("x", "modelzoo", flags(workspace, "--continual", "--name", "a"))
    (workspace / "runs/a").mkdir(parents=True)
    matrix = [[0.9, None, None], [0.6, 0.5, None], [0.7, 0.8, 0.4]]
    cost = dict.fromkeys(("seconds", "rows_trained", "parameters", "stored_rows"), 0)
    rounds = [{"tasks": [k]} for k in range(3)]
    names = [["a", "b"]] * 3
    train = SimpleNamespace(class_names=names, images=torch.zeros(1, 3, 8, 9))
    found = finish(settings, torch.device("cpu"), "fp32", train, matrix, rounds, cost)
    assert found["class_names"] == names and found["image_shape"] == [3, 8, 9]
    keys = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer")
    # forgetting ((0.9 - 0.7) + (0.5 - 0.8)) / 2
    assert [found[key] for key in keys] == pytest.approx([1.9 / 3, 0.6, -0.05, 0.05])


def test_isolated_is_tasks_per_round_1(workspace):
    """Each task on its own: the zoo with one task a round against learners trained apart from any zoo."""
    result = start(workspace, "a", "--continual", "--tasks_per_round", "1")
    settings = read_settings("x", "modelzoo", flags(workspace, "--continual", "--tasks_per_round", "1"))
    _, precision, train, test = prepare(settings)
    (workspace / "log").mkdir()
    with RunLog(workspace / "log", 1, 1) as log:
        for t in range(3):
            rows = [train.rows(t)]
            learner = multihead.train_learner(settings, precision, train, test, [t], rows, rows, t, log)
            accuracy = (learner.test_logits[0].argmax(1) == test.labels[test.rows(t)]).double().mean().item()
            assert [result["accuracy_matrix"][k][t] for k in range(3)] == [None] * t + [accuracy] * (3 - t)
    assert [r["tasks"] for r in result["rounds"]] == [[0], [1], [2]]
    assert result["forgetting"] == result["backward_transfer"] == 0


def test_replay_of_everything_equals_no_limit(workspace):
    whole = start(workspace, "a", "--continual")
    assert numbers(start(workspace, "b", "--continual", "--replay_frac", "1.0")) == numbers(whole)


def test_limited_replay_trains_and_looks_only_at_what_it_kept(workspace, monkeypatch):
    seen = []
    original = multihead.train_learner

    def spy(settings, precision, train, test, tasks, rows, kept, *more, **named):
        seen.append((train, tasks, rows, kept))
        return original(settings, precision, train, test, tasks, rows, kept, *more, **named)

    monkeypatch.setattr(multihead, "train_learner", spy)
    start(workspace, "a", "--continual", "--replay_frac", "0.2")
    for k, (train, tasks, rows, kept) in enumerate(seen):
        assert rows[-1].equal(train.rows(k))
        for t, r, looked_at in zip(tasks, rows, kept, strict=True):
            assert len(looked_at) == 4  # 0.2 of 10 rows, of 2 classes
            assert looked_at.equal(modelzoo.sample_replay(train, t, 0.2, make_generator(0, t, "replay")))
            if t != k:
                repeats = {1: 5, 2: 2}[k]  # floor(1 / 0.2), floor(1 / 0.4)
                assert r.bincount()[looked_at].tolist() == [repeats] * 4 and len(r) == 4 * repeats
    saved = torch.load(workspace / "runs/a/learners/002.pt", weights_only=True)
    assert [len(x) for x in saved["train_logits"]] == [4, 4, 4] and [len(x) for x in saved["test_logits"]] == [10] * 3


def test_multi_task_mode(workspace):
    result = start(workspace, "a", "--num_rounds", "2", "--tasks_per_round", "1")
    assert len(result["rounds"]) == len(result["accuracy_matrix"]) == 2
    assert result["learning_accuracy"] is result["forgetting"] is result["backward_transfer"] is None
    first = result["rounds"][0]
    assert first["weights"] == [1, 1, 1] and len(first["tasks"]) == 1
    untrained = [t for t in range(3) if t not in first["tasks"]]
    assert [result["accuracy_matrix"][0][t] for t in untrained] == [0.5, 0.5]  # uniform over two classes
    assert [first["train_loss"][t] for t in untrained] == pytest.approx([np.log(2)] * 2)
    assert result["rounds"][1]["weights"] == pytest.approx(modelzoo.task_weights(first["train_loss"]).tolist())


def test_naive_draws_uniformly(workspace):
    result = start(workspace, "a", "--num_rounds", "3", "--tasks_per_round", "2", "--naive")
    assert [r["weights"] for r in result["rounds"]] == [[1, 1, 1]] * 3


def test_warm_start(workspace):
    result = start(workspace, "a", "--num_rounds", "1", "--tasks_per_round", "1", "--warm_start")
    assert (workspace / "runs/a/learners/warm.pt").exists() and len(result["rounds"]) == 1
    # The warm learner's losses decide round 0's draw, and it speaks for the tasks not drawn.
    warm = torch.load(workspace / "runs/a/learners/warm.pt", weights_only=True)
    labels = torch.tensor([0] * 10 + [1] * 10)
    losses = [torch.nn.functional.cross_entropy(x.double(), labels).item() for x in warm["train_logits"]]
    assert result["rounds"][0]["weights"] == pytest.approx(modelzoo.task_weights(losses).tolist())
    t = next(t for t in range(3) if t not in result["rounds"][0]["tasks"])
    accuracy = (warm["test_logits"][t].argmax(1) == torch.tensor([0] * 5 + [1] * 5)).double().mean().item()
    assert result["accuracy"][t] == accuracy


def test_multihead(workspace):
    result = start(workspace, "a", method="multihead")
    assert result["method"] == "multihead" and len(result["accuracy_matrix"]) == 1
    assert result["rounds"][0]["tasks"] == [0, 1, 2] and result["forgetting"] is None
    assert numbers(start(workspace, "b", method="multihead")) == numbers(result)


def test_multihead_reports_accuracy_on_test_rows_and_loss_on_training_rows(workspace):
    arrays = make_arrays()
    arrays["test_labels"] = arrays["test_labels"] ^ 1  # what is learned is wrong on every test row
    np.savez(workspace / "data/toy.npz", **arrays)
    result = start(workspace, "a", "--epochs", "4", method="multihead")
    saved = load_tensors(workspace / "runs/a/learners/000.pt", "cpu")
    train, test = torch.arange(2).repeat_interleave(10), torch.arange(2).repeat_interleave(5)
    on_train = [(x.argmax(1) == train).double().mean().item() for x in saved["train_logits"]]
    accuracy = [(x.argmax(1) == test).double().mean().item() for x in saved["test_logits"]]
    loss = [torch.nn.functional.cross_entropy(x.double(), train).item() for x in saved["train_logits"]]
    assert result["accuracy"] == accuracy != on_train
    assert result["rounds"][0]["train_loss"] == pytest.approx(loss)


def test_unequal_class_counts_samples_and_colour(workspace):
    np.savez(workspace / "data/toy.npz", **make_arrays(classes=9, channels=3, size=32))
    tasks = [[0, 1], [2, 3, 4, 8], [5, 6, 7]]
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": tasks})
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True, "schedule": "cosine"})
    result = start(workspace, "a", "--continual", "--samples", "6")
    saved = torch.load(workspace / "runs/a/learners/002.pt", weights_only=True)
    shape = dict(zip(saved["tasks"], (tuple(x.shape) for x in saved["train_logits"]), strict=True))
    assert shape == {0: (12, 2), 1: (24, 4), 2: (18, 3)}
    assert len(result["accuracy"]) == 3


def test_interrupted_run_resumes_to_the_same_result(workspace):
    whole = start(workspace, "a", "--continual")
    shutil.copytree(workspace / "runs/a", workspace / "runs/b")
    for name in ("result.json", "learners/002.pt", "learners/001.pt"):
        (workspace / "runs/b" / name).unlink()
    log = workspace / "runs/b/log.jsonl"
    # Killed in the middle of a line.
    log.write_text("\n".join(log.read_text().splitlines()[:4]) + '\n{"round": 1, "epo')
    resumed = start(workspace, "b", "--continual", "--resume")
    assert numbers(resumed) == numbers(whole)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(x["round"], x.get("epoch")) for x in lines] == [(k, e) for k in range(3) for e in (0, 1, None)]
    assert numbers(start(workspace, "c", "--continual", "--resume")) == numbers(whole)  # nothing there yet: starts it


def test_a_run_is_resumed_with_its_files_moved(workspace):
    whole = start(workspace, "a", "--continual")
    (workspace / "runs/a/result.json").unlink()
    for name in ("data.yaml", "hp.yaml"):
        (workspace / name).rename(workspace / f"moved-{name}")
    moved = ["--data_config", str(workspace / "moved-data.yaml"), "--hp_config", str(workspace / "moved-hp.yaml")]
    assert numbers(start(workspace, "a", "--continual", "--resume", *moved)) == numbers(whole)


def test_existing_folder_is_neither_overwritten_nor_mixed(workspace, capsys):
    start(workspace, "a", "--continual")
    before = {p: p.read_bytes() for p in (workspace / "runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    for more, message in (
        (["--continual"], "already exists"),
        (["--continual", "--resume", "--seed", "1"], "seed 0, not 1"),
        (["--resume"], "was run with continual True, not False"),
    ):
        assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--name", "a", *more)) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out
    assert {p: p.read_bytes() for p in (workspace / "runs").rglob("*") if p.is_file()} == before


def test_diverging_learner_stops_the_run_and_keeps_the_zoo(workspace, monkeypatch, capsys):
    whole = start(workspace, "a", "--continual")
    train_net, calls = multihead.train_net, itertools.count()

    def diverge_later(*args, lr, **more):
        return train_net(*args, lr=lr if next(calls) == 0 else 1e9, **more)

    with monkeypatch.context() as m:
        m.setattr(multihead, "train_net", diverge_later)
        command = flags(workspace, "--name", "b", "--continual")
        assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, command) == 2
    err = capsys.readouterr().err
    assert "round 2, epoch 1: the training loss is" in err and "learning rate 1e+09" in err and err.count("\n") == 1
    assert [file.name for file in (workspace / "runs/b/learners").iterdir()] == ["000.pt"]
    assert numbers(start(workspace, "b", "--continual", "--resume")) == numbers(whole)


@pytest.mark.parametrize("changed", ["train_images", "train_labels", "test_images", "test_labels"])
def test_resume_on_other_data_is_refused(workspace, capsys, changed):
    """Once: data of the same shape under the same name were mixed in without a word."""
    start(workspace, "a", "--continual")
    (workspace / "runs/a/learners/002.pt").unlink()
    arrays = make_arrays()
    arrays[changed] = arrays[changed] ^ 1
    np.savez(workspace / "data/toy.npz", **arrays)
    capsys.readouterr()
    command = flags(workspace, "--name", "a", "--continual", "--resume")
    assert cli.command("x", "modelzoo", modelzoo.run, command) == 2
    assert "was run with data " in capsys.readouterr().err


def test_damaged_test_labels_are_written_again(workspace):
    start(workspace, "a", "--continual")
    file = workspace / "runs/a/test_labels.pt"
    whole = file.read_bytes()
    file.write_bytes(b"damaged")
    start(workspace, "a", "--continual", "--resume")
    assert file.read_bytes() == whole


def test_a_run_goes_on_only_with_every_setting_that_decides_it(tmp_path):
    free = {"resume", "dry_run", "out", "name", "data_dir", "tensorboard", "extend", "data_config", "hp_config",
            "capture"}
    settings = {f.name: 1 for f in fields(Settings)}
    with open_folder(tmp_path / "a", settings, False, {"hardware": "a CPU"}):
        pass
    for key in settings:
        refused = pytest.raises(ConfigError, match=f"was run with {key} 1, not 2")
        with contextlib.nullcontext() if key in free else refused, open_folder(
            tmp_path / "a", settings | {key: 2}, True, {"hardware": "a CPU"}):
            pass


def test_a_runs_zoo_weighs_the_first_learner_of_a_task_by_1_over_r(workspace):
    """From the files alone, as the loss is what tells one weighting from another on few rows."""
    result = start(workspace, "a", "--continual", "--replay_frac", "0.2")
    saved = [load_tensors(learner_path(workspace / "runs/a", k), "cpu") for k in range(3)]
    a, b, c = (s["train_logits"][s["tasks"].index(0)].double().softmax(1) for s in saved)
    labels = torch.tensor([0, 0, 1, 1])  # 0.2 of 10 rows of each class
    for k, mean in ((1, (5 * a + b) / 6), (2, (5 * a + b + c) / 7)):
        loss = -mean[torch.arange(4), labels].log().mean().item()
        assert result["rounds"][k]["train_loss"][0] == pytest.approx(loss)


@pytest.mark.parametrize("flip", [True, False])
def test_photographs_are_mirrored_in_training_and_digits_are_not(workspace, monkeypatch, flip):
    settings = read_settings("x", "modelzoo", flags(workspace))
    train = replace(prepare(settings)[2], flip=flip)
    given = []
    monkeypatch.setattr(multihead, "train_net", lambda *args, flip, **more: given.append(flip) or iter(()))
    list(multihead.train_epochs(settings, "fp32", train, [0], [train.rows(0)], 0))
    assert given == [flip]
