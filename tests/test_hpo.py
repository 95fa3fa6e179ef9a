"""The search: what a trial may see, what it proposes, what is left of it when it is killed."""
import csv
import functools
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hpo
import modelzoo
import multihead
from datasets.build_dataset import hold_out
from datasets.data import DataError, TaskData
from utils import command as cli
from utils.cluster import connect, share_out
from utils.config import read_settings
from utils.config_files import SPACE, ConfigError, load_yaml, read_space
from utils.log import RunLog
from utils.run import prepare
from utils.run_folder import RunError
from utils.search import read_search

ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "optuna")),
    reason="Ray or Optuna is not installed: pip install -r requirements-hpo.txt",
)
SEARCHED = ("batch", "lr", "l2_reg")  # conv has no dropout
HYPER = "model: conv\nbatch: 32\nlr: 0.01\nl2_reg: 1e-5\ndropout: 0\nepochs: 2\naugment: false\n"


@pytest.fixture(scope="module")
def local_ray():
    """One Ray of two cores for all searches of this file: to start it takes longer than to use it."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    connect(None)
    assert signal.getsignal(signal.SIGTERM) is before  # by which a search ends in one line
    yield
    ray.shutdown()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A dataset of two tasks that a linear rule tells apart, and a hyper-parameter file, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_data(Path("data/two.npz"))
    Path("two.yaml").write_text("dataset: npz\npath: two.npz\ntasks: [[0, 1], [2, 3]]\n")
    Path("small.yaml").write_text(HYPER)
    return ["--data_config", "two.yaml", "--hp_config", "small.yaml", "--device", "cpu"]


def write_data(path, test_labels=None, test_value=None):
    """Write 20 training and 5 test images of each of 4 classes; the brighter quarter of an image tells its class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 20), ("test", 5)):
        labels = np.arange(4).repeat(n)
        images = rng.integers(0, 100, (4 * n, 24, 24), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[12 * (label // 2) :, 12 * (label % 2) :][:12, :12] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    if test_value is not None:
        arrays["test_images"][:] = test_value
    if test_labels is not None:
        arrays["test_labels"] = test_labels
    np.savez(path, **arrays)


def make_rows(counts):
    """TaskData whose image of row i is filled with i: counts[t][c] rows of class c of task t."""
    labels = torch.cat([torch.full((n,), c) for task in counts for c, n in enumerate(task)])
    starts = (0, *np.cumsum([sum(task) for task in counts]).tolist())
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return TaskData(images, labels, starts, tuple(map(len, counts)), flip=False)


def test_hold_out_takes_each_fifth_row_of_every_class_of_every_task():
    fit, held = hold_out(make_rows([[10, 5], [4, 11]]))
    # By hand: task 0 is rows 0-9 and 10-14, task 1 rows 15-18 (one of four, the last) and 19-29 (two of eleven).
    assert held.images[:, 0, 0, 0].tolist() == [4, 9, 14, 18, 23, 29]
    assert held.labels.tolist() == [0, 0, 1, 0, 1, 1]
    assert (held.starts, fit.starts) == ((0, 3, 6), (0, 12, 24))
    rows = torch.cat([fit.images, held.images])[:, 0, 0, 0].sort().values
    assert rows.tolist() == list(range(30))


def test_hold_out_passes_over_a_class_without_rows():
    """Random labels may leave a class out."""
    fit, held = hold_out(make_rows([[10, 0, 5]]))
    assert held.images[:, 0, 0, 0].tolist() == [4, 9, 14] and fit.starts == (0, 12)


def test_hold_out_refuses_a_class_of_one_row():
    with pytest.raises(DataError, match="class 1 of task 0 has a single training row"):
        hold_out(make_rows([[10, 1]]))


def test_a_label_of_two_tasks_holds_out_the_same_rows():
    one = make_rows([[12, 9]])
    both = replace(one, images=one.images.repeat(2, 1, 1, 1), labels=one.labels.repeat(2), starts=(0, 21, 42),
                   classes=(2, 2))
    fit, held = hold_out(both)
    seen = [set(part.images[part.rows(t), 0, 0, 0].tolist()) for part in (fit, held) for t in (0, 1)]
    assert seen[0] == seen[1] and seen[2] == seen[3] and not seen[0] & seen[2]


def prepare_search(argv):
    """Settings of a trial, and the rows that it may see."""
    settings, _ = read_search("hpo.py", argv)
    return settings, *hold_out(prepare(settings)[2])


def test_predicting_between_epochs_leaves_the_training_as_it_was(files):
    settings, fit, held = prepare_search(files)
    tasks, rows = [0, 1], [fit.rows(0), fit.rows(1)]

    def weights(disturb):
        for net, _, _ in multihead.train_epochs(settings, "fp32", fit, tasks, rows, 0):
            if disturb:
                multihead.predict_logits(net, held.images, held.rows(0), 0, 2, "fp32")
        return net.state_dict()

    alone, disturbed = weights(False), weights(True)
    assert alone.keys() == disturbed.keys() and all(torch.equal(alone[k], disturbed[k]) for k in alone)


def test_the_last_score_is_the_learners_accuracy_on_the_held_out_rows(files, tmp_path):
    settings, fit, held = prepare_search(files)
    tasks, rows = [0, 1], [fit.rows(0), fit.rows(1)]
    scores = list(hpo.score_epochs(settings, "fp32", fit, held))
    with RunLog(tmp_path, 1, 1) as log:
        learner = multihead.train_learner(settings, "fp32", fit, held, tasks, rows, rows, 0, log, val=held)
    right = [(learner.test_logits[t].argmax(1) == held.labels[held.rows(t)]).double().mean().item() for t in tasks]
    assert len(scores) == settings.epochs == 2
    assert scores[-1] == sum(right) / 2


def test_every_score_is_of_renewed_batch_norm(files):
    """Once only the last was: the others were of the statistics that few steps leave, and trials ended by them."""
    settings, fit, held = prepare_search(files)
    scores = {epochs: list(hpo.score_epochs(replace(settings, epochs=epochs, schedule="constant"), "fp32", fit, held))
              for epochs in (1, 2)}
    assert scores[2][0] == scores[1][0]


def test_a_zoos_scores_are_those_of_one_that_grows_in_one_go(files, tmp_path):
    settings, fit, held = prepare_search([*files, "--objective", "zoo"])
    assert (settings.method, settings.continual, settings.num_rounds) == ("modelzoo", True, 2)
    (tmp_path / "zoo" / "learners").mkdir(parents=True)
    with RunLog(tmp_path / "zoo", 2, 1, names=["a", "b"]) as log:
        matrix, _, _ = modelzoo.grow_zoo(settings, "fp32", fit, held, tmp_path / "zoo", log)
    assert list(hpo.score_rounds(settings, "fp32", fit, held)) == [matrix[0][0], sum(matrix[1]) / 2]


def test_a_search_below_lr_min_is_refused(files):
    """Once it was written as the best, and no run took it."""
    Path("small.yaml").write_text(HYPER + "lr_min: 0.005\n")
    with pytest.raises(ConfigError, match="lr_min: 0.005 must be at most 0.0001, the lowest lr that is searched"):
        read_search("hpo.py", files)
    Path("small.yaml").write_text(HYPER + "lr_min: 0.005\nsearch: {lr: {choice: [0.1, 0.005]}}\n")
    read_search("hpo.py", files)


def test_defaults(files):
    """conv has no dropout to search."""
    settings, search = read_search("hpo.py", files)
    assert search.space | {"dropout": ("uniform", (0.1, 0.5))} == SPACE == {
        "batch": ("choice", (8, 16, 32, 128)), "lr": ("log", (1e-4, 1e-1)), "l2_reg": ("log", (1e-6, 1e-2)),
        "dropout": ("uniform", (0.1, 0.5)),
    }
    assert "dropout" not in search.space
    assert (search.num_samples, search.objective, search.cpus_per_trial, search.address) == (81, "multihead", 1, None)
    assert settings.name == "two-small-hpo-seed=0"


def test_the_search_section_takes_the_place_of_the_keys_it_names(files):
    search = "search:\n  lr: {uniform: [0.01, 0.1]}\n  batch: {choice: [4]}\n"
    Path("small.yaml").write_text(HYPER.replace("conv", "wrn16_4") + search)
    space = read_space("small.yaml", load_yaml("small.yaml"))
    assert space == SPACE | {"lr": ("uniform", (0.01, 0.1)), "batch": ("choice", (4,))}
    assert read_settings("multihead.py", "multihead", files).lr == 0.01  # other scripts do not mind it


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("search: 3", "small.yaml: search: must hold keys"),
        ("search: {rate: {log: [1, 2]}}", "small.yaml: search: unknown key rate"),
        ("search: {lr: 0.1}", "small.yaml: search: lr: must hold one of choice, log, uniform"),
        ("search: {batch: {log: [1, 2]}}", "small.yaml: search: batch: must hold one of choice"),
        ("search: {lr: {log: [0.1]}}", "small.yaml: search: lr: log: must be a list of two ends"),
        ("search: {lr: {log: [0.1, 0.01]}}", "small.yaml: search: lr: log: 0.1 must be below 0.01"),
        ("search: {l2_reg: {log: [0, 0.01]}}", "small.yaml: search: l2_reg: log: 0 has no logarithm"),
        ("search: {dropout: {uniform: [0.1, 1]}}", "small.yaml: search: dropout: uniform: 1.0 must be"),
        ("search: {batch: {choice: [8, many]}}", "small.yaml: search: batch: choice: 'many' is not a whole number"),
    ],
)
def test_mistakes_in_the_search_section_are_one_line_of_every_script(files, capsys, section, line):
    Path("small.yaml").write_text(HYPER.replace("conv", "wrn16_4") + section + "\n")
    for main in (hpo.main, functools.partial(cli.command, "multihead.py", "multihead", multihead.run)):
        assert main(files) == 2
        out, err = capsys.readouterr()
        assert line in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--objective", "loss"], "--objective: 'loss' is not one of multihead, zoo"),
        (["--num_samples", "0"], "--num_samples: 0 must be at least 1"),
        (["--cpus_per_trial", "1.5"], "--cpus_per_trial: 1.5 must be a whole number where it is above 1"),
        (["--gpus_per_trial", "0.5"], "--gpus_per_trial 0.5 contradicts --device cpu"),
        (["--samples", "1"], "a single training row"),
    ],
)
def test_mistakes_in_flags_are_one_line_and_leave_nothing(files, capsys, flags, line):
    assert hpo.main([*files, *flags]) == 2
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and not out
    assert not Path("runs").exists() and not Path("config").exists()


@pytest.mark.parametrize("package", ["ray", "optuna"])
def test_without_ray_or_optuna_one_line_says_how_to_install_it(files, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert hpo.main(files) == 2
    err = capsys.readouterr().err
    assert "is not installed; install it by: pip install -r requirements-hpo.txt" in err
    assert err.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.parametrize("gpus, slots", [(1, 2), (0.6, 2), (0.5, 4), (0.3, 6), (0.1, 20), (2, 1), (0, 32)])
def test_a_trial_has_its_share_of_one_card(monkeypatch, gpus, slots):
    """Of 32 cores and 2 GPUs: two trials of 0.6 GPUs fit, though these are 1.2 of 2."""
    node = {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 2.0}}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [node]))
    assert share_out("trial", 1, gpus, "auto")[2] == slots


def test_a_trial_that_was_stopped_early_is_never_the_best():
    def result(name, score, length, note=""):
        metrics = {"trial_id": name, "score": score, "training_iteration": length, "time_total_s": 1.0, "note": note}
        return SimpleNamespace(metrics=metrics, error=None, config={"lr": 0.1})

    lost = SimpleNamespace(metrics=None, error=ValueError("x"), config={"lr": 0.1})
    rows = hpo.rank([result("stopped", 0.9, 1), result("worse", 0.6, 9), result("best", 0.7, 9),
                     result("broken", 0.0, 1, "inf"), lost], 9)
    assert [row["trial"] for row in rows][:3] == ["best", "worse", "stopped"]
    assert hpo.scores_at_the_end(rows, 9) == [0.7, 0.6]
    # One that fails in its last epoch was not trained to the end, and one that was stopped is not the best.
    rows = hpo.rank([result("stopped", 0.9, 1), result("broken", 0.0, 9, "inf"), lost], 9)
    with pytest.raises(RunError, match="^no trial could be trained to the end: inf$"):
        hpo.scores_at_the_end(rows, 9)


def search(files, name, *flags):
    """Run a search of two trials, one after the other; return the rows of its table of trials."""
    assert hpo.main([*files, "--name", name, "--num_samples", "2", "--max_concurrent", "1", *flags]) == 0
    with open(f"runs/{name}/trials.csv", encoding="utf-8") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["lr"])


def found(rows, *keys):
    """The columns of a table of trials that the same search gives again."""
    return [[row[key] for key in keys or ("score", "length", *SEARCHED)] for row in rows]


@needs_ray
def test_a_search_writes_settings_that_the_other_scripts_read(files, local_ray, capsys, monkeypatch):
    text, share_out = Path("small.yaml").read_text(), hpo.share_out

    def edit_the_file(*words):
        Path("small.yaml").write_text(f"{text}momentum: 0.5\n")
        return share_out(*words)

    with monkeypatch.context() as patch:
        patch.setattr(hpo, "share_out", edit_the_file)
        rows = search(files, "first")
    Path("small.yaml").write_text(text)
    out = capsys.readouterr().out
    assert len(rows) == 2 and all(0 <= float(row["score"]) <= 1 and row["length"] in ("1", "2") for row in rows)
    best = max((row for row in rows if row["length"] == "2"), key=lambda row: float(row["score"]))
    written = Path("config/hyperparam/first.yaml")
    settings = read_settings("modelzoo.py", "modelzoo", [*files, "--hp_config", str(written)])
    assert (settings.model, settings.epochs, settings.augment) == ("conv", 2, False)
    assert settings.momentum == 0.9  # as when the search began
    assert [str(getattr(settings, key)) for key in SEARCHED] == [best[key] for key in SEARCHED]
    head = written.read_text().split("model:")[0].splitlines()
    assert "--name first" in head[0] and f"Score: {100 * float(best['score']):.2f} %" in head[1]
    ended = [float(row["score"]) for row in rows if row["length"] == "2"]
    median = 100 * sum(ended) / len(ended)
    assert f"the {len(ended)} of 2 trials that were trained to the end: {median:.2f} %" in head[1]
    assert "two.yaml, 64 rows to train on, 16 held out" in head[2] and head[3].startswith("# Date: 20")
    assert "best score" in out and "Trial" not in out  # the table, without Ray's own progress

    assert hpo.main([*files, "--name", "first"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert hpo.main([*files, "--name", "first", "--resume"]) == 2
    assert "was run with num_samples 2, not 81" in capsys.readouterr().err
    Path("config/hyperparam/mine.yaml").write_text(HYPER)
    assert hpo.main([*files, "--name", "mine"]) == 2
    assert "mine.yaml already exists" in capsys.readouterr().err
    assert Path("config/hyperparam/mine.yaml").read_text() == HYPER


@needs_ray
def test_a_search_stops_the_lowest_scores_and_proposes_near_the_highest(files, local_ray, monkeypatch):
    """A trial's score here is its dropout, drawn from 0 to 0.5."""
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace("conv", "wrn16_4"))

    def report_dropout(chosen, **_):
        from ray import tune

        for _ in range(9):
            tune.report({"score": chosen["dropout"], "note": ""})

    monkeypatch.setattr(hpo, "trial", report_dropout)  # a function of a function: Ray sends its code, not its name
    argv = [*files, "--epochs", "9", "--name", "a", "--num_samples", "25", "--max_concurrent", "1"]
    assert hpo.main(argv) == 0
    with open("runs/a/trials.csv", encoding="utf-8") as file:
        scores = [(float(row["score"]), row["length"]) for row in csv.DictReader(file)]
    finished = [score for score, length in scores if length == "9"]
    stopped = [score for score, length in scores if length != "9"]
    assert len(finished) + len(stopped) == 25 and statistics.mean(finished) > statistics.mean(stopped)
    assert max(stopped) < max(finished) == max(scores)[0]
    assert statistics.mean(score for score, _ in scores) > 0.3  # uniform draws have 0.25


@needs_ray
def test_no_test_row_reaches_a_trial_and_a_seed_proposes_the_same(files, local_ray):
    """The second search differs in its test rows alone; if a trial read one, its score would differ as well."""
    clean = search(files, "clean")
    write_data(Path("data/two.npz"), test_labels=np.arange(20) % 4, test_value=255)
    assert found(search(files, "poisoned")) == found(clean)
    other = search(files, "other", "--seed", "1")
    assert not set(map(tuple, found(other, "lr", "l2_reg"))) & set(map(tuple, found(clean, "lr", "l2_reg")))


def test_the_rows_of_a_search_are_training_rows(files):
    write_data(Path("data/two.npz"), test_value=255)
    _, fit, held = prepare_search(files)
    rows = torch.cat([fit.images, held.images])
    assert len(rows) == 80 and not (rows == 255).any()


@needs_ray
@pytest.mark.parametrize(("flags", "line"), [
    (["--device", "auto", "--precision", "fp16"], "--precision: fp16 needs a CUDA device"),
    (["--device", "cuda:1", "--gpus_per_trial", "0.5"], "--device: Ray chooses the GPU of each trial; give cuda"),
])
def test_what_would_fail_in_every_trial_is_refused_before_the_first(files, local_ray, capsys, flags, line):
    assert hpo.main([*files, *flags]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1 and not Path("runs").exists()


@needs_ray
def test_a_search_is_not_gone_on_with_on_other_data(files, local_ray, capsys):
    argv = [*files, "--name", "a", "--num_samples", "1"]
    assert hpo.main(argv) == 0
    with np.load("data/two.npz") as arrays:
        arrays = dict(arrays)
    np.savez("data/two.npz", **arrays | {"train_images": arrays["train_images"] + 1})
    capsys.readouterr()
    assert hpo.main([*argv, "--resume"]) == 2
    assert "was run with data" in capsys.readouterr().err


@needs_ray
def test_a_trial_that_cannot_be_trained_scores_nothing_and_the_search_goes_on(files, local_ray, capsys):
    Path("small.yaml").write_text(HYPER + "search: {lr: {choice: [1e30]}}\n")
    argv = [*files, "--name", "wild", "--num_samples", "1"]
    assert hpo.main(argv) == 2
    out, err = capsys.readouterr()
    assert "no trial could be trained" in err and "the training loss is" in err and err.count("\n") == 1
    assert not Path("config").exists() and len(Path("runs/wild/trials.csv").read_text().splitlines()) == 2


@needs_ray
def test_a_killed_search_goes_on(files):
    command = [sys.executable, str(ROOT / "hpo.py"), *files, "--name", "killed", "--num_samples", "5",
               "--max_concurrent", "1"]
    environment = os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "0.1"}  # Tune's own pace is ten seconds
    trials = Path("runs/killed/trials")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        # At the third, so that on a busy machine too Tune has noted that the first is done.
        while len(list(trials.glob("trial_*/result.json"))) < 3 and time.monotonic() < until:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = {path.parent.name: path.read_text() for path in trials.glob("trial_*/result.json")}
    assert 3 <= len(before) < 5 and not Path("config").exists()
    subprocess.run([*command, "--resume"], env=environment, check=True, stdout=subprocess.DEVNULL)
    with open("runs/killed/trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 == len({row["trial"] for row in rows}) and Path("config/hyperparam/killed.yaml").exists()
    kept = [name for name, text in before.items() if (trials / name / "result.json").read_text() == text]
    assert len(kept) >= 1  # the trials that were done are not made again


def test_the_best_settings_are_for_the_epochs_of_the_search(files):
    settings, search = read_search("hpo.py", [*files, "--epochs", "3"])
    hpo.write_best(Path("best.yaml"), search.hp_file, settings.epochs, {"lr": 0.5, "batch": 4}, ["Found by: a\ntest"])
    assert load_yaml("best.yaml") == {"model": "conv", "batch": 4, "lr": 0.5, "l2_reg": 1e-5, "dropout": 0, "epochs": 3,
                                      "augment": False}
    assert Path("best.yaml").read_text().startswith("# Found by: a test\n")
