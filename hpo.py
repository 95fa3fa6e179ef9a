"""Search training settings on rows held out of the training set, with Ray Tune: ASHA and Optuna's TPE sampler.

Test rows have no part in it: a trial is given the training rows alone, less a fifth of every class, and is scored on
that fifth.
"""
import contextlib
import csv
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import before_torch  # noqa: F401  # isort: skip
import torch

from datasets.build_dataset import hold_out
from datasets.data import checksum, one_line
from multihead import train_epochs
from utils import metrics
from utils.cluster import connect, share_out
from utils.command import guard, name_batch
from utils.config_files import ConfigError, dump_yaml
from utils.device import choose_device, choose_precision, describe_hardware
from utils.log import RunLog, print_table, say, task_names
from utils.run import place, prepare
from utils.run_folder import RunError, open_folder, write_file
from utils.run_net import derive_seed
from utils.search import read_search

CONFIGS = Path("config/hyperparam")  # where the best settings are written
# When a search is resumed.
MAY_CHANGE = ("address", "cpus_per_trial", "gpus_per_trial", "device", "precision", "hp_file")


def score_epochs(settings, precision, fit, held_out):
    """Train Multi-Head on `fit`; yield its mean accuracy over tasks on `held_out`, in [0, 1], after each epoch.

    Args:
        settings: of the trial.
        precision: fp32, bf16 or fp16.
        fit, held_out: `TaskData` on the training device.
    """
    tasks = range(len(fit.classes))
    rows = [fit.rows(t) for t in tasks]
    for _, values, _ in train_epochs(settings, precision, fit, tasks, rows, 0, val=held_out):
        yield values["val_accuracy"]


def score_rounds(settings, precision, fit, held_out):
    """As `score_epochs`, of a continual zoo: its mean accuracy over the tasks seen, after each round."""
    from modelzoo import grow_zoo  # here alone: multihead and what it imports are all that other searches need

    names = task_names(settings.tasks, settings.names, fit.class_names)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "learners").mkdir()
        for rounds in range(1, settings.num_rounds + 1):
            # A zoo of one round more finds its earlier learners in the folder, as a resumed run does.
            longer = replace(settings, num_rounds=rounds)
            with RunLog(Path(folder), rounds, 0, names=names) as log:
                matrix, _, _ = grow_zoo(longer, precision, fit, held_out, Path(folder), log)
            yield metrics.average_accuracy(matrix)


def trial(chosen, settings, threads, fit, held_out):
    """Train with the settings that the search chose, and report a score after each epoch or round.

    Training that cannot go on (an infinite loss, too little memory) scores 0, which the search learns from.

    Args:
        chosen: dict of settings that take the place of those in `settings`.
        settings: of the trial, but for them.
        threads: CPU cores to compute on.
        fit, held_out: `TaskData` on the CPU, shared by all trials of a node: not to be written to.
    """
    from ray import tune

    torch.set_num_threads(threads)
    settings = replace(settings, **chosen)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    scores = score_epochs if settings.method == "multihead" else score_rounds
    try:
        with name_batch(settings):
            for score in scores(settings, precision, *place(device, fit, held_out)):
                tune.report({"score": score, "note": ""})
    except RunError as e:
        tune.report({"score": 0.0, "note": one_line(e)})


def make_tuner(settings, search, folder, resources, slots, fit, held_out):
    """The Ray `Tuner` of a search: a new one, or the one that an earlier process left in `folder`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    kinds = {"choice": tune.choice, "log": lambda ends: tune.loguniform(*ends), "uniform": lambda e: tune.uniform(*e)}
    space = {key: kinds[how](values) for key, (how, values) in search.space.items()}
    threads = max(1, int(resources["num_cpus"]))
    trainable = tune.with_parameters(trial, settings=settings, threads=threads, fit=fit, held_out=held_out)
    trainable = tune.with_resources(trainable, {"cpu": resources["num_cpus"], "gpu": resources["num_gpus"]})
    path = str((folder / "trials").resolve())
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True, param_space=space)
    length = trial_length(settings)
    scheduler = ASHAScheduler(max_t=length, grace_period=max(1, length // 9), reduction_factor=3)
    sampler = OptunaSearch(seed=derive_seed(settings.seed, 0, "search") % 2**32)  # TPE; it takes 32 bits
    tune_config = tune.TuneConfig(
        metric="score", mode="max", search_alg=sampler, scheduler=scheduler, num_samples=search.num_samples,
        max_concurrent_trials=min(search.max_concurrent or slots, search.num_samples), trial_dirname_creator=trial_name,
        trial_name_creator=trial_name, reuse_actors=True,  # a new process takes seconds to import torch
    )
    run_config = tune.RunConfig(
        name="trials", storage_path=str(folder.resolve()), verbose=int(sys.stdout.isatty()),
        failure_config=tune.FailureConfig(max_failures=3),  # a lost node's trials start again on another
    )
    return tune.Tuner(trainable, tune_config=tune_config, run_config=run_config, param_space=space)


def trial_name(trial):
    """Ray's id of a trial alone: its settings do not fit into a file's name."""
    return f"trial_{trial.trial_id}"


def trial_length(settings):
    """How many scores a trial that is not stopped reports: its epochs, or its zoo's rounds."""
    return settings.epochs if settings.method == "multihead" else settings.num_rounds


def rank(results, length):
    """Trials from the best down: those trained to the end by their score, then those stopped early by theirs.

    Args:
        results: Ray's `ResultGrid`.
        length: see `trial_length`.

    Returns:
        A dict a trial: trial, score (in [0, 1]), length (epochs or rounds), seconds, its settings, note.
    """
    rows = []
    for result in results:
        found = result.metrics or {}
        error = f"{type(result.error).__name__}: {result.error}" if result.error else ""
        rows.append({
            "trial": found.get("trial_id", ""), "score": found.get("score", 0.0),
            "length": found.get("training_iteration", 0), "seconds": found.get("time_total_s", 0.0), **result.config,
            "note": found.get("note") or " ".join(error.split())[-200:],
        })
    return sorted(rows, key=lambda row: (not row["note"], row["length"] == length, row["score"], row["trial"]),
                  reverse=True)


def scores_at_the_end(rows, length):
    """Scores of the trials that were trained to the end; arguments as `rank` gives and takes them.

    Raises:
        RunError: there are none.
    """
    ended = [row["score"] for row in rows if row["length"] == length and not row["note"]]
    if not ended:
        why = next((row["note"] for row in rows if row["note"]), "all were stopped early")
        raise RunError(f"no trial could be trained to the end: {why}")
    return ended


def write_trials(path, rows):
    """Write the trials as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def write_best(path, hp_file, epochs, chosen, lines):
    """Write a hyper-parameter file: that of the search with its best settings, and `lines` at its head."""
    kept = {key: value for key, value in hp_file.items() if key != "search"}
    text = dump_yaml({**kept, "epochs": epochs, **chosen})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, ("".join(f"# {' '.join(line.split())}\n" for line in lines) + text).encode())


def print_trials(rows, settings, search):
    """Print a table of the trials."""
    unit = "epochs" if settings.method == "multihead" else "rounds"
    print_table(["trial", "score %", unit, *search.space, "seconds", "note"], [
        [row["trial"], f"{100 * row['score']:.2f}", str(row["length"]), *(f"{row[key]:.3g}" for key in search.space),
         f"{row['seconds']:.1f}", row["note"]] for row in rows
    ])


def run(settings, search, argv):
    """Search, write the best settings and the trials, and return the trials from the best down, as `rank` does.

    Args:
        settings, search: as `read_search` gives them.
        argv: the command line, for the head of the file.

    Raises:
        ConfigError, DataError: a mistake in settings or data, or no cluster.
        RunError: no trial could be trained to the end.
    """
    train = prepare(replace(settings, device="cpu", precision="fp32"))[2]
    fit, held_out = hold_out(train, folder=settings.data_dir)
    connect(search.address)
    resources, device, slots = share_out("trial", search.cpus_per_trial, search.gpus_per_trial, settings.device)
    if device == "cpu":
        choose_precision(settings.precision, torch.device("cpu"))  # refuses here what would fail in every trial
    folder, best_path = settings.folder, CONFIGS / f"{settings.name}.yaml"
    if best_path.exists() and not folder.exists():
        raise ConfigError(f"{best_path} already exists, and not from a search in {settings.out}; take another --name")
    about = {key: value for key, value in asdict(settings).items() if key not in (*search.space, *MAY_CHANGE)}
    about |= {key: value for key, value in asdict(search).items() if key not in MAY_CHANGE}
    about["data"] = checksum(fit, held_out)
    hardware = describe_hardware(torch.device("cpu"))
    with open_folder(folder, json.loads(json.dumps(about)), settings.resume, {"hardware": hardware}, "trials"):
        tuner = make_tuner(replace(settings, device=device), search, folder, resources, slots, fit, held_out)
        # A trial that a lost node or a killed process left unfinished begins again and reports its first epochs twice.
        warnings.filterwarnings("ignore", "The reported value is ignored because this `step=", UserWarning)
        # Ray's progress is for a terminal; it prints a little of it even where told not to.
        with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(io.StringIO()):
            results = tuner.fit()
        rows = rank(results, trial_length(settings))
        print_trials(rows, settings, search)
        write_trials(folder / "trials.csv", rows)
        ended = scores_at_the_end(rows, trial_length(settings))
        best, median = rows[0], statistics.median(ended)
        chosen = {key: best[key] for key in search.space}
        held = "the fifth of the training rows held out"
        write_best(best_path, search.hp_file, settings.epochs, chosen, [
            f"Found by: python {shlex.join(['hpo.py', *argv])}",
            f"Score: {100 * best['score']:.2f} % on {held} (median of the {len(ended)} of {len(rows)} trials that were "
            f"trained to the end: {100 * median:.2f} %)",
            f"Data: {settings.data_config}, {len(fit.labels)} rows to train on, {len(held_out.labels)} held out",
            f"Date: {datetime.now(UTC):%Y-%m-%d}, in {sum(row['seconds'] for row in rows):.0f} s of trials",
        ])
        say(f"{'best score':>18}  {100 * best['score']:.2f} % on {held}")
        say(f"{'median':>18}  {100 * median:.2f} % of the {len(ended)} trials that were trained to the end")
        for key, value in (*chosen.items(), ("settings", best_path), ("trials", folder / "trials.csv")):
            say(f"{key:>18}  {value}")
        return rows


def main(argv=None):
    """Run the command and return its exit status: 2, after one line, where the user must mend something."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with it an interrupted search looks like a finished one
    argv = sys.argv[1:] if argv is None else argv

    def work():
        run(*read_search("hpo.py", argv), argv)

    return guard("hpo.py", work, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
