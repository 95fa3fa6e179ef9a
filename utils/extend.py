"""A run that begins with another's learners (`--extend`), and the rows that its tasks may have gained since."""
from pathlib import Path

from datasets.data import checksum, find_rows, hash_rows
from utils.config_files import ConfigError, load_yaml
from utils.learner import learner_path, load_run
from utils.pretrained import hash_weights
from utils.run_folder import MAY_CHANGE, is_whole, load_tensors, record, write_file


def check_extension(settings, device, precision, train, test):
    """Whether the learners of the run folder `settings.extend` are those that this run would begin with.

    A task may have gained training rows: those that it had must still be there, and the test rows be the same.

    Args:
        settings: this run's.
        device, precision, train, test: see `prepare`.

    Returns:
        A tuple of tasks for each of its learners; none where nothing is extended.

    Raises:
        ConfigError: they are not: other settings, other data, tasks that do not come first here; or a damaged file. Or
            a run is resumed without `--extend` that was killed before it had copied all learners.
    """
    if settings.extend is None:
        _check_copied(settings)
        return []
    folder, mine = Path(settings.extend), record(settings, device, precision)
    if settings.resume and not folder.exists():
        raise ConfigError(f"--extend: {folder} is not there; a run that has copied its learners resumes without it")
    theirs, _, learners, nets = load_run(folder, "cpu")
    if settings.inherit and nets[-1] is None:
        raise ConfigError(f"--inherit: {folder} kept no network to inherit from; run that again with --inherit, or "
                          "extend it without")
    n = len(theirs["tasks"])
    # Precision, device and threads may change on the way.
    apart = (*MAY_CHANGE, "num_rounds", "device", "precision", "threads", "data", "names", "save_nets", "task_order")
    now = mine | {"tasks": mine["tasks"][:n], "tasks_per_round": min(mine["tasks_per_round"], n)}
    for key in now:
        if key not in apart and now[key] != theirs.get(key):
            what = f"the first {n} tasks are" if key == "tasks" else f"{key} is {now[key]!r:.40},"
            was = "other tasks" if key == "tasks" else f"{key} {theirs.get(key)!r:.40}"
            raise ConfigError(f"--extend: {what} not as in {folder}, which was run with {was}")
    if settings.save_nets and None in nets:
        raise ConfigError(f"--save_nets: {folder} did not keep every network, so this run cannot either")
    if theirs.get("weights_data", weights := hash_weights(settings, train.images.shape[1:])) != weights:
        raise ConfigError(f"--extend: {folder} began with other weights than those that {settings.weights} now holds")
    if checksum(train.first(n), test.first(n)) != theirs.get("data"):
        _check_gained(settings, folder, train, test, n)
    if len(learners) > settings.num_rounds:
        raise ConfigError(f"--extend: {folder} holds {len(learners)} learners; --num_rounds must be at least that")
    return [learner.tasks for learner in learners]


def _check_copied(settings):
    """Refuse to resume a run that was begun with `--extend` and has not copied all learners: it would train them."""
    file = settings.folder / "config.yaml"
    begun = load_yaml(file).get("settings") if settings.resume and file.is_file() else None
    source = begun.get("extend") if isinstance(begun, dict) else None
    if source and not (settings.folder / "rows.pt").exists():  # which is written once they are there
        raise ConfigError(f"--resume: {settings.folder} has not yet copied all learners of {source}; "
                          "give --extend again")


def _check_gained(settings, folder, train, test, n):
    """Refuse data of the first `n` tasks that are not those of the run in `folder` and more training rows.

    Raises:
        ConfigError: they are not, the run did not record its rows, or only a share of past rows is kept.
    """
    what = f"--extend: the data of the first {n} tasks are not those that {folder} was run on"
    hashes = load_rows(folder)
    rows = hashes.get("all", hashes["train"])  # which runs did not tell apart at first
    if not rows:
        raise ConfigError(f"{what} (it did not record its rows one by one, so rows added since cannot be found)")
    for t in range(n):
        if not hash_rows(test, t).equal(hashes["test"][t]):
            raise ConfigError(f"{what}: the test rows of task {t} (counted from 0) have changed")
        if find_rows(train, t, rows[t]) is None:
            chosen = [flag for flag in ("samples", "val_frac") if getattr(settings, flag) not in (None, "file")]
            why = f"; with more rows, --{chosen[0]} chooses others" if chosen else ""
            raise ConfigError(f"{what}: training rows of task {t} (counted from 0) are gone{why}")
    if settings.replay_frac < 1:
        raise ConfigError(f"{what}: with --replay_frac below 1 the rows that are kept of a past task stay as they are")


def copy_learners(source, folder):
    """Copy the learners of the run folder `source` that `folder` does not have whole; return how many `source` has."""
    copied = 0
    while (path := learner_path(Path(source), copied)).exists():
        mine = learner_path(folder, copied)
        if not is_whole(mine):
            write_file(mine, path.read_bytes())
        copied += 1
    return copied


def hash_tasks(settings, train, test):
    """What rows.pt holds: of each task the hashes of its test rows and of the training rows that make its loss.

    Those are all of its training rows, or, where it has gained some since the run that this one extends, the old ones;
    all stand under "all".
    """
    tasks = range(len(settings.tasks))
    mine = {key: [hash_rows(data, t) for t in tasks] for key, data in (("train", train), ("test", test))}
    mine["all"] = list(mine["train"])
    if settings.extend:
        theirs = load_rows(settings.extend)
        mine["train"][: len(theirs["train"])] = theirs["train"]
    return mine


def load_rows(folder):
    """What `hash_tasks` gave for a run; of runs that did not record it no task."""
    try:
        return load_tensors(Path(folder) / "rows.pt", "cpu")
    except FileNotFoundError:
        return {"train": [], "test": []}
    except ValueError as e:
        raise ConfigError(f"{Path(folder) / 'rows.pt'}: damaged; remove it, and the run's own command with --resume "
                          "(and --extend where it began with that) writes it again") from e


def find_loss_rows(folder, train, num_tasks):
    """Of each of the first tasks the rows that the zoo's loss is taken over: those of rows.pt, in their order.

    They are all rows but where the task has gained some, of which the old learners never gave their word.
    """
    hashes = load_rows(folder)["train"]
    return [find_rows(train, t, hashes[t]) if t < len(hashes) and len(hashes[t]) < len(train.rows(t)) else train.rows(t)
            for t in range(num_tasks)]
