"""A learner as the zoo knows it, and its files in the run folder."""
import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.data import one_line
from net import MEAN, STD
from net.build_net import build_net
from utils.config_files import ConfigError, load_yaml
from utils.run_folder import LATER, RunError, load_or_set_aside, load_tensors, save_tensors, set_aside

COST = ("seconds", "rows_trained", "parameters")  # of a learner; a run's are the sums over its learners
WARM = -1  # the "round" of the learner that --warm_start trains before the first round


@dataclass(frozen=True)
class Learner:
    """One trained network's word on the tasks that it was trained on.

    Attributes:
        tasks: [n] indices into the config; head i is of task tasks[i].
        train_logits: [n] tensors [N_t, C_t] float32, on the training rows of the task that may still be looked at.
        test_logits: [n] tensors [M_t, C_t] float32, on its test rows.
        seconds: of training and evaluation.
        rows_trained: training rows times epochs; a row that stands several times in an epoch counts as often.
        parameters: of the network with its heads.
        net: what `load_net` makes the network from: with --save_nets of all learners, with --inherit of the last.
    """

    tasks: tuple[int, ...]
    train_logits: tuple[Tensor, ...]
    test_logits: tuple[Tensor, ...]
    seconds: float
    rows_trained: int
    parameters: int
    net: dict | None = None


def learner_path(folder, round):
    """Where a run folder keeps the learner of `round`; -1 is the one of --warm_start."""
    return folder / "learners" / ("warm.pt" if round == WARM else f"{round:03}.pt")


def save_learner(path, learner):
    """Write all that a `Learner` holds; a `RunError` where the disk refuses."""
    logits = {key: [x.cpu() for x in getattr(learner, key)] for key in ("train_logits", "test_logits")}
    rest = {key: getattr(learner, key) for key in (*COST, "net")}
    save_tensors(path, {"tasks": list(learner.tasks), **rest, **logits})


def make_learner(saved, device="cpu"):
    """The `Learner` of what `save_learner` wrote, its logits on `device`.

    Raises:
        KeyError, TypeError, ValueError: it was written by another program.
    """
    logits = (tuple(x.to(device) for x in saved[key]) for key in ("train_logits", "test_logits"))
    return Learner(tuple(saved["tasks"]), *logits, *(saved[key] for key in (*COST, "net")))


def load_learner(path, train, test, tasks, loss_rows, log):
    """Read a learner that an earlier process trained; None where there is none that is whole and of these tasks.

    A file that does not fit is set aside, one that cannot be read is a `RunError`.

    Args:
        path: see `learner_path`.
        train, test: `TaskData` of the run.
        tasks: [n] that it must be of.
        loss_rows: [n] tensors, the rows of `train` on which it must have logits.
        log: the `RunLog`.
    """
    saved = load_or_set_aside(path, log)
    if saved is None:
        return None
    shapes = {"train_logits": [(len(rows), train.classes[t]) for t, rows in zip(tasks, loss_rows, strict=True)],
              "test_logits": [(len(test.rows(t)), test.classes[t]) for t in tasks]}
    try:
        learner = make_learner(saved, train.device)
        found = {key: [tuple(x.shape) for x in getattr(learner, key) if x.dtype == torch.float32] for key in shapes}
        finite = all(torch.isfinite(x).all() for key in shapes for x in getattr(learner, key))
        counted = all(isinstance(getattr(learner, key), (int, float)) for key in COST)
        if learner.tasks == tuple(tasks) and found == shapes and finite and counted:
            return learner
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # a file of another program
    set_aside(path, "not of this run", log)
    return None


def load_checkpoint(path, tasks, epochs, log):
    """What a killed process left of a learner in training: (epochs done, seconds, snapshot), or (0, 0.0, None).

    Args:
        path: of the checkpoint (None: there is none).
        tasks: that the learner trains on; a checkpoint of others is set aside.
        epochs: that it trains for.
        log: the `RunLog`.
    """
    saved = load_or_set_aside(path, log) if path else None
    if saved is None:
        return 0, 0.0, None
    kinds = {"tasks": list, "epoch": int, "seconds": float, "snapshot": dict}
    whole = isinstance(saved, dict) and all(isinstance(saved.get(key), kind) for key, kind in kinds.items())
    if whole and saved["tasks"] == list(tasks) and 0 < saved["epoch"] < epochs:
        return saved["epoch"], saved["seconds"], saved["snapshot"]
    set_aside(path, "not of this run", log)
    return 0, 0.0, None


def save_checkpoint(path, tasks, epochs, seconds, snapshot):
    """Write what `load_checkpoint` reads; a `RunError` where the disk refuses."""
    save_tensors(path, {"tasks": list(tasks), "epoch": epochs, "seconds": seconds, "snapshot": snapshot})


def describe_net(settings, precision, image_shape, classes, net):
    """All that `load_net` needs to make the `MultiHead` `net` again: architecture, normalisation, state dict."""
    return {"model": settings.model, "image_shape": list(image_shape), "classes": list(classes),
            "dropout": settings.dropout, "mean": MEAN, "std": STD, "precision": precision,
            "state": {key: value.cpu() for key, value in net.state_dict().items()}}


def load_net(saved, device):
    """Make the network of a `Learner.net` on `device`, ready to predict: a `MultiHead`.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it was written by another program.
    """
    if (saved["mean"], saved["std"]) != (MEAN, STD):
        raise ValueError(f"its images had mean {saved['mean']} and deviation {saved['std']}, not {MEAN} and {STD}")
    net = build_net(saved["model"], tuple(saved["image_shape"]), saved["classes"], saved["dropout"], seed=0)
    net.load_state_dict(saved["state"])
    return net.to(device, memory_format=torch.channels_last).eval()


def load_backbone(path):
    """The state dict, on the CPU, of the backbone of the learner in the file `path`, which the next one begins with.

    Raises:
        RunError: the file is gone or damaged, or the network is not in it.
    """
    try:
        state = load_tensors(path, "cpu")["net"]["state"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path}: holds no network for the next learner to inherit; take another --name to train all "
                       "again, and --save_nets to keep every network") from e
    return {key.removeprefix("backbone."): x for key, x in state.items() if key.startswith("backbone.")}


def drop_net(path):
    """Take the network out of the learner's file `path`, if it holds one; a `RunError` where the disk refuses."""
    with contextlib.suppress(OSError, ValueError):  # which does not matter here
        saved = load_tensors(path, "cpu")
        if saved["net"] is not None:
            save_tensors(path, saved | {"net": None})


def load_run(folder, device):
    """All that a run folder holds so far of what was learned.

    Args:
        folder: of a run of modelzoo.py, finished or not.
        device: where the tensors go.

    Returns:
        settings: a dict, as in config.yaml, and with class_names, which of older runs are the source labels.
        labels: [T] tensors [M_t], of the test rows of the tasks that the run is over.
        learners: a `Learner` per round, in their order.
        nets: a `MultiHead` for each, or None where the run kept none.

    Raises:
        ConfigError: no run folder, no learner, or a damaged or foreign file; the line names it.
    """
    path = Path(folder) / "config.yaml"
    try:
        about = load_yaml(path)
        settings = LATER | about["settings"]
        settings["class_names"] = about.get("class_names") or [list(map(str, task)) for task in settings["tasks"]]
        first = WARM if settings["warm_start"] else 0
        n = settings["num_rounds"] if settings["continual"] else len(settings["tasks"])
        path = Path(folder) / "test_labels.pt"
        labels = load_tensors(path, device)[:n]
        shapes = [(len(y), len(task)) for y, task in zip(labels, settings["tasks"][:n], strict=True)]
        learners, nets = [], []
        for k in range(first, settings["num_rounds"]):
            path = learner_path(Path(folder), k)
            if not path.exists() and learners:
                if (Path(folder) / "result.json").exists() or learner_path(Path(folder), k + 1).exists():
                    gone = settings["inherit"] and not settings["save_nets"]  # the network that it began with
                    way = "put it back, or train all again" if gone else "--resume trains it again"
                    raise ConfigError(f"{path}: missing, though the run went on; {way}")
                break  # the run is not finished
            learner = make_learner(load_tensors(path, "cpu"), device)
            if [tuple(x.shape) for x in learner.test_logits] != [shapes[t] for t in learner.tasks]:
                raise ValueError("not of the run's test rows")
            learners.append(learner)
            nets.append(learner.net and load_net(learner.net, device))
            if learner.net:
                del learner.net["state"]  # the network has it
        if settings.get("freeze"):
            path = Path(folder) / "frozen.pt"
            frozen = load_tensors(path, "cpu")
            backbone = load_net(frozen, device).backbone
            for learner, net in zip(learners, nets, strict=True):
                if net:
                    net.backbone = backbone
                    learner.net["image_shape"] = frozen["image_shape"]
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except torch.OutOfMemoryError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise ConfigError(f"{path}: damaged or foreign ({one_line(e, 80)})") from e
    return settings, labels, learners, nets
