"""The commands as a shell starts them: exit status, one line for what goes wrong, output that nobody reads."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import flags, write_yaml
from utils.command import Stopped, guard

ROOT = Path(__file__).parent.parent


def run_script(*argv, **env):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


def test_scripts_as_a_shell_starts_them(workspace):
    done = run_script("modelzoo.py", *flags(workspace, "--continual", "--num_rounds", "1"))
    assert done.returncode == 0 and "average accuracy" in done.stdout and done.stderr == ""
    folder = workspace / "runs/data-hp-modelzoo-continual-num_rounds=1-seed=0"
    assert (folder / "result.json").exists()
    wrong = run_script("multihead.py", *flags(workspace, "--epochs", "none"))
    assert wrong.returncode == 2 and wrong.stderr == "multihead.py: argument --epochs: invalid int value: 'none'\n"
    shown = run_script("modelzoo.py", "-h")
    assert shown.returncode == 0 and "--replay_frac" in shown.stdout


def test_names_that_the_terminal_has_no_letters_for(workspace):
    tasks = {"tasks": [[0, 1], [2, 3]], "names": ["grüße", "日本"]}
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "toy.npz", **tasks})
    done = run_script("modelzoo.py", *flags(workspace, "--continual"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"gr\xfc\xdfe" in done.stdout and done.stderr == ""


def test_neither_data_nor_network_is_one_line(workspace):
    write_yaml(workspace / "data.yaml", {"dataset": "mnist", "tasks": [[0, 1]]})
    proxy = {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https")}
    done = run_script("modelzoo.py", *flags(workspace), **proxy)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    for words in ("mnist: no data", "data/mnist.npz", "data/MNIST/raw", "connect this machine to the network, or put"):
        assert words in done.stderr
    assert not (workspace / "runs").exists()


def test_output_that_nobody_reads_does_not_end_the_run(workspace):
    """Once: `| head -1` killed the training without a word."""
    command = [sys.executable, "modelzoo.py", *flags(workspace, "--continual", "--name", "a")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""
    process.stderr.close()
    assert (workspace / "runs/a/result.json").exists()


def test_closed_output_does_not_end_the_run(workspace):
    """Once: a traceback, and a run folder that was in the way of the next try."""
    script = shlex.join([sys.executable, "modelzoo.py", *flags(workspace, "--continual", "--name", "a")])
    done = subprocess.run(["sh", "-c", f"{script} >&-"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (workspace / "runs/a/result.json").exists()


def test_an_ignored_signal_stays_ignored():
    """A shell has background jobs ignore Ctrl-C, which is meant for the one in front."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert guard("x", lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
        assert guard("x", lambda: os.kill(os.getpid(), signal.SIGTERM)) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_output_that_cannot_be_written_is_one_line(workspace):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "modelzoo.py", *flags(workspace, "--continual")], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_a_signal_inside_compiled_code_is_one_line(capsys, resumes):
    """Ray's wait turns what it is left by into a SystemError, which was a traceback."""
    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Stopped as e:
            raise SystemError("returned a result with an exception set") from e

    assert guard("x", work, resumes) == 128 + signal.SIGINT
    rest = "; the same command with --resume goes on" * resumes
    assert capsys.readouterr().err == f"x: stopped by SIGINT{rest}\n"
    with pytest.raises(SystemError):
        guard("x", lambda: (_ for _ in ()).throw(SystemError("another")))
