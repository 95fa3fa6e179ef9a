"""Connect to Ray, on this machine or a running cluster, and work out how many runs fit on it at a time."""
import logging
import os
import signal
import tempfile
import warnings
from pathlib import Path

from datasets.data import one_line
from utils.config_files import ConfigError, check
from utils.log import say

ROOT = Path(__file__).parents[1]


def connect(address):
    """Start Ray on this machine's cores, or join the cluster at `address` (HOST:PORT or auto).

    Everything that Ray imports or starts must come after this call.

    Raises:
        ConfigError: Ray or Optuna is not installed, or no cluster answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a search tells nobody that it was made
    # All runs of a node read one copy of a data set. Ray warns that nobody may write to it, which nothing here does.
    os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
    try:
        import optuna
        import ray
        from ray._private.tensor_serialization_utils import ZeroCopyTensorsWarning
    except ImportError as e:
        raise ConfigError(f"{e.name} is not installed; install it by: pip install -r requirements-hpo.txt") from e
    warnings.filterwarnings("ignore", category=ZeroCopyTensorsWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if ray.is_initialized():
        return
    # Workers import this code from here, whatever folder they start in.
    code = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}}
    alone = {} if address else {"include_dashboard": False}
    say(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine: some seconds")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", runtime_env=code, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, ValueError, RuntimeError) as e:
        what = f"--address: no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
        raise ConfigError(f"{what} ({one_line(e, 120)})") from e
    except OSError as e:
        if "AF_UNIX" not in str(e):
            raise
        raise ConfigError(f"TMPDIR: {tempfile.gettempdir()} is too long a path for Ray's sockets; "
                          "set a shorter one, such as TMPDIR=/tmp") from e
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints addresses and passes over the caller's


def share_out(what, cpus, gpus, device):
    """What one `what` (trial, run) gets of the cluster, and how many fit into it at once.

    Args:
        cpus: CPU cores of one.
        gpus: GPUs of one, or a share of one; None: one where the cluster has any and `device` may be one.
        device: as --device.

    Returns:
        resources: dict(num_cpus, num_gpus).
        device: `device`, which is cpu where auto gets no GPU.
        slots: how many fit.

    Raises:
        ConfigError: none fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = float(device != "cpu" and any(node.get("GPU") for node in nodes))
    if gpus == 0 and device.startswith("cuda"):
        raise ConfigError(f"--device: {device} is not there: Ray sees no GPU")
    if ":" in device:
        raise ConfigError(f"--device: Ray chooses the GPU of each {what}; give cuda, not {device}")
    per_gpu = int(1 / gpus) if 0 < gpus < 1 else 1 / (gpus or 1)  # shares of one card do not make another
    slots = sum(int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) * per_gpu if gpus else 1e9)) for node in nodes)
    if slots == 0:
        largest = [max(node.get(resource, 0) for node in nodes) for resource in ("CPU", "GPU")]
        raise ConfigError(f"--cpus_per_{what} {cpus:g}, --gpus_per_{what} {gpus:g}: no node has as much; "
                          f"the largest have {largest[0]:g} and {largest[1]:g}")
    return {"num_cpus": cpus, "num_gpus": gpus}, "cpu" if device == "auto" and not gpus else device, slots


def check_shares(what, cpus, gpus, device):
    """Refuse shares of a machine that Ray would not grant to a `what` (trial, run), or that contradict `device`.

    Raises:
        ConfigError: the line names the flag.
    """
    for name, share, least in (("cpus", cpus, {"above": 0}), ("gpus", gpus or 0.0, {"low": 0})):
        check(f"--{name}_per_{what}", share, float, high=10**4, **least)
        if share > 1 and share != int(share):
            raise ConfigError(f"--{name}_per_{what}: {share} must be a whole number where it is above 1")
    if gpus == 0 and device.startswith("cuda"):
        raise ConfigError(f"--gpus_per_{what} 0 contradicts --device {device}")
    if gpus and device == "cpu":
        raise ConfigError(f"--gpus_per_{what} {gpus} contradicts --device cpu")
