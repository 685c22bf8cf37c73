"""The fused op with compact inputs, and with residuals that are part of a wider tensor."""

from __future__ import annotations

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_tensors

ops = torch.ops.bap_kernels
GEOMETRY = ((1, 1), (1, 1, 1, 1), (1, 1), 1)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_compact_input_equals_full_input(
    kernel: tuple[int, int], dtype: torch.dtype, layout: str, backend: str
) -> None:
    pad = kernel[0] // 2
    case = Case(in_channels=19, out_channels=40, kernel=kernel, padding=(pad,) * 4, dtype=dtype, layout=layout)
    sample = make_tensors(case.but(in_list="null"))
    stored = ints(3, 17, 4, 0, 12, 9, 5)
    compact = torch.zeros_like(sample.input)[:, :7].copy_(sample.input[:, stored.long()])
    fused = {"in_scale": torch.rand(4) + 0.5, "in_shift": torch.randn(4), "in_relu": True, "out_shift": None}
    for in_index, read in ((None, stored), (ints(6, 1, 2, 3), stored[[6, 1, 2, 3]])):
        given = fused if in_index is not None else {}
        args = (sample.input, sample.weight, sample.bias, read, *sample.args[4:])
        expected = reference.gathered_conv2d_fused(*args, **given)
        fill = dict.fromkeys(("in_scale", "in_shift", "out_scale", "out_shift", "residual"))
        options = {**fill, "in_relu": False, "out_relu": False, **given, "weight_index": read}
        for cached in (True, True, False):
            with bap_kernels.use_backend(backend):
                y, _ = ops._gathered_conv2d_fused(
                    compact, *sample.args[1:3], in_index, *sample.args[4:], **options, cache_packed=cached
                )
            assert_close(y, expected, dtype, 4 * sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 6, 5), (1, 7, 7), (3, 1, 4), (1, 1, 1)])
def test_residual_may_be_part_of_a_wider_tensor(
    size: tuple[int, int, int], dtype: torch.dtype, layout: str, backend: str
) -> None:
    N, H, W = size
    case = Case(N, 12, 33, (H, W), in_list="null", out_list="null", layout=layout, dtype=dtype)
    sample = make_tensors(case)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    wide = torch.randn(N, 50, H, W, dtype=dtype).contiguous(memory_format=memory_format)
    for residual in (wide[:, :33], wide[:, 7:40], wide[:, 7:8].expand(-1, 33, -1, -1), wide[:, 1:34].flip(3)):
        expected = reference.gathered_conv2d_fused(*sample.args, residual=residual)
        with bap_kernels.use_backend(backend):
            y, _ = ops._gathered_conv2d_fused(*sample.args, None, None, False, None, None, residual, False)
        assert_close(y, expected, dtype, 4 * sample.depth)


def test_invalid_compact_input_raises() -> None:
    x, w = torch.randn(1, 5, 6, 6), torch.randn(4, 9, 3, 3)

    def call(in_index: torch.Tensor | None, weight_index: torch.Tensor, groups: int = 1) -> torch.Tensor:
        geometry = (*GEOMETRY[:3], groups)
        fusion = (None, None, False, None, None, None, False, False)
        return ops._gathered_conv2d_fused(x, w, None, in_index, None, *geometry, *fusion, weight_index)[0]

    assert call(ints(0, 4), ints(8, 2)).shape == (1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"expected `weight_index` to have one entry for each of the 5 channels that"):
        call(None, ints(1, 2))
    with pytest.raises(ValueError, match=r"expected `weight_index` to have one entry for each of the 2 channels that"):
        call(ints(1, 2), ints(1, 2, 3))
    with pytest.raises(IndexError, match=r"expected `weight_index` to hold channel numbers from 0 to 8, got 9"):
        call(ints(1, 2), ints(1, 9))
    with pytest.raises(ValueError, match=r"expected `weight_index` to hold each channel at most once, got channel 3"):
        call(ints(1, 2), ints(3, 3))
    with pytest.raises(TypeError, match=r"expected `weight_index` to be an int32 list, got Long"):
        call(ints(1, 2), torch.tensor([1, 2]))
    with pytest.raises(NotImplementedError, match=r"expected `weight_index` only with groups=1, got groups=5"):
        call(ints(1, 2), ints(1, 2), groups=5)


def test_meta_kernel_has_shape_of_result() -> None:
    x, w = torch.randn(2, 5, 6, 6).to("meta"), torch.randn(4, 9, 3, 3).to("meta")
    y, _ = ops._gathered_conv2d_fused(
        x,
        w,
        None,
        None,
        None,
        *GEOMETRY,
        None,
        None,
        False,
        None,
        None,
        None,
        False,
        False,
        ints(0, 1, 2, 3, 8).to("meta"),
    )
    assert y.shape == (2, 4, 6, 6)
