"""scikit-learn's 1,797 real handwritten digits, 8 x 8: the data that need no download."""
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from datasets.data import DataError


def load_digits():
    """(train_images, train_labels), (test_images, test_labels): uint8 [N, 1, 28, 28] and int64 [N]; label = digit.

    Grey values 0 .. 16 are scaled to 0 .. 255 and images enlarged from 8 x 8 (bilinear), so that they stand in for
    MNIST. Every fifth image of a class is a test image.

    Raises:
        DataError: scikit-learn is not installed, or its file is not where it was.
    """
    # Its file and not its function, because importing scikit-learn takes as long as importing torch.
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin if package else "sklearn").parent / "datasets" / "data" / "digits.csv.gz"
    try:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=","))
    except OSError as e:
        raise DataError(f"digits: {file} cannot be read; they come with scikit-learn: pip install scikit-learn") from e
    images = rows[:, :64].view(-1, 1, 8, 8).float() * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = rows[:, 64].long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero().squeeze(1)[4::5]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])
