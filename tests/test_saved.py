"""Saved networks predict as stored; an extended run equals one that had all tasks from the start."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import modelzoo
import multihead
from datasets.data import DataError
from modelzoo import Zoo
from tests.commands import numbers, shorten, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from utils import command as cli
from utils import extend as extension
from utils.config_files import ConfigError
from utils.learner import learner_path
from utils.run_folder import load_tensors, save_tensors

ROOT = Path(__file__).parent.parent
NAMES = ["dark", "middle", "bright"]


@pytest.fixture
def saved(workspace):
    """A run with networks, of three named tasks; returns its folder."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]],
                                         "names": NAMES})
    start(workspace, "a", "--continual", "--save_nets")
    return workspace / "runs" / "a"


def test_loaded_zoo_predicts_new_images_as_the_run_did(saved, tmp_path):
    arrays = make_arrays()
    zoo = Zoo.load(saved, "cpu")
    assert zoo.names == NAMES
    for t, name in enumerate(NAMES):
        rows = np.concatenate([np.flatnonzero(arrays["test_labels"] == label) for label in (2 * t, 2 * t + 1)])
        images = arrays["test_images"][rows]
        stored = zoo.predict_log_probs(t).exp()
        assert len(stored) == 10 and stored.sum(1).tolist() == pytest.approx([1] * 10)
        for given in (images, images[..., 0], torch.from_numpy(images).permute(0, 3, 1, 2)):
            torch.testing.assert_close(zoo.predict(given, name), stored, rtol=1e-5, atol=1e-6)
        assert zoo.predict(images, t).equal(zoo.predict(images, name))
    files = [tmp_path / f"{i}.png" for i in range(10)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image[..., 0]).save(file)
    torch.testing.assert_close(zoo.predict(files, 2), stored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("environment", "off"), [
    ({}, 1e-7),
    # An older processor, which rounds otherwise and has no bfloat16 of its own.
    ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, 5e-3),
])
def test_a_fresh_process_needs_three_lines(workspace, environment, off):
    start(workspace, "a", "--continual", "--save_nets", "--precision", "bf16")
    saved = str(workspace / "runs" / "a")
    images = make_arrays()["test_images"]
    np.save(workspace / "images.npy", images)
    code = (f"from modelzoo import Zoo\nzoo = Zoo.load({saved!r}, device='cpu')\n"
            f"print(zoo.predict(__import__('numpy').load({str(workspace / 'images.npy')!r}), 0).tolist())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=os.environ | environment)
    found = torch.tensor(json.loads(done.stdout), dtype=torch.float64)
    torch.testing.assert_close(found, Zoo.load(saved, "cpu").predict(images, 0), rtol=0, atol=off)


@pytest.mark.parametrize("more, weights", [((), (4, 1, 1)), (("--weigh_by_round",), (4, 2, 3))])
def test_a_loaded_zoo_weighs_its_learners_as_the_run_did(workspace, more, weights):
    start(workspace, "a", "--continual", "--replay_frac", "0.25", "--save_nets", *more)
    zoo = Zoo.load(workspace / "runs/a", "cpu")
    stored = [load_tensors(learner_path(workspace / "runs/a", k), "cpu") for k in range(3)]
    each = [s["test_logits"][s["tasks"].index(0)].double().softmax(1) for s in stored]
    mean = sum(w * p for w, p in zip(weights, each, strict=True)) / sum(weights)
    torch.testing.assert_close(zoo.predict_log_probs(0).exp(), mean)
    arrays = make_arrays()
    rows = np.concatenate([np.flatnonzero(arrays["test_labels"] == label) for label in (0, 1)])
    torch.testing.assert_close(zoo.predict(arrays["test_images"][rows], 0), mean, rtol=1e-5, atol=1e-6)


def test_a_run_from_before_the_flag_weighs_its_learners_alike(workspace):
    start(workspace, "a", "--continual")
    path = workspace / "runs/a/config.yaml"
    text = path.read_text()
    assert text.count("weigh_by_round: false") == 1
    path.write_text("\n".join(line for line in text.splitlines() if "weigh_by_round" not in line))
    assert Zoo.load(path.parent, "cpu").weights == [3, 2, 1]


def test_each_learner_predicts_through_its_own_head(saved):
    """Heads stand in the order in which a learner's tasks were drawn, which need not be the config's."""
    zoo, arrays = Zoo.load(saved, "cpu"), make_arrays()
    one = zoo.learners[1]
    assert one.tasks == (0, 1)
    zoo.learners, zoo.nets, zoo.shares = [replace(one, tasks=(1, 0))], zoo.nets[1:2], zoo.shares[1:2]
    rows = np.concatenate([np.flatnonzero(arrays["test_labels"] == label) for label in (0, 1)])
    through_head_0 = one.test_logits[0].double().softmax(1)
    torch.testing.assert_close(zoo.predict(arrays["test_images"][rows], 1), through_head_0, rtol=1e-5, atol=1e-6)


def test_a_loaded_zoo_has_the_warm_learner(workspace):
    start(workspace, "a", "--num_rounds", "1", "--tasks_per_round", "1", "--warm_start")
    assert [len(one.tasks) for one in Zoo.load(workspace / "runs/a", "cpu").learners] == [3, 1]


def test_a_zoo_of_an_unfinished_run_is_its_learners_so_far(saved):
    learner_path(saved, 2).unlink()
    (saved / "result.json").unlink()
    zoo = Zoo.load(saved, "cpu")
    assert [learner.tasks[-1] for learner in zoo.learners] == [0, 1]
    assert zoo.predict(np.zeros((3, 24, 24), "uint8"), 2).tolist() == [[0.5, 0.5]] * 3  # nobody knows the task yet


@pytest.mark.parametrize("lost, rest", [(2, "the result"), (1, "a later learner")])
def test_a_learner_that_is_lost_is_named(saved, lost, rest):
    """Once: the zoo was that of the learners before it, and guessed on the tasks of the others."""
    learner_path(saved, lost).unlink()
    if rest == "a later learner":
        (saved / "result.json").unlink()
    with pytest.raises(ConfigError, match=f"00{lost}.pt: missing, though the run went on; --resume trains it again"):
        Zoo.load(saved, "cpu")


def test_a_lost_learner_that_others_inherited_from_is_not_told_to_be_trained_again(workspace):
    """It would need the network before it, which is kept of the last one alone."""
    start(workspace, "a", "--continual", "--inherit")
    learner_path(workspace / "runs/a", 1).unlink()
    with pytest.raises(ConfigError, match="001.pt: missing, though the run went on; put it back, or train all again"):
        Zoo.load(workspace / "runs/a", "cpu")


@pytest.mark.parametrize(("images", "task", "message"), [
    (np.zeros((2, 24, 25), "uint8"), 0, r"images must be uint8 \[N, 24, 24, 1\] or \[N, 24, 24\], as"),
    (np.zeros((2, 24, 24)), 0, "must be uint8"),
    (np.zeros((24,), "uint8"), 0, "must be uint8"),
    ([], 0, "the list is empty"),
    ("cat.png", 0, "cat.png: not a readable image"),
    (["missing.png"], 0, "missing.png: not a readable image"),
    (np.zeros((2, 24, 24), "uint8"), "grey", "'grey' is not one of dark, middle, bright"),
    (np.zeros((2, 24, 24), "uint8"), 3, "3 is not one of"),
    (np.zeros((2, 24, 24), "uint8"), 1.0, "1.0 is not one of"),
])
def test_predict_refuses(saved, images, task, message):
    with pytest.raises((ConfigError, DataError), match=message):
        Zoo.load(saved, "cpu").predict(images, task)


def test_predict_refuses_the_name_of_several_tasks(workspace):
    """Once: it took the first."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [0, 1]]})
    start(workspace, "a", "--continual", "--save_nets")
    zoo, image = Zoo.load(workspace / "runs/a", "cpu"), np.zeros((1, 24, 24), "uint8")
    with pytest.raises(ConfigError, match="'0 1' names 2 tasks; give the index of one"):
        zoo.predict(image, "0 1")
    assert zoo.predict(image, 1).shape == (1, 2)


def change_net(folder, tasks=None, **changes):
    path = learner_path(folder, 1)
    content = load_tensors(path, "cpu")
    content["net"].update(changes)
    content["tasks"] = tasks or content["tasks"]
    save_tensors(path, content)


@pytest.mark.parametrize(("breakage", "message"), [
    (lambda f: shutil.rmtree(f), "config.yaml: cannot be read"),
    (lambda f: learner_path(f, 0).unlink(), "000.pt: cannot be read"),
    (lambda f: learner_path(f, 1).write_bytes(learner_path(f, 1).read_bytes()[:-99]), "001.pt: damaged"),
    (lambda f: learner_path(f, 1).write_bytes(b"cos\nsystem\n(S'touch EXECUTED'\ntR."), "001.pt: damaged"),
    (lambda f: save_tensors(learner_path(f, 1), {"weights": 1}), "001.pt: damaged or foreign"),
    (lambda f: change_net(f, state={}), "001.pt: damaged or foreign .*Missing key"),
    (lambda f: change_net(f, model="transformer"), "001.pt: damaged or foreign .*transformer"),
    (lambda f: change_net(f, tasks=[0, 99]), "001.pt: damaged or foreign"),
    (lambda f: change_net(f, mean=0.0), "001.pt: damaged or foreign .*mean 0.0"),
    (lambda f: (f / "config.yaml").write_text("settings: 3"), "config.yaml: damaged or foreign"),
])
def test_a_damaged_or_foreign_run_is_one_line(saved, monkeypatch, tmp_path, breakage, message):
    monkeypatch.chdir(tmp_path)
    breakage(saved)
    with pytest.raises(ConfigError, match=message) as e:
        Zoo.load(saved, "cpu")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "EXECUTED").exists()


def test_without_save_nets_only_what_is_stored_can_be_read(workspace):
    start(workspace, "a", "--continual")
    zoo = Zoo.load(workspace / "runs" / "a", "cpu")
    assert zoo.predict_log_probs(0).shape == (10, 2)
    with pytest.raises(ConfigError, match="--save_nets"):
        zoo.predict(np.zeros((2, 24, 24), "uint8"), 0)


@pytest.mark.parametrize("more", [(), ("--replay_frac", "0.3", "--save_nets"), ("--samples", "7", "--seed", "3")])
def test_an_extended_run_equals_one_that_had_all_tasks_from_the_start(workspace, monkeypatch, more):
    start(workspace, "old", "--continual", *more, *shorten(workspace))
    whole = start(workspace, "whole", "--continual", *more)
    trained, original = [], multihead.train_learner

    def spy(settings, precision, train, test, tasks, *rest, **named):
        trained.append(tasks)
        return original(settings, precision, train, test, tasks, *rest, **named)

    monkeypatch.setattr(multihead, "train_learner", spy)
    runs = workspace / "runs"
    extended = start(workspace, "new", "--continual", *more, "--extend", str(runs / "old"))
    assert trained == [whole["rounds"][2]["tasks"]]  # the new round alone
    assert numbers(extended) == numbers(whole)
    for k in range(3):
        a, b = (load_tensors(learner_path(runs / name, k), "cpu") for name in ("whole", "new"))
        assert all(x.equal(y) for key in ("train_logits", "test_logits") for x, y in zip(a[key], b[key], strict=True))
    # The old run is left as it was, and the new one does not need it any more.
    shutil.rmtree(runs / "old")
    (runs / "new" / "result.json").unlink()
    assert numbers(start(workspace, "new", "--continual", *more, "--resume")) == numbers(whole)


def test_a_run_killed_while_it_copies_learners_is_not_resumed_without_them(workspace, monkeypatch, capsys):
    start(workspace, "old", "--continual", "--num_rounds", "2")
    extend, write_file, written = ["--extend", str(workspace / "runs" / "old")], extension.write_file, []

    def stop_at_the_second(*file):
        if written:
            raise KeyboardInterrupt
        written.append(write_file(*file))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extension, "write_file", stop_at_the_second)
        start(workspace, "new", "--continual", *extend)
    words = flags(workspace, "--name", "new", "--continual", "--resume")
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    assert f"has not yet copied all learners of {extend[1]}; give --extend again" in capsys.readouterr().err
    assert len(list((workspace / "runs/new/learners").iterdir())) == 1
    extended = start(workspace, "new", "--continual", "--resume", *extend)
    assert numbers(extended) == numbers(start(workspace, "whole", "--continual"))


def test_more_rounds_of_the_same_tasks_are_an_extension_too(workspace):
    start(workspace, "old", "--continual", "--num_rounds", "1")
    extended = start(workspace, "new", "--continual", "--extend", str(workspace / "runs" / "old"))
    assert numbers(extended) == numbers(start(workspace, "whole", "--continual"))


def test_networks_that_were_kept_need_not_be_kept_of_new_tasks(workspace):
    start(workspace, "old", "--continual", "--num_rounds", "1", "--save_nets")
    old = ["--continual", "--extend", str(workspace / "runs" / "old")]
    whole = numbers(start(workspace, "whole", "--continual"))
    assert numbers(start(workspace, "new", *old)) == whole == numbers(start(workspace, "all", *old, "--save_nets"))
    kept = [[net is not None for net in Zoo.load(workspace / "runs" / name).nets] for name in ("new", "all")]
    assert kept == [[True, False, False], [True] * 3]


def brighten(workspace):
    arrays = make_arrays()
    arrays["train_images"] += 1
    np.savez(workspace / "data" / "toy.npz", **arrays)


@pytest.mark.parametrize(("change", "more", "message"), [
    (None, ["--seed", "1"], "seed is 1, not as in .*old, which was run with seed 0"),
    (None, ["--save_nets"], "--save_nets: .*old did not keep every network"),
    (None, ["--tasks_per_round", "1"], "tasks_per_round is 1"),
    (None, ["--num_rounds", "1"], "holds 2 learners"),
    (lambda w: write_yaml(w / "hp.yaml", CONV | {"lr": 0.02}), [], "lr is 0.02, not as in"),
    (lambda w: write_yaml(w / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[2, 3], [0, 1], [4, 5]]}),
     [], "the first 2 tasks are not as in"),
    (brighten, [], "the data of the first 2 tasks"),
    (lambda w: learner_path(w / "runs" / "old", 1).write_bytes(b"cut"), [], "001.pt: damaged"),
    (lambda w: shutil.rmtree(w / "runs" / "old"), [], "config.yaml: cannot be read"),
    (None, ["--extend", ""], "config.yaml: cannot be read"),
])
def test_what_cannot_be_extended_is_one_line_and_nothing_is_written(workspace, capsys, change, more, message):
    start(workspace, "old", "--continual", *shorten(workspace))
    if change:
        change(workspace)
    capsys.readouterr()
    words = flags(workspace, "--name", "new", "--continual", "--extend", str(workspace / "runs" / "old"), *more)
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (workspace / "runs" / "new").exists()


def test_extend_needs_continual(workspace, capsys):
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--extend", "x")) == 2
    assert "--extend needs --continual" in capsys.readouterr().err


def test_learners_of_another_machine_are_kept_though_its_draw_went_otherwise(workspace, monkeypatch):
    old = start(workspace, "old", "--continual", "--tasks_per_round", "2")
    drawn, _ = old["rounds"][2]["tasks"]
    monkeypatch.setattr(modelzoo, "sample_tasks", lambda weights, n, generator: [1 - drawn] * n if len(weights) == 2
                        else [0] * n)
    monkeypatch.setattr(multihead, "train_learner", None)  # nothing is trained
    words = ["--continual", "--tasks_per_round", "2", "--extend", str(workspace / "runs/old")]
    assert numbers(start(workspace, "new", *words)) == numbers(old)


@pytest.mark.parametrize("more", [["--naive"], ["--replay_frac", "0.5"], ["--epochs", "3"]])
def test_what_decides_the_old_learners_may_not_change(workspace, capsys, more):
    start(workspace, "old", "--continual", "--num_rounds", "1")
    words = flags(workspace, "--name", "new", "--continual", "--extend", str(workspace / "runs/old"), *more)
    assert cli.command("x", "modelzoo", modelzoo.run, words) == 2
    assert f"--extend: {more[0][2:]} is" in capsys.readouterr().err


def test_a_saved_network_predicts_in_the_precision_of_its_run(workspace):
    start(workspace, "a", "--continual", "--num_rounds", "1", "--save_nets", "--precision", "bf16")
    zoo, arrays = Zoo.load(workspace / "runs/a", "cpu"), make_arrays()
    rows = np.concatenate([np.flatnonzero(arrays["test_labels"] == label) for label in (0, 1)])
    torch.testing.assert_close(zoo.predict(arrays["test_images"][rows], 0), zoo.predict_log_probs(0).exp(), rtol=1e-6,
                               atol=1e-7)


def test_a_run_in_another_order_is_extended_by_a_file_that_lists_it(workspace, capsys):
    """The order decides nothing but the tasks, which are compared; once it was refused either way."""
    result = start(workspace, "old", "--continual", "--task_order", "5", *shorten(workspace))
    tasks = [*result["config"]["tasks"], [4, 5]]
    assert tasks[:2] == [[2, 3], [0, 1]]
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": tasks})
    words = ("--continual", "--extend", str(workspace / "runs/old"))
    whole = start(workspace, "new", *words)
    assert len(whole["rounds"]) == 3
    (workspace / "runs/old").rename(workspace / "runs/away")
    (workspace / "runs/new/result.json").unlink()
    argv = flags(workspace, "--name", "new", *words, "--resume")
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, argv) == 2
    assert "is not there; a run that has copied its learners resumes without it" in capsys.readouterr().err
    assert numbers(start(workspace, "new", "--continual", "--resume")) == numbers(whole)


@pytest.mark.parametrize("device", ["mps", "cpu:0", "gpu", ""])
def test_a_device_that_is_none_is_named(workspace, device):
    start(workspace, "a", "--continual", "--save_nets")
    with pytest.raises(ConfigError, match=f"--device: {device!r} is not one of auto, cpu, cuda"):
        Zoo.load(workspace / "runs/a", device)
