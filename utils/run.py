"""A run from its settings to its result: prepared before anything is written, opened, finished."""
import contextlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from datasets.build_dataset import build_dataset, build_val, hold_out
from datasets.data import checksum, find_rows, hash_rows, replay_repeats
from net.build_net import build_net
from utils import metrics
from utils.config_files import ConfigError, load_yaml
from utils.device import choose_device, choose_precision, default_threads, describe_hardware, free_gpu_memory
from utils.learner import learner_path, load_run
from utils.log import RunLog, print_result, say_folded, task_names
from utils.pretrained import load_weights
from utils.run_folder import (
    FREE,
    check_folder,
    load_tensors,
    naming_memory,
    open_folder,
    save_tensors,
    versions,
    write_file,
)
from utils.run_net import make_generator


def prepare(settings, loaded=None):
    """Choose the device, load the data, and refuse what cannot work, before anything is written.

    Args:
        settings: the run's.
        loaded: as for `build_dataset`.

    Returns:
        device, precision (fp32, bf16 or fp16), and train and test, `TaskData` on the CPU.

    Raises:
        ConfigError: no such device, images too small for the model, or weights that are not there or not its own.
        DataError: see `build_dataset`.
    """
    device = choose_device(settings.device)
    torch.set_num_threads(settings.threads or recorded_threads(settings) or default_threads(settings.model))
    precision = choose_precision(settings.precision, device)
    generator = make_generator(settings.seed, 0, "data")
    with naming_memory(f"{settings.data_config}: too little memory to load the data; try --samples or fewer tasks"):
        train, test = build_dataset(settings.dataset, settings.tasks, settings.data_dir, generator, settings.samples,
                                    settings.path, settings.size, loaded, settings.keywords, settings.flip)
    try:
        build_net(settings.model, train.images.shape[1:], train.classes[:1], settings.dropout, seed=0)
    except ValueError as e:
        size = " x ".join(map(str, train.images.shape[2:]))
        raise ConfigError(f"{settings.hp_config}: {e}; those of {settings.data_config} have {size}") from e
    if settings.weights:
        load_weights(settings, train.images.shape[1:])
    return device, precision, train, test


def split_val(settings, train):
    """The training rows, and those of --val_frac: held out of them, or the file's own (None: there are none).

    Raises:
        DataError: see `hold_out` and `build_val`.
    """
    if settings.val_frac == "file":
        return train, build_val(train, settings.tasks, settings.data_dir, settings.path)
    return hold_out(train, settings.val_frac, settings.data_dir) if settings.val_frac else (train, None)


def place(device, *splits):
    """The splits (`TaskData` on the CPU, or None) on the training device; images too many for it stay on the host."""
    size, room = sum(data.images.numel() for data in splits if data), free_gpu_memory(device)
    fits = size <= room / 2  # training wants the other half
    if not fits:
        say_folded(f"the images, {size / 1e9:.1f} GB, would take more than half of the {room / 1e9:.1f} GB free on "
                   f"{device}: they stay in the machine's memory, and each batch is fetched from there")
    with naming_memory(f"{device}: too little memory for the data; try --samples or --device cpu"):
        return tuple(data and data.to(device, images=fits) for data in splits)


def recorded_threads(settings):
    """The number of threads that a run to be resumed was begun with, on which its last digits depend; else None.

    Raises:
        ConfigError: a damaged config.yaml.
    """
    file = Path(settings.out) / settings.name / "config.yaml"
    if not settings.resume or not file.is_file():
        return None
    about = load_yaml(file)
    threads = about["settings"].get("threads") if isinstance(about.get("settings"), dict) else None
    older = re.search(r"(\d+) threads", str(about.get("hardware")))  # where runs said it at first
    return threads if isinstance(threads, int) and threads > 0 else int(older[1]) if older else None


def record(settings, device, precision):
    """The settings as JSON and YAML know them, with the device, precision and threads that stand for the defaults."""
    chosen = {"device": device.type, "precision": precision, "threads": torch.get_num_threads()}
    return json.loads(json.dumps(asdict(settings) | chosen))


def as_lists(tasks):
    """Tuples of tuples as JSON and YAML know them."""
    return [list(task) for task in tasks]


def count_parameters(model, image_shape, classes, dropout):
    """Numbers that a network with these heads learns."""
    return sum(p.numel() for p in build_net(model, image_shape, classes, dropout, seed=0).parameters())


def plan_rounds(settings, train):
    """What the learners will train on, the warm start first: of each the number of its tasks and its rows in an epoch.

    The rows are those of average tasks, because which tasks are drawn is not known yet.
    """
    num_tasks, r = len(train.classes), settings.replay_frac
    whole = len(train.labels) / num_tasks
    plan = [(num_tasks, len(train.labels))] * settings.warm_start
    for k in range(settings.num_rounds):
        n = min(settings.tasks_per_round, k + 1 if settings.continual else num_tasks)
        past = whole if r == 1 or n == 1 else whole * r * replay_repeats(n, r)
        plan.append((n, round(whole + (n - 1) * past)))
    return plan


def find_run(settings, device, precision, train, test):
    """Where the run folder is and whether this run may write it; nothing is written.

    Returns:
        folder: its path.
        about: what its config.yaml says of the settings; a checksum of the training and test rows, too, so that a run
            is never gone on with on others.
        found: rounds whose learners are there.

    Raises:
        ConfigError, RunError: see `check_folder`.
    """
    folder = Path(settings.out) / settings.name
    about = record(settings, device, precision) | {"data": checksum(train, test)}
    check_folder(folder, about, settings.resume)
    return folder, about, sum(learner_path(folder, k).exists() for k in range(settings.num_rounds))


def describe(settings, device, precision, train, plan):
    """A run in two lines: what it trains, and on what. Arguments as of `open_run`."""
    kind = {"modelzoo": "Model Zoo, " + ("continual" if settings.continual else "multi-task: all tasks are known")
                        + ", each learner from the one before" * (settings.inherit and not settings.freeze)
                        + ", weighed by round" * settings.weigh_by_round,
            "multihead": "Multi-Head, joint training on all tasks"}.get(settings.method, settings.method)
    most, epochs = max(n for n, _ in plan), settings.epochs
    parameters = count_parameters(settings.model, train.images.shape[1:], train.classes[:most], settings.dropout)
    tasks = count(most, "task")
    rounds = f"{settings.num_rounds} rounds, {tasks} per learner at most" if len(plan) > 1 else "1 learner"
    net = f"{settings.model} with {parameters:,} parameters per learner"
    if settings.weights:
        net += f", from {settings.weights}"
    if settings.freeze:
        net = f"heads alone, on features of {settings.model} from {settings.weights}, images not augmented"
    threads = torch.get_num_threads()
    num_tasks = settings.num_rounds if settings.continual else len(train.classes)
    return [
        f"{kind}: {count(num_tasks, 'task')}, {rounds}, {sum(rows for _, rows in plan) * epochs:,} rows to "
        f"train on ({count(epochs, 'epoch')}), {net}",
        f"{device}, {precision}, {count(threads, 'thread')}; run folder {Path(settings.out) / settings.name}",
    ]


def count(n, noun):
    """"1 task", "2 tasks"."""
    return f"{n} {noun}{'s' * (n != 1)}"


@contextlib.contextmanager
def open_run(settings, device, precision, train, test, plan):
    """Hold the run folder as its only writer, and yield its path and the run's `RunLog`.

    The test labels lie in it, so that a new metric, or an ensemble of runs, needs run folders alone.

    Args:
        settings: the run's.
        device, precision, train, test: see `prepare`.
        plan: of each learner the number of its tasks and the rows that it trains on in an epoch, about.

    Raises:
        ConfigError, RunError: see `open_folder`.
    """
    folder, about, found = find_run(settings, device, precision, train, test)
    first, second = describe(settings, device, precision, train, plan)
    work = settings.epochs * sum(rows for _, rows in plan)
    names = task_names(settings.tasks, settings.names, train.class_names)
    origin = {"hardware": describe_hardware(device), "class_names": as_lists(train.class_names)}
    with open_folder(folder, about, settings.resume, origin):
        try:
            load_tensors(folder / "test_labels.pt", "cpu")
        except (FileNotFoundError, ValueError):  # not yet there, or damaged
            labels = [test.labels[test.rows(t)].cpu() for t in range(len(settings.tasks))]
            save_tensors(folder / "test_labels.pt", labels)
        if not (folder / "rows.pt").exists():
            save_tensors(folder / "rows.pt", hash_tasks(settings, train, test))
        copied = copy_learners(settings.extend, folder) if settings.extend else 0
        with RunLog(folder, settings.num_rounds, work, settings.tensorboard, names, settings.continual) as log:
            say_folded(first)
            begun = ", and a checkpoint of the next" * any((folder / "learners").glob("*.checkpoint"))
            say_folded(second + f"; {found} of {settings.num_rounds} rounds found{begun}" * settings.resume
                       + f"; {copied} rounds come from {settings.extend}" * bool(settings.extend))
            yield folder, log


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


def find_looked_at(folder, train, num_tasks):
    """Of each of the first tasks the rows that the zoo's loss is taken over: those of rows.pt, in their order.

    They are all rows but where the task has gained some, of which the old learners never gave their word.
    """
    hashes = load_rows(folder)["train"]
    return [find_rows(train, t, hashes[t]) if t < len(hashes) and len(hashes[t]) < len(train.rows(t)) else train.rows(t)
            for t in range(num_tasks)]


def check_extension(settings, device, precision, train, test):
    """Whether the learners of the run folder `settings.extend` are those that this run would begin with.

    A task may have gained training rows: those that it had must still be there, and the test rows be the same.

    Args:
        settings: this run's.
        device, precision, train, test: see `prepare`.

    Returns:
        A tuple of tasks for each of its learners; none where nothing is extended.

    Raises:
        ConfigError: they are not: other settings, other data, tasks that do not come first here; or a damaged file.
    """
    if settings.extend is None:
        return []
    folder, mine = Path(settings.extend), record(settings, device, precision)
    theirs, _, learners, nets = load_run(folder, "cpu")
    if settings.inherit and nets[-1] is None:
        raise ConfigError(f"--inherit: {folder} kept no network to inherit from; run that again with --inherit, or "
                          "extend it without")
    n = len(theirs["tasks"])
    # Precision, device and threads may change on the way.
    apart = (*FREE, "num_rounds", "device", "precision", "threads", "data", "names", "save_nets")
    now = mine | {"tasks": mine["tasks"][:n], "tasks_per_round": min(mine["tasks_per_round"], n)}
    for key in now:
        if key not in apart and now[key] != theirs.get(key):
            what = f"the first {n} tasks are" if key == "tasks" else f"{key} is {now[key]!r:.40},"
            was = "other tasks" if key == "tasks" else f"{key} {theirs.get(key)!r:.40}"
            raise ConfigError(f"--extend: {what} not as in {folder}, which was run with {was}")
    if settings.save_nets and None in nets:
        raise ConfigError(f"--save_nets: {folder} did not keep every network, so this run cannot either")
    if checksum(train.first(n), test.first(n)) != theirs.get("data"):
        _check_gained(settings, folder, train, test, n)
    if len(learners) > settings.num_rounds:
        raise ConfigError(f"--extend: {folder} holds {len(learners)} learners; --num_rounds must be at least that")
    return [learner.tasks for learner in learners]


def _check_gained(settings, folder, train, test, n):
    """Refuse data of the first `n` tasks that are not those of the run in `folder` and more training rows.

    Raises:
        ConfigError: they are not, the run did not record its rows, or only a share of past rows is kept.
    """
    what = f"--extend: the data of the first {n} tasks are not those that {folder} was run on"
    hashes = load_rows(folder)
    rows = hashes.get("all", hashes["train"])  # which runs did not tell apart at first
    if not rows:
        raise ConfigError(f"{what} (it did not record its rows one by one, so that more of them cannot be told)")
    for t in range(n):
        if not hash_rows(test, t).equal(hashes["test"][t]):
            raise ConfigError(f"{what}: the test rows of task {t} (counted from 0) have changed")
        if find_rows(train, t, rows[t]) is None:
            why = "; with --samples others are chosen of more" * (settings.samples is not None)
            raise ConfigError(f"{what}: training rows of task {t} (counted from 0) are gone{why}")
    if settings.replay_frac < 1:
        raise ConfigError(f"{what}: with --replay_frac below 1 the rows that are kept of a past task stay as they are")


def copy_learners(source, folder):
    """Copy the learners of the run folder `source` that `folder` does not have yet; return how many `source` has."""
    copied = 0
    while (path := learner_path(Path(source), copied)).exists():
        if not learner_path(folder, copied).exists():
            write_file(learner_path(folder, copied), path.read_bytes())
        copied += 1
    return copied


def finish(settings, device, precision, train, matrix, rounds, cost):
    """Write result.json, the last file, print and return it; docs/run_folder.md defines its keys.

    Args:
        settings, device, precision: see `open_run`.
        train: `TaskData` of all tasks.
        matrix: [rounds][tasks] test accuracy after each round, None where a task is not yet seen.
        rounds: a dict per round: tasks, weights, train_loss, seconds.
        cost: seconds, rows_trained, parameters, stored_rows and whatever else the method keeps.
    """
    result = {
        "method": settings.method,
        "average_accuracy": metrics.average_accuracy(matrix),
        "accuracy": matrix[-1],
        "accuracy_matrix": matrix,
        "learning_accuracy": metrics.learning_accuracy(matrix) if settings.continual else None,
        "forgetting": metrics.forgetting(matrix) if settings.continual else None,
        "backward_transfer": metrics.backward_transfer(matrix) if settings.continual else None,
        "rounds": rounds,
        "classes": as_lists(settings.tasks[: len(matrix[-1])]),
        "class_names": as_lists(train.class_names[: len(matrix[-1])]),
        "image_shape": list(train.images.shape[1:]),
        "config": record(settings, device, precision),
        "versions": versions(),
        **cost,
    }
    folder = Path(settings.out) / settings.name
    write_file(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print_result(result, task_names(settings.tasks, settings.names, train.class_names), folder)
    return result
