"""Folders of images: train/<class>/* and test/<class>/*."""
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.data import DataError, load_image


def load_image_folder(path, tasks, size):
    """Read the images of the classes that `tasks` name.

    Args:
        path: the folder that holds train/ and test/, or val/ where there is no test/.
        tasks: lists of class names, or of indices into the sorted names of the folders in train/. Names are compared
            as people see them (`visible`).
        size: side in pixels that every image is resized to (bilinear).

    Returns:
        splits, tasks: as `load_npz` gives them, [N, 3, size, size], and the tasks in indices.
        names: of the classes, a text per index.

    Raises:
        DataError: no such folder or class, an index that is another folder's name, or an image that cannot be read.
            Hidden files are passed over, and with one line those that are no images.
    """
    splits = [Path(path) / "train", Path(path) / "test"]
    if not splits[1].is_dir():
        splits[1] = next((p for p in (Path(path) / "val", Path(path) / "valid") if p.is_dir()), splits[1])
    folders = [_class_folders(split) for split in splits]
    names = list(folders[0])
    indices = [tuple(_find(splits[0], names, label, i) for label in task) for i, task in enumerate(tasks)]
    for i, task in enumerate(indices):
        if len(set(task)) < len(task):
            raise DataError(f"{splits[0]}: task {i} (counted from 0) lists a class twice, by name and by index")
    labels, passed_over = sorted({label for task in indices for label in task}), []
    loaded = []
    for split, found in zip(splits, folders, strict=True):
        missing = next((names[label] for label in labels if names[label] not in found), None)
        if missing is not None:
            raise DataError(f"{split / missing}: no such folder, though {splits[0]} has this class")
        loaded.append(_load_split([(found[names[label]], label) for label in labels], size, passed_over))
    if passed_over:
        print(f"{path}: {len(passed_over)} files that are no images were passed over, such as "
              f"{ascii(str(passed_over[0]))[1:-1]}", file=sys.stderr)  # fmt: skip
    return tuple(loaded), indices, names


def visible(name):
    """`name` as people see it: letters composed as one sign each, any white space as a blank, signs of no width gone.

    File systems and keyboards write one and the same name in different ways: macOS stores é as e and an accent.
    """
    name = "".join(" " if c.isspace() else c for c in name if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFC", name).split())


def _class_folders(split):
    """The class folders of a split by their visible names, in the order of these."""
    if not split.is_dir():
        raise DataError(f"{split}: no such folder; an image_folder holds train/<class>/* and test/<class>/* (or val/)")
    folders = [p for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")]
    found = {}
    for folder in sorted(folders, key=lambda p: visible(p.name)):
        name = visible(folder.name)
        if name in found:
            raise DataError(f"{split}: the folders {ascii(found[name].name)} and {ascii(folder.name)} look alike")
        found[name] = folder
    return found


def _find(split, names, label, i):
    """The index of the class that task `i` calls `label`."""
    if isinstance(label, str):
        if visible(label) in names:
            return names.index(visible(label))
    else:
        # "07" and "7", too: whoever writes 7 may mean either.
        namesake = next((name for name in names if name.isdecimal() and int(name) == label), None)
        if namesake is not None and names[label : label + 1] != [namesake]:
            of = f"is the index of the class {names[label]}" if label < len(names) else "is no index"
            raise DataError(f"{split}: task {i} (counted from 0) lists {label}, which {of}, and there is a class "
                            f"{namesake}; write '{namesake}' in quotes if that is meant, as all names in digits")
        if label < len(names):
            return label
    raise DataError(f"{split}: no class {label}, which task {i} (counted from 0) lists; "
                    f"there are {len(names)}: {', '.join(names)[:200]}")  # fmt: skip


def _load_split(classes, size, passed_over):
    """Images and labels of (folder, label) pairs; files that are no images are added to `passed_over`."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, labels = [], []
    for folder, label in classes:
        before = len(images)
        for file in _files(folder):
            try:
                images.append(load_image(file, (3, size, size)))
                labels.append(label)
            except DataError:
                if file.suffix.lower() in readable | {".heic", ".heif"}:
                    raise
                passed_over.append(file)
        if len(images) == before:
            raise DataError(f"{folder}: no images of this class")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _files(folder):
    """All files below a folder, in the order of their visible paths; hidden files and folders are passed over."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda p: (visible(str(p.relative_to(folder))), p))
