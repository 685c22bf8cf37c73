"""The operations of a network as they are added, and the values of its recorded steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from bap_kernels.flow.arguments import leaves_of, map_leaves
from bap_kernels.flow.graph import Op, Value
from bap_kernels.plan.recorded_steps import Specs

__all__ = ["OpList"]


class OpList:
    """A list of operations that grows, with the value of each step.

    Args:
        root: has the layers.
        specs: of every step.
        constants: tensors that steps name and that are no parameters or buffers.

    Attributes:
        values: {step: its result}.
        ops: the operations so far.
    """

    def __init__(self, root: nn.Module, specs: Specs, constants: dict[str, Tensor]) -> None:
        self.root, self.specs, self.constants = root, specs, constants
        self.values: dict[fx.Node, Value] = {}
        self.ops: list[Op] = []

    def _add_op(self, value: Value, **fields: Any) -> Value:
        """Adds an operation with this result."""
        op = Op(output=value, **{"name": value.name, **fields})
        for read in dict.fromkeys(op.inputs):
            read.consumers.append(op)
        self.ops.append(op)
        return value

    def _add(self, node: fx.Node, **fields: Any) -> bool:
        """Adds an operation whose result is a step's; returns True."""
        shape, dtype = self.specs[node] if node.op != "output" else (None, None)
        self.values[node] = self._add_op(Value(node.name, shape, dtype), **fields)
        return True

    def _values_in(self, *arguments: Any) -> list[Value]:
        nodes = [leaf for leaf in leaves_of(arguments) if isinstance(leaf, fx.Node)]
        return list(dict.fromkeys(self.values[node] for node in nodes))

    def _with_values(self, part: Any) -> Any:
        """Arguments in which steps are replaced by their values."""
        return map_leaves(part, lambda leaf: self.values[leaf] if isinstance(leaf, fx.Node) else leaf)

    def _attribute(self, name: str) -> Any:
        """What a step names: a constant, a parameter, a buffer."""
        value: Any = self.constants.get(name)
        if value is None:
            value = self.root
            for part in name.split("."):
                value = getattr(value, part)
        return value
