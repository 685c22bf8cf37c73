"""Sees what a model calls while it runs: functions of PyTorch and modules become steps."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from bap_kernels._values import version_of
from bap_kernels.flow.arguments import leaves_of, map_leaves, tensors_of
from bap_kernels.flow.ops import has_hooks, writes_to_input
from bap_kernels.plan.fx_calls import WriteCall, as_fx_call
from bap_kernels.plan.recorded_steps import RecordedSteps, Restart
from bap_kernels.plan.sizes import Number, Unrecordable, make_number

__all__ = ["Recorder"]

# They do not depend on the sizes of tensors or on what is in them.
_PLAIN_METHODS = frozenset(("dim", "ndimension", "element_size", "get_device", "has_names", "type", "data_ptr"))
_PLAIN_ATTRIBUTES = frozenset(("dtype", "layout", "ndim", "names", "requires_grad", "grad", "grad_fn", "itemsize"))
_SIZE_METHODS = frozenset(("size", "numel", "nelement", "__len__", "stride", "storage_offset"))
_CONSTANT_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


def _without_numbers(part: Any) -> Any:
    return map_leaves(part, lambda leaf: leaf.value if isinstance(leaf, Number) else leaf)


def _changed(tensors: list[Tensor], versions: list[int]) -> list[Tensor]:
    return [tensor for tensor, version in zip(tensors, versions, strict=True) if version_of(tensor) != version]


class Recorder(RecordedSteps):
    """Records one run."""

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
        versions = [version_of(tensor) for tensor in given]
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
        op, target, args = as_fx_call(func, name, args, kwargs)
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
        self.steps[id(tensor)] = reference, node, version_of(tensor)

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
            raise Restart
        return self._layer(name, module, args, kwargs)

    def _layer(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = tensors_of((args, kwargs))
        self.paused = True
        try:
            if self._autocast() != self.autocast:
                raise self.unrecordable("it changes autocast")
            versions = [version_of(tensor) for tensor in given]
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


def _argument_names(root: nn.Module, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(root.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[number] if number < len(names) else f"input_{number}" for number in range(count)]
