"""Tasks as tensors: uint8 rows sorted by task; a subset is an index."""
import hashlib
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


class DataError(Exception):
    """Data that are missing, damaged or of the wrong shape, told in one line that names the file."""


class NoRows(DataError):
    """A label of which a split has none."""


def one_line(text, limit=200):
    """`text`, or what an exception says, without line breaks: at most `limit` characters."""
    return " ".join(str(text).split())[:limit]


@dataclass(frozen=True)
class TaskData:
    """The rows of all tasks, of one split (train, test, val), on one device; images too many for it stay on the host.

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


def checksum(*splits):
    """A text that tells whether two runs had the same rows, labels and tasks in their splits (`TaskData`)."""
    digest = hashlib.sha256(repr([(d.starts, d.classes, d.flip, list(d.images.shape)) for d in splits]).encode())
    for data in splits:
        digest.update(data.images.cpu().numpy())
        digest.update(data.labels.cpu().numpy())
    return digest.hexdigest()[:16]
