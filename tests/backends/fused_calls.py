"""The fused op as ATen computes it: a case, its call and its comparison with the reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close

# Small, but not so small that PyTorch would not hand it to oneDNN.
CASE = Case(2, 20, 18, (9, 14), seed=3)
LAYOUTS = ("contiguous", "channels_last")
NORM = ("out_scale", "out_shift")
# What touches no element, or only makes memory.
FREE = {"empty", "empty_like", "empty_strided", "as_strided", "as_strided_", "resize_", "view", "permute", "slice"}
FREE |= {"narrow", "detach", "to", "contiguous", "expand", "select", "reshape", "alias", "_to_copy", "unsqueeze"}


def run(sample: Sample, fused: dict[str, Any], candidate: str = "gather", **options: Any) -> Tensor:
    return _C.run_aten(*sample.args, **fused, candidate=candidate, **options)


def expected(sample: Sample, fused: dict[str, Any]) -> Tensor:
    return reference.gathered_conv2d_fused(*sample.args, **fused)


def assert_right(y: Tensor, sample: Sample, fused: dict[str, Any]) -> None:
    assert_close(y, expected(sample, fused), sample.input.dtype, 4 * sample.depth + 4)
