"""weights: and freeze: of a hyper-parameter file."""
import copy
import re
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision import models

import modelzoo
import multihead
from modelzoo import Zoo
from net.build_net import build_net, read_model
from tests.commands import numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from tools import export
from tools.runs import read_run
from utils.command import command, guard
from utils.config import read_settings
from utils.learner import learner_path, load_net
from utils.pretrained import load_weights
from utils.run import prepare
from utils.run_folder import load_tensors
from utils.run_net import normalise

SHUFFLE = "shufflenet_v2_x0_5"  # torchvision's smallest


@pytest.fixture
def pretrained(workspace):
    """A zoo's last network as data/mine.pt, and a hyper-parameter file that begins with it; returns the workspace."""
    start(workspace, "first", "--continual", "--save_nets")
    shutil.copy(learner_path(workspace / "runs/first", 2), workspace / "data/mine.pt")
    write_yaml(workspace / "hp.yaml", {**CONV, "weights": "mine.pt", "augment": True})
    return workspace


def state_of(workspace):
    return load_net(load_tensors(workspace / "data/mine.pt", "cpu")["net"], "cpu").backbone.state_dict()


@pytest.mark.parametrize("more, fresh", [((), [True, True, True]), (("--inherit",), [True, False, False])])
def test_backbones_begin_with_the_weights_and_inherit_from_there(pretrained, monkeypatch, more, fresh):
    starts, original = [], multihead.train_net

    def note(net, *rest, **settings):
        starts.append((copy.deepcopy(net.backbone.state_dict()), net.heads.weight.detach().clone()))
        return original(net, *rest, **settings)

    monkeypatch.setattr(multihead, "train_net", note)
    start(pretrained, "a", "--continual", *more)
    weights = state_of(pretrained)
    for k, ((backbone, heads), as_pretrained) in enumerate(zip(starts, fresh, strict=True)):
        same = all(x.equal(weights[key]) for key, x in backbone.items())
        assert same == as_pretrained
        settings = read_settings("x", "modelzoo", flags(pretrained, "--continual"))
        seed = multihead.derive_seed(0, k, "init")
        assert heads.equal(build_net(settings.model, (1, 24, 24), [2] * (k + 1), 0, seed).heads.weight)


def test_a_frozen_backbone_is_a_linear_layer_on_its_features(pretrained, monkeypatch):
    write_yaml(pretrained / "hp.yaml", {**CONV, "weights": "mine.pt", "freeze": True, "lr": 0.1, "epochs": 3})
    result = start(pretrained, "a", "--continual", "--save_nets", "--precision", "fp32")
    _, _, train, test = prepare(read_settings("x", "modelzoo", flags(pretrained, "--continual")))
    net = load_net(load_tensors(pretrained / "data/mine.pt", "cpu")["net"], "cpu")
    with torch.no_grad():
        of_train, of_test = (net.backbone(normalise(data.images)) for data in (train, test))
    # The first learner by hand: softmax regression with Nesterov's momentum on the features of its task.
    first = build_net("conv", (of_train.shape[1],), [2], 0, multihead.derive_seed(0, 0, "init"))
    weight, bias = (x.detach()[0].double() for x in (first.heads.weight, first.heads.bias))
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    shuffle = multihead.make_generator(0, 0, "shuffle")
    for _ in range(3):
        for i in torch.randperm(20, generator=shuffle).split(8):
            x, y = of_train[:20][i].double(), train.labels[:20][i]
            error = ((x @ weight.T + bias).softmax(1) - F.one_hot(y, 2)) / len(i)
            for v, p, gradient in zip(velocity, (weight, bias), (error.T @ x, error.sum(0)), strict=True):
                gradient = gradient + 1e-5 * p
                v.mul_(0.9).add_(gradient)
                p.sub_(0.1 * (gradient + 0.9 * v))
    expected = of_test[:10].double() @ weight.T + bias
    stored = load_tensors(learner_path(pretrained / "runs/a", 0), "cpu")
    torch.testing.assert_close(stored["test_logits"][0].double(), expected, rtol=1e-4, atol=1e-4)
    assert set(stored["net"]["state"]) == {"heads.weight", "heads.bias"}
    backbone = sum(p.numel() for p in net.backbone.parameters())
    assert result["parameters"] == backbone + (1 + 2 + 3) * 2 * (of_train.shape[1] + 1)
    # From images again: in this process and exported, with the backbone of the run folder.
    (pretrained / "data/mine.pt").unlink()
    zoo = Zoo.load(pretrained / "runs/a", "cpu")
    found = zoo.predict(test.images[test.rows(1)], 1)
    torch.testing.assert_close(found, zoo.predict_log_probs(1).exp(), rtol=1e-4, atol=1e-5)
    words = [str(pretrained / "runs/a"), "--file", str(pretrained / "zoo.pt2")]
    assert guard("export.py", lambda: export.main(words)) == 0
    module = torch.export.load(str(pretrained / "zoo.pt2")).module()
    torch.testing.assert_close(module(test.images[test.rows(1)])[zoo.names[1]].double(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, more", [
    ("modelzoo", ("--continual", "--inherit", "--save_nets", "--val_frac", "0.2")),
    ("multihead", ()),
])
def test_frozen_runs_resume_and_their_opening_line_says_so(pretrained, capsys, method, more):
    write_yaml(pretrained / "hp.yaml", {**CONV, "weights": "mine.pt", "freeze": True, "augment": True})
    whole = start(pretrained, "a", *more, method=method)
    out = " ".join(capsys.readouterr().out.split())
    assert "heads alone, on features of conv from mine.pt, images not augmented" in out
    assert whole["image_shape"] == [1, 24, 24] and read_run(pretrained / "runs/a").image_shape == (1, 24, 24)
    (pretrained / "runs/a/result.json").unlink()
    learner_path(pretrained / "runs/a", len(whole["rounds"]) - 1).unlink()
    assert numbers(start(pretrained, "a", *more, "--resume", method=method)) == numbers(whole)


@pytest.mark.parametrize("freeze", [True, False])
def test_other_weights_under_the_same_name_are_refused(pretrained, capsys, freeze):
    """Once a run went on with them, and a frozen one predicted with the old ones."""
    write_yaml(pretrained / "hp.yaml", {**CONV, "weights": "mine.pt", "freeze": freeze})
    whole = start(pretrained, "a", "--continual", "--num_rounds", "2")
    for name in ("learners/001.pt", "result.json"):
        (pretrained / "runs/a" / name).unlink()
    mine = (pretrained / "data/mine.pt").read_bytes()
    shutil.copy(learner_path(pretrained / "runs/first", 0), pretrained / "data/mine.pt")
    capsys.readouterr()
    for more, message in ((("--name", "a", "--resume", "--num_rounds", "2"), "was run with weights_data"),
                          (("--name", "b", "--extend", str(pretrained / "runs/a")), "began with other weights than")):
        assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(pretrained, "--continual", *more)) == 2
        assert message in capsys.readouterr().err
    (pretrained / "data/mine.pt").write_bytes(mine)
    if freeze:
        (pretrained / "runs/a/frozen.pt").write_bytes(b"half")  # which a resumed run writes again
    assert numbers(start(pretrained, "a", "--continual", "--num_rounds", "2", "--resume")) == numbers(whole)
    if freeze:
        load_tensors(pretrained / "runs/a/frozen.pt", "cpu")
    start(pretrained, "b", "--continual", "--extend", str(pretrained / "runs/a"))


def make_file(workspace, name=SHUFFLE, change=lambda state: state, **more):
    """Weights of a classifier of torchvision where the code looks for those of ImageNet; returns its network."""
    torch.manual_seed(0)
    net = models.get_model(name, weights=None, **more)
    path = workspace / "data/weights" / models.get_model_weights(name)["IMAGENET1K_V1"].url.rpartition("/")[2]
    path.parent.mkdir()
    torch.save(change(net.state_dict()), path)
    return net


@pytest.mark.parametrize("name, change", [
    (SHUFFLE, lambda state: {key: x for key, x in state.items() if "num_batches" not in key}),
    ("densenet121", lambda state: {re.sub(r"(layer\d+\.(?:norm|conv))([12])", r"\1.\2", key): x
                                   for key, x in state.items()}),
])
def test_files_of_older_torchvisions_are_read(workspace, name, change):
    """As torchvision itself reads them: without batch norm's counts, and by DenseNet's old names."""
    net = make_file(workspace, name, change)
    write_yaml(workspace / "hp.yaml", {**CONV, "model": name, "weights": "IMAGENET1K_V1"})
    found = load_weights(read_settings("x", "modelzoo", flags(workspace)), (1, 24, 24))
    assert len(found) > 100 and all(x.equal(net.state_dict()[key.removeprefix("net.")]) for key, x in found.items())


def test_mnasnet_goes_on_from_plain_state_dicts(workspace):
    """Its class asks for a version that they do not have: --inherit was a traceback, a saved net damaged."""
    write_yaml(workspace / "hp.yaml", {**CONV, "model": "mnasnet0_5", "epochs": 1})
    start(workspace, "a", "--continual", "--inherit", "--num_rounds", "2", "--samples", "4", "--save_nets")
    assert len(Zoo.load(workspace / "runs/a", "cpu").nets) == 2


@pytest.mark.parametrize("name, more", [
    (SHUFFLE, {}), ("googlenet", {"transform_input": True, "init_weights": False}),
])
def test_named_weights_take_images_as_they_want_them(workspace, name, more):
    """Resized to 224 pixels and normalised by ImageNet's mean and deviation, by torchvision's own transform.

    GoogLeNet's weights want another mean, which the network makes of that: torchvision sets the flag as it loads them.
    """
    theirs = make_file(workspace, name, **more).eval()
    theirs.fc = torch.nn.Identity()
    write_yaml(workspace / "hp.yaml", {**CONV, "model": name, "weights": "DEFAULT"})
    settings = read_settings("x", "modelzoo", flags(workspace))
    assert settings.model == f"{name}:IMAGENET1K_V1"
    net = build_net(settings.model, (1, 24, 24), [2], 0.0, seed=0).eval()
    net.backbone.load_state_dict(load_weights(settings, (1, 24, 24)))
    images = torch.from_numpy(make_arrays()["test_images"][:3]).permute(0, 3, 1, 2)
    resized = F.interpolate(images.expand(-1, 3, -1, -1) / 255, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((resized - mean) / std)
        torch.testing.assert_close(net.backbone(normalise(images)), expected, rtol=1e-3, atol=1e-4)


def test_a_run_on_frozen_named_weights(workspace):
    make_file(workspace)
    write_yaml(workspace / "hp.yaml", {**CONV, "model": SHUFFLE, "weights": "IMAGENET1K_V1", "freeze": True})
    result = start(workspace, "a", "--continual", "--num_rounds", "2")
    assert result["config"]["model"] == f"{SHUFFLE}:IMAGENET1K_V1" and result["config"]["augment"] is False


@pytest.mark.parametrize("keys, message", [
    ({"freeze": True}, "freeze: needs weights"),
    ({"weights": "IMAGENET1K_V1"}, "weights: 'conv:IMAGENET1K_V1' is not one of"),
    ({"model": "resnet18", "weights": "IMAGENET"}, "resnet18 has no weights 'IMAGENET' in torchvision"),
    ({"model": "resnet18", "weights": "IMAGENET1K_V1"}, "cannot be downloaded"),
    ({"weights": "none.pt"}, "none.pt: cannot be read (No such file or directory)"),
    ({"weights": "../none.pt"}, "leads out of"),
    ({"weights": "toy.pt"}, "toy.pt: not a file of weights alone"),
    ({"weights": "logits.pt"}, "logits.pt: holds no state dict; its network was not kept, which --save_nets does"),
    ({"model": "conv_81", "weights": "mine.pt"}, "mine.pt: weights of another network: layers.0.weight is [80"),
    ({"model": "wrn10_1", "weights": "mine.pt"}, "layers.0.weight is [80, 1, 3, 3] there, and [16, 1, 3, 3] in"),
])
def test_what_cannot_be_begun_with_is_one_line(pretrained, capsys, monkeypatch, keys, message):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    start(pretrained, "second", "--continual")
    shutil.copy(learner_path(pretrained / "runs/second", 0), pretrained / "data/logits.pt")
    np.save(pretrained / "data/toy.npy", np.zeros(3))
    (pretrained / "data/toy.npy").rename(pretrained / "data/toy.pt")
    write_yaml(pretrained / "hp.yaml", CONV | keys)
    capsys.readouterr()
    argv = flags(pretrained, "--name", "new", "--continual")
    assert command("modelzoo.py", "modelzoo", modelzoo.run, argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not (pretrained / "runs/new").exists()


def test_the_texts_that_name_a_network():
    assert read_model("resnet18:DEFAULT") == ("torchvision", "resnet18", "IMAGENET1K_V1")
    assert read_model("resnet18") == ("torchvision", "resnet18", "")
