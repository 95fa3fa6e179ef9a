"""What people watch: two bars on a terminal, lines elsewhere; and what is kept of it: log.jsonl, TensorBoard events."""
import contextlib
import json
import math
import os
import shutil
import sys
import textwrap
import time

from tqdm import tqdm

from utils.run_folder import RunError, write_file

BAR_SECONDS = 0.5  # between two updates of the bars on a terminal
LINE_SECONDS = 30  # between two lines on the way where there is no terminal
BAR = "{desc:<16}{percentage:3.0f} % |{bar}| "  # what stands behind it is added
RUN_BAR = BAR + "{elapsed}, {remaining} left"


def say(line=""):
    """Print a line on standard output, above the bars; once nobody reads it any more, train on without it."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_folded(line):
    """Print a line, folded between its words where it is longer than the terminal is wide."""
    width = terminal_width()
    say(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) if width else line)


def terminal_width():
    """Columns of the terminal that standard output is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def shorten(text, width):
    """`text`, cut to `width` columns (None: any) by an ellipsis; letters of East Asia take two."""
    from wcwidth import wcwidth  # as tabulate below: not before the first batch, which a newcomer waits for

    columns = [max(wcwidth(c), 0) for c in text]
    if width is None or sum(columns) <= width:
        return text
    while columns and sum(columns) > width - 1:
        columns.pop()
    return text[: len(columns)].rstrip() + "…"


def print_table(headings, rows):
    """Print a table of texts: the first column stands left and gives way where the terminal is narrow."""
    from tabulate import tabulate

    width = terminal_width()
    if width and rows:
        # tabulate sets columns two apart and gives headings two more
        others = sum(max(len(h) + 2, *(len(row[i]) for row in rows)) + 2 for i, h in enumerate(headings) if i)
        rows = [[shorten(row[0], max(width - others, 10)), *row[1:]] for row in rows]
    align = ["left"] + ["right"] * (len(headings) - 1)
    say(tabulate(rows, headings, "simple", colalign=align if rows else None, disable_numparse=True))


class RunLog:
    """The log of a run: what a person sees of it, and the lines of log.jsonl.

    Args:
        folder: the run folder.
        rounds: how many learners will be trained.
        work: the training rows of all of them together, for the estimate of the time left.
        tensorboard: whether to write events, below <folder>/tensorboard.
        names: of the tasks.
        continual: whether a round's last task is new in it.
    """

    def __init__(self, folder, rounds, work, tensorboard=False, names=(), continual=False):
        self.path = folder / "log.jsonl"
        self.events = Events(folder / "tensorboard", names) if tensorboard else None
        self.rewrite(self.read())  # without the half line that a full disk or a power cut may leave
        self.rounds, self.names, self.continual = rounds, names, continual
        self.terminal = sys.stdout.isatty()
        self.bars = []
        # Rows: of the whole run, trained so far, and of these the ones that an earlier process had trained.
        self.work, self.done, self.found = work, 0, 0
        self.began, self.due = None, 0.0
        self.training = None  # the round that this process is training, or trained last

    def __enter__(self):
        if self.events:
            self.events.rewrite(self.read())
        return self

    def __exit__(self, *exc):
        for bar in reversed(self.bars):
            bar.close()
        if self.events:
            self.events.close()

    def start_round(self, round, epochs, rows, first=0):
        """A learner is about to train on `rows` rows an epoch; `first` epochs of it an earlier process has trained."""
        self.skip(first * rows)
        self.training, self.epochs, self.rows, self.epoch = round, epochs, rows, first
        if self.began is None:
            self.began = time.perf_counter()
            self.due = self.began + (0 if self.terminal else LINE_SECONDS)
            if self.terminal:
                about = {"file": sys.stdout, "dynamic_ncols": True, "leave": False, "mininterval": 0, "smoothing": 0}
                self.bars = [tqdm(total=self.work, initial=self.done, position=0, bar_format=RUN_BAR, **about),
                             tqdm(total=rows, position=1, bar_format=BAR, **about)]
        self._show(0)

    def watch(self, batches, loss_sum):
        """Yield an epoch's batches of rows; after one, twice a second, show how far it is and its mean loss so far.

        Only then is `loss_sum` (a tensor, summed over the rows trained on) read, which waits for the device.
        """
        seen = 0
        for i in batches:
            yield i
            seen += len(i)
            if time.perf_counter() >= self.due:
                self._show(seen, loss_sum.item() / seen)

    def _show(self, seen, loss=None, val_accuracy=None):
        """Show that `seen` rows of this epoch are trained on, their mean loss, and the accuracy on rows held out."""
        now = time.perf_counter()
        self.due = now + (BAR_SECONDS if self.terminal else LINE_SECONDS)
        loss = "" if loss is None else f"loss {loss:.3f}"
        loss += "" if val_accuracy is None else f"   held out {100 * val_accuracy:.1f} %"
        where = f"round {self.training + 1}/{self.rounds}" if self.training >= 0 else "warm start"
        epoch = f"epoch {self.epoch + 1}/{self.epochs}"
        if self.bars:
            run, learner = self.bars
            run.total, run.initial, run.n = max(self.work, self.done + seen), self.found, self.done + seen
            run.set_description_str(where, refresh=True)
            learner.total, learner.n = self.rows, seen
            learner.bar_format = BAR + loss
            learner.set_description_str(epoch, refresh=True)
        elif seen:
            trained = self.done + seen - self.found
            left = max(self.work - self.done - seen, 0) / trained * (now - self.began)
            say(f"{where}   {epoch}, {100 * seen / self.rows:.0f} % of it   {loss}   {tqdm.format_interval(left)} left")

    def log_epoch(self, round, *, epoch, **values):
        """Note an epoch (counted from 0)."""
        self.write(round=round, epoch=epoch, **values)
        if time.perf_counter() >= self.due:
            self._show(self.rows, values["train_loss"], values.get("val_accuracy"))
        self.done += self.rows
        self.epoch = epoch + 1

    def log_round(self, round, *, tasks, accuracy, seconds, known=None):
        """Note the end of a round, once: a process that was killed may have done so before. Print it if it trained.

        Args:
            tasks: that the round's learner was trained on.
            accuracy: on the test rows of each task seen, in [0, 1].
            known: indices of those that a learner was trained on (None: all).
        """
        if round not in self.round_lines:
            mean = sum(accuracy) / len(accuracy)
            self.write(round=round, tasks=tasks, test_accuracy=mean, accuracy=accuracy, seconds=seconds)
            if self.events and any(later > round for later in self.round_lines):
                self.events.rewrite(self.read())  # a damaged learner was trained again: its point belongs in between
            self.round_lines.add(round)
        if self.training == round:
            known = accuracy if known is None else [accuracy[t] for t in known]
            say(self._round_line(round, tasks, known, seconds))

    def _round_line(self, round, tasks, known, seconds):
        digits = len(str(self.rounds))
        where = f"round {round + 1:{digits}}/{self.rounds}" if round >= 0 else "warm start"
        names, mean = [self.names[t] for t in tasks], f"{100 * sum(known) / len(known):6.2f} %"
        if self.continual:
            what = f"new: {names[-1]}" + ("   with: " + ", ".join(names[:-1])) * (len(names) > 1)
        else:
            what = ("all tasks" if len(names) == len(self.names) else f"tasks: {', '.join(names)}")
            unknown = len(self.names) - len(known)
            mean += f" on {len(known)} known task{'s' * (len(known) > 1)}"
            mean += f", {unknown} not yet known" * (unknown > 0)
        return shorten(f"{where}   {mean}   {seconds:.1f} s   {what}", terminal_width())

    def skip(self, rows):
        """Count `rows` training rows as those of an earlier process: they say nothing about the speed of this one."""
        self.done += rows
        self.found += rows

    def print(self, line):
        """Print a line above the bars."""
        say(line)

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
                and isinstance(line.get("epoch", 0), int)]

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
    """The lines of a log.jsonl as TensorBoard events: one TensorBoard run per learner, and one of the zoo.

    A run has one event file, because the names of several do not say in which order they were written.

    Args:
        folder: where they are written.
        names: of the tasks.
    """

    def __init__(self, folder, names):
        self.folder = folder
        self.names = names
        self.writers = {}

    def add(self, round, epoch=None, **values):
        """Add a line: a learner's against its epoch, or the zoo's against its round."""
        from torch.utils.tensorboard import SummaryWriter

        which = "zoo" if epoch is None else "learner_warm" if round < 0 else f"learner_{round:03}"
        if epoch is None:
            values |= {f"accuracy/{t} {self.names[t]}": x for t, x in enumerate(values.get("accuracy", ()))}
        try:
            for done in self.writers.keys() - {which, "zoo"}:
                self.writers.pop(done).close()
            if which not in self.writers:
                self.writers[which] = SummaryWriter(str(self.folder / which))
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.writers[which].add_scalar(key, value, round if epoch is None else epoch)
            self.writers[which].flush()
        except OSError as e:
            raise RunError(f"{self.folder}: cannot be written ({e.strerror}); the learners so far are safe") from e

    def rewrite(self, lines):
        """Hold these lines and no others, in the order of rounds and epochs."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for line in sorted(lines, key=lambda line: (line["round"], line.get("epoch", math.inf))):
            self.add(**line)

    def close(self):
        """Bring everything to disk."""
        while self.writers:
            self.writers.popitem()[1].close()


def task_names(tasks, names, class_names):
    """A name per task: the config's, else its classes' where these tell the tasks apart, else its source labels."""
    if names:
        return list(names)

    def join(tasks):
        texts = ["".join(c if c.isprintable() else "?" for c in " ".join(map(str, task))) for task in tasks]
        return [text if len(text) <= 40 else text[:39] + "…" for text in texts]

    of_classes = join(class_names or [])
    return of_classes if class_names and len(set(of_classes)) == len(tasks) else join(tasks)


def print_result(result, names, folder):
    """Print a table of the tasks, the metrics and where everything is."""
    percent = "{:z.2f}".format  # z: no minus before 0.00
    rows = []
    for t, final in enumerate(result["accuracy"]):
        first = first_seen(result["accuracy_matrix"], result["rounds"], t)
        change = f"{100 * (final - first):+z.2f}"
        rows.append([f"{t} {names[t]}", percent(100 * first), percent(100 * final), change])
    say()
    if len(result["accuracy_matrix"]) == 1:
        print_table(["task", "accuracy %"], [[row[0], row[2]] for row in rows])
    else:
        print_table(["task", "first seen %", "final %", "change"], rows)
    say()
    for key in ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer"):
        if result[key] is not None:
            say(f"{key.replace('_', ' '):>18}  {percent(100 * result[key])} %")
    say(f"{'seconds':>18}  {result['seconds']:.1f}")
    say(f"{'run folder':>18}  {folder}")


def first_seen(matrix, rounds, t):
    """Accuracy on task t after the first round whose learner trained on it (the last round's where none did)."""
    k = next((k for k, r in enumerate(rounds) if t in r["tasks"]), len(rounds) - 1)
    return matrix[k][t]
