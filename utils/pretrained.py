"""Weights that a network begins with, and the features of a backbone that stays as it is."""
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from datasets.build_dataset import inside
from datasets.data import one_line
from net.build_net import build_net, weights_of
from utils.config_files import ConfigError
from utils.learner import describe_net
from utils.run_folder import is_whole, load_tensors, save_tensors
from utils.run_net import run_backbone


def load_weights(settings, image_shape):
    """The state dict of a backbone, on the CPU, from `settings.weights`.

    Args:
        settings: the run's; its weights are a name of torchvision's, or a file below --data_dir: a state dict, of the
            whole network or of its backbone, or a learner's file of a run with --save_nets.
        image_shape: (C, H, W) of the run's images.

    Raises:
        ConfigError: no such file and no network to download it over, or it is of another network.
        DataError: its path leads out of --data_dir.
    """
    backbone = build_net(settings.model, image_shape, [2], 0.0, seed=0).backbone
    expected = backbone.state_dict()
    known = weights_of(settings.model)
    path = inside(settings.data_dir, f"weights/{Path(known.url).name}" if known else settings.weights)
    if known and not path.exists():
        _download(known.url, path)
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): x  # torchvision's old DenseNet
             for key, x in _read_state(path).items()}
    readings = []
    for prefix in ("", "backbone.", "module."):  # torchvision's or a backbone's, ours, and those of nn.DataParallel
        found = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        readings += [found, {f"net.{key}": x for key, x in found.items()}]
    of_net = max(readings, key=lambda found: len(expected.keys() & found.keys()))
    for key, x in expected.items():
        if key in of_net and of_net[key].shape != x.shape:
            raise ConfigError(f"{path}: weights of another network: {key} is {list(of_net[key].shape)} there, and "
                              f"{list(x.shape)} in {settings.model} on images of {list(image_shape)}")
    # The modules themselves know the names and counts of older versions.
    if missing := backbone.load_state_dict(of_net, strict=False).missing_keys:
        raise ConfigError(f"{path}: weights of another network: {settings.model} has {missing[0]}, which is not there")
    return backbone.state_dict()


def hash_weights(settings, image_shape):
    """A text that tells whether two runs began with the same weights; None where a run has none."""
    if settings.weights is None:
        return None
    digest = hashlib.sha256()
    for key, x in load_weights(settings, image_shape).items():
        digest.update(key.encode())
        digest.update(x.contiguous().numpy())
    return digest.hexdigest()[:16]


def _download(url, path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.load_state_dict_from_url(url, str(path.parent), map_location="cpu", progress=False, check_hash=True,
                                           weights_only=True)
    except Exception as e:  # whatever a network can do wrong
        raise ConfigError(f"{path}: is not there, and {url} cannot be downloaded ({one_line(e, 80)}); "
                          "fetch it elsewhere and put it there") from e


def _read_state(path):
    """The state dict in a file; nothing in it is executed."""
    try:
        try:
            found = load_tensors(path, "cpu")
        except ValueError:  # not a learner's file
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # torch raises nearly anything on the file of another program
        raise ConfigError(f"{path}: not a file of weights alone, as torch.save writes a state dict") from e
    if isinstance(found, dict) and isinstance(found.get("net"), dict):
        found = found["net"]
    for key in ("state", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
        learner = isinstance(found, dict) and "tasks" in found
        why = "; its network was not kept, which --save_nets does" * learner
        raise ConfigError(f"{path}: holds no state dict{why}")
    return found


def freeze_backbone(settings, precision, folder, *splits):
    """The splits of a run with features in place of images, and how many parameters the frozen backbone has.

    The backbone is kept in the run folder as frozen.pt, for prediction.

    Args:
        settings: the run's, with weights.
        precision: of the backbone.
        folder: the run folder (None: nothing is kept).
        splits: `TaskData` with images, or None.

    Returns:
        The splits, their images [N, D] float32, and a number.
    """
    given = splits[0].images
    net = build_net(settings.model, given.shape[1:], [2], 0.0, seed=0)
    net.backbone.load_state_dict(load_weights(settings, given.shape[1:]))
    if folder is not None and not is_whole(folder / "frozen.pt"):
        save_tensors(folder / "frozen.pt", describe_net(settings, precision, given.shape[1:], [2], net))
    device = splits[0].device
    net.to(device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def extract(images):
        return torch.cat([run_backbone(net, part.to(device), precision).float() for part in images.split(256)])

    parameters = sum(p.numel() for p in net.backbone.parameters())
    return *(split and replace(split, images=extract(split.images)) for split in splits), parameters
