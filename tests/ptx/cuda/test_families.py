"""The kernel families that a call names before it runs, against the kernels that it then launches; and the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors
from tests.ptx.cuda.device import kernels, set_device
from tests.simulated_gpu import devices, simulated_gpu

pytestmark = pytest.mark.usefixtures("own_choice_table", "no_verifier")

ops = torch.ops.bap_kernels
BASE = Case(in_channels=64, out_channels=32, size=(8, 8), in_list="null", out_list="null", dtype=torch.bfloat16)
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
WIDE = BASE.but(out_channels=136)
RANDOM = torch.tensor([1, 2, 5, 7, 20, 33], dtype=torch.int32)
BLOCKS = torch.tensor([c for c in range(64) if c // 8 % 2], dtype=torch.int32)
LAST = {"layout": "channels_last"}
# 27 steps.
LONG = BASE.but(in_channels=136, out_channels=136, size=(5, 7), **LAST)
RANDOM_OF_LONG = torch.tensor([c for c in range(136) if c != 9], dtype=torch.int32)

Call = tuple[str, tuple[Any, ...]]


def forward(case: Case, index: Tensor | None = None) -> Call:
    sample = make_tensors(case)
    x, w, bias, _, out_index, *geometry = sample.args
    return "gathered_conv2d", (x, w, bias, index, out_index, *geometry)


def backward(case: Case, index: Tensor | None = None, mask: tuple[bool, ...] = (True, True, True)) -> Call:
    sample = make_tensors(case)
    x, w, _, _, out_index, *geometry = sample.args
    grad = torch.ones(sample.output_shape, dtype=case.dtype)
    if case.layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    return "gathered_conv2d_backward", (grad, x, w, index, out_index, *geometry, list(mask))


def switched(case: Case) -> Call:
    sample = make_tensors(case)
    x, w, bias, _, _, *geometry = sample.args
    return "switched_conv2d", (x, w, bias, (torch.arange(x.shape[1]) % 2).float(), *geometry)


def switched_backward(case: Case, mask: tuple[bool, ...] = (True,) * 4) -> Call:
    _, (grad, x, w, _, _, *geometry, _) = backward(case)
    return "switched_conv2d_backward", (
        grad,
        x,
        w,
        (torch.arange(x.shape[1]) % 2).float(),
        *geometry,
        True,
        list(mask),
    )


def mixed(case: Case, *lists: Tensor | None) -> Call:
    sample = make_tensors(case.but(batch=2 * len(lists)))
    x, w, bias, _, _, *geometry = sample.args
    return "_gathered_conv2d_mixed", (x, w, bias, list(lists), [2] * len(lists), *geometry[:3])


CALLS: dict[str, tuple[Call, str]] = {
    "planes": (forward(POINTWISE, RANDOM), "planar"),
    "strided planes": (forward(POINTWISE.but(stride=(2, 2)), RANDOM), "nhwc pack"),
    "planes of 98 bytes": (forward(POINTWISE.but(size=(7, 7)), RANDOM), "nhwc pack"),
    "rows": (forward(BASE.but(**LAST)), "nhwc"),
    "rows of blocks": (forward(BASE.but(**LAST), BLOCKS), "nhwc"),
    "halo": (forward(BASE, RANDOM), "halo"),
    "packed": (forward(WIDE.but(**LAST), RANDOM), "nhwc pack"),
    "float32": (forward(BASE.but(dtype=torch.float32, **LAST)), "nhwc"),
    "backward of rows": (backward(BASE.but(**LAST), BLOCKS), "input_gradient weight_gradient"),
    "backward, packed": (backward(BASE.but(**LAST), RANDOM), "input_gradient weight_gradient pack"),
    "backward of the input": (backward(BASE.but(**LAST), RANDOM, (True, False, False)), "input_gradient"),
    "backward of the weight": (backward(BASE.but(**LAST), BLOCKS, (False, True, False)), "weight_gradient"),
    "backward of the bias": (backward(BASE, RANDOM, (False, False, True)), ""),
    "backward of planes": (backward(POINTWISE, RANDOM), "input_gradient planar weight_gradient pack"),
    "backward of pointwise rows": (backward(POINTWISE.but(**LAST), BLOCKS), "input_gradient nhwc weight_gradient"),
    "switched": (switched(BASE.but(**LAST)), "switched halo"),
    "switched planes": (switched(POINTWISE), "switched planar"),
    "switched, packed": (switched(WIDE.but(**LAST)), "switched nhwc pack"),
    "switched backward": (switched_backward(BASE.but(**LAST)), "switched input_gradient weight_gradient pack"),
    "switched backward of planes": (switched_backward(BASE), "switched input_gradient weight_gradient pack"),
    "switched backward of the switch": (
        switched_backward(BASE.but(**LAST), (False, False, False, True)),
        "switched input_gradient",
    ),
    "mixed": (mixed(BASE.but(**LAST), None, BLOCKS), "mixed nhwc"),
    "mixed, packed": (mixed(WIDE.but(**LAST), RANDOM, BLOCKS), "mixed nhwc pack"),
    "mixed halo": (mixed(BASE, RANDOM, BLOCKS), "mixed halo"),
}
# What stands behind the kernels that a launch names.
LAUNCHED = {
    "gathered_conv2d": {"nhwc", "input_gradient"},
    "planar_conv2d": {"planar"},
    "warpgroup_conv2d": {"wgmma"},
    "halo_conv2d": {"halo"},
    "weight_gradient": {"weight_gradient"},
    "warpgroup_weight_gradient": {"wgmma_weight_gradient"},
    "channel_pack": {"pack"},
    "channel_unpack": {"pack"},
    "split_epilogue": {"split"},
}


def families(call: Call) -> set[str]:
    return {name.split("/")[1] for name in _C.call_families(*call) if name.startswith("cuda/")}


def launches(call: Call) -> set[str]:
    with bk.use_backend("cuda"), kernels() as names:
        getattr(ops, call[0])(*call[1])
    return {name for name in names if name != "sum_partials"}


@pytest.mark.arch(80)
@pytest.mark.parametrize("name", CALLS)
def test_families_are_those_of_the_launches(name: str) -> None:
    call, expected = CALLS[name]
    assert families(call) == set(expected.split())
    launched = launches(call)
    for kernel in launched:
        assert families(call) & LAUNCHED[kernel], f"{kernel} runs without a family"
    # And no family without a launch, those of an op apart.
    for family in families(call) - {"switched", "mixed", "input_gradient"}:
        assert any(family in LAUNCHED[kernel] for kernel in launched), f"{family} has no launch"


@pytest.mark.arch(90)
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (forward(WIDE.but(size=(16, 16), **LAST)), "wgmma"),
        (mixed(WIDE.but(size=(16, 16), **LAST), None, BLOCKS), "mixed wgmma"),
        (
            backward(BASE.but(in_channels=136, size=(16, 16), **LAST), None, (True, False, False)),
            "input_gradient wgmma",
        ),
    ],
    ids=["forward", "mixed", "backward"],
)
def test_families_with_warpgroups(call: Call, expected: str) -> None:
    assert families(call) == set(expected.split())
    assert launches(call) == {"warpgroup_conv2d"}
    set_device(arch=80)
    assert "wgmma" not in families(call)


@pytest.mark.arch(90)
def test_families_of_the_weights_gradient_with_warpgroups() -> None:
    call = backward(LONG, None, (False, True, False))
    assert families(call) == {"wgmma_weight_gradient"}
    assert launches(call) == {"warpgroup_weight_gradient"}
    set_device(arch=80)
    assert families(call) == {"weight_gradient"}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (forward(LONG), "nhwc split"),
        (forward(LONG, RANDOM_OF_LONG), "nhwc split pack"),
        (mixed(LONG, None, None), "mixed nhwc split"),
        (backward(LONG.but(in_channels=32, out_channels=136), None, (True, False, False)), "input_gradient split"),
        (switched(LONG), "switched nhwc split pack"),
    ],
    ids=["forward", "packed", "mixed", "backward", "switched"],
)
def test_families_of_sums_in_parts(call: Call, expected: str) -> None:
    set_device(132)
    assert families(call) == set(expected.split())
    assert {"gathered_conv2d", "split_epilogue"} <= launches(call)
    # Where tiles fill the device, no family.
    set_device(1)
    assert "split" not in families(call)


@pytest.mark.arch(80)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_families_are_of_the_dtype(dtype: torch.dtype) -> None:
    call = forward(BASE.but(dtype=dtype, **LAST))
    math = {torch.float32: "tf32", torch.float16: "float16"}.get(dtype, "bfloat16")
    assert [name for name in _C.call_families(*call) if name.startswith("cuda/")] == [f"cuda/nhwc/{math}"]


@pytest.mark.arch(80)
def test_calls_that_no_kernel_covers_have_no_family() -> None:
    torch.backends.cudnn.allow_tf32 = False
    assert families(forward(BASE.but(dtype=torch.float32))) == set()
    assert families(forward(BASE.but(dtype=torch.float64))) == set()
    assert families(forward(BASE.but(depthwise=True))) == set()


def seconds(name: str) -> float:
    return 1e-4 if name == "cuda" else 3e-4


@pytest.mark.arch(80)
@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name][1]])
def test_auto_runs_verified_kernels(name: str) -> None:
    call, expected = CALLS[name]
    op, args = call
    device = next(devices)
    table = {name: ("ok", "") for name in _C.call_families(*call) if name.startswith("cuda/")}
    assert {name.split("/")[1] for name in table} == set(expected.split())
    with bk.use_backend("aten"):
        wanted = getattr(ops, op)(*args)
    # One of them is missing: ATen computes.
    for family in table:
        _C.set_verdicts(device, {name: verdict for name, verdict in table.items() if name != family})
        with simulated_gpu(seconds=seconds, number=device) as ran, kernels() as names:
            getattr(ops, op)(*args)
        assert (ran[-1] != "cuda", names) == (True, [])
    _C.set_verdicts(device, table)
    with simulated_gpu(seconds=seconds, number=device) as ran, kernels() as names:
        got = getattr(ops, op)(*args)
    assert ran == ["cuda"]
    assert names
    for one, other in zip(*((y,) if isinstance(y, Tensor) else y for y in (got, wanted)), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.2)


@pytest.mark.arch(80)
def test_another_route_of_the_same_shapes_is_a_case_of_its_own() -> None:
    # Blocks are read where they lie; the other list of as many channels needs an unverified copy.
    device = next(devices)
    _C.set_verdicts(device, {"cuda/nhwc/bfloat16": ("ok", "")})
    scattered = BLOCKS - torch.tensor([1, 0, 0, 0, 0, 0, 0, 0] * 4, dtype=torch.int32)
    for index, expected in ((BLOCKS, "cuda"), (scattered, "gather"), (BLOCKS, "cuda")):
        op, args = forward(WIDE.but(**LAST), index)
        with simulated_gpu(seconds=seconds, number=device) as ran:
            getattr(ops, op)(*args)
        assert ran == [expected]
    assert len(_C.choices()) == 2
