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
import functools
import gc
import inspect
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from bap_kernels.flow.arguments import leaves_of, map_leaves, tensors_of
from bap_kernels.flow.ops import Call, has_hooks, writes_to_input
from bap_kernels.plan.sizes import Number, Unrecordable, make_number

__all__ = ["Recording", "Specs", "WriteCall", "first_difference", "record"]

# Shape and dtype of what each step returned on the example; (None, None) for what is no tensor.
Specs = dict[fx.Node, tuple[tuple[int, ...] | None, torch.dtype | None]]

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
# Methods of two tensors, or a tensor and a number, as the operators that call them.
_METHODS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul")},
    **{f"{name}_": getattr(operator, f"i{name}") for name in ("add", "sub", "mul")},
    **{"div": operator.truediv, "true_divide": operator.truediv, "div_": operator.itruediv},
    **{f"__{name}__": getattr(operator, name) for name in _OPERATORS},
    **{f"__i{name}__": getattr(operator, f"i{name}") for name in _OPERATORS},
}
_SWAPPED: dict[str, Any] = {f"__r{name}__": getattr(operator, name) for name in _OPERATORS}
_SWAPPED["__rdiv__"] = operator.truediv
# They do not depend on the sizes of tensors or on what is in them.
_PLAIN_METHODS = frozenset(("dim", "ndimension", "element_size", "get_device", "has_names", "type", "data_ptr"))
_PLAIN_ATTRIBUTES = frozenset(("dtype", "layout", "ndim", "names", "requires_grad", "grad", "grad_fn", "itemsize"))
_SIZE_METHODS = frozenset(("size", "numel", "nelement", "__len__", "stride", "storage_offset"))
_CONSTANT_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


class _Restart(BaseException):
    """The model has to be recorded again, with the names of more modules or the list of tensors that exist."""


class WriteCall:
    """A function that writes to one of its arguments, as a function that returns what it wrote.

    Args:
        target: the function, or the name of a method.
        argument: the position or the keyword of the argument.
    """

    def __init__(self, target: Callable[..., Any] | str, argument: int | str) -> None:
        self.target, self.argument = target, argument

    @property
    def __name__(self) -> str:
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "write")

    def with_argument(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Any], Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """(what ``function`` makes of the argument, the arguments with it in the argument's place)."""
        if isinstance(self.argument, str):
            new = function(kwargs[self.argument])
            return new, args, {**kwargs, self.argument: new}
        new = function(args[self.argument])
        return new, (*args[: self.argument], new, *args[self.argument + 1 :]), kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the argument holds afterwards; the argument stays as it was."""
        changed, args, kwargs = self.with_argument(args, kwargs, torch.clone)
        Call(self.target)(*args, **kwargs)
        return changed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WriteCall) and (self.target, self.argument) == (other.target, other.argument)

    def __hash__(self) -> int:
        return hash((self.target, self.argument))


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


def _without_numbers(part: Any) -> Any:
    return map_leaves(part, lambda leaf: leaf.value if isinstance(leaf, Number) else leaf)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _changed(tensors: list[Tensor], versions: list[int]) -> list[Tensor]:
    return [tensor for tensor, version in zip(tensors, versions, strict=True) if _version(tensor) != version]


def _show_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage show the same elements in the same way."""
    return bool(
        a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and (a.storage_offset() == b.storage_offset())
    )


class _Recorder(TorchFunctionMode):
    """Records one run."""

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
        static = all(source in self.static for source in node.all_input_nodes) and not _is_random(target)
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
            if step[2] != _version(tensor):
                raise self.unrecordable("it writes to a tensor in a way that is not shown")
            return step[1]
        if id(tensor) in self.names:
            return self._attribute(self.names[id(tensor)], tensor)
        if self.known is None:
            # Tensors that existed before the run are constants; the next recording lists them first.
            raise _Restart
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
        self.steps[id(tensor)] = reference, node, _version(tensor)
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

    # Calls of functions.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or not self.recording:
            return func(*args, **kwargs)
        self.paused = True
        try:
            return self._function(func, args, kwargs)
        finally:
            self.paused = False

    def _function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, args)
        if name in ("__set__", "__delete__"):
            raise self.unrecordable("it sets an attribute of a tensor")
        given = tensors_of((args, kwargs))
        numbers = any(isinstance(leaf, Number) for leaf in leaves_of((args, kwargs)))
        versions = [_version(tensor) for tensor in given]
        result = func(*_without_numbers(args), **_without_numbers(kwargs))
        returned = tensors_of(result)
        if not returned and not given and not numbers:
            return result
        if returned and func in _CONSTANT_MAKERS and not given and not numbers:
            self.bind(result, self._constant(result))
            self.fresh.add(id(result))
            return result
        if self._autocast() != self.autocast:
            raise self.unrecordable("it changes autocast")
        written = _changed(given, versions)
        op, target, args = _as_fx_call(func, name, args, kwargs)
        if not returned and not written:
            return self._without_tensor(func, name, (op, target, args, kwargs), result, given)
        if written:
            return self._writing((op, target, args, kwargs), result, written, given)
        node = self._add(op, target, args, kwargs, result=result)
        return self.results(result, node, given)

    def _get(self, func: Any, args: tuple[Any, ...]) -> Any:
        descriptor = func.__self__
        name = getattr(descriptor, "__name__", None) or descriptor.fget.__name__
        result = func(*args)
        tensor = args[0]
        if name in _PLAIN_ATTRIBUTES or name.startswith("is_"):
            return result
        node = self.node_of(tensor)
        if node in self.static and not isinstance(result, Tensor):
            return result
        if name in ("device", "shape") or isinstance(result, Tensor):
            step = self._add("call_function", getattr, (tensor, name), result=result, pure=True)
        if name == "device":
            # Each read gives an object of its own.
            self.objects[id(result)] = result, step
            return result
        if name == "shape":
            return self._sizes(result, step, node)
        if isinstance(result, Tensor):
            return self.results(result, step, [tensor])
        raise self.unrecordable(f"it reads {name!r} of a tensor")

    def _sizes(self, sizes: Any, node: fx.Node, source: fx.Node | None = None) -> Any:
        # Whoever runs the steps checks that images have as many channels as in the example.
        fixed = source is not None and len(sizes) == 4 and source.op == "placeholder"
        steps: dict[int, fx.Node] = {}

        def step(axis: int) -> fx.Node:
            if axis not in steps:
                steps[axis] = self._add("call_function", operator.getitem, (node, axis), pure=True)
            return steps[axis]

        numbers = [
            size if fixed and axis == 1 else make_number(self, size, functools.partial(step, axis))
            for axis, size in enumerate(sizes)
        ]
        return torch.Size(numbers) if isinstance(sizes, torch.Size) else tuple(numbers)

    def _without_tensor(self, func: Any, name: str, call: Any, result: Any, given: list[Tensor]) -> Any:
        """A call whose result holds no tensor."""
        args = call[2]
        if name in _PLAIN_METHODS or name.startswith("is_") or (given and name in ("requires_grad_", "__hash__")):
            return result
        if given and all(self.node_of(tensor) in self.static for tensor in given):
            return result
        if name in _SIZE_METHODS:
            node = self._add(*call, pure=True)
            source = self.node_of(given[0]) if name == "size" and given else None
            if isinstance(result, tuple):
                return self._sizes(result, node, source)
            if source is not None and source.op == "placeholder" and given[0].dim() == 4 and args[1:] in ((1,), (-3,)):
                return result
            return make_number(self, result, lambda: node)
        if func is torch._assert:
            self._add(*call)
            return None
        if not given:
            raise self.unrecordable(f"{name} computes with the size of the input")
        if name in ("__repr__", "__format__", "__str__"):
            return result
        raise self.unrecordable(f"it reads numbers out of a tensor ({name})")

    def _writing(self, call: Any, result: Any, written: list[Tensor], given: list[Tensor]) -> Any:
        op, target, args, kwargs = call
        if len(written) != 1 or id(written[0]) not in self.steps:
            raise self.unrecordable("it writes to a parameter, a buffer or several tensors at once")
        tensor = written[0]
        self._only_shown_before(tensor)
        source = self.steps[id(tensor)][1]
        while source in self.view_of or source in self.same_as:
            source = self.view_of.get(source, self.same_as.get(source, source))
        if source.op == "get_attr" and id(self.constants.get(str(source.target))) not in self.fresh:
            raise self.unrecordable("it writes to a parameter, a buffer or what was there before")
        if result is tensor and args and args[0] is tensor and writes_to_input(target, kwargs):
            node = self._add(op, target, args, kwargs, result=result)
            self.wrote(tensor, node)
            return result
        # Keywords such as `out` first: the tensor may be read as well.
        named = [*kwargs.items(), *enumerate(args)]
        argument: int | str | None = next((key for key, value in named if value is tensor), None)
        if argument is None or not (result is None or result is tensor):
            raise self.unrecordable("it writes to a tensor and returns another")
        node = self._add("call_function", WriteCall(target, argument), args, kwargs, result=tensor)
        self.wrote(tensor, node)
        return result

    def _only_shown_before(self, tensor: Tensor) -> None:
        # The step was computed; what the tensor held before is what the step reads.
        reference, node, _ = self.steps[id(tensor)]
        if reference() is not tensor:
            raise self.unrecordable("it writes to a tensor that was made in a way that is not shown")
        self.steps[id(tensor)] = reference, node, _version(tensor)

    # Calls of modules.

    def watch(self) -> None:
        """Lets calls of the root's modules come here. They are a copy's, so nobody else calls them."""
        for name, module in self.root.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["_compiled_call_impl"] = functools.partial(self._module, name, module)

    def _module(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.paused or not self.recording:
            return module._call_impl(*args, **kwargs)
        if name in self.whole or self.is_layer(module) or has_hooks(module):
            return self._layer(name, module, args, kwargs)
        self.within.append(name)
        written = self.written
        try:
            result = module._call_impl(*args, **kwargs)
            if self.raised is None or self.raised.module not in (None, name):
                return result
            # The model's code caught it.
            reason = str(self.raised)
        except Unrecordable as error:
            if error.module not in (None, name):
                raise
            reason = str(error)
        except Exception as error:
            reason = f"it raised while it was recorded: {error}"
        finally:
            self.within.pop()
        self.raised = None
        self.whole[name], self.grew = reason, True
        if self.written != written:
            raise _Restart
        return self._layer(name, module, args, kwargs)

    def _layer(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = tensors_of((args, kwargs))
        self.paused = True
        try:
            if self._autocast() != self.autocast:
                raise self.unrecordable("it changes autocast")
            versions = [_version(tensor) for tensor in given]
            result = module._call_impl(*_without_numbers(args), **_without_numbers(kwargs))
            written = _changed(given, versions)
            if written:
                if not (result is written[0] and len(written) == 1 and args and args[0] is result):
                    raise self.unrecordable(f"{name} writes to its arguments")
                if id(result) not in self.steps:
                    raise self.unrecordable(f"{name} writes to a parameter or a buffer")
                self._only_shown_before(result)
            node = self._add("call_module", name, args, kwargs, result=result)
            if written:
                node.meta["writes"] = True
                self.wrote(result, node)
                return result
            return self.results(result, node, given)
        finally:
            self.paused = False

    # The run.

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """Calls the root, and ends the recording."""
        self.watch()
        names = _argument_names(self.root, len(inputs))
        with torch.inference_mode(False), torch.no_grad():
            # Copies, as the model may write to what it is given.
            inputs = map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            given = []
            self.paused = True
            for name, value in zip(names, inputs, strict=True):
                node = self._add("placeholder", name, (), result=value)
                given.append(value if type(value) in (int, float) else self.results(value, node, []))
            self.paused = False
            try:
                with self:
                    result = self.root._call_impl(*given)
                if self.raised is not None:
                    raise self.raised
                self.paused = True
                self.graph.output(self.argument(self._plain_result(result)))
            finally:
                self.recording = False
        return _without_numbers(result)

    def _plain_result(self, value: Any) -> Any:
        """A result in which objects that hold tensors are replaced by steps that make them."""
        if isinstance(value, (Tensor, Number)) or (id(value) in self.objects and self.objects[id(value)][0] is value):
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            return self._add("call_function", type(value), (), self._plain_result(fields))
        if isinstance(value, tuple):
            parts = [self._plain_result(part) for part in value]
            if hasattr(value, "_fields"):
                return self._add("call_function", type(value), tuple(parts))
            return tuple(parts)
        if type(value) is list:
            return [self._plain_result(part) for part in value]
        if type(value) is dict:
            return {key: self._plain_result(part) for key, part in value.items()}
        if type(value) is OrderedDict:
            pairs = [(key, self._plain_result(part)) for key, part in value.items()]
            return self._add("call_function", OrderedDict, (pairs,))
        if tensors_of(list(vars(value).values()) if hasattr(value, "__dict__") else []) or isinstance(value, dict):
            raise self.unrecordable(f"it returns a {type(value).__name__}")
        return value


def _as_fx_call(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...]]:
    """A call as torch.fx writes it: (kind of node, target, arguments)."""
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args
    if name in ("__getitem__", "__setitem__"):
        return "call_function", getattr(operator, name.strip("_")), args
    if len(args) == 2 and not kwargs:
        if name in _METHODS:
            return "call_function", _METHODS[name], args
        if name in _SWAPPED:
            return "call_function", _SWAPPED[name], args[::-1]
    return "call_method", name, args


def _is_random(target: Any) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return any(part in name for part in ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty"))


def _argument_names(root: nn.Module, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(root.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[number] if number < len(names) else f"input_{number}" for number in range(count)]


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
        recorder = _Recorder(root, is_layer, whole, known)
        before = len(whole)
        try:
            result = recorder.run(inputs)
        except _Restart:
            if known is None and len(whole) == before:
                known = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
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
