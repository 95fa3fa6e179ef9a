"""Every flag and key: missing, misspelt, of the wrong type or out of range; and every config that is shipped."""
import json
from pathlib import Path

import pytest
import yaml

import modelzoo
import multihead
from tests.conftest import CONV, flags, write_yaml
from utils import command as cli
from utils.config import read_settings
from utils.config_files import (
    DATASETS,
    HYPER_OPTIONAL,
    ConfigError,
    dump_yaml,
    load_yaml,
    read_dataset,
    read_hyperparam,
)
from utils.run_folder import record

CONFIG = Path(__file__).parent.parent / "config"
TASKS = [[0, 1], [2, 3], [4, 5]]


def refuse(workspace, capsys, *more, method="modelzoo"):
    """Run a command that must be refused: exit status 2, one line, nothing written. Returns the line."""
    before = sorted(workspace.rglob("*"))
    main = {"modelzoo": modelzoo, "multihead": multihead}[method]
    assert cli.command(f"{method}.py", method, main.run, flags(workspace, *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert sorted(workspace.rglob("*")) == before
    return err


@pytest.mark.parametrize("changes, message", [
    ({"model": None}, "key model is missing"),
    ({"batch": None}, "key batch is missing"),
    ({"lr": None}, "key lr is missing"),
    ({"l2_reg": None}, "key l2_reg is missing"),
    ({"dropout": None}, "key dropout is missing"),
    ({"learning_rate": 0.1}, "unknown key learning_rate"),
    ({"model": "resnet"}, "model: 'resnet' is not one of conv, conv_<channels>, wrn<depth>_<widen>"),
    ({"model": 3}, "model: 3 is not a text"),
    ({"model": ["conv"]}, "model: ['conv'] is not a text"),
    ({"model": "wrn17_4"}, "model: 'wrn17_4' is not one of"),
    ({"model": "conv_0"}, "model: 'conv_0' is not one of"),
    ({"width": 0}, "width: 0 must be at least 1"),
    ({"width": "wide"}, "width: 'wide' is not a whole number"),
    ({"model": "wrn16_4", "width": 80}, "width: only model conv has one, not 'wrn16_4'; leave it out"),
    ({"model": "conv_160", "width": 80}, "width: only model conv has one, not 'conv_160'; leave it out"),
    ({"batch": 0}, "batch: 0 must be at least 1"),
    ({"batch": 1.5}, "batch: 1.5 is not a whole number"),
    ({"batch": "16"}, "batch: '16' is not a whole number"),
    ({"batch": True}, "batch: True is not a whole number"),
    ({"lr": 0}, "lr: 0.0 must be above 0"),
    ({"lr": -1}, "lr: -1.0 must be above 0"),
    ({"lr": float("nan")}, "lr: nan must be"),
    ({"lr": float("inf")}, "lr: inf must be"),
    ({"lr": 10**400}, "lr: inf must be"),
    ({"lr": "fast"}, "lr: 'fast' is not a number"),
    ({"l2_reg": -0.1}, "l2_reg: -0.1 must be at least 0"),
    ({"l2_reg": [1]}, "l2_reg: [1] is not a number"),
    ({"dropout": 1}, "dropout: 1.0 must be at least 0 and below 1"),
    ({"dropout": {}}, "dropout: {} is not a number"),
    ({"epochs": 0}, "epochs: 0 must be at least 1"),
    ({"epochs": 2.5}, "epochs: 2.5 is not a whole number"),
    ({"schedule": "linear"}, "schedule: 'linear' is not one of cosine, constant"),
    ({"augment": "yes"}, "augment: 'yes' is not true or false"),
])
def test_hyperparameter_files(workspace, capsys, changes, message):
    values = {k: v for k, v in {**CONV, **changes}.items() if v is not None}
    write_yaml(workspace / "hp.yaml", values)
    line = refuse(workspace, capsys)
    assert message in line and "hp.yaml: " in line


@pytest.mark.parametrize("content, message", [
    ({"tasks": TASKS}, "key dataset is missing"),
    ({"dataset": "mnist"}, "key tasks is missing"),
    ({"dataset": "mnist", "tasks": TASKS, "task": 1}, "unknown key task;"),
    ({"dataset": "mnist", "tasks": TASKS, "path": "a"}, "unknown key path;"),
    ({"dataset": "npz", "tasks": TASKS}, "key path is missing"),
    ({"dataset": "npz", "tasks": TASKS, "path": 3}, "path: 3 is not a text"),
    ({"dataset": "npz", "tasks": TASKS, "path": "gone.npz"}, "gone.npz: no such file"),
    ({"dataset": "npz", "tasks": TASKS, "path": "../data.yaml"}, "leads out of"),
    ({"dataset": "npz", "tasks": TASKS, "path": "/etc/passwd"}, "passwd is absolute; it is taken below --data_dir"),
    ({"dataset": "npz", "tasks": [[0, 1], [2, 9]], "path": "toy.npz"}, "label 9 has no rows among the training"),
    ({"dataset": "image_folder", "tasks": TASKS, "path": "a"}, "key size is missing"),
    ({"dataset": "image_folder", "tasks": TASKS, "path": "a", "size": 0}, "size: 0 must be at least 8"),
    ({"dataset": "image_folder", "tasks": TASKS, "path": "a", "size": 32}, "train: no such folder"),
    ({"dataset": "imagenet", "tasks": TASKS}, "dataset: 'imagenet' is not one of"),
    ({"dataset": None, "tasks": TASKS}, "dataset: None is not one of"),
    ({"dataset": ["mnist"], "tasks": TASKS}, "dataset: ['mnist'] is not one of"),
    ({"dataset": "mnist", "tasks": []}, "tasks: must be a list of tasks"),
    ({"dataset": "mnist", "tasks": {"a": [0, 1]}}, "tasks: must be a list of tasks"),
    ({"dataset": "mnist", "tasks": [[0, 1], [2]]}, "task 1 (counted from 0): must be a list of at least two labels"),
    ({"dataset": "mnist", "tasks": [[0, 1], 2]}, "task 1 (counted from 0): must be a list of at least two labels"),
    ({"dataset": "mnist", "tasks": [[0, 0]]}, "label 0 appears twice"),
    ({"dataset": "mnist", "tasks": [[0, 10]]}, "label: 10 must be at least 0 and at most 9"),
    ({"dataset": "cifar100", "tasks": [[0, 200]]}, "label: 200 must be at least 0 and at most 199"),
    ({"dataset": "mnist", "tasks": [[0, -1]]}, "label: -1 must be at least 0"),
    ({"dataset": "mnist", "tasks": [[0, "one"]]}, "label: 'one' is not a whole number"),
    ({"dataset": "mnist", "tasks": [[0, True]]}, "label: True is not a whole number"),
    ({"dataset": "mnist", "tasks": TASKS, "names": ["a"]}, "names: must be a list of 3 names"),
    ({"dataset": "mnist", "tasks": TASKS, "names": ["a", "b", "a"]}, "names: 'a' appears twice"),
    ({"dataset": "mnist", "tasks": TASKS, "names": ["a", "b", 3]}, "name 2: 3 is not a text"),
    ({"dataset": "mnist", "tasks": TASKS, "names": ["a", "b", "\x1b[31m"]}, "cannot be printed on one line"),
    ([1, 2], "must hold keys and values"),
])
def test_dataset_files(workspace, capsys, content, message):
    write_yaml(workspace / "data.yaml", content)
    line = refuse(workspace, capsys)
    assert message in line


@pytest.mark.parametrize("text, message", [
    ("dataset: [", "not a valid YAML file at line"),
    ("a: 1\na: 2\n", "key a appears twice"),
    ("1: 2\n", "key 1 is not a word"),
    ("dataset: !!python/object/apply:os.system ['true']\n", "not a valid YAML file"),
    ("x: 2001-99-99\n", "not a valid YAML file"),
    ("x: !!bool maybe\n", "not a valid YAML file"),
    ("x: !!int ''\n", "not a valid YAML file"),
    ("x: !!timestamp x\n", "not a valid YAML file"),
    ("x: !!map [1, 2]\n", "not a valid YAML file"),
    ("[" * 3000, "not a valid YAML file"),
    ("a: \x00", "not a valid YAML file"),
    ("", "must hold keys and values"),
])
def test_yaml_that_is_none(workspace, capsys, text, message):
    (workspace / "data.yaml").write_text(text)
    line = refuse(workspace, capsys)
    assert message in line and "data.yaml: " in line


def test_yaml_that_is_not_text(workspace, capsys):
    (workspace / "hp.yaml").write_bytes(b"\xff\xfe\x00")
    assert "hp.yaml: not a valid YAML file" in refuse(workspace, capsys)
    (workspace / "hp.yaml").unlink()
    assert "hp.yaml: cannot be read (No such file" in refuse(workspace, capsys)


@pytest.mark.parametrize("more, message", [
    (["--samples", "0"], "--samples: 0 must be at least 1"),
    (["--samples", "many"], "argument --samples: invalid int value: 'many'"),
    (["--samples", "1.5"], "argument --samples: invalid int"),
    (["--epochs", "0"], "--epochs: 0 must be at least 1"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["--seed", "-1"], "--seed: -1 must be at least 0"),
    (["--seed", "9" * 20], "--seed: "),
    (["--device", "gpu"], "--device: 'gpu' is not one of auto, cpu, cuda"),
    (["--device", "cuda:99"], "--device: cuda:99 is not there"),
    (["--device", "cuda:00"], "--device: 'cuda:00' is not one of"),
    (["--device", "cuda:٣"], "is not one of auto, cpu, cuda"),
    (["--precision", "fp8"], "--precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
    (["--precision", "fp16", "--device", "cpu"], "--precision: fp16 needs a CUDA device"),
    (["--name", "../x"], "--name: '../x' is not a plain folder name"),
    (["--name", ""], "--name: '' is not a plain folder name"),
    (["--name", ".."], "--name: '..' is not a plain folder name"),
    (["--data_dir", "/nowhere"], "toy.npz: no such file"),
    (["--num_rounds", "0"], "--num_rounds: 0 must be at least 1"),
    (["--num_rounds", "4", "--continual"], "--num_rounds: 4 must be at most 3, the number of tasks, with --continual"),
    (["--tasks_per_round", "0"], "--tasks_per_round: 0 must be at least 1"),
    (["--replay_frac", "0", "--continual"], "--replay_frac: 0.0 must be at least 1e-06 and at most 1"),
    (["--replay_frac", "1e-12", "--continual"], "--replay_frac: 1e-12 must be at least"),
    (["--replay_frac", "1.1", "--continual"], "--replay_frac: 1.1 must be"),
    (["--replay_frac", "nan", "--continual"], "--replay_frac: nan must be"),
    (["--replay_frac", "0.5"], "--replay_frac below 1 needs --continual"),
    (["--warm_start", "--continual"], "--warm_start contradicts --continual"),
    (["--continuall"], "unrecognized arguments: --continuall"),
    (["--cont"], "unrecognized arguments: --cont"),
    (["extra"], "unrecognized arguments: extra"),
])
def test_flags(workspace, capsys, more, message):
    assert message in refuse(workspace, capsys, *more)


def test_flags_of_one_command_are_not_the_others(workspace, capsys):
    assert "unrecognized arguments: --continual" in refuse(workspace, capsys, "--continual", method="multihead")


def test_required_flags(capsys):
    assert cli.command("modelzoo.py", "modelzoo", modelzoo.run, []) == 2
    assert capsys.readouterr().err == (
        "modelzoo.py: the following arguments are required: --data_config, --hp_config\n")


def test_images_too_small_for_the_network(workspace, capsys):
    write_yaml(workspace / "data.yaml", {"dataset": "npz", "path": "small.npz", "tasks": [[0, 1]]})
    import numpy as np

    from tests.conftest import make_arrays

    np.savez(workspace / "data/small.npz", **make_arrays(size=20))
    assert "hp.yaml: model conv needs images of at least 22 x 22 pixels; those of" in refuse(workspace, capsys)


def settings(workspace, *more, method="modelzoo"):
    return read_settings("x.py", method, flags(workspace, *more))


def test_flag_over_file_over_default(workspace):
    assert settings(workspace).epochs == 2
    assert settings(workspace, "--epochs", "7").epochs == 7
    write_yaml(workspace / "hp.yaml", {k: CONV[k] for k in ("model", "batch", "lr", "l2_reg", "dropout")})
    found = settings(workspace)
    assert (found.epochs, found.schedule, found.augment) == (100, "cosine", True)
    assert settings(workspace, "--epochs", "1").augment is False
    with pytest.raises(AttributeError):
        found.epochs = 3


def test_defaults_of_the_rounds(workspace):
    write_yaml(workspace / "data.yaml", {"dataset": "cifar100", "tasks": [[2 * i, 2 * i + 1] for i in range(20)]})

    def rounds(*more):
        found = settings(workspace, *more)
        return found.num_rounds, found.tasks_per_round

    assert rounds() == (10, 10)
    assert rounds("--continual") == (20, 5)
    assert rounds("--continual", "--num_rounds", "15", "--tasks_per_round", "1") == (15, 1)
    assert rounds("--num_rounds", "30", "--tasks_per_round", "99") == (30, 20)  # never above the number of tasks


def test_numbers_in_yaml_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1e-5\nb: 1E3\nc: -2.5e+2\nd: .5\ne: 12\nf: 1e5x\ng: 0\nh: 0.010\ni: 3.\n")
    expected = {"a": 1e-5, "b": 1000.0, "c": -250.0, "d": 0.5, "e": 12, "f": "1e5x", "g": 0, "h": 0.01, "i": 3.0}
    assert load_yaml(tmp_path / "a.yaml") == expected
    # YAML 1.1 would take these for 8, 90, 15 and 1000.
    (tmp_path / "a.yaml").write_text("a: 010\nb: 1:30\nc: 0xf\nd: 1_000\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": "010", "b": "1:30", "c": "0xf", "d": "1_000"}


@pytest.mark.parametrize("file", sorted(CONFIG.glob("dataset/*.yaml")), ids=lambda f: f.stem)
def test_shipped_dataset_files(file):
    found = read_dataset(file)
    assert found["dataset"] in DATASETS
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# python ") and lines[2].startswith("# ")


@pytest.mark.parametrize("file", sorted(CONFIG.glob("hyperparam/*.yaml")), ids=lambda f: f.stem)
def test_shipped_hyperparameter_files(file):
    read_hyperparam(file)
    assert file.read_text().splitlines()[1].startswith("# python ")


def test_shipped_files_are_the_contract(tmp_path):
    assert {f.stem for f in CONFIG.glob("dataset/*.yaml")} == {
        "coarse_cifar100", "split_cifar100", "custom_cifar100", "custom1", "custom2", "custom3", "noise1", "noise2",
        "noise3", "split_cifar10", "split_mnist", "rotated_mnist", "rotmnist", "permuted_mnist", "permnist",
        "split_miniimagenet", "split_digits", "rotated_digits"}
    coarse = read_dataset(CONFIG / "dataset/coarse_cifar100.yaml")
    assert len(coarse["tasks"]) == 20 and coarse["names"][3] == "food containers"
    assert sorted(label for task in coarse["tasks"] for label in task) == list(range(100))
    noise = read_dataset(CONFIG / "dataset/noise2.yaml")["tasks"]
    assert noise == tuple(tuple(x + 100 * n for x in coarse["tasks"][i]) for i, n in ((2, 1), (4, 0), (8, 1), (11, 0)))
    for name, numbers in (("custom_cifar100", (2, 5, 10, 16, 18)), ("custom3", (1, 5, 10, 11, 16))):
        assert read_dataset(CONFIG / f"dataset/{name}.yaml")["tasks"] == tuple(coarse["tasks"][i] for i in numbers)
    assert read_dataset(CONFIG / "dataset/rotmnist.yaml")["dataset"] == "rotated_mnist"
    wrn = {"model": "wrn16_4", "batch": 16, "lr": 0.01, "l2_reg": 1e-5, "dropout": 0.2, "schedule": "cosine"}
    expected = {"wrn": wrn, "default": {**wrn, "epochs": 200}, "conv": {**wrn, "model": "conv"},
                "small": {"model": "conv", "epochs": 5, "batch": 32, "lr": 0.01, "l2_reg": 1e-5, "dropout": 0,
                          "schedule": "constant", "augment": False}}
    for name, values in expected.items():
        found = read_hyperparam(CONFIG / f"hyperparam/{name}.yaml")
        left_out = {key: default for key, (_, default) in HYPER_OPTIONAL.items()}
        assert found == {"epochs": 100, "augment": True, **values, **left_out}


def test_a_width_is_part_of_the_networks_name(tmp_path):
    hyper = yaml.safe_load((CONFIG / "hyperparam/conv.yaml").read_text())
    for more, model in (({"width": 160}, "conv_160"), ({"width": 80}, "conv"), ({"model": "wrn40_2"}, "wrn40_2")):
        write_yaml(tmp_path / "hp.yaml", hyper | more)
        assert read_hyperparam(tmp_path / "hp.yaml")["model"] == model


def test_settings_survive_json_and_yaml(workspace):
    found = record(settings(workspace), __import__("torch").device("cpu"), "fp32")
    # Numbers of YAML 1.2 that 1.1 takes for texts, and the other way round; both kinds of readers are out there.
    found["names"] = ["1e-3", "12e4", "1E+5", ".5e3", "010", "1:30", "0x1f", "yes", "null", "~", "1.5", "-", "ü", ""]
    (workspace / "found.yaml").write_text(dump_yaml(found), encoding="utf-8")
    assert load_yaml(workspace / "found.yaml") == yaml.safe_load(dump_yaml(found)) == json.loads(json.dumps(found))


def test_errors_are_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        load_yaml(tmp_path)
