"""Where memory ends: the line names what was too large; rows that nobody wants are never in memory."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from datasets.build_dataset import build_dataset, load_whole
from datasets.data import DataError, allocate
from datasets.npz import CHUNK, load_npz
from tests.conftest import CONV, flags, make_arrays, write_yaml
from utils import run_net
from utils.run_folder import RunError, naming_memory
from utils.run_net import make_generator

ROOT = Path(__file__).parent.parent
ROWS = 40_000  # of 64 x 64 x 3: 0.5 GB


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Zeros, 0.5 GB in memory and half a MB on disk, of 100 classes; 4 small images for testing."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "data").mkdir()
    with zipfile.ZipFile(folder / "data/large.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for split, rows in (("train", ROWS), ("test", 200)):
            with file.open(f"{split}_images.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 64, 64, 3)}
                np.lib.format.write_array_header_1_0(stream, header)
                for _ in range(rows // 200):
                    stream.write(bytes(200 * 64 * 64 * 3))
            with file.open(f"{split}_labels.npy", "w") as stream:
                np.lib.format.write_array(stream, np.arange(rows) % 100)
    tasks = [[0, 1], [2, 3]]
    write_yaml(folder / "data.yaml", {"dataset": "npz", "path": "large.npz", "tasks": tasks})
    every = [list(range(50)), list(range(50, 100))]
    write_yaml(folder / "every.yaml", {"dataset": "npz", "path": "large.npz", "tasks": every})
    write_yaml(folder / "hp.yaml", CONV | {"epochs": 1})
    return folder


def peak(code, limit=None):
    """Run code in a process of its own, of `limit` bytes at most; its exit status, errors, largest size in bytes."""
    code = ("import resource\n" + f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n" * bool(limit) + code +
            "\nprint([x.split()[1] for x in open('/proc/self/status') if x.startswith('VmPeak')][0])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) * 1024 if done.returncode == 0 else None


def load(large, config, samples):
    words = flags(large, *(["--samples", str(samples)] if samples else []))
    words[1] = str(large / config)
    return ("import sys\nfrom utils.command import command\nfrom utils.run import prepare\n"
            f"status = command('modelzoo.py', 'modelzoo', prepare, {words!r})\n"
            "if status: sys.exit(status)")  # fmt: skip


@pytest.fixture(scope="module")
def base(large):
    """What a process takes before it has loaded anything large."""
    return peak(load(large, "data.yaml", 1))[2]


def test_rows_that_no_task_or_samples_wants_are_not_kept(large, base):
    """0.5 GB of images: 4 of 100 classes, or 5 rows a class, take little of it."""
    for config, samples in (("data.yaml", None), ("every.yaml", 5)):
        status, err, size = peak(load(large, config, samples), base + 100_000_000)
        assert status == 0, err


def test_what_is_wanted_takes_its_size_and_not_twice(large, base):
    status, err, _ = peak(load(large, "every.yaml", None), base + int(1.25 * ROWS * 64 * 64 * 3))
    assert status == 0, err


@pytest.mark.parametrize("room", [0.2, 0.9])
def test_images_that_do_not_fit_are_named_with_their_size(large, base, room):
    status, err, _ = peak(load(large, "every.yaml", None), base + int(room * ROWS * 64 * 64 * 3))
    assert status == 2 and err.count("\n") == 1, err
    assert "large.npz: 40,000 of 40,000 train_images of 3 x 64 x 64 take 0.5 GB, more than there is memory for" in err
    assert "try --samples, fewer tasks or smaller images" in err


def test_whatever_the_limit_it_works_or_ends_in_one_line(large, base):
    """Limits at random (FUZZ=10: ten times as many): between what a process needs and all that it wants."""
    whole = ROWS * 64 * 64 * 3
    for room in np.random.default_rng(0).uniform(0, 1.3 * whole, 4 * int(os.environ.get("FUZZ", "1"))):
        status, err, _ = peak(load(large, "every.yaml", None), base + int(room))
        assert status in (0, 2) and err.count("\n") == (status == 2) and (status == 0 or room < 1.25 * whole), err


def test_a_tensor_that_no_machine_holds():
    with pytest.raises(DataError, match="x of 3 x 1000 take 3000000000.0 GB, more than there is memory for"):
        allocate((10**15, 3, 1000), "x")


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 5.72 GiB for an array"), torch.OutOfMemoryError("Tried to allocate 5.72 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5.72 GiB"),
])  # fmt: skip
def test_every_allocator_is_understood(error):
    with pytest.raises(RunError, match=r"too large \(5.72 GiB were asked for\)"), naming_memory("too large"):
        raise error
    with pytest.raises(RunError, match="^too large$"), naming_memory("too large"):
        raise type(error)("can't allocate memory")
    with pytest.raises(RuntimeError, match="another"), naming_memory("too large"):
        raise RuntimeError("another")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_read_one_by_one_are_those_of_the_array(tmp_path, order, save):
    """In any order, twice, over several chunks, and in the order of a Fortran array."""
    arrays = make_arrays(classes=3, train=CHUNK, test=1, size=3, channels=3)
    save(tmp_path / "a.npz", **arrays | {"train_images": np.asarray(arrays["train_images"], order=order)})
    (images, _), _ = load_npz(tmp_path / "a.npz")
    rows = torch.randint(0, 3 * CHUNK, (500,), generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2)
    assert images[rows].equal(expected[rows]) and images[rows[:0]].shape == (0, 3, 3, 3)
    assert images.shape == (3 * CHUNK, 3, 3, 3)


def test_what_a_cluster_shares_has_the_rows_that_a_run_would_read(workspace):
    tasks = ((4, 1), (1, 5))
    data = ("npz", tasks, workspace / "data", "toy.npz")
    whole = load_whole(*data)
    assert isinstance(whole[0][0][0], torch.Tensor) and len(whole[0][0][0]) == 30
    for samples in (None, 3):
        pairs = [build_dataset(*data[:3], make_generator(0, 0, "data"), samples, data[3], loaded=loaded)
                 for loaded in (None, whole)]  # fmt: skip
        for a, b in zip(*pairs, strict=True):
            assert a.images.equal(b.images) and a.labels.equal(b.labels)


def test_evaluation_looks_at_no_more_rows_at_once_than_training_can_hold(workspace, monkeypatch):
    import modelzoo
    from utils.command import command

    sizes, run_backbone = {True: [], False: []}, run_net.run_backbone
    monkeypatch.setattr(run_net, "run_backbone", lambda net, images, precision: (
        sizes[net.training].append(len(images)) or run_backbone(net, images, precision)))  # fmt: skip
    write_yaml(workspace / "hp.yaml", yaml.safe_load((workspace / "hp.yaml").read_text()) | {"batch": 2})
    assert command("x", "modelzoo", modelzoo.run, flags(workspace, "--continual")) == 0
    assert max(sizes[True]) == 2 and max(sizes[False]) == 4


