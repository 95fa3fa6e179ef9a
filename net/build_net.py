"""A backbone and its heads."""
import difflib
import re
import reprlib

import torch
from torch import nn
from torch.nn import functional as F

from net.smallconv import SmallConv
from net.wideresnet import Dropout, WideResNet

FEW = 512  # classes of all heads together up to which a CPU, too, is faster with one product for all


class HeadProducts(torch.autograd.Function):
    """Each row through its own head: a matrix product per head that has rows, and none for the others."""

    @staticmethod
    def forward(ctx, features, weight, bias, heads):
        order = heads.argsort(stable=True)
        present, counts = heads.unique(return_counts=True)
        ctx.rows = list(zip(present.tolist(), order.split(counts.tolist()), strict=True))
        ctx.save_for_backward(features, weight)
        logits = features.new_empty(len(heads), weight.shape[1])
        for t, i in ctx.rows:
            logits[i] = torch.addmm(bias[t], features[i], weight[t].T)
        return logits

    @staticmethod
    def backward(ctx, gradient):
        features, weight = ctx.saved_tensors
        of_features, of_weight = torch.empty_like(features), torch.zeros_like(weight)
        of_bias = weight.new_zeros(weight.shape[:2])
        for t, i in ctx.rows:
            of_features[i] = gradient[i] @ weight[t]
            torch.mm(gradient[i].T, features[i], out=of_weight[t])
            of_bias[t] = gradient[i].sum(0)
        return of_features, of_weight, of_bias, None


class Heads(nn.Module):
    """One linear layer per task, in one weight.

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
        few = self.bias.numel() <= FEW or features.device.type != "cpu"
        logits = self.multiply_all(features, heads) if few else self.multiply_present(features, heads)
        return logits.masked_fill(self.absent[heads], -torch.inf)

    def multiply_present(self, features, heads):
        """A product per head that has rows; looks at `heads`, for which a GPU would have to be waited for."""
        return HeadProducts.apply(features, self.weight, self.bias, heads)

    def multiply_all(self, features, heads):
        """One product with all heads, of which a row takes its part; reads the weight as often as its update does."""
        logits = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)
        return logits.gather(1, heads[:, None, None].expand(-1, 1, logits.shape[2])).squeeze(1)


class Features(nn.Identity):
    """The backbone of a network whose inputs are features already: [B, D] -> [B, D]."""

    def __init__(self, features):
        super().__init__()
        self.features = features


class MultiHead(nn.Module):
    """A shared backbone and one linear head per task.

    Attributes:
        backbone: [B, C, H, W] -> [B, D].
        heads: ([B, D], [B]) -> [B, C_max].
    """

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.heads = Heads(backbone.features, classes)


def read_model(text):
    """What `build_net` makes of a text.

    ("conv", channels) of "conv" or "conv_160"; ("wrn", depth, widen) of "wrn16_4"; ("torchvision", name, weights) of
    "resnet18", with None, or of "resnet18:IMAGENET1K_V1", which takes images as those weights want them.

    Raises:
        ValueError: another text, or numbers of which no network is made.
    """
    found = re.fullmatch(r"conv(?:_([1-9]\d{0,3}))?|wrn([1-9]\d{0,2})_([1-9]\d?)", text)
    if found and text.startswith("conv"):
        return "conv", int(found[1] or 80)
    if found and int(found[2]) >= 10 and int(found[2]) % 6 == 4:
        return "wrn", int(found[2]), int(found[3])
    from net.vision import find_weights, list_networks  # which a run of our own networks need not wait for

    name, _, weights = text.partition(":")
    if name in (names := list_networks()):
        return "torchvision", name, weights and find_weights(name, weights).name
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(text, names, 1))
    raise ValueError(f"{reprlib.repr(text)} is not one of conv, conv_<channels>, wrn<depth>_<widen> (depth 10, 16, 22, "
                     f"28, ...), nor of torchvision's classifiers (resnet18, ...){near}")


def weights_of(text):
    """torchvision's weights of a text such as "resnet18:IMAGENET1K_V1"; None where it names none."""
    match read_model(text):
        case "torchvision", name, weights if weights:
            from net.vision import find_weights

            return find_weights(name, weights)
    return None


def build_net(model, image_shape, classes, dropout, seed):
    """Build a freshly initialised network on the CPU, so that a seed starts it alike on every device.

    Args:
        model: as for `read_model`.
        image_shape: (C, H, W); (D,) where features of a frozen backbone stand in the place of images.
        classes: [T], how many classes each head tells apart.
        dropout: in [0, 1): of a wide residual network's blocks, of torchvision's dropout layers; conv has none.
        seed: of the initial weights; torch's global generator is left as it was.

    Returns:
        A `MultiHead`.

    Raises:
        ValueError: no such model, or the images are too small for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs too
        match read_model(model):
            case _ if len(image_shape) == 1:
                backbone = Features(*image_shape)
            case "conv", channels:
                backbone = SmallConv(*image_shape, channels)
            case "wrn", depth, widen:
                backbone = WideResNet(*image_shape, depth, widen, dropout)
            case "torchvision", name, weights:
                from net.vision import VisionNet

                backbone = VisionNet(name, weights, *image_shape, dropout)
        return MultiHead(backbone, classes)


def set_dropout_generator(net, generator):
    """Let every dropout layer of `net` draw from `generator`."""
    for module in net.modules():
        if isinstance(module, Dropout):
            module.generator = generator
