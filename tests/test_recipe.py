"""The keys of a hyper-parameter file that may be left out, and the rows that --val_frac holds out."""
import json
import random

import numpy as np
import pytest
import torch

import modelzoo
import multihead
from datasets.build_dataset import build_dataset, hold_out
from tests.commands import checkpoint_every_epoch, numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from tools.peers import read_peers
from utils import run_net
from utils.command import command
from utils.config import read_settings
from utils.config_files import HYPER_OPTIONAL, SCHEDULES, ConfigError
from utils.run_folder import load_tensors
from utils.run_net import make_generator
from utils.search import read_search

EVERYTHING = {"optimiser": "sgd", "momentum": 0.8, "warmup": 1, "clip_norm": 1.0, "label_smoothing": 0.1,
              "class_weights": "balanced", "lr_min": 1e-4, "best_epoch": True, "schedule": "cosine", "augment": True,
              "width": 16, "epochs": 4}


def refuse(workspace, capsys, *more):
    assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--continual", *more)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not (workspace / "runs").exists()
    return err


@pytest.mark.parametrize("keys, message", [
    ({"optimizer": "sgd"}, "unknown key optimizer; did you mean optimiser?"),
    ({"optimiser": "adam"}, "optimiser: 'adam' is not one of sgd, adamw"),
    ({"optimiser": "adamw", "momentum": 0.9}, "momentum: only optimiser sgd has one; leave it out"),
    ({"momentum": 1}, "momentum: 1.0 must be at least 0 and below 1"),
    ({"warmup": 2}, "warmup: 2 must be below the number of epochs, 2"),
    ({"warmup": -1}, "warmup: -1.0 must be at least 0"),
    ({"lr_min": 0.001}, "lr_min: schedule constant does not use it; leave it out, or take cosine"),
    ({"schedule": "cosine", "lr_min": 0.02}, "lr_min: 0.02 must be at most lr, 0.01"),
    ({"clip_norm": 0}, "clip_norm: 0.0 must be above 0"),
    ({"clip_norm": None}, "clip_norm: has no value"),
    ({"label_smoothing": 1}, "label_smoothing: 1.0 must be at least 0 and below 1"),
    ({"class_weights": "auto"}, "class_weights: 'auto' is not one of balanced"),
    ({"best_epoch": "yes please"}, "best_epoch: 'yes please' is not true or false"),
    ({"best_epoch": True}, "best_epoch: needs --val_frac"),
])
def test_a_mistake_in_a_key_is_one_line(workspace, capsys, keys, message):
    write_yaml(workspace / "hp.yaml", CONV | keys)
    assert message in refuse(workspace, capsys)


@pytest.mark.parametrize("words, message", [
    (("--val_frac", "0"), "--val_frac: 0.0 must be above 0"),
    (("--val_frac", "1"), "--val_frac: 1.0 must be above 0 and below 1"),
    (("--val_frac", "files"), "argument --val_frac: 'files' is neither a share, such as 0.1, nor file"),
    (("--val_frac", "file"), "--val_frac: file: toy.npz has no val_images and val_labels; give a share, such as 0.1"),
    (("--val_frac", "0.2", "--samples", "1"), "has a single training row: none can be held out"),
    (("--lr", "0"), "--lr: 0.0 must be above 0"),
    (("--batch", "0"), "--batch: 0 must be at least 1"),
])
def test_a_mistake_in_a_flag_is_one_line(workspace, capsys, words, message):
    assert message in refuse(workspace, capsys, *words)


def test_avalanches_methods_take_what_they_run_with_and_refuse_the_rest(workspace):
    words = ["naive", *flags(workspace)]
    write_yaml(workspace / "hp.yaml", CONV | {"schedule": "cosine", "warmup": 1, "lr_min": 0.001})
    assert read_peers(words)[0].warmup == 1
    for key, value in (("optimiser", "adamw"), ("clip_norm", 1.0), ("class_weights", "balanced"), ("momentum", 0.8)):
        write_yaml(workspace / "hp.yaml", CONV | {key: value})
        with pytest.raises(ConfigError, match=f"{key}: Avalanche's methods run without it; leave it out"):
            read_peers(words)


def test_what_holds_no_rows_out_takes_no_best_epoch(workspace):
    write_yaml(workspace / "hp.yaml", CONV | {"best_epoch": True})
    for read in (lambda: read_search("hpo.py", flags(workspace)), lambda: read_peers(["naive", *flags(workspace)])):
        with pytest.raises(ConfigError, match="best_epoch: only modelzoo.py and multihead.py have it; leave it out"):
            read()


def test_flags_go_over_the_file_and_stand_in_the_name(workspace):
    settings = read_settings("x", "multihead", flags(workspace, "--lr", "0.3", "--batch", "5", "--val_frac", "0.25"))
    assert (settings.lr, settings.batch, settings.val_frac) == (0.3, 5, 0.25)
    assert settings.name == "data-hp-multihead-batch=5-lr=0.3-val_frac=0.25-seed=0"


def test_rows_at_equal_distances_of_every_class_are_held_out(workspace):
    train, _ = build_dataset("npz", [(0, 1), (4, 5)], workspace / "data", make_generator(0, 0, "data"), path="toy.npz")
    for share, places in ((0.2, [4, 9]), (0.3, [2, 5, 9]), (0.01, [9]), (0.99, [*range(8), 9])):
        fit, held = hold_out(train, share)
        for t in range(2):
            for c in range(2):
                rows = train.rows(t)[train.labels[train.rows(t)] == c]
                chosen = held.images[held.rows(t)[held.labels[held.rows(t)] == c]]
                assert chosen.equal(train.images[rows[places]])
                assert len(fit.rows(t)) + len(held.rows(t)) == 20


def test_a_run_validates_on_rows_that_no_learner_trains_on(workspace, monkeypatch):
    trained, original = [], multihead.train_net

    def note(net, images, rows, *more, **settings):
        trained.append(images[rows])
        return original(net, images, rows, *more, **settings)

    monkeypatch.setattr(multihead, "train_net", note)
    result = start(workspace, "a", "--continual", "--val_frac", "0.2", "--precision", "fp32")
    assert [len(images) for images in trained] == [16, 32, 48] and result["rows_trained"] == 2 * (16 + 32 + 48)
    train, _ = build_dataset("npz", [(0, 1), (2, 3), (4, 5)], workspace / "data", make_generator(0, 0, "data"),
                             path="toy.npz")
    held = {image.numpy().tobytes() for image in hold_out(train, 0.2)[1].images}
    assert not held & {image.numpy().tobytes() for images in trained for image in images}
    lines = [json.loads(line) for line in (workspace / "runs/a/log.jsonl").read_text().splitlines()]
    assert all(0 <= line["val_accuracy"] <= 1 and line["val_loss"] > 0 for line in lines if "epoch" in line)
    # The last epoch's are of the network that joined the zoo: by hand, from the network itself.
    saved = start(workspace, "b", "--continual", "--val_frac", "0.2", "--save_nets", "--num_rounds", "1",
                  "--precision", "fp32")
    learner = load_tensors(workspace / "runs/b/learners/000.pt", "cpu")
    net = modelzoo.Zoo.load(workspace / "runs/b", "cpu").nets[0]
    held = hold_out(train, 0.2)[1]
    features = net.backbone(run_net.normalise(held.images[held.rows(0)]))
    log_probs = (features @ net.heads.weight[0].T + net.heads.bias[0]).double().log_softmax(1)
    labels = held.labels[held.rows(0)]
    last = [line for line in lines if line["round"] == 0 and line.get("epoch") == 1][0]
    assert last["val_loss"] == pytest.approx(-log_probs[torch.arange(4), labels].mean().item(), rel=1e-3)
    assert last["val_accuracy"] == (log_probs.argmax(1) == labels).double().mean().item()
    assert saved["config"]["val_frac"] == 0.2 and len(learner["train_logits"][0]) == 16


def test_rows_that_the_file_brings_for_it(workspace, capsys):
    """The val rows of class 1 are those of class 0 with the wrong label: a learner that tells all is right on half."""
    arrays = make_arrays()
    of = {c: arrays["train_images"][arrays["train_labels"] == c] for c in range(6)}
    wrong = [of[0][:4], of[0][4:8], *(of[c][:4] for c in range(2, 6))]
    val = {"val_images": np.concatenate(wrong), "val_labels": np.repeat(np.arange(6, dtype=np.uint8), 4)[:, None]}
    np.savez(workspace / "data/toy.npz", **arrays, **val)
    write_yaml(workspace / "hp.yaml", CONV | {"epochs": 8})
    more = ("--continual", "--val_frac", "file", "--precision", "fp32")
    result = start(workspace, "a", *more)
    assert result["rows_trained"] == 8 * (20 + 40 + 60) and result["average_accuracy"] == 1
    lines = [json.loads(line) for line in (workspace / "runs/a/log.jsonl").read_text().splitlines()]
    last = [line["val_accuracy"] for line in lines if line.get("epoch") == 7]
    assert last == pytest.approx([1 / 2, 3 / 4, 5 / 6])
    assert "class_names" in result
    np.savez(workspace / "data/toy.npz", **arrays, **val | {"val_labels": val["val_labels"][::-1]})
    (workspace / "runs/a/result.json").unlink()
    words = flags(workspace, "--name", "a", "--resume", *more)
    assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    assert "was run with val_data" in capsys.readouterr().err
    np.savez(workspace / "data/toy.npz", **arrays, **{key: x[:20] for key, x in val.items()})
    words = flags(workspace, "--name", "b", *more)
    assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    assert "toy.npz: label 5 has no rows among the val images" in capsys.readouterr().err
    assert not (workspace / "runs/b").exists()


def test_the_best_epoch_is_kept_the_first_of_several(workspace, monkeypatch):
    """Held-out accuracies 0.2, 0.9, 0.9, 0.1, dictated: what joins the zoo is the network after the second epoch."""
    write_yaml(workspace / "hp.yaml", CONV | {"epochs": 4, "best_epoch": True})
    scores, nets = iter([0.2, 0.9, 0.9, 0.1]), []

    def dictate(net, *_):
        nets.append({key: x.clone() for key, x in net.state_dict().items()})
        return {"val_loss": 1.0, "val_accuracy": next(scores)}

    monkeypatch.setattr(multihead, "validate", dictate)
    start(workspace, "a", "--continual", "--num_rounds", "1", "--val_frac", "0.2", "--save_nets")
    state = load_tensors(workspace / "runs/a/learners/000.pt", "cpu")["net"]["state"]
    assert all(x.equal(nets[1][key]) for key, x in state.items())
    assert not state["backbone.layers.0.weight"].equal(nets[3]["backbone.layers.0.weight"])


def test_a_recipe_with_every_key_resumes_inside_a_learner_to_the_same_bits(workspace, monkeypatch):
    write_yaml(workspace / "hp.yaml", CONV | EVERYTHING)
    more = ("--continual", "--val_frac", "0.2", "--inherit")
    whole = start(workspace, "a", *more)
    for name in ("CHECKPOINT_SECONDS", "time"):
        monkeypatch.setattr(multihead, name, getattr(multihead, name))
    checkpoint_every_epoch()
    original, stopped = multihead.save_checkpoint, []

    def stop_after(path, *rest):
        original(path, *rest)
        stopped.append(path)
        if len(stopped) in (2, 5, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(multihead, "save_checkpoint", stop_after)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            start(workspace, "b", *more, "--resume")
    assert numbers(start(workspace, "b", *more, "--resume")) == numbers(whole)
    for k in range(3):
        one, other = (load_tensors(workspace / f"runs/{name}/learners/00{k}.pt", "cpu") for name in "ab")
        assert all(x.equal(y) for x, y in zip(one["test_logits"], other["test_logits"], strict=True))


def test_class_weights_let_a_rare_class_count(workspace):
    """45 rows of one class beside 5 of the other: weights 50 / (2 * 45) and 50 / (2 * 5)."""
    heads, labels = torch.zeros(50, dtype=torch.int64), torch.tensor([0] * 45 + [1] * 5)
    weights = multihead.balance(heads, labels)
    assert weights.tolist() == pytest.approx([50 / 90] * 45 + [5.0] * 5)
    arrays = make_arrays(classes=2, train=50, test=20)
    rare = np.flatnonzero(arrays["train_labels"] == 1)[5:]
    for key in ("train_images", "train_labels"):
        arrays[key] = np.delete(arrays[key], rare, axis=0)
    np.savez(workspace / "data/toy.npz", **arrays)
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1]]})
    found = []
    for name, more in (("a", {}), ("b", {"class_weights": "balanced"})):
        write_yaml(workspace / "hp.yaml", CONV | {"epochs": 1, "lr": 0.001} | more)
        start(workspace, name, method="multihead")
        logits = load_tensors(workspace / f"runs/{name}/learners/000.pt", "cpu")["train_logits"][0]
        found.append(logits.softmax(1)[45:, 1].mean().item())
    assert found[1] > found[0] + 0.05


def test_any_choice_of_keys_trains_or_is_one_line(workspace, capsys):
    """Keys and values at random: exit status 0, or 2 with one line and nothing written."""
    chance, statuses = random.Random(0), []
    values = {"optimiser": ["sgd", "adamw"], "momentum": [0, 0.5, 2], "warmup": [0, 0.5, 1, 9], "lr_min": [0, 1e-3, 1],
              "clip_norm": [0.1, 100, -1], "label_smoothing": [0, 0.2], "class_weights": ["balanced", "none"],
              "best_epoch": [True, False], "schedule": list(SCHEDULES)}
    assert values.keys() == {*HYPER_OPTIONAL, "schedule"} - {"weights", "freeze"}
    for i in range(25):
        keys = {key: chance.choice(values[key]) for key in chance.sample(sorted(values), chance.randrange(len(values)))}
        write_yaml(workspace / "hp.yaml", CONV | {"width": 8} | keys)
        words = ["--val_frac", "0.3"] if chance.random() < 0.5 else []
        argv = flags(workspace, "--name", f"a{i}", "--num_rounds", "1", "--tasks_per_round", "1", *words)
        statuses.append(command("modelzoo.py", "modelzoo", modelzoo.run, argv))
        err = capsys.readouterr().err
        assert (statuses[-1], err) == (0, "") or (statuses[-1] == 2 and err.count("\n") == 1), (keys, err)
        assert (workspace / f"runs/a{i}").exists() == (statuses[-1] == 0)
    assert statuses.count(0) >= 5 and statuses.count(2) >= 5
