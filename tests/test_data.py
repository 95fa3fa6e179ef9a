"""Tasks, transformations, loaders, and what they refuse."""
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image

from datasets import mini_imagenet
from datasets.build_dataset import build_dataset
from datasets.cifar import load_cifar100
from datasets.data import DataError, make_tasks
from datasets.digits import load_digits
from datasets.images import load_image
from datasets.modmnist import modify, permute, rotate
from datasets.npz import load_npz, load_val
from tests.conftest import CONV, make_arrays, write_yaml
from utils import command as cli
from utils.run import prepare


def numbered(labels):
    """One-pixel images that hold their row number."""
    return torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_make_tasks_sorts_and_relabels():
    labels = torch.tensor([7, 3, 5, 3, 7, 9])
    data = make_tasks(numbered(labels), labels, [(3, 7), (9, 3, 5)], flip=True)
    assert data.images.flatten().tolist() == [1, 3, 0, 4, 5, 1, 3, 2]
    assert data.labels.tolist() == [0, 0, 1, 1, 0, 1, 1, 2]
    assert data.starts == (0, 4, 8) and data.classes == (2, 3) and data.flip
    assert data.rows(1).tolist() == [4, 5, 6, 7]


def test_samples_are_per_class_fixed_by_the_seed_and_shared_by_tasks():
    labels = torch.tensor([0, 1, 2] * 20)
    make = [make_tasks(numbered(labels), labels, [(0, 1), (1, 2)], False, 5, None, generator(s)) for s in (0, 0, 1)]
    assert make[0].labels.tolist() == ([0] * 5 + [1] * 5) * 2
    assert make[0].images.equal(make[1].images) and not make[0].images.equal(make[2].images)
    assert make[0].images[5:10].equal(make[0].images[10:15])  # label 1 in both tasks
    assert len(make_tasks(numbered(labels), labels, [(0, 1)], False, 99, None, generator()).labels) == 40
    # Which rows a label brings does not depend on the other labels, nor on --num_tasks.
    alone = make_tasks(numbered(labels), labels, [(1, 2)], False, 5, None, generator())
    assert alone.images.equal(make[0].images[10:])


def test_label_without_rows_is_refused():
    with pytest.raises(DataError, match="label 4 has no rows"):
        make_tasks(numbered([0]), torch.tensor([0]), [(0, 4)], False)


@pytest.fixture
def cifar100(tmp_path):
    """A cifar100.npz of 100 labels x 30 training and 2 test rows; an image's first pixel is its label."""
    arrays = {}
    for split, n in (("train", 30), ("test", 2)):
        labels = np.repeat(np.arange(100, dtype=np.uint8), n)
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_images"] = np.broadcast_to(labels[:, None, None, None], (len(labels), 32, 32, 3))
    np.savez(tmp_path / "cifar100.npz", **arrays)
    return tmp_path


def test_test_rows_are_never_thinned(cifar100):
    train, test = build_dataset("cifar100", [(4, 30)], cifar100, generator(), samples=1)
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]


def test_label_100_is_the_noisy_twin_of_label_0(cifar100):
    train, test = build_dataset("cifar100", [(100, 1)], cifar100, generator())
    assert train.images[:, 0, 0, 0].tolist() == [0] * 30 + [1] * 30
    assert sorted(set(train.labels[:30].tolist())) == [0, 1] and train.labels[30:].tolist() == [1] * 30
    assert test.labels.tolist() == [0, 0, 1, 1]


def test_what_mnists_labels_and_flip_come_to(tmp_path, cifar100):
    arrays = make_arrays(classes=10, size=28)
    np.savez(tmp_path / "mnist.npz", **arrays)
    rows = np.concatenate([np.flatnonzero(arrays["train_labels"] == digit) for digit in (1, 0)])
    plain = torch.from_numpy(arrays["train_images"][rows]).permute(0, 3, 1, 2)
    for name, expected in (("permuted_mnist", permute(plain, 2000)), ("rotated_mnist", rotate(plain, 20))):
        train, test = build_dataset(name, [(21, 20)], tmp_path, generator())
        assert train.images.equal(expected) and not train.flip and not test.flip
        assert train.labels.tolist() == [0] * 10 + [1] * 10
    assert build_dataset("mnist", [(1, 0)], tmp_path, generator())[0].images.equal(plain)
    for name, flip in (("mnist", False), ("digits", False), ("rotated_digits", False), ("cifar100", True)):
        assert build_dataset(name, [(1, 0)], tmp_path, generator())[0].flip == flip


def test_noise_in_training_labels_only(cifar100):
    tasks = [(104, 130, 155), (4, 130, 30)]
    train, test = build_dataset("cifar100", tasks, cifar100, generator())
    # The images of label + 100 are the class's own, in both splits.
    assert train.images[:, 0, 0, 0].tolist() == [x for c in (4, 30, 55, 4, 30, 30) for x in [c] * 30]
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    noisy, mixed = train.labels[:90], train.labels[90:].view(3, 30)
    # 90 labels, uniform over 3: each count within 4 standard deviations (4.5) of 30.
    assert all(abs(n - 30) < 18 for n in noisy.bincount(minlength=3).tolist())
    assert (mixed[0] == 0).all() and (mixed[2] == 2).all() and mixed[1].unique().tolist() == [0, 1, 2]
    again, _ = build_dataset("cifar100", tasks, cifar100, generator())
    other, _ = build_dataset("cifar100", tasks, cifar100, generator(1))
    assert again.labels.equal(train.labels) and not other.labels.equal(train.labels)
    assert [len(x) for x in load_cifar100(cifar100, {4})[0]] == [3000, 3000]


def rotate_slowly(image, degrees):
    """Each pixel in turn: where it comes from, and the four neighbours' weighted mean there."""
    h, w = image.shape
    out = np.zeros((h, w))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for row in range(h):
        for column in range(w):
            x, y = column - (w - 1) / 2, row - (h - 1) / 2  # y points down
            from_x, from_y = cos * x - sin * y + (w - 1) / 2, sin * x + cos * y + (h - 1) / 2
            left, top = math.floor(from_x), math.floor(from_y)
            for i in (top, top + 1):
                for j in (left, left + 1):
                    if 0 <= i < h and 0 <= j < w:
                        out[row, column] += image[i, j] * (1 - abs(from_y - i)) * (1 - abs(from_x - j))
    return out


def test_rotation():
    image = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8, generator=generator())
    for degrees in (10, 200):
        expected = rotate_slowly(image[0, 0].double().numpy(), degrees)
        assert np.abs(rotate(image, degrees)[0, 0].numpy() - expected).max() < 0.51
    assert rotate(image, 90).equal(torch.rot90(image, 1, (2, 3)))  # counter-clockwise
    assert rotate(image, 0) is image


def test_permutation_is_one_of_the_pixels_and_its_seed_decides_it():
    images = torch.arange(2 * 36, dtype=torch.uint8).view(2, 1, 6, 6)
    order = torch.randperm(36, generator=generator(3000))
    assert permute(images, 3000).flatten(1).equal(images.flatten(1)[:, order])
    assert permute(images, 0) is images
    assert not permute(images, 1000).equal(permute(images, 2000))


def test_modified_digits_carry_the_labels_10x_plus_y():
    digits = torch.tensor([3, 5, 3, 0])
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8, generator=generator())
    (out, labels), _ = modify(((images, digits), (images, digits)), {3, 23, 25}, "rotated")
    assert labels.tolist() == [3, 3, 23, 25, 23]
    assert out.equal(torch.cat([images[[0, 2]], rotate(images[:3], 20)]))
    (out, labels), _ = modify(((images, digits), (images, digits)), {20, 23}, "permuted")
    assert labels.tolist() == [23, 23, 20] and out.equal(permute(images[[0, 2, 3]], 2000))


def test_digits_are_the_real_ones_and_every_fifth_of_a_class_is_test():
    (images, labels), (test_images, test_labels) = load_digits()
    assert len(labels) + len(test_labels) == 1797 and images.shape[1:] == test_images.shape[1:] == (1, 28, 28)
    counts = labels.bincount() + test_labels.bincount()
    assert test_labels.bincount().tolist() == [n // 5 for n in counts.tolist()]
    assert images.min() == 0 and 240 <= images.max() <= 255
    # Pixel 3 + 7i of 28 lies in the middle between 2i and 2i + 1 of 8, so it is the mean of four, times 255 / 16.
    source = np.loadtxt(Path(sklearn.__file__).parent / "datasets/data/digits.csv.gz", delimiter=",")
    raw = source[0, :64].reshape(4, 2, 4, 2).mean((1, 3)) * 255 / 16
    assert labels[0] == source[0, 64]
    assert np.abs(images[0, 0, 3::7, 3::7].numpy() - raw).max() <= 0.5


def test_npz_as_medmnist_lays_it_out(tmp_path):
    arrays = make_arrays(channels=3)
    arrays["train_labels"], arrays["test_labels"] = (arrays[f"{s}_labels"][:, None] for s in ("train", "test"))
    np.savez(tmp_path / "a.npz", **arrays, val_images=arrays["test_images"], val_labels=arrays["test_labels"])
    (images, labels), _ = load_npz(tmp_path / "a.npz")
    assert images[range(60)].equal(torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2))
    assert labels.tolist() == arrays["train_labels"][:, 0].tolist()
    images, labels = load_val(tmp_path / "a.npz")
    assert images[range(30)].equal(torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2))
    assert labels.tolist() == arrays["test_labels"][:, 0].tolist()
    np.savez(tmp_path / "b.npz", **{k: v[..., 0] if v.ndim == 4 else v for k, v in arrays.items()})
    assert load_npz(tmp_path / "b.npz")[0][0].shape == (60, 1, 24, 24) and load_val(tmp_path / "b.npz") is None
    for images, message in ((arrays["test_images"][:, :20], "train_images and val_images are not of one size"),
                            (arrays["test_images"][:9], r"val_labels must be whole numbers \[9\]")):
        np.savez(tmp_path / "c.npz", **arrays, val_images=images, val_labels=arrays["test_labels"])
        with pytest.raises(DataError, match=message):
            load_val(tmp_path / "c.npz")


def damage(**changes):
    arrays = make_arrays()
    arrays.update({k: v(arrays[k]) for k, v in changes.items() if v is not None})
    return {k: v for k, v in arrays.items() if changes.get(k, 0) is not None}


@pytest.mark.parametrize("arrays, message", [
    (damage(test_labels=None), "no array test_labels"),
    (damage(train_images=lambda x: x.astype(np.float32)), "must be uint8"),
    (damage(train_images=lambda x: x[:, :, :, [0, 0]]), r"must be uint8 \[N, H, W\]"),
    (damage(train_labels=lambda x: x[:-1]), "must be whole numbers"),
    (damage(train_labels=lambda x: x.astype(float)), "must be whole numbers"),
    (damage(train_labels=lambda x: x.astype(int) - 1), "must lie in"),
    (damage(test_images=lambda x: x[:0], test_labels=lambda x: x[:0]), "holds no rows"),
    (damage(test_images=lambda x: x[:, :20]), "not of one size"),
    (damage(test_labels=lambda x: x.astype(object)), "not a whole .npz file"),
])
def test_npz_of_the_wrong_form_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_npz(tmp_path / "a.npz")


def test_npz_of_another_dataset_is_refused(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **make_arrays())
    with pytest.raises(DataError, match=r"must be \[32, 32, 3\]"):
        build_dataset("cifar10", [(0, 1)], tmp_path, generator())
    np.savez(tmp_path / "cifar10.npz", **make_arrays(classes=12, size=32, channels=3))
    with pytest.raises(DataError, match="must lie in 0 .. 9"):
        build_dataset("cifar10", [(0, 1)], tmp_path, generator())


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_npz_is_refused(tmp_path, keep):
    np.savez(tmp_path / "a.npz", **make_arrays())
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match="not a whole .npz file"):
        load_npz(tmp_path / "a.npz")


def write_caches(folder, rows=10):
    """Caches whose rows are shuffled: an image's first pixel is its class's place in the alphabet, its second the
    row's place in the class."""
    folder.mkdir()
    random, place = np.random.default_rng(0), 0
    for split, n in mini_imagenet.SPLITS.items():
        images = np.zeros((n * rows, 84, 84, 3), np.uint8)
        order = random.permutation(n * rows).reshape(n, rows)
        for c in range(n):
            images[order[c], 0, 0, 0], images[order[c], 0, 0, 1] = place + c, np.arange(rows)
        class_dict = {f"n{place + c:08}": order[c].tolist() for c in reversed(range(n))}
        cache = {"image_data": images, "class_dict": class_dict}
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(cache, protocol=2))
        place += n


def test_mini_imagenet_takes_labels_from_the_class_dict(tmp_path):
    write_caches(tmp_path / "mini_imagenet")
    (train, test), names = mini_imagenet.load_mini_imagenet(tmp_path)
    assert names == [f"n{c:08}" for c in range(100)]
    for (images, labels), places in ((train, range(8)), (test, range(8, 10))):
        assert images.shape == (100 * len(places), 3, 84, 84)
        assert images[:, 0, 0, 0].tolist() == labels.tolist() == [c for c in range(100) for _ in places]
        assert images[:, 1, 0, 0].tolist() == list(places) * 100


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content, message", [
    (pickle.dumps(Evil()), "asks for builtins.print"),
    (pickle.dumps({"image_data": 1}), "must hold image_data and class_dict"),
    (pickle.dumps({"image_data": np.zeros((4, 84, 84)), "class_dict": {}}), "image_data must be"),
    (pickle.dumps({"image_data": np.zeros((4, 84, 84, 3), np.uint8), "class_dict": {}}), "must hold 64 classes"),
    (b"", "not a mini-ImageNet cache"),
    (None, "no such file; fetch"),
])
def test_bad_cache_is_refused_and_never_run(tmp_path, capsys, content, message):
    write_caches(tmp_path / "mini_imagenet", rows=2)
    file = tmp_path / "mini_imagenet" / "mini-imagenet-cache-train.pkl"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        mini_imagenet.load_mini_imagenet(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for j in range(2 if split == "train" else 1):
                Image.new("RGB", (30, 20), (80 * i, j, 7)).save(tmp_path / "pets" / split / name / f"{j}.png")
    return tmp_path


def test_image_folder(folder):
    train, test = build_dataset("image_folder", [("cat", "ant"), (1, 2)], folder, generator(), path="pets", size=24)
    assert train.images.shape == (8, 3, 24, 24) and train.flip
    assert train.images[:, 0, 0, 0].tolist() == [160, 160, 0, 0, 80, 80, 160, 160]
    assert train.images[:, 1, 5, 5].tolist() == [0, 1] * 4
    assert train.labels.tolist() == [0, 0, 1, 1] * 2
    assert test.labels.tolist() == [0, 1] * 2


def test_image_folder_refuses(folder):
    def build(tasks, path="pets"):
        return build_dataset("image_folder", tasks, folder, generator(), path=path, size=24)

    with pytest.raises(DataError, match="no class dog"):
        build([("cat", "dog")])
    with pytest.raises(DataError, match="no class 3"):
        build([(0, 3)])
    with pytest.raises(DataError, match="a class twice, by name and by index"):
        build([("ant", 0)])
    with pytest.raises(DataError, match="no such folder"):
        build([(0, 1)], "elsewhere")
    with pytest.raises(DataError, match="leads out of"):
        build([(0, 1)], "../pets")
    (folder / "pets/test/bee/1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="1.png: not a readable image"):
        build([(0, 1)])


def test_odd_class_names_stay_on_one_line(folder, capsys):
    """Once: a class name with a line end broke the one line."""
    data = {"dataset": "image_folder", "path": "pets", "size": 24, "tasks": [[0, "a\n\x1b[2J"]]}
    write_yaml(folder / "data.yaml", data)
    write_yaml(folder / "hp.yaml", CONV)
    argv = [x for flag, name in (("--data_config", "data.yaml"), ("--hp_config", "hp.yaml"), ("--data_dir", "."))
            for x in (flag, str(folder / name))]
    assert cli.command("x", "modelzoo", prepare, argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no class a" in err and "\x1b" not in err


def test_images_of_more_than_16_bits_are_refused(folder):
    """Once: all became white. 16 bits are read: tests/test_images.py."""
    Image.fromarray(np.full((9, 9), 1000, np.int32)).save(folder / "pets/train/ant/9.tif")
    with pytest.raises(DataError, match="9.tif: not a readable image .its pixels are of mode I;"):
        build_dataset("image_folder", [(0, 1)], folder, generator(), path="pets", size=24)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop", "pipe"])
def test_paths_that_no_file_has_are_refused(folder, path):
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    for dataset in ("npz", "image_folder"):
        with pytest.raises(DataError):
            build_dataset(dataset, [(0, 1)], folder, generator(), path=path, size=24)


def test_a_link_in_the_data_folder_is_followed(folder):
    (folder / "linked").symlink_to(folder / "pets")
    train, _ = build_dataset("image_folder", [(0, 1)], folder, generator(), path="linked", size=24)
    (folder / "data").mkdir()
    (folder / "data" / "pets").symlink_to(folder / "pets")
    outside, _ = build_dataset("image_folder", [(0, 1)], folder / "data", generator(), path="pets", size=24)
    assert outside.images.equal(train.images)


def test_cache_with_lists_of_different_lengths_is_refused(tmp_path):
    images = np.zeros((4, 84, 84, 3), np.uint8)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"image_data": images, "class_dict": {"a": [[0], [1, 2]]}}))
    with pytest.raises(DataError, match="must list rows"):
        mini_imagenet.load_cache(tmp_path / "a.pkl", 1)


def test_torchvisions_files_are_read_and_leave_a_cache_where_they_may(tmp_path, monkeypatch):
    """On a folder that cannot be written the rows are the same, without a cache."""
    arrays = make_arrays(classes=10, size=32, channels=3)

    class Fake:
        def __init__(self, root, train, download):
            split = "train" if train else "test"
            self.data, self.targets = arrays[f"{split}_images"], arrays[f"{split}_labels"].tolist()

    import torchvision

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    first = build_dataset("cifar10", [(0, 1)], tmp_path, generator())
    assert not list(tmp_path.iterdir())
    for data, split in zip(first, ("train", "test"), strict=True):
        rows = np.concatenate([np.flatnonzero(arrays[f"{split}_labels"] == label) for label in (0, 1)])
        assert np.array_equal(data.images.permute(0, 2, 3, 1), arrays[f"{split}_images"][rows])
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    second = build_dataset("cifar10", [(0, 1)], tmp_path, generator())
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]
    monkeypatch.undo()
    third = build_dataset("cifar10", [(0, 1)], tmp_path, generator())
    for again in (second, third):
        for a, b in zip(again, first, strict=True):
            assert a.images.equal(b.images) and a.labels.equal(b.labels)


def test_photographs_may_be_mirrored(tmp_path):
    for name, size in (("cifar10", 32), ("cifar100", 32), ("mini_imagenet", 84)):
        np.savez(tmp_path / f"{name}.npz", **make_arrays(classes=2, train=2, test=1, size=size, channels=3))
        assert build_dataset(name, [(0, 1)], tmp_path, generator())[0].flip
    np.savez(tmp_path / "toy.npz", **make_arrays(classes=2, train=2, test=1, channels=3))
    assert not build_dataset("npz", [(0, 1)], tmp_path, generator(), path="toy.npz")[0].flip  # nobody knows


def test_rotated_digits_are_rotated():
    (images, labels), (test_images, test_labels) = load_digits()
    train, test = build_dataset("rotated_digits", [(21, 20)], None, generator())
    assert train.images.equal(rotate(torch.cat([images[labels == 1], images[labels == 0]]), 20))
    assert test.images.equal(rotate(torch.cat([test_images[test_labels == 1], test_images[test_labels == 0]]), 20))


@pytest.mark.parametrize("name, torchvisions, size, channels", [
    ("mnist", "MNIST", 28, 1), ("cifar10", "CIFAR10", 32, 3), ("cifar100", "CIFAR100", 32, 3)])
def test_every_download_is_of_its_own_dataset(tmp_path, monkeypatch, name, torchvisions, size, channels):
    import torchvision

    arrays = make_arrays(classes=2, train=2, test=1, size=size, channels=channels)

    class Fake:
        def __init__(self, root, train, download):
            images, labels = (arrays[f"{'train' if train else 'test'}_{what}"] for what in ("images", "labels"))
            self.data, self.targets = images[..., 0] if channels == 1 else images, labels.tolist()
            if name == "mnist":  # torchvision keeps these as tensors
                self.data, self.targets = torch.tensor(self.data), torch.tensor(self.targets)

    monkeypatch.setattr(torchvision, "datasets", type("Datasets", (), {torchvisions: Fake}))
    train, _ = build_dataset(name, [(0, 1)], tmp_path, generator())
    rows = np.concatenate([np.flatnonzero(arrays["train_labels"] == label) for label in (0, 1)])
    assert np.array_equal(train.images.permute(0, 2, 3, 1), arrays["train_images"][rows])


def test_mini_imagenets_labels_run_through_train_val_and_test():
    assert list(mini_imagenet.SPLITS.items()) == [("train", 64), ("val", 16), ("test", 20)]


def test_an_image_that_is_not_square_keeps_its_sides(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)  # 4 rows of 6
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", (1, 4, 6))[..., 0].tolist() == pixels.tolist()
