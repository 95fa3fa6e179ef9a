"""A training step as a CUDA graph: recorded once, held against the plain step, then replayed.

A small network's step is hundreds of short kernels, and launching them one by one takes longer than running them.
"""
import contextlib
import functools
import sys

import torch

from datasets.data import one_line

MAX_BATCH = 1024  # rows; larger ones hide the launches anyway
WARM_UP = 3  # steps before the recording, in which libraries choose their kernels and take their memory
CHECKS = 2  # replays that are held against the plain step; only the second has other rows and another rate


def can_capture(device, batch):
    """Whether there is anything to gain from a graph of steps of `batch` rows on `device`."""
    return device.type == "cuda" and batch <= MAX_BATCH


@functools.cache
def side_stream(device):
    """The stream on which steps run; one for all learners, because libraries keep memory for each that they meet."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def on_side_stream(device):
    """Run what is inside on the side stream: autograd remembers the one that a parameter was first used on."""
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def record_graph(step, generators, device):
    """Record what `step`, a function without arguments, does on `device`; return a function that does it.

    Raises:
        RuntimeError: it does something that a graph cannot hold; all is as it was before.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    states = [generator.clone_state() for generator in generators]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):  # since then torch does it by itself
        for generator in generators:
            graph.register_generator_state(generator)
    try:
        # Only this thread is bound by the rules of a recording: another may be fetching the next batch meanwhile.
        with torch.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        # A recording that fails leaves the side stream as the current one, and generators that refuse to draw.
        torch.cuda.set_stream(stream)
        for generator, state in zip(generators, states, strict=True):
            generator.graphsafe_set_state(state)
        raise
    return graph.replay


@functools.cache  # once, not for each learner
def _note(why):
    print(f"note: steps are not captured in a CUDA graph, which makes them slower: {why}", file=sys.stderr)


def capture_step(step, state, generators, device):
    """Let a graph do what `step` does: WARM_UP calls as they are, then one replay a call.

    The first CHECKS replays are held against the plain step from the same state. Where they differ, or the step cannot
    be recorded, one line says so, the plain step's result stands, and every later call is a plain one.

    Args:
        step: a function of tensors, the rows of a batch and, where they come from the host, their images; all else that
            it reads or writes stays where it is in memory, and it never waits for the device.
        state: a function without arguments: the tensors that a step changes.
        generators: that it draws from, on the device.
        device: of it all.

    Returns:
        A function of the same tensors, always of the same shapes.
    """
    calls, given, replay = 0, None, None

    def copy(batch):
        for x, value in zip(given, batch, strict=True):
            x.copy_(value)

    def read():
        return [x.clone() for x in state()], [generator.get_state() for generator in generators]

    def write(values):
        for x, value in zip(state(), values[0], strict=True):
            x.copy_(value)
        for generator, value in zip(generators, values[1], strict=True):
            generator.set_state(value)

    def check(*batch):
        """Why the replay is not the plain step, or ""; the state is that after the plain step."""
        nonlocal given, replay
        before = read()
        with on_side_stream(device):
            step(*batch)
        expected = read()
        write(before)
        try:
            if replay is None:
                given = [x.clone() for x in batch]
                replay = record_graph(lambda: step(*given), generators, device)
            copy(batch)
            replay()
            found = read()
            same = all(x.equal(y) for of_found, of_expected in zip(found, expected, strict=True)
                       for x, y in zip(of_found, of_expected, strict=True))
            why = "" if same else "its result is not that of the plain step"
        except RuntimeError as e:  # kept as a text alone: the exception would hold on to the step's memory
            while e.__context__:  # what the end of a recording says is not why it ended
                e = e.__context__
            why = one_line(e, 160)
        write(expected)
        return why

    def call(*batch):
        nonlocal calls, replay
        calls += 1
        checked = WARM_UP + CHECKS
        if calls <= WARM_UP or calls > checked and replay is None:
            with on_side_stream(device):
                step(*batch)
        elif calls > checked:
            copy(batch)
            replay()
        elif why := check(*batch):
            _note(why)
            calls, replay = checked, None

    return call
