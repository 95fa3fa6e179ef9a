"""A command from its start to its exit status: settings, signals, and one line for whatever goes wrong."""
import contextlib
import os
import signal
import sys

from datasets.data import DataError
from utils.config import read_settings
from utils.config_files import ConfigError
from utils.run_folder import RunError, naming_memory


class Stopped(BaseException):
    """A signal asks this process to end."""


def _stop(number, _):
    for other in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(other) == _stop:
            signal.signal(other, signal.SIG_DFL)  # a second one ends the process whatever it does
    raise Stopped(number)


def guard(prog, work, resumes=False):
    """Do `work`, a function without arguments, and return the exit status; `resumes`: whether --resume goes on with it.

    What it returns, or 0; 2, after one line, where the user must mend something; 128 + n after signal n, which loses at
    most the learner in training.
    """
    # A signal that the caller has this process ignore, as a shell does of a background job's Ctrl-C, stays ignored.
    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heeded}
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a task's name may have letters that the terminal lacks
    try:
        return work() or 0
    except (ConfigError, DataError, RunError) as e:
        line, status = str(e), 2
    except OSError as e:
        line, status = f"{e.filename or 'output'}: cannot be read or written ({e.strerror or e})", 2
    except MemoryError:
        line, status = "too little memory", 2
    except (Stopped, SystemError) as e:
        stopped = e if isinstance(e, Stopped) else e.__cause__  # Ray's compiled code hides what it was left by
        if not isinstance(stopped, Stopped):
            raise
        number = signal.Signals(stopped.args[0])
        line, status = f"stopped by {number.name}", 128 + number
        if resumes:
            line += "; the same command with --resume goes on"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # File and class names may hold line ends and worse, and be of any length.
    print("".join(c if c.isprintable() else " " for c in f"{prog}: {line}"[:900]), file=sys.stderr)
    return status


@contextlib.contextmanager
def name_batch(settings):
    """Where memory runs out inside, on whichever device, raise a `RunError` that names the batch size."""
    with naming_memory(f"{settings.device}: too little memory with batch {settings.batch}; try less"):
        yield


def command(prog, method, run, argv=None):
    """Read the settings of one command, run it, and return the exit status as `guard` does."""

    def work():
        settings = read_settings(prog, method, argv)
        with name_batch(settings):
            run(settings)

    return guard(prog, work, resumes=True)
