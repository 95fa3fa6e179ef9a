"""Run folders as pandas frames, and in words; every number by hand."""
import json

import pytest

from tests.runfolders import make_predictions, make_run, make_seeds, read_groups
from tools.runs import describe_groups, load_frame, make_frame
from utils.config_files import ConfigError

ZOO = [[0.5, 0, 0], [0.6, 0.7, 0], [0.4, 0.8, 0.9]]
ISOLATED = [[0.5, 0, 0], [0.5, 0.6, 0], [0.5, 0.6, 0.65]]


def test_a_row_a_run(tmp_path):
    about = {"commit": "a" * 40, "hardware": "a CPU", "versions": {"torch": "2.11"}}
    folders = [make_run(tmp_path / "zoo", ZOO, 3, about=about, samples=20),
               make_run(tmp_path / "iso", ISOLATED, 3, tasks_per_round=1, samples=20),
               make_run(tmp_path / "joint", [[0.5, 0.7, 0.9]], 3, method="multihead", cost=(None, 100, 7))]
    frame = load_frame(folders)
    assert list(frame.columns[:20]) == [
        "run", "group", "kind", "seed", "task_order", "average_accuracy", "learning_accuracy", "forgetting",
        "backward_transfer", "forward_transfer", "networks", "rows_trained", "stored_rows", "stored_numbers",
        "parameters", "seconds", "commit", "hardware", "torch", "dataset"]
    assert list(frame["run"]) == list(map(str, folders))
    assert list(frame["group"]) == list(frame["kind"]) == ["Model Zoo", "Isolated", "Multi-Head"]
    zoo, isolated, joint = frame.to_dict("records")
    assert zoo["average_accuracy"] == pytest.approx((0.4 + 0.8 + 0.9) / 3)
    assert zoo["learning_accuracy"] == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert zoo["forgetting"] == pytest.approx(((0.6 - 0.4) + (0.7 - 0.8)) / 2)
    assert zoo["backward_transfer"] == pytest.approx(((0.4 - 0.5) + (0.8 - 0.7)) / 2)
    assert zoo["forward_transfer"] == pytest.approx(((0.7 - 0.6) + (0.9 - 0.65)) / 2)
    assert zoo["networks"] == pytest.approx((1 + 2 + 2) / 3)
    assert (zoo["rows_trained"], zoo["parameters"], zoo["seconds"]) == (300, 40, 2)
    assert (zoo["commit"], zoo["hardware"], zoo["torch"]) == ("aaaaaaaaaa", "a CPU", "2.11")
    assert (zoo["seed"], zoo["dataset"], zoo["tasks"], zoo["samples"]) == (3, "digits", "3 tasks of toy", 20)
    assert (joint["average_accuracy"], joint["rows_trained"]) == (pytest.approx(0.7), 100)
    unknown = frame[["forward_transfer", "forgetting", "seconds", "stored_rows", "samples"]].isna().to_numpy().tolist()
    assert unknown == [[False, False, False, True, False], [True, False, False, True, False],
                       [True, True, True, True, True]]
    assert isolated["learning_accuracy"] == pytest.approx((0.5 + 0.6 + 0.65) / 3)
    assert set(map(str, frame.dtypes[["forgetting", "stored_rows"]])) == {"float64"}


def test_forward_transfer_is_of_the_same_seed_and_settings(tmp_path):
    folders = make_seeds(tmp_path, "zoo", [0.8, 0.9, 0.7]) + make_seeds(tmp_path, "iso", [0.5, 0.7], tasks_per_round=1)
    folders += make_seeds(tmp_path, "longer", [0.1, 0.1, 0.1], tasks_per_round=1, epochs=9)
    frame = load_frame(folders).set_index(["kind", "epochs", "seed"]).sort_index()["forward_transfer"]
    assert frame["Model Zoo", 2].to_dict() == pytest.approx({0: 0.3, 1: 0.2, 2: float("nan")}, nan_ok=True)
    assert frame["Isolated"].isna().all()


def test_forward_transfer_is_of_the_same_tasks_in_the_same_order(tmp_path):
    """With Isolated of a file that lists the tasks the other way round: once its numbers were taken place by place."""
    tasks = [[0, 1], [2, 3]]
    zoo = make_run(tmp_path / "zoo", [[0.5, 0.5], [0.5, 0.8]], tasks=tasks)
    other = make_run(tmp_path / "other", [[0.1, 0.1], [0.7, 0.2]], tasks=tasks[::-1], tasks_per_round=1)
    same = make_run(tmp_path / "same", [[0.1, 0.1], [0.2, 0.7]], tasks=tasks, tasks_per_round=1)
    assert load_frame([zoo, other])["forward_transfer"].isna().all()
    frame = load_frame([zoo, other, same]).set_index("run")
    assert frame.forward_transfer[str(zoo)] == pytest.approx(0.8 - 0.7)


def test_a_row_a_run_and_task(tmp_path):
    """With tasks_per_round 2, rounds 0, 1 and 2 train on tasks (0), (0, 1) and (0, 2)."""
    frame = load_frame([make_run(tmp_path / "zoo", ZOO, 3, names=["a", "b", "c"])], rows="task")
    assert list(frame.columns) == ["run", "group", "kind", "seed", "task_order", "task", "name", "first_seen",
                                   "accuracy"]
    assert frame.drop(columns="run").to_numpy().tolist() == [
        ["Model Zoo", "Model Zoo", 3, 0, 0, "a", 0.5, 0.4], ["Model Zoo", "Model Zoo", 3, 0, 1, "b", 0.7, 0.8],
        ["Model Zoo", "Model Zoo", 3, 0, 2, "c", 0.9, 0.9]]


def test_first_seen_is_the_first_round_that_trains_on_the_task(tmp_path):
    """A multi-task zoo has accuracies on all tasks from the start, and knows them later."""
    folder = make_run(tmp_path / "zoo", [[0.5, 0.6], [0.1, 0.7], [0.8, 0.9]], continual=False)
    result = json.loads((folder / "result.json").read_text())
    for k, tasks in enumerate(([1], [1], [0])):
        result["rounds"][k]["tasks"] = tasks
    (folder / "result.json").write_text(json.dumps(result))
    frame = load_frame([folder], rows="task")
    assert list(frame["first_seen"]) == [0.8, 0.6]
    assert list(frame["accuracy"]) == [0.8, 0.9]


def test_a_row_a_run_round_and_task_seen(tmp_path):
    folders = [make_run(tmp_path / "zoo", ZOO, 3), make_run(tmp_path / "joint", [[0.5, 0.6, 0.7]], method="multihead")]
    frame = load_frame(folders, rows="round")
    columns = ["round", "task", "name", "accuracy", "trained", "weight"]
    assert list(frame.columns) == ["run", "group", "kind", "seed", "task_order", *columns]
    # make_run gives the draw of round k the weights 0.5, 1.5, ... of its k past tasks
    expected = [
        (1, 0, "0 1", 0.5, True, None),
        (2, 0, "0 1", 0.6, True, 0.5), (2, 1, "2 3", 0.7, True, None),
        (3, 0, "0 1", 0.4, True, 0.5), (3, 1, "2 3", 0.8, False, 1.5), (3, 2, "4 5", 0.9, True, None),
        (1, 0, "0 1", 0.5, True, None), (1, 1, "2 3", 0.6, True, None), (1, 2, "4 5", 0.7, True, None)]
    found = frame[columns].astype(object).where(frame[columns].notna(), None)
    assert list(found.itertuples(index=False, name=None)) == expected
    assert list(frame["seed"]) == [3] * 6 + [0] * 3


def test_ensembles_stand_in_every_frame(tmp_path):
    """Class 0 has probability 0.9 and 0.3: each is right on one row of two, their mean (0.6) on the first."""
    pair = [make_predictions(make_run(tmp_path / f"iso{s}", [[0.5]], s, tasks_per_round=1), [[[p, 1 - p]] * 2], [0, 1])
            for s, p in ((4, 0.9), (2, 0.3))]
    run = load_frame(pair, [pair]).iloc[2]
    assert (run["kind"], run["seed"], run["average_accuracy"]) == ("ensemble of 2 Isolated", (2, 4), 0.5)
    assert (run["networks"], run["rows_trained"], run["seconds"]) == (2, 600, 4)
    assert run[["learning_accuracy", "forgetting", "forward_transfer", "stored_numbers"]].isna().all()
    assert (run["dataset"], run["epochs"]) == ("digits", 2)
    task = load_frame([], [pair], rows="task").iloc[0]
    assert (task["task"], task["accuracy"], task.isna()["first_seen"]) == (0, 0.5, True)
    round = load_frame([], [pair], rows="round").iloc[0]
    assert (round["round"], round["accuracy"], round["trained"], round.isna()["weight"]) == (1, 0.5, False, True)


def test_a_run_of_an_older_code_still_reads(tmp_path):
    """Without the settings, costs and files that came later."""
    folder = make_run(tmp_path / "old", [[0.5, 0.7]] * 2)
    result = json.loads((folder / "result.json").read_text())
    for key in ("save_nets", "resume", "out", "epochs"):
        del result["config"][key]
    for key in ("parameters", "rows_trained"):
        del result[key]
    (folder / "result.json").write_text(json.dumps(result))
    old, new = load_frame([folder, make_run(tmp_path / "new", [[0.5, 0.7]] * 2, inherit=False)]).to_dict("records")
    assert old["average_accuracy"] == new["average_accuracy"] == 0.6
    assert (old["seconds"], new["rows_trained"], old["dataset"]) == (2, 300, "digits")
    assert old["rows_trained"] != old["rows_trained"]  # NaN
    assert old["epochs"] != old["epochs"] and new["epochs"] == 2


def test_frames_say_what_is_left_out_and_refuse_nothing(tmp_path, capsys):
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    frame = load_frame([folder, folder, tmp_path / "none"])
    assert len(frame) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"load_frame: skipped: {tmp_path}/none: no such run folder",
        f"load_frame: note: {folder} left out: {folder} has the same settings and seed"]
    assert load_frame(str(folder)).equals(frame)  # one path, where a list is due, is no list of letters
    for paths in ([], [tmp_path / "none"]):
        with pytest.raises(ConfigError):
            load_frame(paths)


def test_settings_of_a_foreign_file_do_not_take_the_place_of_our_columns(tmp_path):
    (row,) = load_frame([make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2, group="mine", forgetting=7)]).to_dict("records")
    assert (row["group"], row["forgetting"]) == ("Model Zoo", 0)


def test_groups_in_words(tmp_path):
    zoo = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2, samples=20)
    isolated = make_run(tmp_path / "iso", [[0.5, 0.5]] * 2, tasks_per_round=1, samples=20)
    assert describe_groups(read_groups([zoo, isolated])[0]) == "toy, 2 tasks; conv, 2 epochs, samples 20"
    longer = make_run(tmp_path / "long", [[0.5, 0.5]] * 2, samples=20, epochs=9)
    assert (describe_groups(read_groups([longer, zoo])[0])
            == "toy, 2 tasks; conv, 9 or 2 epochs, samples 20")
    other = make_run(tmp_path / "other", [[0.5]], data_config="x/other.yaml", model="wrn16_4", epochs=1, samples=None)
    assert describe_groups(read_groups([other])[0]) == "other, 1 task; wrn16_4, 1 epoch, all samples"
    assert describe_groups(read_groups([zoo, longer, other])[0]) == (
        "toy or other, 1 or 2 tasks; conv or wrn16_4, 2, 9 or 1 epochs, samples 20 or all samples")
    joint = [make_run(tmp_path / f"joint{n}", [[0.5] * n], method="multihead") for n in (3, 1, 2)]
    assert describe_groups(read_groups(joint)[0]) == "toy, 1, 2 or 3 tasks; conv, 2 epochs"


def test_an_ensemble_in_words_is_its_members(tmp_path):
    pair = [make_predictions(make_run(tmp_path / f"{n}", [[1.0]], samples=n), [[[0.9, 0.1]]], [0]) for n in (5, 20)]
    groups, _ = read_groups(pair[:1], [pair])
    assert describe_groups(groups) == "toy, 1 task; conv, 2 epochs, samples 5 or samples 20"


def test_unknown_rows_are_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(KeyError):
        make_frame(read_groups([make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)])[0], rows="epoch")
