"""mini-ImageNet from its three caches: 100 classes of 600 photographs, 84 x 84."""
import pickle
from pathlib import Path

import numpy as np
import torch

from datasets.data import DataError, one_line
from datasets.npz import load_npz

SPLITS = {"train": 64, "val": 16, "test": 20}  # classes in each cache; our labels run through them in this order

# All that numpy's own pickles of an array name, in its versions 1 and 2 and from Python 2 and 3.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle._Unpickler):
    """Reads dicts, lists, numbers, texts and arrays; a pickle that names anything else is refused, not run.

    The unpickler written in Python: the one in C takes as much memory as a damaged file tells it to.
    """

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array does not need")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_cache(path, num_classes):
    """Read one cache: a pickled dict of image_data [N, 84, 84, 3] uint8 and class_dict {class: its rows}.

    Returns:
        An array [n, 84, 84, 3] for each class's name, in the names' alphabetical order.

    Raises:
        DataError: missing, damaged, asking for code, or not of this form.
    """
    try:
        with open(path, "rb") as file:
            cache = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError as e:
        raise DataError(
            f"{path}: no such file; fetch mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl by hand into "
            f"{Path(path).parent}, or put mini_imagenet.npz into {Path(path).parent.parent}"
        ) from e
    except MemoryError:
        raise
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a mini-ImageNet cache ({one_line(e, 120)})") from e
    if not (isinstance(cache, dict) and {"image_data", "class_dict"} <= cache.keys()):
        raise DataError(f"{path}: must hold image_data and class_dict")
    images, class_dict = cache["image_data"], cache["class_dict"]
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (84, 84, 3)):
        raise DataError(f"{path}: image_data must be uint8 [N, 84, 84, 3]")
    if not (isinstance(class_dict, dict) and len(class_dict) == num_classes):
        raise DataError(f"{path}: class_dict must hold {num_classes} classes")
    classes = {}
    for name in sorted(class_dict, key=str):
        try:
            rows = np.asarray(class_dict[name])
        except ValueError:  # lists of different lengths
            rows = np.empty(0)
        whole = rows.ndim == 1 and rows.dtype.kind in "iu" and len(rows) >= 2
        if not whole or rows.min() < 0 or rows.max() >= len(images):
            raise DataError(f"{path}: class_dict: {str(name)[:40]} must list rows of image_data, at least two")
        classes[str(name)] = images[rows]
    return classes


def load_mini_imagenet(data_dir):
    """The splits, as `load_npz` gives them, and the names of the classes by label (None: the file has none).

    The first 80 % of a class's rows train, the rest test. `<data_dir>/mini_imagenet.npz` goes before the three caches.

    Raises:
        DataError: see `load_cache`.
    """
    npz = Path(data_dir) / "mini_imagenet.npz"
    if npz.exists():
        return load_npz(npz, (84, 84, 3), sum(SPLITS.values())), None
    folder = Path(data_dir) / "mini_imagenet"
    caches = [load_cache(folder / f"mini-imagenet-cache-{split}.pkl", n) for split, n in SPLITS.items()]
    classes = [images for cache in caches for images in cache.values()]
    names = [name for cache in caches for name in cache]

    def join(parts):
        images = np.concatenate(parts).transpose(0, 3, 1, 2)
        labels = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
        return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)

    splits = join([c[: len(c) * 4 // 5] for c in classes]), join([c[len(c) * 4 // 5 :] for c in classes])
    return splits, names
