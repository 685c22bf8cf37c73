"""Steps of a plan that the library runs in a row by itself."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bap_kernels as bk
from bap_kernels._load import _C
from bap_kernels.plan.compare import PlanDiffersError
from bap_kernels.plan.joined import Joined
from bap_kernels.plan.planned import PlannedNetwork
from tests.networks import SMALL, randomise

pytestmark = pytest.mark.skipif(_C.isa() == "none", reason="no native kernels")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _native() -> object:
    with bk.use_backend("native"):
        yield


def run_apart(plan: PlannedNetwork, x: Tensor) -> Tensor:
    """What the plan's steps compute, each called from Python."""
    program = plan._program
    env: list = [None] * program.slots
    env[program.inputs[0]] = x
    with torch.no_grad():
        for step in program.steps:
            step(env)
    return env[program.result.number]


def joined_of(plan: PlannedNetwork) -> list[Joined]:
    return [step for step, _ in plan._program._joined[0] if isinstance(step, Joined)]


def answers(plan: PlannedNetwork, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the library ran each run of steps, from here on."""
    found: list[bool] = []

    class Noting:
        def __init__(self, run: _C.StepRun) -> None:
            self.wrapped = run

        def run(self, env: list) -> bool:
            found.append(self.wrapped.run(env))
            return found[-1]

    for joined in joined_of(plan):
        monkeypatch.setattr(joined, "native", Noting(joined.native))
    return found


class Net(nn.Module):
    """One of every step that the library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grow, self.grow_more = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 8, 3, padding=1)
        self.last = nn.Conv2d(32, 12, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = nn.functional.relu6(self.depthwise(x))
        x = torch.cat([x, self.grow(x)], 1)
        x = torch.cat([x, self.grow_more(x)], 1)
        x = nn.functional.avg_pool2d(self.last(x), 2)
        return self.mean(x)


def make(memory_format: torch.memory_format = torch.channels_last, batch: int = 3) -> tuple[PlannedNetwork, Tensor]:
    torch.manual_seed(0)
    model = randomise(Net()).eval()
    x = torch.randn(batch, 3, 20, 20).contiguous(memory_format=memory_format)
    table = bk.ChannelTable.random(bk.swap_(model), ["a"], 0.6, 0)
    return bk.plan(bk.attach_(model, table), x, "a"), x


@pytest.mark.parametrize("layout", FORMATS)
def test_joined_steps_compute_what_the_steps_compute(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make(FORMATS[layout])
    ran = answers(plan, monkeypatch)
    result = plan(x)
    assert ran
    assert all(ran)
    assert torch.equal(result, run_apart(plan, x))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_equal_to_the_bit(name: str, layout: str) -> None:
    model = randomise(SMALL[name]()).eval()
    table = bk.ChannelTable.random(bk.swap_(model), ["a"], 0.5, 1)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=FORMATS[layout])
    plan = bk.plan(bk.attach_(model, table), x, "a")
    plan(x)
    assert joined_of(plan)
    assert torch.equal(plan(x), run_apart(plan, x))


def test_a_network_of_convolutions_is_one_run() -> None:
    plan, _ = make()
    assert len(joined_of(plan)) == 1


def test_a_change_of_a_weight_is_seen() -> None:
    plan, x = make()
    before = plan(x)
    with torch.no_grad():
        plan.model.last.weight.mul_(2)
    scaled = plan(x)
    assert torch.equal(scaled, run_apart(plan, x))
    assert not torch.equal(scaled, before)
    plan.model.last.weight = nn.Parameter(torch.zeros_like(plan.model.last.weight))
    assert torch.equal(plan(x), run_apart(plan, x))
    assert not torch.equal(plan(x), scaled)


def test_another_batch_and_size() -> None:
    plan, _ = make()
    for shape in ((1, 3, 20, 20), (5, 3, 31, 24)):
        x = torch.randn(shape)
        assert torch.equal(plan(x), run_apart(plan, x))


class Counting(TorchDispatchMode):
    """Counts the calls that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += "gathered_conv2d_fused" in str(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Functions])
def test_modes_of_pytorch_see_the_steps(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    expected = plan(x)
    ran = answers(plan, monkeypatch)
    with mode() as entered:
        result = plan(x)
    assert ran == [False]
    # Poolings are PyTorch's there.
    assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()
    if mode is Counting:
        assert entered.seen == sum("conv" in step.kind or "depthwise" in step.kind for step in plan._program.steps)


def test_a_named_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    expected = plan(x)
    ran = answers(plan, monkeypatch)
    with bk.use_backend("aten"):
        result = plan(x)
    assert ran == [False]
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_autocast_gives_what_the_steps_give(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make()[0].model, make()[1]
    with torch.autocast("cpu", torch.bfloat16):
        plan = bk.plan(model, x, "a")
        ran = answers(plan, monkeypatch)
        result = plan(x)
        assert ran
        assert all(ran)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, run_apart(plan, x))


def test_a_missing_weight_is_the_steps_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    ran = answers(plan, monkeypatch)
    weight = plan.model.last._parameters.pop("weight")
    with torch.no_grad(), pytest.raises(KeyError, match="weight"):
        plan._program.run((x,))
    assert ran == [False]
    plan.model.last._parameters["weight"] = weight
    plan(x)


def test_a_weight_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    ran = answers(plan, monkeypatch)
    weight, plan.model.last.weight = plan.model.last.weight, None
    with torch.no_grad(), pytest.raises(TypeError):
        plan._program.run((x,))
    assert ran == [False]
    plan.model.last.weight = weight
    plan(x)


class Seen(Tensor):
    """Notes which functions of PyTorch get it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_functions_of_a_subclass_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    expected = plan(x)
    ran = answers(plan, monkeypatch)
    Seen.names.clear()
    assert torch.equal(plan(x.as_subclass(Seen)), expected)
    assert "contiguous" in Seen.names
    assert ran == [False]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trace_records_the_steps(layout: str) -> None:
    plan, x = make(FORMATS[layout])
    with torch.no_grad():
        traced = torch.jit.trace(plan, x, check_trace=False)
        for batch in (3, 5):
            y = torch.randn(batch, 3, 20, 20).contiguous(memory_format=FORMATS[layout])
            expected = plan(y)
            assert (traced(y) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Leading(nn.Module):
    """A model that leads back to its own plan by the attributes of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.conv = 1e-5, nn.Conv2d(3, 4, 3)
        self.plans: list[PlannedNetwork] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def test_a_model_that_holds_its_plan_is_collected() -> None:
    model, x = Leading().eval(), torch.randn(1, 3, 6, 6)
    model.plans.append(bk.plan(model, x))
    model.plans[0](x)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_layer_whose_parameters_lead_to_a_run_is_collected() -> None:
    class Table(dict):
        pass

    table, run = Table(weight=torch.randn(1, 1, 1, 1), bias=None), _C.StepRun(2)
    options = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    nothing = (None, None, False)
    run.add_conv(0, None, 1, None, (0,), table, (None,) * 4, options, nothing, nothing, None, None)
    table["run"] = run
    gone = weakref.ref(table)
    del table, run
    gc.collect()
    assert gone() is None


def test_another_thread_may_find_that_batches_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make()
    chunks, expected = plan._program._chunks, plan(x)
    count = chunks.count

    def counted(env: list) -> None:
        count(env)
        chunks.end = 0

    monkeypatch.setattr(chunks, "count", counted)
    chunks._bytes_per_byte = 0.0
    assert torch.equal(plan(x), expected)


def test_tensors_are_dropped_when_their_last_step_has_run() -> None:
    plan, x = make()
    joined = joined_of(plan)[0]
    program = plan._program
    env: list = [None] * program.slots
    env[program.inputs[0]] = x.clone()
    dropped = weakref.ref(env[program.inputs[0]])
    with torch.no_grad():
        assert joined.native.run(env)
    assert dropped() is None
    left = [slot for slot, tensor in enumerate(env) if tensor is not None]
    assert left == [program.result.number]


def test_threads_share_a_run() -> None:
    plan, _ = make()
    images = [torch.randn(2, 3, 20, 20) for _ in range(4)]
    expected = [plan(x) for x in images]
    wrong: list[int] = []

    def work(number: int) -> None:
        with bk.use_backend("native"):
            for _ in range(20):
                if not torch.equal(plan(images[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.add_view(0, 9, (), 0, 1, None), "slots below 4, got 9"),
        (lambda run: run.add_view(9, 0, (), 0, 1, None), "slots below 4, got 9"),
        (lambda run: run.add_view(0, 1, (9,), 0, 1, None), "slots below 4, got 9"),
        (lambda run: run.run([None]), "4 slots, got 1"),
    ],
)
def test_slots_are_checked(call: Callable[[_C.StepRun], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(_C.StepRun(4))


def test_what_is_no_image_is_left_to_the_steps() -> None:
    run = _C.StepRun(2)
    run.add_view(0, 1, (0,), 0, 1, None)
    for other in (
        None,
        3,
        torch.randn(3, 3),
        torch.randn(1, 1, 1, 1, device="meta"),
        torch.ones(1, 1, 1, 1).to_mkldnn(),
    ):
        env = [other, None]
        assert not run.run(env)
        assert env[0] is other


@pytest.mark.parametrize("layout", FORMATS)
def test_the_check_of_a_plan_runs_what_its_calls_run(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = make(FORMATS[layout])
    run = Joined.__call__

    def wrong(joined: Joined, env: list) -> None:
        run(joined, env)
        result = env[joined.steps[-1][0].writes[0]]
        result.mul_(1.5)

    monkeypatch.setattr(Joined, "__call__", wrong)
    with pytest.raises(PlanDiffersError, match="expected the plan to equal"):
        bk.plan(plan.model, x, "a")
