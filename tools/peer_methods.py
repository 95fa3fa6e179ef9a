"""What Avalanche's methods and our network want of each other; tools/peers.py imports it where a method runs."""
from functools import partial

import torch
from avalanche.models import MultiTaskModule
from avalanche.models.packnet import PackNetModule, PackNetPlugin
from avalanche.models.pnn import PNNColumn
from avalanche.training import DER, JointTraining, LwF
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from utils.run_net import forward, renew_batch_norm, run_backbone

ABSENT = -1000  # logit of a class that a head lacks, as in Avalanche's own heads: DER squares differences of logits


class Wrapped(MultiTaskModule):
    """Our network as a multi-task model of Avalanche, whose inputs are row numbers: images stay where they are.

    Args:
        net: `MultiHead`.
        read_images: ([B] row numbers, whether to augment) -> [B, C, H, W] uint8; a function, and so not copied where
            LwF copies the model.
        heads: [N] int64, the task of every row.
        precision: fp32 or bf16, of the backbone.

    Attributes:
        columns: all networks that predictions need.
        rows_trained: rows of which a gradient was taken: those of training, of A-GEM's reference, of EWC's importances
            and of LwF's second pass.
    """

    def __init__(self, net, read_images, heads, precision):
        super().__init__()
        self.net, self.read_images, self.heads, self.precision = net, read_images, heads, precision
        self.columns = [net]
        self.rows_trained = 0

    def adaptation(self, experience):
        """Note the task, whose old head LwF asks later; nothing is added, for all heads are there from the start."""
        self.known_train_tasks_labels |= set(experience.task_labels)

    def activate_task(self, t):
        """Before task t is trained or tested: nothing, but for PackNet and PNN."""

    def take_images(self, rows):
        return self.read_images(rows, self.training)

    def renew(self, batches):
        """Set batch norm's statistics anew from `batches` of row numbers, as `renew_batch_norm` does."""
        renew_batch_norm(self.net, map(self.take_images, batches), self.precision)

    def forward(self, x, task_labels=None):
        """Logits [B, C_max] of [B] row numbers, each through its own task's head (DER gives no labels).

        LwF hands over images [B, C, H, W], with [B] labels or, for all heads seen so far, a dict label -> logits, none.
        """
        self.rows_trained += len(x) * torch.is_grad_enabled()
        if x.dim() > 1 and task_labels is None:
            features = run_backbone(self.net, x, self.precision).float()
            return {t: self.net.heads(features, torch.full((len(x),), t, device=x.device))
                    for t in sorted(self.known_train_tasks_labels)}
        images, heads = (x, task_labels) if x.dim() > 1 else (self.take_images(x), self.heads[x])
        return forward(self.net, images, heads, self.precision).clamp(min=ABSENT)


class Joint(JointTraining):
    def make_train_dataloader(self, **_):
        """Rows of all tasks mixed, as in Multi-Head; Avalanche's own batches need a row of every task each."""
        self.dataloader = DataLoader(self.adapted_dataset, self.train_mb_size, shuffle=True)


class Distilled(LwF):
    def _before_forward(self, **kwargs):
        """Draw a batch's images once, so that the old network is asked about the crops that the new one sees."""
        super()._before_forward(**kwargs)
        self.mbatch[0] = self.model.take_images(self.mbatch[0])


class Dark(DER):
    def _before_training_exp(self, **kwargs):
        """As many rows from memory as a batch has, or all of fewer; Avalanche then takes none, and says nothing."""
        self.batch_size_mem = max(1, min(self.train_mb_size, len(self.storage_policy.buffer)))
        super()._before_training_exp(**kwargs)


class Packed(Wrapped, PackNetModule):
    """A network whose convolutions' weights each belong to one task (Mallya & Lazebnik 2018), in Avalanche's procedure.

    Its own wrappers take neither batch norm, convolutions without bias nor several heads, and let weight decay move
    what is frozen. As in the paper, weights that are pruned start from 0 in the next task, and biases and batch norm
    are frozen after the first. A head belongs to its task.

    Attributes:
        parts: (parameter, owner, kept) of each parameter: the task of each number (one beyond the present task: free),
            and the values of all that the present task does not train.
    """

    activate_task = PackNetModule.activate_task

    def __init__(self, net, *more):
        super().__init__(net, *more)
        owned = [(p, torch.zeros_like(p, dtype=torch.short)) for p in net.backbone.parameters()]
        owned += [(p, torch.arange(len(p), device=p.device).view(-1, *[1] * (p.dim() - 1)).expand_as(p))
                  for p in net.heads.parameters()]
        self.parts = [(p, owner, p.detach().clone()) for p, owner in owned]
        self.masks = [owner for p, owner in owned if p.dim() == 4]  # all that must be kept to tell tasks apart

    @torch.no_grad()
    def hold(self):
        """After a step: put back what is not the present task's, which momentum and weight decay have moved, too."""
        for p, owner, kept in self.parts:
            p.copy_(torch.where(owner == self.task_count, p, kept))

    @torch.no_grad()
    def _prune(self, share):
        for p, owner, kept in self.parts:
            if p.dim() == 4:
                mine = (owner == self.task_count).flatten().nonzero().squeeze(1)
                smallest = p.flatten()[mine].abs().argsort(stable=True)[: int(share * len(mine))]
                owner.view(-1)[mine[smallest]] = self.task_count + 1
                kept.view(-1)[mine[smallest]] = 0
        self.hold()

    @torch.no_grad()
    def _freeze_pruned(self):
        for p, _, kept in self.parts:
            kept.copy_(p)

    @torch.no_grad()
    def _activate_task(self, t):
        for p, owner, kept in self.parts:
            p.copy_(torch.where(owner <= t, kept, 0))

    def train(self, mode=True):
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and self.task_count == 0)
        return self

    def renew(self, batches):
        if self.task_count == 0:
            super().renew(batches)


class Pruner(PackNetPlugin):
    def after_update(self, strategy, **_):
        strategy.model.hold()


class Lateral(nn.Module):
    """What a convolution hears of the inputs of its twins in earlier columns: Avalanche's `MLPAdapter`, convolved."""

    def __init__(self, conv, columns):
        super().__init__()
        width = conv.in_channels
        self.alphas = nn.Parameter(torch.randn(columns))
        self.V = nn.Conv2d(columns * width, width, 1)
        self.U = nn.Conv2d(width, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)

    def forward(self, inputs):
        scaled = [alpha * x for alpha, x in zip(self.alphas, inputs, strict=True)]
        return self.U(F.relu(self.V(torch.cat(scaled, 1))))


class Column(nn.Module):
    """The network of task k in a progressive network (Rusu et al. 2016): a backbone that hears of k frozen ones.

    Args:
        backbone: [B, C, H, W] -> [B, D].
        before: the earlier columns. A tuple hides them: they are neither trained, counted nor their batch norm renewed.
        classes: C_k of its task, the only one that it has a head for.
    """

    def __init__(self, backbone, before, classes):
        super().__init__()
        self.before = tuple(before)
        self.own = backbone
        self.output = PNNColumn(backbone.features, classes, len(self.before))
        self.heard = {}  # inputs of the convolutions but for the first, whose input is the images in every column
        convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)][1:]
        self.laterals = nn.ModuleList(Lateral(conv, len(self.before)) for conv in convs if self.before)
        for i, conv in enumerate(convs):
            conv.register_forward_hook(partial(self._hear, i))

    def _hear(self, i, _, inputs, output):
        self.heard[i] = inputs[0]
        return output + self.laterals[i]([column.heard[i] for column in self.before]) if self.before else output

    def backbone(self, images):
        """[B, C, H, W] -> [B, (k + 1) D], the features of all columns."""
        with torch.no_grad():
            earlier = [column.own(images) for column in self.before]
        features = torch.cat([*earlier, self.own(images)], 1)
        for column in (*self.before, self):
            column.heard.clear()
        return features

    def heads(self, features, _):
        """[B, (k + 1) D] -> logits [B, C_k]."""
        return self.output(list(features.chunk(len(self.before) + 1, 1)))


class Progressive(Wrapped):
    """A column a task; only the newest is trained.

    Args:
        make_backbone: k -> the backbone of column k, on the device of the data.
        classes: [T].
        more: see `Wrapped`.
    """

    def __init__(self, make_backbone, classes, *more):
        super().__init__(None, *more)
        self.make_backbone, self.classes = make_backbone, classes
        self.columns = []
        self.activate_task(0)

    def activate_task(self, t):
        if t == len(self.columns):
            for column in self.columns:
                column.eval().requires_grad_(False)
            self.columns.append(Column(self.make_backbone(t), self.columns, self.classes[t]).to(self.heads.device))
        self.net = self.columns[t]
