"""Rotated and permuted digits: label 10x + y is digit y under transformation x."""
import math

import torch
from torch.nn import functional as F


def rotate(images, degrees):
    """Turn uint8 [N, 1, H, W] counter-clockwise about the centre: bilinear, zeros outside, the size kept."""
    if degrees % 360 == 0:
        return images
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    h, w = images.shape[2:]
    # Where each target pixel comes from, in the coordinates of affine_grid, which run from -1 to 1 on both axes.
    theta = torch.tensor([[cos, -sin * h / w, 0.0], [sin * w / h, cos, 0.0]])
    out = []
    for chunk in images.split(10_000):
        grid = F.affine_grid(theta.expand(len(chunk), 2, 3), list(chunk.shape), align_corners=False)
        turned = F.grid_sample(chunk.float(), grid, padding_mode="zeros", align_corners=False)
        out.append(turned.round().to(torch.uint8))
    return torch.cat(out)


def permute(images, seed):
    """Shuffle the pixels of [N, C, H, W] by one permutation drawn from `seed`; seed 0 leaves them as they are."""
    if seed == 0:
        return images
    order = torch.randperm(images.shape[2] * images.shape[3], generator=torch.Generator().manual_seed(seed))
    return images.flatten(2)[:, :, order].view_as(images)


def modify(splits, labels, kind):
    """Make the rows of the labels 10x + y that are asked for: digit y, rotated by 10x degrees or permuted by 1000x.

    Args:
        splits: (train_images, train_labels), (test_images, test_labels) of plain digits.
        labels: the labels 10x + y wanted.
        kind: "rotated" or "permuted".

    Returns:
        splits: as given, [N, 1, H, W] uint8 and [N] int64, with the labels 10x + y.
    """
    def modify_split(images, digits):
        out_images, out_labels = [], []
        for x in sorted({label // 10 for label in labels}):
            wanted = torch.tensor([y for y in range(10) if 10 * x + y in labels])
            rows = torch.isin(digits, wanted)
            turned = rotate(images[rows], 10 * x) if kind == "rotated" else permute(images[rows], 1000 * x)
            out_images.append(turned)
            out_labels.append(10 * x + digits[rows])
        return torch.cat(out_images), torch.cat(out_labels)

    return tuple(modify_split(*split) for split in splits)
