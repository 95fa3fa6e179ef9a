"""Folders of images: train/<class>/* and test/<class>/*."""
import os
import sys
import unicodedata
from pathlib import Path

import torch
from PIL import Image

from datasets.data import DataError, allocate, is_image, load_image


def load_image_folder(path, tasks, size):
    """Read the images of the classes that `tasks` name.

    Args:
        path: the folder that holds train/ and test/, or val/ where there is no test/.
        tasks: lists of class names, or of indices into the sorted names of the folders in train/. Names are compared
            as people see them (`visible`).
        size: side in pixels that every image is resized to (bilinear).

    Returns:
        splits: (images, labels), (images, labels), as of `load_npz`: `FolderImages` and int64 [N].
        tasks: with indices for labels.
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
    labels, passed_over, loaded = sorted({label for task in indices for label in task}), [], []
    for split, found in zip(splits, folders, strict=True):
        missing = next((names[label] for label in labels if names[label] not in found), None)
        if missing is not None:
            raise DataError(f"{split / missing}: no such folder, though {splits[0]} has this class")
        files = [_image_files(found[names[label]], passed_over) for label in labels]
        counts = torch.tensor(list(map(len, files)))
        images = FolderImages([file for of_class in files for file in of_class], size)
        loaded.append((images, torch.tensor(labels).repeat_interleave(counts)))
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


class FolderImages:
    """Image files, read when rows of them are asked for.

    Attributes:
        shape: (N, 3, size, size).
    """

    def __init__(self, files, size):
        self.files = files
        self.shape = (len(files), 3, size, size)

    def __getitem__(self, rows):
        """uint8 [n, 3, size, size] of `rows`, [n] int64; a `DataError` where a file cannot be read."""
        _, c, h, w = self.shape
        images = allocate((len(rows), c, h, w), f"{len(rows):,} images")
        for i, row in enumerate(rows.tolist()):
            images[i] = torch.tensor(load_image(self.files[row], (c, h, w))).permute(2, 0, 1)
        return images


def _image_files(folder, passed_over):
    """The image files below a class's folder; others are added to `passed_over`."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for file in _files(folder):
        if file.suffix.lower() in readable | {".heic", ".heif"} or is_image(file):
            found.append(file)
        else:
            passed_over.append(file)
    if not found:
        raise DataError(f"{folder}: no images of this class")
    return found


def _files(folder):
    """All files below a folder, in the order of their visible paths; hidden files and folders are passed over."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda p: (visible(str(p.relative_to(folder))), p))
