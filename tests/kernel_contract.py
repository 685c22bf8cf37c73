"""Tests of a backend with its own kernels, inherited by the test classes of tests/interpret and tests/ptx/cuda.

Each of these folders runs in a separate process (make test-interpret, make test-ptx).
"""

from __future__ import annotations

import random

import pytest
import torch

from bap_kernels.testing import LAYOUTS, LISTS, Case, check_backward, check_forward, check_fused, random_case

# As `TOLERANCES`, of float32 where convolutions round their operands to the eleven bits of TF32.
TF32 = (2e-3, 3e-3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu", "out_max")
GRAD_LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def affordable(case: Case, margin: int, most_in: int, most_out: int) -> Case:
    """Reduce a random case to sizes that an interpreter can run, and to dtypes of the kernels."""
    extent = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    return case.but(
        dtype=torch.float32 if case.dtype == torch.float64 else case.dtype,
        depthwise=False,
        size=(min(case.size[0], extent[0] + margin), min(case.size[1], extent[1] + margin)),
        batch=min(case.batch, 2),
        in_channels=min(case.in_channels, most_in),
        out_channels=min(case.out_channels, most_out),
    )


def layout_of(in_list: str, out_list: str) -> str:
    """Return a layout for a pair of lists, so that each kind of list occurs with both layouts."""
    return ("contiguous", "channels_last")[(LISTS.index(in_list) + LISTS.index(out_list)) % 2]


class Contract:
    """Attributes that the test classes of a folder set.

    Args:
        backend: Name of the backend.
        base, pointwise: A 3x3 and a 1x1 case whose sizes are no multiples of a tile.
        most: Largest channel counts of random cases.
    """

    backend: str
    base: Case
    pointwise: Case
    most: tuple[int, int] = (80, 80)


class ForwardContract(Contract):
    """Forward of the op, one axis at a time, against the loops of the reference."""

    def runs(self, case: Case) -> None:
        assert check_forward(case, self.backend)

    def runs_fused(self, case: Case, flags: tuple[str, ...] | list[str], **options) -> None:
        assert check_fused(case, flags, self.backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
    def test_kernels_and_dtypes(self, kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
        padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
        for stride in ((1, 1), (2, 1)):
            self.runs(self.base.but(kernel=kernel, padding=padding, stride=stride, layout=layout, dtype=dtype))

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout: str, kernel: tuple[int, int]) -> None:
        self.runs(self.base.but(layout=layout, kernel=kernel, weight_layout="transposed"))

    @pytest.mark.parametrize("out_list", LISTS)
    @pytest.mark.parametrize("in_list", LISTS)
    def test_lists(self, in_list: str, out_list: str) -> None:
        case = self.pointwise.but(in_list=in_list, out_list=out_list, layout=layout_of(in_list, out_list))
        self.runs(case.but(bias=out_list != "null"))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches(self, batch: int) -> None:
        self.runs(self.base.but(batch=batch))
        self.runs(self.pointwise.but(batch=batch))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_uneven_padding_dilation_and_strides(self, layout: str) -> None:
        base = self.base.but(layout=layout)
        self.runs(base.but(padding=(2, 0, 1, 3), dilation=(2, 1)))
        self.runs(base.but(padding=(0, 0, 0, 0), stride=(2, 3)))
        self.runs(base.but(kernel=(5, 7), padding=(4, 4, 6, 6), size=(1, 3), in_channels=3))
        # Padding of a 1x1 kernel: outputs that read padding only.
        self.runs(self.pointwise.but(padding=(1, 2, 0, 1), stride=(2, 1), layout=layout))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_everything_fused(self, layout: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
        # Few channels, because the 16-bit rounding of the prologue adds to the error of every term.
        case = self.base.but(in_channels=20, out_channels=18, layout=layout, kernel=kernel, dtype=dtype)
        self.runs_fused(case, FLAGS, residual_layout="contiguous")
        self.runs_fused(case, FLAGS, residual_layout="channels_last")
        self.runs_fused(case, FLAGS[3:], vector_dtype=torch.float32)

    @pytest.mark.parametrize("flag", FLAGS)
    def test_each_fused_part(self, flag: str) -> None:
        for case in (self.pointwise, self.pointwise.but(layout="channels_last"), self.base.but(bias=False)):
            self.runs_fused(case, (flag,), vector_dtype=torch.float32)

    @pytest.mark.parametrize("residual", LAYOUTS)
    def test_residuals_of_every_layout(self, residual: str) -> None:
        for case in (self.pointwise, self.pointwise.but(layout="channels_last", out_list="null")):
            self.runs_fused(case, ("residual", "out_relu"), residual_layout=residual)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
    def test_dual_stores(self, layout: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
        case = self.base.but(layout=layout, kernel=kernel, dtype=dtype, out_list="null")
        # With a separate residual, and with a prologue, which has its own code path.
        self.runs_fused(case, ("out_scale", "residual", "out_relu"), vector_dtype=torch.float32, dual_store="odd")
        self.runs_fused(case, ("in_shift", "in_relu"), vector_dtype=torch.float32, dual_store="shuffled")

    @pytest.mark.parametrize("dual_store", [kind for kind in LISTS if kind != "null"])
    def test_lists_of_dual_stores(self, dual_store: str) -> None:
        for case in (self.pointwise, self.pointwise.but(layout="channels_last", out_list="null"), self.base):
            self.runs_fused(case, ("residual",), dual_store=dual_store)
        self.runs_fused(self.base.but(batch=0), (), dual_store=dual_store)

    @pytest.mark.parametrize("seed", range(30))
    def test_random_cases(self, seed: int) -> None:
        self.runs(affordable(random_case(random.Random(seed)), 6, *self.most))
        case = affordable(random_case(random.Random(seed + 100)), 6, *self.most)
        dual_store = random.Random(seed).choice((None, "odd", "shuffled"))
        self.runs_fused(case, random.Random(seed).sample(FLAGS, 3), dual_store=dual_store)


class BackwardContract(Contract):
    """Gradients of the op, one axis at a time, against the loops of the reference."""

    def runs(self, case: Case, grad_layout: str = "contiguous") -> None:
        assert check_backward(case, self.backend, grad_layout)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
    def test_kernels_and_dtypes(self, kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
        padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
        self.runs(self.base.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype), layout)

    @pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 3)])
    @pytest.mark.parametrize("stride", [(1, 2), (2, 2), (2, 3), (4, 2)])
    def test_parities(self, stride: tuple[int, int], dilation: tuple[int, int]) -> None:
        case = self.base.but(size=(6, 7), batch=1, in_channels=9, out_channels=17, stride=stride, dilation=dilation)
        for kernel, padding in (((3, 3), (1, 1, 1, 1)), ((2, 4), (0, 3, 2, 1)), ((1, 1), (0, 0, 0, 0))):
            self.runs(case.but(kernel=kernel, padding=padding))

    @pytest.mark.parametrize("out_list", LISTS)
    @pytest.mark.parametrize("in_list", LISTS)
    def test_lists(self, in_list: str, out_list: str) -> None:
        layout = layout_of(in_list, out_list)
        self.runs(self.pointwise.but(in_list=in_list, out_list=out_list, layout=layout), layout)

    @pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout: str, grad_layout: str) -> None:
        odd = (LAYOUTS.index(layout) + GRAD_LAYOUTS.index(grad_layout)) % 2
        case = self.base if odd else self.pointwise
        self.runs(case.but(layout=layout, weight_layout="channels_last"), grad_layout)

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches(self, batch: int) -> None:
        self.runs(self.base.but(batch=batch, bias=False))

    @pytest.mark.parametrize("seed", range(16))
    def test_random_cases(self, seed: int) -> None:
        case = affordable(random_case(random.Random(seed + 500)), 5, *self.most)
        self.runs(case, random.Random(seed).choice(GRAD_LAYOUTS))
