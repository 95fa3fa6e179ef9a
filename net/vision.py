"""The classifiers of torchvision as backbones: resnet18, mobilenet_v3_small, vit_b_16, ..."""
import difflib

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models, ops

from net import MEAN, STD
from net.wideresnet import Dropout

SMALL = 64  # pixels up to which a residual network gets the small stem
RESIDUAL = ("resnet", "resnext", "wide_resnet")


class StochasticDepth(Dropout):
    """Leaves a residual branch out, for single rows, and draws that from the generator it is given.

    As torchvision's in its mode "row" (Huang et al. 2016, arXiv 1603.09382).
    """

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        shape = (len(x),) + (1,) * (x.dim() - 1)
        keep = torch.empty(shape, device=x.device).uniform_(generator=self.generator) >= self.p
        return x * keep / (1 - self.p)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes a single value per channel, of which there is no variance, as in evaluation.

    It comes when images are so small that a feature map is one pixel, and the last batch of an epoch is one row.
    """

    def forward(self, x):
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class MNASNet(models.MNASNet):
    """MNASNet that loads a plain state dict, as all others do; torchvision's wants the version of its class in it."""

    _load_from_state_dict = nn.Module._load_from_state_dict


def list_networks():
    """The names of torchvision's classifiers."""
    return models.list_models(module=models)


def find_weights(name, weights):
    """torchvision's weights for a network; DEFAULT is those that it names so.

    Raises:
        ValueError: it has none of that name.
    """
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        near = "".join(f"; did you mean {x}?" for x in difflib.get_close_matches(weights.upper(), known.__members__, 1))
        raise ValueError(f"{name} has no weights {weights!r:.40} in torchvision, but {', '.join(known.__members__)}"
                         f"{near}")
    return known[weights]


class VisionNet(nn.Module):
    """Backbone of a classifier of torchvision, freshly initialised: [B, C, H, W] -> [B, D].

    Its last linear layer is left out. Its dropout layers have the rate that is asked for; stochastic depth keeps
    torchvision's. Grey images are taken as colour images whose three channels are equal. Residual networks on images of
    SMALL pixels or fewer begin with a 3x3 convolution of stride 1 and without pooling, as is usual in the field.

    With weights the images are resized and normalised as those want them, which is then part of the network.

    Args:
        name: one of `list_networks`.
        weights: a name of `find_weights`, whose values are not loaded here; None: none.
        channels, height, width: of the images.
        dropout: of every dropout layer, in [0, 1).

    Attributes:
        features: D.

    Raises:
        ValueError: a network that cannot take such images, or has no linear head.
    """

    def __init__(self, name, weights, channels, height, width, dropout):
        super().__init__()
        self.size = None
        if weights:
            wanted = find_weights(name, weights).transforms()
            self.size = height = width = wanted.crop_size[0]
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(getattr(wanted, key))[:, None, None], persistent=False)
        if channels not in (1, 3):
            raise ValueError(f"model {name} needs images of 1 or 3 channels, not {channels}")
        try:
            net = models.get_model(name, weights=None, **_arguments(name, weights, height, width))
        except (ValueError, AssertionError) as e:  # a size that its patches do not divide
            raise ValueError(f"model {name} cannot take images of {height} x {width} pixels ({e})") from e
        if name.startswith(RESIDUAL) and max(height, width) <= SMALL:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        if type(net) is models.MNASNet:
            net.__class__ = MNASNet
        linear = [(place, module) for place, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"model {name} has no linear head to replace")
        place, head = linear[-1]
        self.features = head.in_features
        _replace(net, place, nn.Identity())
        for place, module in list(net.named_modules()):
            if isinstance(module, nn.Dropout):
                _replace(net, place, Dropout(dropout))
            elif isinstance(module, ops.StochasticDepth):
                _replace(net, place, StochasticDepth(module.p))
            elif type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
        self.net = net
        self.try_images(name, channels, height, width)

    def forward(self, x):
        x = x.expand(-1, 3, -1, -1)
        if self.size:
            x = (x * STD + MEAN - self.mean) / self.std
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net(x)

    @torch.no_grad()
    def try_images(self, name, channels, height, width):
        """Refuse images that some layer cannot take, rather than in the first step."""
        self.eval()
        try:
            found = self(torch.zeros(1, channels, height, width)).shape
        except (RuntimeError, ValueError, AssertionError) as e:
            raise ValueError(f"model {name} cannot take images of {height} x {width} pixels "
                             f"({' '.join(str(e).split())[:120]})") from e
        self.train()
        if found != (1, self.features):
            raise ValueError(f"model {name} gives {list(found[1:])} features on images of {height} x {width} pixels")


def _arguments(name, weights, height, width):
    """What a network must be told when it is built."""
    if name.startswith("vit"):
        if height != width:
            raise ValueError("they must be square")
        return {"image_size": height}
    if name.startswith("maxvit"):
        return {"input_size": (height, width)}
    if name in ("googlenet", "inception_v3"):  # whose weights want images of mean 0.5, made of those of ImageNet's mean
        return {"aux_logits": False, "init_weights": True, "transform_input": weights is not None}
    return {}


def _replace(net, place, module):
    parent, _, name = place.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
