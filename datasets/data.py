"""Tasks as tensors: uint8 rows sorted by task; a subset is an index."""
import contextlib
import hashlib
import io
import itertools
import math
import os
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor


class DataError(Exception):
    """Data that are missing, damaged or of the wrong shape, told in one line that names the file."""


@dataclass(frozen=True)
class TaskData:
    """The rows of all tasks, of one split (train or test), on one device.

    Attributes:
        images: [N, C, H, W] uint8, sorted by task.
        labels: [N] int64, a row's class within its task, 0 .. classes[t] - 1.
        starts: [T + 1], task t is rows starts[t] .. starts[t + 1] - 1.
        classes: [T], how many classes each task has.
        flip: whether a mirrored image still shows its class (photographs, not digits).
        class_names: [T] tuples of C_t texts, which may be the source labels.
    """

    images: Tensor
    labels: Tensor
    starts: tuple[int, ...]
    classes: tuple[int, ...]
    flip: bool
    class_names: tuple[tuple[str, ...], ...]

    def rows(self, t):
        """Row numbers of task t, [N_t] int64."""
        return torch.arange(self.starts[t], self.starts[t + 1], device=self.images.device)

    def first(self, n):
        """The data of the first n tasks alone."""
        end = self.starts[n]
        return replace(self, images=self.images[:end], labels=self.labels[:end], starts=self.starts[: n + 1],
                       classes=self.classes[:n], class_names=self.class_names[:n])  # fmt: skip

    def to(self, device):
        """The same data on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def make_tasks(images, labels, tasks, flip, samples=None, noisy_from=None, generator=None, name=str):
    """Sort rows by task and relabel each task's source labels to 0 .. C_t - 1, in the order that the task lists them.

    Args:
        images: [M, C, H, W] uint8.
        labels: [M] int64 source labels.
        tasks: source labels of each task; a label may stand in several tasks.
        flip: see `TaskData`.
        samples: rows a class at most, chosen at random (None: all). The choice goes by label: a label that
            stands in two tasks brings the same rows to both.
        noisy_from: rows whose source label is this or higher get a label drawn uniformly from their task's.
        generator: its seed decides the random choices; needed with `samples` or `noisy_from`.
        name: gives the name of the class of a source label.

    Raises:
        DataError: a label has no rows.
    """

    def derive(*key):
        """A generator for one choice alone, so that it does not depend on which others are made."""
        digest = hashlib.sha256(repr((generator.initial_seed(), *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    rows_of = {}
    for label in sorted({label for task in tasks for label in task}):
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) == 0:
            raise DataError(f"label {label} has no rows")
        if samples is not None and len(rows) > samples:
            rows = rows[torch.randperm(len(rows), generator=derive("samples", label))[:samples].sort().values]
        rows_of[label] = rows
    rows, targets, starts = [], [], [0]
    for t, task in enumerate(tasks):
        for c, label in enumerate(task):
            n = len(rows_of[label])
            rows.append(rows_of[label])
            if noisy_from is not None and label >= noisy_from:
                targets.append(torch.randint(len(task), (n,), generator=derive("noise", t, label)))
            else:
                targets.append(torch.full((n,), c))
        starts.append(sum(map(len, rows)))
    return TaskData(images[torch.cat(rows)], torch.cat(targets), tuple(starts), tuple(map(len, tasks)), flip,
                    tuple(tuple(map(name, task)) for task in tasks))  # fmt: skip


def hold_out(train):
    """Split training rows in two, class by class, so that settings can be compared without a test row.

    Of every class of every task each fifth row is held out (of fewer than five the last), whatever the seed: a label
    that stands in two tasks brings the same rows, in the same order, to both, so both hold out the same ones.

    Args:
        train: `TaskData` of the training rows.

    Returns:
        fit, held_out: `TaskData`; together all rows of `train`.

    Raises:
        DataError: a class has a single row.
    """
    held = torch.zeros(len(train.labels), dtype=torch.bool, device=train.labels.device)
    for t in range(len(train.classes)):
        rows = train.rows(t)
        for c in range(train.classes[t]):
            of_class = rows[train.labels[rows] == c]
            if len(of_class) == 1:
                raise DataError(f"class {c} of task {t} has a single training row: none can be held out beside it")
            held[of_class[4::5] if len(of_class) >= 5 else of_class[-1:]] = True

    def subset(chosen):
        counts = [int(chosen[train.rows(t)].sum()) for t in range(len(train.classes))]
        starts = (0, *itertools.accumulate(counts))
        return replace(train, images=train.images[chosen], labels=train.labels[chosen], starts=starts)

    return subset(~held), subset(held)


def sample_replay(train, t, replay_frac, generator):
    """Rows of task t that may be looked at once it is past: floor(replay_frac x rows) of every class, at least 1.

    Args:
        train: `TaskData`.
        t: index of the task.
        replay_frac: in (0, 1].
        generator: on the CPU.

    Returns:
        [n] int64, ascending.
    """
    if replay_frac == 1:
        return train.rows(t)
    rows, kept = train.rows(t), []
    for c in range(train.classes[t]):
        of_class = rows[train.labels[rows] == c]
        # The fraction as it was written: 0.29 of 100 rows is 29, though in floats 0.29 * 100 < 29.
        n = max(math.floor(Fraction(repr(replay_frac)) * len(of_class)), 1)
        kept.append(of_class[torch.randperm(len(of_class), generator=generator)[:n].to(rows.device)])
    return torch.cat(kept).sort().values


def replay_repeats(num_tasks, replay_frac):
    """How often a kept row of a past task stands in an epoch of a learner on n tasks: max(floor(1/((n-1)r)), 1).

    So about half of every batch is the new task. `num_tasks` is n, at least 2; `replay_frac` is r, in (0, 1].
    """
    return max(math.floor(1 / ((num_tasks - 1) * Fraction(repr(replay_frac)))), 1)


def load_npz(path, shape=None, num_labels=None):
    """Read train_images, train_labels, test_images, test_labels from an .npz file.

    Images are uint8 [N, H, W] or [N, H, W, C]; labels whole numbers [N] or [N, 1]. Nothing in the file is executed.

    Args:
        path: the file.
        shape: (H, W, C) that the images must have (None: any).
        num_labels: labels must lie below it (None: any from 0 on).

    Returns:
        (train_images, train_labels), (test_images, test_labels): uint8 [N, C, H, W] and int64 [N].

    Raises:
        DataError: missing, damaged, or not of these shapes and types.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
            missing = [key for key in keys if key not in file]
            if missing:
                raise DataError(f"{path}: no array {missing[0]}; an npz file holds {', '.join(keys)}")
            arrays = {key: file[key] for key in keys}
    except FileNotFoundError as e:
        raise DataError(f"{path}: no such file") from e
    except DataError:
        raise
    except Exception as e:  # numpy and zipfile raise nearly anything on a damaged file
        raise DataError(f"{path}: not a whole .npz file ({' '.join(str(e).split())[:120]})") from e
    return _make_splits(path, arrays, shape, num_labels)


def _make_splits(path, arrays, shape, num_labels):
    """Check the four arrays of an npz file and turn them into what `load_npz` returns."""
    splits = []
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise DataError(f"{path}: {split}_images must be uint8 [N, H, W] or [N, H, W, 1 or 3], "
                            f"not {images.dtype} {list(images.shape)}")
        images = images[..., None] if images.ndim == 3 else images
        if shape is not None and images.shape[1:] != shape:
            raise DataError(f"{path}: {split}_images must be {list(shape)} each, not {list(images.shape[1:])}")
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(f"{path}: {split}_labels must be whole numbers [{len(images)}] like {split}_images, "
                            f"not {labels.dtype} {list(labels.shape)}")
        if len(labels) == 0:
            raise DataError(f"{path}: {split}_images holds no rows")
        if labels.min() < 0 or labels.max() >= (num_labels or 2**31):
            raise DataError(f"{path}: {split}_labels must lie in 0 .. {(num_labels or 2**31) - 1}, "
                            f"not {labels.min()} .. {labels.max()}")
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        splits.append((torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        raise DataError(f"{path}: train_images and test_images are not of one size")
    return tuple(splits)


def load_or_download(name, torchvision_class, files, data_dir, shape, num_labels):
    """Read `<data_dir>/<name>.npz`; where there is none, let torchvision read or download its files and leave one.

    Args:
        name: of the dataset and its cache: mnist, cifar10, cifar100.
        torchvision_class: name of the class in torchvision.datasets.
        files: the folder below data_dir in which torchvision keeps its files.
        shape, num_labels: see `load_npz`, as is the result.

    Raises:
        DataError: neither data nor network, or a damaged file.
    """
    cache = Path(data_dir) / f"{name}.npz"
    if cache.exists():
        return load_npz(cache, shape, num_labels)
    import torchvision  # slow to import, and needed here alone

    make = getattr(torchvision.datasets, torchvision_class)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            sets = [make(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as e:  # torchvision raises nearly anything where a file is damaged or the network is away
        raise DataError(
            f"{name}: no data: looked for {cache} and for torchvision's files in {Path(data_dir) / files}, and the "
            f"download failed ({' '.join(str(e).split())[:80]}); connect this machine to the network, or put either "
            "of the two there"
        ) from e
    arrays = {}
    for split, data in zip(("train", "test"), sets, strict=True):
        arrays[f"{split}_images"] = np.asarray(data.data)
        arrays[f"{split}_labels"] = np.asarray(data.targets, np.uint8)
    splits = _make_splits(cache, arrays, shape, num_labels)
    part = cache.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, cache)
    except OSError:  # a shared folder that is read-only: the files that were read stay what is read
        with contextlib.suppress(OSError):
            part.unlink()
    return splits


def make_images(images, shape):
    """New images as the networks take them.

    Args:
        images: an array uint8 [N, H, W] or [N, H, W, C], as in an npz file; or a tensor uint8 [N, C, H, W]; or a list
            of image files, which are turned into C channels and resized to H x W (bilinear).
        shape: (C, H, W).

    Returns:
        uint8 [N, C, H, W].

    Raises:
        DataError: another type or shape, or a file that is not an image.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise DataError("no images")
        images = np.stack([load_image(file, shape) for file in images])
    if isinstance(images, np.ndarray):
        images = torch.tensor(np.ascontiguousarray(images[..., None] if images.ndim == 3 else images))
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images
    if not isinstance(images, torch.Tensor):
        raise DataError(f"images must be an array, a tensor or a list of files, not {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise DataError(f"images must be uint8 with (C, H, W) {tuple(shape)}, not {images.dtype} {list(images.shape)}")
    return images


def load_image(file, shape):
    """Read an image as a viewer shows it (`_as_shown`): uint8 [H, W, C], resized (bilinear) where of another size.

    Args:
        file: a path, or an open Pillow image.
        shape: (C, H, W), C 1 or 3.

    Raises:
        DataError: not an image, or of more than 16 bits per channel.
    """
    channels, height, width = shape
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of large images and of odd metadata
            with contextlib.nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
                image.load()
                image = _as_shown(image).convert("RGB" if channels == 3 else "L")
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
        why = " ".join(str(e).split())[:120]
        raise DataError(f"{file}: not a readable image ({why}); PNG and JPEG always are") from e
    return np.asarray(image).reshape(height, width, channels)


def _as_shown(image):
    """A loaded Pillow image with the pixels that a viewer shows.

    Turned as its EXIF orientation says, the upper 8 of 16 bits, on white where it is transparent, in sRGB where it
    brings a colour profile.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")  # so before Pillow 11
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # a viewer shows an image of damaged metadata as it stands
        image = ImageOps.exif_transpose(image)
    if sixteen:
        image = Image.fromarray((np.asarray(image).astype(np.uint32) * 255 // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}; 8 or 16 bits per channel are needed")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # and passes over a profile that it cannot use
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            if "sRGB" not in ImageCms.getProfileDescription(source):
                image = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    return image


def checksum(train, test):
    """A text that tells whether two runs had the same rows, labels and tasks."""
    digest = hashlib.sha256(repr([(d.starts, d.classes, d.flip, list(d.images.shape)) for d in (train, test)]).encode())
    for data in (train, test):
        digest.update(data.images.cpu().numpy())
        digest.update(data.labels.cpu().numpy())
    return digest.hexdigest()[:16]
