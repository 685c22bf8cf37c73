"""The contract of the gradients, those of switches, and what belongs to these kernels alone: tiles, blocks, chunks."""

from __future__ import annotations

import pytest
import torch

import bap_kernels
from bap_kernels.testing import LISTS, Case, check_backward, make_tensors
from bap_kernels.testing_switched import check_switched, check_switched_backward
from tests.kernel_contract import DTYPES, BackwardContract
from tests.ptx.cuda import device

BASE = Case(in_channels=18, out_channels=20, size=(5, 6))
WIDE = Case(in_channels=136, out_channels=144, size=(9, 9), batch=1)
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), size=(4, 8))


class TestBackward(BackwardContract):
    backend = "cuda"
    base = BASE
    pointwise = POINTWISE


def runs(case: Case, grad_layout: str = "contiguous") -> None:
    assert check_backward(case, "cuda", grad_layout)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tiles(dtype: torch.dtype) -> None:
    runs(WIDE.but(dtype=dtype, layout="channels_last", in_list="all", out_list="null"), "channels_last")


@pytest.mark.parametrize("b", [8, 16])
def test_blocks(b: int) -> None:
    for kernel, padding in (((1, 1), (0,) * 4), ((3, 3), (1,) * 4)):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(in_channels=48, kernel=kernel, padding=padding, layout="channels_last", dtype=dtype)
            sample = make_tensors(case)
            sample.in_index = torch.tensor([c for c in range(48) if c // b % 3 != 1], dtype=torch.int32)
            sample.input.requires_grad_()
            sample.weight.requires_grad_()
            grads = {}
            for backend in ("cuda", "aten"):
                with bap_kernels.use_backend(backend):
                    y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
                    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
                    grads[backend] = torch.autograd.grad(y, (sample.input, sample.weight), g)
            for one, other in zip(grads["cuda"], grads["aten"], strict=True):
                tolerance = 0.05 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_results_do_not_vary() -> None:
    sample = make_tensors(BASE.but(batch=4, size=(9, 9)))
    op = torch.ops.bap_kernels.gathered_conv2d_backward
    grad = torch.randn(sample.output_shape)
    arguments = (grad, *sample.args[:2], *sample.args[3:], (True, True, True))
    # Many SMs: the pixels are cut into chunks.
    device.set_device(sm_count=100)
    with bap_kernels.use_backend("cuda"):
        first, second = op(*arguments), op(*arguments)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sm_count", [1, 8, 1000])
def test_chunks_of_pixels(sm_count: int) -> None:
    device.set_device(sm_count)
    for dtype in (torch.float32, torch.bfloat16):
        runs(BASE.but(batch=5, size=(13, 11), kernel=(1, 1), padding=(0,) * 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_phases_than_a_launch_holds(dtype: torch.dtype) -> None:
    # 10 x 9 phases, in 2 x 2 launches; some of them meet no tap.
    case = BASE.but(size=(13, 20), stride=(10, 9), kernel=(4, 11), padding=(2, 1, 0, 3), dtype=dtype)
    runs(case.but(layout="channels_last"), "channels_last")
    check_switched_backward(case.but(in_list="odd"), "cuda", case.layout, True)


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("kind", LISTS)
def test_switches(kind: str, off_gradient: bool) -> None:
    for case in (BASE.but(in_list=kind), POINTWISE.but(in_list=kind, layout="channels_last")):
        check_switched(case, "cuda")
        check_switched_backward(case, "cuda", case.layout, off_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_switches_of_strided_layers(stride: tuple[int, int], dtype: torch.dtype) -> None:
    case = WIDE.but(stride=stride, dtype=dtype, layout="channels_last")
    check_switched(case, "cuda")
    check_switched_backward(case, "cuda", "channels_last")


def test_switches_without_a_gradient_of_the_input() -> None:
    case = POINTWISE.but(in_channels=24)
    sample = make_tensors(case)
    switch = torch.tensor([c % 3 != 0 for c in range(24)]).float().requires_grad_()
    results = {}
    for backend in ("cuda", "aten"):
        with bap_kernels.use_backend(backend):
            y = torch.ops.bap_kernels.switched_conv2d(
                sample.input, sample.weight, sample.bias, switch, [1, 1], [0] * 4, [1, 1], 1
            )
            (results[backend],) = torch.autograd.grad(y.square().sum(), switch)
    torch.testing.assert_close(results["cuda"], results["aten"], rtol=1e-2, atol=1e-2)
