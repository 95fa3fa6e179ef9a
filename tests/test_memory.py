"""Where memory ends: the line names what was too large; rows that nobody wants are never in memory."""
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datasets import memory
from datasets.build_dataset import build_dataset, hold_out, load_whole
from datasets.data import DataError, TaskData
from datasets.memory import allocate
from datasets.npz import CHUNK, load_npz
from tests.commands import numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from utils import run, run_net
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
            "if status: sys.exit(status)")


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
        allocate((10**15, 3, 1000), "x", ".")


def without_memory(monkeypatch, free=0):
    monkeypatch.setattr(memory, "free_memory", lambda: free)


def test_what_takes_too_much_of_the_free_memory_is_mapped_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    """Three quarters of 400 bytes are free for it: 300 stay in memory, 303 do not."""
    without_memory(monkeypatch, 400)
    allocate((100, 3), "x", tmp_path)
    assert capsys.readouterr().err == ""
    images = allocate((101, 3), "a.npz: 101 of 101 images", tmp_path)
    line = f"a.npz: 101 of 101 images of 3 take 0.0 GB, and 0.0 GB of memory are free: kept in a file below {tmp_path}"
    assert capsys.readouterr().err.startswith(line) and not list(tmp_path.iterdir())
    images.copy_(torch.arange(303).view(101, 3))
    rows = torch.tensor([100, 0, 0, 7])
    assert images[rows].tolist() == [[44, 45, 46], [0, 1, 2], [0, 1, 2], [21, 22, 23]]  # modulo 256
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert [line for line in maps if str(tmp_path) in line and "(deleted)" in line and " rw-s " in line]


def test_images_that_take_more_than_half_of_a_gpu_are_said_to_stay_on_the_host(workspace, monkeypatch, capsys):
    """20 + 10 rows of three tasks, of 24 x 24 pixels of a byte, have room in twice as much memory."""
    whole = start(workspace, "a", "--continual")
    pixels = 90 * 24 * 24
    for free, line in ((2 * pixels, False), (2 * pixels - 1, True)):
        monkeypatch.setattr(run, "free_gpu_memory", lambda device, free=free: free)
        capsys.readouterr()
        assert numbers(start(workspace, f"b{line}", "--continual")) == numbers(whole)
        assert ("they stay in the machine's memory" in capsys.readouterr().out.replace("\n", " ")) == line


def test_rows_held_out_of_images_larger_than_memory_are_mapped_too(tmp_path, monkeypatch, capsys):
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    train = TaskData(images, torch.arange(40) % 2, (0, 20, 40), (2, 2), flip=False)
    expected = hold_out(train, 0.3)
    without_memory(monkeypatch)
    for part, as_before, n in zip(hold_out(train, 0.3, tmp_path), expected, (28, 12), strict=True):
        assert part.images.equal(as_before.images) and len(part.images) == n and part.starts == as_before.starts
    err = capsys.readouterr().err
    assert err.count("\n") == err.count(f"kept in a file below {tmp_path}") == 2


def test_a_disk_without_room_is_no_place(tmp_path, monkeypatch, capsys):
    """Else the folder of temporary files, else memory, else one line."""
    without_memory(monkeypatch)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    allocate((10, 3), "x", tmp_path / "gone")
    assert f"below {tmp_path / 'tmp'} while" in capsys.readouterr().err
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert allocate((10, 3), "x", tmp_path).shape == (10, 3) and capsys.readouterr().err == ""
    with pytest.raises(DataError, match="x of 3 take 3000000.0 GB, more than there is memory for"):
        allocate((10**15, 3), "x", tmp_path)


@pytest.mark.parametrize("files, free", [
    ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 2\nactive_file 300\ninactive_file 50"}, 450),
    ({"memory.max": "max", "memory.current": "900", "memory.stat": "active_file 0\ninactive_file 0"}, math.inf),
    ({"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "800",
      "memory.stat": "active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 4"}, 234),
    ({}, math.inf),
])
def test_free_memory_of_a_control_group(tmp_path, files, free):
    """The limit less what is used, but for cached files, which give way."""
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert memory._free_in_group(tmp_path) == free


def test_free_memory_is_the_least_of_all_limits():
    machine = memory.free_memory()
    assert 10**7 < machine < 10**14
    code = ("import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 * 10**9, 3 * 10**9))\n"
            "from datasets.memory import free_memory; print(free_memory())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < min(3 * 10**9, machine + 10**9)


def test_a_run_on_mapped_images_ends_in_the_same_numbers(workspace, monkeypatch, capsys):
    """Of an npz file and of a folder: every image, the learners' logits, the checksum and the metrics."""
    import modelzoo
    from utils.command import command

    for split in ("train", "test"):
        for c in range(6):
            (workspace / "data/pets" / split / str(c)).mkdir(parents=True)
            for j in range(4):
                image = Image.new("RGB", (30, 20), (40 * c, 9 * j, 7))
                image.save(workspace / "data/pets" / split / str(c) / f"{j}.png")
    folder = {"dataset": "image_folder", "path": "pets", "size": 24, "tasks": [["0", "1"], ["2", "3"], ["4", "5"]]}
    write_yaml(workspace / "pets.yaml", folder)
    for config in ("data.yaml", "pets.yaml"):
        words = flags(workspace, "--continual", "--device", "cpu", "--data_config", str(workspace / config))
        for name, free in (("memory", 10**12), ("mapped", 0)):
            without_memory(monkeypatch, free)
            assert command("x", "modelzoo", modelzoo.run, [*words, "--name", f"{config}-{name}"]) == 0
            assert capsys.readouterr().err.count("kept in a file below") == (2 if name == "mapped" else 0)
        a, b = (workspace / "runs" / f"{config}-{name}" for name in ("memory", "mapped"))
        a_settings, b_settings = (yaml.safe_load((run / "config.yaml").read_text())["settings"] for run in (a, b))
        assert a_settings["data"] == b_settings["data"]
        a_result, b_result = (json.loads((run / "result.json").read_text()) for run in (a, b))
        assert a_result["accuracy_matrix"] == b_result["accuracy_matrix"]
        for k in range(3):
            learners = [torch.load(run / f"learners/{k:03}.pt", weights_only=True) for run in (a, b)]
            for key in ("train_logits", "test_logits"):
                assert all(x.equal(y) for x, y in zip(*(learner[key] for learner in learners), strict=True))


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 5.72 GiB for an array"), torch.OutOfMemoryError("Tried to allocate 5.72 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5.72 GiB"),
])
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
                 for loaded in (None, whole)]
        for a, b in zip(*pairs, strict=True):
            assert a.images.equal(b.images) and a.labels.equal(b.labels)


def test_evaluation_looks_at_no_more_rows_at_once_than_training_can_hold(workspace, monkeypatch):
    import modelzoo
    from utils.command import command

    sizes, run_backbone = {True: [], False: []}, run_net.run_backbone
    monkeypatch.setattr(run_net, "run_backbone", lambda net, images, precision: (
        sizes[net.training].append(len(images)) or run_backbone(net, images, precision)))
    write_yaml(workspace / "hp.yaml", yaml.safe_load((workspace / "hp.yaml").read_text()) | {"batch": 2})
    assert command("x", "modelzoo", modelzoo.run, flags(workspace, "--continual")) == 0
    assert max(sizes[True]) == 2 and max(sizes[False]) == 4


