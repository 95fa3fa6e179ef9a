"""npz files, row by row: the user's own, and those that hold what torchvision downloaded."""
import contextlib
import io
import os
import zipfile
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from datasets.data import DataError, one_line
from datasets.memory import allocate

NPZ_KEYS = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
CHUNK = 1024  # rows of a file that are in memory at once


class NpzImages:
    """The images of one split of an npz file; only the rows that are asked for are ever in memory.

    Args:
        path: the file.
        key: of the array, uint8 [N, H, W] or [N, H, W, 1 or 3].

    Attributes:
        shape: (N, C, H, W).

    Raises:
        DataError: the array is of another type or shape.
    """

    def __init__(self, path, key):
        self.path, self.key = path, key
        with _open_array(path, key) as (shape, dtype, fortran, _):
            if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
                raise DataError(f"{path}: {key} must be uint8 [N, H, W] or [N, H, W, 1 or 3], "
                                f"not {dtype} {list(shape)}")
        self.fortran = fortran
        self.shape = (shape[0], (*shape, 1)[3], *shape[1:3])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """uint8 [n, C, H, W] of `rows`, [n] int64 in any order; a `DataError` where the file is damaged."""
        n, c, h, w = self.shape
        rows = np.asarray(rows)
        what = f"{self.path}: {len(rows):,} of {n:,} {self.key}"
        images = allocate((len(rows), c, h, w), what, Path(self.path).parent)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        with _open_array(self.path, self.key) as (shape, _, _, stream):
            if self.fortran:  # column by column; numpy writes such an array only where it was given one
                whole = np.frombuffer(_read(stream, n * c * h * w), np.uint8).reshape(shape, order="F")
                images.copy_(torch.from_numpy(whole.reshape(n, h, w, c)[rows]).permute(0, 3, 1, 2))
            for first in range(0, 0 if self.fortran else n, CHUNK):
                count = min(CHUNK, n - first)
                chunk = np.frombuffer(_read(stream, count * c * h * w), np.uint8).reshape(count, h, w, c)
                place = order[slice(*np.searchsorted(ascending, (first, first + count)))]
                images[place] = torch.from_numpy(chunk[rows[place] - first]).permute(0, 3, 1, 2)
            if stream.read(1):  # the file's checksum is compared at its end
                raise ValueError("more bytes than its header says")
        return images


def _read(stream, n):
    data = stream.read(n)
    if len(data) < n:
        raise ValueError("it ends too early")
    return data


@contextlib.contextmanager
def _open_array(path, key):
    """(shape, dtype, whether by columns, stream of its bytes) of an array in an npz file.

    Raises:
        DataError: no such file or array; or one that is damaged, inside too.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, for whose writer opening it would wait
        raise DataError(f"{path}: is no file; an npz file holds {', '.join(NPZ_KEYS)}")
    try:
        with zipfile.ZipFile(path) as file:
            if f"{key}.npy" not in file.namelist():
                raise DataError(f"{path}: no array {key}; an npz file holds {', '.join(NPZ_KEYS)}")
            with file.open(f"{key}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                yield shape, dtype, fortran, stream
    except FileNotFoundError as e:
        raise DataError(f"{path}: no such file") from e
    except (DataError, MemoryError):
        raise
    except Exception as e:  # numpy and zipfile raise nearly anything on a damaged file
        raise DataError(f"{path}: not a whole .npz file ({one_line(e, 120)})") from e


def load_npz(path, shape=None, num_labels=None):
    """Read train_images, train_labels, test_images, test_labels from an .npz file.

    Images are uint8 [N, H, W] or [N, H, W, C]; labels whole numbers [N] or [N, 1]. Nothing in the file is executed.

    Args:
        path: the file.
        shape: (H, W, C) that the images must have (None: any).
        num_labels: labels must lie below it (None: any from 0 on).

    Returns:
        (train_images, train_labels), (test_images, test_labels): `NpzImages` and int64 [N].

    Raises:
        DataError: missing, damaged, or not of these shapes and types.
    """
    splits = tuple(_load_split(path, split, shape, num_labels) for split in ("train", "test"))
    if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        raise DataError(f"{path}: train_images and test_images are not of one size")
    return splits


def load_val(path):
    """(images, labels) of val_images and val_labels, as of `load_npz`; None where the file has none.

    MedMNIST's files have them: rows that are neither trained nor tested on.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if "val_images.npy" not in file.namelist():
                return None
    except OSError as e:  # on another machine than the one that read its training rows
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    images, labels = _load_split(path, "val")
    if images.shape[1:] != NpzImages(path, "train_images").shape[1:]:
        raise DataError(f"{path}: train_images and val_images are not of one size")
    return images, labels


def _load_split(path, split, shape=None, num_labels=None):
    """(images, labels) of one split; arguments and errors as of `load_npz`."""
    images = NpzImages(path, f"{split}_images")
    n, c, h, w = images.shape
    if shape is not None and (h, w, c) != shape:
        raise DataError(f"{path}: {split}_images must be {list(shape)} each, not {[h, w, c]}")
    with _open_array(path, f"{split}_labels") as (found, dtype, _, stream):
        if dtype.hasobject:
            raise ValueError(f"{split}_labels holds objects of Python, which are not read")
        labels = np.frombuffer(stream.read(), dtype).reshape(found)
    return images, _check_labels(path, split, n, labels, num_labels)


def _check_labels(path, split, n, labels, num_labels):
    """The labels of a split of `n` images, as int64 [n], where they are what `load_npz` asks for."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(f"{path}: {split}_labels must be whole numbers [{n}] like {split}_images, "
                        f"not {labels.dtype} {list(labels.shape)}")
    if len(labels) == 0:
        raise DataError(f"{path}: {split}_images holds no rows")
    if labels.min() < 0 or labels.max() >= (num_labels or 2**31):
        raise DataError(f"{path}: {split}_labels must lie in 0 .. {(num_labels or 2**31) - 1}, "
                        f"not {labels.min()} .. {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def load_class_names(path):
    """The names of the classes by label, `class_names` [C] in an npz file; None where it has none."""
    with zipfile.ZipFile(path) as file:  # `load_npz` has read it
        if "class_names.npy" not in file.namelist():
            return None
    with _open_array(path, "class_names") as (shape, dtype, _, stream):
        if dtype.kind != "U" or len(shape) != 1:
            raise DataError(f"{path}: class_names must be texts [C], not {dtype} {list(shape)}")
        names = np.frombuffer(stream.read(), dtype).tolist()
    odd = next((name for name in names if not name.isprintable()), None)
    if odd is not None:
        raise DataError(f"{path}: class_names: {odd!r:.60} cannot be printed on one line")
    return names


def load_or_download(name, torchvision_class, files, data_dir, shape, num_labels):
    """Read `<data_dir>/<name>.npz`; where there is none, let torchvision read or download its files and leave one.

    Args:
        name: of the dataset and its cache: mnist, cifar10, cifar100.
        torchvision_class: name of the class in torchvision.datasets.
        files: the folder below data_dir in which torchvision keeps its files.
        shape, num_labels: see `load_npz`.

    Returns:
        As `load_npz`, but with all images in memory: uint8 [N, C, H, W].

    Raises:
        DataError: neither data nor network, or a damaged file.
    """
    cache = Path(data_dir) / f"{name}.npz"
    if cache.exists():
        return tuple((images[range(len(images))], labels) for images, labels in load_npz(cache, shape, num_labels))
    import torchvision  # slow to import, and needed here alone

    make = getattr(torchvision.datasets, torchvision_class)
    kept = Path(data_dir) / files
    absent = [p for p in (kept, *kept.parents) if not p.exists()]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            sets = [make(data_dir, train=train, download=True) for train in (True, False)]
    except MemoryError:
        raise
    except Exception as e:  # torchvision raises nearly anything where a file is damaged or the network is away
        # Folders that it made for what did not come: a --data_dir that was mistyped stays away.
        for p in absent:
            with contextlib.suppress(OSError):
                p.rmdir()
        raise DataError(
            f"{name}: no data: looked for {cache} and for torchvision's files in {Path(data_dir) / files}, and the "
            f"download failed ({one_line(e, 80)}); connect this machine to the network, or put either "
            "of the two there"
        ) from e
    arrays = {}
    for split, data in zip(("train", "test"), sets, strict=True):
        arrays[f"{split}_images"] = np.asarray(data.data)
        arrays[f"{split}_labels"] = np.asarray(data.targets, np.uint8)
    splits = []
    for split in ("train", "test"):
        images = arrays[f"{split}_images"].reshape(-1, *shape).transpose(0, 3, 1, 2)
        labels = _check_labels(cache, split, len(images), arrays[f"{split}_labels"], num_labels)
        splits.append((torch.from_numpy(np.ascontiguousarray(images)), labels))
    leave_cache(cache, arrays)
    return tuple(splits)


def leave_cache(cache, arrays):
    """Write `arrays` to the npz file `cache`, whole or not at all; whether the folder let it."""
    part = cache.with_suffix(f".{uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, cache)
        return True
    except OSError:  # a shared folder that is read-only: the files that were read stay what is read
        return False
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or never will
            part.unlink()
