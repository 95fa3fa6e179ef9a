"""What the numbers of a few seeds say: mean, spread, interval, paired and unpaired differences, outliers."""
import math
import statistics
from dataclasses import dataclass
from itertools import combinations

from scipy import stats

from tools.runs import COSTS, METRICS, make_frame

LEVEL = 0.95
FEWEST = 3  # values from which an interval is given: that of two is too wide to say anything
ROUND_OFF = 1e-12  # a standard deviation below it is rounding, of values that are all alike


@dataclass(frozen=True)
class Summary:
    """What a few values say; None where they are too few to say it.

    Attributes:
        n: how many values.
        mean, sd: arithmetic mean, and standard deviation with n - 1 (from two values on).
        low, high: ends of the 95 % confidence interval of the mean by Student's t (from FEWEST values on).
        p: two-sided p-value of the mean being 0 (t-test; from FEWEST values on that are not all alike).
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def summarise(values):
    """The `Summary` of a list of numbers."""
    n = len(values)
    if n < 2:
        return Summary(n, *values)
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    if n < FEWEST:
        return Summary(n, mean, sd)
    if sd < ROUND_OFF:
        return Summary(n, mean, sd, mean, mean)
    error = sd / math.sqrt(n)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
    return Summary(n, mean, sd, mean - half, mean + half, 2 * stats.t.sf(abs(mean) / error, n - 1))


def find_outlier(values):
    """The key of `values`' outlying value by Grubbs' two-sided test at 5 %, or None.

    The test assumes normal values and calls one set in twenty wrongly. Of three or four seeds it would call many more,
    because accuracies are counts of rows: two seeds that happen to agree make an outlier of any third.
    """
    n = len(values)
    if n < 5 or (sd := statistics.stdev(values.values())) < ROUND_OFF:
        return None
    mean = statistics.fmean(values.values())
    key = max(values, key=lambda k: abs(values[k] - mean))
    t2 = stats.t.ppf(1 - 0.05 / (2 * n), n - 2) ** 2
    return key if abs(values[key] - mean) / sd > (n - 1) / math.sqrt(n) * math.sqrt(t2 / (n - 2 + t2)) else None


def measure(groups):
    """Every metric and cost of every run: dict label -> metric -> seed -> number; only what is defined is there."""
    found = {}
    for label, rows in make_frame(groups).groupby("group", sort=False):
        known = {key: rows[rows[key].notna()] for key in (*METRICS, "forward_transfer", *COSTS)}
        found[label] = {key: dict(zip(r["seed"], r[key], strict=True)) for key, r in known.items() if len(r)}
    return found


def compare(groups, found):
    """Differences between all groups over the same tasks: paired on the seeds that they share, or by Welch's test.

    Pairs need FEWEST shared seeds, unless a group is smaller than that: fewer would give up Welch's interval.
    Where seeds are shared by parts only, as those of an ensemble and of a single run, what they share makes both alike,
    and Welch's interval is too wide rather than too narrow.

    Returns:
        (label, label of the one taken off, metric, test, `Summary` of the difference); of Welch's test n is a text.
    """
    rows = []
    for a, b in combinations(groups, 2):
        if a.runs[0].tasks != b.runs[0].tasks:
            continue
        for metric in METRICS:
            of_a, of_b = found[a.label].get(metric, {}), found[b.label].get(metric, {})
            seeds = [seed for seed in of_a if seed in of_b]
            if seeds and (len(seeds) >= FEWEST or min(len(of_a), len(of_b)) < FEWEST):
                rows.append((a.label, b.label, metric, "paired", summarise([of_a[s] - of_b[s] for s in seeds])))
            elif of_a and of_b:
                rows.append((a.label, b.label, metric, "Welch", welch([*of_a.values()], [*of_b.values()])))
    return rows


def welch(a, b):
    """The `Summary` of the difference of the means of two independent lists of numbers, without sd."""
    n, mean = f"{len(a)}, {len(b)}", statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < FEWEST or statistics.stdev(a) + statistics.stdev(b) < ROUND_OFF:
        return Summary(n, mean)
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return Summary(n, mean, None, float(interval.low), float(interval.high), float(test.pvalue))
