"""Image files and arrays as uint8 pixels, read as a viewer shows them."""
import contextlib
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from datasets.data import DataError, one_line

PART = 16  # images that a thread reads before it says so


class Damaged(DataError):
    """An image that cannot be read, among others that may be; the line opens with the file and a colon."""


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
        file: a path, an open file, or an open Pillow image.
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
        why = one_line(e, 120)
        raise Damaged(f"{file}: not a readable image ({why}); PNG and JPEG always are") from e
    return np.asarray(image).reshape(height, width, channels)


def is_image(file):
    """Whether a file looks like an image of a kind that Pillow reads, whatever its name ends in."""
    try:
        with warnings.catch_warnings(action="ignore"), _open_image(file):
            return True
    except Exception:  # see `decode_image`
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
    # "I" is what Pillow before 11 makes of 16 bits in a PNG, and of those in a PGM.
    sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
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
