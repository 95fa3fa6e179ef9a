"""--inherit: a learner's backbone begins as the one before it ended; the old learners stay as they were."""
import json
import shutil

import pytest
import torch

import modelzoo
import multihead
from modelzoo import Zoo
from net.build_net import build_net
from tests.commands import checkpoint_every_epoch, numbers, shorten, start
from tests.conftest import CONV, flags, write_yaml
from tests.runfolders import make_run, make_seeds, read_groups
from tools.runs import load_frame
from utils import learner as learner_files
from utils.command import command
from utils.config import read_settings
from utils.dry_run import estimate
from utils.learner import WARM, learner_path, load_net
from utils.run import plan_rounds, prepare
from utils.run_folder import load_tensors, save_tensors
from utils.run_net import derive_seed, make_generator, predict_logits, train_net

CONTINUAL = ("--continual", "--inherit")


def read(workspace, name, k):
    return load_tensors(learner_path(workspace / "runs" / name, k), "cpu")


def assert_same_learners(workspace, a, b, rounds=range(3)):
    for k in rounds:
        one, other = read(workspace, a, k), read(workspace, b, k)
        assert one["tasks"] == other["tasks"]
        for key in ("train_logits", "test_logits"):
            assert all(x.equal(y) for x, y in zip(one[key], other[key], strict=True))


@pytest.mark.parametrize("more", [
    CONTINUAL,
    (*CONTINUAL, "--tasks_per_round", "1"),
    (*CONTINUAL, "--naive", "--tasks_per_round", "2"),
    (*CONTINUAL, "--replay_frac", "0.3"),
    ("--inherit", "--num_rounds", "3", "--tasks_per_round", "2"),
    ("--inherit", "--num_rounds", "2", "--tasks_per_round", "2", "--warm_start", "--naive"),
])
def test_each_learner_is_what_a_loop_written_out_trains(workspace, more):
    """Built afresh each round, the modules of the backbone copied over one by one, then trained as any network."""
    hyper = {**CONV, "schedule": "cosine", "augment": True}
    write_yaml(workspace / "hp.yaml", hyper)
    result = start(workspace, "a", *more)
    _, precision, train, test = prepare(read_settings("x", "modelzoo", flags(workspace, *more)))
    before = None
    first = WARM if "--warm_start" in more else 0
    for k in range(first, len(result["rounds"])):
        stored = read(workspace, "a", k)
        rows = []
        for t in stored["tasks"]:
            if "--replay_frac" in more and t != k:
                kept = modelzoo.sample_replay(train, t, 0.3, make_generator(0, t, "replay"))
                rows.append(kept.repeat(max(int(1 / ((len(stored["tasks"]) - 1) * 0.3)), 1)))
            else:
                rows.append(train.rows(t))
        net = build_net("conv", (1, 24, 24), [2] * len(rows), 0, derive_seed(0, k, "init"))
        if before is not None:
            for mine, theirs in zip(net.backbone.parameters(), before.backbone.parameters(), strict=True):
                mine.data.copy_(theirs.data)
        heads = torch.tensor([head for head, r in enumerate(rows) for _ in r])
        generators = {key: make_generator(0, k, key) for key in ("shuffle", "augment", "dropout")}
        joined = torch.cat(rows)
        *_, _ = train_net(net, train.images, joined, heads, train.labels[joined], generators=generators, epochs=2,
                          batch=8, lr=0.01, l2_reg=1e-5, schedule="cosine", augment=True, flip=False,
                          precision=precision)
        for head, t in enumerate(stored["tasks"]):
            found = predict_logits(net, test.images, test.rows(t), head, 2, precision)
            torch.testing.assert_close(stored["test_logits"][head], found)
        before = net


@pytest.mark.parametrize("more, first", [
    (("--continual",), 0),
    (("--num_rounds", "2", "--tasks_per_round", "2"), 0),
    (("--num_rounds", "1", "--tasks_per_round", "2", "--warm_start"), WARM),
])
def test_the_first_learner_is_that_of_the_run_without_it_to_the_last_digit(workspace, more, first):
    fresh, inherited = start(workspace, "a", *more), start(workspace, "b", *more, "--inherit")
    assert_same_learners(workspace, "a", "b", [first])
    second, other = (read(workspace, name, first + 1)["test_logits"][0] for name in "ab")
    assert not second.equal(other)
    for key in ("rows_trained", "parameters", "stored_rows"):
        assert inherited[key] == fresh[key]
    assert inherited["config"]["inherit"] and not fresh["config"]["inherit"]


def test_the_learners_before_stay_as_they_were(workspace):
    """In Isolated nothing may move a task's accuracy once it is learned."""
    result = start(workspace, "a", *CONTINUAL, "--tasks_per_round", "1")
    assert result["forgetting"] == result["backward_transfer"] == 0


@pytest.mark.parametrize("more, kept", [((), [False, False, True]), (("--save_nets",), [True] * 3)])
def test_the_last_network_is_kept_and_all_with_save_nets(workspace, more, kept):
    start(workspace, "a", *CONTINUAL, *more)
    saved = [read(workspace, "a", k) for k in range(3)]
    assert [s["net"] is not None for s in saved] == kept
    _, precision, _, test = prepare(read_settings("x", "modelzoo", flags(workspace, *CONTINUAL)))
    found = predict_logits(load_net(saved[2]["net"], "cpu"), test.images, test.rows(2), 2, 2, precision)
    torch.testing.assert_close(saved[2]["test_logits"][2], found)
    if all(kept):
        zoo = Zoo.load(workspace / "runs/a", "cpu")
        stored = zoo.predict_log_probs(0).exp()
        torch.testing.assert_close(zoo.predict(test.images[test.rows(0)], 0), stored,
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [
    CONTINUAL,
    (*CONTINUAL, "--save_nets"),
    ("--inherit", "--num_rounds", "2", "--tasks_per_round", "2", "--warm_start"),
])
def test_wherever_a_run_stops_it_resumes_to_the_same_bits(workspace, monkeypatch, more):
    """After each file that it writes, checkpoints within a learner too, the folder is copied, and gone on with."""
    for name in ("CHECKPOINT_SECONDS", "time"):
        monkeypatch.setattr(multihead, name, getattr(multihead, name))  # as they were, afterwards
    checkpoint_every_epoch()
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True, "schedule": "cosine"})
    copies, original = [], save_tensors

    def save_and_copy(path, tree):
        original(path, tree)
        if path.parent.name == "learners":
            copies.append(f"copy{len(copies)}")
            shutil.copytree(workspace / "runs/whole", workspace / "runs" / copies[-1])

    with monkeypatch.context() as m:
        m.setattr(learner_files, "save_tensors", save_and_copy)
        whole = start(workspace, "whole", *more)
    learners = {path.name for path in (workspace / "runs/whole/learners").iterdir()}
    rewritten = 0 if "--save_nets" in more else 2
    assert len(copies) == 3 * (1 + 1) + rewritten  # a learner and its checkpoint each; the networks taken out
    for name in copies:
        assert numbers(start(workspace, name, *more, "--resume")) == numbers(whole)
        assert {path.name for path in (workspace / "runs" / name / "learners").iterdir()} == learners
        for file in learners:
            one, other = (load_tensors(workspace / "runs" / run / "learners" / file, "cpu") for run in ("whole", name))
            assert (one["net"] is None) == (other["net"] is None)
            if one["net"]:
                assert all(x.equal(other["net"]["state"][key]) for key, x in one["net"]["state"].items())


@pytest.mark.parametrize("more", [
    (), ("--save_nets",), ("--tasks_per_round", "1"), ("--replay_frac", "0.3"), ("--weigh_by_round",),
])
def test_an_extended_run_equals_one_that_had_all_tasks_from_the_start(workspace, more):
    start(workspace, "old", *CONTINUAL, *more, *shorten(workspace))
    whole = start(workspace, "whole", *CONTINUAL, *more)
    extend = ("--extend", str(workspace / "runs/old"))
    assert numbers(start(workspace, "new", *CONTINUAL, *more, *extend)) == numbers(whole)
    assert_same_learners(workspace, "whole", "new")
    (workspace / "runs/new/result.json").unlink()
    learner_path(workspace / "runs/new", 2).unlink()
    if more == ("--save_nets",):
        assert numbers(start(workspace, "new", *CONTINUAL, *more, "--resume")) == numbers(whole)


def refuse(workspace, capsys, message, *more):
    assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--name", "new", *more)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert not (workspace / "runs/new").exists()


@pytest.mark.parametrize("old, new, message", [
    (("--continual",), CONTINUAL, "old kept no network to inherit from; run that again with --inherit, or extend it"),
    (("--continual", "--save_nets"), CONTINUAL, "--extend: inherit is True, not as in"),
    (CONTINUAL, ("--continual",), "--extend: inherit is False, not as in"),
    (CONTINUAL, (*CONTINUAL, "--save_nets"), "did not keep every network, so this run cannot either"),
])
def test_what_does_not_go_on_from_another_run_is_one_line(workspace, capsys, old, new, message):
    start(workspace, "old", *old, *shorten(workspace))
    capsys.readouterr()
    refuse(workspace, capsys, message, *new, "--extend", str(workspace / "runs/old"))


def test_learners_weighed_by_round_decide_the_loss_that_the_draw_goes_by(workspace):
    """A round later the learners are the same, and their mean is another: of task 0 (p1 + 2 p2) / 3."""
    equal, weighed = start(workspace, "a", *CONTINUAL), start(workspace, "b", *CONTINUAL, "--weigh_by_round")
    assert_same_learners(workspace, "a", "b", range(2))  # whose tasks no draw decides
    _, _, train, _ = prepare(read_settings("x", "modelzoo", flags(workspace, *CONTINUAL)))
    logits = [read(workspace, "b", k)["train_logits"][-1 - k] for k in range(2)]
    labels = train.labels[train.rows(0)]
    for result, weights in ((equal, (1, 1)), (weighed, (1, 2))):
        p = sum(w * x.double().softmax(1) for w, x in zip(weights, logits, strict=True)) / sum(weights)
        loss = -p[torch.arange(len(labels)), labels].log().mean().item()
        assert result["rounds"][1]["train_loss"][0] == pytest.approx(loss)
    assert weighed["rounds"][2]["weights"] == modelzoo.task_weights(weighed["rounds"][1]["train_loss"][:2]).tolist()
    assert weighed["config"]["weigh_by_round"] and weighed["rows_trained"] == equal["rows_trained"]


def test_resuming_without_it_is_refused(workspace, capsys):
    start(workspace, "a", *CONTINUAL)
    for other, was in ((("--continual",), "True, not False"), (CONTINUAL, "False, not True")):
        words = flags(workspace, "--name", "a", "--resume", *other)
        assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
        assert f"was run with inherit {was}" in capsys.readouterr().err
        shutil.rmtree(workspace / "runs/a")
        start(workspace, "a", "--continual")
        capsys.readouterr()


@pytest.mark.parametrize("ruin", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-40]),
    lambda path: save_tensors(path, load_tensors(path, "cpu") | {"net": None}),
])
def test_a_network_that_is_gone_is_one_line_and_never_a_fresh_start(workspace, capsys, ruin):
    """The second learner's file, of which the third is to inherit."""
    start(workspace, "a", *CONTINUAL)
    (workspace / "runs/a/result.json").unlink()
    learner_path(workspace / "runs/a", 2).unlink()
    ruin(learner_path(workspace / "runs/a", 1))
    capsys.readouterr()
    words = flags(workspace, "--name", "a", "--resume", *CONTINUAL)
    assert command("modelzoo.py", "modelzoo", modelzoo.run, words) == 2
    err = capsys.readouterr().err
    assert "holds no network for the next learner to inherit; take another --name" in err.splitlines()[-1]
    assert not learner_path(workspace / "runs/a", 2).exists()


def test_with_save_nets_a_damaged_learner_in_the_middle_is_trained_again(workspace):
    whole = start(workspace, "a", *CONTINUAL, "--save_nets")
    (workspace / "runs/a/result.json").unlink()
    path = learner_path(workspace / "runs/a", 1)
    path.write_bytes(path.read_bytes()[:-40])
    assert numbers(start(workspace, "a", *CONTINUAL, "--save_nets", "--resume")) == numbers(whole)


def test_name_opening_line_and_memory_say_so(workspace, capsys):
    settings = read_settings("x", "modelzoo", flags(workspace, *CONTINUAL, "--weigh_by_round", "--dry_run"))
    assert settings.name == "data-hp-modelzoo-continual-inherit-weigh_by_round-seed=0"
    settings = read_settings("x", "modelzoo", flags(workspace, *CONTINUAL, "--dry_run"))
    assert settings.name == "data-hp-modelzoo-continual-inherit-seed=0"
    loaded = prepare(settings)
    sizes = []
    for more, also in (((), ""), (("--save_nets", "--weigh_by_round"), ", weighed by round")):
        settings = read_settings("x", "modelzoo", flags(workspace, *CONTINUAL, "--dry_run", *more))
        estimate(settings, *loaded, plan_rounds(settings, loaded[2]))
        out = " ".join(capsys.readouterr().out.split())
        assert f"Model Zoo, continual, each learner from the one before{also}: 3 tasks" in out
        sizes.append(float(out.partition("learners' files ")[2].partition(" MB")[0]))
    assert sizes[1] == pytest.approx(3 * sizes[0], abs=0.2)  # of numbers with one decimal


def test_report_tells_the_groups_apart_and_reads_runs_that_did_not_record_it(tmp_path):
    make_seeds(tmp_path, "old", [0.5, 0.6])  # their config has no such key
    new = make_run(tmp_path / "new", [[0.7, 0.7], [0.7, 0.7]], seed=2, inherit=False)
    make_seeds(tmp_path, "inherit", [0.8, 0.9], inherit=True)
    alone = make_seeds(tmp_path, "alone", [0.4], tasks_per_round=1, inherit=False)
    make_seeds(tmp_path, "lone", [0.45], tasks_per_round=1, inherit=True)
    folders = sorted(tmp_path.iterdir())
    groups, notes = read_groups(folders)
    assert not notes
    found = {group.label: [run.seed for run in group.runs] for group in groups}
    assert found == {"Model Zoo": [0, 1, 2], "Model Zoo, inherit": [0, 1], "Isolated": [0], "Isolated, inherit": [0]}
    assert json.loads((new / "result.json").read_text())["config"]["inherit"] is False and alone
    # Once: alone in a report, or averaged with a fresh one, it went by the name of the paper's method.
    (label,) = (group.label for group in read_groups([tmp_path / "inherit0"])[0])
    assert label == "Model Zoo, inherit"
    (label,) = (group.label for group in read_groups(make_seeds(tmp_path, "both", [0.9], inherit=True, epochs=7,
                                                                weigh_by_round=True))[0])
    assert label == "Model Zoo, inherit, weigh_by_round"
    # Forward transfer is against tasks learned alone, from a fresh start: 0.8 - 0.4 on the second task.
    frame = load_frame(folders)
    row = frame[(frame.group == "Model Zoo, inherit") & (frame.seed == 0)].iloc[0]
    assert row.forward_transfer == pytest.approx(0.4) and row.inherit
