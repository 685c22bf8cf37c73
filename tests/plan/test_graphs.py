"""CUDA graphs of plans, with a recorder of calls on CPU tensors in the place of CUDA's graphs."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bap_kernels as bk
from bap_kernels.plan import graphs
from bap_kernels.plan.planned import PlannedNetwork

X = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(0))
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")


class Waits(TorchFunctionMode):
    """Refuses what brings values to the host; on CPU tensors some of it calls no operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "cpu", "numpy", "tolist", "__bool__", "__int__", "__float__"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    """A graph: the operators of a run, on the very tensors of that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Runs the operators again, into the memory of the recorded run."""
        # In inference mode what was made in it may be written to.
        with torch.inference_mode():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(graphs.CudaCapture):
    """Captures calls on CPU tensors, and counts what it was asked for."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.recorded: list[Recorded] = []
        self.log: list[str] = []
        self.user_captures = False

    def capturing(self) -> bool:
        return self.user_captures

    def warm_up(self, run: Callable[[], Any]) -> None:
        self.log.append("warm up")
        run()

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        assert self.log[-1] == "warm up"
        self.log.append("capture")
        graph = Recorded()
        self.recorded.append(graph)
        with Waits(), graph:
            return graph, run()

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setattr(graphs, "capture_for", lambda op, device: made)
    with bk.use_backend("aten"):
        yield made


class Network(nn.Module):
    """Convolutions with lists, a residual and a head."""

    def __init__(self, wait: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.wait = wait

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv(x)
        return self.head(x.mean((2, 3)))


def planned(**options: Any) -> tuple[nn.Module, PlannedNetwork]:
    torch.manual_seed(1)
    model = bk.swap_(Network().eval(), lambda module, name: name == "conv")
    lists = {"a": {"conv": bk.ChannelLists([0, 2, 5])}, "b": {"conv": bk.ChannelLists([1, 2, 7])}}
    bk.set_domain(bk.attach_(model, lists), "a")
    return model, bk.plan(model, X, "a", cuda_graph=True, **options)


def right(model: nn.Module, plan: PlannedNetwork, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)


def test_first_call_captures_and_others_replay(recorder: Recorder) -> None:
    model, plan = planned()
    assert recorder.log == []
    right(model, plan)
    assert recorder.log == ["warm up", "capture", "begin", "end"]
    right(model, plan, 2 * X + 1)
    right(model, plan, X.contiguous(memory_format=torch.channels_last))
    assert recorder.log[4:] == ["begin", "end"] * 2
    # The convolutions are among what is replayed.
    names = [call[0].overloadpacket.__name__ for call in recorder.recorded[0].calls]
    assert names.count("_gathered_conv2d_fused") == 2


def test_results_stay_and_inputs_are_not_kept(recorder: Recorder) -> None:
    _, plan = planned()
    with torch.no_grad():
        x = X.clone()
        first = plan(x)
        kept = first.clone()
        x.fill_(7)
        second = plan(x)
        assert torch.equal(first, kept)
        assert not torch.equal(second, first)
        first.zero_()
        torch.testing.assert_close(plan(X), kept)
        assert (x == 7).all()


def test_first_call_may_be_in_inference_mode(recorder: Recorder) -> None:
    model, plan = planned()
    with torch.inference_mode():
        plan(X)
    right(model, plan, 2 * X)
    with torch.inference_mode():
        right(model, plan, X)
    assert len(recorder.recorded) == 1


def test_large_weights_of_other_layers_are_watched(recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 7 * 6, 300)).eval())
    plan = bk.plan(model, X, cuda_graph=True)
    right(model, plan)
    # Another address, which a graph would not follow.
    model[2].weight.data = model[2].weight.data * 2
    right(model, plan)
    assert len(recorder.recorded) == 2


def test_domains_and_shapes_have_graphs_of_their_own(recorder: Recorder) -> None:
    model, plan = planned()
    for _ in range(2):
        for domain in ("a", "b"):
            bk.set_domain(model, domain)
            bk.set_domain(plan, domain)
            for x in (X, X[:1], X[:, :, :7]):
                right(model, plan, x)
    assert len(recorder.recorded) == 6
    assert recorder.log.count("end") == 12


@pytest.mark.parametrize("layer", ["stem", "conv", "norm", "head", "lists"])
def test_changes_are_recorded_again(layer: str, recorder: Recorder) -> None:
    model, plan = planned()
    right(model, plan)
    for _ in range(2):
        with torch.no_grad():
            if layer == "lists":
                bk.attach_(model, {"a": {"conv": bk.ChannelLists([0, 2, 6])}, "b": {"conv": bk.ChannelLists([3])}})
                bk.set_domain(model, "a")
            else:
                getattr(model, layer).weight.mul_(-2)
        right(model, plan)
    assert len(recorder.recorded) == 3


def test_remake_drops_graphs(recorder: Recorder) -> None:
    model, plan = planned()
    right(model, plan)
    plan.remake()
    right(model, plan)
    assert len(recorder.recorded) == 2


def test_graph_used_longest_ago_is_dropped(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = planned()
    monkeypatch.setattr(plan._graphs, "most", 2)
    shapes = [X[:1], X[:2], X[:1], X[:3]]
    for x in shapes:
        right(model, plan, x)
    assert len(recorder.recorded) == 3
    right(model, plan, X[:1])
    assert len(recorder.recorded) == 3, "the graph used last went"
    right(model, plan, X[:2])
    assert len(recorder.recorded) == 4
    assert len(plan._graphs.graphs) == 2


def test_mixed_batches_and_calls_inside_a_capture_run_without(recorder: Recorder) -> None:
    model, plan = planned()
    numbers = torch.tensor([0, 1, 1, 0])
    bk.set_domain(model, numbers)
    bk.set_domain(plan, numbers)
    right(model, plan)
    assert recorder.log == []
    bk.set_domain(model, "a")
    bk.set_domain(plan, "a")
    recorder.user_captures = True
    right(model, plan)
    assert recorder.log == []


def test_autocast_has_graphs_of_its_own(recorder: Recorder) -> None:
    model, plan = planned()
    right(model, plan)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(plan(X), model(X), rtol=5e-2, atol=5e-2)
    right(model, plan)
    assert len(recorder.recorded) == 2


def test_threads_share_graphs(recorder: Recorder) -> None:
    model, plan = planned()
    inputs = [X + number for number in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(plan(inputs[number]), expected[number], rtol=1e-4, atol=1e-5):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(recorder.recorded) == 1


def test_copies_and_pickles_keep_the_option(recorder: Recorder) -> None:
    model, plan = planned()
    right(model, plan)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other._options[3] is True
        right(model, other)


def test_what_a_graph_cannot_record_raises(recorder: Recorder) -> None:
    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().max().item()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Waiting()).eval()
    plan = bk.plan(bk.swap_(model), X, cuda_graph=True)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"PlannedNetwork\(\): expected a network whose steps"):
            plan(X)


def test_other_devices_raise() -> None:
    model = bk.swap_(nn.Sequential(nn.Conv2d(3, 4, 1)).eval())
    with pytest.raises(ValueError, match=r"plan\(\): expected `cuda_graph` to be False for a plan on cpu, got True"):
        bk.plan(model, X, cuda_graph=True)
