"""The Triton backend as compiled: ops on CPU tensors, their launches executed as PTX for sm_80 and sm_90.

The normal run takes a sample of each kernel; `make test-ptx` every configuration of the table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import Case, check_backward, check_forward, check_fused, make_fused, make_tensors, poison
from bap_kernels.testing import assert_close as assert_close_to
from bap_kernels.testing import run as run_op
from bap_kernels.testing_switched import check_switched, check_switched_backward
from tests.ptx.executor import Options, PtxError
from tests.ptx.faults import TRITON_ROWS, TRITON_WARPGROUPS, Edit
from tests.ptx.triton_door import executing

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the kernels are interpreted in this process", allow_module_level=True)

from bap_kernels.triton import configs

BASE = Case(in_channels=20, out_channels=18, size=(5, 6))
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
ARCHS = (80, 90)
beyond = pytest.mark.beyond_the_sample


def each_with_both(name: str, values: Sequence[Any]) -> Any:
    """A parameter on both architectures; the normal run takes its values on one of them in turn."""
    return pytest.mark.parametrize(
        (name, "arch"),
        [
            pytest.param(value, arch, marks=() if k % 2 == ARCHS.index(arch) else beyond)
            for k, value in enumerate(values)
            for arch in ARCHS
        ],
    )


def blocks_of(b: int, channels: int) -> Tensor:
    """All but the first of the aligned blocks, the last one first."""
    return torch.tensor([b * c + d for c in range(channels // b - 1, 0, -1) for d in range(b)], dtype=torch.int32)


@each_with_both("dtype", DTYPES)
def test_forward(dtype: torch.dtype, arch: int) -> None:
    for number, layout in enumerate(("contiguous", "channels_last", "sliced")):
        with executing(arch, options=Options(seed=number)) as run:
            assert check_forward(BASE.but(layout=layout, dtype=dtype), "triton")
            assert check_forward(POINTWISE.but(layout=layout, dtype=dtype), "triton")
        assert "gathered_conv2d_fwd_kernel" in run.kernels


@each_with_both("dtype", DTYPES)
def test_backward(dtype: torch.dtype, arch: int) -> None:
    with executing(arch, options=Options(seed=1)) as run:
        assert check_backward(BASE.but(layout="channels_last", stride=(2, 1), dtype=dtype), "triton", "channels_last")
        assert check_backward(POINTWISE.but(dtype=dtype), "triton")
    wanted = ("dgrad", "wgrad", "planar", "pack", "sum")
    assert not [part for part in wanted if not any(part in kernel for kernel in run.kernels)]


@each_with_both("layout", ["contiguous", "channels_last"])
def test_fused(layout: str, arch: int) -> None:
    with executing(arch, options=Options(seed=2)):
        for case in (BASE, POINTWISE):
            check_fused(case.but(layout=layout, dtype=torch.bfloat16), FLAGS, "triton")


@pytest.mark.parametrize("arch", ARCHS)
def test_switched(arch: int) -> None:
    with executing(arch, options=Options(seed=3)) as run:
        case = BASE.but(dtype=torch.float16, layout="channels_last")
        assert check_switched(case, "triton")
        assert check_switched_backward(case, "triton", loops=False)
    assert len(set(run.kernels)) > 3


@each_with_both("layout", ["contiguous", "channels_last"])
def test_mixed(layout: str, arch: int) -> None:
    counts, lists = (2, 1, 0, 3), ([*range(8, 16)], [*range(24, 32), *range(8)], [3], [*range(16, 40)])
    indices = [torch.tensor(each, dtype=torch.int32) for each in lists]
    for kernel, padding in (((1, 1), (0, 0, 0, 0)), ((3, 2), (1, 0, 1, 1))):
        x, weight = torch.randn(6, 40, 5, 6).bfloat16(), torch.randn(18, 40, *kernel).bfloat16()
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        options = ((1, 1), padding, (1, 1))
        parts = zip(x.split(list(counts)), indices, strict=True)
        expected = torch.cat([reference.gathered_conv2d(part, weight, None, i, None, *options, 1) for part, i in parts])
        with executing(arch, options=Options(seed=4)), bk.use_backend("triton"):
            y = torch.ops.bap_kernels._gathered_conv2d_mixed(x, weight, None, indices, counts, *options)
        assert_close_to(y, expected, torch.bfloat16, 40 * 6)


def assert_near(actual: Tensor, expected: Tensor, products: str, depth: int) -> None:
    """As ``assert_close``; TF32 operands are cut to 11 bits, mostly towards zero."""
    if products != "tf32":
        assert_close_to(actual, expected, actual.dtype, depth)
        return
    torch.testing.assert_close(actual.double(), expected, rtol=2**-9, atol=6 * depth**0.5 * 2**-11)


def table(archs: tuple[int, ...] = ARCHS) -> list[tuple[int, str, str]]:
    """Architecture, products and class of shapes of every configuration."""
    tables = {arch: configs.architecture(arch).table for arch in archs}
    return [
        (arch, products, shape)
        for arch in archs
        for products in ("16", "tf32", "ieee")
        for shape in configs.TABLE[tables[arch], products]
    ]


def run_configuration(
    arch: int,
    products: str,
    shape: str,
    kind: int,
    options: Options,
    edit: Callable[[str, str], str] | None = None,
    **changes,
) -> list[str]:
    """One forward with a configuration of the table, larger than its tile, ragged on every side."""
    config = configs.TABLE[configs.architecture(arch).table, products][shape]
    dtype = torch.bfloat16 if products == "16" else torch.float32
    channels = 192 if kind > 1 else 2 * config.BK + 12
    case = Case(
        in_channels=channels, out_channels=config.BN + 21, size=(13, 11), in_list="null", dtype=dtype,
        layout="channels_last", batch=2, padding=(1, 0, 1, 1),
    ).but(**changes)  # fmt: skip
    sample = make_tensors(case)
    if kind:
        sample.in_index = blocks_of(kind, channels) if kind > 1 else torch.arange(1, channels, 2, dtype=torch.int32)
        poison(sample)
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    with configs.overriding(config), executing(arch, products == "tf32", options, edit) as run:
        y = run_op(sample, "triton")
    assert_near(y, reference.gathered_conv2d(*sample.args), products, sample.depth)
    return run.modules


@pytest.mark.parametrize(
    ("arch", "shape", "instruction"), [(80, "small", "mma.sync"), (90, "large", "wgmma.mma_async")]
)
def test_large_tiles(arch: int, shape: str, instruction: str) -> None:
    modules = run_configuration(arch, "16", shape, 16, Options(seed=5), size=(9, 8), batch=1, out_channels=70)
    assert instruction in modules[-1]


SIZES = {"size": (9, 8), "batch": 1, "out_channels": 70}
FAULTS = [*((80, "small", edit) for edit in TRITON_ROWS), *((90, "large", edit) for edit in TRITON_WARPGROUPS)]


@pytest.mark.parametrize(
    ("arch", "shape", "edit"),
    [pytest.param(*fault, marks=() if k % 3 == 0 else beyond) for k, fault in enumerate(FAULTS)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_faults_put_in_by_hand_are_found(arch: int, shape: str, edit: Edit) -> None:
    def applied(kernel: str, text: str) -> str:
        return edit(text)

    with pytest.raises((PtxError, AssertionError)) as caught:
        run_configuration(arch, "16", shape, 16, Options(), applied, **SIZES)
    assert re.search(r"line \d+|no thread can go on|not close", str(caught.value))


@beyond
@pytest.mark.parametrize("kind", [0, 1, 8, 16, 32])
@pytest.mark.parametrize(("arch", "products", "shape"), table())
def test_every_configuration(arch: int, products: str, shape: str, kind: int) -> None:
    run_configuration(arch, products, shape, kind, Options(seed=kind, truncate=True))


@beyond
@pytest.mark.parametrize(("arch", "products", "shape"), table())
def test_every_planar_configuration(arch: int, products: str, shape: str) -> None:
    changes = {"layout": "contiguous", "kernel": (1, 1), "padding": (0, 0, 0, 0), "size": (15, 14)}
    for kind in (0, 1, 16):
        run_configuration(arch, products, shape, kind, Options(seed=kind), **changes)


@beyond
@pytest.mark.parametrize(("arch", "products", "shape"), table())
def test_every_gradient_configuration(arch: int, products: str, shape: str) -> None:
    config = configs.TABLE[configs.architecture(arch).table, products][shape]
    dtype = torch.bfloat16 if products == "16" else torch.float32
    torch.backends.cudnn.allow_tf32 = products == "tf32"
    for stride, kind in (((1, 1), 0), ((2, 1), 16)):
        case = Case(in_channels=80, out_channels=90, size=(11, 9), layout="channels_last", dtype=dtype, in_list="null",
                    out_list="null", stride=stride)  # fmt: skip
        sample = make_tensors(case)
        if kind:
            sample.in_index = blocks_of(kind, 80)
        grad = torch.randn(sample.output_shape).to(dtype).contiguous(memory_format=torch.channels_last)
        with (
            configs.overriding(config),
            executing(arch, products == "tf32", Options(seed=kind)),
            bk.use_backend("triton"),
        ):
            got = torch.ops.bap_kernels.gathered_conv2d_backward(
                grad, *sample.args[:2], *sample.args[3:], [True, True, True]
            )
        expected = reference.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:])
        for one, other, depth in zip(got, expected, (90 * 9, grad.numel() // 90, grad.numel() // 90), strict=True):
            assert_near(one, other, products, depth)


@beyond
@pytest.mark.parametrize("seed", range(10))
def test_seeds(seed: int) -> None:
    run_configuration(90, "16", "medium", 8, Options(seed=seed))
    run_configuration(80, "16", "narrow", 16, Options(seed=seed))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_second_store(arch: int) -> None:
    sample = make_tensors(BASE.but(layout="channels_last", out_list="null", dtype=torch.bfloat16))
    fused = make_fused(sample, ("out_scale", "residual", "out_relu"), torch.float32)
    index = torch.tensor([17, 2, 9], dtype=torch.int32)
    with executing(arch, options=Options(seed=6)), bk.use_backend("triton"):
        y, copy = torch.ops.bap_kernels._gathered_conv2d_fused(
            *sample.args, None, None, False, fused["out_scale"], None, fused["residual"], True, dual_store_index=index
        )
    expected = reference.gathered_conv2d_fused(*sample.args, **fused)
    assert_close_to(y, expected, torch.bfloat16, 4 * sample.depth)
    assert torch.equal(copy, y[:, index.long()])
