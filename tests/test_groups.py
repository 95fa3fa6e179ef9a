"""tools/runs.py: run folders read, grouped and named; ensembles as groups; folders that are damaged or foreign."""
import json

import pytest
import torch

from tests.runfolders import assert_one_line, make_run, make_seeds, read_groups, report_of
from tools import runs
from tools.runs import group_runs, make_ensemble, printable
from tools.stats import measure


def test_runs_that_differ_in_seed_only_are_one_group(tmp_path):
    folders = make_seeds(tmp_path, "zoo", [0.7, 0.72])
    folders.append(make_run(tmp_path / "other", [[0.6, 0.6]] * 2, seed=2, out="elsewhere", data_dir="d",
                            resume=True, save_nets=True, data_config="x/toy.yaml", hp_config="y.yaml",
                            names=["a", "b"]))
    folders.append(make_run(tmp_path / "lr", [[0.6, 0.6]] * 2, lr=0.1))
    folders.append(make_run(tmp_path / "naive", [[0.6, 0.6]] * 2, naive=True))
    folders.append(make_run(tmp_path / "again", [[0.9, 0.9]] * 2, seed=1))
    groups, notes = read_groups(folders)
    assert [(g.label, [run.seed for run in g.runs]) for g in groups] == [
        ("Model Zoo, lr 0.01", [0, 1, 2]), ("Model Zoo, lr 0.1", [0]),
        ("Model Zoo, lr 0.01, naive", [0])]
    assert notes == [f"{tmp_path}/again left out: {tmp_path}/zoo1 has the same settings and seed"]


@pytest.mark.parametrize("key", ["precision", "device", "l2_reg", "dropout", "schedule", "augment", "model", "samples"])
def test_runs_that_differ_in_a_setting_are_no_seeds_of_one_group(tmp_path, key):
    values = (5, 20) if key == "samples" else ("x", "y")
    folders = [make_run(tmp_path / f"{s}", [[0.6, 0.6]] * 2, s, **{key: x}) for s, x in enumerate(values)]
    assert len(read_groups(folders)[0]) == 2


def test_kinds_are_named(tmp_path):
    folders = [make_run(tmp_path / "a", [[0.6, 0.6]] * 2),
               make_run(tmp_path / "b", [[0.6, 0.6]] * 2, tasks_per_round=1),
               make_run(tmp_path / "c", [[0.6, 0.6]], method="multihead"),
               make_run(tmp_path / "d", [[0.6, 0.6]], continual=False)]
    labels = [group.label for group in read_groups(folders)[0]]
    assert labels == ["Model Zoo", "Isolated", "Multi-Head", "Model Zoo, multi-task"]


def test_labels_say_no_more_than_tells_a_kind_apart(tmp_path):
    """Once: what differed between any two groups stood in the labels of all."""
    same = {"samples": None, "schedule": "cosine"}
    folders = [make_run(tmp_path / "a", [[0.6, 0.6]] * 2, **same),
               make_run(tmp_path / "b", [[0.6, 0.6]] * 2, **same | {"samples": 20}),
               make_run(tmp_path / "c", [[0.6, 0.6]] * 2, **same | {"samples": 20, "schedule": "constant"}),
               make_run(tmp_path / "d", [[0.6] * 3] * 3, batch=4, **same),
               make_run(tmp_path / "e", [[0.6] * 3], batch=4, method="multihead", **same)]
    labels = ["Model Zoo, 2 tasks of toy, all samples", "Model Zoo, 2 tasks of toy, samples 20, schedule cosine",
              "Model Zoo, 2 tasks of toy, samples 20, schedule constant", "Model Zoo, 3 tasks of toy",
              "Multi-Head"]
    assert [group.label for group in read_groups(folders)[0]] == labels
    assert [group.label for group in read_groups(folders[::-1])[0]] == labels[::-1]


def test_groups_that_no_setting_tells_apart_have_labels_and_numbers_of_their_own(tmp_path):
    """Once: the third group was (2) as well, and its numbers stood in the second's row too."""
    folders = [make_run(tmp_path / name, [[x, x]] * 2, dataset="npz", path=f"{name}.npz")
               for name, x in (("a", 0.1), ("b", 0.5), ("c", 0.9))]
    groups, _ = read_groups(folders)
    assert [group.label for group in groups] == ["Model Zoo", "Model Zoo (2)", "Model Zoo (3)"]
    found = measure(groups)
    assert [found[group.label]["average_accuracy"][0] for group in groups] == [0.1, 0.5, 0.9]


def test_runs_of_one_seed_on_different_data_are_told(tmp_path):
    """Once: with the files under the same path changed between them, nothing was said."""
    def make(name, data, seed, **config):
        about = {"settings": {"data": data}}
        return make_run(tmp_path / name, [[0.5, 0.5]] * 2, seed, about=about, **config)

    runs = [make("zoo0", "a", 0), make("zoo1", "b", 1), make("iso0", "a", 0, tasks_per_round=1),
            make("fewer0", "c", 0, samples=5)]
    assert read_groups(runs)[1] == []
    (note,) = read_groups([*runs, make("iso1", "c", 1, tasks_per_round=1)])[1]
    assert note.startswith(f"{tmp_path / 'zoo1'} and {tmp_path / 'iso1'} have the same tasks, samples and seed, but")


@pytest.fixture
def ensemble(tmp_path, monkeypatch):
    """A function of (seed, settings) pairs: the ensemble of the runs made with them, of any predictions."""
    monkeypatch.setattr(runs, "load_log_probs", lambda run: ([torch.tensor([[0.7, 0.3]]).log()], [torch.tensor([0])]))

    def make(*members):
        folders = [tmp_path / "-".join(map(str, (seed, *config.values()))) for seed, config in members]
        for folder, (seed, config) in zip(folders, members, strict=True):
            if not folder.exists():
                about = {"settings": {"data": config.pop("data")}} if "data" in config else None
                stored = {"stored_rows": config.pop("stored_rows", None)}
                file = make_run(folder, [[1.0]], seed, about=about, **config) / "result.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | stored))
        return make_ensemble(folders)

    return make


TWO, TEN = {"tasks_per_round": 2}, {"tasks_per_round": 10}


def test_ensembles_of_other_members_are_other_ensembles(ensemble):
    """Once: the second was left out, because its seeds and the settings that its members share agree."""
    groups, notes = group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, {"tasks_per_round": 3}), (1, TEN))])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("ensemble of 2 Model Zoo", 1), ("ensemble of 2 Model Zoo (2)", 1)]
    assert notes == []


def test_ensembles_of_the_same_settings_are_a_group(ensemble):
    crossed = ensemble((0, TWO), (1, TEN)), ensemble((0, TEN), (1, TWO))
    (group,), notes = group_runs([*crossed, ensemble((1, TEN), (0, TWO))])
    assert len(group.runs) == 2
    assert len(notes) == 1
    assert "has the same settings and seed" in notes[0]


def test_members_stand_in_the_order_of_their_seeds(ensemble):
    """Found in a table: 8, 9, 10 and 11 stood as 10+11+8+9, as texts are ordered."""
    assert ensemble((10, TWO), (8, TWO), (9, TWO)).seed == (8, 9, 10)


def test_only_ensembles_with_a_member_in_common_share_runs(ensemble):
    """Once: two members of one seed, but of different settings, were called shared."""
    assert group_runs([ensemble((0, TWO), (0, TEN))])[1] == []
    assert group_runs([ensemble((0, TWO), (1, TEN)), ensemble((1, TWO), (0, TEN))])[1] == []
    assert group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, TWO), (1, TWO))])[1] == []
    _, notes = group_runs([ensemble((0, TWO), (1, TEN)), ensemble((0, TWO), (2, TEN))])
    assert len(notes) == 1
    assert "the ensembles share runs" in notes[0]


def test_ensemble_of_runs_on_different_rows_is_told(ensemble):
    assert group_runs([ensemble((0, {"data": "a"}), (1, {"data": "a"}))])[1] == []
    _, notes = group_runs([ensemble((2, {"data": "a"}), (3, {"data": "b"}))])
    assert notes == ["ensemble of 2 Model Zoo: its members were trained on different rows, so that it gains by more "
                     "data as well as by averaging"]


def test_ensemble_of_runs_on_other_task_files_is_not_told_of_other_rows(ensemble):
    """Once: the checksum is of all tasks of the file, learned or not."""
    longer = [[0, 1], [2, 3]]
    assert group_runs([ensemble((0, {"data": "a"}), (1, {"data": "b", "tasks": longer}))])[1] == []


@pytest.mark.parametrize(("first", "second", "stored"), [
    ({"data": "a"}, {"data": "a"}, 40),
    ({"data": "a"}, {"data": "b"}, None),  # each keeps rows of its own
    ({"data": "a", "replay_frac": 0.5}, {"data": "a", "replay_frac": 0.5}, None),
    ({}, {}, None),  # nobody knows
])
def test_rows_stored_by_an_ensemble(ensemble, first, second, stored):
    """Once: it was the count of one member, whatever the others kept."""
    run = ensemble((0, {**first, "stored_rows": 40}), (1, {**second, "stored_rows": 40}))
    assert run.cost["stored_rows"] == stored


def damage(result, *path, value=None):
    """`result` with the entry at `path` replaced, or dropped where `value` is None."""
    result = json.loads(json.dumps(result))
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(result)


FOREIGN = [
    lambda r: "", lambda r: "{", lambda r: "[]", lambda r: "{}", lambda r: "[" * 100_000, lambda r: '{"config": 3}',
    lambda r: damage(r, "config"), lambda r: damage(r, "config", "seed"), lambda r: damage(r, "rounds", value=[1, 2]),
    lambda r: damage(r, "accuracy_matrix", 1, 0, value=1.5), lambda r: damage(r, "accuracy_matrix", 1, 0, value="x"),
    lambda r: damage(r, "accuracy_matrix", 1, value=[0.5]), lambda r: damage(r, "accuracy_matrix", value=[]),
    lambda r: damage(r, "method", value="svm"), lambda r: damage(r, "classes", value=[[1, 2]]),
    lambda r: damage(r, "rounds", 0, "tasks", value=[7]), lambda r: damage(r, "seconds", value="fast"),
    lambda r: damage(r, "classes", value=[]), lambda r: damage(r, "config", "method", value=["svm"]),
    lambda r: damage(r, "accuracy_matrix", 1, 1, value=float("nan")), lambda r: damage(r, "config", value=[]),
    lambda r: damage(r, "config", "samples", value={"a": 1}), lambda r: damage(r, "config", "task_order", value="x"),
    lambda r: damage(r, "config", "epochs", value="5"), lambda r: damage(r, "config", "model", value=["conv"]),
]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_results_are_one_line(tmp_path, capsys, foreign):
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(foreign(result))
    assert report_of(folder) == 2
    assert_one_line(capsys, "result.json: not a result of this code")


def test_missing_unfinished_and_foreign_folders_are_one_line_each(tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("settings: {}")
    (tmp_path / "empty").mkdir()
    bad = {"nowhere": "no such run folder", "unfinished": "not finished", "empty": "not a run folder"}
    for name, message in bad.items():
        assert report_of(tmp_path / name) == 2
        assert_one_line(capsys, message)
    assert report_of(*(tmp_path / name for name in bad)) == 2
    assert capsys.readouterr().err.count("\n") == 3
    good = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    assert report_of(*(tmp_path / name for name in bad), good) == 0
    caught = capsys.readouterr()
    assert caught.err.count("report.py: skipped: ") == caught.err.count("\n") == 3
    assert "Model Zoo" in caught.out


@pytest.mark.parametrize("about", [{"settings": {"data": ["a"]}}, {"settings": ["data"]}])
def test_foreign_checksums_are_one_line(tmp_path, capsys, about):
    assert report_of(make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2, about=about)) == 2
    assert_one_line(capsys, "not a result of this code")


def test_a_config_that_wants_to_execute_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "zoo", [[0.5, 0.5]] * 2)
    (folder / "config.yaml").write_text('a: !!python/object/apply:os.system ["touch EXECUTED"]')
    assert report_of(folder) == 2
    assert_one_line(capsys, "config.yaml: not a valid YAML file")
    assert not (tmp_path / "EXECUTED").exists()


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\nc\x9b") == "a?[2Jb c?"
