"""Folders of images: train/<class>/* and test/<class>/*."""
import contextlib
import errno
import json
import math
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import torch
from PIL import Image

from datasets.data import DataError
from datasets.images import decode_image, is_image, read_all
from datasets.memory import allocate


def load_image_folder(path, tasks, size, data_dir):
    """Read the images of the classes that `tasks` name.

    Args:
        path: the folder that holds train/ and test/, or val/ or valid/ where there is no test/.
        tasks: lists of class names, or of indices into the sorted names of the folders in train/. Names are compared
            as people see them (`visible`).
        size: side in pixels that every image is resized to (bilinear).
        data_dir: where decoded images are kept if not beside train/ and test/.

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
        name = f"{split.name}-{size}"
        elsewhere = quote(os.path.relpath(path, data_dir), safe="", errors="replace")
        caches = [Path(path) / f".modelzoo-{name}", Path(data_dir) / f".modelzoo-{elsewhere}-{name}"]
        images = FolderImages(split, [file for of_class in files for file in of_class], size, caches)
        loaded.append((images, torch.tensor(labels).repeat_interleave(counts)))
    if passed_over:
        print(f"{path}: {len(passed_over)} files that are no images were passed over, such as "
              f"{ascii(passed_over[0])[1:-1]}", file=sys.stderr)
    return tuple(loaded), indices, names


def visible(name):
    """`name` as people see it: letters composed as one sign each, any white space as a blank, signs of no width gone.

    File systems and keyboards write one and the same name in different ways: macOS stores é as e and an accent.
    """
    if name.isascii() and name.isprintable():
        return " ".join(name.split())
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
                    f"there are {len(names)}: {', '.join(names)[:200]}")


class FolderImages:
    """Image files, decoded when rows of them are asked for; what was decoded is kept in a cache, for the next run.

    A cache is a line of JSON, with name, bytes and modification time of each file, and their images one after another.

    Args:
        split: the folder below which the files lie.
        files: their paths, texts that begin with `split`.
        size: side in pixels that every image is resized to (bilinear).
        caches: where a cache may be; it is written to the first place that lets it.

    Attributes:
        shape: (N, 3, size, size).
    """

    def __init__(self, split, files, size, caches):
        self.split, self.files, self.caches = split, files, caches
        self.shape = (len(files), 3, size, size)

    def __getitem__(self, rows):
        """uint8 [n, 3, size, size] of `rows`, [n] int64; a `DataError` that counts the files that cannot be read."""
        _, c, h, w = self.shape
        images = allocate((len(rows), c, h, w), f"{self.split}: {len(rows):,} images", self.caches[-1].parent).numpy()
        places = {}  # of a row in `images`, the first one where it stands there twice
        for i, row in enumerate(rows.tolist()):
            places.setdefault(row, i)
        with contextlib.ExitStack() as stack:
            kept = self._open_caches(stack)
            keys = {row: _key(self.split, self.files[row].removeprefix(f"{self.split}{os.sep}")) for row in places}
            missing = [row for row in places if keys[row] not in kept]
            for row, place in places.items():
                if keys[row] in kept:
                    _read_kept(kept[keys[row]], images[place])

            def decode(i):
                row = missing[i]
                images[places[row]] = decode_image(self.files[row], (c, h, w)).transpose(2, 0, 1)

            read_all(decode, len(missing), f"{self.split.name}: images")
            if missing:
                self._keep(images, {keys[row]: place for row, place in places.items()}, kept)
        for i, row in enumerate(rows.tolist()):
            if places[row] != i:
                images[i] = images[places[row]]
        return torch.from_numpy(images)

    def _open_caches(self, stack):
        """What is kept: (name, bytes, time) of a file to an open cache and the position of its image in it."""
        kept = {}
        for path in self.caches:
            with contextlib.suppress(OSError, ValueError, TypeError):  # none, or one that is damaged: written anew
                cache = stack.enter_context(open(path, "rb"))  # noqa: SIM115
                keys = [(name, *numbers) for name, *numbers in json.loads(cache.readline())]
                first, step = cache.tell(), math.prod(self.shape[1:])
                if os.fstat(cache.fileno()).st_size == first + len(keys) * step:
                    kept = {key: (cache, first + i * step) for i, key in enumerate(keys)} | kept
        return kept

    def _keep(self, images, places, kept):
        """Write a cache, whole or not at all; where no place lets it be written, a line says so.

        Args:
            images: uint8, an array.
            places: where the image of a key is in `images`.
            kept: see `_open_caches`; those whose files are as they were go into the new cache, too.
        """
        others = [(key, at) for key, at in kept.items() if key not in places and key == _key(self.split, key[0])]
        line = json.dumps([*places, *(key for key, _ in others)]).encode() + b"\n"
        image = bytearray(math.prod(self.shape[1:]))
        for path in self.caches:
            part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
            try:
                if shutil.disk_usage(path.parent).free < len(line) + (len(places) + len(others)) * len(image):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with open(part, "wb") as file:
                    file.write(line)
                    for place in places.values():
                        file.write(images[place])
                    for _, at in others:
                        _read_kept(at, image)
                        file.write(image)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
                return
            except OSError as e:
                why = e.strerror
            finally:
                with contextlib.suppress(OSError):  # it has its name by now, or never will
                    part.unlink()
        print(f"{self.split}: the decoded images cannot be kept for the next run, in {self.caches[0]} or "
              f"{self.caches[1]} ({why})", file=sys.stderr)


def _key(split, name):
    """What tells whether a file is the one that was decoded: its name below `split`, bytes and time of modification.

    None where there is no such file.
    """
    try:
        about = os.stat(os.path.join(split, name))
    except (OSError, ValueError):
        return None
    return name, about.st_size, about.st_mtime_ns


def _read_kept(at, image):
    """Fill `image`, as many bytes as it has, from a position in a cache that is open."""
    cache, position = at
    try:
        cache.seek(position)
        whole = cache.readinto(image) == memoryview(image).nbytes
    except OSError as e:
        raise DataError(f"{cache.name}: cannot be read ({e.strerror}); without it the images are decoded anew") from e
    if not whole:
        raise DataError(f"{cache.name}: it ends too early; without it the images are decoded anew")


def _image_files(folder, passed_over):
    """The image files below a class's folder; others are added to `passed_over`."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for file in _files(folder):
        if os.path.splitext(file)[1].lower() in readable | {".heic", ".heif"} or is_image(file):
            found.append(file)
        else:
            passed_over.append(file)
    if not found:
        raise DataError(f"{folder}: no images of this class")
    return found


def _files(folder):
    """All files below a folder, in the order of their visible paths; hidden files and folders are passed over.

    Raises:
        DataError: a folder that cannot be read, or that a link leads to a second time.
    """

    def refuse(e):
        raise DataError(f"{e.filename}: cannot be read ({e.strerror})") from e

    found, places = [], {}
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(root)
        if place in places:
            raise DataError(f"{root}: the same folder as {places[place]}, whose images would count twice; "
                            "take the link out")
        places[place] = root
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: (visible(file.removeprefix(f"{folder}{os.sep}")), file))
