"""Packed weights are right after every kind of write, including those that do not bump the tensor's version."""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import ChannelLists
from bap_kernels.nn import GatheredConv2d, SwitchedConv2d

LISTS = ChannelLists(range(0, 24, 3), range(1, 16, 2))
X = torch.randn(2, 24, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _packing() -> Iterator[None]:
    bk.clear_packed_cache()
    with bk.use_backend("auto" if bk.info().backends["native"] else "native"):
        yield
    bk.clear_packed_cache()


def layer() -> GatheredConv2d:
    return GatheredConv2d(24, 16, 3, padding=1, channels=LISTS).eval()


def right(conv: nn.Conv2d) -> None:
    """Assert that the layer computes with the current weight."""
    on = torch.zeros(24, dtype=conv.weight.dtype)
    on[LISTS.in_index.long()] = 1
    x = X.to(conv.weight.dtype)
    expected = F.conv2d(x * on.view(-1, 1, 1), conv.weight, conv.bias, padding=1)[:, LISTS.out_index.long()]
    torch.testing.assert_close(conv(x), expected, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


# Each function writes to a weight and returns objects that must stay alive.
def in_place(weight: Tensor) -> None:
    weight.mul_(-2)


def through_data(weight: Tensor) -> None:
    weight.data.mul_(-2)


def through_a_numpy_view(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= -2


def through_a_pointer(weight: Tensor) -> None:
    new = (weight.detach() * -2).contiguous()
    ctypes.memmove(weight.data_ptr(), new.data_ptr(), new.nbytes)


def through_dlpack(weight: Tensor) -> None:
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(weight.detach())).mul_(-2)


def other_data(weight: Tensor) -> None:
    weight.data = weight.data * -2


def other_data_twice(weight: Tensor) -> None:
    # The second storage may reuse the address of the first.
    weight.data = weight.data * -1
    gc.collect()
    weight.data = weight.data * 2


def by_a_flat_vector(weight: Tensor) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([weight]) * -2, [weight])


def through_set(weight: Tensor) -> None:
    weight.set_((weight.detach() * -2).contiguous())


WRITES = [
    in_place,
    through_data,
    through_a_numpy_view,
    through_a_pointer,
    through_dlpack,
    other_data,
    other_data_twice,
    by_a_flat_vector,
    through_set,
]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_each_write_to_a_weight_is_used(write: Callable[[Tensor], None], graded: bool) -> None:
    conv = layer()
    with torch.set_grad_enabled(graded):
        for _ in range(4):
            right(conv)
            with torch.no_grad():
                before = conv.weight.clone()
                write(conv.weight)
                assert torch.equal(conv.weight, before * -2)
            right(conv)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.bfloat16().float(),
        lambda conv: conv.double().float(),
        lambda conv: conv.to(torch.bfloat16),
        lambda conv: conv.to(memory_format=torch.channels_last),
        lambda conv: conv.to_empty(device="cpu").reset_parameters(),
        lambda conv: conv.load_state_dict(GatheredConv2d(24, 16, 3).state_dict()),
        lambda conv: conv.load_state_dict(GatheredConv2d(24, 16, 3).state_dict(), assign=True),
        lambda conv: conv.share_memory(),
        lambda conv: conv.register_parameter("weight", nn.Parameter(torch.randn(16, 24, 3, 3))),
        lambda conv: nn.init.kaiming_normal_(conv.weight),
    ],
)
def test_each_change_of_a_layer_is_used(change: Callable[[GatheredConv2d], object]) -> None:
    conv = layer()
    with torch.no_grad():
        for _ in range(3):
            right(conv)
            change(conv)
            right(conv)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "plain": lambda p: torch.optim.RMSprop(p, 0.1),
}


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimiser_step_in_eval_mode_is_used(name: str, graded: bool) -> None:
    conv = layer()
    step = OPTIMIZERS[name](list(conv.parameters()))
    for _ in range(3):
        with torch.set_grad_enabled(graded):
            right(conv)
        conv(X).square().mean().backward()
        with torch.no_grad():
            right(conv)
        step.step()
        with torch.set_grad_enabled(graded):
            right(conv)


def test_step_of_a_single_value_is_used() -> None:
    # Changes so few values that a sample would hardly contain one.
    conv = layer()
    step = torch.optim.SGD(conv.parameters(), 1.0, fused=True)
    with torch.no_grad():
        right(conv)
        conv.weight.grad = torch.zeros_like(conv.weight)
        conv.weight.grad[7, 9, 1, 2] = 5
        step.step()
        right(conv)


def test_functional_fused_step_is_used() -> None:
    conv = layer()
    with torch.no_grad():
        right(conv)
    conv(X).sum().backward()
    gradient = torch.zeros_like(conv.weight)
    gradient[7, 9, 1, 2] = 5
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 1.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    with torch.no_grad():
        torch._fused_sgd_([conv.weight], [gradient], [], **options, is_first_step=True)
        right(conv)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("make", [layer, lambda: SwitchedConv2d(24, 16, 3, padding=1, domains=["a"]).eval()])
def test_mode_change_drops_packed_weights(make: Callable[[], nn.Conv2d], mode: bool) -> None:
    conv = make()
    if isinstance(conv, SwitchedConv2d):
        conv.set_domain("a")
    parent = nn.Sequential(nn.Sequential(conv))
    with torch.no_grad():
        parent(X)
    assert bk.packed_cache_info()["entries"] == 1
    parent.train(mode)
    assert bk.packed_cache_info()["entries"] == 0


def _one_value(weight: Tensor) -> None:
    """Write one listed value, which a sample would hardly contain, without bumping the version."""
    ctypes.c_float.from_address(weight.data_ptr() + 4 * ((7 * 24 + 9) * 9 + 5)).value += 5


@pytest.mark.parametrize(
    "hold",
    [
        lambda conv: conv.state_dict(),
        lambda conv: conv.weight.data,
        lambda conv: conv.weight[0],
        lambda conv: conv.weight.detach().numpy(),
        lambda conv: torch.utils.dlpack.to_dlpack(conv.weight.detach()),
        lambda conv: conv.weight.detach().numpy() is None,  # freed here, but NumPy may have shared it
        lambda conv: conv.requires_grad_(False).weight.numpy(),
        lambda conv: conv.share_memory(),
        lambda conv: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(conv.parameters()), conv.parameters()),
    ],
)
def test_shared_weight_is_compared_by_all_values(hold: Callable[[GatheredConv2d], object]) -> None:
    conv = layer()
    with torch.no_grad():
        held = hold(conv)
        for _ in range(3):
            right(conv)
            _one_value(conv.weight)
        right(conv)
        before = bk.packed_cache_info()
        right(conv)
        after = bk.packed_cache_info()
    assert after["compared"] > before["compared"]
    assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])
    assert "weight compared at every call" in bk.report(conv, X).layers[0].why
    del held


def test_inference_weight_is_kept_and_compared() -> None:
    with torch.inference_mode():
        conv = layer()
        right(conv)
        _one_value(conv.weight)
        right(conv)
        conv.weight.mul_(2)
        right(conv)
        before = bk.packed_cache_info()
        right(conv)
        after = bk.packed_cache_info()
    assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])
    assert "weight compared at every call: it was made in inference mode" in bk.report(conv, X).layers[0].why


@pytest.mark.parametrize("backend", ["native", "auto", "aten"])
def test_a_parameter_of_inference_mode_with_other_data(backend: str) -> None:
    with torch.inference_mode():
        conv = layer()
    data = torch.randn_like(conv.weight)
    conv.weight.data, conv.bias.data = data, torch.zeros(data.shape[0])
    assert not conv.weight.is_inference()
    with torch.no_grad(), bk.use_backend(backend):
        right(conv)
        data.mul_(2)
        right(conv)


def test_private_weight_is_kept_without_warning() -> None:
    conv = layer()
    state = conv.state_dict()
    del state
    assert "every call" not in bk.report(conv, X).layers[0].why
    # As in saving and copying; the Python object of the storage stays.
    assert conv.weight.untyped_storage().nbytes() > 0
    copy.deepcopy(conv)
    assert "every call" not in bk.report(conv, X).layers[0].why


def test_strided_shared_weight_is_packed_at_every_call() -> None:
    base = torch.randn(16, 48, 3, 3)
    conv = layer()
    conv.weight = nn.Parameter(base[:, ::2])
    with torch.no_grad():
        before = bk.packed_cache_info()["not_kept"]
        right(conv)
        base[:] = torch.randn(16, 48, 3, 3)
        right(conv)
    assert bk.packed_cache_info()["not_kept"] > before
    assert "weight packed at every call" in bk.report(conv, X).layers[0].why


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.usefixtures("one_process")
def test_collective_on_parameter_is_used(graded: bool) -> None:
    conv = layer()
    operation = dist.ReduceOp.SUM
    for _ in range(3):
        with torch.set_grad_enabled(graded):
            right(conv)
        with torch.no_grad():
            version = conv.weight._version
            # A broadcast from another rank, and an average over ranks.
            conv.weight.data.copy_(torch.randn_like(conv.weight))
            dist.broadcast(conv.weight, 0)
            dist.all_reduce(conv.weight, operation)
            assert conv.weight._version == version, "the case is that no change is counted"
        with torch.set_grad_enabled(graded):
            right(conv)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer_step_is_used(kind: type[torch.optim.Optimizer]) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    conv = layer()
    step = ZeroRedundancyOptimizer(conv.parameters(), optimizer_class=kind, lr=0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            right(conv)
        conv(X).square().mean().backward()
        with torch.no_grad():
            right(conv)
        step.step()
        with torch.no_grad():
            right(conv)


def test_write_of_another_process_is_used() -> None:
    conv = layer()
    conv.share_memory()
    with torch.no_grad():
        right(conv)
        before = conv.weight.clone()
        process = multiprocessing.get_context("fork").Process(target=_one_value, args=(conv.weight,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert not torch.equal(conv.weight, before)
        right(conv)


def test_write_to_mapped_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(torch.randn(16 * 24 * 9).numpy().tobytes())
    conv = layer()
    conv.weight = nn.Parameter(torch.from_file(str(path), shared=True, size=16 * 24 * 9).view(16, 24, 3, 3))
    with torch.no_grad():
        right(conv)
        with open(path, "r+b") as file:
            file.seek(4 * ((7 * 24 + 9) * 9 + 5))
            file.write(torch.tensor([5.0]).numpy().tobytes())
        assert conv.weight[7, 9, 1, 2] == 5
        right(conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_uses_each_write(dtype: torch.dtype) -> None:
    conv = layer()
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=dtype == torch.float32):
            result = conv(X)
        with torch.no_grad():
            expected = conv(X)
            torch.testing.assert_close(result.float(), expected, rtol=5e-2, atol=5e-2)
            conv.weight.data.mul_(-1.5)


def test_list_change_without_version_is_used() -> None:
    conv = layer()
    lists = conv.channels
    with torch.no_grad():
        first = conv(X)
        numbers = lists.in_index.numpy()
        before = numbers.copy()
        numbers[:] = before + 1
        assert not torch.allclose(conv(X), first)
        numbers[:] = before
        torch.testing.assert_close(conv(X), first)


def test_write_invalidates_all_lists_of_a_weight() -> None:
    conv = layer()
    with torch.no_grad():
        tables = [ChannelLists([i % 24], [i % 16]) for i in range(240)]
        for _ in range(2):
            for lists in tables:
                conv.channels = lists
                i, o = int(lists.in_index), int(lists.out_index)
                expected = F.conv2d(X[:, i : i + 1], conv.weight[o : o + 1, i : i + 1], conv.bias[o : o + 1], padding=1)
                torch.testing.assert_close(conv(X), expected, rtol=1e-4, atol=1e-4)
            conv.weight.data.mul_(-1)
