"""NaN in unlisted channels never reaches a result or a gradient; NaN in listed channels always does."""

from __future__ import annotations

import math

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_fused, make_tensors, poison, run, unlisted

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

VALUES = (math.nan, math.inf, -math.inf)
CASES = {
    "3x3": Case(in_channels=21, out_channels=18),
    "1x1": Case(in_channels=35, out_channels=18, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "strided": Case(in_channels=21, out_channels=18, stride=(2, 2)),
    "one": Case(in_channels=21, out_channels=18, in_list="one", out_list="one"),
    "zero": Case(in_channels=21, out_channels=18, in_list="zero"),
    "shuffled": Case(in_channels=21, out_channels=18, in_list="shuffled", out_list="shuffled"),
    "in_only": Case(in_channels=21, out_channels=18, out_list="null"),
    "out_only": Case(in_channels=21, out_channels=18, in_list="null"),
    "depthwise": Case(in_channels=21, depthwise=True),
    "bfloat16": Case(in_channels=40, out_channels=18, dtype=torch.bfloat16),
    "float64": Case(in_channels=21, out_channels=18, dtype=torch.float64),
}


# The native kernels have no float64, and no lists of a depthwise convolution in channels_last.
RUNS = [
    (backend, name)
    for backend in ("aten", "native", "auto")
    for name, case in CASES.items()
    if backend != "native" or not (case.depthwise or case.dtype == torch.float64)
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "stepped"])
@pytest.mark.parametrize(("backend", "name"), RUNS, indirect=["backend"])
def test_unlisted_channels_never_reach_the_output(backend: str, name: str, layout: str, value: float) -> None:
    case = CASES[name].but(layout=layout)
    expected = reference.gathered_conv2d(*make_tensors(case).args)
    sample = poison(make_tensors(case), value)
    assert_close(run(sample, backend), expected, case.dtype, sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masked_candidate_ignores_unlisted_channels(layout: str) -> None:
    # With nearly all channels kept, the dense convolution with zeroed weights is the fastest candidate of "auto".
    case = Case(1, 64, 64, (28, 28), layout=layout, in_list="all", out_list="null")
    for poisoned_first in (True, False):
        sample = make_tensors(case.but(size=(28, 28 + poisoned_first)))
        sample.in_index = torch.arange(1, 64, dtype=torch.int32)
        expected = reference.conv_on_selected(*sample.args)
        if not poisoned_first:
            assert_close(run(sample), expected, case.dtype, sample.depth)
        poison(sample)
        for _ in range(3):
            assert_close(run(sample), expected, case.dtype, sample.depth)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_listed_channels_always_reach_the_output(layout: str, value: float, backend: str) -> None:
    for name in [n for n in ("3x3", "1x1", "shuffled", "bfloat16", "depthwise") if (backend, n) in RUNS]:
        sample = make_tensors(CASES[name].but(layout=layout))
        position = sample.kept[0] - 1
        sample.input[0, int(sample.in_index[position]), 4, 5] = value
        y = run(sample, backend)
        expected = reference.gathered_conv2d(*sample.args)
        assert not expected[0].isfinite().all()
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert torch.equal(y.isnan(), expected.isnan())


def test_zero_weight_does_not_hide_a_nan(backend: str) -> None:
    sample = make_tensors(CASES["3x3"])
    sample.weight.zero_()
    sample.input[:, int(sample.in_index[0])] = math.nan
    assert run(sample, backend).isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_padding_does_not_read_memory_around_the_input(layout: str, backend: str) -> None:
    # Weights that read padding only: each result is the bias.
    case = Case(1, 9, 8, (1, 1), padding=(1, 1, 1, 1), layout="sliced" if layout == "contiguous" else "sliced_last")
    sample = make_tensors(case)
    sample.weight[:, :, 1, 1] = 0
    y = run(sample, backend)
    assert torch.equal(y.flatten(), sample.bias[sample.out_index.long()])


@pytest.mark.parametrize("flags", [(), ("in_shift", "in_relu"), ("in_scale", "out_scale", "out_shift", "out_relu")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_unlisted_channels_never_reach_the_fused_output(layout: str, flags: tuple[str, ...], backend: str) -> None:
    case = CASES["3x3"].but(layout=layout)
    fused = make_fused(make_tensors(case), flags, case.dtype)
    expected = reference.gathered_conv2d_fused(*make_tensors(case).args, **fused)
    sample = poison(make_tensors(case))
    with bap_kernels.use_backend(backend):
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(*sample.args, **fused)
    assert_close(y, expected, case.dtype, 4 * sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["3x3", "1x1", "strided", "shuffled", "depthwise", "bfloat16", "zero"])
def test_unlisted_channels_never_reach_a_gradient(name: str, layout: str) -> None:
    case = CASES[name].but(layout=layout)
    sample = poison(make_tensors(case))
    for leaf in (sample.input, sample.weight, sample.bias):
        leaf.requires_grad_()
    y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
    grads = torch.autograd.grad(y, (sample.input, sample.weight, sample.bias), torch.randn_like(y))
    off_in = unlisted(sample.in_index, sample.input.shape[1])
    off_out = unlisted(sample.out_index, sample.weight.shape[0])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, off_in] == 0).all()
    assert (grads[1][off_out] == 0).all()
    assert (grads[2][off_out] == 0).all()
    if sample.groups == 1:
        assert (grads[1][:, off_in] == 0).all()
