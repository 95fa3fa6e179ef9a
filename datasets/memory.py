"""Room for images: in memory, or, where they would take too much of it, in a file that is mapped into memory."""
import contextlib
import math
import mmap
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch

from datasets.data import DataError

SHARE = 0.75  # of the free memory that one split's images may take; training wants the rest


def allocate(shape, what, folder):
    """An empty uint8 tensor, which is used the same way wherever it lies.

    One larger than `SHARE` of the free memory is a file without a name, mapped into memory: the system keeps as much of
    it in memory as there is room for, and reads and writes the rest. It is gone when the process ends, however it ends.

    Args:
        shape: of the tensor.
        what: it is for, in messages.
        folder: where the file may be (None: nowhere); else in the system's folder for temporary files.

    Raises:
        DataError: neither memory nor disk suffice; the line says for `what`, and how much is needed.
    """
    size, free = math.prod(shape), free_memory()
    text = f"{what} of {' x '.join(map(str, shape[1:]))} take {size / 1e9:.1f} GB"
    if size > SHARE * free:
        for find in (lambda: folder, tempfile.gettempdir):
            with contextlib.suppress(OSError, OverflowError):
                if (place := find()) is None:
                    continue
                images = _map(shape, place)
                print(f"{text}, and {free / 1e9:.1f} GB of memory are free: kept in a file below {place} while the "
                      "run lasts", file=sys.stderr)
                return images
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as e:
        raise DataError(f"{text}, more than there is memory for; try --samples, fewer tasks or smaller images") from e


def _map(shape, folder):
    """An uint8 tensor whose bytes are a file in `folder`; an `OSError` where the disk has no room for it."""
    size = math.prod(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would end the process without a word
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8).view(shape)


def free_memory():
    """Bytes that this process may still take: of the machine, of its control groups (containers), of `ulimit -d`."""
    found = [math.inf]
    with contextlib.suppress(OSError, KeyError, ValueError):
        found.append(1024 * int(_read_table("/proc/meminfo")["MemAvailable:"]))
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, KeyError, ValueError):
            found.append(limit - 1024 * int(_read_table("/proc/self/status")["VmData:"]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                group = Path("/sys/fs/cgroup", kinds, path.strip("/"))
                found += [_free_in_group(g) for g in (group, *group.parents) if g.is_relative_to("/sys/fs/cgroup")]
    return max(min(found), 0)


def _free_in_group(group):
    """Bytes that a control group (of version 2 or 1) may still take, its cached files not counted as taken."""
    for limit, used, prefix in (("memory.max", "memory.current", ""),
                                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or "max"
            table = _read_table(group / "memory.stat")
            cached = sum(int(table[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            return int((group / limit).read_text()) - int((group / used).read_text()) + cached
    return math.inf


def _read_table(path):
    """The first two words of each line of a file, as a dict."""
    return dict(line.split()[:2] for line in Path(path).read_text().splitlines() if len(line.split()) > 1)
