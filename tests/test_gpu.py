"""On a GPU, by `make test-gpu`: what no other machine can show. Ends with lines to paste into an issue."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import multihead
from modelzoo import Zoo
from net.build_net import build_net, set_dropout_generator
from tests.commands import MAIN, numbers, start
from tests.conftest import CONV, flags, write_yaml
from utils import capture, run_net
from utils.command import command
from utils.device import choose_device, describe_hardware
from utils.run_folder import commit, versions
from utils.run_net import predict_logits, train_net

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # a driver warns of much
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def gpu():
    device = choose_device("cuda")
    yield device
    print(f"\n{describe_hardware(device)}, capability {torch.cuda.get_device_capability(device)}, {versions()}, CUDA "
          f"{torch.version.cuda}, commit {commit()}")


def learn(device, model, precision, capture="auto", epochs=2, net=None, host=False):
    """Two epochs of 11 full steps and a short one; returns losses and weights."""
    net = net or build_net(model, (3, 32, 32), [3, 2], 0.2, seed=1).to(device)
    images = torch.randint(0, 256, (190, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, rows = images if host else images.to(device), torch.arange(190, device=device)
    generators = {key: torch.Generator(device).manual_seed(3) for key in ("shuffle", "augment", "dropout")}
    set_dropout_generator(net, generators["dropout"])
    epochs = train_net(net, images, rows, rows % 2, rows % 2, epochs=epochs, batch=16, lr=1e-3, l2_reg=1e-4,
                       schedule="cosine", augment=True, flip=True, precision=precision, capture=capture,
                       generators=generators)
    return [values["train_loss"] for values, _ in epochs], [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["conv", "wrn16_4", "resnet18"])
def test_captured_equals_plain(gpu, capsys, model, precision):
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("no bfloat16")
    (losses, net), (plain, twin) = (learn(gpu, model, precision, how) for how in ("auto", "off"))
    assert capsys.readouterr().err == ""  # it was captured, and its first replays were those of the plain step
    assert losses == plain and all(p.equal(q) for p, q in zip(net, twin, strict=True))


@pytest.mark.parametrize("how", ["auto", "off"])
def test_images_that_stay_on_the_host_change_nothing(gpu, capsys, how):
    (losses, net), (as_before, twin) = learn(gpu, "conv", "fp32", how, host=True), learn(gpu, "conv", "fp32", how)
    assert capsys.readouterr().err == ""
    assert losses == as_before and all(p.equal(q) for p, q in zip(net, twin, strict=True))


def test_a_planted_wait_falls_back_to_plain_steps(gpu, capsys, monkeypatch):
    original = run_net.sample_crops

    def wait(images, flip, generator):
        assert images.float().sum().item() >= 0
        return original(images, flip, generator)

    capture._note.cache_clear()
    plain = learn(gpu, "conv", "fp32", "off")
    monkeypatch.setattr(run_net, "sample_crops", wait)
    found = learn(gpu, "conv", "fp32")
    assert "note: steps are not captured in a CUDA graph" in capsys.readouterr().err
    assert found[0] == plain[0] and all(p.equal(q) for p, q in zip(found[1], plain[1], strict=True))
    assert learn(gpu, "conv", "fp32", "off")[0] == plain[0]  # torch goes on as before


def test_memory_is_flat_over_learners(gpu):
    reserved = []
    for _ in range(6):
        learn(gpu, "conv", "fp32", epochs=1)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(gpu))
    assert max(reserved[1:]) <= reserved[0] + (4 << 20)


def test_a_run_resumes_to_the_same_bits_and_is_loaded_on_a_cpu(workspace, monkeypatch):
    write_yaml(workspace / "hp.yaml", {**CONV, "epochs": 3, "augment": True})
    more = ("--continual", "--inherit", "--save_nets", "--device", "cuda")
    whole = start(workspace, "a", *more)
    original, saved = multihead.save_checkpoint, []

    def stop(path, *rest):
        original(path, *rest)
        saved.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(multihead, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(multihead, "save_checkpoint", stop)
        start(workspace, "b", *more)
    assert len(saved) == 1 and numbers(start(workspace, "b", *more, "--resume")) == numbers(whole)
    one, other = (Zoo.load(workspace / "runs/a", device) for device in ("cuda", "cpu"))
    images = torch.randint(0, 256, (9, 1, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(one.predict(images, 0), other.predict(images, 0), rtol=0, atol=0.02)


def test_memory_that_runs_out_is_one_line_and_prediction_goes_on_with_fewer_rows(gpu, workspace, capsys):
    net = build_net("wrn16_4", (3, 32, 32), [2], 0.0, seed=0).to(gpu)
    images = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8, device=gpu)
    rows = torch.arange(1000, device=gpu)
    whole = predict_logits(net, images, rows, 0, 2, "fp32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(gpu) + (300 << 20)) / total, gpu)
        torch.testing.assert_close(predict_logits(net, images, rows, 0, 2, "fp32"), whole, rtol=1e-3, atol=1e-3)
        write_yaml(workspace / "hp.yaml", {**CONV, "model": "wrn28_10", "batch": 60})
        words = flags(workspace, "--name", "a", "--device", "cuda")
        assert command("x", "multihead", MAIN["multihead"], words) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "too little memory" in err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def test_speed(tmp_path):
    """No bound, but what a card gives: bf16 beside fp32, captured, at batch 16 and 128."""
    for precision in ("bf16", "fp32"):
        words = ["tools/bench.py", "--device", "cuda", "--precision", precision, "--seconds", "3", "--json",
                 str(tmp_path / "a.json")]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        rows = json.loads((tmp_path / "a.json").read_text())["training"]
        assert len(rows) == 4 and all(row["rows_per_s"] > 0 for row in rows)
