"""--extend where a known task has gained training rows: the old learners stay, the new ones train on all rows."""

import numpy as np
import pytest
import torch

import modelzoo
from datasets.build_dataset import build_dataset
from datasets.data import find_rows, hash_rows
from tests.commands import start
from tests.conftest import flags, make_arrays, write_yaml
from utils.command import command
from utils.run_net import make_generator


@pytest.fixture
def grown(workspace):
    """A run of the first 2 of 3 tasks; then task 0 gains 6 rows, in front of and behind its 20."""
    tasks = [[0, 1], [2, 3], [4, 5]]
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": tasks[:2]})
    start(workspace, "old", "--continual", "--save_nets")
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": tasks})
    arrays = make_arrays()
    more = make_arrays(train=3, seed=9)
    keep = more["train_labels"] < 2
    for key in ("train_images", "train_labels"):
        new = more[key][keep]
        arrays[key] = np.concatenate([new[:2], arrays[key], new[2:]])
    np.savez(workspace / "data/toy.npz", **arrays)
    return workspace


def load(workspace):
    return build_dataset("npz", [(0, 1), (2, 3), (4, 5)], workspace / "data", make_generator(0, 0, "data"),
                         path="toy.npz")


def test_old_learners_stay_and_new_ones_train_on_the_new_rows(grown):
    result = start(grown, "new", "--continual", "--save_nets", "--extend", str(grown / "runs/old"))
    for k in (0, 1):
        old, new = (grown / f"runs/{run}/learners/00{k}.pt" for run in ("old", "new"))
        assert new.read_bytes() == old.read_bytes()
    # Round 2 trains on all three tasks, of 26, 20 and 20 rows, for 2 epochs; rounds 0 and 1 on 20 and 40.
    assert result["rounds"][2]["tasks"][-1] == 2 and sorted(result["rounds"][2]["tasks"]) == [0, 1, 2]
    assert result["rows_trained"] == 2 * (20 + 40 + 66) and result["stored_rows"] == 66
    # The loss of task 0 is over its 20 old rows, whose logits all three learners have in one order.
    saved = [torch.load(grown / f"runs/new/learners/00{k}.pt", weights_only=True) for k in range(3)]
    train, _ = load(grown)
    old = find_rows(train, 0, torch.load(grown / "runs/old/rows.pt", weights_only=True)["train"][0])
    logits = [s["train_logits"][s["tasks"].index(0)].double().softmax(1) for s in saved]
    right = torch.stack(logits).mean(0)[torch.arange(20), train.labels[old]]
    assert result["rounds"][2]["train_loss"][0] == pytest.approx(-right.log().mean().item())


def test_resumed_and_extended_once_more_it_ends_in_the_same_bits(grown):
    words = ("--continual", "--extend", str(grown / "runs/old"))
    whole = start(grown, "new", *words)
    for more in (words, words[:1]):  # --extend may be left out: the learners are there
        (grown / "runs/new/result.json").unlink()
        (grown / "runs/new/learners/002.pt").unlink()
        again = start(grown, "new", *more, "--resume")
        assert again["accuracy_matrix"] == whole["accuracy_matrix"]
        assert [r["train_loss"] for r in again["rounds"]] == [r["train_loss"] for r in whole["rounds"]]
    further = start(grown, "further", "--continual", "--extend", str(grown / "runs/new"))
    assert further["accuracy_matrix"] == whole["accuracy_matrix"]


def test_rows_that_only_a_run_in_between_has_seen_must_be_there(grown, capsys):
    """Once, in a run that extends one which had gained rows, those that this one had trained on were not asked for."""
    start(grown, "new", "--continual", "--extend", str(grown / "runs/old"))
    np.savez(grown / "data/toy.npz", **make_arrays())  # without the 6 rows
    words = flags(grown, "--continual", "--name", "further", "--extend", str(grown / "runs/new"))
    assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    assert "training rows of task 0 (counted from 0) are gone" in capsys.readouterr().err
    assert not (grown / "runs/further").exists()


@pytest.mark.parametrize("more", [(), ("--inherit",)])
def test_a_damaged_copy_of_an_old_learner_is_copied_again(grown, more):
    """Once it was trained again, on the rows that the task has now."""
    start(grown, "before", "--continual", "--num_rounds", "2", *more)  # of 26, 20 and 20 rows
    arrays = dict(np.load(grown / "data/toy.npz"))
    extra = make_arrays(train=2, seed=5)
    np.savez(grown / "data/toy.npz", **arrays | {key: np.concatenate([arrays[key], extra[key]])
                                                 for key in ("train_images", "train_labels")})
    words = ("--continual", "--extend", str(grown / "runs/before"), *more)
    whole = start(grown, "new", *words)
    path = grown / "runs/new/learners/000.pt"
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")
    (grown / "runs/new/result.json").unlink()
    again = start(grown, "new", *words, "--resume")
    assert again["accuracy_matrix"] == whole["accuracy_matrix"] and again["rows_trained"] == whole["rows_trained"]
    assert path.read_bytes() == (grown / "runs/before/learners/000.pt").read_bytes()


def refuse(grown, capsys, *more, message):
    words = flags(grown, "--continual", "--name", "new", "--extend", str(grown / "runs/old"), *more)
    assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not (grown / "runs/new").exists()


@pytest.mark.parametrize("key, change, message", [
    ("train_images", lambda x: x[:-1], "training rows of task"),
    ("train_images", lambda x: np.where(np.arange(len(x))[:, None, None, None] == 9, 255 - x, x), "training rows of"),
    ("test_images", lambda x: 255 - x, "the test rows of task 0 (counted from 0) have changed"),
    ("test_images", lambda x: x[::-1], "have changed"),
])
def test_rows_that_went_or_changed_are_refused(grown, capsys, key, change, message):
    arrays = dict(np.load(grown / "data/toy.npz"))
    labels = key.replace("images", "labels")
    changed = change(arrays[key])
    if len(changed) < len(arrays[key]):
        gone = np.flatnonzero(arrays[labels] < 4)[5]
        changed, arrays[labels] = np.delete(arrays[key], gone, 0), np.delete(arrays[labels], gone)
    if key == "test_images" and not np.array_equal(changed, 255 - arrays[key]):
        arrays[labels] = arrays[labels][::-1]
    np.savez(grown / "data/toy.npz", **arrays | {key: changed})
    refuse(grown, capsys, message=message)


def test_rows_that_were_not_recorded_or_are_damaged_are_told(grown, capsys):
    (grown / "runs/old/rows.pt").unlink()
    refuse(grown, capsys, message="it did not record its rows one by one")
    (grown / "runs/old/rows.pt").write_bytes(b"half")
    refuse(grown, capsys, message="rows.pt: damaged; remove it, and the run's own command with --resume")


@pytest.mark.parametrize(("more", "message"), [
    (("--replay_frac", "0.5"), "with --replay_frac below 1 the rows that are kept of a past task stay"),
    (("--samples", "9"), "(counted from 0) are gone; with more rows, --samples chooses others"),
    (("--val_frac", "0.3"), "(counted from 0) are gone; with more rows, --val_frac chooses others"),
])
def test_where_a_share_of_rows_is_chosen_none_may_be_gained(grown, capsys, more, message):
    grown_rows = (grown / "data/toy.npz").read_bytes()
    np.savez(grown / "data/toy.npz", **make_arrays())
    write_yaml(grown / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3]]})
    start(grown, "share", "--continual", *more)
    write_yaml(grown / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]]})
    (grown / "data/toy.npz").write_bytes(grown_rows)
    refuse(grown, capsys, *more, "--extend", str(grown / "runs/share"), message=message)


def test_rows_of_the_files_own_choose_none_of_those_to_train_on(grown, capsys):
    """Once: --val_frac file was blamed for training rows that were gone."""
    arrays = make_arrays()
    arrays |= {f"val_{what}": arrays[f"test_{what}"] for what in ("images", "labels")}
    np.savez(grown / "data/toy.npz", **arrays)
    start(grown, "old_val", "--continual", "--num_rounds", "2", "--val_frac", "file")
    np.savez(grown / "data/toy.npz", **arrays | {"train_images": 255 - arrays["train_images"]})
    refuse(grown, capsys, "--val_frac", "file", "--extend", str(grown / "runs/old_val"),
           message="training rows of task 0 (counted from 0) are gone\n")


def test_hashes_tell_rows_and_classes_apart_wherever_they_stand(workspace):
    train, _ = load(workspace)
    hashes = [hash_rows(train, t) for t in range(len(train.classes))]
    rows = {(image.numpy().tobytes(), c) for image, c in zip(train.images, train.labels.tolist(), strict=True)}
    assert len(set(torch.cat(hashes).tolist())) == len(rows)
    mixed = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert find_rows(train, 1, hashes[1][mixed]).equal(train.rows(1)[mixed])
    assert find_rows(train, 1, hashes[0]) is None
    twice = hashes[1][[0, 0]]
    assert find_rows(train, 1, twice) is None  # a row that stood twice has to stand twice
