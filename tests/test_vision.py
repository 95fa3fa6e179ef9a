"""torchvision's classifiers as networks: heads replaced, dropout by the run's generator, what cannot work refused."""
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import modelzoo
import multihead
from modelzoo import Zoo
from net.build_net import build_net, set_dropout_generator
from net.vision import BatchNorm2d, StochasticDepth, VisionNet
from net.wideresnet import Dropout
from tests.commands import checkpoint_every_epoch, numbers, start
from tests.conftest import CONV, flags, make_arrays, write_yaml
from tools import export
from utils.command import command, guard
from utils.run_net import forward, make_generator


def test_a_residual_network_has_the_small_stem_on_small_images_alone():
    def count(size):
        return sum(p.numel() for p in VisionNet("resnet18", None, 3, size, size, 0.0).parameters())

    # torchvision's 11,689,512 without its head of 1,000 classes; a first layer of 3 x 3 in place of 7 x 7.
    assert count(65) == 11_689_512 - 513_000
    assert count(64) == 11_689_512 - 513_000 - 64 * 3 * 49 + 64 * 3 * 9
    small = VisionNet("resnet18", None, 3, 32, 32, 0.0).net
    assert small.layer1(small.maxpool(small.conv1(torch.zeros(1, 3, 32, 32)))).shape[2:] == (32, 32)


def test_the_rest_is_torchvisions_network():
    mine = VisionNet("mobilenet_v3_small", None, 3, 64, 64, 0.2).eval()
    theirs = models.mobilenet_v3_small().eval()
    theirs.classifier[3] = nn.Identity()
    theirs.load_state_dict({key.removeprefix("net."): x for key, x in mine.state_dict().items()})
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert mine(x).equal(theirs(x)) and mine.features == 1024
    grey = VisionNet("mobilenet_v3_small", None, 1, 64, 64, 0.2).eval()
    grey.load_state_dict(mine.state_dict())
    assert grey(x[:, :1]).equal(theirs(x[:, :1].repeat(1, 3, 1, 1)))


def test_dropout_and_stochastic_depth_draw_from_the_generator_alone():
    net = build_net("efficientnet_b0", (3, 32, 32), [2], 0.4, seed=0)
    drops = [m for m in net.modules() if isinstance(m, Dropout)]
    depths = [m for m in drops if isinstance(m, StochasticDepth)]
    assert {m.p for m in drops if m not in depths} == {0.4}
    assert max(m.p for m in depths) == pytest.approx(0.1875)  # 0.2 * 15 / 16: torchvision's, of the last of 16 blocks
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for state in (1, 2):
        torch.manual_seed(state)  # which must not matter
        set_dropout_generator(net, make_generator(0, 0, "dropout"))
        found.append(forward(net.train(), images, torch.zeros(4, dtype=torch.int64), "fp32"))
    assert found[0].equal(found[1])
    layer = StochasticDepth(0.25)
    layer.generator = make_generator(0, 0, "dropout")
    out = layer(torch.ones(10_000, 2, 3))
    kept = out[:, 0, 0] > 0
    assert out[kept].unique().tolist() == [pytest.approx(1 / 0.75)] and out[~kept].eq(0).all()
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)  # 4.6 standard deviations


def test_batch_norm_of_a_single_value_per_channel_is_that_of_evaluation():
    mine, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    for norm in (mine, theirs):
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.running_var.fill_(4.0)
    one = torch.tensor([3.0, 2.0, 1.0])[None, :, None, None]
    torch.testing.assert_close(mine(one).flatten(), torch.tensor([1.0, 0.0, -1.0]), rtol=1e-5, atol=1e-5)
    assert mine.running_mean.tolist() == [1, 2, 3]
    two = torch.randn(2, 3, 1, 1)
    assert mine(two).equal(theirs(two)) and mine.running_mean.equal(theirs.running_mean)


@pytest.mark.parametrize("model, shape, message", [
    ("vit_b_16", (1, 28, 28), "model vit_b_16 cannot take images of 28 x 28 pixels (Input shape indivisible"),
    ("vit_b_16", (3, 32, 48), "cannot take images of 32 x 48 pixels (they must be square)"),
    ("alexnet", (3, 28, 28), "model alexnet cannot take images of 28 x 28 pixels"),
    ("squeezenet1_0", (3, 64, 64), "model squeezenet1_0 has no linear head to replace"),
    ("resnet18", (4, 32, 32), "model resnet18 needs images of 1 or 3 channels, not 4"),
])
def test_what_cannot_work_says_so(model, shape, message):
    with pytest.raises(ValueError) as e:
        build_net(model, shape, [2], 0.0, seed=0)
    assert str(e.value).startswith(message) or message in str(e.value)
    assert "\n" not in str(e.value)


def test_it_is_one_line_before_training_and_a_misspelt_name_has_a_suggestion(workspace, capsys):
    for model, message in (("alexnet", "model alexnet cannot take images of 24 x 24 pixels"),
                           ("resnet19", "did you mean resnet1")):
        write_yaml(workspace / "hp.yaml", {**CONV, "model": model})
        assert command("modelzoo.py", "modelzoo", modelzoo.run, flags(workspace, "--continual")) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err and not (workspace / "runs").exists()


@pytest.fixture
def vision(workspace, monkeypatch):
    """Three tasks for mobilenet_v3_small, whose last batches are of a single row and whose last maps of one pixel."""
    np.savez(workspace / "data/toy.npz", **make_arrays(train=4, size=32, channels=3))
    hyper = {"model": "mobilenet_v3_small", "batch": 7, "dropout": 0.3, "augment": True}
    write_yaml(workspace / "hp.yaml", {**CONV, **hyper})
    for name in ("CHECKPOINT_SECONDS", "time"):
        monkeypatch.setattr(multihead, name, getattr(multihead, name))
    return workspace


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own
def test_a_run_resumes_exactly_predicts_and_is_exported(vision, monkeypatch):
    """8 rows a task in batches of 7: the first learner ends each epoch with one row."""
    checkpoint_every_epoch()
    copies, save = [], multihead.save_checkpoint
    more = ("--continual", "--inherit", "--save_nets", "--num_rounds", "2", "--precision", "fp32")

    def copy(path, *rest):
        save(path, *rest)
        copies.append(f"copy{len(copies)}")
        shutil.copytree(vision / "runs/a", vision / "runs" / copies[-1])

    with monkeypatch.context() as m:
        m.setattr(multihead, "save_checkpoint", copy)
        whole = start(vision, "a", *more)
    assert len(copies) == 2
    assert numbers(start(vision, copies[1], *more, "--resume")) == numbers(whole)
    zoo, arrays = Zoo.load(vision / "runs/a", "cpu"), make_arrays(train=4, size=32, channels=3)
    rows = np.concatenate([np.flatnonzero(arrays["test_labels"] == label) for label in (0, 1)])
    stored = zoo.predict_log_probs(0).exp()
    torch.testing.assert_close(zoo.predict(arrays["test_images"][rows], 0), stored, rtol=1e-4, atol=1e-5)
    words = [str(vision / "runs/a"), "--file", str(vision / "zoo.pt2")]
    assert guard("export.py", lambda: export.main(words)) == 0
    exported = torch.export.load(str(vision / "zoo.pt2")).module()
    images = torch.from_numpy(arrays["test_images"][rows]).permute(0, 3, 1, 2)
    torch.testing.assert_close(exported(images)[zoo.names[0]].double(), stored, rtol=1e-4, atol=1e-5)
