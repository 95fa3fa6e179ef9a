"""How fast this machine trains: ms a step, rows/s and FLOP/s, beside what its matrix products reach in the same run.

    python tools/bench.py
    python tools/bench.py --textbook    # one learner, start to end, against the same learner as it is usually written

The rows are random images of CIFAR's shape: speed does not depend on what they show. `--textbook` trains Multi-Head on
3 tasks of 5 classes, 2,500 training and 500 test rows each, for 2 epochs, as whole processes: once with multihead.py,
once as research code does it: PIL images in a Dataset, torchvision's transforms, a DataLoader with 4 workers, float32,
`loss.item()` after every batch.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import before_torch  # noqa: E402, F401  # isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from net.build_net import build_net, set_dropout_generator  # noqa: E402
from utils.command import guard  # noqa: E402
from utils.config import Parser  # noqa: E402
from utils.config_files import PRECISIONS, ConfigError, check, check_model, load_yaml  # noqa: E402
from utils.device import choose_device, choose_precision, describe_hardware  # noqa: E402
from utils.log import print_table, say  # noqa: E402
from utils.run_folder import RunError, commit, naming_memory, versions  # noqa: E402
from utils.run_net import forward, train_net  # noqa: E402

TASKS, CLASSES, ROWS, SHAPE = 5, 5, 5000, (3, 32, 32)


def wait(device):
    """Wait until `device` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_matrix_rate(device, precision, seconds=2.0):
    """FLOP/s of square matrix products on random data: the median of repeated products."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as convolutions in float32 have it
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times)


def count_flops(net, images):
    """Floating-point operations of a training step, forward and backward, per row of `images` (uint8 [B, C, H, W])."""
    heads = torch.arange(len(images), device=images.device) % len(net.heads.bias)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(forward(net, images, heads, "fp32"), torch.zeros_like(heads)).backward()
    net.zero_grad()
    return counter.get_total_flops() / len(images)


def measure_training(model, batch, device, precision, seconds):
    """Steps of a learner of 5 tasks of 5 classes, as `train_net` takes them, augmented.

    Returns:
        dict: model, batch, ms (a step: median over epochs, and its least and greatest), rows_per_s, flop_per_row,
        flop_per_s, peak_mib (of the device's memory, None on a CPU).
    """
    net = build_net(model, SHAPE, [CLASSES] * TASKS, 0.2, seed=0).to(device)
    images = torch.randint(0, 256, (ROWS, *SHAPE), dtype=torch.uint8, device=device)
    generators = {key: torch.Generator(device) for key in ("shuffle", "augment", "dropout")}
    set_dropout_generator(net, generators["dropout"])
    flops = count_flops(net, images[:batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # On a CPU about half a second an epoch, so that a few of them fit the time of the slowest network too.
    steps = max(1, min(20, int(25e9 / (flops * batch)))) if device.type == "cpu" else 200
    rows = torch.randint(0, ROWS, (steps * batch,), device=device)
    epochs = train_net(net, images, rows, rows % TASKS, rows % CLASSES, epochs=10**6, batch=batch, lr=1e-3,
                       l2_reg=1e-5, schedule="constant", augment=True, flip=True, precision=precision,
                       generators=generators)
    next(epochs)  # warm: kernels chosen, memory taken
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        next(epochs)  # ends by reading the epoch's sums, and so waits for the device
        times.append((time.perf_counter() - start) / steps)
    ms = [1000 * f(times) for f in (statistics.median, min, max)]
    rate = batch / statistics.median(times)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"model": model, "batch": batch, "ms": ms, "rows_per_s": rate, "flop_per_row": flops,
            "flop_per_s": rate * flops, "peak_mib": peak}


def train_textbook(folder, model, device):
    """The textbook's learner on the files that `compare_textbook` wrote; prints the accuracy of each task."""
    import torchvision.transforms as transforms
    from PIL import Image
    from torch.utils.data import ConcatDataset, DataLoader, Dataset

    hp = load_yaml(folder / f"{model}.yaml")

    class Task(Dataset):
        def __init__(self, split, head, transform):
            data = np.load(folder / "random.npz")
            rows = np.flatnonzero(data[f"{split}_labels"] // CLASSES == head)
            self.images = data[f"{split}_images"][rows]
            self.labels = data[f"{split}_labels"][rows] % CLASSES
            self.head, self.transform = head, transform

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(self.images[i])), self.head, int(self.labels[i])

    plain = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    augmented = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain])
    data = ConcatDataset([Task("train", t, augmented) for t in range(3)])
    loader = DataLoader(data, hp["batch"], shuffle=True, num_workers=4, pin_memory=device.type == "cuda")
    net = build_net(model, SHAPE, [CLASSES] * 3, hp["dropout"], seed=0).to(device)
    optimiser = torch.optim.SGD(net.parameters(), hp["lr"], 0.9, weight_decay=hp["l2_reg"], nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, hp["epochs"] * len(loader))
    for _ in range(hp["epochs"]):
        net.train()
        total = 0.0
        for images, heads, labels in loader:
            logits = net.heads(net.backbone(images.to(device)), heads.to(device))
            loss = F.cross_entropy(logits, labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
    net.eval()
    with torch.no_grad():
        for split in ("train", "test"):
            for t in range(3):
                right = 0
                for images, heads, labels in DataLoader(Task(split, t, transforms.Compose(plain)), 100, num_workers=4):
                    logits = net.heads(net.backbone(images.to(device)), heads.to(device)).cpu()
                    right += (logits.argmax(1) == labels).sum().item()
                print(split, t, right)


def compare_textbook(model, device, precision, repeats):
    """Seconds of whole processes, ours and the textbook's in turn, as dict(model, ours, textbook, ratio)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        random = np.random.default_rng(0)
        arrays = {}
        for split, n in (("train", 500), ("test", 100)):
            arrays[f"{split}_labels"] = np.repeat(np.arange(15, dtype=np.uint8), n)
            arrays[f"{split}_images"] = random.integers(0, 256, (15 * n, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "random.npz", **arrays)
        tasks = [list(range(CLASSES * t, CLASSES * t + CLASSES)) for t in range(3)]
        (folder / "data.yaml").write_text(yaml.safe_dump({"dataset": "npz", "path": "random.npz", "tasks": tasks}))
        hp = {"model": model, "batch": 16, "lr": 0.01, "l2_reg": 1e-5, "dropout": 0.2, "epochs": 2}
        (folder / f"{model}.yaml").write_text(yaml.safe_dump(hp))
        seconds = {"ours": [], "textbook": []}
        for i in range(repeats):
            ours = ["multihead.py", "--data_config", folder / "data.yaml", "--hp_config", folder / f"{model}.yaml",
                    "--data_dir", folder, "--out", folder / "runs", "--name", f"run{i}", "--device", device,
                    "--precision", precision]
            theirs = ["tools/bench.py", "--run_textbook", folder, "--models", model, "--device", device]
            for key, words in (("ours", ours), ("textbook", theirs)):
                start = time.perf_counter()
                try:
                    subprocess.run([sys.executable, "-W", "ignore", *map(str, words)], cwd=ROOT, check=True,
                                   stdout=subprocess.DEVNULL)
                except subprocess.CalledProcessError as e:
                    raise RunError(f"{words[0]} ended with exit status {e.returncode}, for what stands above") from e
                seconds[key].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {"model": model, **seconds, "ratio": statistics.median(ratios)}


def read_flags(argv=None):
    """Read the command line."""
    p = Parser(prog="bench.py", description="Measure how fast this machine trains.", allow_abbrev=False)
    p.add_argument("--models", nargs="+", default=["conv", "wrn16_4"], help="default: conv wrn16_4")
    p.add_argument("--batches", nargs="+", type=int, default=[16, 128], help="default: 16 128")
    p.add_argument("--device", default="auto", help="default: auto")
    p.add_argument("--precision", default="auto", help="default: auto")
    p.add_argument("--seconds", type=float, default=10.0, help="of measuring for each line (default: 10)")
    p.add_argument("--textbook", action="store_true", help="compare whole processes with the textbook's")
    p.add_argument("--repeats", type=int, default=1, help="of the comparison with the textbook (default: 1)")
    p.add_argument("--json", metavar="FILE", help="also write the numbers here")
    p.add_argument("--run_textbook", type=Path, help=argparse.SUPPRESS)
    flags = p.parse_args(argv)
    for model in flags.models:
        check_model("--models", model)
        try:
            build_net(model, SHAPE, [CLASSES], 0.2, seed=0)
        except ValueError as e:
            raise ConfigError(f"--models: {e}; the rows here are images of 32 x 32") from e
    for batch in flags.batches:
        check("--batches", batch, int, 1, ROWS)
    check("--precision", flags.precision, str, choices=PRECISIONS)
    check("--repeats", flags.repeats, int, 1, 100)
    check("--seconds", flags.seconds, float, above=0, high=1000)
    if flags.json and (Path(flags.json).is_dir() or not Path(flags.json).parent.is_dir()):
        raise ConfigError(f"--json: {flags.json} must be a file in a folder that is there")
    return flags


def main(flags):
    """Measure, print tables, write JSON, and return the exit status."""
    if flags.run_textbook:
        train_textbook(flags.run_textbook, flags.models[0], torch.device(flags.device))
        return 0
    device = choose_device(flags.device)
    precision = choose_precision(flags.precision, device)
    about = {"hardware": describe_hardware(device), "precision": precision, "commit": commit(), **versions()}
    say(f"{about['hardware']}, {precision}, torch {about['torch']}, {platform.system()}")
    found = {"about": about}
    if flags.textbook:
        found["textbook"] = [compare_textbook(model, device, precision, flags.repeats) for model in flags.models]
        rows = [(r["model"], *(f"{statistics.median(r[k]):.1f}" for k in ("ours", "textbook")), f"{r['ratio']:.2f}")
                for r in found["textbook"]]
        say("One learner, 3 tasks x 2 epochs, batch 16, whole processes")
        print_table(["network", "seconds", "textbook's", "ratio"], rows)
    else:
        found["matrix_flop_per_s"] = measure_matrix_rate(device, precision)
        found["training"] = [measure_training(model, batch, device, precision, flags.seconds)
                             for model in flags.models for batch in flags.batches]
        rows = []
        for r in found["training"]:
            r["share"] = r["flop_per_s"] / found["matrix_flop_per_s"]
            median, low, high = r["ms"]
            memory = "–" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
            rows.append((r["model"], str(r["batch"]), f"{median:.2f}", f"{low:.2f} to {high:.2f}",
                         f"{r['rows_per_s']:,.0f}", f"{r['flop_per_s'] / 1e9:,.0f}", f"{100 * r['share']:.1f} %",
                         memory))
        say(f"Training; matrix products reach {found['matrix_flop_per_s'] / 1e9:,.0f} GFLOP/s")
        print_table(["network", "batch", "ms per step", "least to greatest", "rows/s", "GFLOP/s", "share", "MiB"], rows)
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with_line = naming_memory("too little memory; try smaller --batches, or other --models")
    sys.exit(guard("bench.py", with_line(lambda: main(read_flags()))))
