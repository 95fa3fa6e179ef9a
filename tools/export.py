"""A zoo in one file that needs neither this repository nor its run folder: uint8 images in, probabilities out.

    python tools/export.py runs/my-zoo --file zoo.pt2

A .pt2 file is loaded with torch alone, an .onnx file with any ONNX runtime: docs/predict.md has both.
"""
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn import functional as F

from modelzoo import Zoo
from utils.command import guard
from utils.config import Parser
from utils.config_files import ConfigError
from utils.log import say
from utils.run_folder import write_file
from utils.run_net import normalise

ONNX_LIMIT = 2**31  # bytes; a protobuf cannot be larger


class ZooModule(nn.Module):
    """A zoo's prediction for all tasks at once, in float32: each network's backbone runs once for all its heads.

    Args:
        zoo: a `Zoo` that was loaded, with networks, on the CPU.

    Attributes:
        names: [T] the tasks' names, each led by its index where two of them are alike.
        image_shape: (C, H, W).
    """

    def __init__(self, zoo):
        super().__init__()
        # Contiguous: weights that lie channels_last in memory cannot all be saved without a warning.
        self.nets = nn.ModuleList(zoo.nets).to(memory_format=torch.contiguous_format).requires_grad_(False)
        self.tasks = [learner.tasks for learner in zoo.learners]
        self.classes, self.weights, self.shares = zoo.classes, zoo.weights, zoo.shares
        unique = len(set(zoo.names)) == len(zoo.names)
        self.names = zoo.names if unique else [f"{t} {name}" for t, name in enumerate(zoo.names)]
        self.image_shape = tuple(zoo.learners[0].net["image_shape"])
        self.eval()

    def forward(self, images):
        """Class probabilities, dict task name -> [N, C_t] float32, of uint8 images [N, C, H, W].

        The weights are `Zoo`'s; its mean is taken in logarithms, which probabilities need not be.
        """
        x, sums = normalise(images), {}
        for net, tasks, shares in zip(self.nets, self.tasks, self.shares, strict=True):
            features = net.backbone(x)
            for i, (t, share) in enumerate(zip(tasks, shares, strict=True)):
                c = self.classes[t]
                p = F.linear(features, net.heads.weight[i, :c], net.heads.bias[i, :c]).softmax(1) * share
                sums[t] = sums[t] + p if t in sums else p
        # Not len(x): that would fix the batch size in the file.
        return {name: sums[t] / self.weights[t] if t in sums else x.new_full((x.shape[0], c), 1 / c)
                for t, (name, c) in enumerate(zip(self.names, self.classes, strict=True))}


def describe(module, class_names):
    """What the file says of itself, as JSON: its input, and of every task its name and the class of each column."""
    tasks = [{"name": name, "classes": task} for name, task in zip(module.names, class_names, strict=False)]
    return json.dumps({"images": ["N", *module.image_shape], "tasks": tasks})


def trace(module):
    """`torch.export`'s program of `module`, for any number of images."""
    images = torch.zeros(2, *module.image_shape, dtype=torch.uint8)  # one image would be taken for a constant
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    return program


def to_pt2(program, about):
    """The bytes of a .pt2 file."""
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"tasks.json": about})
    return data.getvalue()


def to_onnx(program, names, about):
    """The bytes of an .onnx file; input `images`, an output `task <name>` for each of `names`, in their order."""
    # The word before the name keeps a task called relu apart from the graph's own values.
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                             output_names=[f"task {name}" for name in names])
    onnx.model.metadata_props["tasks"] = about
    return onnx.model_proto.SerializeToString()


def main(argv=None):
    """Write the file; return the exit status.

    Raises:
        ConfigError: a wrong flag or run, or a package is missing.
        RunError: the disk refused; a file that was there before is as it was.
    """
    p = Parser(prog="export.py", description="Write a zoo as one file that runs without this repository.")
    p.add_argument("run", metavar="RUN", help="run folder of modelzoo.py, run with --save_nets")
    p.add_argument("--file", required=True, type=Path, help="zoo.pt2 (torch.export) or zoo.onnx")
    flags = p.parse_args(argv)
    ending = flags.file.suffix.lower()
    if ending not in (".pt2", ".onnx"):
        raise ConfigError(f"--file: {flags.file} must end in .pt2 or .onnx")
    if not flags.file.parent.is_dir():
        raise ConfigError(f"--file: there is no folder {flags.file.parent}")
    missing = [name for name in ("onnx", "onnxscript") if ending == ".onnx" and not find_spec(name)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}, or take .pt2")
    zoo = Zoo.load(flags.run, "cpu")
    if None in zoo.nets:
        raise ConfigError(f"{flags.run}: the run kept no networks, or not all; --save_nets keeps them")
    module = ZooModule(zoo)
    if ending == ".onnx" and sum(x.nbytes for x in module.state_dict().values()) >= ONNX_LIMIT:
        raise ConfigError(f"--file: the networks of {flags.run} are over 2 GB, which .onnx cannot hold; take .pt2")
    program, about = trace(module), describe(module, zoo.class_names)
    data = to_pt2(program, about) if ending == ".pt2" else to_onnx(program, module.names, about)
    write_file(flags.file, data)
    say(f"{flags.file}: {len(zoo.nets)} networks, {len(zoo.names)} tasks, {len(data) / 1e6:.1f} MB; takes uint8 images "
        f"[N, {', '.join(map(str, module.image_shape))}]")
    return 0


if __name__ == "__main__":
    sys.exit(guard("export.py", main))
