"""Lists of read channels, the argument `read` of the switched convolution: searches for wrong ones, errors, opcheck."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor

import bap_kernels as bk

WARNING = "expected the output gradient to be zero in channels that `read` leaves out"
pytestmark = pytest.mark.filterwarnings(f"error:.*{WARNING}")

ops = torch.ops.bap_kernels
# Numbers of readers that no layer has.
numbers = count(1 << 40)


def test_a_listed_channel_is_left_out_unseen_only_between_searches() -> None:
    """The list, not the gradient, decides between searches: that is what makes it worth having."""
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), torch.ones(4)
    read = torch.tensor([True, True, False, True, True, True])
    right = torch.randn(2, 6, 4, 4)
    right[:, 2] = 0
    wrong = right.clone()
    wrong[:, 2] = 1
    number = next(numbers)

    def dx(grad: Tensor, read: Tensor | None, number: int) -> Tensor:
        mask = [True, True, False, True]
        return ops.switched_conv2d_backward(grad, x, w, s, [1, 1], [0] * 4, [1, 1], 1, True, mask, read, number)[0]

    wanted_right, wanted_wrong = dx(right, None, 0), dx(wrong, None, 0)
    assert not torch.equal(wanted_right, wanted_wrong)
    with bk.use_backend("native"):
        assert torch.equal(dx(right, read, number), wanted_right)
        for _ in range(15):
            assert torch.equal(dx(wrong, read, number), wanted_right)
        # The sixteenth call after the search searches again.
        with pytest.warns(UserWarning, match=f"{WARNING}, got other values in channel 2. Hint: something reads"):
            assert torch.equal(dx(wrong, read, number), wanted_wrong)
        for _ in range(20):
            assert torch.equal(dx(wrong, read, number), wanted_wrong)
        # Without a number of the reader every call is searched.
        assert torch.equal(dx(right, read, 0), wanted_right)
        with pytest.warns(UserWarning, match=WARNING):
            assert torch.equal(dx(wrong, read, 0), wanted_wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, w = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 4, 5, 5), (6, 4, 3, 3)))
    s = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    read = torch.ones(6, dtype=torch.bool)
    args = (x, w, None, s, [1, 1], [1] * 4, [1, 1], 1, True, read, next(numbers))
    torch.library.opcheck(ops.switched_conv2d.default, args)
    back = (torch.randn(2, 6, 5, 5, dtype=dtype), x.detach(), w.detach(), s.detach(), *args[4:9], [True] * 4, *args[9:])
    torch.library.opcheck(ops.switched_conv2d_backward.default, back)


@pytest.mark.parametrize("op", ["switched_conv2d", "switched_conv2d_backward"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("private", [False, True])
def test_errors(op: str, device: str, private: bool) -> None:
    x, w, s = (torch.ones(shape, device=device) for shape in ((1, 4, 5, 5), (6, 4, 3, 3), (4,)))
    call = getattr(ops, op if not private else f"_{op.replace('conv2d', 'conv2d_masked')}")

    def run(read: Tensor) -> None:
        rest = ([1, 1], [0] * 4, [1, 1], 1, True)
        if op == "switched_conv2d":
            call(x, w, None, s, *rest, read)
        else:
            call(torch.ones(1, 6, 3, 3, device=device), x, w, s, *rest, [True] * 4, read)

    run(torch.ones(6, dtype=torch.bool, device=device))
    with pytest.raises(TypeError, match=rf"{op}\(\): expected `read` to be bool, got Float. Hint: it says of each"):
        run(torch.ones(6, device=device))
    with pytest.raises(
        ValueError, match=rf"{op}\(\): expected `read` to have the shape \(C_out,\) = \(6,\), got \[4\]"
    ):
        run(torch.ones(4, dtype=torch.bool, device=device))
    other = "meta" if device == "cpu" else "cpu"
    if device == "cpu":
        return
    with pytest.raises(ValueError, match=rf"{op}\(\): expected `read` to be on the input's device meta, got cpu"):
        run(torch.ones(6, dtype=torch.bool, device=other))
