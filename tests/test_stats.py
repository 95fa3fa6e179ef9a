"""tools/stats.py and what the report says of spread and differences: by hand and by scipy."""
import csv
import io
import math
import re

import numpy as np
import pytest
from scipy import stats

from tests.runfolders import make_run, make_seeds, read_groups, report_of, squeeze
from tools.stats import Summary, find_outlier, measure, summarise, welch


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
    assert summarise([]) == Summary(0)
    assert summarise([0.5]) == Summary(1, 0.5)
    two = summarise([0.5, 0.7])
    assert (two.sd, two.low, two.high, two.p) == (pytest.approx(math.sqrt(0.02)), None, None, None)
    assert summarise([0.5] * 3) == Summary(3, 0.5, 0.0, 0.5, 0.5)


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


def test_forward_transfer_of_some_seeds_is_told(tmp_path, capsys):
    zoo = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.74])
    isolated = make_seeds(tmp_path, "iso", [0.6, 0.6, 0.6], tasks_per_round=1)
    assert report_of(*zoo, *isolated) == 0
    assert "forward transfer is" not in capsys.readouterr().out
    assert report_of(*zoo, *isolated[:2]) == 0
    assert "Model Zoo: forward transfer is of 2 of 3 seeds: Isolated has no others\n" in capsys.readouterr().out


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
    s = welch([0.70, 0.72, 0.74], [0.60, 0.66, 0.72])
    assert (s.n, s.mean, s.sd) == ("3, 3", pytest.approx(0.06), None)
    half = stats.t.ppf(0.975, 2.439024) * 0.0365148
    assert (s.low, s.high) == (pytest.approx(0.06 - half, abs=1e-6), pytest.approx(0.06 + half, abs=1e-6))
    assert s.p == pytest.approx(2 * stats.t.sf(0.06 / 0.0365148, 2.439024), abs=1e-6)
    assert welch([0.7, 0.8], [0.1, 0.2, 0.3]) == Summary("2, 3", pytest.approx(0.55))
    assert welch([0.5] * 3, [0.4] * 3) == Summary("3, 3", pytest.approx(0.1))


def test_seeds_that_agree_to_the_last_digit_stand_beside_others_without_a_warning():
    """scipy warns, of a result that is right: half width 4.302653 x 0.152753 / sqrt(3)."""
    s = welch([0.5] * 3, [0.4, 0.5, 0.7])
    assert (s.low, s.high) == pytest.approx((-0.0333333 - 0.3794583, -0.0333333 + 0.3794583), abs=1e-6)


@pytest.mark.parametrize("seeds, test, n, note", [
    # Model Zoo has seeds 0, 1 and 2; at least three shared seeds, or all that a group of fewer has, make pairs.
    ([2, 3, 4], "Welch", "3, 3", "1 of 3 seeds are shared, too few for pairs: Welch's test is on all"),
    ([1, 2, 3, 4], "Welch", "3, 4", "2 of 4 seeds are shared, too few for pairs: Welch's test is on all"),
    ([0, 1, 2, 3], "paired", "3", "3 of 4 seeds are shared: the differences are on these"),
    ([2, 3], "paired", "1", "1 of 3 seeds are shared: the differences are on these"),
    ([0, 1, 2], "paired", "3", ""), ([3, 4, 5], "Welch", "3, 3", ""), ([3], "Welch", "3, 1", ""),
])
def test_pairs_are_not_bought_with_the_interval(tmp_path, capsys, seeds, test, n, note):
    """Once: one seed in common was enough for a paired test of n = 1."""
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72, 0.74])
    folders += [make_run(tmp_path / f"iso{s}", [[0.6 + 0.01 * s**2] * 2] * 2, seed=s, tasks_per_round=1)
                for s in seeds]
    assert report_of(*folders, "--format", "csv") == 0
    out, err = capsys.readouterr()
    row = next(r for r in csv.DictReader(io.StringIO(out)) if r["minus"] and r["metric"] == "average_accuracy")
    assert (row["test"], row["n"], row["low"] != "") == (test, n, test + n != "paired1" and n != "3, 1")
    assert err.count("seeds are shared") == bool(note)
    assert f"Model Zoo minus Isolated: {note}\n" in err or not note


def test_many_groups_are_compared_with_the_first(tmp_path, capsys):
    folders = [make_run(tmp_path / f"{lr}", [[lr, lr]], lr=lr, method="multihead") for lr in (0.3, 0.2, 0.5, 0.4)]
    folders += [make_run(tmp_path / f"three{lr}", [[lr] * 3], lr=lr, method="multihead") for lr in (0.7, 0.6, 0.8)]

    def pairs(*folders):
        assert report_of(*folders, "--format", "markdown") == 0
        out = squeeze(capsys.readouterr().out)
        assert ("Differences to the first group over the same tasks" in out) == (len(folders) > 3)
        return re.findall(r"^\| Multi-Head\D*([\d.]+) \| Multi-Head\D*([\d.]+) \|", out, re.M)

    assert pairs(*folders[:3]) == [("0.3", "0.2"), ("0.3", "0.5"), ("0.2", "0.5")]
    assert pairs(*folders[:4]) == [("0.3", "0.2"), ("0.3", "0.5"), ("0.3", "0.4")]
    assert pairs(*folders[3::-1]) == [("0.4", "0.5"), ("0.4", "0.2"), ("0.4", "0.3")]
    assert report_of(*folders, "--format", "csv") == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert sum(row["minus"] != "" for row in rows) == 6 + 3
