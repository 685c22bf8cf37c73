"""Correctness gate: results are compared with float64 convolutions of the rounded inputs before they are timed.

A result r of a convolution that sums L = K_in kH kW products passes if, with y the float64 result,
    max |r - y| <= max |y| (8 eps32 sqrt(L) + eps),
where eps32 bounds the float32 accumulation, whose error grows with the square root of its length, and eps (for types
below float32) the rounding of the result. A list that is wrong in one channel errs by about max |y| / sqrt(L), far
above.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.problem import Problem

ACCUMULATION_FACTOR = 8.0


class WrongResultError(AssertionError):
    """The result of a variant is wrong; it must not be timed."""


def tolerance(dtype: torch.dtype, length: int, magnitude: float) -> float:
    """Largest difference from float64 by rounding, for sums of ``length`` products."""
    eps = torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0
    return magnitude * (ACCUMULATION_FACTOR * torch.finfo(torch.float32).eps * math.sqrt(length) + eps)


def check(name: str, result: Tensor, reference: Tensor, length: int) -> float:
    """Compare a result with its float64 reference.

    Args:
        name: Of the variant, for the message.
        result: Of any floating dtype.
        reference: float64, of the same shape.
        length: Number of products summed per element.

    Returns:
        The largest absolute difference.

    Raises:
        WrongResultError: If shapes differ, or the difference is above the tolerance or NaN.
    """
    if result.shape != reference.shape:
        raise WrongResultError(
            f"check(): expected `result` of {name} to have shape {tuple(reference.shape)}, got {tuple(result.shape)}."
        )
    if not reference.numel():
        return 0.0
    error = (result.double() - reference).abs().max().item()
    limit = tolerance(result.dtype, length, reference.abs().max().item())
    if not error <= limit:
        raise WrongResultError(
            f"check(): expected `result` of {name} to be within {limit:.3g} of float64, got {error:.3g}."
        )
    return error


def check_layout(name: str, result: Tensor, layout: str) -> None:
    """Raise unless the result has the memory format of the input, so that all variants do the same work.

    Raises:
        WrongResultError: If the result is in another memory format.
    """
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    if not result.is_contiguous(memory_format=memory_format):
        raise WrongResultError(
            f"check_layout(): expected `result` of {name} to be {layout}, got strides {result.stride()}."
        )


def kept_reference(problem: Problem, x: Tensor) -> Tensor:
    """float64 convolution of the kept channels: (N, K_out, oH, oW)."""
    stride, padding = problem.conv_args
    return F.conv2d(problem.compact(x).double(), problem.sliced_weight.double(), None, stride, padding)


def dense_reference(problem: Problem, x: Tensor) -> Tensor:
    """float64 convolution of all channels: (N, C_out, oH, oW)."""
    stride, padding = problem.conv_args
    return F.conv2d(x.double(), problem.weight.double(), None, stride, padding)
