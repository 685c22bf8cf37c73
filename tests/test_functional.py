"""How the Python function interprets its arguments; values are tested with the ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bap_kernels as bk
from bap_kernels.functional import four_sided


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        {"padding": 2, "dilation": 2},
        {"stride": [1, 2], "padding": [0, 2]},
        {"padding": "valid", "stride": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": (3, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3), (3, 2), (2, 4)], ids=str)
def test_options_equal_those_of_conv2d(kernel: tuple[int, int], options: dict) -> None:
    x, w, b = torch.randn(2, 4, 11, 10), torch.randn(5, 4, *kernel), torch.randn(5)
    torch.testing.assert_close(bk.gathered_conv2d(x, w, b, **options), F.conv2d(x, w, b, **options))


@pytest.mark.parametrize("name", ["in_index", "out_index"])
def test_a_list_of_python_numbers_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=rf"gathered_conv2d\(\): expected `{name}` to be an int32 tensor, got a list"):
        bk.gathered_conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3), **{name: [0, 2]})


def test_positional_arguments_have_documented_order() -> None:
    x, w, b = torch.randn(2, 4, 9, 8), torch.randn(4, 1, 3, 3), torch.randn(4)
    lists = torch.tensor([0, 3], dtype=torch.int32)
    actual = bk.gathered_conv2d(x, w, b, lists, lists, (2, 1), (1, 0), (1, 2), 4)
    torch.testing.assert_close(actual, F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 4)[:, [0, 3]])


def test_same_padding_puts_odd_pixel_at_the_end() -> None:
    assert four_sided("f", "same", (4, 3), (1, 1), (1, 2)) == (1, 2, 2, 2)
    assert four_sided("f", "valid", (4, 3), (2, 1), (1, 1)) == (0, 0, 0, 0)
    assert four_sided("f", (1, 2), (4, 3), (2, 1), (1, 1)) == (1, 1, 2, 2)


@pytest.mark.parametrize("padding", ["full", (1, 2, 3), (1,), None, 1.5])
def test_invalid_padding_raises(padding) -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with pytest.raises(ValueError, match=r"gathered_conv2d\(\): expected `padding` to be an int, a pair, 'same' or"):
        bk.gathered_conv2d(x, w, padding=padding)


def test_same_padding_with_stride_raises() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with pytest.raises(ValueError, match=r"gathered_conv2d\(\): expected `stride` to be 1 with padding='same', got"):
        bk.gathered_conv2d(x, w, padding="same", stride=2)


def test_flops_count_kept_channels() -> None:
    x, w = torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(4, 8, 3, 2, requires_grad=True)
    read, write = torch.tensor([1, 2, 6], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        y = bk.gathered_conv2d(x, w, None, read, write)
    forward = 2 * (2 * 2 * 4 * 4) * (3 * 3 * 2)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    with FlopCounterMode(display=False) as counter:
        bk.gathered_conv2d(x.detach(), torch.randn(8, 1, 3, 3), groups=8)
    assert counter.get_total_flops() == 2 * (2 * 8 * 4 * 3) * 9
