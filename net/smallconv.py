"""The small convolutional backbone: three 3x3 convolutions."""
from torch import nn


class SmallConv(nn.Module):
    """Backbone of three convolutions of `channels` (80: 0.12 M parameters): [B, C, H, W] -> [B, D].

    No padding, no dropout.

    Each convolution is followed by [batch norm,] ReLU and max pooling: by 2, or by 3 on images of 84 pixels and more.
    Pooling comes before ReLU here: the two commute, and so ReLU has a quarter of the work.

    Attributes:
        features: D.

    Raises:
        ValueError: the images are too small for it.
    """

    def __init__(self, in_channels, height, width, channels):
        super().__init__()
        pool = 3 if min(height, width) >= 84 else 2
        for _ in range(3):
            height, width = (height - 2) // pool, (width - 2) // pool
        if min(height, width) < 1:
            raise ValueError("model conv needs images of at least 22 x 22 pixels")
        self.features = channels * height * width
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, bias=False), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, x):
        return self.layers(x)
