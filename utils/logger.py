"""The run folder and what people watch: files written whole or not at all, bars, lines and tables."""
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import reprlib
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from rich import box, progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from utils.config import ConfigError, dump_yaml, load_yaml

# Settings that may change when a run is resumed: those that decide nothing, and files, which count by what they say.
FREE = ("resume", "out", "name", "data_dir", "tensorboard", "extend", "data_config", "hp_config")
SEAL = b"sha256:"  # a tensor file ends in this and the checksum of all before it


class RunError(Exception):
    """A run that cannot go on, told in one line that says what is safe and what to try."""


def write_file(path, data):
    """Write bytes to `path` so that it holds all of them or is as it was: temporary name, flush to disk, rename.

    Raises:
        RunError: the disk is full, the folder read-only or gone.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RunError(f"{path}: cannot be written ({e.strerror}); what was written before it is safe") from e


@contextlib.contextmanager
def open_run(folder, settings, resume, hardware, inside="learners"):
    """Hold a run folder as its only writer: make it and its config.yaml, or go on with one of the same settings.

    Args:
        folder: path of the run folder.
        settings: what decides the run, as plain values.
        resume: whether an existing folder is to be gone on with.
        hardware: what the run computes on, in words.
        inside: name of the folder in it that holds what is trained.

    Raises:
        ConfigError: the folder is there and `resume` is not given, it is not a run's, its settings differ, or another
            process is writing it.
        RunError: the folder cannot be written.
    """
    config, made_here = folder / "config.yaml", {"lock", inside, ".config.yaml.part"}
    try:
        if os.path.lexists(folder) and not (resume and folder.is_dir()):
            raise FileExistsError
        if folder.exists() and not config.exists() and not {p.name for p in folder.iterdir()} <= made_here:
            raise ConfigError(f"{folder} is not a run folder: it has no config.yaml; take another --name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=resume)
        (folder / inside).mkdir(exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115 (closed below)
    except FileExistsError as e:
        way = "it is not a run folder; take" if resume else "--resume goes on with it, or take"
        raise ConfigError(f"{folder} is there already: {way} another --name or --out") from e
    except OSError as e:
        raise RunError(f"{folder}: cannot be made or written ({e.strerror})") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
        except OSError as e:
            raise ConfigError(f"{folder}: another process is writing it; wait for it or take another --name") from e
        if config.exists():
            _compare_settings(folder, settings, load_yaml(config).get("settings"))
        else:
            about = {"settings": settings, "versions": versions(), "commit": commit(), "hardware": hardware}
            write_file(config, dump_yaml(about, default_flow_style=None).encode())
        yield


def _compare_settings(folder, mine, theirs):
    if not isinstance(theirs, dict):
        raise ConfigError(f"{folder / 'config.yaml'}: key settings is missing; take another --name")
    for key in (*mine, *theirs):
        if key not in FREE and mine.get(key) != theirs.get(key):
            was, now = (reprlib.repr(values.get(key)) for values in (theirs, mine))
            raise ConfigError(f"--resume: {folder} was run with {key} {was}, not {now}; take another --name")


def versions():
    """The versions that a result depends on."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in ("torch", "numpy")}}


def commit():
    """This code's git commit, with a + where files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed.stdout.strip())


def describe_hardware(device):
    """What a run on `device` computes on, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"


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


def load_whole(path, device, log):
    """What `save_tensors` wrote to `path`; None where there is none or, reported and set aside, a damaged one.

    Raises:
        RunError: the file is there and cannot be read, or not be renamed.
    """
    try:
        return load_tensors(path, device)
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


def make_console():
    """Lines go to standard output; where that is no terminal, wide enough that tables are not folded."""
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=120)


class _Console(Console):
    def on_broken_pipe(self):
        """Whoever read the output is gone: train on without it, where rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunLog:
    """Bars on a terminal, lines in log.jsonl and, if asked for, the same numbers as TensorBoard events.

    Args:
        folder: the run folder.
        rounds: how many learners will be trained.
        work: the training rows of all of them together, for the estimate of the time left.
        tensorboard: whether to write events, below <folder>/tensorboard.
    """

    def __init__(self, folder, rounds, work, tensorboard=False):
        self.path = folder / "log.jsonl"
        self.events = Events(folder / "tensorboard") if tensorboard else None
        self.rewrite(self.read())  # without the half line that a full disk or a power cut may leave
        self.rounds = rounds
        self.console = make_console()
        self.bars = progress.Progress(
            progress.TextColumn("{task.description:>12}"), progress.BarColumn(30), progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True, refresh_per_second=2,
        )  # fmt: skip
        self.run_bar = self.bars.add_task("", total=work)
        self.learner_bar = self.bars.add_task("", total=1)

    def __enter__(self):
        self.bars.start()
        if self.events:
            self.events.rewrite(self.read())
        return self

    def __exit__(self, *exc):
        self.bars.stop()
        if self.events:
            self.events.close()

    def start_round(self, round, epochs):
        """Set the bars to a learner that is about to train."""
        self.bars.update(self.run_bar, description=f"round {round + 1}/{self.rounds}")
        self.bars.reset(self.learner_bar, total=epochs, description=f"epoch 0/{epochs}")

    def log_epoch(self, round, epochs, rows, *, epoch, **values):
        """Note an epoch (counted from 0) that trained on `rows` rows."""
        self.write(round=round, epoch=epoch, **values)
        self.skip(rows, epoch + 1, epochs)

    def log_round(self, round, **values):
        """Note the end of a round, once: a process that was killed may have done so before."""
        if round not in self.round_lines:
            self.write(round=round, **values)
            self.round_lines.add(round)

    def skip(self, rows, epoch=None, epochs=None):
        """Move the run's bar on by `rows` training rows, and the learner's to `epoch` epochs done."""
        self.bars.update(self.run_bar, advance=rows)
        if epoch is not None:
            self.bars.update(self.learner_bar, completed=epoch, description=f"epoch {epoch}/{epochs}")

    def print(self, line):
        """Print a line above the bars."""
        self.console.print(line, markup=False, soft_wrap=True)

    def write(self, **values):
        """Append a line to log.jsonl; a `RunError` where the disk refuses."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as e:
            raise RunError(f"{self.path}: cannot be written ({e.strerror}); what was written before it is safe") from e
        if self.events:
            self.events.add(**values)

    def read(self):
        """The whole lines of log.jsonl, as dicts; a `RunError` where it is there and cannot be read."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as e:
            raise RunError(f"{self.path}: cannot be read ({e.strerror})") from e
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict) and isinstance(line.get("round"), int)
                and isinstance(line.get("epoch", 0), int)]  # fmt: skip

    def forget(self, round, epoch=0):
        """Drop the lines of `round` from `epoch` on, its own line too: its learner is about to be trained (again)."""
        lines = self.read()
        kept = [line for line in lines if line["round"] != round or line.get("epoch", math.inf) < epoch]
        self.rewrite(kept)
        if self.events and len(kept) < len(lines):
            self.events.rewrite(kept)

    def rewrite(self, lines):
        """Let log.jsonl hold `lines` alone; a `RunError` where the disk refuses."""
        if self.path.exists():
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.round_lines = {line["round"] for line in lines if "epoch" not in line}


class Events:
    """The lines of a log.jsonl as TensorBoard events: one TensorBoard run a learner, and one of the zoo.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder):
        self.folder = folder
        self.writers = {}

    def add(self, round, epoch=None, **values):
        """Add a line: a learner's against its epoch, or the zoo's against its round."""
        from torch.utils.tensorboard import SummaryWriter

        which = "zoo" if epoch is None else "learner_warm" if round < 0 else f"learner_{round:03}"
        if epoch is None or epoch == 0:
            self.close()  # the learner before is done, and what it wrote goes to disk
        try:
            if which not in self.writers:
                self.writers[which] = SummaryWriter(str(self.folder / which))
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.writers[which].add_scalar(key, value, round if epoch is None else epoch)
        except OSError as e:
            raise RunError(f"{self.folder}: cannot be written ({e.strerror}); the learners so far are safe") from e

    def rewrite(self, lines):
        """Hold these lines and no others."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for line in lines:
            self.add(**line)

    def close(self):
        """Bring everything to disk."""
        while self.writers:
            self.writers.popitem()[1].close()


def task_names(tasks, names, limit=40):
    """A name a task: the config's, else the source labels."""
    if names:
        return list(names)
    labels = ["".join(c if c.isprintable() else "?" for c in " ".join(map(str, task))) for task in tasks]
    return [text if len(text) <= limit else text[: limit - 1] + "…" for text in labels]


def print_result(result, names, folder):
    """Print a table a task, the metrics and where everything is."""
    console, percent = make_console(), "{:z.2f}".format  # z: no minus before 0.00
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "first seen %", "final %", "change"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for t, final in enumerate(result["accuracy"]):
        first = first_seen(result["accuracy_matrix"], result["rounds"], t)
        change = f"{100 * (final - first):+z.2f}"
        table.add_row(escape(f"{t} {names[t]}"), percent(100 * first), percent(100 * final), change)
    console.print(table)
    for key in ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer"):
        if result[key] is not None:
            console.print(f"{key.replace('_', ' '):>18}  {percent(100 * result[key])} %", markup=False)
    console.print(f"{'seconds':>18}  {result['seconds']:.1f}")
    console.print(f"{'run folder':>18}  {folder}", markup=False, soft_wrap=True)


def first_seen(matrix, rounds, t):
    """Accuracy on task t after the first round whose learner trained on it (the last round's where none did)."""
    k = next((k for k, r in enumerate(rounds) if t in r["tasks"]), len(rounds) - 1)
    return matrix[k][t]
