"""The native backward on shapes with several chunks, slabs and threads, and the work that it skips."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bap_kernels
from bap_kernels import _C

pytestmark = [
    pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native"))),
    pytest.mark.usefixtures("nan_filled_empty"),
]

gathered = torch.ops.bap_kernels.gathered_conv2d_backward
switched = torch.ops.bap_kernels.switched_conv2d_backward
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (batch, C_in, C_out, size, kernel, stride, padding), covering every partition of the work.
SHAPES = {
    "rows_of_one_image": (1, 24, 40, (70, 64), (3, 3), (1, 1), (1, 1, 1, 1)),
    "rows_and_images": (5, 64, 48, (56, 56), (3, 3), (1, 1), (1, 1, 1, 1)),
    "images": (33, 40, 20, (7, 7), (3, 3), (1, 1), (1, 1, 1, 1)),
    "uneven_images": (7, 96, 33, (14, 14), (1, 1), (1, 1), (0, 0, 0, 0)),
    "stride_2": (6, 48, 64, (29, 28), (3, 3), (2, 2), (1, 1, 1, 1)),
    "stride_2_of_a_pixel": (6, 64, 80, (28, 30), (1, 1), (2, 2), (0, 0, 0, 0)),
    "stride_3_1_uneven": (4, 33, 17, (40, 41), (5, 3), (3, 1), (2, 0, 0, 3)),
    "stem": (4, 3, 64, (64, 64), (7, 7), (2, 2), (3, 3, 3, 3)),
    "deep": (2, 320, 272, (7, 7), (3, 3), (1, 1), (1, 1, 1, 1)),
    "deep_pixel": (8, 512, 128, (14, 14), (1, 1), (1, 1), (0, 0, 0, 0)),
    "wide_row": (1, 8, 16, (3, 3000), (3, 3), (1, 1), (1, 1, 1, 1)),
}


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Problem:
    """Tensors of one shape; half of the channels are listed; optionally every third channel of grad_output is zero."""

    def __init__(self, name: str, layout: str, dtype: torch.dtype = torch.float32, zeros: bool = False) -> None:
        batch, C_in, C_out, size, kernel, self.stride, self.padding = SHAPES[name]
        generator = torch.Generator().manual_seed(len(name))

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.x = randn(batch, C_in, *size).contiguous(memory_format=FORMATS[layout])
        self.w = randn(C_out, C_in, *kernel)
        self.on = torch.randperm(C_in, generator=generator)[: (C_in + 1) // 2].sort().values.int()
        self.dy = torch.empty_like(self.convolve(self.x, self.w)).copy_(
            randn(*self.convolve(self.x[:, :1], self.w[:, :1]).shape)
        )
        if zeros:
            self.dy[:, ::3] = 0

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        top, bottom, left, right = self.padding
        return F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, self.stride)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return float64 gradients of input, weight and switch, by autograd."""
        x, w = self.x.double().requires_grad_(), self.w.double().requires_grad_()
        s = self.switch().double().requires_grad_()
        return torch.autograd.grad(self.convolve(x * s.view(1, -1, 1, 1), w), (x, w, s), self.dy.double())

    def switch(self) -> Tensor:
        return torch.zeros(self.x.shape[1]).index_fill_(0, self.on.long(), 1)

    def gathered(self) -> tuple[Tensor, ...]:
        with bap_kernels.use_backend("native"):
            return gathered(
                self.dy, self.x, self.w, self.on, None, self.stride, self.padding, (1, 1), 1, (True, True, True)
            )

    def switched(self, off_gradient: bool = True) -> tuple[Tensor, ...]:
        with bap_kernels.use_backend("native"):
            return switched(
                *(self.dy, self.x, self.w, self.switch(), self.stride, self.padding, (1, 1), 1, off_gradient),
                (True, True, True, True),
            )


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    bound = (2e-5 if dtype == torch.float32 else 1e-2) * scale
    assert (actual.double() - expected).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_autograd(name: str, layout: str, dtype: torch.dtype) -> None:
    problem = Problem(name, layout, dtype)
    dx, dw, ds = problem.expected()
    result = problem.gathered()
    assert_near(result[0], dx, dtype)
    assert_near(result[1], dw, dtype)
    assert_near(result[2], problem.dy.double().sum((0, 2, 3)), dtype)
    result = problem.switched()
    assert_near(result[0], dx, dtype)
    assert_near(result[1], dw, dtype)
    # Products have the inputs' dtype, sums at least float32.
    assert_near(result[3], ds, torch.float32)
    off = problem.switch() == 0
    assert not result[0][:, off].any()
    assert not result[1][:, off].any()
    partly = problem.switched(off_gradient=False)[3]
    assert not partly[off].any()
    assert_near(partly[~off], ds[~off], torch.float32)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_bit_equal_over_runs_and_threads(name: str, layout: str) -> None:
    problem = Problem(name, layout)
    torch.set_num_threads(2)
    first = (*problem.gathered(), *problem.switched())
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        for one, other in zip(first, (*problem.gathered(), *problem.switched()), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_are_bit_equal_over_fifty_runs(layout: str) -> None:
    problem = Problem("stride_2", layout)
    torch.set_num_threads(2)
    first = problem.switched()
    for _ in range(50):
        assert all(itertools.starmap(torch.equal, zip(first, problem.switched(), strict=True)))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_zero_channels_of_grad_output_are_skipped(name: str, layout: str) -> None:
    problem = Problem(name, layout, zeros=True)
    dx, dw, ds = problem.expected()
    # Channels that are not read may hold NaN.
    problem.w[::3] = torch.nan
    result = problem.switched()
    assert_near(result[0], dx, torch.float32)
    assert_near(result[1], dw, torch.float32)
    assert_near(result[3], ds, torch.float32)
    assert_near(problem.gathered()[0], dx, torch.float32)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("place", [(0, 0, 0), (3, 13, 17), (5, 14, 13)])
def test_channel_with_a_single_nonzero_is_not_skipped(layout: str, value: float, place: tuple[int, int, int]) -> None:
    problem = Problem("stride_2", layout, zeros=True)
    n, h, w = place
    problem.dy[n, 3, min(h, problem.dy.shape[2] - 1), min(w, problem.dy.shape[3] - 1)] = value
    dw = problem.gathered()[1][3]
    assert bool(dw.any())
    assert not bool(problem.gathered()[1][6].any())


@pytest.mark.parametrize("layout", FORMATS)
def test_channel_of_minus_zeros_is_skipped(layout: str) -> None:
    problem = Problem("images", layout, zeros=True)
    problem.dy[:, ::3] = -0.0
    problem.w[::3] = torch.nan
    assert bool(problem.switched()[0].isfinite().all())


@pytest.mark.parametrize("layout", FORMATS)
def test_zero_grad_output_gives_zero_gradients(layout: str) -> None:
    problem = Problem("images", layout)
    problem.dy.zero_()
    for gradient in problem.switched():
        assert not bool(gradient.any())


@pytest.mark.parametrize("layout", FORMATS)
def test_memory_stays_below_a_full_input_gradient(layout: str) -> None:
    """One channel is on and 511 are off."""
    x = torch.randn(8, 512, 28, 28).contiguous(memory_format=FORMATS[layout])
    w, dy = torch.randn(16, 512, 1, 1), torch.randn(8, 16, 28, 28).contiguous(memory_format=FORMATS[layout])
    switch = torch.zeros(512).index_fill_(0, torch.tensor([5]), 1)
    args = (dy, x, w, switch, (1, 1), (0, 0, 0, 0), (1, 1), 1, True)
    with bap_kernels.use_backend("native"):
        switched(*args, (False, False, False, True))
        with torch.profiler.profile(profile_memory=True) as profile:
            ds = switched(*args, (False, False, False, True))[3]
    asked = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert asked < x.numel() * 4 / 20
    expected = torch.einsum("nchw,nkhw,kc->c", x.double(), dy.double(), w[:, :, 0, 0].double())
    assert_near(ds, expected, torch.float32)
