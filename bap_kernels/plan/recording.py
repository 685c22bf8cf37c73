"""Records the steps of a model while it runs on an example: layers are one step each, PyTorch's functions another.

The model's own code runs on real tensors, so that it takes the branches that it takes in use. What it calls is seen by
a `TorchFunctionMode`, which belongs to one thread, and on a copy of its modules, so that neither the model nor any
other thread is affected. Sizes are numbers that know their steps (`sizes`), so the recording serves other sizes.

What cannot be recorded becomes one step as a whole, the innermost module around it: where the code reads numbers out
of tensors or branches on sizes, computes with what PyTorch does not show (numpy, extensions), changes autocast, or
writes to memory that another tensor shows and that is read later. A module's name is then remembered and the model is
recorded again; each time there is one name more, so this ends.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bap_kernels.flow.arguments import leaves_of, map_leaves
from bap_kernels.plan.recorded_steps import Restart, Specs
from bap_kernels.plan.recorder import Recorder
from bap_kernels.plan.sizes import Unrecordable

__all__ = ["Recording", "first_difference", "record"]


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording of one run.

    Attributes:
        graph: the steps.
        specs: shape and dtype of each step's result.
        constants: tensors that steps of kind ``get_attr`` name and that are no parameters or buffers.
        result: what the model returned.
        whole: {name: reason} of the modules that became one step.
    """

    graph: fx.Graph
    specs: Specs
    constants: dict[str, Tensor]
    result: Any
    whole: dict[str, str]


def _drop_pure(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.meta.get("pure") and not node.users:
            graph.erase_node(node)


def _equal(a: Any, b: Any, numbers: dict[fx.Node, int], others: dict[fx.Node, int]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and isinstance(b, fx.Node) and numbers[a] == others[b]
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and np.array_equal(a, b, equal_nan=True)
        try:
            return a is b or (type(a) is type(b) and bool(a == b or (a != a and b != b)))
        except Exception:  # objects that do not compare
            return False

    leaves = leaves_of(a), leaves_of(b)
    structures = [map_leaves(part, lambda leaf: None) for part in (a, b)]
    return structures[0] == structures[1] and all(equal(*pair) for pair in zip(*leaves, strict=True))


def first_difference(recording: Recording, other: Recording) -> fx.Node | None:
    """The first step of a recording in which another one differs, apart from shapes; None if there is none."""
    numbers = {node: number for number, node in enumerate(recording.graph.nodes)}
    others = {node: number for number, node in enumerate(other.graph.nodes)}
    nodes = list(others)
    for node, number in numbers.items():
        if number >= len(nodes):
            return node
        second = nodes[number]
        same = node.op == second.op and (node.target is second.target or node.target == second.target)
        if not same or not _equal((node.args, node.kwargs), (second.args, second.kwargs), numbers, others):
            return node
        name = str(node.target)
        if node.op == "get_attr" and name in recording.constants:
            # A constant that each run makes anew.
            a, b = recording.constants[name], other.constants[name]
            if a is not b and not (a.shape == b.shape and a.dtype == b.dtype and _same_values(a, b)):
                return node
    return None if len(nodes) == len(numbers) else next(reversed(numbers))


def _same_values(a: Tensor, b: Tensor) -> bool:
    try:
        return bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    except Exception:  # tensors without data raise what they like
        return True


def record(
    op: str,
    make: Callable[[], nn.Module],
    inputs: tuple[Any, ...],
    is_layer: Callable[[nn.Module], bool],
    whole: dict[str, str] | None = None,
) -> Recording:
    """Records a model on an example.

    Args:
        op: the caller's name, for messages.
        make: gives a copy of the model that nobody else uses; what its forward writes to its modules stays there.
        inputs: what the model takes, known to be so.
        is_layer: says which modules are one step each, besides those with hooks.
        whole: {name: reason} of further modules that are one step; more are added to it.

    Raises:
        ValueError: if the model's own forward cannot be recorded.
    """
    whole = {} if whole is None else whole
    known: list[Tensor] | None = None
    while True:
        root = make()
        recorder = Recorder(root, is_layer, whole, known)
        before = len(whole)
        try:
            result = recorder.run(inputs)
        except Restart:
            if known is None and len(whole) == before:
                known = [obj for obj in gc.get_objects() if issubclass(type(obj), Tensor)]
                continue
            if len(whole) > before:
                continue
            raise AssertionError("a recording began again although nothing more is known") from None
        except (Unrecordable, Exception) as error:
            recorder.recording = False
            raise ValueError(
                f"{op}(): expected `model` to be recordable, got {type(root).__name__}, whose own forward is not: "
                f"{error}. Hint: move this into a submodule; it is run as it is."
            ) from error
        if recorder.grew:
            continue
        _drop_pure(recorder.graph)
        return Recording(recorder.graph, recorder.specs, recorder.constants, result, dict(whole))
