"""tools/peers.py: Avalanche's methods under exactly our conditions; the parts that need no Avalanche come first."""
import importlib.util
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import modelzoo
import multihead
from multihead import train_epochs
from net.build_net import build_net
from tests.conftest import CONV, flags, make_arrays, write_yaml
from tests.runfolders import make_run, make_seeds, report_of, squeeze
from tools import peers
from tools.runs import group_runs, read_run
from utils.command import guard
from utils.config import read_settings
from utils.log import RunLog
from utils.run import prepare
from utils.run_net import derive_seed, make_generator, predict_logits, train_net


@pytest.fixture
def avalanche():
    with warnings.catch_warnings(action="ignore"):  # pytest makes errors of what Avalanche warns of on import
        return pytest.importorskip("avalanche")


def status_of(workspace, *words):
    return guard("peers.py", lambda: peers.main([*words, *flags(workspace)]))


def learn(workspace, *words):
    """Run one method; returns its result.json."""
    assert status_of(workspace, *words, "--name", "a") == 0
    return json.loads((workspace / "runs/a/result.json").read_text())


def catch_nets(monkeypatch):
    """The networks that peers.py builds from now on."""
    nets = []

    def build(*arguments):
        nets.append(build_net(*arguments))
        return nets[-1]

    monkeypatch.setattr(peers, "build_net", build)
    return nets


def distance(a, b):
    """Between the weights of two networks."""
    return sum((p - q).square().sum().item() for p, q in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5


# -- without Avalanche


@pytest.mark.parametrize("words, message", [
    (["naive", "gem"], "argument METHOD: invalid choice: 'gem'"),
    ([], "the following arguments are required"),
    (["replay", "--memory", "0"], "--memory: 0 must be at least 1"),
    (["agem", "--memory", "2"], "--memory: 2 must be at least 3, the number of tasks, with agem"),
    (["ewc", "--ewc_lambda", "-1"], "--ewc_lambda: -1.0 must be at least 0"),
    (["ewc", "--ewc_lambda", "inf"], "--ewc_lambda: inf must be"),
    (["ewc", "naive", "--name", "a"], "--name: one name cannot serve 2 methods"),
    (["naive", "--precision", "fp16"], "--precision: fp16 needs its losses scaled"),
    (["naive", "--num_tasks", "4"], "--num_tasks: 4 must be at most 3"),
    (["naive"], "the package avalanche-lib is missing; pip install -r requirements-peers.txt brings it"),
])  # fmt: skip
def test_mistakes_are_one_line(workspace, capsys, monkeypatch, words, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert status_of(workspace, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (workspace / "runs").exists()


def test_settings_of_every_method(workspace):
    words = [*flags(workspace), "--memory", "12", "--ewc_lambda", "3", "--num_tasks", "2"]
    naive, replay, ewc, joint = peers.read_peers(["naive", "replay", "ewc", "naive", "joint", *words])
    assert [s.method for s in (naive, replay, joint)] == ["avalanche-naive", "avalanche-replay", "avalanche-joint"]
    assert [(s.memory, s.ewc_lambda) for s in (naive, replay, ewc)] == [(None, None), (12, None), (None, 3.0)]
    assert replay.name == "data-hp-avalanche-replay-num_tasks=2-memory=12-seed=0"
    assert (naive.continual, naive.num_rounds, joint.continual, joint.num_rounds) == (True, 2, False, 1)
    ours = read_settings("modelzoo.py", "modelzoo", [*flags(workspace), "--continual"])
    for key in ("model", "batch", "lr", "l2_reg", "dropout", "epochs", "schedule", "augment", "seed", "samples"):
        assert getattr(naive, key) == getattr(ours, key)


def test_report_names_the_methods_and_shows_rows_stored(tmp_path, capsys):
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.8])
    for memory in (12, 24):
        folders.append(make_run(tmp_path / f"replay{memory}", [[0.6, 0.6]] * 2, method="avalanche-replay",
                                continual=True, memory=memory, ewc_lambda=None))  # fmt: skip
    folders.append(make_run(tmp_path / "joint", [[0.9, 0.9]], method="avalanche-joint", memory=None, ewc_lambda=None))
    for folder, stored in zip(folders[2:], (12, 24, 60), strict=True):
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"stored_rows": stored}))
    groups = group_runs(map(read_run, folders))[0]
    names = ["Model Zoo", "Avalanche Replay, memory 12", "Avalanche Replay, memory 24", "Avalanche JointTraining"]
    assert [group.label for group in groups] == names
    assert report_of(*folders, "--format", "markdown") == 0
    out = squeeze(capsys.readouterr().out)
    assert "| rows trained | rows stored | parameters | seconds |" in out
    assert "| Avalanche Replay, memory 24 | 1 | 60.00 | – | – | – | 1.0 | 300 | 24 | 40 | 2 |" in out
    assert "| Model Zoo | 2 | 75.00 | 7.07 | – | – | 1.5 | 300 | – | 40 | 2 |" in out
    assert "numbers stored" not in out
    assert report_of(*folders[:2], "--format", "markdown") == 0
    assert "rows stored" not in capsys.readouterr().out


def test_report_shows_numbers_stored_where_some_are(tmp_path, capsys):
    folders = [make_run(tmp_path / "zoo", [[0.7, 0.7]] * 2)]
    for name, numbers in (("naive", 0), ("ewc", 160)):
        folders.append(make_run(tmp_path / name, [[0.6, 0.6]] * 2, method=f"avalanche-{name}", continual=True))
        result = json.loads((folders[-1] / "result.json").read_text())
        (folders[-1] / "result.json").write_text(json.dumps(result | {"stored_rows": 0, "stored_numbers": numbers}))
    assert report_of(*folders, "--format", "markdown") == 0
    out = squeeze(capsys.readouterr().out)
    assert "| rows stored | numbers stored | parameters | seconds |" in out
    assert "| Avalanche EWC | 1 | 60.00 | – | – | – | 1.0 | 300 | 0 | 160 | 40 | 2 |" in out
    assert "| Avalanche Naive | 1 | 60.00 | – | – | – | 1.0 | 300 | 0 | 0 | 40 | 2 |" in out
    assert "| Model Zoo | 1 | 70.00 | – | – | – | 1.5 | 300 | – | – | 40 | 2 |" in out
    assert report_of(*folders[:2], "--format", "markdown") == 0
    assert "numbers stored" not in capsys.readouterr().out


def test_rows_that_ours_store_by_hand(workspace):
    """60 rows in all; a fifth of the 10 rows of each of 6 classes is 12; Isolated looks back at none."""
    for method, words, stored in (("modelzoo", ["--continual"], 60), ("multihead", [], 60),
                                  ("modelzoo", ["--continual", "--replay_frac", "0.2"], 12),
                                  ("modelzoo", ["--continual", "--tasks_per_round", "1"], 0),
                                  ("modelzoo", ["--num_rounds", "1", "--tasks_per_round", "1"], 60)):  # fmt: skip
        run = {"modelzoo": modelzoo, "multihead": multihead}[method].run
        assert run(read_settings("", method, flags(workspace, "--epochs", "1", *words)))["stored_rows"] == stored


# -- with Avalanche


def test_wrapped_network_gives_our_logits(workspace, avalanche):
    """Each row through the head of its own task, normalised as ours, -inf past that head's classes."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3, 4]]})
    (settings,) = peers.read_peers(["naive", *flags(workspace)])
    _, _, train, _ = prepare(settings)
    net = build_net("conv", train.images.shape[1:], train.classes, 0, seed=1)
    model = peers.wrap_net(net, train, True, "fp32", make_generator(0, 0, "augment")).eval()
    rows = torch.cat([train.rows(1), train.rows(0)])
    with torch.no_grad():
        logits = model(rows, torch.tensor([1] * 30 + [0] * 20))
    assert logits[:30].equal(predict_logits(net, train.images, train.rows(1), 1, 3, "fp32"))
    assert logits[30:, :2].equal(predict_logits(net, train.images, train.rows(0), 0, 2, "fp32"))
    assert logits[30:, 2].eq(-torch.inf).all() and model.rows_trained == 0
    assert not model.train()(rows, torch.tensor([1] * 30 + [0] * 20))[:30].allclose(logits[:30])  # cropped
    assert model.rows_trained == 50


def test_experiences_are_our_rows_labels_and_tasks(workspace, avalanche):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[3, 1], [2, 3, 4]]})
    (settings,) = peers.read_peers(["naive", "--samples", "4", *flags(workspace)])
    _, _, train, _ = prepare(settings)
    experiences = peers.make_experiences(train)
    assert [e.task_labels for e in experiences] == [[0], [1]]
    found = [[int(x) for x in row] for e in experiences for row in e.dataset]
    assert found == [[i, int(train.labels[i]), 0 if i < 8 else 1] for i in range(20)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_naive_takes_our_steps(workspace, avalanche, monkeypatch, schedule):
    """With all rows of a task in one batch nothing is random: task after task, with schedule and momentum anew."""
    write_yaml(workspace / "hp.yaml", {**CONV, "batch": 100, "epochs": 4, "l2_reg": 0.01, "schedule": schedule})
    nets = catch_nets(monkeypatch)
    learn(workspace, "naive", "--num_tasks", "2", "--precision", "fp32")
    (settings,) = peers.read_peers(["naive", "--num_tasks", "2", *flags(workspace)])
    _, _, train, _ = prepare(settings)
    ours = build_net("conv", train.images.shape[1:], train.classes, 0, derive_seed(0, 0, "init"))
    first = build_net("conv", train.images.shape[1:], train.classes, 0, derive_seed(0, 0, "init"))
    for t in range(2):
        rows = train.rows(t)
        generators = {key: make_generator(0, t, key) for key in ("shuffle", "augment", "dropout")}
        list(train_net(ours, train.images, rows, torch.full_like(rows, t), train.labels[rows], epochs=4, batch=100,
                       lr=0.01, l2_reg=0.01, schedule=schedule, augment=False, flip=False, precision="fp32",
                       generators=generators))  # fmt: skip
    assert distance(nets[-1], ours) < 0.01 * distance(ours, first)
    # Batch norm's statistics are averaged anew after the last epoch, here too.
    for a, b in zip(nets[-1].backbone.buffers(), ours.backbone.buffers(), strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


def test_joint_is_our_multihead_on_all_tasks(workspace, avalanche, monkeypatch):
    write_yaml(workspace / "hp.yaml", {**CONV, "batch": 100, "epochs": 4, "schedule": "cosine"})
    nets = catch_nets(monkeypatch)
    result = learn(workspace, "joint", "--precision", "fp32")
    settings = read_settings("", "multihead", flags(workspace, "--precision", "fp32"))
    _, precision, train, _ = prepare(settings)
    tasks = range(3)
    *_, (ours, values, _) = train_epochs(settings, precision, train, tasks, [train.rows(t) for t in tasks], 0)
    first = build_net("conv", train.images.shape[1:], train.classes, 0, derive_seed(0, 0, "init"))
    assert distance(nets[-1], ours) < 0.01 * distance(ours, first)
    # Batch norm's statistics are averaged anew after the last epoch, here too.
    for a, b in zip(nets[-1].backbone.buffers(), ours.backbone.buffers(), strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()
    lines = [json.loads(line) for line in (workspace / "runs/a/log.jsonl").read_text().splitlines()]
    assert lines[3]["epoch"] == 3 and lines[3]["train_loss"] == pytest.approx(values["train_loss"], rel=0.01)
    assert result["accuracy_matrix"] == [result["accuracy"]] and len(result["accuracy"]) == 3
    assert result["rounds"][0]["tasks"] == [0, 1, 2] and result["forgetting"] is None
    assert (result["rows_trained"], result["stored_rows"]) == (240, 60)


def test_joint_mixes_more_tasks_than_a_batch_has_rows(workspace, avalanche):
    write_yaml(workspace / "hp.yaml", {**CONV, "batch": 2, "epochs": 1})
    assert learn(workspace, "joint")["rows_trained"] == 60


@pytest.mark.parametrize("method, rows, stored, copies", [
    # 3 tasks x 20 rows x 2 epochs. Memory 12 of which an epoch of 3 steps takes 8, 4 and 8 rows.
    ("naive", 120, 0, 0), ("replay", 120 + 2 * 2 * (8 + 4 + 8), 12, 0),
    # EWC's importances: each task's rows once more; parameters and importances are kept for each of 3 tasks.
    # A-GEM: 4 rows a task, a step of 6 takes 4 of one, then 8 of two.
    ("ewc", 120 + 60, 0, 3 * 2), ("agem", 120 + 6 * 4 + 6 * 8, 12, 0),
])  # fmt: skip
def test_cost_by_hand(workspace, avalanche, capsys, method, rows, stored, copies):
    result = learn(workspace, method, "--memory", "12")
    assert (result["method"], result["rows_trained"], result["stored_rows"]) == (f"avalanche-{method}", rows, stored)
    assert result["stored_numbers"] == copies * result["parameters"]
    # The first convolution, two others with bias and norm, and three heads on D = 80 features.
    backbone = 9 * 80 + 2 * (9 * 80 * 80 + 80 + 2 * 80)
    assert result["parameters"] == backbone + 3 * 2 * 81
    matrix = result["accuracy_matrix"]
    assert [[x is None for x in row] for row in matrix] == [[t > k for t in range(3)] for k in range(3)]
    assert result["average_accuracy"] == pytest.approx(np.mean(matrix[2]))
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"avalanche-{method}: 3 tasks, 3 rounds, ")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("round ")] == ["1/3", "2/3", "3/3"]


def test_all_rows_are_stored_by_default(workspace, avalanche):
    """Of tasks of unequal sizes, too: 20, 20 and 30 rows."""
    np.savez(workspace / "data" / "toy.npz", **make_arrays(classes=7))
    tasks = {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5, 6]]}
    write_yaml(workspace / "data.yaml", tasks)
    assert status_of(workspace, "replay", "agem", "--epochs", "1") == 0
    results = [json.loads(f.read_text()) for f in workspace.glob("runs/*/result.json")]
    assert [r["stored_rows"] for r in results] == [70, 70]


def test_penalty_holds_the_backbone(workspace, avalanche, monkeypatch):
    """EWC without weight is Naive; with it the second task moves the network less far from where the first left it."""
    write_yaml(workspace / "hp.yaml", {**CONV, "batch": 100, "epochs": 4})
    nets = catch_nets(monkeypatch)
    for words in (["naive", "--num_tasks", "1"], ["naive", "--num_tasks", "2"],
                  ["ewc", "--ewc_lambda", "0", "--num_tasks", "2"],
                  ["ewc", "--ewc_lambda", "10", "--num_tasks", "2"]):  # fmt: skip
        assert status_of(workspace, *words, "--precision", "fp32") == 0
    first, naive, weightless, held = [net.backbone for net in nets]
    assert distance(weightless, naive) < 0.01 * distance(held, naive)
    assert 0 < distance(held, first) < distance(naive, first)


def test_a_seed_repeats_a_run_and_another_does_not(workspace, avalanche, monkeypatch):
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True})
    nets = catch_nets(monkeypatch)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert status_of(workspace, "agem", "--memory", "12", "--seed", seed, "--name", name) == 0
    a, b, c = [net.heads.weight for net in nets]
    assert a.equal(b) and not a.equal(c)


def test_a_run_stands_in_the_report_beside_ours(workspace, avalanche, capsys):
    assert status_of(workspace, "replay", "--memory", "12") == 0
    for more in (["--replay_frac", "0.2"], ["--tasks_per_round", "1"]):
        modelzoo.run(read_settings("modelzoo.py", "modelzoo", flags(workspace, "--continual", *more)))
    capsys.readouterr()
    runs = {run.kind: run for run in map(read_run, (workspace / "runs").iterdir())}
    stored = {kind: run.cost["stored_rows"] for kind, run in runs.items()}
    assert stored == {"Avalanche Replay": 12, "Model Zoo": 12, "Isolated": 0}  # a fifth of 10 rows, of 6 classes
    assert runs["Avalanche Replay"].tasks == runs["Model Zoo"].tasks
    assert runs["Avalanche Replay"].cost["networks"] == 1
    assert report_of(*(workspace / "runs").iterdir(), "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("Avalanche Replay" in line and ",average_accuracy,paired,1," in line for line in lines) == 2


def test_resume_leaves_a_finished_run_and_redoes_an_unfinished_one(workspace, avalanche, capsys):
    result = learn(workspace, "naive")
    assert status_of(workspace, "naive", "--name", "a") == 2
    assert "is there already" in capsys.readouterr().err
    assert status_of(workspace, "naive", "--name", "a", "--resume") == 0
    assert capsys.readouterr().out.endswith("a: done already\n")
    (workspace / "runs/a/result.json").unlink()
    again = learn(workspace, "naive", "--resume")
    assert again["accuracy_matrix"] == result["accuracy_matrix"]
    assert len((workspace / "runs/a/log.jsonl").read_text().splitlines()) == 3 * (2 + 1)


def test_a_loss_without_bounds_is_one_line(workspace, avalanche, capsys):
    write_yaml(workspace / "hp.yaml", {**CONV, "lr": 1e20})
    assert status_of(workspace, "naive", "--name", "a") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the training loss is" in err
    assert not (workspace / "runs/a/result.json").exists()


@pytest.mark.parametrize("method", ["naive", "joint"])
def test_accuracies_are_of_the_test_rows(workspace, monkeypatch, method):
    """Without Avalanche: nothing is learned, and a net that calls all rows of a task alike is right on two test rows of
    five; of the training rows it is right on half."""
    arrays = make_arrays()
    keep = np.concatenate([np.flatnonzero(arrays["test_labels"] == c)[: 2 if c % 2 == 0 else 3] for c in range(6)])
    np.savez(workspace / "data" / "toy.npz",
             **arrays | {key: arrays[key][keep] for key in ("test_images", "test_labels")})  # fmt: skip
    (settings,) = peers.read_peers([method, *flags(workspace)])
    _, precision, train, test = prepare(settings)
    strategy = SimpleNamespace(train=lambda *_, **__: None, plugins=[])
    monkeypatch.setattr(peers, "make_strategy", lambda *_: strategy)
    monkeypatch.setattr(peers, "make_experiences", lambda train: [None] * 3)
    monkeypatch.setattr(peers, "wrap_net", lambda *_: SimpleNamespace(rows_trained=0))
    monkeypatch.setattr(peers, "predict_logits", lambda net, images, rows, t, classes, precision:
                        torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1))  # fmt: skip
    (workspace / "log").mkdir()
    with RunLog(workspace / "log", 3, 1) as log:
        matrix, _, _ = peers.train_peer(settings, precision, train, test, log)
    assert matrix[-1] == pytest.approx([0.4] * 3)
