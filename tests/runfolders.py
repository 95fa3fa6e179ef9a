"""Run folders written by hand, and what report.py says of them."""
import json
import re

import torch

from tools import report
from tools.runs import group_runs, make_ensemble, read_run
from utils.command import guard
from utils.learner import COST, Learner, learner_path, save_learner
from utils.run_folder import save_tensors


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
    }
    config = defaults | config
    if config["continual"]:
        rows = [[x if t <= k else None for t, x in enumerate(row)] for k, row in enumerate(rows)]
    n = config["tasks_per_round"]
    rounds = [{"tasks": [*range(min(n - 1, k)), k] if config["continual"] else list(range(num_tasks)),
               "weights": [0.5 + t for t in range(k)], "train_loss": [], "seconds": 1.0}
              for k in range(len(rows))]
    result = {"method": method, "accuracy_matrix": rows, "accuracy": rows[-1], "rounds": rounds,
              "classes": config["tasks"][:num_tasks], "config": config,
              **dict(zip(COST, cost, strict=True))}
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
    return guard("report.py", lambda: report.main([str(a) for a in arguments]))


def squeeze(text):
    """A table's text without the spaces that set its columns: every cell between single ones."""
    return re.sub(" +", " ", text)


def assert_one_line(capsys, message):
    caught = capsys.readouterr()
    assert caught.out == ""
    assert message in caught.err
    assert caught.err.count("\n") == 1


def read_groups(folders, ensembles=()):
    return group_runs([*map(read_run, folders), *map(make_ensemble, ensembles)])


def make_predictions(folder, probabilities, labels, rounds=(0,)):
    """Add to a run folder of one task a learner a list in `probabilities` ([rows][classes]), and the test labels."""
    (folder / "learners").mkdir()
    for k, rows in zip(rounds, probabilities, strict=True):
        logits = (torch.tensor(rows).log(),)
        save_learner(learner_path(folder, k), Learner((0,), logits, logits, 1.0, 10, 20))
    save_tensors(folder / "test_labels.pt", [torch.tensor(labels)])
    return folder
