"""Other ways to inherit, which inherit.md compares with --inherit and which are not in the code.

    python results/variants.py hold_out DATA NEW      # NEW/cifar100.npz: a fifth of the training rows are its test rows
    python results/variants.py star FLAGS             # as modelzoo.py FLAGS, but inheriting in another way; see WAYS
    python results/variants.py members RUN ...        # how alike the learners of runs are, and what their mean gives
"""
import io
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import before_torch  # noqa: F401  # isort: skip
import numpy as np
import torch

import modelzoo
import multihead
from datasets.cifar import load_cifar100
from utils.command import command, guard
from utils.config_files import ConfigError
from utils.learner import WARM, learner_path
from utils.log import say
from utils.metrics import accuracy, average_accuracy
from utils.run_folder import load_tensors, write_file


def hold_out(data, new):
    """Write CIFAR-100 with every fifth training row of a class as its test rows, and no other test row."""
    (images, labels), _ = load_cifar100(data, [])
    images, labels = images[:].numpy().transpose(0, 2, 3, 1), labels.numpy()
    place = np.empty(len(labels), int)  # of a row among those of its class
    for c in range(100):
        place[labels == c] = np.arange((labels == c).sum())
    held = place % 5 == 0
    Path(new).mkdir(parents=True, exist_ok=True)
    arrays = {f"{split}_{what}": array[rows] for split, rows in (("train", ~held), ("test", held))
              for what, array in (("images", images), ("labels", labels))}
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_file(Path(new) / "cifar100.npz", file.getvalue())


def inherit_from_the_first(load=multihead.load_backbone):
    """Star: every learner's backbone begins as the first one's ended, the warm start's where there is one."""

    def load_first(path):
        warm = path.with_name(learner_path(Path(), WARM).name)
        return load(warm if warm.exists() else path.with_name(learner_path(Path(), 0).name))

    multihead.load_backbone = load_first


def shrink_and_perturb(kept, fresh, build=multihead.build_net):
    """Chain, but a weight begins as kept * old + fresh * (its initial one): Ash & Adams 2020, section 4."""

    def build_to_mix(*arguments):
        net = build(*arguments)
        load = net.backbone.load_state_dict

        def mix(old):
            new = net.backbone.state_dict()
            load({key: kept * x + fresh * new[key] if x.is_floating_point() else x for key, x in old.items()})

        net.backbone.load_state_dict = mix
        return net

    multihead.build_net = build_to_mix


def inherit_heads(build=multihead.build_net, train=multihead.train_epochs):
    """Chain, and the head of a task begins as it ended in the last learner that has one; needs --save_nets."""
    heads = []

    def find_heads_and_train(settings, precision, data, tasks, rows, round, *more, **others):
        heads.clear()
        for t in tasks:
            for k in reversed(range(round)):
                saved = load_tensors(learner_path(settings.folder, k), "cpu")
                if t in saved["tasks"]:
                    i, state = saved["tasks"].index(t), saved["net"]["state"]
                    heads.append((state["heads.weight"][i], state["heads.bias"][i]))
                    break
            else:
                heads.append(None)
        return train(settings, precision, data, tasks, rows, round, *more, **others)

    def build_with_heads(*arguments):
        net = build(*arguments)
        with torch.no_grad():
            for i, head in enumerate(heads):
                if head:
                    net.heads.weight[i, : len(head[0])] = head[0]
                    net.heads.bias[i, : len(head[1])] = head[1]
        return net

    multihead.train_epochs, multihead.build_net = find_heads_and_train, build_with_heads


def lower_rate(factor, train=multihead.train_epochs):
    """Chain, and a learner that inherits trains at a lower rate."""

    def train_slowly(settings, precision, data, tasks, rows, round, *more, **others):
        slow = replace(settings, lr=settings.lr * factor) if round > 0 else settings
        return train(slow, precision, data, tasks, rows, round, *more, **others)

    multihead.train_epochs = train_slowly


WAYS = {
    "star": inherit_from_the_first,
    "perturb-0.8": lambda: shrink_and_perturb(0.8, 0.2),
    "perturb-0.4": lambda: shrink_and_perturb(0.4, 0.6),
    "heads": inherit_heads,
    "rate-0.3": lambda: lower_rate(0.3),
}


def compare_members(paths):
    """Print a line a run: the zoo's accuracy, with weights that grow with the round, of the last learner alone, ..."""
    say("| run | mean | weights by round | last alone | a member | two differ |\n|---|---:|---:|---:|---:|---:|")
    for path in paths:
        zoo, found = modelzoo.Zoo.load(path, "cpu"), []
        for t, y in enumerate(zoo.test_labels):
            knowing = [(k + 1.0, one) for k, one in enumerate(zoo.learners) if t in one.tasks]
            if not knowing:
                raise ConfigError(f"{path}: no learner knows {zoo.names[t]} yet; finish the run with --resume first")
            weights, logits = zip(*((k, one.test_logits[one.tasks.index(t)]) for k, one in knowing), strict=True)
            right = [accuracy(x, y) for x in logits]
            differ = [(a.argmax(1) != b.argmax(1)).double().mean().item() for a, b in combinations(logits, 2)]
            means = zoo.predict_log_probs(t), modelzoo.ensemble_log_probs(logits, weights)
            found.append([*(accuracy(p, y) for p in means), right[-1], sum(right) / len(right),
                          sum(differ) / len(differ) if differ else None])
        known = [[x for x in column if x is not None] for column in zip(*found, strict=True)]
        columns = [f"{100 * average_accuracy([column]):.2f}" if column else "–" for column in known]
        say(f"| {Path(path).name} | {' | '.join(columns)} |")


def main(argv):
    """Do what the first word says; return the exit status."""
    word, rest = (argv or [""])[0], argv[1:]
    needed = {"--inherit", *["--save_nets"] * (word == "heads")}  # without which a way changes nothing
    if word in WAYS and needed <= {*rest}:
        WAYS[word]()
        return command("variants.py", "modelzoo", modelzoo.run, rest)

    def work():
        if word == "hold_out" and len(rest) == 2:
            hold_out(*rest)
        elif word == "members" and rest:
            compare_members(rest)
        elif word in WAYS:
            raise ConfigError(f"{word} needs {' and '.join(sorted(needed))}")
        else:
            raise ConfigError(f"give hold_out DATA NEW, members RUN ..., or one of {', '.join(WAYS)} and a zoo's flags")

    return guard("variants.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
