"""The arguments of planned networks: what a plan can read, and what it takes in place of its example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels._values import holds_values
from bap_kernels.flow.norms import norm_parts
from bap_kernels.nn.replaceable import has_own_forward

__all__ = [
    "applied",
    "check_inputs",
    "inputs_of_shapes",
    "refuse_other_dtypes",
    "refuse_without_values",
    "same_argument",
]


def applied(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``fn(x)`` of :meth:`torch.nn.Module._apply`, with the values of ``x`` where ``fn``, as to_empty()'s, has none."""
    y = fn(x)
    return y if y is x or x.is_meta or y.is_meta else y.copy_(x)


def same_argument(given: Any, known: Any) -> bool:
    """Whether an argument that is no tensor is what it was in the example."""
    if isinstance(known, Tensor):
        return isinstance(given, Tensor)
    if isinstance(known, (list, tuple)):
        alike = type(given) is type(known) and len(given) == len(known)
        return alike and all(same_argument(*pair) for pair in zip(given, known, strict=True))
    if isinstance(known, dict):
        return (
            type(given) is type(known)
            and list(given) == list(known)
            and all(same_argument(given[k], known[k]) for k in known)
        )
    return given is known or (type(given) is type(known) and bool(given == known))


def refuse_without_values(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Refuses what a plan cannot read: tensors on meta, in parts (DTensor), quantised by a subclass, mapped over."""
    named = {f"input {number}": value for number, value in enumerate(example) if isinstance(value, Tensor)}
    for name, module in model.named_modules():
        if has_own_forward(module):
            continue  # called as it is
        if isinstance(module, nn.Conv2d) or norm_parts(module) is not None:
            tensors = {**module._parameters, **module._buffers}
            named.update({f"{name}.{key}": value for key, value in tensors.items() if value is not None})
    for name, tensor in named.items():
        if holds_values(tensor) or tensor.layout != torch.strided:
            continue
        kind = "one on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} that stands for others"
        raise NotImplementedError(
            f"plan(): expected tensors that hold their own values, got {kind}: {name}. Hint: plan the whole model, "
            "before it is sharded, quantised or given to torch.func; specialize serves models on the meta device."
        )


def check_inputs(inputs: tuple[Any, ...], example: tuple[Any, ...]) -> None:
    """Refuses arguments that differ from the example's in number, kind, width or, where they are no tensors, value."""
    if len(inputs) != len(example):
        count = f"{len(example)} input{'s' * (len(example) != 1)}"
        raise ValueError(f"PlannedNetwork(): expected {count}, as in the example, got {len(inputs)}.")
    for x, known in zip(inputs, example, strict=True):
        if not isinstance(known, Tensor):
            if not same_argument(x, known):
                raise ValueError(
                    f"PlannedNetwork(): expected {known!r} for an input that is no tensor, as in the example, got "
                    f"{x!r}. Hint: plan again with an example of such inputs."
                )
        elif not isinstance(x, Tensor):
            raise ValueError(
                f"PlannedNetwork(): expected a tensor where the example has one, got {type(x).__name__}. "
                "Hint: plan again with an example of such inputs."
            )
        elif x.dim() != known.dim() or (known.dim() == 4 and x.shape[1] != known.shape[1]):
            shape = f"(N, {known.shape[1]}, H, W)" if known.dim() == 4 else f"{known.dim()} dimensions"
            raise ValueError(f"PlannedNetwork(): expected an input of shape {shape}, got {tuple(x.shape)}.")


def inputs_of_shapes(shapes: Sequence[Sequence[int]], example: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Inputs of other shapes than the example's, as ``PlannedNetwork.peak_bytes`` takes them."""
    if isinstance(shapes[0], int):
        raise TypeError(
            f"PlannedNetwork.peak_bytes(): expected `shapes` to be a shape for each input, got {shapes[0]}. "
            "Hint: peak_bytes((8, 3, 224, 224))."
        )
    first = next(x for x in example if isinstance(x, Tensor))
    inputs = tuple(first.new_empty(tuple(shape)) for shape in shapes)
    check_inputs(inputs, example)
    return inputs


def refuse_other_dtypes(inputs: tuple[Any, ...], example: tuple[Any, ...], error: TypeError) -> None:
    """Names the input whose dtype is not the example's as the cause of an error of a step, where there is one."""
    for x, known in zip(inputs, example, strict=False):
        if isinstance(x, Tensor) and isinstance(known, Tensor) and x.dtype != known.dtype:
            raise TypeError(
                f"PlannedNetwork(): expected an input of dtype {known.dtype}, as in the example, got {x.dtype}. "
                "Hint: .to(dtype) of the plan changes what it takes."
            ) from error
