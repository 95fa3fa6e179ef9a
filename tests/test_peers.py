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
from tests.runfolders import make_run, make_seeds, read_groups, report_of, squeeze
from tools import peers
from tools.runs import group_runs, read_run
from utils.command import guard
from utils.config import read_settings
from utils.log import RunLog
from utils.run import prepare
from utils.run_net import derive_seed, forward, make_generator, normalise, predict_logits, train_net


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
    (["lwf", "--lwf_alpha", "-1"], "--lwf_alpha: -1.0 must be at least 0"),
    (["lwf", "--lwf_temperature", "0"], "--lwf_temperature: 0.0 must be above 0"),
    (["der", "--der_alpha", "nan"], "--der_alpha: nan must be at least 0"),
    (["der", "--der_beta", "-0.5"], "--der_beta: -0.5 must be at least 0"),
    (["packnet", "--prune_share", "1"], "--prune_share: 1.0 must be above 0 and below 1"),
    (["packnet", "--prune_epochs", "0"], "--prune_epochs: 0 must be at least 1 and at most 1"),
    (["packnet", "--epochs", "3", "--prune_epochs", "3"], "--prune_epochs: 3 must be at least 1 and at most 2"),
    (["packnet", "--epochs", "1"], "--epochs: 1 must be at least 2 with packnet, which prunes between two epochs"),
    (["ewc", "naive", "--name", "a"], "--name: one name cannot serve 2 methods"),
    (["naive", "--precision", "fp16"], "--precision: fp16 needs its losses scaled"),
    (["naive", "--num_tasks", "4"], "--num_tasks: 4 must be at most 3"),
    (["naive"], "the package avalanche-lib is missing; pip install -r requirements-peers.txt brings it"),
])
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


def test_flags_of_single_methods_are_in_their_settings_and_names(workspace):
    words = [*flags(workspace), "--epochs", "9", "--lwf_alpha", "3", "--der_beta", "0", "--memory", "12"]
    lwf, der, packnet, pnn = peers.read_peers(["lwf", "der", "packnet", "pnn", *words])
    own = [{key: getattr(s, key) for key in peers.FLAGS} for s in (lwf, der, packnet, pnn)]
    assert [{key: x for key, x in found.items() if x is not None} for found in own] == [
        {"lwf_alpha": 3, "lwf_temperature": 2}, {"memory": 12, "der_alpha": 0.1, "der_beta": 0},
        {"prune_share": 0.5, "prune_epochs": 3}, {}]
    assert lwf.name == "data-hp-avalanche-lwf-epochs=9-lwf_alpha=3.0-lwf_temperature=2.0-seed=0"
    assert der.name == "data-hp-avalanche-der-epochs=9-memory=12-der_alpha=0.1-der_beta=0.0-seed=0"
    assert packnet.name == "data-hp-avalanche-packnet-epochs=9-prune_share=0.5-seed=0"
    (packnet,) = peers.read_peers(["packnet", *flags(workspace), "--prune_epochs", "1"])
    assert packnet.name == "data-hp-avalanche-packnet-prune_share=0.5-prune_epochs=1-seed=0"


def test_runs_from_before_a_flag_was_there_are_of_the_same_group(tmp_path):
    for seed, more in enumerate(({"ewc_lambda": 1.0}, dict.fromkeys(peers.FLAGS) | {"ewc_lambda": 1.0})):
        make_run(tmp_path / f"ewc{seed}", [[0.6, 0.6]] * 2, seed, "avalanche-ewc", continual=True, **more)
    groups, _ = read_groups(tmp_path.iterdir())
    assert [(group.label, len(group.runs)) for group in groups] == [("Avalanche EWC", 2)]


def test_report_names_the_methods_and_shows_rows_stored(tmp_path, capsys):
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.8])
    for memory in (12, 24):
        folders.append(make_run(tmp_path / f"replay{memory}", [[0.6, 0.6]] * 2, method="avalanche-replay",
                                continual=True, memory=memory, ewc_lambda=None))
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
                                  ("modelzoo", ["--num_rounds", "1", "--tasks_per_round", "1"], 60)):
        run = {"modelzoo": modelzoo, "multihead": multihead}[method].run
        assert run(read_settings("", method, flags(workspace, "--epochs", "1", *words)))["stored_rows"] == stored


# -- with Avalanche


def test_wrapped_network_gives_our_logits(workspace, avalanche):
    """Each row through the head of its own task, normalised as ours, no chance past that head's classes."""
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3, 4]]})
    (settings,) = peers.read_peers(["naive", *flags(workspace)])
    _, _, train, _ = prepare(settings)
    net = build_net("conv", train.images.shape[1:], train.classes, 0, seed=1)
    model = peers.wrap_net("avalanche-naive", lambda k: net, train, True, "fp32", make_generator(0, 0, "augment"))
    model.eval()
    rows = torch.cat([train.rows(1), train.rows(0)])
    with torch.no_grad():
        logits = model(rows, torch.tensor([1] * 30 + [0] * 20))
    assert logits[:30].equal(predict_logits(net, train.images, train.rows(1), 1, 3, "fp32"))
    assert logits[30:, :2].equal(predict_logits(net, train.images, train.rows(0), 0, 2, "fp32"))
    assert logits[30:].softmax(1)[:, 2].eq(0).all() and model.rows_trained == 0
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
    # In one layout: with AVX-512 the kernels of the two round so differently that it shows after a few steps.
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *more, memory_format=None: to(net, *more) if more else net)
    ours = build_net("conv", train.images.shape[1:], train.classes, 0, derive_seed(0, 0, "init"))
    first = build_net("conv", train.images.shape[1:], train.classes, 0, derive_seed(0, 0, "init"))
    for t in range(2):
        rows = train.rows(t)
        generators = {key: make_generator(0, t, key) for key in ("shuffle", "augment", "dropout")}
        list(train_net(ours, train.images, rows, torch.full_like(rows, t), train.labels[rows], epochs=4, batch=100,
                       lr=0.01, l2_reg=0.01, schedule=schedule, augment=False, flip=False, precision="fp32",
                       generators=generators))
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


CONVOLUTIONS = 9 * 80 + 2 * 9 * 80 * 80  # weights of the three of conv, on one channel
BACKBONE = CONVOLUTIONS + 2 * (80 + 2 * 80)  # two of them with bias and norm
NET = BACKBONE + 3 * 2 * 81  # three heads on D = 80 features
# PNN's column k: its two later convolutions hear of k others through k factors, a 1x1 convolution from 80 k to 80 and
# one of 3x3 without bias; its head of two, through k factors, a layer from 80 k to 2 and one from 2 to 2.
PNN = sum(BACKBONE + 2 * 81 + (k > 0) * (2 * (k + 80 * (80 * k + 1) + 9 * 80 * 80) + k + 2 * (80 * k + 1) + 2 * 3)
          for k in range(3))


@pytest.mark.parametrize("method, rows, stored, numbers, parameters", [
    # 3 tasks x 20 rows x 2 epochs. Memory 12 of which an epoch of 3 steps takes 8, 4 and 8 rows.
    ("naive", 120, 0, 0, NET), ("replay", 120 + 2 * 2 * (8 + 4 + 8), 12, 0, NET),
    # EWC's importances: each task's rows once more; parameters and importances are kept for each of 3 tasks.
    # A-GEM: 4 rows a task, a step of 6 takes 4 of one, then 8 of two.
    ("ewc", 120 + 60, 0, 3 * 2 * NET, NET), ("agem", 120 + 6 * 4 + 6 * 8, 12, 0, NET),
    # LwF passes the rows of the later two tasks through the network twice. DER's steps take 8 rows from memory each,
    # which keeps two logits with each row.
    ("lwf", 120 + 80, 0, NET, NET), ("der", 120 + 2 * 6 * 8, 12, 2 * 12, NET),
    ("packnet", 120, 0, CONVOLUTIONS, NET), ("pnn", 120, 0, 0, PNN),
])
def test_cost_by_hand(workspace, avalanche, capsys, method, rows, stored, numbers, parameters):
    result = learn(workspace, method, "--memory", "12")
    assert (result["method"], result["rows_trained"], result["stored_rows"]) == (f"avalanche-{method}", rows, stored)
    assert (result["stored_numbers"], result["parameters"]) == (numbers, parameters)
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
    assert status_of(workspace, "replay", "agem", "der", "--epochs", "1") == 0
    results = [json.loads(f.read_text()) for f in workspace.glob("runs/*/result.json")]
    assert [r["stored_rows"] for r in results] == [70, 70, 70]


def test_penalty_holds_the_backbone(workspace, avalanche, monkeypatch):
    """EWC without weight is Naive; with it the second task moves the network less far from where the first left it."""
    write_yaml(workspace / "hp.yaml", {**CONV, "batch": 100, "epochs": 4})
    nets = catch_nets(monkeypatch)
    for words in (["naive", "--num_tasks", "1"], ["naive", "--num_tasks", "2"],
                  ["ewc", "--ewc_lambda", "0", "--num_tasks", "2"],
                  ["ewc", "--ewc_lambda", "10", "--num_tasks", "2"]):
        assert status_of(workspace, *words, "--precision", "fp32") == 0
    first, naive, weightless, held = [net.backbone for net in nets]
    assert distance(weightless, naive) < 0.01 * distance(held, naive)
    assert 0 < distance(held, first) < distance(naive, first)


def catch_logits(monkeypatch):
    """The logits of the test rows as a run predicts them from now on: a list of [n, C_t], after each round, a task."""
    caught = {}

    def predict(net, images, rows, t, *more):
        caught.setdefault(t, []).append(predict_logits(net, images, rows, t, *more))
        return caught[t][-1]

    monkeypatch.setattr(peers, "predict_logits", predict)
    return caught


@pytest.mark.parametrize("model", ["conv", "wrn10_1"])
@pytest.mark.parametrize("method", ["naive", "packnet", "pnn"])
def test_what_was_learned_does_not_change_bit_for_bit(workspace, avalanche, monkeypatch, method, model):
    """Momentum, weight decay, batch norm and dropout would each change it; Naive shows that they are at work."""
    write_yaml(workspace / "hp.yaml", {**CONV, "model": model, "l2_reg": 0.01, "augment": True, "dropout": 0.3})
    caught = catch_logits(monkeypatch)
    matrix = learn(workspace, method, "--precision", "fp32")["accuracy_matrix"]
    assert [len(caught[t]) for t in range(3)] == [3, 2, 1]
    for t in range(2):
        same = [caught[t][0].equal(later) for later in caught[t][1:]]
        assert all(same) if method != "naive" else not any(same)
        assert method == "naive" or len({row[t] for row in matrix[t:]}) == 1
    assert not caught[0][0].equal(caught[1][0])


def test_weights_of_packnet_by_hand(workspace, avalanche, monkeypatch):
    """Of n free weights a task frees floor(n x share), and the rest of the network stays as it was."""
    nets, seen = catch_nets(monkeypatch), []

    def watch(net, *more):
        seen.append([p.detach().clone() for p in net.parameters()])
        return predict_logits(net, *more)

    monkeypatch.setattr(peers, "predict_logits", watch)
    learn(workspace, "packnet", "--prune_share", "0.6", "--precision", "fp32")
    (net,) = nets
    names = [name for name, _ in net.named_parameters()]
    first, after, second, *_, third = seen  # task 0 after round 1; tasks 0 and 1 after round 2; task 2 after round 3
    for name, one, later, two, three in zip(names, first, after, second, third, strict=True):
        assert one[0].equal(later[0]) if name.startswith("heads") else one.equal(later)
        if one.dim() == 4:
            free = [one.numel()]
            for _ in range(3):
                free.append(int(0.6 * free[-1]))
            # Freed weights are 0, and begin there in the next task, which trains those that have a gradient.
            zero = [int(x.eq(0).sum()) for x in (one, two, three)]
            assert zero[0] == free[1] and zero[0] > zero[1] >= free[2] and zero[1] > zero[2] >= free[3]
            assert two[one != 0].equal(one[one != 0]) and three[two != 0].equal(two[two != 0])
        elif name.startswith("heads"):
            assert three[0].equal(one[0]) and three[1].equal(two[1])
        else:  # biases and batch norm
            assert three.equal(one) and two.equal(one)


def test_packnet_prunes_the_smallest_weights(workspace, avalanche):
    (settings,) = peers.read_peers(["packnet", *flags(workspace)])
    _, _, train, _ = prepare(settings)
    net = build_net("conv", train.images.shape[1:], train.classes, 0, seed=1)
    model = peers.wrap_net(settings.method, lambda k: net, train, False, "fp32", None)
    before = [p.detach().clone() for p in net.parameters()]
    model.prune(0.25)
    for p, was in zip(net.parameters(), before, strict=True):
        if p.dim() == 4:
            assert p.eq(0).sum() == p.numel() // 4 and was[p == 0].abs().max() <= was[p != 0].abs().min()
            assert p[p != 0].equal(was[p != 0])
        else:
            assert p.equal(was)


def test_column_hears_of_the_others(workspace, avalanche):
    """PNN's third column, layer by layer: each later convolution adds U relu(V [factor x input of each other]), and so
    does its head."""
    (settings,) = peers.read_peers(["pnn", *flags(workspace)])
    _, _, train, _ = prepare(settings)

    def make_net(k):
        return build_net("conv", train.images.shape[1:], train.classes, 0, seed=k)

    model = peers.wrap_net(settings.method, make_net, train, False, "fp32", None)
    model.activate_task(1)
    model.activate_task(2)
    model.eval()
    inputs = [normalise(train.images[:5])] * 3

    def mix(adapter, width, values):
        joined = torch.cat([a * x for a, x in zip(adapter.alphas, values, strict=True)], 1)
        assert joined.shape[1] == width * len(values)
        return adapter.U(adapter.V(joined).relu())

    for i in range(3):
        outputs = []
        for k, column in enumerate(model.columns):
            stage = column.own.layers[[0, 3, 7][i] : [3, 7, 11][i]]
            x = torch.nn.functional.conv2d(inputs[k], stage[0].weight, stage[0].bias)
            x = x + mix(column.laterals[i - 1], 80, inputs[:k]) if i > 0 and k > 0 else x
            outputs.append(stage[1:](x))
        inputs = outputs
    features = [x.flatten(1) for x in inputs]
    output = model.columns[2].output
    expected = output.itoh(features[2]) + mix(output.adapter, 80, features[:2])
    torch.testing.assert_close(model(torch.arange(5), None), expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(list(model.columns[2].parameters())) > 0
    assert not any(p.requires_grad for column in model.columns[:2] for p in column.parameters())


def test_lwf_without_weight_is_naive_bit_for_bit(workspace, avalanche, monkeypatch):
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True})
    nets = catch_nets(monkeypatch)
    for words in (["naive"], ["lwf", "--lwf_alpha", "0"], ["lwf"]):
        assert status_of(workspace, *words, "--precision", "fp32") == 0
    naive, weightless, lwf = [[*net.parameters(), *net.buffers()] for net in nets]
    assert all(a.equal(b) for a, b in zip(naive, weightless, strict=True))
    assert not naive[0].equal(lwf[0])


def test_penalty_of_lwf_by_hand(workspace, avalanche, monkeypatch):
    """At temperature 2, of the old head on the new rows, alpha times KL(old || new) in the mean over rows. In the first
    step of a task the new network is the old one, and as both see the same crops it is 0."""
    from avalanche.training.plugins import LwFPlugin

    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True})
    found = []
    original = LwFPlugin.before_backward

    def watch(plugin, strategy, **more):
        before = strategy.loss.detach().clone()
        original(plugin, strategy, **more)
        if plugin.lwf.prev_model is not None:
            with torch.no_grad():
                images = strategy.mb_x
                old, new = (forward(net, images, torch.zeros(len(images), dtype=torch.long), "fp32")
                            for net in (plugin.lwf.prev_model.net, strategy.model.net))
                p, q = (old / 2).softmax(1), (new / 2).softmax(1)
                found.append(((strategy.loss.detach() - before).item(), 3 * (p * (p / q).log()).sum(1).mean().item()))

    monkeypatch.setattr(LwFPlugin, "before_backward", watch)
    learn(workspace, "lwf", "--lwf_alpha", "3", "--num_tasks", "2", "--precision", "fp32")
    assert len(found) == 2 * 3 and found[0] == (pytest.approx(0, abs=1e-6),) * 2
    assert all(penalty == pytest.approx(expected, rel=1e-2, abs=1e-6) for penalty, expected in found)
    assert found[-1][0] > 1e-5


@pytest.mark.parametrize("memory", [1, 5, 12])
def test_der_keeps_the_logits_of_at_most_so_many_rows(workspace, avalanche, monkeypatch, memory):
    """Of tasks of unequal sizes; a row's logits are the network's after its task, without augmentation."""
    tasks = {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3, 4]]}
    write_yaml(workspace / "data.yaml", tasks)
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True})
    strategies = []
    make_strategy, nets = peers.make_strategy, catch_nets(monkeypatch)
    monkeypatch.setattr(peers, "make_strategy", lambda *a: strategies.append(make_strategy(*a)) or strategies[-1])
    result = learn(workspace, "der", "--memory", str(memory), "--precision", "fp32")
    _, _, train, _ = prepare(peers.read_peers(["der", *flags(workspace)])[0])
    stored = list(strategies[0].storage_policy.buffer)
    assert len(stored) == result["stored_rows"] == memory and result["stored_numbers"] == 3 * memory
    newest = [(int(row), logits) for row, _, t, logits in stored if t == 1]
    assert newest or memory == 1
    for row, logits in newest:
        expected = predict_logits(nets[0], train.images, torch.tensor([row]), 1, 3, "fp32")[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for row, label, t, logits in stored:
        assert train.labels[int(row)] == label and (int(row) >= 20) == t
        assert t == 1 or (logits[:2] > -100).all() and logits[2] < -100


def test_loss_of_der_by_hand(workspace, avalanche, monkeypatch):
    """Cross entropy of the new rows, plus alpha times the mean squared difference of logits and beta times the cross
    entropy of those from memory."""
    from tools.peer_methods import Dark

    found = []
    backward = Dark.backward

    def watch(strategy):
        if strategy.replay_loader is not None:
            out, y, n = strategy.mb_output.detach(), strategy.mb_y, strategy.batch_size_mem
            old = strategy.batch_logits
            losses = -out.log_softmax(1)[range(len(y)), y]
            expected = losses[n:].mean() + 0.3 * (out[:n] - old).square().mean() + 0.7 * losses[:n].mean()
            found.append((n, strategy.loss.item(), expected.item()))
        backward(strategy)

    monkeypatch.setattr(Dark, "backward", watch)
    learn(workspace, "der", "--memory", "5", "--der_alpha", "0.3", "--der_beta", "0.7", "--precision", "fp32")
    assert [n for n, *_ in found] == [5] * 2 * 6  # memory has fewer rows than a batch: all of them
    assert all(loss == pytest.approx(expected, rel=1e-5) for _, loss, expected in found)


@pytest.mark.parametrize("method", ["agem", "lwf", "der", "packnet", "pnn"])
def test_a_seed_repeats_a_run_and_another_does_not(workspace, avalanche, monkeypatch, method):
    write_yaml(workspace / "hp.yaml", {**CONV, "model": "wrn10_1", "augment": True, "dropout": 0.3})
    caught = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        caught.append(catch_logits(monkeypatch))
        words = ["--memory", "12", "--seed", seed, "--num_tasks", "2", "--name", name]
        assert status_of(workspace, method, *words) == 0
    for t in range(2):
        a, b, c = [logits[t][-1] for logits in caught]
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


def test_every_method_stands_in_the_report(workspace, avalanche, capsys):
    assert status_of(workspace, "lwf", "der", "packnet", "pnn", "--memory", "12") == 0
    assert status_of(workspace, "lwf", "--lwf_alpha", "3") == 0
    capsys.readouterr()
    assert report_of(*sorted((workspace / "runs").iterdir()), "--format", "markdown") == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| Aval")]
    assert rows[:5] == ["Avalanche DER", "Avalanche LwF, lwf_alpha 1.0", "Avalanche LwF, lwf_alpha 3.0",
                        "Avalanche PackNet", "Avalanche PNN"]


def test_resume_leaves_a_finished_run_and_redoes_an_unfinished_one(workspace, avalanche, capsys):
    result = learn(workspace, "naive")
    assert status_of(workspace, "naive", "--name", "a") == 2
    assert "already exists" in capsys.readouterr().err
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
             **arrays | {key: arrays[key][keep] for key in ("test_images", "test_labels")})
    (settings,) = peers.read_peers([method, *flags(workspace)])
    _, precision, train, test = prepare(settings)
    strategy = SimpleNamespace(train=lambda *_, **__: None, plugins=[])
    monkeypatch.setattr(peers, "make_strategy", lambda *_: strategy)
    monkeypatch.setattr(peers, "make_experiences", lambda train: [None] * 3)
    model = SimpleNamespace(net=None, columns=[], rows_trained=0, activate_task=lambda t: None)
    monkeypatch.setattr(peers, "wrap_net", lambda *_: model)
    monkeypatch.setattr(peers, "predict_logits", lambda net, images, rows, t, classes, precision:
                        torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1))
    (workspace / "log").mkdir()
    with RunLog(workspace / "log", 3, 1) as log:
        matrix, _, _ = peers.train_peer(settings, precision, train, test, log)
    assert matrix[-1] == pytest.approx([0.4] * 3)
