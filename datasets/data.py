"""Tasks as tensors: uint8 rows sorted by task; a subset is an index."""
import contextlib
import hashlib
import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from tqdm import tqdm

PART = 16  # images that a thread reads before it says so


class DataError(Exception):
    """Data that are missing, damaged or of the wrong shape, told in one line that names the file."""


class Damaged(DataError):
    """An image that cannot be read, among others that may be; the line opens with the file and a colon."""


class NoRows(DataError):
    """A label of which a split has none."""


@dataclass(frozen=True)
class TaskData:
    """The rows of all tasks, of one split (train or test), on one device; images too many for it stay on the host.

    Attributes:
        images: [N, C, H, W] uint8, sorted by task; with a frozen backbone its features, [N, D] float32.
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
    class_names: tuple[tuple[str, ...], ...] = ()

    @property
    def device(self):
        """Where the networks run that take these rows."""
        return self.labels.device

    def rows(self, t):
        """Row numbers of task t, [N_t] int64."""
        return torch.arange(self.starts[t], self.starts[t + 1], device=self.device)

    def first(self, n):
        """The data of the first n tasks alone."""
        end = self.starts[n]
        return replace(self, images=self.images[:end], labels=self.labels[:end], starts=self.starts[: n + 1],
                       classes=self.classes[:n], class_names=self.class_names[:n])

    def to(self, device, images=True):
        """The same data on `device`; with `images` false they stay where they are."""
        return replace(self, images=self.images.to(device) if images else self.images, labels=self.labels.to(device))


def make_tasks(images, labels, tasks, flip, samples=None, noisy_from=None, generator=None, name=str):
    """Sort rows by task and relabel each task's source labels to 0 .. C_t - 1, in the order that the task lists them.

    Args:
        images: [M, C, H, W] uint8, a tensor or whatever gives one of the rows that it is indexed by.
        labels: [M] int64 source labels.
        tasks: source labels of each task; a label may stand in several tasks.
        flip: see `TaskData`.
        samples: rows a class at most, chosen at random (None: all). The choice goes by label: a label that
            stands in two tasks brings the same rows to both.
        noisy_from: rows whose source label is this or higher get a label drawn uniformly from their task's.
        generator: its seed decides the random choices; needed with `samples` or `noisy_from`.
        name: gives the name of the class of a source label.

    Raises:
        NoRows: a label has none.
        DataError: the images cannot be read, or are too large.
    """

    def derive(*key):
        """A generator for one choice alone, so that it does not depend on which others are made."""
        digest = hashlib.sha256(repr((generator.initial_seed(), *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    rows_of = {}
    for label in sorted({label for task in tasks for label in task}):
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) == 0:
            raise NoRows(f"label {label} has no rows")
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
                    tuple(tuple(map(name, task)) for task in tasks))


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


def read_all(read, n, what):
    """Call read(0) to read(n - 1), each of which reads an image: as many at once as the run has threads.

    Pillow lets other threads run while it decodes. On a terminal a bar shows how far it is.

    Args:
        read: takes a number; where it raises `Damaged` the others are read all the same.
        n: how many there are.
        what: is read, for the bar.

    Raises:
        DataError: the first damaged one, with the count of the others and some of their names.
    """
    errors = {}

    def read_part(part):
        for i in part:
            try:
                read(i)
            except Damaged as e:
                errors[i] = str(e)
        return len(part)

    parts = [range(first, min(first + PART, n)) for first in range(0, n, PART)]
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        bar = tqdm(total=n, desc=what, unit=" images", leave=False, disable=None)
        with bar, warnings.catch_warnings(action="ignore"):  # see `load_image`; in the threads it would be too late
            for count in pool.map(read_part, parts):
                bar.update(count)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for a part, not for all
    if errors:
        first, *others = [errors[i] for i in sorted(errors)]
        some = ", ".join(line.partition(": ")[0] for line in others[:3])
        more = f"; nor are {len(others):,} more: {some}{', ...' * (len(others) > 3)}" if others else ""
        raise DataError(first + more)


def make_images(images, shape):
    """New images as the networks take them.

    Args:
        images: an array uint8 [N, H, W] or [N, H, W, C], as in an npz file; a tensor uint8 [N, C, H, W]; a list of
            single images, each an array or tensor without N, a Pillow image, or an image file (path or open), the last
            two being turned into C channels and resized to H x W (bilinear); or one such image alone.
        shape: (C, H, W).

    Returns:
        uint8 [N, C, H, W].

    Raises:
        DataError: another type or shape, or a file that is not an image.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # of paths
        images = images.tolist()
    if not isinstance(images, (list, tuple)):
        return _make_images(images, shape)
    if not images:
        raise DataError("images: the list is empty")
    made = [_make_images(image, shape) for image in images]
    i = next((i for i, image in enumerate(made) if len(image) != 1), None)
    if i is not None:
        raise DataError(f"images: number {i} of the list (counted from 0) is {len(made[i])} images, not one")
    return torch.cat(made)


def _make_images(images, shape):
    """`make_images` of anything but a list."""
    c, h, w = shape
    if isinstance(images, (str, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return torch.tensor(load_image(images, shape)).permute(2, 0, 1)[None]
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        raise DataError(f"images must be an array, a tensor, an image, a file or a list of these, not of type "
                        f"{type(images).__name__}")
    found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    single, dims = tuple(images.shape), images.ndim
    if isinstance(images, torch.Tensor):
        images, fits = (images[None], True) if single == (c, h, w) else (images, dims == 4 and single[1:] == (c, h, w))
        layout = f"[N, {c}, {h}, {w}]"
    else:
        if single == (h, w, c) or c == 1 and single == (h, w):
            images = images[None]
        fits = images.shape[1:] == (h, w, c) or c == 1 and images.shape[1:] == (h, w)
        layout = f"[N, {h}, {w}, {c}]" + f" or [N, {h}, {w}]" * (c == 1)
    if not fits or images.dtype not in (np.uint8, torch.uint8):
        raise DataError(f"images must be uint8 {layout}, as the networks were trained on, not {found}")
    if isinstance(images, np.ndarray):
        images = torch.tensor(np.ascontiguousarray(images)).view(-1, h, w, c).permute(0, 3, 1, 2)
    return images


def load_image(file, shape):
    """Read an image as a viewer shows it (`_as_shown`): uint8 [H, W, C], resized (bilinear) where of another size.

    Args:
        file: a path, or an open Pillow image.
        shape: (C, H, W), C 1 or 3.

    Raises:
        Damaged: not an image, or of more than 16 bits per channel.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of large images and of odd metadata
        return decode_image(file, shape)


def decode_image(file, shape):
    """`load_image` for a thread of `read_all`: Pillow's warnings are left alone, for they are one matter of all."""
    channels, height, width = shape
    try:
        with contextlib.nullcontext(file) if isinstance(file, Image.Image) else _open_image(file) as image:
            image.load()
            image = _as_shown(image).convert("RGB" if channels == 3 else "L")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
        why = " ".join(str(e).split())[:120]
        raise Damaged(f"{file}: not a readable image ({why}); PNG and JPEG always are") from e
    return np.asarray(image).reshape(height, width, channels)


def is_image(file):
    """Whether a file looks like an image of a kind that Pillow reads, whatever its name ends in."""
    try:
        with warnings.catch_warnings(action="ignore"), _open_image(file):
            return True
    except Exception:  # see `load_image`
        return False


def _open_image(file):
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file) and os.path.exists(file):
        raise ValueError("it is no file")  # whoever opens a pipe may wait for ever
    return Image.open(file)


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


def hash_rows(data, t):
    """A number for the image and class of each row of task t, [N_t] int64, by which it is found again elsewhere."""
    rows = slice(data.starts[t], data.starts[t + 1])
    size = data.images.shape[1:].numel()
    # Sums of products with random odd numbers, modulo 2**64: of a million rows two agree once in 10**7 data sets.
    factors = np.random.default_rng(0).integers(2**63, size=size // 8 + 2, dtype=np.uint64) * 2 + 1
    sums = [data.labels[rows].cpu().numpy().astype(np.uint64) * factors[-1]]
    for part in data.images[rows].flatten(1).split(4096):
        words = np.pad(part.cpu().numpy(), ((0, 0), (0, -size % 8))).view(np.uint64)
        sums.append((words * factors[: words.shape[1]]).sum(1, dtype=np.uint64))
    return torch.from_numpy((sums[0] + np.concatenate(sums[1:])).view(np.int64))


def find_rows(data, t, hashes):
    """Where rows of task t stand that were hashed earlier: row numbers [n] int64, or None where one is not there.

    Args:
        data: `TaskData`.
        t: index of the task.
        hashes: [n] int64, what `hash_rows` gave; a row that stood twice has to stand twice.
    """
    places = {}
    for row, number in enumerate(hash_rows(data, t).tolist(), data.starts[t]):
        places.setdefault(number, []).append(row)
    found = [places[number].pop(0) if places.get(number) else -1 for number in hashes.tolist()]
    return None if -1 in found else torch.tensor(found, dtype=torch.int64, device=data.device)


def checksum(train, test):
    """A text that tells whether two runs had the same rows, labels and tasks."""
    digest = hashlib.sha256(repr([(d.starts, d.classes, d.flip, list(d.images.shape)) for d in (train, test)]).encode())
    for data in (train, test):
        digest.update(data.images.cpu().numpy())
        digest.update(data.labels.cpu().numpy())
    return digest.hexdigest()[:16]
