"""Augmentation against a loop over images; training against a plain loop in float64."""
import contextlib
import copy
import math

import pytest
import torch

from multihead import balance
from net.build_net import build_net, set_dropout_generator
from utils import device as device_file
from utils import run_net
from utils.config_files import ConfigError
from utils.device import choose_device, choose_precision
from utils.run_net import (
    PAD,
    Optimiser,
    learning_rate,
    normalise,
    predict_logits,
    row_losses,
    sample_crops,
    train_net,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_against_a_loop_over_images(flip):
    images = torch.randint(1, 256, (50, 3, 9, 11), dtype=torch.uint8, generator=generator(3))
    out = sample_crops(images, flip, generator(7))
    # The same draws, used one image at a time.
    g = generator(7)
    shift = torch.randint(0, 2 * PAD + 1, (2, 50, 1), generator=g)
    mirrored = torch.randint(0, 2, (50, 1), generator=g) if flip else torch.zeros(50, 1)
    for b in range(50):
        padded = torch.zeros(3, 9 + 2 * PAD, 11 + 2 * PAD, dtype=torch.uint8)
        padded[:, PAD : PAD + 9, PAD : PAD + 11] = images[b]
        y, x = shift[:, b, 0].tolist()
        crop = padded[:, y : y + 9, x : x + 11]
        assert out[b].equal(crop.flip(2) if mirrored[b] else crop)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_crops_cover_every_offset_and_half_are_mirrored():
    ramp = torch.arange(1, 101, dtype=torch.uint8).view(1, 1, 10, 10).expand(4000, 1, 10, 10)
    centre = sample_crops(ramp, True, generator())[:, 0, 4:6, 4:6].flatten(1)
    mirrored = (centre[:, 0] > centre[:, 1]).double().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.032)  # 4 standard deviations
    assert len(centre.unique(dim=0)) == 2 * (2 * PAD + 1) ** 2


def test_normalise_has_mean_half_and_deviation_a_quarter():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert normalise(x).tolist() == pytest.approx([(v / 255 - 0.5) / 0.25 for v in (0, 51, 255)])


def test_learning_rate_is_annealed_to_zero_over_all_steps():
    rates = [learning_rate("cosine", 0.4, step, 4) for step in range(4)]
    assert rates == pytest.approx([0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5))])
    assert learning_rate("cosine", 0.4, 4, 4) == 0
    assert learning_rate("constant", 0.4, 3, 4) == 0.4


def test_learning_rate_rises_and_ends_where_it_is_asked_to():
    rates = [learning_rate("cosine", 0.4, step, 6, warmup_steps=2, lr_min=0.1) for step in range(7)]
    middle = 0.1 + 0.15 * (1 + math.sqrt(0.5))
    assert rates == pytest.approx([0.2, 0.4, 0.4, middle, 0.25, 0.1 + 0.15 * (1 - math.sqrt(0.5)), 0.1])
    assert [learning_rate("constant", 0.4, step, 6, warmup_steps=2) for step in (0, 1, 5)] == [0.2, 0.4, 0.4]


def test_smoothed_labels_share_a_tasks_own_classes_alone():
    """A row of two of three classes, with probabilities 0.8 and 0.2, smoothed by 0.3."""
    logits = torch.tensor([[math.log(0.8), math.log(0.2), -math.inf]], requires_grad=True)
    loss = row_losses(logits, torch.tensor([0]), 0.3)
    assert loss.tolist() == pytest.approx([-0.7 * math.log(0.8) - 0.15 * (math.log(0.8) + math.log(0.2))])
    loss.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.8 - 0.85, 0.2 - 0.15, 0.0])


def make_training(seed=0):
    g = generator(seed)
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=g)
    rows = torch.arange(0, 40, 2)
    heads = torch.arange(20) % 2
    labels = torch.randint(0, 3, (20,), generator=g)
    labels[heads == 1] %= 2
    return images, rows, heads, labels


TRAINING = {"epochs": 2, "batch": 8, "lr": 0.05, "l2_reg": 0.01, "schedule": "cosine", "augment": False,
            "flip": False, "precision": "fp32"}


def train(net, seed=0, **changes):
    arguments = {**TRAINING, **changes}
    generators = {"shuffle": generator(seed), "augment": generator(seed)}
    return [values for values, _ in train_net(net, *make_training(), **arguments, generators=generators)]


@pytest.mark.parametrize("recipe", [
    {},
    {"momentum": 0.5, "warmup": 2 / 3, "lr_min": 0.01, "clip_norm": 0.2, "label_smoothing": 0.3, "weights": "balanced"},
    {"momentum": 0.0, "schedule": "constant"},
    {"optimiser": "adamw", "lr": 0.0005, "clip_norm": 0.1},
    {"optimiser": "adamw", "lr": 0.003, "lr_min": 0.001, "warmup": 1.0, "label_smoothing": 0.1},
], ids=lambda recipe: " ".join(recipe))
def test_training_equals_a_plain_loop_in_float64(recipe):
    """Two epochs of batches 8, 8 and 4, heads of 3 and 2 classes; every update written out."""
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
    plain = copy.deepcopy(net).double().train()
    images, rows, heads, labels = make_training()
    counts = [[int(((heads == head) & (labels == c)).sum()) for c in range(3)] for head in range(2)]
    weights = [1.0] * 20
    if "weights" in recipe:
        weights = [10 / ([3, 2][h] * counts[h][c]) for h, c in zip(heads.tolist(), labels.tolist(), strict=True)]
        assert balance(heads, labels).tolist() == pytest.approx(weights) and sum(weights) == pytest.approx(20)
    given = {**recipe, "weights": torch.tensor(weights)} if "weights" in recipe else recipe
    found = train(net, **given)

    lr, low = recipe.get("lr", 0.05), recipe.get("lr_min", 0)
    rising = {2 / 3: 2, 1.0: 3, 0: 0}[recipe.get("warmup", 0)]
    momentum, norm = recipe.get("momentum", 0.9), recipe.get("clip_norm", 0)
    smoothing = recipe.get("label_smoothing", 0)
    # AdamW makes steps of full size of gradients that are nothing but rounding, such as those of a bias before a norm.
    adamw = "optimiser" in recipe
    without_effect = {"backbone.layers.3.bias", "backbone.layers.7.bias"} if adamw else set()
    shuffle, velocity, square, step, steps = generator(), {}, {}, 0, 6
    for epoch in range(2):
        total, hits = 0.0, 0
        for i in torch.randperm(20, generator=shuffle).split(8):
            rate = low + (lr - low) * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
            rate = lr if "schedule" in recipe else lr * (step + 1) / rising if step < rising else rate
            features = plain.backbone((images[rows[i]].double() / 255 - 0.5) / 0.25)
            loss = 0.0
            for b, j in enumerate(i):
                classes = [3, 2][heads[j]]
                weight, bias = plain.heads.weight[heads[j], :classes], plain.heads.bias[heads[j], :classes]
                log_probs = (weight @ features[b] + bias).log_softmax(0)
                likelihood = (1 - smoothing) * log_probs[labels[j]] + smoothing * log_probs.mean()
                loss = loss - weights[j] * likelihood / len(i)
                hits += int(log_probs.argmax() == labels[j])
            plain.zero_grad()
            loss.backward()
            length = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
            assert not norm or length > norm  # else this test would not see the clipping
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    gradient = p.grad * (norm / length if norm else 1)
                    if adamw:
                        velocity[name] = 0.9 * velocity.get(name, 0) + 0.1 * gradient
                        square[name] = 0.999 * square.get(name, 0) + 0.001 * gradient**2
                        p *= 1 - rate * 0.01
                        root = (square[name] / (1 - 0.999 ** (step + 1))).sqrt()
                        p -= rate * velocity[name] / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
                        continue
                    gradient = gradient + 0.01 * p
                    velocity[name] = momentum * velocity[name] + gradient if name in velocity else gradient
                    p -= rate * (gradient + momentum * velocity[name])
            total += loss.item() * len(i)
            step += 1
        assert found[epoch]["train_loss"] == pytest.approx(total / 20, rel=1e-4 if adamw else 1e-5)
        assert found[epoch]["train_accuracy"] == hits / 20
        assert found[epoch]["lr"] == pytest.approx(rate)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        if not adamw:
            torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5, msg=name)
        elif name not in without_effect:
            assert (p.double() - q).abs().mean() < 1e-5, name


def test_weight_decay_reaches_every_parameter_and_gradients_only_the_rows_own_head():
    images, rows, _, labels = make_training()
    net = build_net("conv", (1, 28, 28), [3, 3], 0.0, seed=1)
    before = net.heads.weight.detach().clone()
    arguments = {**TRAINING, "epochs": 1, "batch": 20, "generators": {"shuffle": generator()}}
    list(train_net(net, images, rows, torch.zeros(20, dtype=torch.long), labels, **arguments))
    # One step at the full rate: a head without rows moves by its decay alone, times 1 + momentum (Nesterov).
    torch.testing.assert_close(net.heads.weight[1], before[1] * (1 - 0.05 * 0.01 * 1.9))
    assert (net.heads.weight[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"augment": True, "flip": True}, {"precision": "bf16"}, {"schedule": "constant"}])
def test_same_seed_same_net_and_another_seed_another(changes):
    nets = []
    for seed in (0, 0, 1):
        net = build_net("wrn10_1", (1, 28, 28), [3, 2], 0.3, seed=1)
        set_dropout_generator(net, generator(seed))
        state = torch.get_rng_state()
        train(net, seed, epochs=1, batch=20, **changes)
        assert torch.equal(state, torch.get_rng_state())
        nets.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert nets[0].equal(nets[1]) and not nets[0].equal(nets[2])


@pytest.mark.parametrize("asked, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_an_index_and_is_tried(monkeypatch, asked, index):
    tried = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_file, "_try_gpu", tried.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert choose_device(asked) == torch.device("cuda", index) and tried == [torch.device("cuda", index)]
    assert torch.backends.cudnn.deterministic


def test_no_gpu_is_there_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices, because CUDA_VISIBLE_DEVICES is ''; cpu always"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("capability, kernels, trouble, message", [
    ((7, 0), ["sm_75", "sm_120", "compute_120"], None, "has compute capability 7.0, and this torch .* from 7.5 on"),
    ((7, 5), ["sm_75", "sm_120"], None, None),
    ((12, 0), ["sm_90a"], None, None),
    ((9, 0), ["sm_75"], RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore"),
     "cuda:0 cannot be used .CUDA error: all CUDA-capable devices are busy or unavailable more.; see who uses it"),
    ((9, 0), ["sm_75"], torch.OutOfMemoryError("CUDA out of memory. Tried to"), "cannot be used .its memory is full."),
    ((9, 0), ["sm_75"], RuntimeError("no kernel image is available"), "cannot be used .no kernel image is available."),
])
def test_a_gpu_that_cannot_compute_is_one_line(monkeypatch, capability, kernels, trouble, message):
    def ones(*_, **__):
        if trouble:
            raise trouble
        return torch.zeros(2)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        device_file._try_gpu(torch.device("cuda", 0))


def test_prediction_takes_fewer_rows_where_memory_runs_out(monkeypatch):
    """Of 20 rows at most 6 fit: 20 are tried, then 10, then 5; with none that fit, the error is told."""
    net, images, tried = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1), make_training()[0], []
    expected = predict_logits(net, images, torch.arange(20), 1, 2, "fp32")
    original, most = run_net.forward, 6

    def forward(net, images, *rest):
        tried.append(len(images))
        if len(images) > most:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return original(net, images, *rest)

    monkeypatch.setattr(run_net, "forward", forward)
    torch.testing.assert_close(predict_logits(net, images, torch.arange(20), 1, 2, "fp32"), expected)
    assert tried == [20, 10, 5, 5, 5, 5]
    most = 0
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        predict_logits(net, images, torch.arange(20), 1, 2, "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA starts here")
def test_a_gpu_on_which_cuda_does_not_start(monkeypatch):
    """The driver's library counts the GPUs of a driver that is too old for torch."""
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    for asked in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=f"--device: {asked} finds a GPU, but CUDA does not start"):
            choose_device(asked)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device, has, chosen", [
    ("cuda", {"native": True}, "bf16"),
    ("cuda", {"native": False}, "fp32"),
    ("cpu", {"avx512_f": True, "avx512_bf16": True}, "bf16"),
    ("cpu", {"avx512_f": True, "avx512_bf16": False}, "fp32"),
    ("cpu", {"architecture": "aarch64"}, "fp32"),
])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, device, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has.get("native") or
                        including_emulation)
    assert choose_precision("auto", torch.device(device)) == chosen
    assert choose_precision("fp32", torch.device(device)) == "fp32"
    assert choose_precision("bf16", torch.device(device)) == "bf16"


def test_crops_are_used_in_training_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(run_net, "sample_crops", lambda x, flip, generator: seen.append((len(x), flip)) or x)
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
    train(net, augment=True, flip=True)
    assert seen == [(8, True), (8, True), (4, True)] * 3  # two epochs, and batch norm's statistics
    predict_logits(net, make_training()[0], torch.arange(4), 1, 2, "fp32")
    train(net, augment=False, flip=True)
    assert len(seen) == 9


def test_bf16_touches_neither_loss_nor_parameters():
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
    values = train(net, precision="bf16")
    exact = train(build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert values[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=0.02)
    a, b = (predict_logits(net, make_training()[0], torch.arange(4), 1, 2, p) for p in ("bf16", "fp32"))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert not a.equal(b)  # the backbone did run in bfloat16


def test_prediction_goes_through_the_head_asked_for_and_in_the_order_asked_for():
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1).eval()
    images = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8, generator=generator())
    rows = torch.randperm(300, generator=generator())
    features = net.backbone(normalise(images[rows]))
    expected = features @ net.heads.weight[1, :2].T + net.heads.bias[1, :2]
    torch.testing.assert_close(predict_logits(net, images, rows, 1, 2, "fp32"), expected, rtol=1e-4, atol=1e-5)


def test_the_update_is_torchs_own_sgd():
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
    twin = copy.deepcopy(net)
    rate = torch.zeros(())
    ours = Optimiser(net.parameters(), "sgd", rate, weight_decay=0.01)
    theirs = torch.optim.SGD(twin.parameters(), 1.0, momentum=0.9, weight_decay=0.01, nesterov=True)
    for step in range(3):
        rate.fill_(0.1 / (1 + step))
        theirs.param_groups[0]["lr"] = rate.item()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator(step))
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert p.grad is None


def test_the_loss_scaler_unscales_and_skips_infinite_gradients():
    p = torch.tensor([2.0], requires_grad=True)
    optimiser = Optimiser([p], "sgd", torch.tensor(0.1), weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((3 * p).sum()).backward()
    assert p.grad.item() == 24
    scaler.step(optimiser)
    scaler.update()
    assert p.item() == pytest.approx(2 - 0.1 * 3 * 1.9)  # Nesterov's first step: gradient times 1 + momentum
    before = p.item()
    scaler.scale((torch.inf * p).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    assert (p.item(), scaler.get_scale()) == (before, 4.0)


def test_training_computes_in_the_precision_asked_for():
    losses = [train(build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1), precision=p)[0]["train_loss"]
              for p in ("bf16", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_prediction_keeps_no_graph():
    net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
    assert not predict_logits(net, make_training()[0], torch.arange(4), 1, 2, "fp32").requires_grad


def test_the_loss_scale_goes_on_where_it_stood():
    def learn(start=None):
        net = build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1)
        arguments = {**TRAINING, "precision": "fp16", "generators": {"shuffle": generator()}}
        _, snapshot = next(train_net(net, *make_training(), **arguments, start=start))
        return snapshot()

    start = learn()
    start["scaler"]["scale"] = 8.0
    assert learn(start)["scaler"]["scale"] == 8.0


def norms(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_renewed_statistics_are_means_over_all_rows_by_hand():
    """Two batches of 2 rows and 1 row of one channel and 2 pixels, through a network that is nothing but the norm."""
    net = torch.nn.Module()
    net.backbone = torch.nn.BatchNorm2d(1)
    pixels = [[[0, 255], [51, 102]], [[153, 204]]]
    net.backbone.running_mean.fill_(math.nan)  # whatever training left
    run_net.renew_batch_norm(net, [torch.tensor(p, dtype=torch.uint8).view(-1, 1, 1, 2) for p in pixels], "fp32")
    # Normalised to (x / 255 - 0.5) / 0.25: -2, 2, -1.2, -0.4 with mean -0.4 and variance (2.56 + 5.76 + 0.64 + 0) / 3,
    # and 0.4, 1.2 with mean 0.8 and variance 0.32; weighted 2 : 1 by rows.
    assert net.backbone.running_mean.item() == pytest.approx((2 * -0.4 + 0.8) / 3, abs=1e-6)
    assert net.backbone.running_var.item() == pytest.approx((2 * 8.96 / 3 + 0.32) / 3, rel=1e-6)
    assert net.backbone.momentum == 0.1


def test_renewed_statistics_are_of_the_learners_rows_and_leave_the_weights(monkeypatch):
    """All of its 20 rows in one batch: then they are those of a plain pass over the rows; no weight is touched."""
    images, rows, _, _ = make_training()
    nets = [build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1) for _ in range(2)]
    train(nets[0], batch=20)
    monkeypatch.setattr(run_net, "NORM_BATCHES", 0)
    train(nets[1], batch=20)
    assert all(a.equal(b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
    layers = nets[0].backbone.layers
    x = layers[:4](normalise(images[rows]))  # what the first norm is given
    assert layers[4].running_mean.allclose(x.mean((0, 2, 3)), atol=1e-5)
    assert layers[4].running_var.allclose(x.transpose(0, 1).flatten(1).var(1), rtol=1e-4)


def test_renewing_takes_so_many_batches_at_most_drawn_and_augmented_as_in_training(monkeypatch):
    assert run_net.NORM_BATCHES == 100
    seen, cropped = [], []
    crops = run_net.sample_crops
    backbone = run_net.run_backbone
    monkeypatch.setattr(run_net, "NORM_BATCHES", 3)
    monkeypatch.setattr(run_net, "run_backbone",
                        lambda net, x, p: seen.append((x, net.training)) or backbone(net, x, p))
    monkeypatch.setattr(run_net, "sample_crops", lambda x, *more: cropped.append(len(x)) or crops(x, *more))
    train(build_net("conv", (1, 28, 28), [3, 2], 0.0, seed=1), epochs=2, batch=4, augment=True)
    assert len(seen) == len(cropped) == 2 * 5 + 3  # 20 rows are five batches of 4; of the sixth pass three are used
    assert all(training for _, training in seen)
    assert not seen[-1][0].equal(seen[4][0])


def test_a_network_without_batch_norm_needs_no_renewing():
    net = torch.nn.Module()
    net.backbone = torch.nn.Flatten()
    run_net.renew_batch_norm(net, iter(lambda: 1 / 0, None), "fp32")
