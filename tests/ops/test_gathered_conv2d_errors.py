"""Every invalid argument raises the right exception, with argument, rule and value in its message."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import bap_kernels
from bap_kernels.testing import Case, Sample, make_fused, make_tensors

ops = torch.ops.bap_kernels
CASE = Case(in_channels=6, out_channels=5, size=(7, 8))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Invalid:
    """An invalid argument, with the expected exception and parts of its message."""

    argument: str
    value: object
    error: type[Exception]
    rule: str
    value_text: str
    depthwise: bool = False
    # Whether Meta raises as well, because no data is needed.
    on_meta: bool = True
    # Whether the backward, which has no bias, raises as well.
    in_backward: bool = True


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


INVALID = {
    "input_3d": Invalid("input", f32(6, 7, 8), ValueError, "(N, C_in, H, W)", "3 dimensions"),
    "input_5d": Invalid("input", f32(1, 1, 6, 7, 8), ValueError, "(N, C_in, H, W)", "5 dimensions"),
    "input_integer": Invalid("input", f32(2, 6, 7, 8).long(), TypeError, "float32", "Long"),
    "input_complex": Invalid("input", f32(2, 6, 7, 8).cfloat(), TypeError, "float32", "Complex"),
    "weight_3d": Invalid("weight", f32(5, 6, 3), ValueError, "(C_out, C_in / groups, kH, kW)", "3 dimensions"),
    "weight_dtype": Invalid("weight", f32(5, 6, 3, 3).double(), TypeError, "input's dtype", "Double"),
    "weight_channels": Invalid("weight", f32(5, 4, 3, 3), ValueError, "C_in=6", "4"),
    "weight_empty_kernel": Invalid("weight", f32(5, 6, 0, 3), ValueError, "at least 1 x 1", "0 x 3"),
    "bias_dtype": Invalid("bias", f32(5).bfloat16(), TypeError, "input's dtype", "BFloat16", in_backward=False),
    "bias_length": Invalid("bias", f32(4), ValueError, "(5,)", "[4]", in_backward=False),
    "bias_2d": Invalid("bias", f32(5, 1), ValueError, "(5,)", "[5, 1]", in_backward=False),
    "in_index_dtype": Invalid("in_index", ints(0, 1).long(), TypeError, "int32", "Long"),
    "in_index_mask": Invalid("in_index", torch.ones(6, dtype=torch.bool), TypeError, "int32", "Bool"),
    "in_index_2d": Invalid("in_index", ints(0, 1).view(1, 2), ValueError, "1-D", "2 dimensions"),
    "in_index_0d": Invalid("in_index", torch.tensor(1, dtype=torch.int32), ValueError, "1-D", "0 dimensions"),
    "in_index_large": Invalid("in_index", ints(0, 6), IndexError, "0 to 5", "got 6", on_meta=False),
    "in_index_negative": Invalid("in_index", ints(0, -1), IndexError, "0 to 5", "got -1", on_meta=False),
    "in_index_repeated": Invalid("in_index", ints(1, 3, 1), ValueError, "at most once", "channel 1", on_meta=False),
    "in_index_repeated_next": Invalid(
        "in_index", ints(1, 3, 3), ValueError, "at most once", "channel 3", on_meta=False
    ),
    "out_index_dtype": Invalid("out_index", ints(0, 1).float(), TypeError, "int32", "Float"),
    "out_index_2d": Invalid("out_index", ints(0, 1).view(2, 1), ValueError, "1-D", "2 dimensions"),
    "out_index_large": Invalid("out_index", ints(5), IndexError, "0 to 4", "got 5", on_meta=False),
    "out_index_huge": Invalid("out_index", ints(2**31 - 1), IndexError, "0 to 4", "got 2147483647", on_meta=False),
    "out_index_negative": Invalid("out_index", ints(-(2**31)), IndexError, "0 to 4", "got -2147483648", on_meta=False),
    "out_index_repeated": Invalid("out_index", ints(2, 2), ValueError, "at most once", "channel 2", on_meta=False),
    "stride_zero": Invalid("stride", (1, 0), ValueError, "at least 1", "[1, 0]"),
    "stride_negative": Invalid("stride", (-1, 1), ValueError, "at least 1", "[-1, 1]"),
    "stride_length": Invalid("stride", (1, 1, 1), ValueError, "2 entries", "got 3"),
    "padding_negative": Invalid("padding", (0, 0, -1, 0), ValueError, "at least 0", "[0, 0, -1, 0]"),
    "padding_length": Invalid("padding", (1, 1), ValueError, "4 entries", "got 2"),
    "dilation_zero": Invalid("dilation", (0, 1), ValueError, "at least 1", "[0, 1]"),
    "dilation_length": Invalid("dilation", (1, 1, 1), ValueError, "2 entries", "got 3"),
    "kernel_larger_than_input": Invalid("input", f32(2, 6, 1, 0), ValueError, "dilated kernel", "1 x 0"),
    "groups_zero": Invalid("groups", 0, ValueError, "at least 1", "got 0"),
    "groups_unsupported": Invalid("groups", 2, NotImplementedError, "depthwise", "groups=2"),
    "groups_not_depthwise": Invalid("groups", 6, NotImplementedError, "depthwise", "groups=6"),
    "depthwise_multiplier": Invalid(
        "weight", f32(12, 1, 3, 3), NotImplementedError, "depthwise", "C_out=12", depthwise=True
    ),
    "depthwise_one_list": Invalid("out_index", None, ValueError, "equal `out_index`", "None", depthwise=True),
    "depthwise_lengths": Invalid("in_index", ints(0), ValueError, "equal `out_index`", "1 and", depthwise=True),
    "depthwise_lists": Invalid(
        "in_index", ints(0, 1, 2), ValueError, "equal `out_index`", "different", depthwise=True, on_meta=False
    ),
}


def sample_with(invalid: Invalid) -> Sample:
    sample = make_tensors(CASE.but(depthwise=invalid.depthwise))
    if invalid.depthwise:
        sample.in_index = sample.out_index = ints(0, 1, 3)
    setattr(sample, invalid.argument, invalid.value)
    return sample


def backward(sample: Sample) -> object:
    kept = sample.weight.shape[0] if sample.out_index is None else sample.out_index.numel()
    grad = torch.zeros(2, kept, 7, 8, device=sample.input.device)
    return ops.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:], [True, True, True])


CALLS: dict[str, Callable[[Sample], object]] = {
    "gathered_conv2d": lambda s: ops.gathered_conv2d(*s.args),
    "_gathered_conv2d_fused": lambda s: ops._gathered_conv2d_fused(*s.args, None, None, False, None, None, None, False),
    "gathered_conv2d_backward": backward,
}


def assert_message(error: Exception, op: str, argument: str, rule: str, value_text: str) -> None:
    # torch may append its C++ stack to the first line.
    line = str(error).splitlines()[0]
    assert line.startswith(f"{op}(): expected `"), line
    assert f"`{argument}`" in line or argument == "input", line
    assert rule in line, line
    assert value_text.removeprefix("got ") in line.split(", got ", 1)[1], line


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_invalid_argument_raises(name: str, op: str, device: str) -> None:
    invalid = INVALID[name]
    if (device == "meta" and not invalid.on_meta) or (op == "gathered_conv2d_backward" and not invalid.in_backward):
        return
    sample = sample_with(invalid).to(device)
    with pytest.raises(invalid.error) as error:
        CALLS[op](sample)
    # The message may name another argument that violates the rule.
    named = {"depthwise_multiplier": "groups", "depthwise_one_list": "in_index"}.get(name, invalid.argument)
    assert_message(error.value, op, named, invalid.rule, invalid.value_text)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("argument", ["weight", "bias", "in_index", "out_index"])
def test_argument_on_other_device_raises(argument: str, op: str) -> None:
    if argument == "bias" and op == "gathered_conv2d_backward":
        return
    sample = make_tensors(CASE)
    setattr(sample, argument, getattr(sample, argument).to("meta"))
    # A single meta tensor makes the dispatcher choose the Meta kernel, whose check names the argument.
    with pytest.raises(ValueError) as error:
        CALLS[op](sample)
    assert_message(error.value, op, argument, "input's device", "meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 4, 7, 8), (1, 3, 7, 8), (2, 3, 8, 7)])
def test_grad_output_of_wrong_shape_raises(shape: tuple[int, ...], device: str) -> None:
    sample = make_tensors(CASE.but(out_list="null")).to(device)
    sample.out_index = ints(0, 2, 3).to(device)
    args = (torch.zeros(shape, device=device), *sample.args[:2], *sample.args[3:], [True, True, True])
    with pytest.raises(ValueError, match=r"gathered_conv2d_backward\(\): expected `grad_output` to .*got"):
        ops.gathered_conv2d_backward(*args)


def test_grad_output_of_wrong_dtype_raises() -> None:
    sample = make_tensors(CASE)
    grad = torch.zeros(sample.output_shape, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"gathered_conv2d_backward\(\): expected `grad_output` to .*got Double"):
        ops.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:], [True, True, True])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["in_scale", "in_shift", "out_scale", "out_shift", "residual"])
def test_invalid_vector_of_fused_op_raises(name: str, device: str) -> None:
    sample = make_tensors(CASE).to(device)
    good = make_fused(sample, (name,), torch.float32)[name]
    vectors = [
        (good[..., :-1], ValueError),
        (good[None], ValueError),
        (good.double(), TypeError),
        (good.int(), TypeError),
        (good.to("cpu" if device == "meta" else "meta"), ValueError),
    ]
    fused = make_fused(sample, (), torch.float32)
    for vector, error in vectors:
        vector = vector if vector is vectors[-1][0] else vector.to(device)
        with pytest.raises(error, match=rf"_gathered_conv2d_fused\(\): expected `{name}` to .*, got "):
            ops._gathered_conv2d_fused(*sample.args, **(fused | {name: vector}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_invalid_largest_result_of_fused_op_raises(device: str) -> None:
    sample = make_tensors(CASE).to(device)
    relu = make_fused(sample, ("out_relu",), torch.float32)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"expected `out_max` to be above 0, got {value:g}"):
            ops._gathered_conv2d_fused(*sample.args, **relu, out_max=value)
    with pytest.raises(ValueError, match="expected `out_max` only with out_relu=True, got out_max=6"):
        ops._gathered_conv2d_fused(*sample.args, **make_fused(sample, (), torch.float32), out_max=6.0)


INVALID_FOR_FUNCTION = {
    "padding_word": ({"padding": "full"}, ValueError, "padding", "full"),
    "padding_same_strided": ({"padding": "same", "stride": 2}, ValueError, "stride", "(2, 2)"),
    "padding_negative": ({"padding": -1}, ValueError, "padding", "-1"),
    "padding_three": ({"padding": (1, 1, 1)}, ValueError, "padding", "(1, 1, 1)"),
    "stride_zero": ({"stride": 0}, ValueError, "stride", "0"),
    "stride_three": ({"stride": (1, 1, 1)}, ValueError, "stride", "3"),
    "dilation_zero": ({"dilation": (0, 1)}, ValueError, "dilation", "0, 1"),
    "groups": ({"groups": 3}, NotImplementedError, "groups", "3"),
    "in_index_large": ({"in_index": ints(6)}, IndexError, "in_index", "6"),
    "out_index_repeated": ({"out_index": ints(1, 1)}, ValueError, "out_index", "1"),
}


@pytest.mark.parametrize("name", INVALID_FOR_FUNCTION)
def test_invalid_argument_of_function_raises(name: str) -> None:
    kwargs, exception, argument, value_text = INVALID_FOR_FUNCTION[name]
    sample = make_tensors(CASE)
    with pytest.raises(exception) as error:
        bap_kernels.gathered_conv2d(sample.input, sample.weight, sample.bias, **kwargs)
    assert_message(error.value, "gathered_conv2d", argument, "to ", value_text)


def test_failed_calls_do_not_change_later_results() -> None:
    sample = make_tensors(CASE)
    before = ops.gathered_conv2d(*sample.args)
    for invalid in INVALID.values():
        with pytest.raises(invalid.error):
            CALLS["gathered_conv2d"](sample_with(invalid))
    assert torch.equal(ops.gathered_conv2d(*sample.args), before)
