"""Borders of NaN around what a call is given and around what it makes, in Python and in C++."""

from __future__ import annotations

import pytest
import torch

import bap_kernels as bk
from bap_kernels.testing import LAYOUTS, Case, make_tensors
from bap_kernels.verify.guards import BORDER_BYTES, Guards

CPU = torch.device("cpu")


def around(t: torch.Tensor) -> torch.Tensor:
    """The elements before and behind a dense tensor."""
    border = BORDER_BYTES // t.element_size()
    start = t.storage_offset()
    flat = t.as_strided((border,), (1,), start - border), t.as_strided((border,), (1,), start + t.numel())
    return torch.cat(flat)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_placed_tensors_have_values_strides_and_borders(layout: str) -> None:
    x = make_tensors(Case(layout=layout)).input
    placed = Guards(CPU).place(x)
    torch.testing.assert_close(placed, x, equal_nan=True)
    assert placed.stride() == x.stride()
    assert placed.data_ptr() % 16 == x.data_ptr() % 16
    if layout in ("contiguous", "channels_last"):
        assert around(placed).isnan().all()


def test_lists_have_borders_that_are_no_channels_and_other_arguments_stay() -> None:
    index = torch.tensor([3, 1], dtype=torch.int32)
    placed = Guards(CPU).place((index, None, 2, [index, None]))
    assert placed[1:3] == (None, 2)
    assert placed[3][1] is None
    assert (around(placed[0]) == 2**30).all()
    assert torch.equal(placed[3][0], index)


def test_writes_are_seen() -> None:
    for place, text in ((0, "an argument or the memory around it"), (4, "an argument or"), (-1, "an argument or")):
        guards = Guards(CPU)
        x = guards.place(torch.ones(4))
        assert guards.check() is None
        x.as_strided((1,), (1,), x.storage_offset() + place).fill_(2.0)
        assert str(guards.check()).startswith(text)
    guards = Guards(CPU)
    with guards:
        y = torch.zeros(2, 3)
    assert (y == 0).all()
    assert guards.check() is None
    y.as_strided((1,), (1,), y.storage_offset() + 6).fill_(0.0)
    assert guards.check() == "memory around a tensor (2, 3) was written to"


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("name", ["gathered_conv2d", "gathered_conv2d_backward"])
def test_what_the_ops_make_in_cpp_has_borders(name: str, backend: str) -> None:
    reason = bk.dispatch.unsupported_reason(backend)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    sample = make_tensors(Case(layout="channels_last"))
    op = getattr(torch.ops.bap_kernels, name)
    arguments = sample.args
    if name.endswith("backward"):
        arguments = (torch.randn(sample.output_shape), *arguments[:2], *arguments[3:], (True, True, True))
    with torch.no_grad(), bk.use_backend(backend):
        expected = op(*arguments)
        guards = Guards(CPU)
        placed = guards.place(arguments)
        with guards:
            results = op(*placed)
    assert guards.check() is None
    if name == "gathered_conv2d" and backend == "native":
        assert results.stride() == expected.stride()
        assert around(results).isnan().all()
    torch.testing.assert_close(results, expected)
