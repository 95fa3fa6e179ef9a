"""Run a grid of runs - methods x data x hyper-parameters x seeds - on this machine or on a Ray cluster.

    python tools/sweep.py --methods "modelzoo --continual" isolated multihead --seeds 0-4 \\
        --data_config config/dataset/rotated_digits.yaml --hp_config config/hyperparam/small.yaml --samples 20

Every flag that is not the sweep's own (`--samples 20`) goes to every run. A run is what its own command does, in the
same run folder; one that is finished there is skipped, one that is not is gone on with. `--grid` reads the same from a
YAML file with the keys methods, data_config, hp_config, seeds and flags; what the command line gives goes over it.
"""
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

import modelzoo
import multihead
from datasets.build_dataset import load_whole
from datasets.data import DataError, one_line
from utils.cluster import check_shares, connect, share_out
from utils.command import guard
from utils.config import Parser, read_settings
from utils.config_files import ConfigError, check, load_yaml
from utils.log import print_table, say
from utils.run_folder import LATER, MAY_CHANGE, RunError, write_file

METHODS = {
    "modelzoo": ("modelzoo",),
    "isolated": ("modelzoo", "--continual", "--tasks_per_round", "1"),
    "multihead": ("multihead",),
}


@dataclass
class Row:
    """What is known of a run: a line of the table."""

    folder: Path
    state: str = "waiting"  # waiting, skipped, done, failed
    accuracy: float | None = None
    seconds: float | None = None
    node: str = ""
    note: str = ""


def make_grid_parser():
    """The sweep's own flags."""
    p = Parser(prog="sweep.py", description="Run a grid of runs. Other flags (--samples 20) go to every run.",
               allow_abbrev=False)
    p.add_argument("--grid", help="YAML file with methods, data_config, hp_config, seeds and flags")
    p.add_argument("--methods", nargs="+", help=f"{', '.join(METHODS)}, with flags: 'modelzoo --continual'")
    p.add_argument("--data_config", nargs="+", help="dataset files")
    p.add_argument("--hp_config", nargs="+", help="hyper-parameter files")
    p.add_argument("--seeds", help="such as 0-4 or 0,2,5-7 (default: 0)")
    p.add_argument("--cpus_per_run", type=float, default=1, help="CPU cores of a run (default: 1)")
    p.add_argument("--gpus_per_run", type=float,
                   help="GPUs of a run, 0.25: four share one (default: 1 where there are GPUs, else 0)")
    p.add_argument("--address", help="a running Ray cluster, HOST:PORT or auto (default: this machine alone)")
    return p


def read_seeds(where, text):
    """[0, 1, 2, 5] of "0-2,5".

    Raises:
        ConfigError: another text, a range that runs backwards, or over 100,000 seeds; the line opens with `where`.
    """
    if not re.fullmatch(r"\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*", text):
        raise ConfigError(f"{where}: {text!r} is not a list of seeds such as 0-4 or 0,2,5-7")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    for part in ends:
        if part[-1] < part[0]:
            raise ConfigError(f"{where}: {part[0]}-{part[-1]} runs backwards; write {part[-1]}-{part[0]}")
    if sum(part[-1] - part[0] + 1 for part in ends) > 10**5:
        raise ConfigError(f"{where}: {text} are over 100,000 seeds")
    return [seed for part in ends for seed in range(part[0], part[-1] + 1)]


def split_words(where, text):
    """The words of a command line.

    Raises:
        ConfigError: a quotation mark without its other one.
    """
    try:
        return shlex.split(text)
    except ValueError as e:
        raise ConfigError(f"{where}: {text!r}: {e}") from e


def read_grid(argv):
    """Read the command line and the grid file.

    Returns:
        runs: a `Settings` each, in the order in which they start.
        flags: the sweep's own.

    Raises:
        ConfigError: a mistake in the sweep's flags or in those of any run, or two runs of one folder.
    """
    flags, common = make_grid_parser().parse_known_args(argv)
    grid = {} if flags.grid is None else load_yaml(flags.grid)
    keys = ("methods", "data_config", "hp_config", "seeds")
    for key in grid:
        if key not in (*keys, "flags"):
            raise ConfigError(f"{flags.grid}: unknown key {key}; the keys are {', '.join((*keys, 'flags'))}")
    common = split_words(f"{flags.grid}: flags", check(f"{flags.grid}: flags", grid.get("flags", ""), str)) + common
    lists = []
    for key in keys[:3]:
        given = getattr(flags, key) or grid.get(key)
        if not given:
            raise ConfigError(f"--{key} is missing" + f", and {flags.grid} has no {key}" * bool(flags.grid))
        given = given if isinstance(given, list) else [given]
        lists.append([check(f"{flags.grid}: {key}", value, str) for value in given])
    methods, data_configs, hp_configs = lists
    seeds = grid.get("seeds", 0)
    seeds = ",".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)
    given = flags.seeds is not None
    seeds = read_seeds("--seeds" if given else f"{flags.grid}: seeds", flags.seeds if given else seeds)

    runs = []
    for seed, data_config, hp_config, text in itertools.product(seeds, data_configs, hp_configs, methods):
        word, *own = split_words("--methods", text) or [""]
        if word not in METHODS:
            raise ConfigError(f"--methods: {text!r} does not begin with one of {', '.join(METHODS)}")
        for key in ("data_config", "hp_config", "seed"):
            if any(w.split("=")[0] == f"--{key}" for w in (*own, *common)):
                raise ConfigError(f"--{key}: a run has that of the grid; give --{'seeds' if key == 'seed' else key} "
                                  "outside of methods and flags")
        method, *fixed = METHODS[word]
        files = ["--data_config", data_config, "--hp_config", hp_config, "--seed", str(seed)]
        settings = read_settings(f"{method}.py", method, [*fixed, *own, *common, *files])
        if settings.dry_run:
            raise ConfigError("--dry_run: works on one run, not on a sweep: "
                              f"python {method}.py --data_config {data_config} ... --dry_run")
        runs.append(replace(settings, resume=True))
    folders = [settings.folder for settings in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise ConfigError(f"{twice} would be the folder of two runs")
    return runs, flags


def read_finished(settings):
    """result.json of a finished run, None where there is none yet.

    Raises:
        ConfigError: the run that is there was made with other settings.
    """
    path = settings.folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        theirs = result["config"]
        for number in (result["average_accuracy"], result["seconds"]):  # the two that the table shows
            check("result", number, float)
        theirs = LATER | theirs
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: not a whole result; remove its folder to have the run made again") from e
    # device and precision stand there as what auto came to where the run was made.
    resolved = [key for key in ("device", "precision", "threads") if getattr(settings, key) in ("auto", None)]
    ours = json.loads(json.dumps(asdict(settings) | {"device": settings.device.split(":")[0]}))
    for key, value in ours.items():
        if key not in (*MAY_CHANGE, *resolved) and theirs.get(key) != value:
            raise ConfigError(f"{path.parent}: was run with {key} {theirs.get(key)}, not {value}")
    return result


def execute(settings, loaded, cwd, threads):
    """In a Ray task: make one run as its own command does.

    Args:
        settings: the run's.
        loaded: what `load_whole` gave, this node's one copy of it: not to be written to.
        cwd: the folder in which the sweep was started, which relative paths start from. On a node that does not have
            it the run is made in a temporary one.
        threads: CPU cores to compute on, where neither the run's flags nor its folder say how many.

    Returns:
        outcome: dict of what changes in its `Row`.
        files: the run folder's, path in it to bytes; Ray moves them only where they are asked for.
    """
    import ray

    os.environ["OMP_NUM_THREADS"] = str(threads)
    node = ray.get_runtime_context().get_node_id()[:8]
    make = {"modelzoo": modelzoo.run, "multihead": multihead.run}[settings.method]
    with tempfile.TemporaryDirectory() as elsewhere:
        os.chdir(cwd if os.path.isdir(cwd) else elsewhere)
        try:
            # A lost node's run starts again elsewhere, and it may have been lost after the run's last file.
            result = read_finished(settings) or make(settings, loaded)
            folder = settings.folder
            files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        except (ConfigError, DataError, RunError) as e:
            return {"state": "failed", "note": str(e), "node": node}, {}
        finally:
            os.chdir("/")  # before the temporary folder goes
    row = {"state": "done", "accuracy": result["average_accuracy"], "seconds": result["seconds"], "node": node}
    return row, files


def share_splits(*data):
    """Load a data set, once for all its runs: Ray brings one copy to each node, and the runs there read that in place.

    Args:
        data: see `load_splits`.

    Returns:
        Ray's reference of what it gave, or the `DataError` that it raised.
    """
    import ray

    try:
        return ray.put(load_whole(*data))
    except DataError as e:
        return e


def submit(runs, rows, shares):
    """Hand the runs that are not finished to Ray.

    Args:
        runs: a `Settings` each.
        rows: a `Row` each, brought up to date.
        shares: of each --device, what `share_out` gave.

    Returns:
        Of Ray's reference of each run's outcome: its row and the reference of its files.
    """
    import ray

    task = ray.remote(execute)
    loaded, pending = {}, {}
    for settings, row in zip(runs, rows, strict=True):
        try:
            result = read_finished(settings)
            if result:
                row.state, row.accuracy, row.seconds = "skipped", result["average_accuracy"], result["seconds"]
                continue
            data = (settings.dataset, settings.tasks, settings.data_dir, settings.path, settings.size,
                    settings.keywords)
            if data not in loaded:
                loaded[data] = share_splits(*data)
            if isinstance(loaded[data], DataError):
                raise loaded[data]
        except (ConfigError, DataError) as e:
            row.state, row.note = "failed", str(e)
            continue
        resources, device, _ = shares[settings.device]
        # SPREAD: a run is faster where fewer others run. Ray makes a run of a lost node again on another.
        options = task.options(**resources, num_returns=2, max_retries=3, scheduling_strategy="SPREAD")
        threads = max(1, int(resources["num_cpus"]))
        outcome, files = options.remote(replace(settings, device=device), loaded[data], os.getcwd(), threads)
        pending[outcome] = row, files
    return pending


def collect(outcome, row, files):
    """Bring a finished task's outcome into its row, and its files here from a node that does not share the folder."""
    import ray

    try:
        for key, value in ray.get(outcome).items():
            setattr(row, key, value)
        if row.state == "done" and not (row.folder / "result.json").exists():
            found = ray.get(files)
            for name in sorted(found, key=lambda name: name == "result.json"):  # the last file of a run
                (row.folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(row.folder / name, found[name])
    except (RunError, OSError) as e:
        row.state, row.note = "failed", str(e)
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None) or e
        row.state, row.note = "failed", f"{type(cause).__name__}: {one_line(cause)}"


def progress_of(folder):
    """The last line of a run's log, in words; nothing where there is none to be seen."""
    try:
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return ""
    return f"round {last['round'] + 1}" + (f", epoch {last['epoch'] + 1}" if "epoch" in last else "")


def print_rows(rows):
    """Print a table of all runs, and how many ended how."""
    print_table(["run", "average accuracy %", "seconds", "state", "node"], [
        [row.folder.name, "" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
         "" if row.seconds is None else f"{row.seconds:.1f}", row.state, row.node] for row in rows
    ])
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "skipped", "failed")}
    say(", ".join(f"{n} {state}" for state, n in counts.items() if n))


def sweep(argv):
    """Make the runs of a grid.

    Returns:
        A `Row` a run.

    Raises:
        ConfigError: a mistake in the grid or the cluster, before any run has started.
    """
    runs, flags = read_grid(argv)
    devices = {settings.device for settings in runs}
    for device in devices:
        check_shares("run", flags.cpus_per_run, flags.gpus_per_run, device)
    connect(flags.address)
    import ray

    shares = {device: share_out("run", flags.cpus_per_run, flags.gpus_per_run, device) for device in devices}
    rows = [Row(settings.folder) for settings in runs]
    pending = submit(runs, rows, shares)
    terminal = sys.stdout.isatty()
    told = set()
    with tqdm(total=len(pending), unit="run", file=sys.stdout, disable=not terminal, leave=False,
              dynamic_ncols=True) as bar:
        while True:
            for row in rows:
                if row.state == "failed" and row.folder not in told:
                    told.add(row.folder)
                    say(f"{row.folder}: {row.note}")
            if not pending:
                break
            ready, _ = ray.wait(list(pending), timeout=1)  # a signal comes through in between
            for outcome in ready:
                collect(outcome, *pending.pop(outcome))
            bar.update(len(ready))
            at_work = [f"{row.folder.name}: {progress}" for row, _ in pending.values()
                       if terminal and (progress := progress_of(row.folder))]
            bar.set_postfix_str("; ".join(at_work))
    print_rows(rows)
    return rows


def main(argv=None):
    """Run the command and return its exit status: 1 where a run failed, 2, after one line, where the grid is wrong."""
    return guard("sweep.py", lambda: int(any(row.state == "failed" for row in sweep(argv))), resumes=True)


if __name__ == "__main__":
    sys.exit(main())
