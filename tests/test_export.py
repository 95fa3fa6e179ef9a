"""tools/export.py: a zoo that needs torch alone; and whatever `Zoo.predict` is given."""
import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import modelzoo
from datasets.data import DataError
from datasets.images import make_images
from modelzoo import Zoo
from tests.conftest import flags, write_yaml
from tools import export
from utils.command import command, guard

NAMES = ["day", "dusk [early]", "night/夜"]


def train(workspace, *more):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1], [2, 3, 4], [4, 5]],
                                         "names": NAMES})
    words = flags(workspace, "--save_nets", "--name", "a", "--precision", "fp32", "--device", "cpu", *more)
    assert command("x", "modelzoo", modelzoo.run, words) == 0
    return workspace / "runs/a"


def exported(folder, file):
    assert guard("export.py", lambda: export.main([str(folder), "--file", str(file)])) == 0
    return file


@pytest.mark.parametrize("more", [
    ("--continual", "--replay_frac", "0.5"),
    ("--continual", "--replay_frac", "0.5", "--weigh_by_round"),
    ("--num_rounds", "1", "--tasks_per_round", "2"),  # a task that no learner knows
])
def test_torch_alone_runs_an_exported_zoo(workspace, tmp_path, more):
    folder = train(workspace, *more)
    exported(folder, tmp_path / "zoo.pt2")
    images = torch.randint(0, 256, (7, 1, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
files = {"tasks.json": ""}
zoo = torch.export.load("zoo.pt2", extra_files=files).module()
images = torch.load("images.pt")
torch.save([[zoo(images[:n]) for n in (1, 3, 7)], files], "out.pt")
assert not {"modelzoo", "datasets", "net", "utils"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    outputs, files = torch.load(tmp_path / "out.pt")
    classes = [["0", "1"], ["2", "3", "4"], ["4", "5"]]
    tasks = [{"name": name, "classes": task} for name, task in zip(NAMES, classes, strict=True)]
    assert json.loads(files["tasks.json"]) == {"images": ["N", 1, 24, 24], "tasks": tasks}
    zoo = Zoo.load(folder, "cpu")
    for n, found in zip((1, 3, 7), outputs, strict=True):
        assert list(found) == NAMES
        for name in NAMES:
            torch.testing.assert_close(found[name].double(), zoo.predict(images[:n], name), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs ONNX")
def test_onnx(workspace, tmp_path):
    import onnx
    import onnxruntime

    folder = train(workspace, "--continual")
    file = exported(folder, tmp_path / "zoo.onnx")
    session = onnxruntime.InferenceSession(str(file))
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 24, 24)).astype(np.uint8)
    zoo = Zoo.load(folder, "cpu")
    for n in (1, 5):
        for name, found in zip(NAMES, session.run([f"task {x}" for x in NAMES], {"images": images[:n]}), strict=True):
            expected = zoo.predict(torch.from_numpy(images[:n]), name)
            torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=1e-4, atol=1e-5)
    (about,) = (entry.value for entry in onnx.load(file).metadata_props if entry.key == "tasks")
    assert [task["name"] for task in json.loads(about)["tasks"]] == NAMES


def test_what_cannot_be_exported_is_one_line(workspace, tmp_path, capsys, monkeypatch):
    folder = train(workspace, "--num_rounds", "1")
    words = flags(workspace, "--name", "b", "--num_rounds", "1")
    assert command("x", "modelzoo", modelzoo.run, words) == 0
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    capsys.readouterr()
    for run, file, message in (
        (folder, "zoo.pt", "zoo.pt must end in .pt2 or .onnx"), (tmp_path / "none", "zoo.pt2", "cannot be read"),
        (workspace / "runs/b", "zoo.pt2", "kept no networks, or not all; --save_nets keeps them"),
        (folder, "nowhere/zoo.pt2", "--file: there is no folder"),
        (folder, "zoo.onnx", "onnx and onnxscript not installed: pip install onnx onnxscript, or take .pt2"),
    ):
        assert guard("export.py", lambda r=run, f=file: export.main([str(r), "--file", str(tmp_path / f)])) == 2
        out, err = capsys.readouterr()
        assert err.startswith("export.py: ") and err.count("\n") == 1 and message in err and not out
    assert not list(tmp_path.glob("zoo*"))


# -- what people hold in their hands


def test_every_way_to_hold_an_image_gives_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)  # 5 rows of 4
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in pixels]
    for images in (pixels, tensor, list(pixels), tuple(tensor), list(pixels[:, None]), files, list(map(str, files)),
                   pictures, [files[0], pictures[1]], [pixels[0], tensor[1]], np.array(list(map(str, files))),
                   [io.BytesIO(file.read_bytes()) for file in files]):
        assert make_images(images, (3, 5, 4)).equal(tensor)
    for image in (pixels[0], tensor[0], files[0], str(files[0]), pictures[0], pixels[:1]):
        assert make_images(image, (3, 5, 4)).equal(tensor[:1])
    grey = pixels[..., 0]
    for images in (grey, grey[..., None], list(grey), torch.from_numpy(grey)[:, None]):
        assert make_images(images, (1, 5, 4)).equal(torch.from_numpy(grey)[:, None])
    assert make_images(grey[0], (1, 5, 4)).equal(torch.from_numpy(grey)[:1, None])


@pytest.mark.parametrize("images, message", [
    (np.zeros((2, 5, 4, 3)), r"must be uint8 \[N, 5, 4, 3\], as the networks were .*, not float64 \[2, 5, 4, 3\]"),
    (np.zeros((2, 4, 5, 3), np.uint8), r"not uint8 \[2, 4, 5, 3\]"),
    (np.zeros((5, 4), np.uint8), r"not uint8 \[5, 4\]"), (torch.zeros(3, 5, 4), "not float32"),
    (torch.zeros(2, 5, 4, 3, dtype=torch.uint8), r"must be uint8 \[N, 3, 5, 4\]"),
    ([], "the list is empty"), (None, "not of type NoneType"), ({"a": 1}, "not of type dict"), (7, "not of type int"),
    ([np.zeros((2, 5, 4, 3), np.uint8)], "number 0 of the list .* is 2 images, not one"), ([[1]], "not of type list"),
    ("nowhere.png", "nowhere.png: not a readable image"), (b"bytes", "not of type bytes"),
])
def test_anything_else_is_named_in_one_line(images, message):
    with pytest.raises(DataError, match=message) as e:
        make_images(images, (3, 5, 4))
    assert "\n" not in str(e.value) and len(str(e.value)) < 160
