"""The training loop and the forward pass over many rows: tensors in, tensors out."""
import contextlib
import hashlib
import math

import torch
from torch.nn import functional as F

from utils.config import ConfigError

PAD = 4  # pixels of zeros around an image before it is cropped at random


class BadSnapshot(Exception):
    """What training was to go on from is not of this network."""


def derive_seed(seed, round, purpose):
    """A seed of 63 bits for one purpose in one round, unrelated to every other."""
    digest = hashlib.sha256(f"{seed}/{round}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed, round, purpose, device="cpu"):
    """The generator of one purpose in one round; nothing here uses torch's global one."""
    return torch.Generator(device).manual_seed(derive_seed(seed, round, purpose))


def choose_device(device):
    """The torch device of `--device`: auto is CUDA if there, else the CPU.

    Raises:
        ConfigError: a CUDA device that is not there.
    """
    count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"--device: {device} is not there: torch sees {count} CUDA devices; cpu always works")
    return device


def choose_precision(precision, device):
    """The precision of the backbone, fp32, bf16 or fp16: auto is bf16 on CUDA and fp32 on a CPU.

    Raises:
        ConfigError: fp16 on a CPU, which has no use for it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision: fp16 needs a CUDA device; on a CPU take fp32 or bf16")
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def normalise(images):
    """uint8 [B, C, H, W] to float32, mean 0.5 and standard deviation 0.25 of the full range.

    These are constants because the data's own statistics would leak information about tasks not yet seen.
    """
    return images.float().div_(255 / 4).sub_(2)


def sample_crops(images, flip, generator):
    """Crop each image at random after zero padding by PAD, and mirror it with probability 1/2 if `flip`.

    Args:
        images: [B, C, H, W] uint8.
        flip: whether a mirrored image still shows its class.
        generator: on the images' device.

    Returns:
        [B, C, H, W] uint8, in channels_last layout.
    """
    b, _, h, w = images.shape
    device = images.device
    shift = torch.randint(0, 2 * PAD + 1, (2, b, 1), generator=generator, device=device)
    y = torch.arange(h, device=device) + shift[0]  # [B, H], rows of the padded image
    x = torch.arange(w, device=device) + shift[1]
    if flip:
        mirrored = torch.randint(0, 2, (b, 1), generator=generator, device=device).bool()
        x = torch.where(mirrored, x.flip(1), x)
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    row = torch.arange(b, device=device)[:, None, None]
    return padded[row, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def forward(net, images, heads, precision):
    """Logits [B, C_max] in float32 of uint8 images [B, C, H, W]; only the backbone runs in `precision`."""
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        features = net.backbone(x)
    return net.heads(features.float(), heads)


def learning_rate(schedule, lr, step, steps):
    """The rate of step 0 .. steps - 1: `lr` throughout (constant), or annealed by a cosine to 0 after the last."""
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_net(net, images, rows, heads, labels, *, epochs, batch, lr, l2_reg, schedule, augment, flip, precision,
              generators, start=None):
    """Train `net`, an epoch each time the caller asks for the next one.

    Stochastic gradient descent with Nesterov momentum 0.9 and weight decay on all parameters, one update a step, on
    the cross entropy of each row's own head. Rows of all tasks are mixed and reshuffled every epoch; the last short
    batch is kept.

    Args:
        net: `MultiHead`, on the device of the data.
        images: [N, C, H, W] uint8, all training rows.
        rows: [n] int64, the rows to train on; one may stand there several times.
        heads: [n] int64, the head of each.
        labels: [n] int64, the class of each within its task.
        augment: crop at random, and mirror if `flip`.
        precision: fp32, bf16 or fp16, of the backbone alone.
        generators: "shuffle", "augment" and "dropout" (the last is drawn from inside the net), on the data's device.
        start: what `snapshot` returned, its tensors on the CPU, to go on from there (None: from the beginning).

    Yields:
        After each epoch (values, snapshot): dict(epoch, train_loss, train_accuracy, lr), counted from 0, means over the
        rows as they were trained on, and the rate of the epoch's last step; and a function that returns all that
        training needs to go on from here, exactly, as a dict of tensors and numbers.

    Raises:
        BadSnapshot: `start` is of another network.
    """
    net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=l2_reg, nesterov=True,
                                fused=images.is_cuda)  # with fp16 the others wait for the host  # fmt: skip
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")
    steps = epochs * math.ceil(len(rows) / batch)
    first = 0
    if start is not None:
        try:
            first = start["epoch"]
            for key, part in (("net", net), ("optimiser", optimiser), ("scaler", scaler)):
                part.load_state_dict(start[key])
            for key, generator in generators.items():
                generator.set_state(start["generators"][key])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise BadSnapshot("not of this network") from e
    step = first * (steps // epochs)
    for epoch in range(first, epochs):
        # Summed on the device and read once an epoch, so that no step waits for the host.
        loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=images.device)
        net.train()  # between epochs the caller may have had it predict
        for i in torch.randperm(len(rows), generator=generators["shuffle"], device=images.device).split(batch):
            rate = learning_rate(schedule, lr, step, steps)
            optimiser.param_groups[0]["lr"] = rate
            x, head, label = images[rows[i]], heads[i], labels[i]
            if augment:
                x = sample_crops(x, flip, generators["augment"])
            logits = forward(net, x, head, precision)
            loss = F.cross_entropy(logits, label)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            loss_sum += loss.detach().double() * len(i)
            correct += (logits.detach().argmax(1) == label).sum()
            step += 1
        means = {"train_loss": loss_sum.item() / len(rows), "train_accuracy": correct.item() / len(rows)}

        def snapshot(done=epoch + 1):
            parts = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()}
            return {"epoch": done, "generators": {k: g.get_state() for k, g in generators.items()}, **parts}

        yield {"epoch": epoch, **means, "lr": rate}, snapshot


@torch.no_grad()
def predict_logits(net, images, rows, head, num_classes, precision):
    """Logits [n, C_t] in float32 of `rows` ([n] int64) of `images` through one head, without augmentation."""
    net.eval()
    batch = 1000 if images.is_cuda else 128  # on a CPU larger ones fall out of the caches and take twice as long
    out = []
    for i in rows.split(batch):
        out.append(forward(net, images[i], torch.full_like(i, head), precision)[:, :num_classes])
    return torch.cat(out)
