"""A captured step equals the plain one, or is not used: with a graph that is made of real numbers, on a CPU.

The stand-in for a CUDA graph records every ATen call of a step, undoes it, and on replay makes the same calls again
into the same memory. What a capture on a GPU forbids, reading a number on the host, raises.
"""
import contextlib
import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modelzoo
from net.build_net import build_net, set_dropout_generator
from tests.commands import numbers, start
from tests.conftest import CONV, flags, write_yaml
from utils import capture, run_net
from utils.capture import capture_step
from utils.command import command
from utils.run_net import train_net

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Recorder(TorchDispatchMode):
    """Notes every call, and every memory that a call met as it was before."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage()
                if memory.data_ptr() not in self.made and memory.data_ptr() not in self.before:
                    self.before[memory.data_ptr()] = (memory, memory.clone())
        out = func(*args, **(kwargs or {}))
        self.made |= {x.untyped_storage().data_ptr() for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Holder(TorchDispatchMode):
    """Holds on to every result, as a `Recorder` does: autograd adds gradients up in place only where nobody does."""

    def __init__(self):
        super().__init__()
        self.held = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.held.append(func(*args, **(kwargs or {})))
        return self.held[-1]


def record_calls(step, generators, device):
    """What `record_graph` does, on a CPU."""
    states, recorder = [generator.get_state() for generator in generators], Recorder()
    try:
        with recorder:
            step()
    finally:
        for memory, value in recorder.before.values():
            memory.copy_(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def replay():
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in recorder.calls:
                found = func(*args, **kwargs)
                if not any(x.alias_info is not None for x in func._schema.returns):
                    for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)

    return replay


@pytest.fixture
def graphs(monkeypatch):
    """Steps on a CPU are captured, too; returns the recordings so far, a number each time one is made."""
    made = []

    def record(step, generators, device):
        replay = record_calls(step, generators, device)
        made.append(0)

        def count():
            made[-1] += 1
            replay()

        return count

    capture._note.cache_clear()
    monkeypatch.setattr(run_net, "can_capture", lambda device, batch: True)
    monkeypatch.setattr(capture, "on_side_stream", lambda device: Holder())
    monkeypatch.setattr(capture, "record_graph", record)
    return made


class OnHost:
    """Images of another device than the rows."""

    device = torch.device("cpu", 0)

    def __init__(self, images):
        self.images, self.shape = images, images.shape

    def __getitem__(self, rows):
        return self.images[rows]


def learn(model, precision, capture="auto", place=lambda images: images, **more):
    """6 steps an epoch of which the last is short, predictions between epochs; returns losses and weights."""
    size = {"conv": 24, "wrn": 12}.get(model[:4].rstrip("1"), 32)
    net = build_net(model, (3, size, size), [3, 2], 0.2, seed=1)
    g = torch.Generator().manual_seed(0)
    images = place(torch.randint(0, 256, (22, 3, size, size), dtype=torch.uint8, generator=g))
    rows = torch.arange(22)
    generators = {key: torch.Generator().manual_seed(3) for key in ("shuffle", "augment", "dropout")}
    set_dropout_generator(net, generators["dropout"])
    given = {"epochs": 2, "batch": 4, "lr": 1e-3, "l2_reg": 1e-3, "schedule": "cosine", "augment": True, "flip": True,
             "precision": precision, "generators": generators} | more
    found, snapshots = [], []
    for values, snapshot in train_net(net, images, rows, rows % 2, rows % 2, capture=capture, **given):
        found.append(values | {"logits": run_net.predict_logits(net, images, rows[:5], 0, 3, precision)})
        snapshots.append(copy.deepcopy(snapshot()))
    return found, net.state_dict(), snapshots


def assert_same(one, other, **tolerance):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a.pop("logits"), b.pop("logits"), **(tolerance or {"rtol": 0, "atol": 0}))
        assert a == pytest.approx(b, rel=1e-3) if tolerance else a == b
    for key, x in one[1].items():
        torch.testing.assert_close(x, other[1][key], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("model, precision, more", [
    ("conv", "fp32", {}),
    ("conv", "bf16", {"optimiser": "adamw", "clip_norm": 0.5}),
    ("conv", "fp16", {}),
    ("wrn16_4", "bf16", {}),
    ("wrn10_1", "fp16", {"clip_norm": 0.5, "label_smoothing": 0.1}),
    ("wrn10_1", "fp32", {"warmup": 1.0, "momentum": 0.5, "weights": torch.linspace(0.5, 1.5, 22)}),
    ("mobilenet_v3_small", "fp32", {"lr": 1e-5}),
    ("resnet18", "fp32", {}),
])
def test_captured_equals_plain_bit_for_bit(graphs, capsys, model, precision, more):
    captured, plain = learn(model, precision, **more), learn(model, precision, "off", **more)
    assert graphs == [10 - capture.WARM_UP]  # replays: of every full step after those that warm up
    # Of this one, steps whose results are held on to differ from others by rounding.
    rounding = {"rtol": 1e-2, "atol": 1e-3} if model == "mobilenet_v3_small" else {}
    assert_same(captured, plain, **rounding)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("capture", ["auto", "off"])
@pytest.mark.parametrize("augment", [True, False])
def test_images_that_stay_on_the_host_change_nothing(graphs, capsys, capture, augment):
    assert_same(learn("conv", "fp32", capture, OnHost, augment=augment), learn("conv", "fp32", "off", augment=augment))
    assert len(graphs) == (capture == "auto") and capsys.readouterr().err == ""


def test_training_resumes_inside_a_learner_that_is_captured(graphs):
    whole = learn("wrn10_1", "fp16", epochs=3)
    resumed = learn("wrn10_1", "fp16", epochs=3, start=whole[2][1])
    assert_same((whole[0][2:], whole[1]), resumed)
    assert_same(learn("wrn10_1", "fp16", epochs=3), learn("wrn10_1", "fp16", "off", epochs=3, start=None))


def test_a_run_is_the_same_captured_plain_or_changed_on_the_way(workspace, graphs):
    write_yaml(workspace / "hp.yaml", {**CONV, "augment": True, "schedule": "cosine"})
    more = ("--continual", "--inherit")
    captured = start(workspace, "a", *more)
    assert graphs == [1, 7, 11]  # two epochs of 20, 40 and 60 rows in batches of 8: 4, 10 and 14 full steps
    plain = start(workspace, "b", *more, "--capture", "off")
    assert numbers(captured) == numbers(plain) and len(graphs) == 3
    (workspace / "runs/a/result.json").unlink()
    assert numbers(start(workspace, "a", *more, "--capture", "off", "--resume")) == numbers(plain)


def walk(step, state, generators=()):
    """Ten calls of a step through capture_step; returns the state."""
    call = capture_step(step, lambda: state, list(generators), torch.device("cpu"))
    for k in range(10):
        state[1].fill_(0.1 / (k + 1))  # the rate
        call(torch.tensor([k % 3, (k + 1) % 3]))
    return [x.clone() for x in state]


def make_state():
    """A weight, a rate, a sum and a momentum."""
    return [torch.ones(3, dtype=torch.float64), torch.zeros(()), torch.zeros(()), torch.zeros(3, dtype=torch.float64)]


def good(state):
    def step(rows):
        weight, rate, total, momentum = state
        momentum.mul_(0.9).index_add_(0, rows, weight[rows])
        weight.sub_(rate * momentum)
        total.add_(weight.sum())

    return step


def rate_as_a_number(state):
    inner, rate = good(state), state[1]

    def step(rows):
        number = memory(rate)
        state[0].sub_(number * rows.sum())
        inner(rows)

    return step


def memory(x):
    """A number read behind the back of torch, as a value that was computed on the host."""
    return float(x.numpy())


def batch_not_copied(state):
    inner = good(state)
    return lambda rows: inner(torch.tensor(rows.numpy().tolist()))


def waits_for_the_device(state):
    inner = good(state)

    def step(rows):
        inner(rows)
        if state[2].item() > 1e9:
            raise AssertionError

    return step


def sums_made_anew(state):
    inner = good(state)

    def step(rows):
        inner(rows)
        state[2] = state[2] + 1

    return step


def counts_on_the_host(state):
    inner, calls = good(state), itertools.count()

    def step(rows):
        inner(rows)
        state[0].add_(next(calls))

    return step


def forgets_its_momentum(state):
    inner = good(state)

    def step(rows):
        inner(rows)
        state[3] = state[3].clone()

    return step


def every_other_step(state):
    inner, flag = good(state), itertools.cycle([True, False])

    def step(rows):
        if next(flag):
            inner(rows)
        else:
            state[0].mul_(2)

    return step


def test_a_good_step_is_replayed(graphs, capsys):
    state, plain = make_state(), make_state()
    found = walk(good(state), state)
    for k in range(10):
        plain[1].fill_(0.1 / (k + 1))
        good(plain)(torch.tensor([k % 3, (k + 1) % 3]))
    assert all(x.equal(y) for x, y in zip(found, plain, strict=True))
    assert graphs == [7] and capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", [
    rate_as_a_number, batch_not_copied, waits_for_the_device, sums_made_anew, forgets_its_momentum,
])
def test_a_planted_fault_is_caught_and_nothing_is_lost(graphs, capsys, fault):
    """One line; and from the first check on every step is a plain one, so that the result is that of plain steps."""
    state, plain = make_state(), make_state()
    found = walk(fault(state), state)
    step = fault(plain)
    for k in range(10):
        plain[1].fill_(0.1 / (k + 1))
        step(torch.tensor([k % 3, (k + 1) % 3]))
    assert all(x.equal(y) for x, y in zip(found, plain, strict=True))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("note: steps are not captured in a CUDA graph")
    assert sum(graphs) <= capture.CHECKS


@pytest.mark.parametrize("fault", [counts_on_the_host, every_other_step])
def test_what_the_host_decides_is_caught(graphs, capsys, fault):
    """A step that is another one each time has no plain result to go on with, but it is seen."""
    state = make_state()
    walk(fault(state), state)
    assert "its result is not that of the plain step" in capsys.readouterr().err
    assert sum(graphs) <= capture.CHECKS


def test_a_recording_that_fails_leaves_stream_and_generators_as_they_were(monkeypatch):
    """With a stand-in for CUDA that does what torch does: after the failure the side stream is the current one."""
    events = []

    class Generator:
        def clone_state(self):
            return "clone"

        def graphsafe_set_state(self, state):
            events.append(("state", state))

    class Graph:
        def register_generator_state(self, generator):
            events.append("register")

    @contextlib.contextmanager
    def fails(graph, stream, capture_error_mode):
        events.append(("on", stream))
        yield

    def step():
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: events.append(("current", stream)))
    monkeypatch.setattr(capture, "side_stream", lambda device: "side")
    for version, registered in (("2.11.0+cu130", ["register"]), ("2.14.1", []), ("2.15.0a0", [])):
        events.clear()
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(RuntimeError, match="not permitted"):
            capture.record_graph(step, [Generator()], torch.device("cuda", 0))
        assert events == [*registered, ("on", "side"), ("current", "before"), ("state", "clone")]


def test_capture_is_checked_and_free_to_change(workspace, capsys):
    argv = flags(workspace, "--capture", "on")
    assert command("modelzoo.py", "modelzoo", modelzoo.run, argv) == 2
    assert "--capture: 'on' is not one of auto, off" in capsys.readouterr().err


def test_steps_on_a_cpu_are_not_captured(monkeypatch):
    monkeypatch.setattr(run_net, "capture_step", lambda *_: pytest.fail("captured"))
    learn("conv", "fp32", epochs=1)
    assert not capture.can_capture(torch.device("cuda", 0), capture.MAX_BATCH + 1)
    assert capture.can_capture(torch.device("cuda", 0), capture.MAX_BATCH)
