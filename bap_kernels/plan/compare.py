"""How far two results are from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._values import holds_values
from bap_kernels.flow.arguments import tensors_of
from bap_kernels.flow.norms import norm_parts

__all__ = ["PlanDiffersError", "compared", "largest_error", "not_finite", "tolerance_of"]

# Share of the largest number in the result: rounding through a hundred layers stays far below, a wrong channel in one
# layer is far above.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_INFINITE = (float("inf"), float("inf"), torch.float64)
_NONE = (0.0, 0.0, torch.float64)


class PlanDiffersError(RuntimeError):
    """A plan's result is not that of its model, or cannot be compared with it."""


def tolerance_of(dtype: torch.dtype, cast: torch.dtype | None = None) -> float:
    """The largest difference that passes, as a share of the largest number in a result.

    Args:
        dtype: the result's.
        cast: the dtype in which autocast computed it.
    """
    return max(_TOLERANCES.get(dtype, 0.0), 0.0 if cast is None else _TOLERANCES.get(cast, 0.0))


def _of_tensors(got: Any, expected: Tensor) -> tuple[float, float, torch.dtype]:
    dtype = expected.dtype
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != dtype:
        return float("inf"), float("inf"), dtype
    if expected.numel() == 0:
        return _NONE
    if not expected.is_floating_point() or expected.layout != torch.strided:
        return _NONE if torch.equal(got, expected) else _INFINITE
    a, b = got.double(), expected.double()
    # Equal infinities and NaN are no error.
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill(same, 0.0).max().item()
    if not error < float("inf"):
        return float("inf"), error, dtype
    largest = b.masked_fill(~b.isfinite(), 0.0).abs().max().item()
    return error / max(largest, 1e-30), error, dtype


def largest_error(got: Any, expected: Any) -> tuple[float, float, torch.dtype]:
    """(largest error as a share of the largest number, the error itself, dtype) over all tensors of a result."""
    if isinstance(expected, Tensor):
        return _of_tensors(got, expected)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or list(got) != list(expected):
            return _INFINITE
        return largest_error(list(got.values()), list(expected.values()))
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return _INFINITE
        return max((largest_error(*pair) for pair in zip(got, expected, strict=True)), key=_share, default=_NONE)
    if dataclasses.is_dataclass(expected) and not isinstance(expected, type):
        if type(got) is not type(expected):
            return _INFINITE
        names = [field.name for field in dataclasses.fields(expected)]
        return largest_error([getattr(got, name) for name in names], [getattr(expected, name) for name in names])
    if hasattr(expected, "__dict__") and not callable(expected):
        return largest_error(vars(got), vars(expected)) if type(got) is type(expected) else _INFINITE
    if isinstance(expected, float) and expected != expected:
        return _NONE if got != got else _INFINITE
    return _NONE if got == expected else _INFINITE


def not_finite(modules: Mapping[str, nn.Module], inputs: tuple[Any, ...] = ()) -> str:
    """The first NaN or infinity in the parameters of convolutions and batch norms, or in inputs; "" if there is none.

    A channel that is left out counts as zeros; zero times NaN or infinity would be NaN.
    """
    tensors = {f"input {number}": tensor for number, tensor in enumerate(tensors_of(inputs))}
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d) or norm_parts(module) is not None:
            held = {**module._parameters, **module._buffers}
            tensors |= {f"{name}.{key}".removeprefix("."): value for key, value in held.items() if value is not None}
    for what, tensor in tensors.items():
        if not tensor.is_floating_point() or not holds_values(tensor):
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            return f"{bad} of {tensor.numel()} that are NaN or infinite in {what}"
    return ""


def compared(
    result: Any,
    expected: Any,
    tolerance: float | None,
    cast: torch.dtype | None,
    model: nn.Module,
    inputs: tuple[Any, ...],
) -> float:
    """The largest difference of a plan's result from that of its model, as a share of its largest number.

    Args:
        result: the plan's.
        expected: the masked dense network's.
        tolerance: the largest difference that passes; None: that of the dtypes.
        cast: the dtype in which autocast computed it.
        model, inputs: what was run.

    Raises:
        PlanDiffersError: if it is larger, or if numbers that are not finite prevent a comparison.
    """
    share, error, dtype = largest_error(result, expected)
    limit = tolerance_of(dtype, cast) if tolerance is None else tolerance
    if share <= limit:
        return share
    bad = not_finite(dict(model.named_modules()), inputs)
    if bad:
        raise PlanDiffersError(
            "plan(): expected `model` and `example_input` to hold finite numbers, with which the plan can be "
            f"compared with the masked dense network, got {bad}. Hint: channels that are left out count as "
            "zeros in a plan, where zero times these numbers would be NaN; `check=False` does not compare."
        )
    raise PlanDiffersError(
        f"plan(): expected the plan to equal the masked dense network to {limit:.1e} of its largest result, "
        f"got {share:.1e} (an error of {error:.3g}). Hint: a network whose results are this sensitive to "
        "rounding needs a larger `tolerance`; else this is a defect of the plan: please report the network."
    )


def _share(error: tuple[float, float, torch.dtype]) -> float:
    return error[0]
