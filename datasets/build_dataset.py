"""From a dataset's name to its tasks."""
import itertools
import os
from dataclasses import replace
from pathlib import Path

import torch

from datasets.cifar import CIFAR10, CIFAR100, NOISY, load_cifar10, load_cifar100
from datasets.data import DataError, NoRows, make_tasks
from datasets.digits import load_digits
from datasets.memory import allocate
from datasets.mini_imagenet import load_mini_imagenet
from datasets.mnist import load_mnist
from datasets.modmnist import modify
from datasets.npz import load_npz, load_val

PHOTOGRAPHS = ("cifar10", "cifar100", "mini_imagenet", "image_folder")  # a mirrored one still shows its class


def load_splits(dataset, tasks, data_dir, path=None, size=None, keywords=None):
    """Load the rows that a dataset's tasks are cut from; no seed and no `samples` has a part in it.

    Args:
        dataset: a name of the table in docs/data.md.
        tasks: source labels of each task.
        data_dir: where the data lie or are downloaded to.
        path: of npz and image_folder, below data_dir.
        size: of image_folder and torchvision, side in pixels.
        keywords: of torchvision, see `load_vision`.

    Returns:
        splits: (train_images, train_labels), (test_images, test_labels): uint8 [N, C, H, W] and int64 [N]. Images of
            files that may be large are read when they are indexed by rows.
        tasks: their source labels as the rows have them: an image folder's class names are numbers by now.
        names: of the classes, by source label; None where the data have none and the label has to do.

    Raises:
        DataError: data missing or damaged.
    """
    labels, names = {label for task in tasks for label in task}, None
    if dataset in ("rotated_mnist", "permuted_mnist", "rotated_digits"):
        names = [str(label % 10) for label in range(max(labels) + 1)]
    match dataset:
        case "cifar10":
            splits, names = load_cifar10(data_dir), CIFAR10
        case "cifar100":
            splits = load_cifar100(data_dir, labels)
            names = CIFAR100 + [f"{name} (random labels)" for name in CIFAR100]
        case "mnist":
            splits = load_mnist(data_dir)
        case "rotated_mnist":
            splits = modify(load_mnist(data_dir), labels, "rotated")
        case "permuted_mnist":
            splits = modify(load_mnist(data_dir), labels, "permuted")
        case "mini_imagenet":
            splits, names = load_mini_imagenet(data_dir)
        case "digits" | "rotated_digits":
            splits = load_digits() if dataset == "digits" else modify(load_digits(), labels, "rotated")
        case "npz":
            splits = load_npz(inside(data_dir, path))
        case "image_folder":
            from datasets.folder import load_image_folder

            splits, tasks, names = load_image_folder(inside(data_dir, path), tasks, size, data_dir)
        case "torchvision":
            from datasets.vision import load_vision

            splits, names = load_vision(keywords, data_dir, size)
        case _:
            raise DataError(f"no dataset is called {dataset}")
    return splits, tasks, names


def build_dataset(dataset, tasks, data_dir, generator, samples=None, path=None, size=None, loaded=None,
                  keywords=None, flip=None):
    """Load a dataset and cut it into tasks.

    Args:
        dataset, tasks, data_dir, path, size, keywords: see `load_splits`.
        generator: chooses the `samples` and the random labels of noisy classes.
        samples: training rows a class at most (None: all); test rows are never thinned.
        loaded: what `load_splits` gave, where the caller has it already (None: load it).
        flip: whether a mirrored image still shows its class (None: it does in photographs and image folders).

    Returns:
        train, test: `TaskData` on the CPU.

    Raises:
        DataError: data missing, damaged or without one of the labels.
    """
    splits, tasks, names = loaded or load_splits(dataset, tasks, data_dir, path, size, keywords)
    noisy_from = NOISY if dataset == "cifar100" else None
    flip = dataset in PHOTOGRAPHS if flip is None else flip
    names = dict(enumerate(names or ()))
    (train_images, train_labels), (test_images, test_labels) = splits

    def name_of(label):
        return names.get(label, str(label))

    try:
        split = "training"
        train = make_tasks(train_images, train_labels, tasks, flip, samples, noisy_from, generator, name_of)
        split = "test"
        return train, make_tasks(test_images, test_labels, tasks, flip, name=name_of)
    except NoRows as e:
        raise DataError(f"{path or dict(keywords or ()).get('name', dataset)}: {e} among the {split} images") from e


def load_whole(*data):
    """As `load_splits`, with the images of the tasks' labels in memory: other processes may read them there."""
    splits, tasks, names = load_splits(*data)
    labels = torch.tensor(sorted({label for task in tasks for label in task}))
    whole = []
    for images, targets in splits:
        rows = torch.isin(targets, labels).nonzero().squeeze(1)
        whole.append((images[rows], targets[rows]))
    return tuple(whole), tasks, names


def build_val(train, tasks, data_dir, path):
    """The rows that an npz file brings for validation, as `TaskData` on the CPU.

    Args:
        train: `TaskData` of its training rows.
        tasks, data_dir, path: as for `build_dataset`.

    Raises:
        DataError: it has none, or none of a label, or images of another size.
    """
    found = load_val(inside(data_dir, path))
    if found is None:
        raise DataError(f"--val_frac: file: {path} has no val_images and val_labels; give a share, such as 0.1")
    try:
        return make_tasks(*found, tasks, train.flip)
    except NoRows as e:
        raise DataError(f"{path}: {e} among the val images") from e


def hold_out(train, share=0.2, folder=None):
    """Split training rows in two, class by class, so that settings can be compared without a test row.

    Of every class of every task rows at equal distances are held out, its last one among them, whatever the seed: a
    label that stands in two tasks brings the same rows, in the same order, to both, so both hold out the same ones.
    Randomised labels are those of the classes drawn, so there what is held out goes by the draw, and by the seed.

    Args:
        train: `TaskData` of the training rows, on the CPU.
        share: of a class's rows, in (0, 1), rounded; at least one row, and not all.
        folder: where images may lie that are too many for the memory (`datasets.memory`).

    Returns:
        fit, held_out: `TaskData`; together all rows of `train`.

    Raises:
        DataError: a class has a single row, or there is no room for the images.
    """
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for t, (first, last) in enumerate(itertools.pairwise(train.starts)):
        for c in range(train.classes[t]):
            of_class = first + (train.labels[first:last] == c).nonzero().squeeze(1)
            if len(of_class) == 0:  # random labels may leave a class out
                continue
            if len(of_class) == 1:
                raise DataError(f"class {c} of task {t} has a single training row: none can be held out beside it; "
                                "raise --samples, or leave that class out")
            n = min(max(1, round(share * len(of_class))), len(of_class) - 1)
            held[of_class[torch.arange(1, n + 1) * len(of_class) // n - 1]] = True

    def subset(chosen):
        rows = chosen.nonzero().squeeze(1)
        images = allocate((len(rows), *train.images.shape[1:]), f"{len(rows):,} images", folder)
        torch.index_select(train.images, 0, rows, out=images)
        starts = torch.searchsorted(rows, torch.tensor(train.starts)).tolist()
        return replace(train, images=images, labels=train.labels[rows], starts=tuple(starts))

    return subset(~held), subset(held)


def inside(data_dir, path):
    """`path` below `data_dir`: a config that somebody sent reads nothing elsewhere, but where links there lead."""
    path = os.path.expanduser(path)
    whole = Path(data_dir) / path
    try:
        if "\\" in path and not whole.exists():  # written on Windows
            whole = Path(data_dir) / (path := path.replace("\\", "/"))
        whole.exists()
    except (OSError, ValueError, RuntimeError) as e:  # a path too long, with a null in it, a loop of links
        raise DataError(f"path: {path!r:.80} is not one that a file can have") from e
    if Path(path).is_absolute():
        below = Path(path).is_relative_to(Path(data_dir).absolute())
        rest = f"write {Path(path).relative_to(Path(data_dir).absolute())}" if below else "set --data_dir for it"
        raise DataError(f"path: {path} is absolute; it is taken below --data_dir, {data_dir}: {rest}")
    if os.path.normpath(path).split(os.sep)[0] == "..":
        raise DataError(f"path: {path} leads out of {data_dir}; it is taken below --data_dir")
    return whole
