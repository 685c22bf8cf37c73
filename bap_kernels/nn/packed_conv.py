"""The base of the convolutions whose packed weight is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels._packed import drop_packed
from bap_kernels.functional import four_sided, refuse_onnx
from bap_kernels.nn.replaceable import unsupported_groups_reason, unsupported_reason

__all__ = ["PackedConv2d", "share_all"]

_Packed = TypeVar("_Packed", bound="PackedConv2d")


def share_all(layer: nn.Module, conv: nn.Module) -> None:
    """Makes ``layer``, an object without attributes, share all that ``conv`` has, under tables of its own."""
    # All of a module is in its dictionary. Hook tables stay shared, so that handles can still remove their hooks.
    layer.__dict__.update(conv.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[name] = conv.__dict__[name].copy()
    if "forward" in layer.__dict__:
        # Of recompute_, bound to the other layer.
        layer.__dict__["forward"] = type(layer.__dict__["forward"])(layer)
    # Compiled by conv.compile() for the other class, and the lists of a batch of its model.
    for name in ("_compiled_call_impl", "_mixed"):
        layer.__dict__.pop(name, None)


class PackedConv2d(nn.Conv2d):
    """Base of the convolutions whose packed weight is kept; what may change the weight drops it.

    It is dropped before the change: parameters that are swapped, as
    :func:`torch.__future__.set_swap_module_params_on_conversion` asks for, must have no other references. The layers
    name torch's class among their direct bases: tools that initialise layers by the name of a class look no further.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        where = type(self).__name__
        counts = {"in_channels": (in_channels, 0), "out_channels": (out_channels, 0), "groups": (groups, 1)}
        pairs = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "dilation": (dilation, 1)}
        if not isinstance(padding, str):
            pairs["padding"] = (padding, 0)
        for name, (value, least) in [*counts.items(), *pairs.items()]:
            numbers = list(value) if name in pairs and isinstance(value, Sequence) else [value]
            if not all(isinstance(number, int) for number in numbers):
                kind = "an int or a pair of ints" if name in pairs else "an int"
                raise TypeError(f"{where}(): expected `{name}` to be {kind}, got {value!r}.")
            if name in pairs and isinstance(value, Sequence) and len(numbers) != 2:
                hint = " Hint: torch.nn.ZeroPad2d pads four sides by themselves." if name == "padding" else ""
                raise ValueError(f"{where}(): expected `{name}` to be an int or a pair, got {value!r}.{hint}")
            if min(numbers) < least:
                raise ValueError(f"{where}(): expected `{name}` to be at least {least}, got {value!r}.")
        modes = ("zeros", "reflect", "replicate", "circular")
        if padding_mode not in modes:
            raise ValueError(f"{where}(): expected `padding_mode` to be one of {modes}, got {padding_mode!r}.")
        reason = unsupported_groups_reason(in_channels, out_channels, groups)
        if reason is not None:
            raise NotImplementedError(f"{where}(): {reason}. Hint: keep torch.nn.Conv2d for this layer.")
        options: Any = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The input, padded where the mode is not "zeros", and the zeros to add on four sides."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0, 0, 0)
        if isinstance(padding, tuple) and len(padding) == 2:
            return input, (padding[0], padding[0], padding[1], padding[1])
        pair = (padding, padding) if isinstance(padding, int) else padding
        return input, four_sided(type(self).__name__, pair, self.kernel_size, self.stride, self.dilation)

    @classmethod
    def _sharing(cls: type[_Packed], conv: nn.Module) -> _Packed:
        """A layer that shares all that a convolution has; `_start_with` is still to be called."""
        reason = unsupported_reason(conv)
        if reason is not None:
            raise NotImplementedError(
                f"{cls.__name__}.from_conv2d(): expected `conv` to be a layer that can be gathered, got one that "
                f"cannot: {reason}."
            )
        layer = cls.__new__(cls)
        share_all(layer, conv)
        return layer

    def _drop(self) -> None:
        drop_packed([self._parameters.get("weight")])

    def train(self, mode: bool = True) -> PackedConv2d:
        """Sets the mode; packed weights of the mode before are dropped."""
        self._drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConv2d:
        self._drop()
        return super()._apply(fn, recurse)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        # A call while TorchScript traces, as its export to ONNX does.
        refuse_onnx(type(self).__name__)
        return super()._slow_forward(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args)
