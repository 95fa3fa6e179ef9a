"""tools/report.py: statistics by hand and by scipy, grouping, ensembles, formats, bad input, the page."""
import csv
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from scipy import stats

import multihead
from tools import report, runs
from tools.report import find_outlier, measure, summarise
from tools.runs import group_runs, make_ensemble, printable, read_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_run(folder, rows, seed=0, method="modelzoo", cost=(2.0, 300, 40), about=None, **config):
    """Write a run folder's result.json by hand; `rows` is the accuracy matrix, cut at the diagonal if continual."""
    num_tasks = len(rows[-1])
    continual = method == "modelzoo"
    defaults = {
        "dataset": "digits", "tasks": [[2 * t, 2 * t + 1] for t in range(num_tasks)], "names": None, "path": None,
        "size": None, "model": "conv", "batch": 8, "lr": 0.01, "epochs": 2, "method": method,
        "data_config": "config/dataset/toy.yaml", "hp_config": "hp.yaml", "seed": seed, "data_dir": "data",
        "out": "runs", "name": folder.name, "continual": continual, "num_rounds": len(rows),
        "tasks_per_round": 2 if continual else 0, "replay_frac": 1.0, "naive": False, "warm_start": False,
        "resume": False, "save_nets": False,
    }  # fmt: skip
    config = defaults | config
    if config["continual"]:
        rows = [[x if t <= k else None for t, x in enumerate(row)] for k, row in enumerate(rows)]
    n = config["tasks_per_round"]
    rounds = [{"tasks": [*range(min(n - 1, k)), k] if config["continual"] else list(range(num_tasks)),
               "weights": [0.5 + t for t in range(k)], "train_loss": [], "seconds": 1.0}
              for k in range(len(rows))]  # fmt: skip
    result = {"method": method, "accuracy_matrix": rows, "accuracy": rows[-1], "rounds": rounds,
              "classes": config["tasks"][:num_tasks], "config": config,
              **dict(zip(multihead.COST, cost, strict=True))}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    if about:
        (folder / "config.yaml").write_text(json.dumps(about))
    return folder


def make_seeds(tmp_path, name, finals, **config):
    """A run a seed on two tasks whose average accuracies at the end are `finals`."""
    return [make_run(tmp_path / f"{name}{s}", [[x, x], [x, x]], seed=s, **config) for s, x in enumerate(finals)]


def report_of(*arguments):
    """Exit status of report.py."""
    return multihead.guard("report.py", lambda: report.main([str(a) for a in arguments]))


def assert_one_line(capsys, message):
    caught = capsys.readouterr()
    assert caught.out == ""
    assert message in caught.err
    assert caught.err.count("\n") == 1


def read_groups(folders):
    return group_runs([read_run(folder) for folder in folders])


def test_summary_by_hand():
    # mean 0.7, sd 0.1; t(0.975, 2) = 4.302653; half width 4.302653 x 0.1 / sqrt(3) = 0.248414
    s = summarise([0.6, 0.7, 0.8])
    assert (s.n, s.mean, s.sd) == (3, pytest.approx(0.7), pytest.approx(0.1))
    assert (s.low, s.high) == (pytest.approx(0.7 - 0.248414, abs=1e-6), pytest.approx(0.7 + 0.248414, abs=1e-6))


def test_summary_agrees_with_scipy():
    values = np.random.default_rng(0).normal(0.01, 0.02, 7).tolist()
    s, theirs = summarise(values), stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval(0.95)
    assert (s.low, s.high, s.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))
    assert s.sd == pytest.approx(np.std(values, ddof=1))


def test_few_or_equal_values_give_no_interval_out_of_nothing():
    assert summarise([]) == report.Summary(0)
    assert summarise([0.5]) == report.Summary(1, 0.5)
    two = summarise([0.5, 0.7])
    assert (two.sd, two.low, two.high, two.p) == (pytest.approx(math.sqrt(0.02)), None, None, None)
    assert summarise([0.5] * 3) == report.Summary(3, 0.5, 0.0, 0.5, 0.5)


def test_outlier_by_grubbs_table():
    # Critical value for n = 5, two-sided 5 %: 1.7150. G is 6.8 / 3.9623 = 1.7162 with 10,
    # 6.72 / 3.9194 = 1.7145 with 9.9.
    assert find_outlier({7: 0.0, 8: 1.0, 9: 2.0, 10: 3.0, 11: 10.0}) == 11
    assert find_outlier({7: 0.0, 8: 1.0, 9: 2.0, 10: 3.0, 11: 9.9}) is None
    assert find_outlier({0: 0.1, 1: 0.9}) is None
    assert find_outlier({0: 0.995, 1: 0.995, 2: 0.9951}) is None  # G of two ties and any third: 1.1547, critical 1.1543
    assert find_outlier(dict.fromkeys(range(5), 0.5)) is None


def test_outlying_seed_is_named(tmp_path, capsys):
    assert report_of(*make_seeds(tmp_path, "zoo", [0.7, 0.71, 0.69, 0.7, 0.3])) == 0
    assert "Model Zoo: seed 4 is an outlier" in capsys.readouterr().out


def test_runs_that_differ_in_seed_only_are_one_group(tmp_path):
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72])
    folders.append(make_run(tmp_path / "other", [[0.6, 0.6]] * 2, seed=2, out="elsewhere", data_dir="d",
                            resume=True, save_nets=True, data_config="x/toy.yaml", hp_config="y.yaml",
                            names=["a", "b"]))  # fmt: skip
    folders.append(make_run(tmp_path / "lr", [[0.6, 0.6]] * 2, lr=0.1))
    folders.append(make_run(tmp_path / "naive", [[0.6, 0.6]] * 2, naive=True))
    folders.append(make_run(tmp_path / "again", [[0.9, 0.9]] * 2, seed=1))
    groups, notes = read_groups(folders)
    assert [(g.label, [run.seed for run in g.runs]) for g in groups] == [
        ("Model Zoo, lr 0.01", [0, 1, 2]), ("Model Zoo, lr 0.1", [0]),
        ("Model Zoo, lr 0.01, naive", [0])]  # fmt: skip
    assert notes == [f"{tmp_path}/again left out: {tmp_path}/zoo1 has the same settings and seed"]


def test_kinds_are_named(tmp_path):
    folders = [make_run(tmp_path / "a", [[0.6, 0.6]] * 2),
               make_run(tmp_path / "b", [[0.6, 0.6]] * 2, tasks_per_round=1),
               make_run(tmp_path / "c", [[0.6, 0.6]], method="multihead"),
               make_run(tmp_path / "d", [[0.6, 0.6]], continual=False)]  # fmt: skip
    labels = [group.label for group in read_groups(folders)[0]]
    assert labels == ["Model Zoo", "Isolated", "Multi-Head", "Model Zoo, multi-task"]


@pytest.fixture
def ensemble(tmp_path, monkeypatch):
    """A function of (seed, settings) pairs: the ensemble of the runs made with them, of any predictions."""
    monkeypatch.setattr(runs, "load_log_probs", lambda run: ([torch.tensor([[0.7, 0.3]]).log()], [torch.tensor([0])]))

    def make(*members):
        folders = [tmp_path / "-".join(map(str, (seed, *config.values()))) for seed, config in members]
        for folder, (seed, config) in zip(folders, members, strict=True):
            if not folder.exists():
                about = {"settings": {"data": config.pop("data")}} if "data" in config else None
                stored = {"stored_rows": config.pop("stored_rows", None)}
                file = make_run(folder, [[1.0]], seed, about=about, **config) / "result.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | stored))
        return make_ensemble(folders)

    return make


TWO, TEN = {"tasks_per_round": 2}, {"tasks_per_round": 10}


def test_ensembles_of_other_members_are_other_ensembles(ensemble):
    """Found by review: the second was left out, because its seeds and the settings that its members share agree."""
    groups, notes = group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, {"tasks_per_round": 3}), (1, TEN))])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("ensemble of 2 Model Zoo", 1), ("ensemble of 2 Model Zoo (2)", 1)]  # fmt: skip
    assert notes == []


def test_ensembles_of_the_same_settings_are_a_group(ensemble):
    crossed = ensemble((0, TWO), (1, TEN)), ensemble((0, TEN), (1, TWO))
    (group,), notes = group_runs([*crossed, ensemble((1, TEN), (0, TWO))])
    assert len(group.runs) == 2
    assert len(notes) == 1
    assert "has the same settings and seed" in notes[0]


def test_only_ensembles_with_a_member_in_common_share_runs(ensemble):
    """Found by review: two members of one seed, but of different settings, were called shared."""
    assert group_runs([ensemble((0, TWO), (0, TEN))])[1] == []
    assert group_runs([ensemble((0, TWO), (1, TEN)), ensemble((1, TWO), (0, TEN))])[1] == []
    assert group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, TWO), (1, TWO))])[1] == []
    _, notes = group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, TWO), (2, TEN))])
    assert len(notes) == 1
    assert "the ensembles share runs" in notes[0]


def test_ensemble_of_runs_on_different_rows_is_told(ensemble):
    assert group_runs([ensemble((0, {"data": "a"}), (1, {"data": "a"}))])[1] == []
    _, notes = group_runs([ensemble((2, {"data": "a"}), (3, {"data": "b"}))])
    assert notes == ["ensemble of 2 Model Zoo: its members were trained on different rows, so that it gains by more "
                     "data as well as by averaging"]  # fmt: skip


def test_ensemble_of_runs_on_other_task_files_is_not_told_of_other_rows(ensemble):
    """Found by review: the checksum is of all tasks of the file, learned or not."""
    longer = [[0, 1], [2, 3]]
    assert group_runs([ensemble((0, {"data": "a"}), (1, {"data": "b", "tasks": longer}))])[1] == []


@pytest.mark.parametrize(("first", "second", "stored"), [
    ({"data": "a"}, {"data": "a"}, 40),
    ({"data": "a"}, {"data": "b"}, None),  # each keeps rows of its own
    ({"data": "a", "replay_frac": 0.5}, {"data": "a", "replay_frac": 0.5}, None),
    ({}, {}, None),  # nobody knows
])  # fmt: skip
def test_rows_stored_by_an_ensemble(ensemble, first, second, stored):
    """Found by review: it was the count of one member, whatever the others kept."""
    run = ensemble((0, {**first, "stored_rows": 40}), (1, {**second, "stored_rows": 40}))
    assert run.cost["stored_rows"] == stored


def test_runs_of_one_seed_on_different_data_are_told(tmp_path):
    """Found by review: with the files under the same path changed between them, nothing was said."""
    def make(name, data, seed, **config):
        about = {"settings": {"data": data}}
        return make_run(tmp_path / name, [[0.5, 0.5]] * 2, seed, about=about, **config)

    runs = [make("zoo0", "a", 0), make("zoo1", "b", 1), make("iso0", "a", 0, tasks_per_round=1),
            make("fewer0", "c", 0, samples=5)]  # fmt: skip
    assert read_groups(runs)[1] == []
    (note,) = read_groups([*runs, make("iso1", "c", 1, tasks_per_round=1)])[1]
    assert note.startswith(f"{tmp_path / 'zoo1'} and {tmp_path / 'iso1'} have the same tasks, samples and seed, but")


def test_labels_say_no_more_than_tells_a_kind_apart(tmp_path):
    """Found by review: what differed between any two groups stood in the labels of all."""
    same = {"samples": None, "schedule": "cosine"}
    folders = [make_run(tmp_path / "a", [[0.6, 0.6]] * 2, **same),
               make_run(tmp_path / "b", [[0.6, 0.6]] * 2, **same | {"samples": 20}),
               make_run(tmp_path / "c", [[0.6, 0.6]] * 2, **same | {"samples": 20, "schedule": "constant"}),
               make_run(tmp_path / "d", [[0.6] * 3] * 3, batch=4, **same),
               make_run(tmp_path / "e", [[0.6] * 3], batch=4, method="multihead", **same)]  # fmt: skip
    labels = ["Model Zoo, 2 tasks of toy, all samples", "Model Zoo, 2 tasks of toy, samples 20, schedule cosine",
              "Model Zoo, 2 tasks of toy, samples 20, schedule constant", "Model Zoo, 3 tasks of toy",
              "Multi-Head"]  # fmt: skip
    assert [group.label for group in read_groups(folders)[0]] == labels
    assert [group.label for group in read_groups(folders[::-1])[0]] == labels[::-1]


def test_metrics_and_forward_transfer_by_hand(tmp_path):
    zoo = make_run(tmp_path / "zoo", [[0.5, 0, 0], [0.6, 0.7, 0], [0.4, 0.8, 0.9]], seed=3)
    isolated = make_run(tmp_path / "iso", [[0.5, 0, 0], [0.5, 0.6, 0], [0.5, 0.6, 0.65]], seed=3, tasks_per_round=1)
    others = make_run(tmp_path / "more", [[0.1, 0, 0], [0.1, 0.1, 0], [0.1, 0.1, 0.1]], 3, tasks_per_round=1, epochs=9)
    groups, _ = read_groups([zoo, isolated, others])
    found = measure(groups)[groups[0].label]
    assert found["average_accuracy"][3] == pytest.approx((0.4 + 0.8 + 0.9) / 3)
    assert found["learning_accuracy"][3] == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert found["forgetting"][3] == pytest.approx(((0.6 - 0.4) + (0.7 - 0.8)) / 2)
    assert found["backward_transfer"][3] == pytest.approx(((0.4 - 0.5) + (0.8 - 0.7)) / 2)
    assert found["forward_transfer"][3] == pytest.approx(((0.7 - 0.6) + (0.9 - 0.65)) / 2)
    assert "forward_transfer" not in measure(groups)[groups[1].label]
    assert found["networks"][3] == pytest.approx((1 + 2 + 2) / 3)


def test_forward_transfer_needs_the_same_seed(tmp_path, capsys):
    zoo = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2, seed=1)
    isolated = make_run(tmp_path / "iso", [[0.5, 0.5]] * 2, seed=2, tasks_per_round=1)
    groups, _ = read_groups([zoo, isolated])
    assert "forward_transfer" not in measure(groups)["Model Zoo"]
    assert report_of(zoo, isolated) == 0
    out = capsys.readouterr().out
    assert "Model Zoo: no forward transfer" in out
    assert "Welch" in out
    assert report_of(make_run(tmp_path / "one", [[0.5]])) == 0  # of one task there is none
    assert "forward transfer" not in capsys.readouterr().out


def test_paired_difference_by_hand_and_by_scipy(tmp_path, capsys):
    a, b = [0.70, 0.72, 0.71, 0.74], [0.66, 0.70, 0.68, 0.71]
    folders = make_seeds(tmp_path, "zoo", a) + make_seeds(tmp_path, "iso", b, tasks_per_round=1)
    folders.append(make_run(tmp_path / "unpaired", [[0.1, 0.1]] * 2, seed=9, tasks_per_round=1))
    assert report_of(*folders, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    row = next(r for r in rows if r["minus"] == "Isolated" and r["metric"] == "average_accuracy")
    # differences 0.04 0.02 0.03 0.03: mean 0.03, sd sqrt(0.0002 / 3) = 0.0081650, t(0.975, 3) = 3.182446
    assert float(row["mean"]) == pytest.approx(0.03)
    assert float(row["sd"]) == pytest.approx(0.0081650, abs=1e-7)
    assert float(row["low"]) == pytest.approx(0.03 - 3.182446 * 0.0081650 / 2, abs=1e-7)
    theirs = stats.ttest_rel(a, b)
    assert float(row["p"]) == pytest.approx(theirs.pvalue)
    assert float(row["high"]) == pytest.approx(theirs.confidence_interval(0.95).high)
    assert row["n"] == "4"  # the run of seed 9 has no partner
    alone = next(r for r in rows if (r["group"], r["minus"], r["metric"]) == ("Model Zoo", "", "average_accuracy"))
    assert float(alone["mean"]) == pytest.approx(np.mean(a))


def test_groups_without_common_seeds_are_compared_by_welch():
    # means 0.72 and 0.66, variances 0.0004 and 0.0036: standard error sqrt(0.004 / 3) = 0.0365148, degrees of freedom
    # 0.004^2 / (0.0004^2 / 2 + 0.0036^2 / 2) = 2.439024
    s = report.welch([0.70, 0.72, 0.74], [0.60, 0.66, 0.72])
    assert (s.n, s.mean, s.sd) == ("3, 3", pytest.approx(0.06), None)
    half = stats.t.ppf(0.975, 2.439024) * 0.0365148
    assert (s.low, s.high) == (pytest.approx(0.06 - half, abs=1e-6), pytest.approx(0.06 + half, abs=1e-6))
    assert s.p == pytest.approx(2 * stats.t.sf(0.06 / 0.0365148, 2.439024), abs=1e-6)
    assert report.welch([0.7, 0.8], [0.1, 0.2, 0.3]) == report.Summary("2, 3", pytest.approx(0.55))
    assert report.welch([0.5] * 3, [0.4] * 3) == report.Summary("3, 3", pytest.approx(0.1))


@pytest.mark.parametrize("seeds, test, n, note", [
    # Model Zoo has seeds 0, 1 and 2; at least three shared seeds, or all that a group of fewer has, make pairs.
    ([2, 3, 4], "Welch", "3, 3", "1 of 3 seeds are shared, too few for pairs: Welch's test is on all"),
    ([1, 2, 3, 4], "Welch", "3, 4", "2 of 4 seeds are shared, too few for pairs: Welch's test is on all"),
    ([0, 1, 2, 3], "paired", "3", "3 of 4 seeds are shared: the differences are on these"),
    ([2, 3], "paired", "1", "1 of 3 seeds are shared: the differences are on these"),
    ([0, 1, 2], "paired", "3", ""), ([3, 4, 5], "Welch", "3, 3", ""), ([3], "Welch", "3, 1", ""),
])  # fmt: skip
def test_pairs_are_not_bought_with_the_interval(tmp_path, capsys, seeds, test, n, note):
    """Found by review: one seed in common was enough for a paired test of n = 1."""
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.74])
    folders += [make_run(tmp_path / f"iso{s}", [[0.6 + 0.01 * s**2] * 2] * 2, seed=s, tasks_per_round=1)
                for s in seeds]  # fmt: skip
    assert report_of(*folders, "--format", "csv") == 0
    out, err = capsys.readouterr()
    row = next(r for r in csv.DictReader(io.StringIO(out)) if r["minus"] and r["metric"] == "average_accuracy")
    assert (row["test"], row["n"], row["low"] != "") == (test, n, test + n != "paired1" and n != "3, 1")
    assert err.count("seeds are shared") == bool(note)
    assert f"Model Zoo minus Isolated: {note}\n" in err or not note


def test_forward_transfer_of_some_seeds_is_told(tmp_path, capsys):
    zoo = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.74])
    isolated = make_seeds(tmp_path, "iso", [0.6, 0.6, 0.6], tasks_per_round=1)
    assert report_of(*zoo, *isolated) == 0
    assert "forward transfer is" not in capsys.readouterr().out
    assert report_of(*zoo, *isolated[:2]) == 0
    assert "Model Zoo: forward transfer is of 2 of 3 seeds: Isolated has no others\n" in capsys.readouterr().out


def test_many_groups_are_compared_with_the_first(tmp_path, capsys):
    folders = [make_run(tmp_path / f"{lr}", [[lr, lr]], lr=lr, method="multihead") for lr in (0.3, 0.2, 0.5, 0.4)]
    folders += [make_run(tmp_path / f"three{lr}", [[lr] * 3], lr=lr, method="multihead") for lr in (0.7, 0.6, 0.8)]

    def pairs(*folders):
        assert report_of(*folders, "--format", "markdown") == 0
        out = capsys.readouterr().out
        assert ("Differences to the first group over the same tasks" in out) == (len(folders) > 3)
        return re.findall(r"^\| Multi-Head\D*([\d.]+) \| Multi-Head\D*([\d.]+) \|", out, re.M)

    assert pairs(*folders[:3]) == [("0.3", "0.2"), ("0.3", "0.5"), ("0.2", "0.5")]
    assert pairs(*folders[:4]) == [("0.3", "0.2"), ("0.3", "0.5"), ("0.3", "0.4")]
    assert pairs(*folders[3::-1]) == [("0.4", "0.5"), ("0.4", "0.2"), ("0.4", "0.3")]
    assert report_of(*folders, "--format", "csv") == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert sum(row["minus"] != "" for row in rows) == 6 + 3


def test_too_few_seeds_warn_and_give_no_interval(tmp_path, capsys):
    assert report_of(*make_seeds(tmp_path, "zoo", [0.7, 0.8]), "--format", "markdown") == 0
    out = capsys.readouterr().out
    assert "- Model Zoo: n = 2 is below 3: no interval" in out
    assert "| Model Zoo | 2 | 75.00 | 7.07 | – | – | 1.5 | 300 | 40 | 2 |" in out


def test_unknown_costs_are_dashes(tmp_path, capsys):
    assert report_of(make_run(tmp_path / "old", [[0.5, 0.5]] * 2, cost=(2.0, None, None)), "--format", "markdown") == 0
    assert "| Model Zoo | 1 | 50.00 | – | – | – | 1.5 | – | – | 2 |" in capsys.readouterr().out


def test_different_tasks_stand_in_one_report_uncompared(tmp_path, capsys):
    two = make_seeds(tmp_path, "two", [0.7, 0.7, 0.8])
    three = make_run(tmp_path / "three", [[0.6] * 3] * 3)
    elsewhere = make_run(tmp_path / "npz", [[0.6] * 2] * 2, dataset="npz", path="a.npz")
    assert report_of(*two, three, elsewhere) == 0
    out = capsys.readouterr().out
    assert "groups over different tasks are not compared with each other: 2 tasks of toy; 3 tasks of toy" in out
    assert "Differences" not in out


def test_different_commits_in_a_group_are_told(tmp_path, capsys):
    a = make_run(tmp_path / "a", [[0.6, 0.6]] * 2, 0, about={"commit": "a" * 40 + "+", "hardware": "a CPU"})
    b = make_run(tmp_path / "b", [[0.6, 0.6]] * 2, 1, about={"commit": "b" * 40, "hardware": "a CPU"})
    assert report_of(a, b) == 0
    out = capsys.readouterr().out
    assert "Model Zoo: its runs are of different commits" in out
    assert "aaaaaaaaaa+; bbbbbbbbbb" in " ".join(out.split())
    assert "different machines" not in out


def test_latex_and_markdown_keep_their_signs(tmp_path, capsys):
    folders = [*make_seeds(tmp_path, "a", [0.5], data_config="x|y_z%.yaml"), make_run(tmp_path / "b", [[0.5] * 3] * 3)]
    assert report_of(*folders, "--format", "latex") == 0
    out = capsys.readouterr().out
    assert r"x|y\_z\%" in out
    assert out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 3
    assert report_of(*folders, "--format", "markdown") == 0
    assert r"x\|y_z%" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 80, 100, None])
def test_numbers_keep_their_digits_on_any_terminal(tmp_path, capsys, monkeypatch, width):
    """Found by review: on 80 columns 812,500 was 812,… and on 120 the settings were folded where nothing need be."""
    if width:
        monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
        monkeypatch.setenv("COLUMNS", str(width))
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8], cost=(12345678.0, 812500, 1871925), samples=100)
    folders += make_seeds(tmp_path, "iso", [0.7, 0.72, 0.81], cost=(12.0, 187500, 1791675), tasks_per_round=1)
    assert report_of(*folders) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out
    # deviations -4, -2 and 6: sd sqrt(28) = 5.29, half width 4.302653 x 5.2915 / sqrt(3) = 13.145
    for number in ("74.00", "5.29", "60.86", "87.14", "1.5", "812,500", "1,871,925", "12,345,678"):
        assert f" {number} " in out.replace("\n", " ")
    tables = [line for line in out.splitlines() if not line.startswith("note: ")]
    assert any(line.startswith("Isolated ") for line in tables[: tables.index("")])
    if width == 50:  # too narrow for the numbers alone: the terminal breaks the lines
        assert max(map(len, tables)) > width
    elif width:
        assert max(map(len, tables)) <= width
    else:
        assert "seconds\n" in re.sub(" +\n", "\n", out)
        assert any("Model Zoo" in line and "tasks_per_round 2" in line and "torch" in line for line in tables)


# -- bad input


def damage(result, *path, value=None):
    """`result` with the entry at `path` replaced, or dropped where `value` is None."""
    result = json.loads(json.dumps(result))
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(result)


FOREIGN = [
    lambda r: "", lambda r: "{", lambda r: "[]", lambda r: "{}", lambda r: "[" * 100_000, lambda r: '{"config": 3}',
    lambda r: damage(r, "config"), lambda r: damage(r, "config", "seed"), lambda r: damage(r, "rounds", value=[1, 2]),
    lambda r: damage(r, "accuracy_matrix", 1, 0, value=1.5), lambda r: damage(r, "accuracy_matrix", 1, 0, value="x"),
    lambda r: damage(r, "accuracy_matrix", 1, value=[0.5]), lambda r: damage(r, "accuracy_matrix", value=[]),
    lambda r: damage(r, "method", value="svm"), lambda r: damage(r, "classes", value=[[1, 2]]),
    lambda r: damage(r, "rounds", 0, "tasks", value=[7]), lambda r: damage(r, "seconds", value="fast"),
    lambda r: damage(r, "accuracy_matrix", 1, 1, value=float("nan")), lambda r: damage(r, "config", value=[]),
]  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_results_are_one_line(tmp_path, capsys, foreign):
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(foreign(result))
    assert report_of(folder) == 2
    assert_one_line(capsys, "result.json: not a result of this code")


def test_missing_unfinished_and_foreign_folders_are_one_line_each(tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("settings: {}")
    (tmp_path / "empty").mkdir()
    bad = {"nowhere": "no such run folder", "unfinished": "not finished", "empty": "not a run folder"}
    for name, message in bad.items():
        assert report_of(tmp_path / name) == 2
        assert_one_line(capsys, message)
    assert report_of(*(tmp_path / name for name in bad)) == 2
    assert capsys.readouterr().err.count("\n") == 3
    good = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    assert report_of(*(tmp_path / name for name in bad), good) == 0
    caught = capsys.readouterr()
    assert caught.err.count("report.py: skipped: ") == caught.err.count("\n") == 3
    assert "Model Zoo" in caught.out


@pytest.mark.parametrize("about", [{"settings": {"data": ["a"]}}, {"settings": ["data"]}])
def test_foreign_checksums_are_one_line(tmp_path, capsys, about):
    assert report_of(make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2, about=about)) == 2
    assert_one_line(capsys, "not a result of this code")


def test_a_config_that_wants_to_execute_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    (folder / "config.yaml").write_text('a: !!python/object/apply:os.system ["touch EXECUTED"]')
    assert report_of(folder) == 2
    assert_one_line(capsys, "config.yaml: not a valid YAML file")
    assert not (tmp_path / "EXECUTED").exists()


def test_no_runs_and_bad_flags_are_one_line(tmp_path, capsys):
    for arguments in ([], ["--format", "word"], ["--what"]):
        assert report_of(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\nc\x9b") == "a?[2Jb c?"


# -- the page


def test_page_is_self_contained_and_escaped(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8], names=["<script>alert(1)</script>", "b & c"],
                         data_config="<b>.yaml")  # fmt: skip
    folders.append(make_run(tmp_path / "iso", [[0.6] * 3] * 3, tasks_per_round=1))
    folders.append(make_run(tmp_path / "joint2", [[0.6] * 2], method="multihead"))
    folders.append(make_run(tmp_path / "joint3", [[0.6] * 3], method="multihead"))
    assert report_of(*folders, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert re.findall(r'(?:src|href)="(?!data:image/svg)', page) == []
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    # of two tasks: bars, curves, matrix, draws; of three: bars, matrix; and the joint figure
    assert page.count("<img ") == 7
    # Found by review: headings stood there twice without a word of which tasks.
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert len(set(headings)) == len(headings)
    assert {"Average accuracy: 2 tasks of &lt;b&gt;", "Average accuracy: 3 tasks of toy"} <= set(headings)
    assert report_of(folders[0], "--html", tmp_path / "page.html") == 0
    assert "<h2>Average accuracy</h2>" in (tmp_path / "page.html").read_text()
    assert report_of(*folders, "--html", tmp_path / "no" / "page.html") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_in_a_browser(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    assert report_of(*make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.8]), "--html", tmp_path / "page.html") == 0
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2600"]  # fmt: skip
    subprocess.run([*browser, f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()],
                   check=True, capture_output=True, timeout=60)  # fmt: skip
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The figures were drawn: the bars' blue on white, and the heat map's darkest blue and lightest yellow.
    for colour in ((64, 149, 197), (0, 34, 78), (254, 232, 56)):
        assert (abs(pixels - colour).max(2) < 12).sum() > 500


def test_groups_that_no_setting_tells_apart_have_labels_and_numbers_of_their_own(tmp_path):
    """Found by review: the third group was (2) as well, and its numbers stood in the second's row too."""
    folders = [make_run(tmp_path / name, [[x, x]] * 2, dataset="npz", path=f"{name}.npz")
               for name, x in (("a", 0.1), ("b", 0.5), ("c", 0.9))]  # fmt: skip
    groups, _ = read_groups(folders)
    assert [group.label for group in groups] == ["Model Zoo", "Model Zoo (2)", "Model Zoo (3)"]
    found = measure(groups)
    assert [found[group.label]["average_accuracy"][0] for group in groups] == [0.1, 0.5, 0.9]


def test_forward_transfer_comes_from_isolated_of_the_same_settings_seed_by_seed(tmp_path):
    folders = []
    for seed, isolated in ((0, 0.5), (1, 0.7)):
        folders.append(make_run(tmp_path / f"longer{seed}", [[0.1, 0.1]] * 2, seed, tasks_per_round=1, epochs=9))
        folders.append(make_run(tmp_path / f"iso{seed}", [[isolated] * 2] * 2, seed, tasks_per_round=1))
        folders.append(make_run(tmp_path / f"zoo{seed}", [[0.8, 0.8]] * 2, seed))
        # Neither flag changes anything in Isolated, so that its runs without them serve here, too.
        folders.append(make_run(tmp_path / f"kept{seed}", [[0.8, 0.9]] * 2, seed, replay_frac=0.5, naive=True))
    groups, _ = read_groups(folders)
    found = measure(groups)
    zoo, kept = [found[group.label]["forward_transfer"] for group in groups if group.runs[0].kind == "Model Zoo"]
    assert zoo == pytest.approx({0: 0.8 - 0.5, 1: 0.8 - 0.7})
    assert kept == pytest.approx({0: 0.9 - 0.5, 1: 0.9 - 0.7})


def test_every_format_has_the_numbers_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "make_figures", lambda groups: [])
    # Differences 4, 2 and 6 points: mean 4, sd 2, half width 4.302653 x 2 / sqrt(3) = 4.968; t = 3.4641, p = 0.0742.
    # Forgetting of a zoo that ends at x and began 0.1 higher is 0.1, and Isolated's is 0.
    folders = [make_run(tmp_path / f"zoo{s}", [[x + 0.1, 0], [x, x]], s) for s, x in enumerate((0.70, 0.72, 0.74))]
    folders += [make_run(tmp_path / f"iso{s}", [[x, x]] * 2, s, tasks_per_round=1, cost=(s, 10 * s, 100 * s))
                for s, x in enumerate((0.66, 0.70, 0.68))]  # fmt: skip
    rows = (
        # of costs the mean: seconds 0, 1 and 2, rows ten times, parameters a hundred times that
        ("Isolated", "3", "68.00", "2.00", "63.03", "72.97", "1.0", "10", "100", "1"),
        ("Model Zoo", "forgetting", "3", "10.00", "0.00", "10.00", "10.00"),
        ("Model Zoo", "forward transfer", "3", "4.00", "2.00", "-0.97", "8.97"),
        ("Model Zoo", "Isolated", "average accuracy", "paired", "3", "4.00", "2.00", "-0.97", "8.97", "0.074"),
    )
    assert report_of(*folders, "--format", "markdown", "--html", tmp_path / "page.html") == 0
    out, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert report_of(*folders[:-1], "--format", "latex", "--html", tmp_path / "fewer.html") == 0
    assert "<li>Model Zoo minus Isolated: 2 of 3 seeds are shared" in (tmp_path / "fewer.html").read_text()
    capsys.readouterr()
    assert report_of(*folders, "--format", "latex") == 0
    latex = capsys.readouterr().out
    for row in rows:
        assert "| " + " | ".join(row) + " |\n" in out
        assert " & ".join(row) + r" \\" in latex
        cells = "".join(f'<td(?: class="number")?>{re.escape(cell)}</td>' for cell in row)
        assert re.search(f"<tr>{cells}</tr>", page)
    assert report_of(*folders, "--format", "csv") == 0
    line = next(r for r in csv.DictReader(io.StringIO(capsys.readouterr().out)) if r["group"] == "Isolated")
    numbers = [float(line[key]) for key in ("mean", "sd", "low", "high")]
    assert numbers == pytest.approx([0.68, 0.02, 0.63032, 0.72968], abs=1e-5)


@pytest.mark.parametrize("key", ["precision", "device", "l2_reg", "dropout", "schedule", "augment", "model", "samples"])
def test_runs_that_differ_in_a_setting_are_no_seeds_of_one_group(tmp_path, key):
    folders = [make_run(tmp_path / f"{s}", [[0.6, 0.6]] * 2, s, **{key: x}) for s, x in enumerate("xy")]
    assert len(read_groups(folders)[0]) == 2
