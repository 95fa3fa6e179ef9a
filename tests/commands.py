"""Commands that the tests run in their own process, and what must be equal between two runs."""
import json
from types import SimpleNamespace

import modelzoo
import multihead
from tests.conftest import flags, write_yaml
from utils.command import command

MAIN = {"modelzoo": modelzoo.run, "multihead": multihead.run}


def start(workspace, name, *more, method="modelzoo"):
    """Run a command that must work; returns its result.json."""
    assert command(f"{method}.py", method, MAIN[method], flags(workspace, "--name", name, *more)) == 0
    return json.loads((workspace / "runs" / name / "result.json").read_text())


def numbers(result):
    """What must be equal between two runs of the same settings: all but times and names."""
    result = json.loads(json.dumps(result))
    del result["seconds"], result["config"]
    for r in result["rounds"]:
        del r["seconds"]
    return result


def shorten(workspace, n=2):
    """A dataset file with the first n tasks alone."""
    tasks = [[0, 1], [2, 3], [4, 5]][:n]
    write_yaml(workspace / "short.yaml", {"dataset": "npz", "path": "toy.npz", "tasks": tasks})
    return "--data_config", str(workspace / "short.yaml")


def checkpoint_every_epoch():
    """A checkpoint is due when its time has come, and where time stands still it always has."""
    multihead.CHECKPOINT_SECONDS = 0
    multihead.time = SimpleNamespace(perf_counter=lambda: 0.0)
