"""Datasets of torchvision by name: how each constructor is asked, what is kept, every refusal; no download."""
import inspect
import json
import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import modelzoo
from datasets.build_dataset import build_dataset
from datasets.data import DataError
from datasets.npz import load_npz
from datasets.vision import check_options, find_class, load_vision, split_keywords
from tests.conftest import CONV, flags, write_yaml
from utils import command as cli
from utils.config_files import read_dataset
from utils.run import prepare
from utils.run_net import make_generator

REAL = vars(torchvision.datasets)


@pytest.mark.parametrize("name, train, test", [
    *((name, {"train": True}, {"train": False})
      for name in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST", "USPS", "CIFAR10", "CIFAR100")),
    *((name, {"split": "train"}, {"split": "test"})
      for name in ("SVHN", "STL10", "GTSRB", "Flowers102", "Food101", "DTD", "Country211", "FER2013", "PCAM",
                   "RenderedSST2", "StanfordCars", "LFWPeople")),
    *((name, {"split": "trainval"}, {"split": "test"}) for name in ("OxfordIIITPet", "FGVCAircraft")),
    *((name, {"split": "train"}, {"split": "val"}) for name in ("CLEVRClassification", "ImageNet", "Imagenette")),
    ("Places365", {"split": "train-standard"}, {"split": "val"}),
    ("INaturalist", {"version": "2021_train"}, {"version": "2021_valid"}),
])
def test_constructors_are_understood_by_their_signatures(tmp_path, name, train, test):
    """And torchvision's own code takes what they are asked for: it refuses a split that it does not have."""
    make = find_class(name, REAL)
    chosen, others = split_keywords(make)
    assert chosen == (train, test)
    needed = {key: "letters" for key, p in others.items() if p.default is p.empty}
    assert needed == ({"split": "letters"} if name == "EMNIST" else {})
    for choice in chosen:
        inspect.signature(make).bind("root", **choice, **needed)  # no TypeError
        with pytest.raises(Exception) as e:  # nothing is there, and nothing is downloaded
            make(tmp_path, **choice, **needed)
        assert "for argument" not in str(e.value) and not isinstance(e.value, TypeError)


def test_the_keywords_that_a_file_may_set():
    free = {"EMNIST": ["split"], "STL10": ["folds"], "DTD": ["partition"], "FGVCAircraft": ["annotation_level"],
            "OxfordIIITPet": ["target_types"], **dict.fromkeys(("FashionMNIST", "QMNIST", "SVHN", "ImageNet"), [])}
    for name, expected in free.items():
        assert list(split_keywords(REAL[name])[1]) == expected, name


def test_every_class_of_torchvision_is_understood_or_refused_in_one_line():
    usable = set()
    for name, make in REAL.items():
        if inspect.isclass(make):
            try:
                split_keywords(find_class(name, REAL))
                usable.add(name)
            except DataError as e:
                assert name in str(e) and str(e).startswith("name: ") and "\n" not in str(e)
    refused = {"CelebA", "Cityscapes", "CocoDetection", "Flickr8k", "Kitti", "LFWPairs", "LSUN", "MovingMNIST", "SBU",
               "PhotoTour", "VOCDetection", "VOCSegmentation", "WIDERFace", "Kinetics", "UCF101", "EuroSAT", "Omniglot",
               "Caltech101", "SUN397", "SEMEION", "FakeData", "ImageFolder", "Sintel", "Middlebury2014Stereo"}
    assert len(usable) == 27 and not usable & refused and refused <= REAL.keys()


LETTERS = np.array([4, 0, 2, 2, 4, 0])  # of 3 classes in 6, a label of each row
NAMES = ["N/A", "a", "bee", "c", "d"]


def picture(row, size=(24, 24), mode="L"):
    """Whose every pixel is 10 times the row's number."""
    return Image.new(mode, size, 10 * row if mode == "L" else (10 * row, 7, 9))


def rows_of(train):
    return (0, 1, 2, 3) if train else (4, 5, 2)


class Rows:
    mode, sizes = "L", [(24, 24)]
    asked = []

    def begin(self, root, rows, download, **options):
        assert os.path.isabs(root) and download
        self.rows = rows
        self.asked.append(options)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return picture(row, self.sizes[row % len(self.sizes)], self.mode), LETTERS[row]


class Digits(Rows):
    classes = NAMES

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        self.begin(root, rows_of(train), download, train=train)


class Letters(Digits):
    """As EMNIST: the rest goes to the base class."""

    def __init__(self, root, split, **kwargs):
        if split not in ("letters", "digits"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {{'letters'}}.")
        super().__init__(root, **kwargs)
        self.asked[-1]["of"] = split


class Pets(Rows):
    mode, sizes = "RGB", [(30, 20), (20, 40)]

    def __init__(self, root, split="trainval", folds=None, transform=None, target_transform=None, download=False):
        self.begin(root, rows_of(split == "trainval"), download, split=split, folds=folds)


@pytest.fixture
def fakes(monkeypatch):
    """The classes above in the place of torchvision's; a list of what each was asked for."""
    asked = []
    for make in (Digits, Letters, Pets):
        monkeypatch.setattr(make, "asked", asked)
        monkeypatch.setattr(torchvision.datasets, make.__name__, make, raising=False)
    return asked


def pixels(images):
    return images[range(images.shape[0])][:, 0, 0, 0].tolist()


def test_train_and_test_of_a_flag_and_what_the_cache_holds(tmp_path, fakes, monkeypatch):
    """Rows 0-3 train and 4, 5, 2 test, as the class's own order has them; the second reading asks nobody."""
    splits, names = load_vision((("name", "Digits"),), tmp_path)
    assert fakes == [{"train": True}, {"train": False}] and names == NAMES
    assert [pixels(images) for images, _ in splits] == [[0, 10, 20, 30], [40, 50, 20]]
    assert [labels.tolist() for _, labels in splits] == [[4, 0, 2, 2], [4, 0, 2]]
    assert splits[0][0].shape == (4, 1, 24, 24)
    assert [p.name for p in tmp_path.iterdir()] == ["Digits.npz"]
    with np.load(tmp_path / "Digits.npz") as file:
        assert file["train_images"].shape == (4, 24, 24, 1) and file["class_names"].tolist() == NAMES
    monkeypatch.delattr(torchvision.datasets, "Digits")
    again, names = load_vision((("name", "Digits"),), tmp_path)
    assert names == NAMES and [pixels(images) for images, _ in again] == [[0, 10, 20, 30], [40, 50, 20]]
    assert load_npz(tmp_path / "Digits.npz")[1][1].tolist() == [4, 0, 2]  # it is a file of dataset: npz as well
    monkeypatch.undo()
    train, _ = build_dataset("torchvision", [(2, 4)], tmp_path, make_generator(0, 0, "data"),
                             keywords=(("name", "Digits"),))
    assert train.images[:, 0, 0, 0].tolist() == [20, 30, 0] and train.labels.tolist() == [0, 0, 1]
    assert train.class_names == (("bee", "d"),) and train.flip is False


def test_keywords_reach_the_constructor_and_the_name_of_the_cache(tmp_path, fakes):
    load_vision((("name", "Letters"), ("split", "letters")), tmp_path)
    assert fakes == [{"train": True, "of": "letters"}, {"train": False, "of": "letters"}]
    load_vision((("name", "Pets"), ("folds", 3)), tmp_path, 16)
    assert fakes[2:] == [{"split": "trainval", "folds": 3}, {"split": "test", "folds": 3}]
    assert {p.name for p in tmp_path.iterdir()} == {"Letters-split=letters.npz", "Pets-folds=3-size=16.npz"}


def test_images_of_several_sizes_need_one(tmp_path, fakes):
    with pytest.raises(DataError, match=r"Pets: its images differ in size \(30 x 20, 20 x 40\): write size: 64"):
        load_vision((("name", "Pets"),), tmp_path)
    assert not list(tmp_path.iterdir())
    (images, labels), _ = load_vision((("name", "Pets"),), tmp_path, 16)[0]
    assert images.shape == (4, 3, 16, 16) and labels.tolist() == [4, 0, 2, 2]
    assert images[range(4)][:, :, 5, 5].tolist() == [[10 * row, 7, 9] for row in range(4)]


def test_on_a_folder_that_cannot_be_written_the_rows_are_the_same(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    splits, names = load_vision((("name", "Digits"),), tmp_path)
    assert not list(tmp_path.iterdir()) and names == NAMES
    assert [pixels(images) for images, _ in splits] == [[0, 10, 20, 30], [40, 50, 20]]
    assert splits[0][0].is_contiguous() and splits[0][1].dtype == torch.int64


@pytest.mark.parametrize("keywords, message", [
    ((("name", "Digit"),), "name: torchvision.datasets has no class Digit; did you mean Digits.$"),
    ((("name", "fashion_mnist"),), "no class fashion_mnist; did you mean FashionMNIST?"),
    ((("name", "Nonsense"),), "no class Nonsense$"),
    ((("name", "wrap_dataset_for_transforms_v2"),), "no class wrap_dataset_for_transforms_v2"),
    ((("name", "VOCDetection"),), "VOCDetection does not give one label per image|VOCDetection has no test rows"),
    ((("name", "LFWPairs"),), "LFWPairs does not give one label per image"),
    ((("name", "EuroSAT"),), "EuroSAT has no test rows of its own; write yours as an npz file"),
    ((("name", "Letters"),), "split: key is missing; torchvision's Letters needs it"),
    ((("name", "Letters"), ("splits", "letters")), "splits: .*Letters takes no such keyword.* did you mean split?"),
    ((("name", "Digits"), ("sise", 64)), "sise: .* did you mean size. its own are none"),
    ((("name", "Digits"), ("train", True)), "train: torchvision's Digits takes no such keyword"),
    ((("name", "Pets"), ("split", "test")), "split: torchvision's Pets takes no such keyword .*its own are folds"),
    ((("name", "QMNIST"), ("what", "nist")), "what: torchvision's QMNIST takes no such keyword"),
    ((("name", "Letters"), ("split", "letter")), "Letters refuses a keyword .Unknown value 'letter' for argument"),
])
def test_what_is_refused(tmp_path, fakes, keywords, message):
    with pytest.raises(DataError, match=message):
        load_vision(keywords, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_line_names_the_file_and_nothing_is_left(tmp_path, monkeypatch):
    def download(self):
        os.makedirs(self.raw_folder)  # as torchvision does before it finds that nobody answers
        raise RuntimeError("Error downloading\n train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    for root in (tmp_path, tmp_path / "mistyped"):
        with pytest.raises(DataError) as e:
            load_vision((("name", "FashionMNIST"),), root)
        line = str(e.value)
        assert f"no data: looked for {root}/FashionMNIST.npz and for torchvision's files below {root}, and" in line
        assert "the download failed (Error downloading train-images" in line and "\n" not in line
        assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="FER2013.npz .*and torchvision downloads none"):
        load_vision((("name", "FER2013"),), tmp_path)


def write_idx(path, array):
    """An array as the files of MNIST and its likes hold it: two zeros, 8 for uint8, the dimensions, the bytes."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_fashion_mnist_from_torchvisions_own_files(workspace):
    """The real class reads them; a run has its images, labels and names, and leaves the cache."""
    raw, expected = workspace / "data/FashionMNIST/raw", {}
    raw.mkdir(parents=True)
    for split, stem, n in (("train", "train", 40), ("test", "t10k", 20)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{stem}-images-idx3-ubyte", images)
        write_idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(n) % 10)
        expected[split] = images
    write_yaml(workspace / "data.yaml", {"dataset": "torchvision", "name": "FashionMNIST", "tasks": [[9, 0], [3, 4]]})
    for _ in range(2):  # torchvision's files, then the cache
        train, test = build_dataset("torchvision", [(9, 0), (3, 4)], workspace / "data", make_generator(0, 0, "data"),
                                    keywords=(("name", "FashionMNIST"),))
        for data, split in ((train, "train"), (test, "test")):
            rows = [row for label in (9, 0, 3, 4) for row in range(label, len(expected[split]), 10)]
            assert np.array_equal(data.images[:, 0], expected[split][rows])
        assert train.class_names == (("Ankle boot", "T-shirt/top"), ("Dress", "Coat"))
        assert (workspace / "data/FashionMNIST.npz").exists()
    assert cli.command("x", "modelzoo", modelzoo.run, flags(workspace, "--name", "a", "--continual")) == 0
    result = json.loads((workspace / "runs/a/result.json").read_text())
    assert result["class_names"] == [["Ankle boot", "T-shirt/top"], ["Dress", "Coat"]]
    assert result["config"]["keywords"] == [["name", "FashionMNIST"]]
    assert cli.command("x", "modelzoo", modelzoo.run, flags(workspace, "--name", "a", "--continual", "--resume")) == 0


def test_labels_that_are_none_and_damaged_images(tmp_path, fakes, monkeypatch):
    def get(self, i):
        return picture(i), (1, 2)

    monkeypatch.setattr(Digits, "__getitem__", get)
    with pytest.raises(DataError, match="Digits: row 0 .* is not an image with one whole number as its label"):
        load_vision((("name", "Digits"),), tmp_path)
    monkeypatch.setattr(Digits, "__getitem__", lambda self, i: (picture(i), -1))
    with pytest.raises(DataError, match="with one whole number"):
        load_vision((("name", "Digits"),), tmp_path)

    def damaged(self, i):
        if i in (1, 3):
            raise OSError("image file is truncated")
        return picture(i), 0

    monkeypatch.setattr(Digits, "__getitem__", damaged)
    with pytest.raises(DataError, match=r"^Digits, image 1 \(counted from 0\): not a readable image \(image file is "
                                        r"truncated\); nor are 1 more: Digits, image 3 \(counted from 0\)$"):
        load_vision((("name", "Digits"),), tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_in_a_cache_from_elsewhere(tmp_path):
    arrays = {f"{s}_{w}": np.zeros((2, 9, 9) if w == "images" else 2, np.uint8)
              for s in ("train", "test") for w in ("images", "labels")}
    for names, message in ((np.arange(3), r"class_names must be texts \[C\], not int64"),
                           (np.array(["a", "b\x1b[2J"]), "cannot be printed on one line")):
        np.savez(tmp_path / "Digits.npz", **arrays, class_names=names)
        with pytest.raises(DataError, match=message):
            load_vision((("name", "Digits"),), tmp_path)


def check(content, tmp_path):
    write_yaml(tmp_path / "data.yaml", {"dataset": "torchvision", "tasks": [[0, 1]], **content})
    return read_dataset(tmp_path / "data.yaml")


def test_the_dataset_file(tmp_path, workspace, capsys):
    found = check({"name": "EMNIST", "split": "letters", "size": 32, "flip": True}, tmp_path)
    assert found["keywords"] == (("name", "EMNIST"), ("split", "letters"))
    assert (found["size"], found["flip"], found["path"]) == (32, True, None)
    found = check({"name": "DTD", "partition": 2}, tmp_path)
    assert found["keywords"] == (("name", "DTD"), ("partition", 2)) and found["size"] is found["flip"] is None
    write_yaml(workspace / "hp.yaml", CONV)
    for content, message in (
        ({}, "key name is missing"), ({"name": 3}, "name: 3 is not a class of torchvision.datasets"),
        ({"name": "../x"}, "name: '../x' is not a class of"), ({"name": "DTD", "size": "large"}, "not a whole number"),
        ({"name": "DTD", "partition": [1]}, "partition: [1] is not a short text, a number, true or false"),
        ({"name": "DTD", "flip": 1}, "flip: 1 is not true or false"),
        ({"name": "DTDD"}, "name: torchvision.datasets has no class DTDD; did you mean DTD?"),
    ):
        write_yaml(workspace / "data.yaml", {"dataset": "torchvision", "tasks": [[0, 1]], **content})
        assert cli.command("x", "modelzoo", prepare, flags(workspace)) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("written, mirrored", [({}, False), ({"flip": True}, True), ({"flip": False}, False)])
def test_whether_images_are_mirrored_is_the_files_to_say(workspace, written, mirrored):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": [[0, 1]], **written})
    found = read_dataset(workspace / "data.yaml")
    build = build_dataset("npz", [(0, 1)], workspace / "data", make_generator(0, 0, "data"), path="toy.npz",
                          flip=found["flip"])
    assert [data.flip for data in build] == [mirrored] * 2


def test_flip_is_no_key_of_the_datasets_that_have_a_rule(workspace, capsys):
    write_yaml(workspace / "data.yaml", {"dataset": "mnist", "tasks": [[0, 1]], "flip": True})
    assert cli.command("x", "modelzoo", prepare, flags(workspace)) == 2
    assert "unknown key flip" in capsys.readouterr().err


def test_check_options_names_the_nearest():
    with pytest.raises(DataError, match="partion: .*did you mean partition"):
        check_options("DTD", [("partion", 1)], split_keywords(REAL["DTD"])[1])
