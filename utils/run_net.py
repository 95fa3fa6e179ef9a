"""The training loop and the forward pass over many rows: tensors in, tensors out."""
import contextlib
import ctypes
import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from net import MEAN, STD
from utils.capture import can_capture, capture_step
from utils.device import out_of_memory

PAD = 4  # pixels of zeros around an image before it is cropped at random
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
    """Features [B, D] of uint8 images [B, C, H, W], computed in `precision`; float features are themselves."""
    if images.is_floating_point():
        return images
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        return net.backbone(x)


def forward(net, images, heads, precision):
    """Logits [B, C_max] float32 of uint8 images [B, C, H, W] or features [B, D]; the backbone runs in `precision`."""
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


def learning_rate(schedule, lr, step, steps, warmup_steps=0, lr_min=0.0):
    """The rate of step 0 .. steps - 1.

    It rises linearly to `lr` in the first `warmup_steps`, and then stays (constant), or is annealed by a cosine that
    would be at `lr_min` after the last step.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)
    return lr if schedule == "constant" else lr_min + (lr - lr_min) * 0.5 * (1 + math.cos(math.pi * done))


def row_losses(logits, labels, smoothing=0.0):
    """The cross entropy [B] of logits [B, C_max], -inf past a row's C_t, with smoothed labels (Szegedy et al. 2016).

    A label counts 1 - smoothing, and all C_t classes of its task share the rest.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    if smoothing:
        present = logits > -torch.inf
        uniform = logits.log_softmax(1).masked_fill(~present, 0).sum(1) / present.sum(1)
        losses = (1 - smoothing) * losses - smoothing * uniform
    return losses


class Optimiser:
    """SGD with Nesterov momentum, or AdamW, as one fused kernel.

    The arithmetic is torch's; its optimiser classes are not used because making one imports torch's compiler, which
    takes as long as all other imports together.

    Args:
        params: of the network.
        kind: sgd or adamw.
        lr: 0-d float32 tensor on their device; its value at the time of a step counts, also in a captured step.
        weight_decay: on all parameters; adamw's is apart from the gradient.
        momentum: of sgd, in [0, 1); adamw has its usual 0.9 and 0.999.

    Attributes:
        state: tensors; with params all that a step depends on.
    """

    # So `torch.amp.GradScaler` leaves it to the kernel to unscale gradients and to skip infinite ones, and need not
    # wait for the device. It looks for gradients in `param_groups`, and lends `grad_scale` and `found_inf` for a step.
    _step_supports_amp_scaling = True

    def __init__(self, params, kind, lr, weight_decay, momentum=0.9):
        self.params = list(params)
        self.param_groups = [{"params": self.params}]
        self.settings = {"lr": lr, "weight_decay": weight_decay, "maximize": False, "fused": True}
        moments = [torch.zeros_like(p) for p in self.params]
        if kind == "sgd":
            self.update, self.lists = sgd, [moments]
            self.settings |= {"momentum": momentum, "nesterov": momentum > 0, "dampening": 0}
        else:
            steps = [torch.zeros((), device=p.device) for p in self.params]
            self.update, self.lists = adamw, [moments, [torch.zeros_like(p) for p in self.params], [], steps]
            self.settings |= {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        self.state = [x for tensors in self.lists for x in tensors]

    @torch.no_grad()
    def step(self):
        """Move every parameter by its gradient, which is dropped."""
        scaling = {key: getattr(self, key, None) for key in ("grad_scale", "found_inf")}
        self.update(self.params, [p.grad for p in self.params], *self.lists, **scaling, **self.settings)
        for p in self.params:
            p.grad = None


def keep_freed_memory():
    """Ask glibc to keep freed memory for this process: else each step's activations come as fresh, zeroed pages."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its greatest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fetch_ahead(images, parts, device):
    """Yield the images of each part on `device`; from the host's memory the next ones are gathered meanwhile.

    Args:
        images: [N, ...], on the device or in the host's memory.
        parts: row numbers of each, [b] int64, where the images are.
        device: where they are wanted.
    """
    if images.device == device:
        yield from map(images.__getitem__, parts)
        return

    def gather(i):
        x = images[i]
        return x.pin_memory() if device.type == "cuda" else x  # so that the copy need not be waited for

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(gather, parts[0])
        for i in [*parts[1:], None]:
            x = ahead.result()
            ahead = None if i is None else pool.submit(gather, i)
            yield x.to(device, non_blocking=True)


def train_net(net, images, rows, heads, labels, *, epochs, batch, lr, l2_reg, schedule, augment, flip, precision,
              generators, optimiser="sgd", momentum=0.9, warmup=0.0, lr_min=0.0, clip_norm=None, label_smoothing=0.0,
              weights=None, validate=None, best_epoch=False, capture="auto", start=None, watch=None):
    """Train `net`, an epoch each time the caller asks for the next one.

    One update a step, on the mean of the cross entropies of the rows' own heads. Rows of all tasks are mixed and
    reshuffled every epoch; the last short batch is kept. After the last epoch, and before each validation, batch norm's
    statistics are set anew (`renew_batch_norm`).

    Args:
        net: `MultiHead`, on the device of `rows`.
        images: [N, C, H, W] uint8, all training rows; or [N, D] float32, their features. Where they are too many for
            the device they are in the host's memory, and each batch comes from there.
        rows: [n] int64, the rows to train on; one may stand there several times.
        heads: [n] int64, the head of each.
        labels: [n] int64, the class of each within its task.
        epochs, batch, lr, l2_reg, schedule: as in a hyper-parameter file; l2_reg is the weight decay.
        augment: crop at random, and mirror if `flip`.
        precision: fp32, bf16 or fp16, of the backbone alone.
        generators: "shuffle", "augment" and "dropout" (the last is drawn from inside the net), on the device of `rows`.
        optimiser, momentum: as for `Optimiser`.
        warmup: epochs (whole or not) in which the rate rises from 0 to lr.
        lr_min: as for `learning_rate`.
        clip_norm: gradients of a greater norm, all together, are scaled down to it (None: not).
        label_smoothing: as for `row_losses`.
        weights: [n] float32, by which the rows' losses are multiplied (None: all 1).
        validate: a function () -> dict(val_loss, val_accuracy), called after each epoch (None: nothing is held out).
        best_epoch: end with the weights after the epoch of the highest val_accuracy, the first of several.
        capture: auto, or off: whether a CUDA graph may do the steps; nothing else depends on it.
        start: what `snapshot` returned, its tensors on the CPU, to go on from there (None: from the beginning).
        watch: what an epoch's batches go through, (batches, loss_sum) -> batches, to show them; loss_sum is the loss
            summed over the rows so far, on the device (None: nobody watches).

    Yields:
        After each epoch (values, snapshot): dict(epoch, train_loss, train_accuracy, lr), counted from 0, means over the
        rows as they were trained on, and the rate of the epoch's last step, with what `validate` returned; and a
        function that returns all that training needs to go on from here, exactly, as a dict of tensors and numbers.

    Raises:
        BadSnapshot: `start` is of another network.
    """
    device = rows.device
    keep_freed_memory()
    net.to(memory_format=torch.channels_last)
    rate = torch.zeros((), device=device)
    opt = Optimiser(net.parameters(), optimiser, rate, l2_reg, momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    steps = epochs * math.ceil(len(rows) / batch)
    warmup_steps = round(warmup * steps / epochs)
    first, best = 0, None
    if start is not None:
        try:
            first, best = start["epoch"], start["best"]
            for key, part in (("net", net), ("scaler", scaler)):
                part.load_state_dict(start[key])
            for x, saved in zip(opt.state, start["optimiser"], strict=True):
                x.copy_(saved)
            for key, generator in generators.items():
                generator.set_state(start["generators"][key])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise BadSnapshot("not of this network") from e
    # Summed on the device and read once an epoch, so that no step waits for the host.
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=device)

    def take_images(i, x=None):
        x = images[rows[i]] if x is None else x
        return sample_crops(x, flip, generators["augment"]) if augment else x

    def draw_batches(show=lambda parts: parts):
        """An epoch's batches, reshuffled: where their rows stand in `rows` and, if they come from the host, images."""
        order = torch.randperm(len(rows), generator=generators["shuffle"], device=device)
        parts = show(order.split(batch))
        if images.device == device:
            return zip(parts)
        return zip(parts, fetch_ahead(images, rows.cpu()[order.cpu()].split(batch), device), strict=True)

    def take_step(i, x=None):
        head, label = heads[i], labels[i]
        logits = forward(net, take_images(i, x), head, precision)
        if label_smoothing or weights is not None:
            losses = row_losses(logits, label, label_smoothing)
            loss = (losses if weights is None else losses * weights[i]).mean()
        else:
            loss = F.cross_entropy(logits, label)
        scaler.scale(loss).backward()
        if clip_norm is not None:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(opt.params, clip_norm)
        scaler.step(opt)
        scaler.update()
        loss_sum.add_(loss.detach().double() * len(i))
        correct.add_((logits.detach().argmax(1) == label).sum())

    def changed():
        """The tensors that a step changes."""
        scale = [scaler._scale, scaler._growth_tracker] if scaler.is_enabled() else []
        return [*net.state_dict().values(), *opt.state, loss_sum, correct, *scale]

    take_full_step = take_step
    if capture == "auto" and can_capture(device, batch):
        take_full_step = capture_step(take_step, changed, [generators[key] for key in ("augment", "dropout")], device)
    step = first * (steps // epochs)
    for epoch in range(first, epochs):
        loss_sum.zero_()
        correct.zero_()
        net.train()  # between epochs the caller may have had it predict
        for drawn in draw_batches(lambda parts: watch(parts, loss_sum) if watch else parts):
            rate.fill_(now := learning_rate(schedule, lr, step, steps, warmup_steps, lr_min))
            (take_full_step if len(drawn[0]) == batch else take_step)(*drawn)
            step += 1
        means = {"train_loss": loss_sum.item() / len(rows), "train_accuracy": correct.item() / len(rows)}
        if epoch + 1 == epochs or validate:
            renew_batch_norm(net, itertools.starmap(take_images, draw_batches()), precision)
        if validate:
            means |= validate()
            if best_epoch and (best is None or means["val_accuracy"] > best["val_accuracy"]):
                best = means | {"net": {key: x.clone() for key, x in net.state_dict().items()}}
        if best and epoch + 1 == epochs:
            net.load_state_dict(best["net"])

        def snapshot(done=epoch + 1, best=best):
            parts = {"net": net.state_dict(), "optimiser": opt.state, "scaler": scaler.state_dict()}
            states = {key: generator.get_state() for key, generator in generators.items()}
            return {"epoch": done, "generators": states, "best": best, **parts}

        yield {"epoch": epoch, **means, "lr": now}, snapshot


@torch.no_grad()
def predict_logits(net, images, rows, head, num_classes, precision, max_batch=1000):
    """Logits of some rows through one head, without augmentation.

    Args:
        net: `MultiHead`, on the device of `rows`; left in evaluation mode.
        images: [N, C, H, W] uint8, or [N, D] float32 features, there or on the host.
        rows: [n] int64, of `images`.
        head: its index.
        num_classes: C_t, of that head.
        precision: fp32, bf16 or fp16, of the backbone.
        max_batch: rows at once at most. Twice the batch size of training takes less memory than training, which keeps
            more of a row than prediction does; where memory runs out all the same, half as many are tried.

    Returns:
        [n, C_t] float32.
    """
    net.eval()
    # A GPU wants many rows, but fewer of larger images; on a CPU more fall out of the caches and take twice as long.
    batch = max(1, min(1000, 1000 * 32 * 32 // images.shape[2:].numel())) if rows.is_cuda else 128
    batch = max(1, min(batch, max_batch, len(rows)))
    while True:
        parts = rows.to(images.device).split(batch)
        try:
            return torch.cat([forward(net, x, rows.new_full((len(x),), head), precision)[:, :num_classes]
                              for x in fetch_ahead(images, parts, rows.device)])
        except (RuntimeError, MemoryError) as e:
            if batch == 1 or not out_of_memory(e):
                raise
        torch.cuda.empty_cache()  # which does nothing without a GPU
        batch //= 2
