"""Paths, YAML and flags as people write them; other packages, temporary folders and networks; advice that fits."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import modelzoo
import multihead
from datasets.build_dataset import build_dataset
from datasets.data import DataError
from multihead import require_finite
from tests.conftest import CONV, flags, write_yaml
from utils import run_folder
from utils.command import command, guard
from utils.config import read_settings
from utils.config_files import ConfigError, load_yaml, read_dataset, read_hyperparam, read_space
from utils.run_folder import RunError, write_file
from utils.run_net import make_generator

ROOT = Path(__file__).parent.parent


# -- what stands first on the path


@pytest.mark.parametrize("name, first", [("utils", "utils.py"), ("datasets", "datasets/__init__.py")])
@pytest.mark.parametrize("script", ["modelzoo.py", "hpo.py", "tools/bench.py", "tools/peers.py"])
def test_a_package_that_hides_ours_is_named(tmp_path, name, first, script):
    """Imported before, by whatever Python runs at its start; a script's own folder is first otherwise."""
    (tmp_path / first).parent.mkdir(exist_ok=True)
    (tmp_path / first).write_text("")
    (tmp_path / "sitecustomize.py").write_text(f"import {name}\n")
    done = subprocess.run([sys.executable, script, "-h"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path / first} is imported in place of {ROOT / name}: rename it, or put {ROOT} first" in done.stderr


def test_every_tool_is_a_script():
    """Or no figure is made: its own folder is first on a script's path, not the repository."""
    done = subprocess.run([sys.executable, ROOT / "tools/plot.py", "-h"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    ours = r"^(from|import) (before_torch|modelzoo|multihead|hpo|(datasets|net|tools|utils)\b)"
    for tool in ("bench", "export", "peers", "plot", "report", "sweep"):
        text = (ROOT / f"tools/{tool}.py").read_text(encoding="utf-8")
        path = text.index("\nsys.path.insert(0, ")
        assert path < min(found.start() for found in re.finditer(ours, text, re.M)), tool


def test_from_other_code_it_is_an_import_error_that_names_both(tmp_path):
    (tmp_path / "utils.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import modelzoo"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"ImportError: {tmp_path / 'utils.py'} is imported in place of {ROOT / 'utils'}" in done.stderr
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import modelzoo"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


def test_a_temporary_folder_too_long_for_rays_sockets(tmp_path, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    pytest.importorskip("optuna")
    from utils import cluster

    def init(*_, **__):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: '/…/sockets/plasma_store'")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    assert guard("hpo.py", lambda: cluster.connect(None)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("hpo.py: TMPDIR: ") and "too long a path for Ray's sockets; set a shorter one" in err
    monkeypatch.setattr(ray, "init", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no room in /dev/shm")))
    assert guard("hpo.py", lambda: cluster.connect(None)) == 2
    assert capsys.readouterr().err == "hpo.py: Ray does not start on this machine (no room in /dev/shm)\n"


def test_an_error_without_a_number_keeps_its_words(capsys):
    def work():
        raise OSError("the tape is full")

    assert guard("x", work) == 2
    assert capsys.readouterr().err == "x: output: cannot be read or written (the tape is full)\n"


# -- YAML as people write it


@pytest.mark.parametrize("text, what", [
    ("[[yes, no]]", "True"), ("[[2020-01-01, a]]", "datetime.date(2020, 1, 1)"), ("[[a, 1e3]]", "1000.0"),
    ("[[a, null]]", "None"), ("[[a, ~]]", "None"), ("[[a, {b: c}]]", "{'b': 'c'}"), ("[[Off, on]]", "False"),
])
def test_class_names_that_yaml_reads_as_something_else_are_to_be_quoted(tmp_path, text, what):
    (tmp_path / "a.yaml").write_text(f"dataset: image_folder\npath: x\nsize: 24\ntasks: {text}\n")
    with pytest.raises(ConfigError) as e:
        read_dataset(tmp_path / "a.yaml")
    assert f": {what} is not a class name; YAML reads" in str(e.value) and "in quotes" in str(e.value)


def test_names_of_digits_and_quoted_ones_are_texts(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: image_folder\npath: x\nsize: 24\ntasks: [['yes', \"1e3\", 007, 1_0]]\n")
    assert read_dataset(tmp_path / "a.yaml")["tasks"] == (("yes", "1e3", "007", "1_0"),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_yaml_of_any_editor_and_of_many_parts(tmp_path, encoding):
    """Byte order marks, line ends, comments, anchors, merges, tags, folded texts, one document between marks."""
    text = """%YAML 1.1
---
# a task for each of two species
dataset: !!str npz
path: >-
  toy.npz
tasks:
- &first [0, 1]
- *first
-
  - 2
  - 3
names: [Käfer, "b", 'c']
...
"""
    (tmp_path / "a.yaml").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    found = read_dataset(tmp_path / "a.yaml")
    assert found["tasks"] == ((0, 1), (0, 1), (2, 3)) and found["names"] == ("Käfer", "b", "c")
    assert found["path"] == "toy.npz"


def test_merged_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("""
model: conv
search: {lr: &ends {log: [1e-3, 1e-1]}, l2_reg: {<<: *ends}}
<<: {batch: 8, lr: 0.01, l2_reg: 0, dropout: 0}
lr: 0.02
""")
    assert read_hyperparam(tmp_path / "a.yaml")["lr"] == 0.02 and read_hyperparam(tmp_path / "a.yaml")["batch"] == 8
    assert read_space(tmp_path / "a.yaml", load_yaml(tmp_path / "a.yaml"))["l2_reg"] == ("log", (1e-3, 1e-1))


@pytest.mark.parametrize("text, message", [
    ("lr:", "lr: has no value"), ("batch: 1_000", "batch: '1_000' is not a whole number"),
    ("batch: 0x10", "'0x10' is not a whole number"), ("lr: .NaN", "'.NaN' is not a number"),
    ("lr: 1,5", "'1,5' is not a number"), ("augment: 'yes'", "augment: 'yes' is not true or false"),
    ("? [a, b]\n: 1", "not a word"), ("on: 1", "key True is not a word; put it in quotes"),
    ("lr: !!python/name:os.system", "could not determine a constructor"),
    ("lr: 0.1\n---\nlr: 0.2", "found another document"),
    ("\tlr: 1", "cannot start any token"), ("lr: *nowhere", "undefined alias"),
])
def test_what_does_not_work_is_named(tmp_path, text, message):
    whole = {key: value for key, value in CONV.items() if key not in ("lr", "batch", "augment")}
    whole |= {key: CONV[key] for key in ("lr", "batch") if f"{key}:" not in text}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(whole) + text + "\n")
    with pytest.raises(ConfigError) as e:
        read_hyperparam(tmp_path / "a.yaml")
    assert message in str(e.value) and "\n" not in str(e.value)


def test_seeds_of_a_grid_may_be_a_list(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from tools.sweep import read_grid

    monkeypatch.chdir(ROOT)
    grid = {"methods": "isolated", "data_config": "config/dataset/split_digits.yaml",
            "hp_config": "config/hyperparam/small.yaml"}
    for seeds in ([0, 1, 4], "0-1,4"):
        write_yaml(tmp_path / "grid.yaml", grid | {"seeds": seeds})
        assert [s.seed for s in read_grid(["--grid", str(tmp_path / "grid.yaml")])[0]] == [0, 1, 4]
    with pytest.raises(ConfigError, match="--seeds: '' is not a list of seeds"):  # an empty variable of a shell
        read_grid(["--grid", str(tmp_path / "grid.yaml"), "--seeds", ""])


# -- paths as people write them


@pytest.mark.parametrize("out", ["a file", "a link that leads nowhere"])
def test_an_out_that_is_no_folder_is_named(workspace, capsys, out):
    """Once: "another process has just made it"."""
    if out == "a file":
        (workspace / "runs").write_text("mine")
    else:
        (workspace / "runs").symlink_to("nowhere")
    assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--name", "a")) == 2
    assert f"{workspace / 'runs'}: exists and is no folder; take another --out" in capsys.readouterr().err


def test_a_device_is_not_replaced_and_a_link_stays_one(tmp_path):
    """Once: a report to /dev/null would have made it a file."""
    os.mkfifo(tmp_path / "device")
    with pytest.raises(RunError, match="device: cannot be written .it exists and is no file."):
        write_file(tmp_path / "device", b"x")
    assert not (tmp_path / "device").is_file()
    (tmp_path / "output").symlink_to("device")  # as /dev/stdout is one, to a pipe
    with pytest.raises(RunError, match="output: cannot be written .it exists and is no file."):
        write_file(tmp_path / "output", b"x")
    (tmp_path / "link").symlink_to("file")
    for data in (b"x", b"y"):
        write_file(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == data


def test_a_hyperparameter_file_may_be_a_pipe(workspace):
    """`--hp_config <(sed ... hp.yaml)`, which can be read once."""
    script = f"{sys.executable} multihead.py {' '.join(flags(workspace))} --hp_config <(cat {workspace / 'hp.yaml'})"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Not of another repository that it lies in, nor of the one whose hook runs it."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    own = run_folder.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert run_folder.commit() == own
    (tmp_path / "utils").mkdir()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "utils/run_folder.py"))
    Path(run_folder.__file__).write_text("")
    assert run_folder.commit() is None


def test_paths_with_home_and_backslashes(workspace, monkeypatch):
    monkeypatch.setenv("HOME", str(workspace))
    monkeypatch.setenv("WHERE", str(workspace))
    monkeypatch.chdir(workspace)
    (workspace / "sub").mkdir()
    (workspace / "data.yaml").rename(workspace / "sub/data.yaml")
    s = read_settings("x", "modelzoo", ["--data_config", ".\\sub\\data.yaml", "--hp_config", "~/hp.yaml",
                                        "--data_dir=$WHERE/data", "--out=~/runs/"])
    assert (s.data_config, s.hp_config) == ("./sub/data.yaml", f"{workspace}/hp.yaml")
    assert (s.data_dir, s.out) == (f"{workspace}/data", f"{workspace}/runs/")


@pytest.mark.parametrize("path, message", [
    ("{0}/data/toy.npz", None),
    ("/elsewhere/toy.npz", "path: /elsewhere/toy.npz is absolute; .*: set --data_dir for it"),
    ("~/toy.npz", "is absolute"), ("../toy.npz", r"path: \.\./toy.npz leads out of"),
    ("sub/../../toy.npz", "leads out of"),
])
def test_absolute_paths_and_those_that_lead_out(workspace, path, message):
    message = message or "toy.npz is absolute; it is taken below --data_dir, .*: write toy.npz"
    with pytest.raises(DataError, match=message):
        build_dataset("npz", [(0, 1)], workspace / "data", make_generator(0, 0, "x"), path=path.format(workspace))


@pytest.mark.parametrize("path", ["./toy.npz", "sub/../toy.npz", "sub//copy.npz", "sub\\copy.npz"])
def test_other_ways_to_write_a_path_inside(workspace, path):
    (workspace / "data/sub").mkdir()
    (workspace / "data/sub/copy.npz").write_bytes((workspace / "data/toy.npz").read_bytes())
    assert build_dataset("npz", [(0, 1)], workspace / "data", make_generator(0, 0, "x"), path=path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("there", [False, True])
def test_offline_a_mistyped_data_dir_is_not_made(tmp_path, monkeypatch, name, there):
    import urllib.request

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    where = tmp_path / "typo" / "deep"
    if there:
        where.mkdir(parents=True)
        (where / "mine").mkdir()
    with pytest.raises(DataError, match="no data: looked for"):
        build_dataset(name, [(0, 1)], where, make_generator(0, 0, "x"))
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")]
    assert left == ["typo", "typo/deep", "typo/deep/mine"] * there


# -- advice that fits


def test_a_nan_in_fp32_is_not_told_to_try_fp32():
    for precision, advice in (("fp32", "try a lower lr"), ("bf16", "try a lower lr or --precision fp32")):
        with pytest.raises(RunError) as e:
            require_finite(float("nan"), "the training loss", 0.1, precision)
        assert str(e.value).endswith(f"; {advice}")


def test_a_run_that_diverges_says_so(workspace, capsys):
    write_yaml(workspace / "hp.yaml", CONV | {"lr": 1e20})
    assert command("x", "multihead", multihead.run, flags(workspace, "--precision", "fp32")) == 2
    assert capsys.readouterr().err.endswith("; try a lower lr\n")


def test_dropout_is_searched_where_there_is_any(tmp_path):
    write_yaml(tmp_path / "hp.yaml", CONV)
    assert set(read_space(tmp_path / "hp.yaml", load_yaml(tmp_path / "hp.yaml"))) == {"batch", "lr", "l2_reg"}
    write_yaml(tmp_path / "hp.yaml", CONV | {"model": "wrn16_4"})
    assert "dropout" in read_space(tmp_path / "hp.yaml", load_yaml(tmp_path / "hp.yaml"))
    write_yaml(tmp_path / "hp.yaml", CONV | {"search": {"dropout": {"choice": [0.1]}}})
    with pytest.raises(ConfigError, match="search: dropout: model conv has none"):
        read_space(tmp_path / "hp.yaml", load_yaml(tmp_path / "hp.yaml"))


@pytest.mark.parametrize("word, message", [
    ("--num_tasks", "--num_tasks 3; with --continual, --num_rounds N trains on the first N tasks"),
    ("--sample", "did you mean --samples?"), ("--tasks_per_rounds", "did you mean --tasks_per_round?"),
    ("--data-dir", "did you mean --data_dir?"), ("--contineous", "did you mean --continual?"),
    ("--xyzzy", "--xyzzy 3\n"),
])
def test_flags_misspelt(workspace, capsys, word, message):
    assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, word, "3")) == 2
    assert message in capsys.readouterr().err


def test_keys_misspelt(tmp_path):
    write_yaml(tmp_path / "hp.yaml", CONV | {"learning_rate": 1, "droput": 0})
    with pytest.raises(ConfigError, match="unknown key droput; did you mean dropout[?] the keys are"):
        read_hyperparam(tmp_path / "hp.yaml")
    assert load_yaml(tmp_path / "hp.yaml")["droput"] == 0
