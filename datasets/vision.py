"""Any dataset of torchvision that gives images, each with one label, kept as an npz file."""
import contextlib
import difflib
import inspect
import io
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from datasets.data import DataError, one_line
from datasets.images import Damaged, decode_image, read_all
from datasets.memory import allocate
from datasets.npz import leave_cache, load_class_names, load_npz

# Those whose test split is called otherwise, or comes without labels.
TEST = {"CLEVRClassification": "val", "ImageNet": "val", "Imagenette": "val", "Places365": "val"}
# Their constructors look like the others', but an image has several labels, boxes, a mask or a partner.
UNLABELLED = ("CelebA", "Cityscapes", "Kitti", "LFWPairs", "WIDERFace")
# Keywords that are no setting of the data, or (QMNIST's) choose training and test rows past `train`.
RESERVED = ("self", "root", "download", "transform", "target_transform", "transforms", "loader", "is_valid_file",
            "allow_empty", "what", "compat")


def load_vision(keywords, data_dir, size=None):
    """Read `<data_dir>/<name and keywords>.npz`; where there is none, let torchvision download, and leave one.

    Args:
        keywords: (("name", of a class in torchvision.datasets), (keyword of its constructor, value), ...).
        data_dir: where the npz file is, and torchvision's own files.
        size: side in pixels that every image is resized to (None: they are of one size as they are).

    Returns:
        splits: (train_images, train_labels), (test_images, test_labels), as of `load_npz`.
        names: of the classes, by label; None where torchvision has none.

    Raises:
        DataError: no such class or keyword; a class without test rows or without one label per image; neither data nor
            network; images of several sizes without `size`; or a damaged file.
    """
    (_, name), *options = keywords
    sized = [("size", size)] if size else []
    cache = Path(data_dir) / ("-".join([name] + [f"{k}={quote(str(v), safe='')}" for k, v in options + sized]) + ".npz")
    if cache.exists():
        return load_npz(cache), load_class_names(cache)
    import torchvision  # slow to import, and needed here alone

    make = find_class(name, vars(torchvision.datasets))
    chosen, others = split_keywords(make)
    check_options(name, options, others)
    arrays, shape = {}, None
    for split, choice in zip(("train", "test"), chosen, strict=True):
        rows = _make(make, dict(options) | choice, data_dir, cache)
        images, labels = read_rows(name, rows, data_dir, size, shape)
        shape, arrays[f"{split}_images"], arrays[f"{split}_labels"] = images.shape[1:], images, labels
    binary = dict(options).get("target_types") == "binary-category"  # of OxfordIIITPet, which has names for both
    names = getattr(rows, "bin_classes" if binary else "classes", None)
    if names:  # ImageNet's are tuples of synonyms
        names = [name if isinstance(name, str) else name[0] for name in names]
        arrays["class_names"] = np.array(names)
    if leave_cache(cache, arrays):
        return load_npz(cache), names
    splits = [[torch.from_numpy(arrays[f"{split}_{what}"]) for what in ("images", "labels")]
              for split in ("train", "test")]
    return tuple((images.permute(0, 3, 1, 2).contiguous(), labels) for images, labels in splits), names


def find_class(name, found):
    """The class `name` of the dict `found`; a `DataError` where it is none, or one that cannot be learned from."""
    found = {key: value for key, value in found.items() if inspect.isclass(value)}
    if name not in found:
        lower = {key.lower(): key for key in found}
        near = difflib.get_close_matches(name.lower(), lower, 1)
        raise DataError(f"name: torchvision.datasets has no class {name}"
                        + "".join(f"; did you mean {lower[word]}?" for word in near))
    if name in UNLABELLED or "target_transform" not in parameters(found[name]):
        raise DataError(f"name: torchvision's {name} does not give one label per image, which tasks are made of")
    return found[name]


def parameters(make):
    """The parameters of a class's constructor, name to `inspect.Parameter`.

    Those of its base class, too, where it hands **kwargs on.
    """
    found = {}
    for base in make.__mro__:
        if "__init__" in vars(base):
            more = inspect.signature(base.__init__).parameters
            found = {**more, **found}
            if all(p.kind is not p.VAR_KEYWORD for p in more.values()):
                break
    return {key: p for key, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def split_keywords(make):
    """How a class of torchvision.datasets is asked for its training and its test rows.

    Returns:
        chosen: two dicts of keywords, for training and test.
        others: the parameters that a dataset file may set, name to `inspect.Parameter`.

    Raises:
        DataError: all rows come in one set.
    """
    others = {key: p for key, p in parameters(make).items() if key not in RESERVED}
    name, split = make.__name__, others.get("split")
    if "train" in others:  # of EMNIST, `split` is something else
        key, chosen = "train", (True, False)
    elif split is not None and isinstance(split.default, str):
        key = "split"
        chosen = (split.default if split.default.startswith("train") else "train", TEST.get(name, "test"))
    elif name == "INaturalist":
        key, chosen = "version", ("2021_train", "2021_valid")
    else:
        raise DataError(f"name: torchvision's {name} has no test rows of its own; write yours as an npz file or as "
                        "folders of images")
    del others[key]
    return tuple({key: value} for value in chosen), others


def check_options(name, options, others):
    """Refuse keywords that the class `name` does not take, or takes and was not given; arguments as above."""
    for key, _ in options:
        if key not in others:
            near = difflib.get_close_matches(key, (*others, "size", "flip", "names"), 1)
            rest = "".join(f"did you mean {word}? " for word in near) + f"its own are {', '.join(others) or 'none'}"
            raise DataError(f"{key}: torchvision's {name} takes no such keyword from a dataset file; {rest}")
    for key, p in others.items():
        if p.default is p.empty and key not in dict(options):
            raise DataError(f"{key}: key is missing; torchvision's {name} needs it")


def _make(make, options, data_dir, cache):
    """One split as torchvision gives it, downloaded where it is not there; other arguments as above."""
    name, root = make.__name__, Path(data_dir)
    known = set(os.listdir(root)) if root.is_dir() else None
    download = {"download": True} if "download" in parameters(make) else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return make(str(root), **options, **download)
    except MemoryError:
        raise
    except Exception as e:  # torchvision raises nearly anything where a file is damaged or the network is away
        _remove_empty(root, known)
        why = one_line(e, 160)
        if isinstance(e, ValueError) and "argument" in why:
            raise DataError(f"torchvision's {name} refuses a keyword ({why})") from e
        way = "the download failed" if download else "torchvision downloads none"
        raise DataError(f"{name}: no data: looked for {cache} and for torchvision's files below {root}, and {way} "
                        f"({why[:80]}); connect this machine to the network, or put either of the two there") from e


def _remove_empty(root, known):
    """Remove the folders that torchvision made for what did not come: a --data_dir that was mistyped stays away.

    `known` are the names that were in `root` before, None where there was none.
    """
    for name in set(os.listdir(root)) - (known or set()) if root.is_dir() else ():
        for folder, _, _ in os.walk(root / name, topdown=False):
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(folder)
    if known is None:
        with contextlib.suppress(OSError):
            root.rmdir()


def read_rows(name, rows, data_dir, size=None, shape=None):
    """All images and labels of a split.

    Args:
        name: of the dataset.
        rows: gives (Pillow image, label) of each of its `len`.
        data_dir: where images that do not fit into memory may lie.
        size: side in pixels (None: that of the first image, which all must have).
        shape: (H, W, C) that the images must have (None: those of the first image, C = 1 if that is grey).

    Returns:
        uint8 [N, H, W, C] and int64 [N], arrays.

    Raises:
        DataError: images of several sizes, or that cannot be read; a label that is not one whole number.
    """
    if len(rows) == 0:
        raise DataError(f"{name}: torchvision's files hold no rows")
    if shape is None:
        image = rows[0][0]
        if not isinstance(image, Image.Image):
            raise DataError(f"{name}: torchvision gives no images of it")
        shape = (size or image.height, size or image.width, 1 if image.mode in ("1", "L") else 3)
    h, w, c = shape
    images = allocate((len(rows), h, w, c), f"{name}: {len(rows):,} images", data_dir).numpy()
    labels = np.empty(len(rows), np.int64)

    def read(i):
        try:
            image, label = rows[i]
        except MemoryError:
            raise
        except Exception as e:  # see `decode_image`
            why = one_line(e, 120)
            raise Damaged(f"{name}, image {i} (counted from 0): not a readable image ({why})") from e
        if not isinstance(image, Image.Image) or not hasattr(label, "__index__") or label < 0:
            raise DataError(f"{name}: row {i} (counted from 0) is not an image with one whole number as its label")
        if size is None and (image.height, image.width) != (h, w):
            raise DataError(f"{name}: its images differ in size ({w} x {h}, {image.width} x {image.height}): "
                            "write size: 64, or another side in pixels, into the dataset file")
        images[i], labels[i] = decode_image(image, (c, h, w)), label

    read_all(read, len(rows), name)
    return images, labels
