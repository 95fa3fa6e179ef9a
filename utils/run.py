"""A run from its settings to its result: prepared before anything is written, opened, finished."""
import contextlib
import json
import re

import torch

from datasets.build_dataset import build_dataset, build_val, hold_out
from datasets.data import checksum, replay_repeats
from net.build_net import build_net
from utils import metrics
from utils.config_files import ConfigError, load_yaml
from utils.device import choose_device, choose_precision, default_threads, describe_hardware, free_gpu_memory
from utils.extend import copy_learners, hash_tasks
from utils.learner import learner_path
from utils.log import RunLog, print_result, say_folded, task_names
from utils.pretrained import hash_weights, load_weights
from utils.run_folder import (
    check_folder,
    is_whole,
    naming_memory,
    open_folder,
    record,
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
        DataError: see `build_dataset` and `load_weights`.
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
    file = settings.folder / "config.yaml"
    if not settings.resume or not file.is_file():
        return None
    about = load_yaml(file)
    threads = about["settings"].get("threads") if isinstance(about.get("settings"), dict) else None
    older = re.search(r"(\d+) threads", str(about.get("hardware")))  # where runs said it at first
    return threads if isinstance(threads, int) and threads > 0 else int(older[1]) if older else None


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


def find_run(settings, device, precision, train, test, val=None):
    """Where the run folder is and whether this run may write it; nothing is written.

    Returns:
        folder: its path.
        about: what its config.yaml says of the settings; checksums of the training, test and held-out rows and of the
            weights that it begins with, too, so that a run is never gone on with on others.
        found: rounds whose learners are there.

    Raises:
        ConfigError, RunError: see `check_folder`.
    """
    folder = settings.folder
    about = record(settings, device, precision) | {"data": checksum(train, test)}
    if val:
        about["val_data"] = checksum(val)
    if settings.weights:
        about["weights_data"] = hash_weights(settings, train.images.shape[1:])
    check_folder(folder, about, settings.resume)
    return folder, about, sum(learner_path(folder, k).exists() for k in range(settings.num_rounds))


def describe(settings, device, precision, train, plan):
    """A run in two lines: what it trains, and on what. Arguments as of `open_run`."""
    kind = {"modelzoo": "Model Zoo, " + ("continual" if settings.continual else "multi-task: all tasks are known")
                        + ", each learner from the one before" * (settings.inherit and not settings.freeze)
                        + ", weighed by round" * settings.weigh_by_round,
            "multihead": "Multi-Head, joint training on all tasks"}.get(settings.method, settings.method)
    max_tasks, epochs = max(n for n, _ in plan), settings.epochs
    parameters = count_parameters(settings.model, train.images.shape[1:], train.classes[:max_tasks], settings.dropout)
    tasks = count(max_tasks, "task")
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
        f"{device}, {precision}, {count(threads, 'thread')}; run folder {settings.folder}",
    ]


def count(n, noun):
    """"1 task", "2 tasks"."""
    return f"{n} {noun}{'s' * (n != 1)}"


@contextlib.contextmanager
def open_run(settings, device, precision, train, test, plan, val=None):
    """Hold the run folder as its only writer, and yield its path and the run's `RunLog`.

    The test labels lie in it, so that a new metric, or an ensemble of runs, needs run folders alone.

    Args:
        settings: the run's.
        device, precision, train, test: see `prepare`.
        plan: of each learner the number of its tasks and the rows that it trains on in an epoch, about.
        val: see `split_val`.

    Raises:
        ConfigError, RunError: see `open_folder`.
    """
    folder, about, found = find_run(settings, device, precision, train, test, val)
    first, second = describe(settings, device, precision, train, plan)
    work = settings.epochs * sum(rows for _, rows in plan)
    names = task_names(settings.tasks, settings.names, train.class_names)
    origin = {"hardware": describe_hardware(device), "class_names": as_lists(train.class_names)}
    with open_folder(folder, about, settings.resume, origin):
        if not is_whole(folder / "test_labels.pt"):
            labels = [test.labels[test.rows(t)].cpu() for t in range(len(settings.tasks))]
            save_tensors(folder / "test_labels.pt", labels)
        copied = copy_learners(settings.extend, folder) if settings.extend else 0
        if not (folder / "rows.pt").exists():  # last: `check_extension` takes it for a sign that the learners are there
            save_tensors(folder / "rows.pt", hash_tasks(settings, train, test))
        with RunLog(folder, settings.num_rounds, work, settings.tensorboard, names, settings.continual) as log:
            say_folded(first)
            begun = ", and a checkpoint of the next" * any((folder / "learners").glob("*.checkpoint"))
            say_folded(second + f"; {found} of {settings.num_rounds} rounds found{begun}" * settings.resume
                       + f"; {copied} rounds come from {settings.extend}" * bool(settings.extend))
            yield folder, log


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
    write_file(settings.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print_result(result, task_names(settings.tasks, settings.names, train.class_names), settings.folder)
    return result
