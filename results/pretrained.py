"""Put what pretrained.sh needs below DATA: the network of a run as first_half.pt, and images as folders of PNG files.

    python results/pretrained.py RUN DATA
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import before_torch  # noqa: F401  # isort: skip
from PIL import Image

from datasets.cifar import load_cifar100
from utils.command import guard
from utils.config_files import ConfigError
from utils.learner import learner_path


def write_folders(data):
    """Write CIFAR-100 as data/cifar100_png/train/c<label>/<row>.png and test/..., once, in the order of rows."""
    folder = Path(data) / "cifar100_png"
    if (folder / "test").exists():
        return
    for split, (images, labels) in zip(("train", "test.new"), load_cifar100(data, []), strict=True):
        for row, (image, label) in enumerate(zip(images[:], labels.tolist(), strict=True)):
            path = folder / split / f"c{label}" / f"{row:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (folder / "test.new").rename(folder / "test")


def main(argv):
    """Do both; return the exit status."""

    def work():
        if len(argv) != 2:
            raise ConfigError("give RUN DATA")
        shutil.copyfile(learner_path(Path(argv[0]), 0), Path(argv[1]) / "first_half.pt")
        write_folders(argv[1])

    return guard("pretrained.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
