"""A backbone and its heads."""
import torch
from torch import nn
from torch.nn import functional as F

from net.smallconv import SmallConv
from net.wideresnet import Dropout, WideResNet


class Heads(nn.Module):
    """One linear layer a task, as one weight that each row gathers its own slice of: no loop, no waiting for the host.

    Args:
        features: D.
        classes: [T], C_t of each task.

    Attributes:
        weight: [T, C_max, D]; rows past C_t are never used.
        bias: [T, C_max].
        absent: [T, C_max] bool, true past C_t.
    """

    def __init__(self, features, classes):
        super().__init__()
        shape = (len(classes), max(classes))
        bound = features**-0.5  # as torch's own linear layer starts
        self.weight = nn.Parameter(torch.empty(*shape, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        absent = torch.arange(max(classes)) >= torch.tensor(classes)[:, None]
        self.register_buffer("absent", absent, persistent=False)

    def forward(self, features, heads):
        """Logits [B, C_max] of features [B, D], row b through head heads[b] ([B] int64); -inf past that head's C_t."""
        # An embedding's gradient is summed in a fixed order; an index's, on a CPU's threads, in whichever comes.
        weight = F.embedding(heads, self.weight.flatten(1)).view(len(heads), *self.weight.shape[1:])
        logits = torch.einsum("bd,bcd->bc", features, weight) + F.embedding(heads, self.bias)
        return logits.masked_fill(self.absent[heads], -torch.inf)


class MultiHead(nn.Module):
    """A shared backbone and one linear head a task.

    Attributes:
        backbone: [B, C, H, W] -> [B, D].
        heads: ([B, D], [B]) -> [B, C_max].
    """

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.heads = Heads(backbone.features, classes)


def build_net(model, image_shape, classes, dropout, seed):
    """Build a freshly initialised network on the CPU, so that a seed starts it alike on every device.

    Args:
        model: conv, wrn16_4 or wrn28_10.
        image_shape: (C, H, W).
        classes: [T], how many classes each head tells apart.
        dropout: between the two convolutions of a block, in [0, 1); conv has none.
        seed: of the initial weights; torch's global generator is left as it was.

    Returns:
        A `MultiHead`.

    Raises:
        ValueError: the images are too small for the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs too
        if model == "conv":
            backbone = SmallConv(*image_shape)
        else:
            depth, widen = {"wrn16_4": (16, 4), "wrn28_10": (28, 10)}[model]
            backbone = WideResNet(*image_shape, depth, widen, dropout)
        return MultiHead(backbone, classes)


def set_dropout_generator(net, generator):
    """Let every dropout layer of `net` draw from `generator`."""
    for module in net.modules():
        if isinstance(module, Dropout):
            module.generator = generator
