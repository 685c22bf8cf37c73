"""The steps of a recording, and which of them returned each tensor: views, writes and constants included."""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from bap_kernels._values import version_of
from bap_kernels.flow.arguments import map_leaves
from bap_kernels.plan.fx_calls import is_random
from bap_kernels.plan.sizes import Number, Unrecordable, make_number

__all__ = ["RecordedSteps", "Restart", "Specs"]

# Shape and dtype of what each step returned on the example; (None, None) for what is no tensor.
Specs = dict[fx.Node, tuple[tuple[int, ...] | None, torch.dtype | None]]


class Restart(BaseException):
    """The model has to be recorded again, with the names of more modules or the list of tensors that exist."""


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return None


def _show_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage show the same elements in the same way."""
    return bool(
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and (a.storage_offset() == b.storage_offset())
    )


class RecordedSteps(TorchFunctionMode):
    """The steps of one run so far, and which of them returned each tensor.

    Args:
        root: what runs.
        is_layer: says which modules are one step each.
        whole: {name: reason} of further ones; more are added to it.
        known: the tensors that existed before the run; None: those that it meets are asked for by `Restart`.
    """

    def __init__(
        self, root: nn.Module, is_layer: Callable[[nn.Module], bool], whole: dict[str, str], known: list[Tensor] | None
    ) -> None:
        super().__init__()
        self.root, self.is_layer, self.whole = root, is_layer, whole
        self.known = None if known is None else {id(tensor): tensor for tensor in known}
        self.graph = fx.Graph()
        self.specs: Specs = {}
        self.constants: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        for store in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
            for name, tensor in store:
                self.names.setdefault(id(tensor), name)
        # By identity, of the tensors that steps returned: a weak reference, the step, and the version then.
        self.steps: dict[int, tuple[Any, fx.Node, int]] = {}
        # By identity, of other results: the object, held so that its identity stays its own, and the step.
        self.objects: dict[int, tuple[Any, fx.Node]] = {}
        # By storage: weak references to the tensors that steps returned.
        self.sharing: dict[int, list[Any]] = {}
        # {step: the step whose result it returns a view of}, {step: the step whose result it returns again}
        self.view_of: dict[fx.Node, fx.Node] = {}
        self.same_as: dict[fx.Node, fx.Node] = {}
        # By identity, of tensors whose content no step returns: a weak reference, the modules around, the reason.
        self.stale: dict[int, tuple[Any, tuple[str, ...], str]] = {}
        # Steps that do not depend on the input.
        self.static: set[fx.Node] = set()
        # Identities of constants that the model's code makes, which `constants` holds.
        self.fresh: set[int] = set()
        self.attributes: dict[str, fx.Node] = {}
        # Names of the modules that are being called.
        self.within: list[str] = [""]
        self.recording, self.paused = True, False
        # Writes so far; whether a name was added to `whole`; what was last raised, which the model's code may catch.
        self.written = 0
        self.grew = False
        self.raised: Unrecordable | None = None
        self.autocast = self._autocast()

    def unrecordable(self, reason: str, module: str | None = None) -> Unrecordable:
        """The error for what cannot be recorded; noted, as the model's code may catch it."""
        self.raised = Unrecordable(reason, module)
        return self.raised

    @staticmethod
    def _autocast() -> tuple[Any, ...]:
        return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))

    # Steps.

    def _add(
        self, op: str, target: Any, args: Any, kwargs: Any = None, *, result: Any = None, pure: bool = False
    ) -> fx.Node:
        node = self.graph.create_node(op, target, self.argument(args), self.argument(kwargs or {}))
        node.meta["within"], node.meta["pure"] = tuple(self.within), pure
        is_tensor = isinstance(result, Tensor)
        self.specs[node] = (tuple(result.shape), result.dtype) if is_tensor else (None, None)
        static = all(source in self.static for source in node.all_input_nodes) and not is_random(target)
        if op == "get_attr" or (op != "placeholder" and static):
            self.static.add(node)
        return node

    def add_function(self, function: Any, arguments: tuple[Any, ...]) -> fx.Node:
        """A step without a tensor for a result."""
        return self._add("call_function", function, arguments, pure=True)

    def argument(self, part: Any) -> Any:
        """Arguments in which results are replaced by the steps that returned them."""
        return map_leaves(part, self._argument)

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return leaf
        if isinstance(leaf, Tensor):
            return self.node_of(leaf)
        if isinstance(leaf, Number):
            return leaf.step()
        known = self.objects.get(id(leaf))
        return known[1] if known is not None and known[0] is leaf else leaf

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The step that returned a tensor."""
        stale = self.stale.get(id(tensor))
        if stale is not None and stale[0]() is tensor:
            common = [a for a, b in zip(stale[1], self.within, strict=False) if a == b]
            raise self.unrecordable(stale[2], common[-1])
        step = self.steps.get(id(tensor))
        if step is not None and step[0]() is tensor:
            if step[2] != version_of(tensor):
                raise self.unrecordable("it writes to a tensor in a way that is not shown")
            return step[1]
        if id(tensor) in self.names:
            return self._attribute(self.names[id(tensor)], tensor)
        if self.known is None:
            # Tensors that existed before the run are constants; the next recording lists them first.
            raise Restart
        if self.known.get(id(tensor)) is tensor:
            return self._constant(tensor)
        raise self.unrecordable("it computes with a tensor that was made out of sight (numpy, an extension)")

    def _attribute(self, name: str, tensor: Tensor) -> fx.Node:
        if name not in self.attributes:
            self.attributes[name] = self._add("get_attr", name, (), result=tensor, pure=True)
        return self.attributes[name]

    def _constant(self, tensor: Tensor) -> fx.Node:
        names = (name for name, constant in self.constants.items() if constant is tensor)
        name = next(names, f"_constant_{len(self.constants)}")
        self.constants[name] = tensor
        return self._attribute(name, tensor)

    # Results.

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Notes which step returned a tensor."""
        reference = weakref.ref(tensor)
        self.steps[id(tensor)] = reference, node, version_of(tensor)
        self.stale.pop(id(tensor), None)
        key = _storage(tensor)
        if key is not None:
            others = [other for other in self.sharing.get(key, ()) if other() is not None and other() is not tensor]
            self.sharing[key] = [*others, reference]

    def results(self, value: Any, node: fx.Node, sources: list[Tensor]) -> Any:
        """Notes which step returned each tensor in a result; numbers in it become recorded ones."""
        if isinstance(value, Tensor):
            if value.is_inference():
                raise self.unrecordable("it runs in inference mode")
            source = next((source for source in sources if source is value), None)
            if source is not None:
                before = self.node_of(source)
                self.same_as[node] = self.same_as.get(before, before)
            else:
                key = _storage(value)
                shared = [source for source in sources if key is not None and _storage(source) == key]
                if shared:
                    self.view_of[node] = self.node_of(shared[0])
            self.specs[node] = tuple(value.shape), value.dtype
            self.bind(value, node)
            return value
        if type(value) in (int, float):
            return make_number(self, value, lambda: node)
        parts: Iterator[tuple[Any, Any, Any]]
        if isinstance(value, (tuple, list)):
            parts = ((operator.getitem, index, part) for index, part in enumerate(value))
        elif isinstance(value, dict):
            parts = ((operator.getitem, key, part) for key, part in value.items())
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            parts = ((getattr, name, part) for name, part in vars(value).items())
        else:
            return value
        recorded = []
        for function, key, part in list(parts):
            result = part
            if isinstance(part, (Tensor, int, float, tuple, list, dict)) or hasattr(part, "__dict__"):
                inner = self._add("call_function", function, (node, key), result=part, pure=True)
                if isinstance(part, Tensor):
                    for source in sources:
                        if _storage(source) is not None and _storage(source) == _storage(part):
                            self.view_of[inner], self.view_of[node] = node, self.node_of(source)
                            break
                result = self.results(part, inner, [])
            recorded.append((key, result))
        self.objects[id(value)] = value, node
        if type(value) in (tuple, list):
            return type(value)(result for _, result in recorded)
        if type(value) in (dict, OrderedDict):
            return type(value)(recorded)
        return value

    def wrote(self, tensor: Tensor, node: fx.Node) -> None:
        """Notes that a step wrote to a tensor; ``node`` returns what it holds now."""
        self.written += 1
        before = self.steps[id(tensor)][1]
        before = self.same_as.get(before, before)
        key = _storage(tensor)
        others = [other() for other in self.sharing.get(key, ())] if key is not None else []
        self.bind(tensor, node)
        for other in others:
            if other is not None and other is not tensor:
                self._follow(other, tensor, before, node)

    def _follow(self, other: Tensor, tensor: Tensor, before: fx.Node, node: fx.Node) -> None:
        """Another tensor shows memory that was written to: what it holds now, or that nobody may read it."""
        if _show_the_same(other, tensor):
            self.bind(other, node)
            return
        chain: list[fx.Node] = []
        at: fx.Node | None = self.steps[id(other)][1]
        while at is not None and self.same_as.get(at, at) is not before:
            chain.append(at)
            at = self.view_of.get(at)
        if at is None or id(other) in self.stale:
            within = [self.steps[id(shown)][1].meta["within"] for shown in (tensor, other)]
            common = tuple(a for a, b in zip(*within, strict=False) if a == b)
            reason = "it writes to a part of a tensor (a slice or another view of it) that is read later"
            self.stale[id(other)] = weakref.ref(other), common, reason
            return
        # Views of what was written are made again.
        now = {at: node}
        for old in reversed(chain):
            copied = self.graph.node_copy(old, lambda source: now.get(source, source))
            copied.meta = dict(old.meta)
            self.specs[copied] = self.specs[old]
            self.view_of[copied] = now[self.view_of[old]]
            now[old] = copied
        self.bind(other, now[self.steps[id(other)][1]])
