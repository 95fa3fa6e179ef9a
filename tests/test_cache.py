"""What image folders leave decoded: read again without decoding, by whom and when it is not, and where it lies."""
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from datasets import folder, images
from datasets.build_dataset import build_dataset
from datasets.data import DataError
from datasets.images import Damaged, load_image, read_all
from utils.run_net import make_generator

TASKS = [("ant", "bee"), ("bee", "cat")]


@pytest.fixture
def pets(tmp_path):
    """data/pets/{train,test}/{ant,bee,cat}: 4 and 2 images a class, each of one colour: (80 x class, 10 x image, 7)."""
    for split, n in (("train", 4), ("test", 2)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "data/pets" / split / name).mkdir(parents=True)
            for j in range(n):
                image = Image.new("RGB", (30, 20), (80 * c, 10 * j, 7))
                image.save(tmp_path / "data/pets" / split / name / f"{j}.png")
    return tmp_path / "data/pets"


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, by name below the folder; the list is emptied by its reader."""
    files, decode_image = [], folder.decode_image

    def load(file, shape):
        files.append("/".join(Path(file).parts[-3:]))
        return decode_image(file, shape)

    monkeypatch.setattr(folder, "decode_image", load)
    return files


def build(pets, tasks=TASKS, size=16, samples=None):
    return build_dataset("image_folder", tasks, pets.parent, make_generator(0, 0, "data"), samples, pets.name, size)


def read(pets, decoded, **how):
    """The training pixels [N, 2] (red and green of each image) and how many files were decoded for both splits."""
    train, _ = build(pets, **how)
    assert train.images.is_contiguous() and (train.images[:, 2] == 7).all()
    count = len(decoded)
    decoded.clear()
    return train.images[:, :2, 3, 3].tolist(), count


EXPECTED = [[80 * c, 10 * j] for c in (0, 1, 1, 2) for j in range(4)]  # bee stands in two tasks


def test_the_second_reading_decodes_nothing(pets, decoded):
    before = sorted(pets.rglob("*"))
    assert read(pets, decoded) == (EXPECTED, 3 * 4 + 3 * 2)  # each file once, though bee is read twice
    assert read(pets, decoded) == (EXPECTED, 0)
    assert sorted(pets.rglob("*")) == sorted([*before, pets / ".modelzoo-train-16", pets / ".modelzoo-test-16"])
    assert (pets / ".modelzoo-train-16").read_bytes().partition(b"\n")[2][:3 * 16 * 16:16 * 16] == bytes([0, 0, 7])
    assert read(pets, decoded, size=24) == (EXPECTED, 18) and read(pets, decoded) == (EXPECTED, 0)


def test_a_file_that_is_changed_added_or_removed(pets, decoded):
    read(pets, decoded)
    bee = pets / "train/bee/0.png"
    time = bee.stat().st_mtime_ns
    Image.new("RGB", (30, 20), (99, 88, 7)).save(bee)  # as many bytes
    os.utime(bee, ns=(time, time + 1))
    assert read(pets, decoded) == ([[99, 88] if x == [80, 0] else x for x in EXPECTED], 1)
    shutil.copy(pets / "train/cat/1.png", pets / "train/cat/9.png")
    (pets / "train/ant/0.png").unlink()
    now = [[99, 88] if x == [80, 0] else x for x in EXPECTED[1:]] + [[160, 10]]
    assert read(pets, decoded) == (now, 1) and read(pets, decoded) == (now, 0)
    names = [key[0] for key in json.loads((pets / ".modelzoo-train-16").read_bytes().partition(b"\n")[0])]
    assert len(names) == len(set(names)) == 12 and "ant/0.png" not in names and "cat/9.png" in names
    (pets / "train/bee/0.png").rename(pets / "train/bee/00.png")
    assert read(pets, decoded) == (now, 1)


def test_only_what_is_wanted_is_decoded_and_what_others_decoded_stays(pets, decoded):
    """Two runs of different tasks, and one of few samples, on one folder."""
    assert read(pets, decoded, tasks=[("ant", "bee")], samples=1)[1] == 2 + 4  # all test rows
    assert read(pets, decoded, tasks=[("cat", "bee")])[1] == 4 + 3 + 2
    pixels, count = read(pets, decoded, tasks=[("ant", "bee")])
    assert (pixels, count) == (EXPECTED[:8], 3)
    assert read(pets, decoded) == (EXPECTED, 0)


@pytest.mark.parametrize("content", [
    b"", b"nonsense", b"[]\nmore", b'[["ant/0.png", 1, 2]]\n', b"3\n", b'[[["a"], 1, 2]]\n' + bytes(3 * 16 * 16), None])
def test_a_damaged_cache_is_written_anew(pets, decoded, content):
    read(pets, decoded)
    cache = pets / ".modelzoo-train-16"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-1] if content is None else content)
    assert read(pets, decoded) == (EXPECTED, 12) and cache.read_bytes() == whole


def test_a_place_that_cannot_be_written_costs_a_line(pets, decoded, capsys):
    """Beside the folder; else below --data_dir; else nowhere."""
    for split in ("train", "test"):
        (pets / f".modelzoo-{split}-16").mkdir()  # as good as read-only: no file of this name can be written
    assert read(pets, decoded) == (EXPECTED, 18) and read(pets, decoded) == (EXPECTED, 0)
    below = sorted(p.name for p in pets.parent.iterdir())
    assert below == [".modelzoo-pets-test-16", ".modelzoo-pets-train-16", "pets"]
    assert capsys.readouterr().err == ""
    for name in below[:2]:
        (pets.parent / name).unlink()
        (pets.parent / name).mkdir()
    for _ in range(2):
        assert read(pets, decoded) == (EXPECTED, 18)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and "train: the decoded images cannot be kept for the next run, in " in lines[0]
        assert lines[0].endswith("(Is a directory)")
    assert not list(pets.parent.rglob("*.part"))


def test_a_full_disk_costs_a_line_and_is_not_filled(pets, decoded, capsys, monkeypatch):
    free = 12 * 3 * 16 * 16  # the images would fit, their names do not
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert read(pets, decoded) == (EXPECTED, 18)
    assert "(No space left on device)" in capsys.readouterr().err and not (pets / ".modelzoo-train-16").exists()
    assert (pets / ".modelzoo-test-16").exists()


def test_every_damaged_file_is_counted_and_some_are_named(pets, decoded):
    """And what was decoded is not kept: the next run counts them again."""
    for name in ("ant/1.png", "bee/0.png", "bee/3.png", "cat/0.png", "cat/2.png"):
        (pets / "train" / name).write_bytes(b"\x89PNG")
    with pytest.raises(DataError) as e:
        build(pets)
    line = str(e.value)
    assert line.startswith(f"{pets}/train/ant/1.png: not a readable image (") and "\n" not in line
    named = ", ".join(f"{pets}/train/{name}.png" for name in ("bee/0", "bee/3", "cat/0"))
    assert line.endswith(f"; nor are 4 more: {named}, ...")
    assert len(decoded) == 12 and not list(pets.glob(".modelzoo*"))


def test_read_all_reads_each_once_and_stops_at_other_errors(monkeypatch):
    seen = []
    read_all(seen.append, 100, "x")
    assert sorted(seen) == list(range(100))
    read_all(seen.append, 0, "x")

    def read(i):
        if i in (70, 3):
            raise Damaged(f"{i}.png: broken")

    with pytest.raises(DataError, match="^3.png: broken; nor are 1 more: 70.png$"):
        read_all(read, 100, "x")

    def refuse(i):
        raise DataError("another")

    with pytest.raises(DataError, match="^another$"):
        read_all(refuse, 100, "x")


def test_the_bar_is_for_terminals(pets, monkeypatch, capsys):
    """A terminal is shown how far it is; a log file is not."""
    build(pets)
    assert capsys.readouterr().err == ""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(images, "tqdm", lambda **about: tqdm(**about, file=out, mininterval=0))
    build(pets, size=24)
    assert "train: images: 100%" in out.getvalue() and "12/12" in out.getvalue()


def test_a_cache_that_breaks_while_it_is_read_ends_in_one_line(pets, decoded, monkeypatch):
    read(pets, decoded)
    monkeypatch.setattr(os, "fstat", lambda fd: type("Stat", (), {"st_size": 12 * 768 + size}))
    cache = pets / ".modelzoo-train-16"
    size = len(cache.read_bytes().partition(b"\n")[0]) + 1
    cache.write_bytes(cache.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\.modelzoo-train-16: it ends too early; without it the images are decoded"):
        files = sorted(map(str, (pets / "train").glob("*/*")))
        folder.FolderImages(pets / "train", files, 16, [cache])[torch.arange(12)]


def test_several_threads_read_the_same_and_leave_the_warnings_as_they_were(pets, decoded, monkeypatch):
    """Threads that each set the one filter of the process, and set it back in another order, left it changed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(images, "PART", 1)
    for c in range(3):
        for j in range(4, 40):
            Image.new("RGB", (300, 300), (80 * c, j, 7)).save(pets / "train" / ("ant", "bee", "cat")[c] / f"{j}.png")
    before = list(warnings.filters)
    pixels, count = read(pets, decoded)
    assert count == 3 * 40 + 6 and warnings.filters == before
    order = sorted(range(40), key=str)
    assert pixels == [[80 * c, j if j >= 4 else 10 * j] for c in (0, 1, 1, 2) for j in order]
    assert read(pets, decoded) == (pixels, 0)


def test_what_is_read_from_a_cache_equals_what_was_decoded(tmp_path):
    """Photographs: every pixel random, of several sizes."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in "ab":
            (tmp_path / "p" / split / c).mkdir(parents=True)
            for j in range(9):
                pixels = random.integers(0, 256, (20 + j, 40 - j, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "p" / split / c / f"{j}.jpg")
    first, second = (build(tmp_path / "p", [("b", "a")]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.images.equal(b.images) and a.labels.equal(b.labels)
    slowly = [load_image(tmp_path / f"p/train/{c}/{j}.jpg", (3, 16, 16)) for c in "ba" for j in range(9)]
    assert np.array_equal(second[0].images.permute(0, 2, 3, 1), slowly)
