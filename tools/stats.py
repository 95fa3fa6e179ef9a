"""What the numbers of a few seeds say: mean, spread, interval, paired and unpaired differences, outliers."""
import math
import statistics
import warnings
from dataclasses import astuple, dataclass, fields, replace
from itertools import combinations

from scipy import stats

from tools.runs import COSTS, METRICS, TRANSFER, make_frame, require

LEVEL = 0.95
FEWEST = 3  # values from which an interval is given: that of two is too wide to say anything
ROUND_OFF = 1e-12  # a standard deviation below it is rounding, of values that are all alike
SPREAD = ("mean over seeds; sd: standard deviation with n - 1; 95 %: confidence interval of the mean by Student's t; "
          "±: half its width")


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
    return Summary(n, mean, sd, *_t_test(stats.ttest_1samp, values, popmean=0))


def welch(a, b):
    """The `Summary` of the difference of the means of two independent lists of numbers, without sd."""
    n, mean = f"{len(a)}, {len(b)}", statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < FEWEST or statistics.stdev(a) + statistics.stdev(b) < ROUND_OFF:
        return Summary(n, mean)
    return Summary(n, mean, None, *_t_test(stats.ttest_ind, a, b, equal_var=False))


def _t_test(test, *values, **options):
    """Ends of the interval, and p, of one of scipy's t-tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values nearly alike: one group's may be, and it is right
        found = test(*values, **options)
    return (*map(float, found.confidence_interval(LEVEL)), float(found.pvalue))


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
    """Every metric and cost of every run: dict label -> metric -> `Run.trial` -> number, where it is defined."""
    found = {}
    trials = [run.trial for group in groups for run in group.runs]
    for label, rows in make_frame(groups).assign(trial=trials).groupby("group", sort=False):
        known = {key: rows[rows[key].notna()] for key in (*METRICS, TRANSFER, *COSTS)}
        found[label] = {key: dict(zip(r["trial"], r[key], strict=True)) for key, r in known.items() if len(r)}
    return found


def compare(groups, found):
    """What `measure` found, in a frame: a row per group and metric, then per two groups over the same tasks.

    Its columns are group, minus (the group taken off), metric, test, and those of a `Summary`. Differences are paired
    on the seeds that both groups have, or by Welch's test, where n is a text. Pairs need FEWEST shared seeds, unless a
    group is smaller than that: fewer would give up Welch's interval. Where seeds are shared by parts only, as those of
    an ensemble and of a single run, what they share makes both alike: Welch's interval is rather too wide.
    """
    # No p-value of a group: whether an accuracy is 0 is no question, and a transfer has its interval.
    rows = [(label, None, metric, None, replace(summarise(list(values.values())), p=None))
            for label, of_group in found.items() for metric, values in of_group.items()]
    for a, b in combinations(groups, 2):
        for metric in METRICS if a.runs[0].over == b.runs[0].over else ():
            of_a, of_b = (found[group.label].get(metric, {}) for group in (a, b))
            seeds = [seed for seed in of_a if seed in of_b]
            if seeds and (len(seeds) >= FEWEST or min(len(of_a), len(of_b)) < FEWEST):
                rows.append((a.label, b.label, metric, "paired", summarise([of_a[s] - of_b[s] for s in seeds])))
            elif of_a and of_b:
                rows.append((a.label, b.label, metric, "Welch", welch([*of_a.values()], [*of_b.values()])))
    columns = ["group", "minus", "metric", "test", *(field.name for field in fields(Summary))]
    return require("pandas").DataFrame([(*names, *astuple(summary)) for *names, summary in rows], columns=columns)
