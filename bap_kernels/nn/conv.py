"""Convolution layers that read and compute only the channels of the active domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from bap_kernels._load import _C
from bap_kernels.channels import ChannelLists
from bap_kernels.functional import call_gathered_conv2d
from bap_kernels.layer_kinds import GatheredLayer
from bap_kernels.nn.in_backward import check_domain, in_backward
from bap_kernels.nn.leaf import Proxy, as_one_step
from bap_kernels.nn.mixed import MixedStates
from bap_kernels.nn.packed_conv import PackedConv2d

__all__ = ["GatheredConv2d", "MaskedConv2d"]

_graph_task = torch._C._current_graph_task_id
_Layer = TypeVar("_Layer", bound="GatheredConv2d")


def _checked_lists(where: str, name: str, lists: Any) -> ChannelLists:
    if not isinstance(lists, ChannelLists):
        raise TypeError(
            f"{where}(): expected `{name}` to be ChannelLists, got {type(lists).__name__}. "
            "Hint: ChannelLists(in_index=[0, 2]) reads channels 0 and 2."
        )
    return lists


class GatheredConv2d(GatheredLayer, PackedConv2d, nn.Conv2d):
    """:class:`torch.nn.Conv2d` that reads and computes only listed channels; the result holds only those computed.

    Parameters are full size and are saved under the keys of a dense layer. The lists are no part of the state; they are
    in plain attributes, and follow the weight's device. In eval mode the packed weights are kept until the weight or
    the lists change; :func:`bap_kernels.clear_packed_cache` says how that is seen. A layer without lists is a dense
    convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv2d`; ``groups`` is 1, or C_in for a depthwise layer with as many outputs.
        channels: the lists to start with; None keeps all channels.

    Attributes:
        channels: the active :class:`~bap_kernels.ChannelLists`.
        lists: the lists of each domain, {domain: ChannelLists}.

    Shape:
        - Input: (N, C_in, H, W) or (C_in, H, W)
        - Output: (N, K_out, oH, oW) or (K_out, oH, oW), in the order of the out-list

    Raises:
        NotImplementedError: for other groups.
        IndexError: if ``channels`` lists a channel that the layer does not have.
        ValueError: if the layer is depthwise and its two lists differ.

    Examples:
        >>> import torch
        >>> from bap_kernels import ChannelLists
        >>> from bap_kernels.nn import GatheredConv2d
        >>> conv = GatheredConv2d(8, 4, 3, padding=1, channels=ChannelLists(in_index=[1, 2, 6], out_index=[0, 3]))
        >>> conv(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 2, 5, 5])
        >>> conv
        GatheredConv2d(8, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), reads 3/8, writes 2/4)
    """

    # Said by each class that computes what torch.nn.Conv2d does, and not by its subclasses.
    _computes_conv2d = True
    _state_name = "channels"
    _needs_domain = False
    _without_domain = ChannelLists()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels: ChannelLists | None = None,
    ) -> None:
        if channels is not None:
            _checked_lists(type(self).__name__, "channels", channels)
        options = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)
        self._start_with(channels)

    def _states(self) -> Mapping[str, ChannelLists]:
        return self.lists

    def _start_with(self, channels: ChannelLists | None) -> None:
        channels = ChannelLists() if channels is None else channels
        channels.validate_for(self)
        self.channels = channels.to(self.weight.device)
        self.lists = {}

    @classmethod
    def from_conv2d(cls: type[_Layer], conv: nn.Conv2d, channels: ChannelLists | None = None) -> _Layer:
        """A layer with the parameters, the mode and the hooks of ``conv``, which it shares and does not copy.

        Args:
            conv: a :class:`torch.nn.Conv2d`, or a layer of this module, whose lists are then taken over.
            channels: the lists to start with; None keeps all channels, or those active in ``conv``.

        Raises:
            NotImplementedError: for subclasses with methods of their own, parametrized layers, and groups that are not
                supported.

        Examples:
            >>> from torch import nn
            >>> from bap_kernels.nn import GatheredConv2d
            >>> conv = nn.Conv2d(8, 4, 3)
            >>> GatheredConv2d.from_conv2d(conv).weight is conv.weight
            True
        """
        layer = cls._sharing(conv)
        if isinstance(conv, GatheredConv2d):
            layer._start_with(conv.channels if channels is None else channels)
            layer.lists = dict(conv.lists)
            layer._mixed = conv._mixed
        else:
            layer._start_with(channels)
        return layer

    def attach(self, lists: Mapping[str, ChannelLists]) -> None:
        """Replaces the lists of all domains, and keeps all channels until :meth:`set_domain` chooses.

        Args:
            lists: {domain: ChannelLists}; they are moved to the weight's device.

        Raises:
            IndexError, ValueError: if lists do not fit the layer; nothing is changed then.
        """
        for its_lists in lists.values():
            _checked_lists(f"{type(self).__name__}.attach", "lists", its_lists).validate_for(self)
        device = self.weight.device
        self.lists = {domain: its_lists.to(device) for domain, its_lists in lists.items()}
        self._use(self._without_domain)

    def _gathered(self, input: Tensor, channels: ChannelLists) -> Tensor:
        input, sides = self._padded(input)
        # nn.Module.__getattr__ costs a tenth of a small layer's time; it is left for parameters that are computed.
        parameters: dict[str, Any] = self._parameters
        stored = "weight" in parameters and "bias" in parameters
        weight, bias = (parameters["weight"], parameters["bias"]) if stored else (self.weight, self.bias)
        return call_gathered_conv2d(
            input,
            weight,
            bias,
            channels.in_index,
            channels.out_index,
            self.stride,
            sides,
            self.dilation,
            self.groups,
            not self.training,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolves the listed channels of ``input``."""
        # The usual call in few steps, past nn.Module.__getattr__: finding attributes takes longer than a small
        # convolution. What is unusual about the layer, its input or the context goes the long way, and so does what
        # the binding refuses.
        if not is_compiling():
            own = self.__dict__
            try:
                channels, padding, parameters = own["channels"], own["padding"], own["_parameters"]
                weight, bias = parameters["weight"], parameters["bias"]
                stride, dilation, groups = own["stride"], own["dilation"], own["groups"]
                usual = own["padding_mode"] == "zeros" and type(padding) is tuple and len(padding) == 2
                training = own["training"]
            except KeyError:
                return self._forward(input)
            in_index, out_index = channels.in_index, channels.out_index
            listed = in_index if out_index is None else out_index
            if (
                usual
                and isinstance(input, Tensor)
                and not has_torch_function_variadic(input, weight)
                and _graph_task() == -1
                and ("_mixed" not in own or own["_mixed"] is None)
                and (listed is None or (listed.is_cpu and weight.is_cpu))
                and input.dim() == 4
            ):
                rows, columns = padding
                sides = (rows, rows, columns, columns)
                try:
                    return _C.gathered_conv2d(
                        input, weight, bias, in_index, out_index, stride, sides, dilation, groups, not training
                    )
                except TypeError:
                    pass
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        """:meth:`forward` of any layer and input."""
        if isinstance(input, Proxy):
            return as_one_step(self, input)
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}(): expected `input` to be a tensor, got {type(input).__name__}.")
        if in_backward():
            check_domain(self)
        if self._mixed is not None:
            self._follow_weight()
            return self._forward_mixed(input, self._mixed)
        channels = self.channels
        listed = channels.in_index if channels.out_index is None else channels.out_index
        # Past nn.Module.__getattr__; None where the weight is computed, which is done once, below.
        weight = self._parameters.get("weight")
        # The weight may have been assigned, past _apply: load_state_dict(assign=True), parameters put in by hand.
        if (
            listed is not None
            and weight is not None
            and not (listed.is_cpu and weight.is_cpu)  # quicker to ask than devices are to compare
            and listed.device != weight.device
        ):
            self._follow_weight()
            channels = self.channels
        if input.dim() == 3:
            return self._gathered(input.unsqueeze(0), channels).squeeze(0)
        return self._gathered(input, channels)

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        # One kernel for all domains serves inference; in every other case each domain is a call of its own.
        if any(lists.out_index is not None for lists in mixed.states) or not mixed.fits_one_call(self, input):
            return mixed.apply(self, input, self._gathered, 4)
        mixed.batch.check(self, input, 4)
        input, sides = self._padded(input)
        return mixed.gathered(self, input, [lists.in_index for lists in mixed.states], sides, not self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatheredConv2d:
        super()._apply(fn, recurse)
        self._follow_weight()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_weight()

    def _follow_weight(self) -> None:
        # Lists have the weight's device, and never its dtype.
        device = self.weight.device
        mixed = [] if self._mixed is None else self._mixed.states
        if any(lists.to(device) is not lists for lists in (self.channels, *self.lists.values(), *mixed)):
            self._map_lists(lambda lists: lists.to(device))

    def _map_lists(self, function: Callable[[ChannelLists], ChannelLists]) -> None:
        """Replaces all lists; the active ones stay one of the domains' objects."""
        mixed = [] if self._mixed is None else self._mixed.states
        new = {id(lists): function(lists) for lists in (self.channels, *self.lists.values(), *mixed)}
        self.channels = new[id(self.channels)]
        self.lists = {domain: new[id(lists)] for domain, lists in self.lists.items()}
        if self._mixed is not None:
            self._mixed = MixedStates(self._mixed.batch, [new[id(lists)] for lists in mixed])

    def extra_repr(self) -> str:
        """The dense layer's options, then the channels read and written."""
        K_in, K_out = self.channels.counts
        text = super().extra_repr()
        if K_in is not None:
            text += f", reads {K_in}/{self.in_channels}"
        if K_out is not None:
            text += f", writes {K_out}/{self.out_channels}"
        return text


class MaskedConv2d(GatheredConv2d, nn.Conv2d):
    """:class:`GatheredConv2d` whose result has the full width, with zeros in the channels that are not listed.

    It takes the place of a dense layer in any network: neither the bias nor anything else reaches the other channels.

    Shape:
        - Input: (N, C_in, H, W) or (C_in, H, W)
        - Output: (N, C_out, oH, oW) or (C_out, oH, oW)

    Examples:
        >>> import torch
        >>> from bap_kernels import ChannelLists
        >>> from bap_kernels.nn import MaskedConv2d
        >>> conv = MaskedConv2d(8, 4, 3, channels=ChannelLists(out_index=[0, 3]))
        >>> conv(torch.randn(2, 8, 5, 5)).abs().sum((0, 2, 3)) > 0
        tensor([ True, False, False,  True])
    """

    _computes_conv2d = True

    def forward(self, input: Tensor) -> Tensor:
        """Convolves the listed channels of ``input``, and puts the results at the places of theirs."""
        return self._forward(input)

    def _gathered(self, input: Tensor, channels: ChannelLists) -> Tensor:
        compact = super()._gathered(input, channels)
        listed = channels.out_index
        if listed is None:
            return compact
        N, _, H, W = compact.shape
        # Under torch.func.vmap no other format can be asked for.
        mapped = torch._C._functorch.is_batchedtensor(compact)
        if mapped or input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
            full = compact.new_zeros((N, self.out_channels, H, W))
        else:
            full = compact.new_zeros((N, H, W, self.out_channels)).permute(0, 3, 1, 2)
        # index_copy_ takes 64-bit indices only; the list is short.
        return full.index_copy_(1, listed.long(), compact)
