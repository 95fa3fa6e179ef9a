"""Whatever stands in a config, a flag or a file: success, or exit status 2 with one line; never a traceback.

FUZZ=10 multiplies the number of cases (make test-fuzz).
"""
import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import modelzoo
from datasets.build_dataset import build_dataset
from datasets.data import DataError
from datasets.folder import visible
from datasets.images import load_image
from datasets.mini_imagenet import load_cache
from datasets.npz import load_npz
from tests.commands import numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from utils import command as cli
from utils.run import prepare
from utils.run_net import make_generator

TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(cases):
    """`cases` examples, the same ones every time, however slow the machine."""
    return settings(max_examples=cases * TIMES, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place():
    """A workspace that the cases of this module share."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        np.savez(folder / "data" / "toy.npz", **make_arrays())
        write_yaml(folder / "data.yaml", DATA)
        write_yaml(folder / "hp.yaml", CONV)
        yield folder


def attempt(argv, method="modelzoo"):
    """Read settings and data as a run does, up to the first thing it would write: it works, or ends in one line."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.command("x.py", method, prepare, argv)
        except SystemExit as e:  # -h
            code = e.code
    text = err.getvalue()
    one_line = text.startswith("x.py: ") and text.count("\n") == 1
    assert (code == 0 and text == "") or (code == 2 and one_line), (code, text)
    assert len(text) < 1000
    return code


DATA = {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3], [4, 5]]}
WORDS = st.sampled_from([
    "dataset", "tasks", "names", "path", "size", "model", "batch", "lr", "l2_reg", "dropout", "epochs", "schedule",
    "augment", "mnist", "npz", "image_folder", "rotated_digits", "digits", "toy.npz", "../data.yaml", "/etc/passwd", "",
    ".", "conv", "wrn16_4", "cosine", "constant", "\x00", "é", "a\nb", "1e-5", "nan"])
NUMBERS = st.one_of(st.integers(-3, 12), st.integers(), st.floats(), st.sampled_from([10**30, 10**400, -(10**400)]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=5), st.dates(), st.binary(max_size=4))
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(WORDS, x, max_size=3), max_leaves=8)


@st.composite
def mutated(draw, valid):
    """A valid config with one to three keys removed, added or given another value, at any depth of its lists."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["remove", "replace", "replace", "deep", "add"]))
        key = draw(st.sampled_from(sorted(value) or ["dataset"]))
        if kind == "remove":
            value.pop(key, None)
        elif kind == "replace":
            value[key] = draw(VALUES)
        elif kind == "add":
            value[draw(WORDS)] = draw(VALUES)
        elif isinstance(value.get("tasks"), list) and value["tasks"]:
            inside = value["tasks"][draw(st.integers(0, len(value["tasks"]) - 1))]
            if isinstance(inside, list) and inside:
                inside[draw(st.integers(0, len(inside) - 1))] = draw(VALUES)
    return value


@fuzz(450)
@given(content=mutated(DATA))
def test_dataset_files(place, content):
    (place / "fuzz.yaml").write_text(yaml.safe_dump(content), errors="replace")
    attempt([*flags(place), "--data_config", str(place / "fuzz.yaml")])


@fuzz(450)
@given(content=mutated(CONV))
def test_hyperparameter_files(place, content):
    (place / "fuzz.yaml").write_text(yaml.safe_dump(content), errors="replace")
    attempt([*flags(place), "--hp_config", str(place / "fuzz.yaml")])


YAML_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="[]{}:-,&*!|>#%@`'\" \n\tab01<=.", max_size=60),
    st.lists(st.sampled_from(["dataset: npz\n", "tasks:\n", "  - [0, 1]\n", "- a\n", "&a ", "*a", "<<: *a\n", "? ",
                              "!!set ", "!!python/object:os.system ", "!!binary x", "---\n", "...\n", "path: ", "{",
                              "}"]),
             max_size=8).map("".join),
)


@fuzz(300)
@given(text=YAML_TEXT, raw=st.binary(max_size=3))
def test_any_text_as_a_config(place, text, raw):
    (place / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass") + raw)
    attempt([*flags(place), "--data_config", str(place / "fuzz.yaml")])
    attempt([*flags(place), "--hp_config", str(place / "fuzz.yaml")])


FLAG = st.sampled_from([
    "--samples", "--epochs", "--seed", "--data_dir", "--out", "--name", "--device", "--precision", "--continual",
    "--num_rounds", "--tasks_per_round", "--replay_frac", "--naive", "--warm_start", "--resume", "--save_nets",
    "--extend", "--weigh_by_round",
    "--naiv", "-x", "--", "-h", "--data_config", "--hp_config"])
ARGUMENT = st.one_of(st.integers(-2, 9).map(str), st.floats().map(str), st.text(max_size=6), st.sampled_from([
    "cpu", "auto", "cuda:7", "bf16", "fp16", "0.5", "1e999", "9" * 5000, "..", "a/b", "\x00", "-", "=", "١",
]))


@fuzz(350)
@given(more=st.lists(st.tuples(FLAG, st.lists(ARGUMENT, max_size=2)), max_size=4), multi=st.booleans())
def test_flags(place, more, multi):
    words = [word for flag, arguments in more for word in (flag, *arguments)]
    attempt([*flags(place), *words], "multihead" if multi else "modelzoo")


@st.composite
def damaged(draw, whole):
    """Bytes with a few flipped, cut off, doubled or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "double", "insert"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at : at + 50]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


def npz_bytes(compressed):
    buffer = io.BytesIO()
    arrays = make_arrays(classes=2, train=2, test=1, size=3)
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@fuzz(300)
@given(data=st.one_of(damaged(npz_bytes(False)), damaged(npz_bytes(True)), st.binary(max_size=40)))
def test_npz_files(place, data):
    (place / "fuzz.npz").write_bytes(data)
    try:
        splits = [(images[range(len(images))], labels) for images, labels in load_npz(place / "fuzz.npz")]
    except DataError as e:
        assert "\n" not in str(e)
        return
    # Read after all: then it is whole, because every array carries a checksum.
    expected = make_arrays(classes=2, train=2, test=1, size=3)
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        assert images.equal(torch.from_numpy(expected[f"{split}_images"]).permute(0, 3, 1, 2))
        assert labels.tolist() == expected[f"{split}_labels"].tolist()


def cache_bytes(protocol):
    images = np.arange(2 * 84 * 84 * 3, dtype=np.uint8).reshape(2, 84, 84, 3)
    return pickle.dumps({"class_dict": {"n1": [0, 1]}, "image_data": images}, protocol=protocol)


@st.composite
def damaged_pickles(draw):
    """Damage where it matters: in the opcodes before and after the pixels."""
    whole = cache_bytes(draw(st.sampled_from([2, 3, 4])))
    head, tail = whole[:300], whole[-120:]
    if draw(st.booleans()):
        head = draw(damaged(head))
    else:
        tail = draw(damaged(tail))
    return head + whole[300:-120] + tail


@fuzz(250)
@given(data=st.one_of(damaged_pickles(), st.binary(max_size=40)))
def test_pickles(place, data):
    (place / "fuzz.pkl").write_bytes(data)
    try:
        classes = load_cache(place / "fuzz.pkl", 1)
    except DataError as e:
        assert "\n" not in str(e)
        return
    (images,) = classes.values()
    assert images.shape[1:] == (84, 84, 3) and images.dtype == np.uint8


CALLS = st.sampled_from(["os system", "builtins eval", "builtins exec", "subprocess Popen", "numpy load",
                         "numpy.core os", "numpy fromfile", "builtins getattr", "torch load",
                         "_codecs open", "importlib import_module"])


@fuzz(60)
@given(call=CALLS, protocol=st.sampled_from([0, 4]))
def test_pickles_that_name_code(place, call, protocol):
    module, name = call.split()
    if protocol == 0:
        data = f"c{module}\n{name}\n(S'touch {place / 'executed'}'\ntR.".encode()
    else:
        words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
        data = b"\x80\x04" + words + b"\x93\x8c\x01x\x85R."
    (place / "fuzz.pkl").write_bytes(data)
    with pytest.raises(DataError, match="asks for"):
        load_cache(place / "fuzz.pkl", 1)
    assert not (place / "executed").exists()


def image_bytes(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(buffer, kind)
    return buffer.getvalue()


@fuzz(150)
@given(data=st.one_of(*(damaged(image_bytes(kind)) for kind in ("PNG", "JPEG", "GIF", "BMP")), st.binary(max_size=30)),
       label=st.one_of(st.integers(0, 4), st.text(max_size=3)))
def test_image_folders(place, data, label):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (place / "pets" / split / name).mkdir(parents=True, exist_ok=True)
            (place / "pets" / split / name / "0.png").write_bytes(image_bytes("PNG"))
    (place / "pets/train/a/1.png").write_bytes(data)
    write_yaml(place / "fuzz.yaml", {"dataset": "image_folder", "path": "pets", "size": 24, "tasks": [[0, label]]})
    attempt([*flags(place), "--data_config", str(place / "fuzz.yaml")])


@st.composite
def pictures(draw):
    """The bytes of an image file of any kind, half of them damaged."""
    kind, mode = draw(st.sampled_from([
        ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "L"), ("PNG", "1"), ("PNG", "I;16"),
        ("TIFF", "CMYK"), ("TIFF", "I;16"), ("TIFF", "F"), ("TIFF", "RGBA"), ("WEBP", "RGBA"), ("GIF", "P"),
        ("JPEG", "CMYK"), ("JPEG", "L"), ("BMP", "RGB")]))
    image = Image.new("I" if mode == "I;16" else mode, (draw(st.integers(1, 40)), draw(st.integers(1, 40))))
    if mode == "I;16":
        image = Image.fromarray(np.full(image.size[::-1], 5000, np.uint16))
    exif, more = Image.Exif(), {}
    exif[0x0112] = draw(st.integers(0, 9))
    if kind in ("PNG", "TIFF", "WEBP", "JPEG"):
        more["exif"] = draw(st.sampled_from([exif.tobytes(), b"Exif\0\0" + draw(st.binary(max_size=20))]))
        more["icc_profile"] = draw(st.sampled_from([None, draw(st.binary(max_size=200)), PROFILE]))
    if mode == "P":
        image.putpalette(draw(st.binary(min_size=3, max_size=30).map(lambda b: b[: len(b) // 3 * 3])))
        more["transparency"] = draw(st.integers(0, 3))
    buffer = io.BytesIO()
    with contextlib.suppress(Exception):  # Pillow does not write all of these
        image.save(buffer, kind, **{key: value for key, value in more.items() if value is not None})
    data = buffer.getvalue()
    return draw(damaged(data)) if data and draw(st.booleans()) else data


PROFILE = (Path(__file__).parent / "linear.icc").read_bytes()


@fuzz(300)
@given(data=pictures(), channels=st.sampled_from([1, 3]))
def test_image_files(data, channels):
    try:
        assert load_image(io.BytesIO(data), (channels, 5, 4)).shape == (5, 4, channels)
    except DataError as e:
        assert "\n" not in str(e)


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 200)


@fuzz(100)
@given(name=NAMES, form=st.sampled_from(["NFC", "NFD"]))
def test_class_names(place, name, form):
    """A folder that is called so is found by the name in any form, and stands under it as people see it."""
    seen = visible(name)
    assert visible(seen) == seen == visible(unicodedata.normalize(form, name))
    with tempfile.TemporaryDirectory(dir=place) as root:
        for split in ("train", "test"):
            for folder in ("zz", name):
                (Path(root) / split / folder).mkdir(parents=True, exist_ok=True)
                (Path(root) / split / folder / "0.png").write_bytes(image_bytes("PNG"))
        try:
            data = build_dataset("image_folder", [("zz", unicodedata.normalize(form, name))], place,
                                 make_generator(0, 0, "data"), path=Path(root).name, size=24)
        except DataError as e:
            assert seen in ("", "zz") and "\n" not in str(e)
        else:
            assert data[0].class_names == (("zz", seen),) and len(data[0].labels) == 2


@pytest.fixture(scope="module")
def finished(place):
    """A finished run and its numbers."""
    whole = start(place, "whole", "--continual", "--epochs", "1")
    return numbers(whole)


@fuzz(60)
@given(draw=st.data(), k=st.integers(0, 2))
def test_learner_files_cut_or_flipped_anywhere(place, finished, draw, k):
    """The whole command: a damaged learner is found, set aside and trained again, to the same result."""
    shutil.rmtree(place / "runs/copy", ignore_errors=True)
    shutil.copytree(place / "runs/whole", place / "runs/copy")
    file = place / f"runs/copy/learners/00{k}.pt"
    file.write_bytes(draw.draw(damaged(file.read_bytes())))
    with contextlib.redirect_stdout(io.StringIO()):
        assert numbers(start(place, "copy", "--continual", "--epochs", "1", "--resume")) == finished


@fuzz(40)
@given(content=mutated(DATA), hyper=mutated(CONV), continual=st.booleans())
def test_whole_runs(place, content, hyper, continual):
    """To the end, where reading alone cannot tell: what is accepted also trains."""
    (place / "fuzz.yaml").write_text(yaml.safe_dump(content), errors="replace")
    (place / "fuzz_hp.yaml").write_text(yaml.safe_dump(hyper), errors="replace")
    argv = [*flags(place), "--data_config", str(place / "fuzz.yaml"), "--hp_config", str(place / "fuzz_hp.yaml"),
            "--epochs", "1", "--samples", "2", "--num_rounds", "1", "--name", "fuzz"] + ["--continual"] * continual
    shutil.rmtree(place / "runs/fuzz", ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = cli.command("x.py", "modelzoo", modelzoo.run, argv)
    assert code in (0, 2) and err.getvalue().count("\n") == (code == 2)
    assert (place / "runs/fuzz/result.json").exists() == (code == 0)
