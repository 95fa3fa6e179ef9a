"""Networks: sizes, shapes, and heads that equal separate linear layers."""
import pytest
import torch
from torch import nn

from net.build_net import Heads, build_net

CLASSES = [3, 5, 2]


def test_parameter_counts():
    def count(model):
        return sum(p.numel() for p in build_net(model, (3, 32, 32), [5], 0.0, seed=0).backbone.parameters())

    # First convolution without bias; the two others with bias and batch norm.
    assert count("conv") == 3 * 9 * 80 + 2 * (80 * 9 * 80 + 80 + 2 * 80) == 117_840
    assert count("wrn16_4") == 2_746_320
    assert count("wrn28_10") == 36_472_784
    assert count("conv_8") == 3 * 9 * 8 + 2 * (8 * 9 * 8 + 8 + 2 * 8)
    # Norm, convolution, norm, convolution of each block, and a shortcut where the width changes; a norm at the end.
    blocks = [2 * a + 9 * a * b + 2 * b + 9 * b * b + a * b * (a != b) for a, b in ((16, 16), (16, 32), (32, 64))]
    assert count("wrn10_1") == 3 * 9 * 16 + sum(blocks) + 2 * 64


def test_wide_resnet_layers():
    """WRN-16-4 has 12 3x3 convolutions in blocks and one before them; shortcuts only where the width changes."""
    backbone = build_net("wrn16_4", (3, 32, 32), [5], 0.2, seed=0).backbone
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convolutions].count((3, 3)) == 13
    assert [(m.in_channels, m.out_channels) for m in convolutions if m.kernel_size == (1, 1)] == [
        (16, 64), (64, 128), (128, 256)]
    # Kaiming, fan-out: variance 2 / (9 * out), here of 64 -> 128 channels.
    wider = backbone.layers[3].conv1.weight
    assert wider.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)
    x, sizes = torch.zeros(1, 3, 32, 32), []
    for layer in backbone.eval().layers:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 32, 32)] + [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2


def test_wide_resnet_ends_in_norm_relu_and_mean():
    backbone = build_net("wrn16_4", (3, 32, 32), [5], 0.0, seed=0).eval().backbone
    x = torch.randn(2, 3, 32, 32)
    y = backbone.layers(x) / (1 + 1e-5) ** 0.5  # batch norm at its initial running statistics
    torch.testing.assert_close(backbone(x), y.clamp(min=0).flatten(2).mean(2))


def test_input_itself_is_added_where_the_width_stays():
    block = build_net("wrn16_4", (3, 32, 32), [5], 0.0, seed=0).eval().backbone.layers[2]
    x, s = torch.randn(2, 64, 8, 8), (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), x + block.conv2((block.conv1((x / s).relu()) / s).relu()))


def test_shortcut_takes_the_activated_input_where_the_width_changes():
    block = build_net("wrn16_4", (3, 32, 32), [5], 0.0, seed=0).eval().backbone.layers[1]
    x = torch.randn(2, 16, 8, 8)
    active = (x / (1 + 1e-5) ** 0.5).relu()  # batch norm at its initial running statistics
    inner = block.conv1(active)
    expected = block.conv2((inner / (1 + 1e-5) ** 0.5).relu()) + block.shortcut(active)
    torch.testing.assert_close(block(x), expected)


def test_dropout_comes_after_relu_and_leaves_the_second_norm_alone():
    """Zagoruyko & Komodakis 2016, section 2.4: what batch norm sees in training is what it sees in evaluation."""
    block = build_net("wrn16_4", (3, 32, 32), [5], 0.5, seed=0).train().backbone.layers[1]
    block.dropout.generator, seen = torch.Generator().manual_seed(0), {}
    for name in ("norm2", "conv2"):
        getattr(block, name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    block(x)
    torch.testing.assert_close(seen["norm2"], block.conv1(block.norm1(x).relu()))
    active = block.norm2(seen["norm2"]).relu()
    kept = seen["conv2"] != 0
    torch.testing.assert_close(seen["conv2"], 2 * active * kept)
    assert kept.sum() / (active > 0).sum() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("model, size, features", [
    ("conv", 28, 80), ("conv", 32, 320), ("conv", 84, 320), ("wrn16_4", 28, 256), ("wrn16_4", 84, 256),
])
def test_feature_sizes(model, size, features):
    net = build_net(model, (1, size, size), [2], 0.0, seed=0).eval()
    assert net.backbone(torch.zeros(2, 1, size, size)).shape == (2, features)


def test_conv_equals_relu_before_pooling():
    """The order in which the layers are defined: [batch norm,] ReLU, pooling."""
    net = build_net("conv", (3, 32, 32), [2], 0.0, seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    y = x
    for layer in net.backbone.layers:
        if isinstance(layer, nn.Conv2d):
            y = layer(y)
            pooled = False
        elif isinstance(layer, nn.BatchNorm2d):
            y = layer(y)
        elif not isinstance(layer, nn.Flatten) and not pooled:
            y = torch.max_pool2d(y.relu(), 2)
            pooled = True
    torch.testing.assert_close(net.backbone(x), y.flatten(1))


@pytest.mark.parametrize("model, size", [("conv", 21), ("wrn16_4", 7)])
def test_too_small_images_are_refused(model, size):
    with pytest.raises(ValueError, match="at least"):
        build_net(model, (1, size, size), [2], 0.0, seed=0)


def make_heads():
    torch.manual_seed(0)
    heads = Heads(7, CLASSES)
    layers = [nn.Linear(7, c) for c in CLASSES]
    for t, (layer, c) in enumerate(zip(layers, CLASSES, strict=True)):
        layer.weight.data = heads.weight.data[t, :c].clone()
        layer.bias.data = heads.bias.data[t, :c].clone()
    return heads, layers


def test_heads_start_as_torchs_linear_layers():
    """Uniform within 1 / sqrt(D)."""
    torch.manual_seed(0)
    heads = Heads(100, [10] * 20)
    for p in (heads.weight, heads.bias):
        assert 0.09 < p.abs().max().item() <= 0.1


@pytest.mark.parametrize("multiply", ["multiply_present", "multiply_all"])
def test_heads_equal_separate_linear_layers(multiply):
    heads, layers = make_heads()
    heads.multiply_present = heads.multiply_all = getattr(heads, multiply)
    features = torch.randn(12, 7)
    rows = torch.tensor([0, 1, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2])
    labels = torch.tensor([2, 4, 1, 0, 3, 1, 0, 1, 0, 2, 2, 0])
    x, y = features.clone().requires_grad_(), features.clone().requires_grad_()
    logits = heads(x, rows)
    nn.functional.cross_entropy(logits, labels).backward()
    losses = []
    for b in range(12):
        out = layers[rows[b]](y[b])
        torch.testing.assert_close(logits[b, : len(out)], out)
        assert (logits[b, len(out) :] == -torch.inf).all()
        losses.append(out.logsumexp(0) - out[labels[b]])
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for t, (layer, c) in enumerate(zip(layers, CLASSES, strict=True)):
        torch.testing.assert_close(heads.weight.grad[t, :c], layer.weight.grad)
        torch.testing.assert_close(heads.bias.grad[t, :c], layer.bias.grad)
        assert not heads.weight.grad[t, c:].any() and not heads.bias.grad[t, c:].any()


@pytest.mark.parametrize("multiply", ["multiply_present", "multiply_all"])
@pytest.mark.parametrize("tasks, classes, rows", [(1, 1000, 5), (200, 2, 40), (7, 30, 1)])
def test_many_heads_and_many_classes_against_one_matrix_product_a_row(multiply, tasks, classes, rows):
    """Written out row by row; of the gradient of absent heads nothing but zeros."""
    heads = Heads(11, [classes] * tasks).double()
    x = torch.randn(rows, 11, dtype=torch.float64, requires_grad=True)
    which, upstream = torch.randint(0, tasks, (rows,)), torch.randn(rows, classes, dtype=torch.float64)
    logits = getattr(heads, multiply)(x, which)
    logits.backward(upstream)
    of_weight, of_bias = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    for b, t in enumerate(which.tolist()):
        torch.testing.assert_close(logits[b], heads.weight[t] @ x[b] + heads.bias[t])
        torch.testing.assert_close(x.grad[b], upstream[b] @ heads.weight[t])
        of_weight[t] += upstream[b][:, None] * x.detach()[b]
        of_bias[t] += upstream[b]
    torch.testing.assert_close(heads.weight.grad, of_weight)
    torch.testing.assert_close(heads.bias.grad, of_bias)


def test_the_product_for_gpus_never_asks_the_host():
    """On a meta device there is nothing to ask for: whatever waits for a value raises."""
    heads = Heads(11, [5, 3]).to("meta")
    assert heads(torch.zeros(4, 11, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")).shape == (4, 5)
    with pytest.raises((NotImplementedError, RuntimeError)):
        heads.multiply_present(torch.zeros(4, 11, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"))


def test_gradient_of_the_heads_is_the_same_bit_for_bit_on_several_threads():
    """Found on a whole run: the gradient of a plain index is summed in whatever order the threads come."""
    heads, rows = Heads(256, [10] * 3), torch.randint(0, 3, (256,))
    features, labels = torch.randn(256, 256), torch.randint(0, 10, (256,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = set()
        for _ in range(30):
            heads.weight.grad = None
            nn.functional.cross_entropy(heads(features, rows), labels).backward()
            gradients.add(heads.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1


def test_a_row_trains_only_its_own_head():
    heads, _ = make_heads()
    nn.functional.cross_entropy(heads(torch.randn(4, 7), torch.tensor([1] * 4)), torch.arange(4)).backward()
    assert heads.weight.grad[1].any()
    assert not heads.weight.grad[[0, 2]].any() and not heads.bias.grad[[0, 2]].any()


def test_seed_decides_the_start_and_leaves_the_global_generators_alone(monkeypatch):
    torch.manual_seed(5)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    a, b, c = (build_net("conv", (1, 28, 28), CLASSES, 0.0, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()) and not seeded
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["backbone.layers.0.weight"], c["backbone.layers.0.weight"])


def test_dropout_keeps_the_mean_and_draws_from_its_own_generator():
    from net.wideresnet import Dropout

    drop, x = Dropout(0.25), torch.ones(100_000)
    drop.generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    y = drop(x)
    assert torch.equal(state, torch.get_rng_state())
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.006)  # 4 standard deviations
    assert drop.eval()(x) is x
