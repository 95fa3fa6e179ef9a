"""Folders of images: train/<class>/* and test/<class>/*."""
from pathlib import Path

import numpy as np
import torch

from datasets.data import DataError, load_image


def load_image_folder(path, tasks, size):
    """Read the images of the classes that `tasks` name.

    Args:
        path: the folder that holds train/ and test/.
        tasks: lists of class names, or of indices into the sorted names of the folders in train/.
        size: side in pixels that every image is resized to (bilinear).

    Returns:
        splits, tasks: as `load_npz` gives them, [N, 3, size, size], and the tasks in indices.

    Raises:
        DataError: no such folder or class, or a file that is not an image; hidden files are passed over.
    """
    train, test = Path(path) / "train", Path(path) / "test"
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; an image_folder holds train/<class>/* and test/<class>/*")
    names = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))
    indices = []
    for i, task in enumerate(tasks):
        for label in task:
            if label not in names if isinstance(label, str) else label >= len(names):
                raise DataError(f"{train}: no class {label}, which task {i} (counted from 0) lists; "
                                f"there are {len(names)}: {', '.join(names)[:200]}")
        indices.append(tuple(names.index(label) if isinstance(label, str) else label for label in task))
        if len(set(indices[-1])) < len(task):
            raise DataError(f"{train}: task {i} (counted from 0) lists a class both by name and by index")
    labels = sorted({label for task in indices for label in task})
    label_of = {names[label]: label for label in labels}
    return tuple(_load_split(folder, label_of, size) for folder in (train, test)), indices


def _load_split(folder, label_of, size):
    images, labels = [], []
    for name, label in label_of.items():
        files = sorted(p for p in (folder / name).glob("*") if not p.name.startswith("."))
        if not files:
            raise DataError(f"{folder / name}: no images of this class")
        for file in files:
            images.append(load_image(file, (3, size, size)))
            labels.append(label)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels)
