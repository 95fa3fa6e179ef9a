"""The small convolutional backbone: three 3x3 convolutions of 80 channels."""
from torch import nn

WIDTH = 80


class SmallConv(nn.Module):
    """Backbone of 0.12 M parameters: [B, C, H, W] -> [B, D]. No padding, no dropout.

    Each convolution is followed by [batch norm,] ReLU and max pooling: by 2, or by 3 on images of 84 pixels and more.
    Pooling comes before ReLU here: the two commute, and so ReLU has a quarter of the work.

    Attributes:
        features: D.

    Raises:
        ValueError: the images are too small for it.
    """

    def __init__(self, channels, height, width):
        super().__init__()
        pool = 3 if min(height, width) >= 84 else 2
        for _ in range(3):
            height, width = (height - 2) // pool, (width - 2) // pool
        if min(height, width) < 1:
            raise ValueError("model conv needs images of at least 22 x 22 pixels")
        self.features = WIDTH * height * width
        self.layers = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, bias=False), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.MaxPool2d(pool), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)
