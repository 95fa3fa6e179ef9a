"""Small real inputs: a data folder and config files that the commands read."""
import os

import numpy as np
import pytest
import torch
import yaml

# Numbers here are a CPU's; `make test-gpu` sets GPU and runs the tests that are marked so.
if "GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The batches here are too small to share; of runs, and of the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

CONV = {"model": "conv", "batch": 8, "lr": 0.01, "l2_reg": 1e-5, "dropout": 0, "epochs": 2, "schedule": "constant",
        "augment": False}


def make_arrays(classes=6, train=10, test=5, size=24, channels=1, seed=0):
    """The arrays of an npz file whose classes differ in brightness, so that they can be learned."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", train), ("test", test)):
        labels = np.repeat(np.arange(classes), n).astype(np.uint8)
        shape = (len(labels), size, size, channels)
        images = 20 + 200 * labels[:, None, None, None] // classes + random.integers(0, 30, shape)
        order = random.permutation(len(labels))
        arrays[f"{split}_images"] = images.astype(np.uint8)[order]
        arrays[f"{split}_labels"] = labels[order]
    return arrays


@pytest.fixture
def workspace(tmp_path):
    """A folder with data/toy.npz, data.yaml (3 tasks of 2 classes) and hp.yaml; returns its path."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "toy.npz", **make_arrays())
    write_yaml(tmp_path / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]]})
    write_yaml(tmp_path / "hp.yaml", CONV)
    return tmp_path


def write_yaml(path, value):
    path.write_text(yaml.safe_dump(value))


def flags(workspace, *more):
    """A command line for the files of `workspace`."""
    files = {"--data_config": "data.yaml", "--hp_config": "hp.yaml", "--data_dir": "data", "--out": "runs"}
    return [x for flag, file in files.items() for x in (flag, str(workspace / file))] + list(more)
