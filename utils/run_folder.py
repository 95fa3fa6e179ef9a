"""The run folder: files that are whole or not there, one writer, settings that a resumed run has to share."""
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import reprlib
import subprocess
import sys
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from utils.config_files import HYPER_OPTIONAL, ConfigError, dump_yaml, load_yaml
from utils.device import out_of_memory

# Settings that may change when a run is resumed: those that decide nothing, and files, which count by what they say.
MAY_CHANGE = ("resume", "dry_run", "out", "name", "data_dir", "tensorboard", "extend", "data_config",
              "hp_config", "capture")
# Settings that older runs did not record, and what they were.
LATER = {"task_order": 0, "inherit": False, "weigh_by_round": False,
         **dict.fromkeys(("val_frac", "keywords", "flip")),
         **{key: default for key, (_, default) in HYPER_OPTIONAL.items()}}
# What a file system says of a call that it does not have: those of clusters, of other systems and in memory lack some.
LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
SEAL = b"sha256:"  # a tensor file ends in this and the checksum of all before it


class RunError(Exception):
    """A run that cannot go on, told in one line that says what is safe and what to try."""


@contextlib.contextmanager
def naming_memory(line):
    """Where memory runs out inside, on whichever device, raise a `RunError`: `line`, and how much was asked for."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        size = re.search(r"allocate (\d[\d.]* \w+)", str(e))
        raise RunError(line + (f" ({size[1]} were asked for)" if size else "")) from e


def write_file(path, data):
    """Write bytes to `path` so that it holds all of them or is as it was: temporary name, flush to disk, rename.

    A link stays one, and what it leads to is written.

    Raises:
        RunError: the disk is full, the folder read-only or gone, or `path` a device, which the rename would replace.
    """
    real = Path(os.path.realpath(path))
    part = real.with_name(f".{real.name}.part")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it exists and is no file")
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            with passing_over("flushing files to disk", "after a power cut the last ones may be damaged"):
                os.fsync(file.fileno())
        os.replace(part, real)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RunError(f"{path}: cannot be written ({e.strerror}); what was written before it is safe") from e
    # The new name itself. The file is whole, and a name that a power cut takes back is at worst a learner's.
    with contextlib.suppress(OSError):
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def passing_over(what, risk):
    """Go on where the file system lacks a call; the first time, say so and what that risks."""
    try:
        yield
    except (OSError, NotImplementedError) as e:
        if isinstance(e, OSError) and e.errno not in LACKING:
            raise
        if what not in _said:
            _said.add(what)
            print(f"note: this file system does not support {what}: {risk}", file=sys.stderr)


_said = set()


def save_tensors(path, tree):
    """Write dicts, lists, numbers, texts and tensors to `path`, as `write_file` does, sealed with a checksum.

    Raises:
        RunError: see `write_file`.
    """
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    data = buffer.getvalue()
    write_file(path, data + SEAL + hashlib.sha256(data).digest())


def load_tensors(path, device):
    """Read what `save_tensors` wrote, onto `device`; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not such a file.
    """
    data, seal, digest = path.read_bytes().rpartition(SEAL)
    if not seal or hashlib.sha256(data).digest() != digest:
        raise ValueError("damaged")
    try:
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # the file is whole
    except Exception as e:  # whole, but of another program: torch raises nearly anything on it
        raise ValueError("not a learner's file") from e


def is_whole(path):
    """Whether `load_tensors` reads the file: it is there and not damaged."""
    try:
        load_tensors(path, "cpu")
    except (FileNotFoundError, ValueError):
        return False
    return True


def load_or_set_aside(path, log):
    """What `save_tensors` wrote to `path`; None where there is none or, reported and set aside, a damaged one.

    Raises:
        RunError: the file is there and cannot be read, or not be renamed.
    """
    try:
        return load_tensors(path, "cpu")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        set_aside(path, e, log)
        return None


def set_aside(path, why, log):
    """Rename a file that cannot be used, and say so and why; a `RunError` where the disk refuses."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as e:
        raise RunError(f"{path}: {why}, and cannot be renamed ({e.strerror})") from e
    log.print(f"{path}: {why}; kept as {aside.name}, trained again")


def check_folder(folder, settings, resume, inside="learners"):
    """Refuse a run folder that this run may not write; arguments as of `open_folder`. Nothing is written.

    Returns:
        Whether there is a run to go on with.

    Raises:
        ConfigError: the folder is there and `resume` is not given, it is not a run's, or its settings differ.
        RunError: it cannot be read.
    """
    config, made_here = folder / "config.yaml", {"lock", inside, ".config.yaml.part"}
    try:
        if os.path.lexists(folder) and not (resume and folder.is_dir()):
            way = "it is not a run folder; take" if resume else "--resume goes on with it; or take"
            raise ConfigError(f"{folder} already exists: {way} another --name or --out")
        if config.exists():
            _compare_settings(folder, settings, load_yaml(config).get("settings"))
        elif folder.exists() and not {p.name for p in folder.iterdir()} <= made_here:
            raise ConfigError(f"{folder} is not a run folder: it has no config.yaml; take another --name")
        return config.exists()
    except OSError as e:
        raise RunError(f"{folder}: cannot be read ({e.strerror})") from e


@contextlib.contextmanager
def open_folder(folder, settings, resume, origin, inside="learners"):
    """Hold a run folder as its only writer: make it and its config.yaml, or go on with one of the same settings.

    Args:
        folder: path of the run folder.
        settings: what decides the run, as plain values.
        resume: whether an existing folder is to be gone on with.
        origin: what else its config.yaml is to say: the hardware in words, ...
        inside: name of the folder in it that holds what is trained.

    Raises:
        ConfigError: see `check_folder`; or another process is writing it.
        RunError: the folder cannot be written.
    """
    check_folder(folder, settings, resume, inside)
    lock = FileLock(folder / "lock", timeout=0)  # ends with this process, however that ends
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(exist_ok=resume)
        except FileExistsError as e:
            raise ConfigError(f"{folder}: another process has just made it; take another --name") from e
        (folder / inside).mkdir(exist_ok=True)
        warned = warnings.catch_warnings(action="ignore")  # newer filelocks warn, and let the file itself be the lock
        with passing_over("locks", "start no other run in this folder meanwhile"), warned:
            lock.acquire()
    except FileExistsError as e:
        raise ConfigError(f"{e.filename}: exists and is no folder; take another --out") from e
    except Timeout as e:
        raise ConfigError(f"{folder}: another process is writing it; wait for it or take another --name") from e
    except OSError as e:
        raise RunError(f"{folder}: cannot be made or written ({e.strerror})") from e
    try:
        if not check_folder(folder, settings, resume=True, inside=inside):
            about = {"settings": settings, "versions": versions(), "commit": commit(), **origin}
            write_file(folder / "config.yaml", dump_yaml(about, default_flow_style=None).encode())
        yield
    finally:
        lock.release()


def _compare_settings(folder, mine, theirs):
    if not isinstance(theirs, dict):
        raise ConfigError(f"{folder / 'config.yaml'}: key settings is missing; take another --name")
    older = {"threads", "weights_data", "val_data"} - theirs.keys()  # which runs did not record at first
    theirs = LATER | theirs
    for key in (*mine, *theirs):
        if key not in (*MAY_CHANGE, *older) and mine.get(key, 0) != theirs.get(key):
            was, now = (reprlib.repr(values.get(key)) for values in (theirs, mine))
            raise ConfigError(f"--resume: {folder} was run with {key} {was}, not {now}; take another --name")


def record(settings, device, precision):
    """The settings as JSON and YAML know them, with the device, precision and threads that stand for the defaults."""
    chosen = {"device": device.type, "precision": precision, "threads": torch.get_num_threads()}
    return json.loads(json.dumps(asdict(settings) | chosen))


def versions():
    """The versions that a result depends on."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in ("torch", "numpy")}}


def commit():
    """This code's git commit, with a + where files differ from it; None outside a git checkout."""
    here = Path(__file__)
    # A git hook sets these, for its own repository.
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}

    def git(*words):
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # unpacked inside another repository, it is not of its commit
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
