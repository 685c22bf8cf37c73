"""Convolution that trains one binary switch per input channel and domain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bap_kernels.channels import ChannelLists
from bap_kernels.functional import call_gathered_conv2d, refuse_onnx, switched_operator
from bap_kernels.layer_kinds import DomainLayer, SwitchedLayer
from bap_kernels.nn.channel_switch import ChannelSwitch
from bap_kernels.nn.conv import GatheredConv2d
from bap_kernels.nn.in_backward import in_checkpoint
from bap_kernels.nn.mixed import MixedStates
from bap_kernels.nn.packed_conv import PackedConv2d, share_all
from bap_kernels.nn.per_domain import PerDomain, checked_names
from bap_kernels.nn.recompute import held_input
from bap_kernels.nn.replaceable import OWN_FORWARD, has_own_forward

__all__ = ["SwitchedConv2d"]

_Layer = TypeVar("_Layer", bound="SwitchedConv2d")


class SwitchedConv2d(SwitchedLayer, PerDomain, PackedConv2d, nn.Conv2d):
    r""":class:`torch.nn.Conv2d` that trains, for every domain, one binary switch per input channel.

    .. math:: y_k = \sum_c s_c \, (W_{kc} \ast x_c) + b_k, \qquad s_c = 1[\tilde s_c > \tau]

    (*Budget-Aware Adapters for Multi-Domain Learning*, arXiv 1905.06242 [Q].) Weight and bias are shared by all
    domains, under the keys of a dense layer; :attr:`domains` holds one :class:`ChannelSwitch` per domain, whose scores
    are saved as ``domains.<name>.score``. Without an active domain all channels are on.

    In training mode channels that are off are left out of the convolution, and their switches still get a gradient. In
    eval mode the layer is a :class:`GatheredConv2d` on the channels that are on: as fast, with lists and packed weights
    kept until scores or weights change; scores get no gradient then.

    A dense checkpoint loads strictly: where it has no score for any domain, all scores keep their values. With scores
    for some domains only, the others count as missing. The threshold is an option and no part of the state.

    Freeze the shared weights with ``layer.weight.requires_grad_(False)``; their gradient is not computed then.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv2d`; ``groups`` is 1, or C_in for a depthwise layer with as many outputs.
        domains: names of the domains.
        threshold: τ; a channel is on where its score is greater.
        initial: the value of all scores to start with; the defaults of both are Piggyback's [P].
        ste_every: channels that are off get a gradient in every ``ste_every``-th training forward of a domain only,
            which saves time in the others. A forward that checkpointing computes again counts once.

    Attributes:
        consumers: the layers that read the result, if nothing else does; None where that is not known.
            :func:`bap_kernels.nn.link_readers_` sets it; it is no part of the state, and copies lack it.

    Shape:
        - Input: (N, C_in, H, W) or (C_in, H, W)
        - Output: (N, C_out, oH, oW) or (C_out, oH, oW)

    Raises:
        NotImplementedError: for other groups.
        ValueError: for names of domains that are empty, have dots or repeat, and for ``ste_every`` below 1.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> conv = bk.nn.SwitchedConv2d(4, 8, 3, domains=["birds", "cars"])
        >>> conv.set_domain("birds")
        >>> conv(torch.randn(2, 4, 5, 5)).sum().backward()
        >>> with torch.no_grad():
        ...     conv.domains["birds"].score[2] = 0
        >>> conv.channels("birds"), conv.channels("cars")
        (ChannelLists(in_index=[0, 1, 3], out_index=None), ChannelLists(in_index=[0, 1, 2, 3], out_index=None))
    """

    _active: ChannelSwitch | None
    _needs_domain = False
    # A tuple, so that the layers in it are not registered as children.
    consumers: tuple[SwitchedConv2d, ...] | None = None

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
        domains: Iterable[str],
        threshold: float = 5e-3,
        initial: float = 1e-2,
        ste_every: int = 1,
    ) -> None:
        names = checked_names(type(self).__name__, domains)
        options = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)
        self._start_with(names, threshold, initial, ste_every)

    def _start_with(self, names: list[str], threshold: float, initial: float, ste_every: int) -> None:
        device = self.weight.device
        self._hold({name: ChannelSwitch(self.in_channels, threshold, initial, ste_every, device) for name in names})
        self.domains.train(self.training)

    @classmethod
    def from_conv2d(
        cls: type[_Layer],
        conv: nn.Conv2d,
        domains: Iterable[str],
        threshold: float = 5e-3,
        initial: float = 1e-2,
        ste_every: int = 1,
    ) -> _Layer:
        """A layer with the parameters, the mode and the hooks of ``conv``, which it shares and does not copy.

        Args:
            conv: a :class:`torch.nn.Conv2d`, or a gathered layer, whose lists are left behind.
            domains, threshold, initial, ste_every: as in the constructor.

        Raises:
            NotImplementedError: for subclasses, parametrized layers, and groups that are not supported.

        Examples:
            >>> from torch import nn
            >>> from bap_kernels.nn import SwitchedConv2d
            >>> conv = nn.Conv2d(8, 4, 3)
            >>> SwitchedConv2d.from_conv2d(conv, ["birds"]).weight is conv.weight
            True
        """
        names = checked_names(f"{cls.__name__}.from_conv2d", domains)
        layer = cls._sharing(conv)
        layer.__dict__.pop("channels", None)
        layer.__dict__.pop("lists", None)
        layer._start_with(names, threshold, initial, ste_every)
        return layer

    def why_not_gathered(self) -> str | None:
        """Why :meth:`to_gathered` refuses the layer; None if it does not."""
        if self.groups != 1:
            return "a depthwise layer with switches writes its bias to channels that are off"
        if self._parameters.get("weight") is None:
            return "its weight is computed, by a parametrization or a hook"
        return OWN_FORWARD if has_own_forward(self) else None

    def to_gathered(self, layer_type: type[GatheredConv2d] = GatheredConv2d) -> GatheredConv2d:
        """The layer for inference with the lists of all domains, fixed as they are now; it shares weight and bias.

        Args:
            layer_type: the class of the new layer.

        Raises:
            NotImplementedError: for depthwise layers, which write their bias to channels that are off, for layers whose
                weight is computed, and for layers on which another forward was set.
        """
        reason = self.why_not_gathered()
        if reason is not None:
            raise NotImplementedError(
                f"{type(self).__name__}.to_gathered(): expected a layer that can be gathered, got one that cannot: "
                f"{reason}. Hint: keep it; in eval mode it is right."
            )
        layer = layer_type.__new__(layer_type)
        share_all(layer, self)
        for name in ("_active", "consumers"):
            layer.__dict__.pop(name, None)
        layer._modules.pop("domains")
        layer._start_with(None)
        layer.attach({name: self.channels(name) for name in self.domains})
        layer.set_domain(self.domain)
        return layer

    def add_domain(self, name: str, like: str | None = None) -> None:
        """Adds a domain; the others stay as they are.

        Args:
            name: the new domain.
            like: the domain to copy scores from; None starts with all scores at the initial value.
        """
        switch = copy.deepcopy(self._switch_of(next(iter(self.domains)) if like is None else like))
        switch.since = 0
        if like is None:
            switch.reset_parameters()
        self._add(name, switch)

    def channels(self, domain: str | None = None) -> ChannelLists:
        """The channels that a domain reads; None stands for the active domain, and for all channels if there is none.

        Raises:
            ValueError: if the layer has no domain of that name.
        """
        if domain is None and self._active is None:
            return ChannelLists()
        return self._switch_of(domain).channels()

    def switch(self, domain: str | None = None) -> Tensor:
        """The switches of a domain, (C_in,), float32 zeros and ones, differentiable in its scores.

        Raises:
            ValueError: if the layer has no domain of that name.
        """
        return self._switch_of(domain)()

    def _switch_of(self, domain: str | None) -> ChannelSwitch:
        switch = self._module_of(domain)
        assert isinstance(switch, ChannelSwitch)
        return switch

    @property
    def readers(self) -> tuple[SwitchedConv2d, ...] | None:
        """Deprecated: :attr:`consumers`."""
        warnings.warn("SwitchedConv2d.readers is deprecated; use `consumers`.", DeprecationWarning, stacklevel=2)
        return self.consumers

    def _also_asks(self) -> Sequence[DomainLayer]:
        return self.consumers or ()

    def _forward_in(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self._switched(input.unsqueeze(0), self._active).squeeze(0)
        return self._switched(input, self._active)

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        separate = self.training or torch.compiler.is_compiling() or self.weight.is_meta
        if separate or not mixed.fits_one_call(self, input):
            return mixed.apply(self, input, self._switched, 4)
        mixed.batch.check(self, input, 4)
        input, sides = self._padded(input)
        return mixed.gathered(self, input, [switch.channels().in_index for switch in mixed.states], sides, True)

    def _switched(self, input: Tensor, active: Any) -> Tensor:
        input, sides = self._padded(input)
        stride: Any = self.stride
        dilation: Any = self.dilation
        weight, bias = self.weight, self.bias
        if active is None:
            return call_gathered_conv2d(input, weight, bias, None, None, stride, sides, dilation, self.groups, False)
        # Lists are read from the scores on the host, which a traced program and tensors without values do not allow.
        compiling = torch.compiler.is_compiling()
        if compiling:
            refuse_onnx("switched_conv2d")
        if not (self.training or self.groups != 1 or compiling or weight.is_meta):
            listed = active.channels().in_index
            return call_gathered_conv2d(input, weight, bias, listed, None, stride, sides, dilation, 1, True)
        off_gradient = active.takes_off_gradient() if self.training else True
        read = self._read_by_consumers(input)
        # A number would be a constant of a compiled graph, which serves all domains.
        number = 0 if read is None else active.number
        last = (stride, sides, dilation, self.groups, off_gradient, read, number)
        if not in_checkpoint():
            return switched_operator(input, weight, bias, active(), *last)
        with held_input(input) as held:
            return switched_operator(held, weight, bias, active(), *last)

    def _read_by_consumers(self, input: Tensor) -> Tensor | None:
        """Of every output channel whether a consumer has it on, (C_out,), bool; None if that is not known or no use."""
        consumers = self.consumers
        if consumers is None or self._mixed is not None or torch.compiler.is_compiling() or input.device.type != "cpu":
            return None
        read: Tensor | None = None
        for consumer in consumers:
            switch = consumer._active
            if switch is None:
                return None
            on = switch.score.detach() > switch.threshold
            if type(on) is not Tensor:
                return None  # sharded, while the consumer is not running
            read = on if read is None else read | on
        return read

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        place = f"{prefix}domains."
        if not any(key.startswith(place) for key in state_dict):
            for name in self.domains:
                switch = self._switch_of(name)
                score = switch.score.detach()
                # Values in place of those that a layer on the meta device lacks.
                state_dict[f"{place}{name}.score"] = (
                    torch.full(score.shape, float(switch.initial)) if score.is_meta else score
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer would take its consumers along, and theirs.
        return {name: value for name, value in self.__dict__.items() if name != "consumers"}

    def extra_repr(self) -> str:
        """The dense layer's options, then the domains."""
        return f"{super().extra_repr()}, domains={list(self.domains)}"
