"""Forward of the gathered convolution: one axis at a time around a base case, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import LAYOUTS, LISTS, Case, assert_close, check_forward, make_tensors, run

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

BASE = Case(in_channels=19, out_channels=13, size=(13, 17))
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
named_backends = pytest.mark.parametrize("backend", ["aten", "native"], indirect=True)


def same(kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    return (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)


def axes() -> dict[str, Case]:
    cases = {"base": BASE, "no_bias": BASE.but(bias=False)}
    for kernel in ((1, 1), (3, 2), (1, 3), (2, 2), (5, 5), (7, 7)):
        cases[f"kernel_{kernel[0]}x{kernel[1]}"] = BASE.but(kernel=kernel, padding=same(kernel))
    for stride in ((2, 2), (2, 1), (1, 2), (3, 3), (4, 1)):
        cases[f"stride_{stride[0]}x{stride[1]}"] = BASE.but(stride=stride)
        cases[f"stride_{stride[0]}x{stride[1]}_kernel_1x1"] = BASE.but(stride=stride, kernel=(1, 1), padding=(0,) * 4)
    for padding in ((0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1), (2, 0, 0, 3), (0, 1, 2, 1), (4, 5, 3, 4)):
        cases["padding_" + "".join(map(str, padding))] = BASE.but(padding=padding)
    cases["padded_1x1"] = BASE.but(kernel=(1, 1), padding=(1, 2, 0, 3))
    for dilation in ((2, 2), (2, 1), (1, 3), (3, 2)):
        cases[f"dilation_{dilation[0]}x{dilation[1]}"] = BASE.but(dilation=dilation, padding=(2, 1, 0, 3))
    cases["dilated_strided"] = BASE.but(dilation=(2, 3), stride=(2, 1), kernel=(3, 2), padding=(1, 0, 2, 2))
    for batch in (0, 1, 33):
        cases[f"batch_{batch}"] = BASE.but(batch=batch, size=(6, 7))
    for kind in LISTS:
        cases[f"in_{kind}"] = BASE.but(in_list=kind)
        cases[f"out_{kind}"] = BASE.but(out_list=kind)
        cases[f"both_{kind}"] = BASE.but(in_list=kind, out_list=kind)
        cases[f"in_{kind}_no_bias"] = BASE.but(in_list=kind, out_list="null", bias=False)
    for layout in LAYOUTS:
        for kernel in ((1, 1), (3, 3)):
            cases[f"layout_{layout}_{kernel[0]}"] = BASE.but(layout=layout, kernel=kernel, padding=same(kernel))
        cases[f"weight_{layout}"] = BASE.but(weight_layout=layout)
        cases[f"layout_{layout}_strided"] = BASE.but(layout=layout, stride=(2, 1), padding=(1, 0, 0, 1))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            cases[f"{dtype}_{layout}"[6:]] = BASE.but(dtype=dtype, layout=layout)
            cases[f"{dtype}_{layout}_1x1"[6:]] = BASE.but(dtype=dtype, layout=layout, kernel=(1, 1), padding=(0,) * 4)
    for kernel, stride in (((3, 3), (1, 1)), ((3, 3), (2, 2)), ((5, 5), (1, 2)), ((7, 7), (1, 1)), ((3, 2), (2, 1))):
        for layout in ("contiguous", "channels_last"):
            name = f"depthwise_{kernel[0]}{kernel[1]}_{stride[0]}{stride[1]}_{layout}"
            cases[name] = BASE.but(depthwise=True, kernel=kernel, stride=stride, padding=same(kernel), layout=layout)
    for kind in LISTS:
        cases[f"depthwise_{kind}"] = BASE.but(depthwise=True, in_list=kind, dilation=(2, 1))
    cases["one_pixel_input"] = BASE.but(size=(1, 1))
    cases["one_pixel_output"] = BASE.but(size=(3, 3), padding=(0,) * 4)
    cases["one_channel_each"] = BASE.but(in_channels=1, out_channels=1, in_list="null", out_list="null")
    cases["one_row"] = BASE.but(size=(1, 40))
    cases["one_column"] = BASE.but(size=(40, 1), layout="channels_last")
    return cases


AXES = axes()


@pytest.mark.parametrize("name", AXES)
def test_forward_equals_reference_along_each_axis(name: str, backend: str) -> None:
    ran = check_forward(AXES[name], backend)
    assert ran or AXES[name].depthwise or AXES[name].dtype not in NATIVE_DTYPES


@named_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_forward_is_right_at_tile_edges(backend: str, dtype: torch.dtype, kernel: tuple[int, int], layout: str) -> None:
    # 1 to 40 columns, kept inputs and kept outputs cross every tile edge, together and separately.
    base = Case(1, size=(2, 1), kernel=kernel, padding=same(kernel), layout=layout, dtype=dtype)
    for n in range(1, 41):
        for columns, k_in, k_out in ((n, 3, 5), (9, 3, n), (5, n, 3), (41 - n, n, n)):
            case = base.but(in_channels=k_in + 1, out_channels=k_out + 1, size=(2, columns), seed=n)
            sample = make_tensors(case)
            sample.in_index = torch.arange(1, k_in + 1, dtype=torch.int32)
            sample.out_index = torch.arange(k_out, dtype=torch.int32)
            expected = reference.conv_on_selected(*sample.args)
            assert_close(run(sample, backend), expected, dtype, sample.depth)


@named_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "size", "kernel", "stride"),
    [
        (40, 70, (60, 60), (3, 3), (1, 1)),
        (70, 40, (57, 59), (1, 1), (1, 1)),
        (33, 129, (31, 64), (3, 3), (2, 2)),
        (64, 64, (14, 14), (1, 1), (2, 2)),
        (610, 24, (9, 10), (3, 3), (1, 1)),
        (2100, 17, (7, 7), (1, 1), (1, 1)),
        (8, 300, (12, 33), (5, 5), (1, 1)),
        (3, 64, (60, 60), (7, 7), (2, 2)),
    ],
)
def test_forward_is_right_for_several_tiles(
    backend: str,
    in_channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    layout: str,
) -> None:
    for dtype in NATIVE_DTYPES:
        case = Case(2, in_channels, out_channels, size, kernel, stride, same(kernel), layout=layout, dtype=dtype)
        for lists in (("null", "null"), ("odd", "null"), ("all", "shuffled")):
            sample = make_tensors(case.but(in_list=lists[0], out_list=lists[1], seed=in_channels))
            if lists[0] == "odd":
                sample.in_index = torch.arange(in_channels - 1, dtype=torch.int32)
            expected = reference.conv_on_selected(*sample.args)
            assert_close(run(sample, backend), expected, dtype, sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_null_lists_equal_dense_convolution(layout: str, dtype: torch.dtype) -> None:
    sample = make_tensors(BASE.but(in_list="null", out_list="null", layout=layout, dtype=dtype))
    dense = F.conv2d(sample.input, sample.weight, sample.bias, padding=1)
    actual = run(sample)
    assert actual.stride() == dense.stride()
    assert_close(actual, dense.double(), dtype, sample.depth)


@pytest.mark.parametrize("padding", [0, 1, 3, (1, 0), (0, 2), "same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (4, 5), (1, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_function_paddings_equal_conv2d(padding: object, kernel: tuple[int, int], dilation: object) -> None:
    sample = make_tensors(BASE.but(kernel=kernel, dtype=torch.float64))
    x, weight, bias = sample.input, sample.weight, sample.bias
    actual = bap_kernels.gathered_conv2d(
        x, weight, bias, sample.in_index, sample.out_index, padding=padding, dilation=dilation
    )
    x, weight = x.index_select(1, sample.in_index), weight.index_select(1, sample.in_index)
    expected = F.conv2d(x, weight, bias, padding=padding, dilation=dilation).index_select(1, sample.out_index)
    assert_close(actual, expected, torch.float64, sample.depth)


@pytest.mark.parametrize("stride", [1, 2, (2, 1), (1, 3)])
def test_function_strides_equal_conv2d(stride: object) -> None:
    sample = make_tensors(BASE.but(in_list="null", out_list="null", dtype=torch.float64))
    actual = bap_kernels.gathered_conv2d(sample.input, sample.weight, stride=stride)
    assert_close(actual, F.conv2d(sample.input, sample.weight, stride=stride), torch.float64, sample.depth)


def test_function_with_groups_is_depthwise() -> None:
    sample = make_tensors(BASE.but(depthwise=True))
    actual = bap_kernels.gathered_conv2d(*sample.args[:5], stride=2, padding=1, groups=sample.groups)
    sample.stride = (2, 2)
    assert_close(actual, reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)


@pytest.mark.skipif(_C.unsupported_reason("native") is not None, reason="the native backend cannot run here")
def test_native_runs_depthwise_or_raises_with_reason() -> None:
    case = BASE.but(depthwise=True)
    if not check_forward(case, "native"):
        sample = make_tensors(case)
        reason = _C.explain(*sample.args[:5], *map(list, sample.args[5:8]), sample.groups)["unsupported"]["native"]
        assert "depthwise" in reason or "groups" in reason


def test_strided_lists_are_supported(backend: str) -> None:
    sample = make_tensors(BASE.but(in_list="shuffled", out_list="shuffled"))
    expected = run(sample, backend)
    sample.in_index = torch.stack((sample.in_index, torch.full_like(sample.in_index, -1)), 1)[:, 0]
    assert sample.in_index.stride() != (1,)
    assert torch.equal(run(sample, backend), expected)


def test_inputs_are_not_modified(backend: str) -> None:
    for layout in LAYOUTS:
        sample = make_tensors(BASE.but(layout=layout))
        before = [t.clone() for t in sample.args[:5]]
        run(sample, backend)
        assert all(torch.equal(a, b) for a, b in zip(before, sample.args[:5], strict=True))
