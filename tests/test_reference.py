"""The references: worked examples, and agreement of two implementations."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from bap_kernels import reference
from bap_kernels.testing import (
    LAYOUTS,
    LISTS,
    TOLERANCES,
    Case,
    assert_close,
    index_list,
    lay_out,
    make_tensors,
    poison,
    random_case,
    unlisted,
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_gather_equals_worked_example() -> None:
    x = torch.arange(12.0).view(1, 3, 2, 2)
    w = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]).view(2, 3, 1, 1)
    y = reference.gathered_conv2d(x, w, torch.tensor([0.5, 0.25]), ints(2, 0), ints(1), (1, 1), (0,) * 4, (1, 1))
    assert y.tolist() == [[[[1600.25, 1802.25], [2004.25, 2206.25]]]]


def test_padding_and_dilation_equal_worked_example() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    w = torch.tensor([1.0, 10.0]).view(1, 1, 1, 2)
    y = reference.gathered_conv2d(x, w, None, None, None, (1, 1), (0, 0, 1, 0), (1, 1))
    assert y.flatten().tolist() == [10, 21, 32]
    y = reference.gathered_conv2d(x, w, None, None, None, (1, 2), (0, 0, 0, 3), (1, 2))
    assert y.flatten().tolist() == [31, 3]


def test_fused_transforms_equal_worked_example() -> None:
    x = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1)
    args = (x, torch.ones(1, 2, 1, 1), torch.tensor([3.0]), ints(1, 0), None, (1, 1), (0,) * 4, (1, 1), 1)
    y = reference.gathered_conv2d_fused(
        *args,
        torch.tensor([10.0, 5.0]),
        torch.tensor([1.0, 2.0]),
        True,
        torch.tensor([-1.0]),
        torch.tensor([4.0]),
        torch.tensor([0.5]).view(1, 1, 1, 1),
    )
    # relu(10 * 2 + 1) + relu(5 * -1 + 2) + 3 = 24, then -24 + 4 + 0.5
    assert y.item() == -19.5
    assert reference.gathered_conv2d_fused(*args, out_scale=torch.tensor([-1.0]), out_relu=True).item() == 0


def test_both_references_agree_on_random_cases() -> None:
    for seed in range(100):
        sample = make_tensors(random_case(random.Random(seed)))
        expected = reference.gathered_conv2d(*sample.args)
        assert expected.shape == sample.output_shape
        assert_close(reference.conv_on_selected(*sample.args), expected, torch.float64, sample.depth)


def test_backward_reference_equals_autograd() -> None:
    for seed in range(100):
        sample = make_tensors(random_case(random.Random(seed)).but(dtype=torch.float64, bias=True))
        leaves = [t.requires_grad_() for t in (sample.input, sample.weight, sample.bias)]
        grad = torch.randn(sample.output_shape, dtype=torch.float64)
        y = reference.conv_on_selected(*sample.args)
        expected = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
        gradients = reference.gathered_conv2d_backward(grad, sample.input, sample.weight, *sample.args[3:])
        for a, b in zip(gradients, expected, strict=True):
            assert_close(a, b, torch.float64, 4000)


def test_null_lists_equal_conv2d() -> None:
    sample = make_tensors(Case(in_list="null", out_list="null", stride=(2, 1), dtype=torch.float64))
    expected = F.conv2d(sample.input, sample.weight, sample.bias, (2, 1), 1)
    assert_close(reference.gathered_conv2d(*sample.args), expected, torch.float64, sample.depth)


def test_unsupported_groups_raise() -> None:
    sample = make_tensors(Case(in_list="null", out_list="null"))
    sample.groups = 3
    with pytest.raises(NotImplementedError, match=r"expected `groups` to be 1 or C_in \(12\), got 3"):
        reference.gathered_conv2d(*sample.args)


def test_random_cases_cover_every_kind() -> None:
    cases = [random_case(random.Random(seed)) for seed in range(600)]
    assert {c.layout for c in cases} == set(LAYOUTS)
    assert {c.in_list for c in cases} == {c.out_list for c in cases} == set(LISTS)
    assert {c.dtype for c in cases} == set(TOLERANCES)
    assert sum(c.depthwise for c in cases) > 60
    assert sum(c.padding[0] != c.padding[1] for c in cases) > 60
    assert len({dataclasses.astuple(c) for c in cases}) == 600


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lay_out_keeps_values_and_has_strides_of_layout(layout: str) -> None:
    values = torch.randn(3, 4, 5, 6)
    tensor = lay_out(values, layout)
    assert torch.equal(tensor, values[:1].expand(3, 4, 5, 6) if layout == "expanded" else values)
    strides = {
        "contiguous": (120, 30, 6, 1),
        "channels_last": (120, 1, 24, 4),
        "sliced": (539, 77, 11, 1),
        "sliced_last": (336, 1, 56, 7),
        "stepped": (1440, 360, 36, 3),
        "expanded": (0, 30, 6, 1),
        "transposed": (120, 30, 1, 5),
    }
    assert tensor.stride() == strides[layout]


@pytest.mark.parametrize("kind", LISTS)
def test_index_list_has_the_kind(kind: str) -> None:
    for seed in range(20):
        index = index_list(kind, 9, random.Random(seed))
        if kind == "null":
            assert index is None
            continue
        assert index.dtype == torch.int32
        channels = index.tolist()
        assert len(set(channels)) == len(channels)
        assert all(0 <= c < 9 for c in channels)
        assert kind == "shuffled" or channels == sorted(channels)
        assert len(channels) == {"zero": 0, "one": 1, "all": 9}.get(kind, len(channels))
        assert kind not in ("odd", "shuffled") or len(channels) % 2 == 1


def test_poison_fills_unlisted_channels_only() -> None:
    sample = poison(make_tensors(Case()))
    kept_in, kept_out = sample.in_index.long(), sample.out_index.long()
    assert sample.input.isnan().any(-1).any(-1).any(0).nonzero().flatten().tolist() == unlisted(kept_in, 12).tolist()
    assert sample.weight[kept_out][:, kept_in].isfinite().all()
    assert sample.weight.isfinite().sum() == len(kept_in) * len(kept_out) * 9
    assert sample.bias.isfinite().sum() == len(kept_out)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerances_accept_rounding_only(dtype: torch.dtype) -> None:
    expected = torch.randn(1000, dtype=torch.float64)
    assert_close(expected.to(dtype), expected, dtype, 1)
    wrong = expected.clone()
    wrong[7] += 0.05
    with pytest.raises(AssertionError):
        assert_close(wrong.to(dtype), expected, dtype, 4)
    with pytest.raises(AssertionError):
        assert_close(expected.to(torch.float32), expected.float(), torch.float32, 1)
