"""Pre-activation wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""
import torch
from torch import nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Dropout that draws from the generator it is given, not from torch's global one.

    Args:
        p: share of values set to 0 in training, in [0, 1); the others are multiplied by 1 / (1 - p).

    Attributes:
        generator: set before training; on the device of the input.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.generator = None

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        # A CPU draws uniform numbers at twice the rate of Bernoulli's; in float32, or p would be rounded with them.
        keep = torch.empty_like(x, dtype=torch.float32).uniform_(generator=self.generator) >= self.p
        return x * keep / (1 - self.p)


class Block(nn.Module):
    """Batch norm, ReLU, convolution, batch norm, ReLU, dropout, convolution, plus the shortcut.

    Dropout comes after ReLU (section 2.4 of the paper): before batch norm it would leave another variance in training
    than in evaluation. [B, in_width, H, W] -> [B, width, H / stride, W / stride].
    """

    def __init__(self, in_width, width, stride, dropout):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_width, width, 1, stride, bias=False) if in_width != width else None

    def forward(self, x):
        active = F.relu(self.norm1(x))
        out = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        # Where the width changes, the shortcut takes the activated input; elsewhere the input itself.
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Backbone WRN-depth-widen: [B, C, H, W] -> [B, D], D = 64 x widen.

    Attributes:
        features: D.

    Raises:
        ValueError: the images are too small for it.
    """

    def __init__(self, channels, height, width, depth, widen, dropout):
        super().__init__()
        if min(height, width) < 8:
            raise ValueError("wide residual networks need images of at least 8 x 8 pixels")
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        layers = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)]
        for group in range(3):
            for i in range(blocks):
                first = i == 0
                in_width = widths[group] if first else widths[group + 1]
                layers.append(Block(in_width, widths[group + 1], 2 if first and group > 0 else 1, dropout))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(widths[3])
        self.features = widths[3]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return F.relu(self.norm(self.layers(x))).mean((2, 3))
