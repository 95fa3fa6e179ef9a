"""The training loop and the forward pass over many rows: tensors in, tensors out."""
import contextlib
import ctypes
import hashlib
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.sgd import sgd

PAD = 4  # pixels of zeros around an image before it is cropped at random
# Of the inputs' full range, whatever the data: their own statistics would leak information about tasks not yet seen.
MEAN, STD = 0.5, 0.25
NORM_BATCHES = 100  # from which batch norm's statistics are averaged, at most


class BadSnapshot(Exception):
    """What training was to go on from is not of this network."""


def derive_seed(seed, round, purpose):
    """A seed of 63 bits for one purpose in one round, unrelated to every other."""
    digest = hashlib.sha256(f"{seed}/{round}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed, round, purpose, device="cpu"):
    """The generator of one purpose in one round; nothing here uses torch's global one."""
    return torch.Generator(device).manual_seed(derive_seed(seed, round, purpose))


def normalise(images):
    """uint8 [B, C, H, W] to float32: (images / 255 - MEAN) / STD."""
    return images.float().div_(255 * STD).sub_(MEAN / STD)


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


def run_backbone(net, images, precision):
    """Features [B, D] of uint8 images [B, C, H, W], computed in `precision`."""
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        return net.backbone(x)


def forward(net, images, heads, precision):
    """Logits [B, C_max] in float32 of uint8 images [B, C, H, W]; only the backbone runs in `precision`."""
    return net.heads(run_backbone(net, images, precision).float(), heads)


@torch.no_grad()
def renew_batch_norm(net, batches, precision):
    """Set batch norm's running statistics to their average over `batches`, weighted by rows; no weight changes.

    Those that training leaves lag behind the weights where steps are few: they begin at mean 0 and variance 1, and each
    step moves them by a tenth of the way.

    Args:
        net: `MultiHead`; left in training mode.
        batches: uint8 images [B, C, H, W], drawn and augmented as in training; NORM_BATCHES of them are used at most.
        precision: fp32, bf16 or fp16, of the backbone.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    net.train()
    for norm in norms:
        norm.reset_running_stats()
    seen = 0
    for images in itertools.islice(batches, NORM_BATCHES if norms else 0):
        seen += len(images)
        for norm in norms:
            norm.momentum = len(images) / seen  # so that what stands there is the mean over all rows so far
        run_backbone(net, images, precision)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before


def learning_rate(schedule, lr, step, steps):
    """The rate of step 0 .. steps - 1: `lr` throughout (constant), or annealed by a cosine to 0 after the last."""
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * step / steps))


class SGD:
    """Stochastic gradient descent with Nesterov momentum, as one fused kernel.

    The arithmetic is torch's; its optimiser class is not used because making one imports torch's compiler, which takes
    as long as all other imports together.

    Args:
        params: of the network.
        lr: 0-d float32 tensor on their device; its value at the time of a step counts, also in a captured step.
        weight_decay: on all parameters.
        momentum: in [0, 1).
    """

    # So `torch.amp.GradScaler` leaves it to the kernel to unscale gradients and to skip infinite ones, and need not
    # wait for the device. It looks for gradients in `param_groups`, and lends `grad_scale` and `found_inf` for a step.
    _step_supports_amp_scaling = True

    def __init__(self, params, lr, weight_decay, momentum=0.9):
        self.params = list(params)
        self.param_groups = [{"params": self.params}]
        self.velocity = [torch.zeros_like(p) for p in self.params]
        self.settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}

    @torch.no_grad()
    def step(self):
        """Move every parameter by its gradient, which is dropped."""
        scaling = {key: getattr(self, key, None) for key in ("grad_scale", "found_inf")}
        sgd(self.params, [p.grad for p in self.params], self.velocity, fused=True, nesterov=True, dampening=0,
            maximize=False, **scaling, **self.settings)  # fmt: skip
        for p in self.params:
            p.grad = None


def capture_step(step, generators, warm_up=3):
    """Let a CUDA graph do what `step` does: a few calls as they are, then one replay a call.

    A small network's step is hundreds of short kernels, and launching them one by one takes longer than running them.

    Args:
        step: a function of one tensor, the rows of a batch; all else that it reads or writes stays where it is in
            memory, and it never waits for the device.
        generators: CUDA generators that it draws from.
        warm_up: calls before the capture, in which libraries choose their kernels and take their memory.

    Returns:
        A function of one tensor, always of the same shape.
    """
    stream, graph, rows, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, 0

    def call(i):
        nonlocal rows, calls
        calls += 1
        if calls <= warm_up:
            # Autograd remembers the stream that a parameter was first used on; it must not be the default one.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(i)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if rows is None:
            rows = i.clone()
            for generator in generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=stream):
                step(rows)
        rows.copy_(i)
        graph.replay()

    return call


def keep_freed_memory():
    """Ask glibc to keep freed memory for this process: else each step's activations come as fresh, zeroed pages."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its greatest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train_net(net, images, rows, heads, labels, *, epochs, batch, lr, l2_reg, schedule, augment, flip, precision,
              generators, start=None, watch=None):
    """Train `net`, an epoch each time the caller asks for the next one.

    Stochastic gradient descent with Nesterov momentum 0.9 and weight decay on all parameters, one update a step, on
    the cross entropy of each row's own head. Rows of all tasks are mixed and reshuffled every epoch; the last short
    batch is kept. After the last epoch batch norm's statistics are set anew (`renew_batch_norm`).

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
        watch: what an epoch's batches go through, (batches, loss_sum) -> batches, to show them; loss_sum is the loss
            summed over the rows so far, on the device (None: nobody watches).

    Yields:
        After each epoch (values, snapshot): dict(epoch, train_loss, train_accuracy, lr), counted from 0, means over the
        rows as they were trained on, and the rate of the epoch's last step; and a function that returns all that
        training needs to go on from here, exactly, as a dict of tensors and numbers.

    Raises:
        BadSnapshot: `start` is of another network.
    """
    device = images.device
    keep_freed_memory()
    net.to(memory_format=torch.channels_last)
    rate = torch.zeros((), device=device)
    optimiser = SGD(net.parameters(), rate, l2_reg)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    steps = epochs * math.ceil(len(rows) / batch)
    first = 0
    if start is not None:
        try:
            first = start["epoch"]
            for key, part in (("net", net), ("scaler", scaler)):
                part.load_state_dict(start[key])
            for v, saved in zip(optimiser.velocity, start["velocity"], strict=True):
                v.copy_(saved)
            for key, generator in generators.items():
                generator.set_state(start["generators"][key])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise BadSnapshot("not of this network") from e
    # Summed on the device and read once an epoch, so that no step waits for the host.
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=device)

    def take_images(i):
        x = images[rows[i]]
        return sample_crops(x, flip, generators["augment"]) if augment else x

    def shuffle():
        return torch.randperm(len(rows), generator=generators["shuffle"], device=device).split(batch)

    def take_step(i):
        head, label = heads[i], labels[i]
        logits = forward(net, take_images(i), head, precision)
        loss = F.cross_entropy(logits, label)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        loss_sum.add_(loss.detach().double() * len(i))
        correct.add_((logits.detach().argmax(1) == label).sum())

    take_full_step = take_step
    # fp16's loss scale is updated by code that was not made for capture; large batches hide the launches anyway.
    if device.type == "cuda" and precision != "fp16" and batch <= 1024:
        take_full_step = capture_step(take_step, [generators[key] for key in ("augment", "dropout")])
    step = first * (steps // epochs)
    for epoch in range(first, epochs):
        loss_sum.zero_()
        correct.zero_()
        net.train()  # between epochs the caller may have had it predict
        for i in watch(shuffle(), loss_sum) if watch else shuffle():
            rate.fill_(now := learning_rate(schedule, lr, step, steps))
            (take_full_step if len(i) == batch else take_step)(i)
            step += 1
        if epoch + 1 == epochs:
            renew_batch_norm(net, map(take_images, shuffle()), precision)
        means = {"train_loss": loss_sum.item() / len(rows), "train_accuracy": correct.item() / len(rows)}

        def snapshot(done=epoch + 1):
            parts = {"net": net.state_dict(), "velocity": optimiser.velocity, "scaler": scaler.state_dict()}
            return {"epoch": done, "generators": {k: g.get_state() for k, g in generators.items()}, **parts}

        yield {"epoch": epoch, **means, "lr": now}, snapshot


@torch.no_grad()
def predict_logits(net, images, rows, head, num_classes, precision, most=1000):
    """Logits [n, C_t] in float32 of `rows` ([n] int64) of `images` through one head, without augmentation.

    `most` rows at once: with twice the batch size of training it takes less memory than training, which keeps more of a
    row than prediction does.
    """
    net.eval()
    # A GPU wants many rows, but fewer of larger images; on a CPU more fall out of the caches and take twice as long.
    batch = max(1, min(1000, 1000 * 32 * 32 // images.shape[2:].numel())) if images.is_cuda else 128
    out = []
    for i in rows.split(min(batch, most)):
        out.append(forward(net, images[i], torch.full_like(i, head), precision)[:, :num_classes])
    return torch.cat(out)
