"""A trained zoo as one file that runs without this repository.

    python tools/export.py runs/my-zoo --file zoo.pt2    # or zoo.onnx

In go uint8 images [N, C, H, W], any number of them; out come the class probabilities of every task, [N, C_t] float32,
as a dict by the task's name (ONNX: outputs of these names). Normalisation and the mean over learners are inside.
"""
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from modelzoo import Zoo  # noqa: E402
from utils.command import guard  # noqa: E402
from utils.config import Parser  # noqa: E402
from utils.config_files import ConfigError  # noqa: E402
from utils.run_folder import write_file  # noqa: E402
from utils.run_net import run_backbone  # noqa: E402


class ExportedZoo(nn.Module):
    """`Zoo.predict` for all tasks at once: uint8 images [N, C, H, W] -> {task's name: [N, C_t] float32}, in float32.

    Args:
        zoo: a `Zoo` that was loaded, with its networks.
    """

    def __init__(self, zoo):
        super().__init__()
        self.nets = nn.ModuleList(zoo.nets).eval()
        self.tasks = [learner.tasks for learner in zoo.learners]
        self.classes, self.names, self.first_weight = zoo.classes, zoo.names, 1 / zoo.replay_frac

    def forward(self, images):
        means, weights = [0.0] * len(self.classes), [0.0] * len(self.classes)
        for net, tasks in zip(self.nets, self.tasks, strict=True):
            features = run_backbone(net, images, "fp32").float()
            for head, t in enumerate(tasks):
                n, weight = self.classes[t], 1.0 if weights[t] else self.first_weight
                logits = F.linear(features, net.heads.weight[head, :n], net.heads.bias[head, :n])
                means[t], weights[t] = means[t] + weight * logits.softmax(1), weights[t] + weight
        for t, n in enumerate(self.classes):
            if not weights[t]:  # no learner knows it
                means[t], weights[t] = torch.full((images.shape[0], n), 1 / n), 1.0
        return {name: means[t] / weights[t] for t, name in enumerate(self.names)}


def export(run, suffix):
    """The bytes of the exported zoo of a run folder; `suffix` is .pt2 or .onnx.

    Raises:
        ConfigError: no such run, it kept no networks, two tasks have one name, or a package is missing.
    """
    zoo = Zoo.load(run, "cpu")
    if None in zoo.nets:
        raise ConfigError(f"{run}: the run kept no networks, which --save_nets does")
    about = dict(zip(zoo.names, zoo.class_names, strict=False))
    if len(about) < len(zoo.names):
        raise ConfigError(f"{run}: two tasks have one name; give them names: in the dataset file")
    shape = zoo.learners[0].net["image_shape"]
    images, batch = torch.zeros(2, *shape, dtype=torch.uint8), {0: torch.export.Dim("batch", min=1)}
    with warnings.catch_warnings(action="ignore"):
        if suffix == ".onnx":
            try:
                import onnx  # noqa: F401
                import onnxscript  # noqa: F401
            except ModuleNotFoundError as e:
                raise ConfigError(f"{e.name} is not installed: pip install onnx onnxscript") from e
            program = torch.onnx.export(ExportedZoo(zoo), (images,), dynamo=True, dynamic_shapes=(batch,),
                                        verbose=False, input_names=["images"], output_names=zoo.names)  # fmt: skip
            program.model.metadata_props["tasks"] = json.dumps(about)
            with tempfile.TemporaryDirectory() as folder:
                program.save(Path(folder) / "zoo.onnx", external_data=False)
                return (Path(folder) / "zoo.onnx").read_bytes()
        program, data = torch.export.export(ExportedZoo(zoo), (images,), dynamic_shapes=(batch,)), io.BytesIO()
        torch.export.save(program, data, extra_files={"tasks.json": json.dumps(about)})
    return data.getvalue()


def main(argv=None):
    """Export one zoo; return the exit status."""
    p = Parser(prog="export.py", description="A trained zoo as one file that runs without this repository.")
    p.add_argument("run", metavar="RUN", help="a run folder of modelzoo.py --save_nets")
    p.add_argument("--file", required=True, help="zoo.pt2 (torch.export), or zoo.onnx")
    flags = p.parse_args(argv)
    file = Path(flags.file)
    if file.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"--file: {flags.file} must end in .pt2 or .onnx")
    write_file(file, export(flags.run, file.suffix))
    print(f"{file} is written")
    return 0


if __name__ == "__main__":
    sys.exit(guard("export.py", main))
