"""Classifiers with one set of parameters per domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.nn.domain_copies import copies_of, is_hook_table, refuse_own_forward
from bap_kernels.nn.mixed import MixedStates
from bap_kernels.nn.per_domain import PerDomain, checked_names

__all__ = ["DomainConv2d", "DomainHead", "DomainLinear", "outputs_of"]

_Head = TypeVar("_Head", bound="DomainHead")


def _resized(where: str, layer: nn.Module, size: int) -> nn.Module:
    """A new layer like a linear layer or a convolution, for another number of outputs."""
    weight = layer._parameters.get("weight")
    has_bias = layer._parameters.get("bias") is not None
    options: dict[str, Any] = {"bias": has_bias}
    if weight is not None:
        options.update(device=weight.device, dtype=weight.dtype)
    new: nn.Module
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, size, **options)
    else:
        assert isinstance(layer, nn.Conv2d)
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = nn.Conv2d(layer.in_channels, size, *shape, padding_mode=layer.padding_mode, **options)  # type: ignore[arg-type]
    if type(layer).forward is not type(new).forward:
        # The class's own forward knows no number of outputs but those that every such layer has.
        if weight is None or not layer.__dict__.keys() <= new.__dict__.keys() | {"_domain_name"}:
            raise NotImplementedError(
                f"{where}(): expected a plain {type(new).__name__} for a domain with another number of outputs, got a "
                f"{type(layer).__name__}, which may compute something else. Hint: make the domain's layer by hand."
            )
        new.__class__ = type(layer)
    elif weight is None:
        raise NotImplementedError(
            f"{where}(): expected a weight that is a parameter for a domain with another number of outputs, got a "
            f"{type(layer).__name__} whose weight is computed. Hint: make the domain's layer by hand."
        )
    for key, value in layer.__dict__.items():
        if is_hook_table(key, value):
            new.__dict__[key] = value
    return new.train(layer.training)


def outputs_of(layer: nn.Module) -> int:
    """The number of outputs of a linear layer or a convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


class DomainHead(PerDomain):
    """Base of the classifiers with one layer per domain."""

    # Of the result: axes after that of the classes, and axes of an input; None takes any.
    _trailing_axes = 0
    _input_axes: int | None = None

    @classmethod
    def _from_layer(cls: type[_Head], argument: str, layer: nn.Module, sizes: Mapping[str, int]) -> _Head:
        """A layer whose domains start from a copy of ``layer`` where they have as many outputs, else at random."""
        refuse_own_forward(cls.__name__, argument, layer)
        names = checked_names(cls.__name__, sizes)
        copies = copies_of(layer, [name for name in names if sizes[name] == outputs_of(layer)], None)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._hold({name: copies.get(name) or _resized(cls.__name__, layer, sizes[name]) for name in names})
        head.training = head.domains.training = layer.training
        return head

    def add_domain(self, name: str, size: int) -> None:
        """Adds a domain with new parameters and ``size`` outputs; the others stay as they are."""
        self._add(name, _resized(type(self).__name__, next(iter(self.domains.values())), size))

    def _forward_mixed(self, input: Tensor, mixed: MixedStates) -> Tensor:
        most = max(outputs_of(layer) for layer in mixed.states)

        def padded(samples: Tensor, layer: nn.Module) -> Tensor:
            # -inf is no probability and never the largest: softmax and argmax are each domain's own.
            missing = (0, 0) * self._trailing_axes + (0, most - outputs_of(layer))
            return F.pad(layer(samples), missing, value=-torch.inf)

        return mixed.apply(self, input, padded, self._input_axes)

    def _dense_values(self, module: nn.Module, dense: dict[str, Any]) -> dict[str, Any]:
        weight = module._parameters.get("weight")
        if weight is None or "weight" not in dense or dense["weight"].shape == weight.shape:
            return dense
        # A classifier for other classes: the domain keeps what it has. Without values its keys count as missing.
        return {} if weight.is_meta else module.state_dict()


class DomainLinear(DomainHead):
    """:class:`torch.nn.Linear` with weight, bias and number of outputs of its own for every domain.

    :attr:`domains` holds one :class:`torch.nn.Linear` per domain. The state of a dense layer loads too, also strictly:
    it becomes that of every domain with as many outputs, unless the file has values for that domain.

    Args:
        in_features: size of the last axis of the input.
        out_features: {domain: size of the last axis of the output}.
        bias, device, dtype: as in :class:`torch.nn.Linear`.

    Shape:
        - Input: (..., in_features)
        - Output: (..., out_features of the active domain); of a mixed batch (N, ..., the largest out_features in it)

    Raises:
        ValueError: for names of domains that are empty, have dots or repeat.
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> head = bk.nn.DomainLinear(16, {"birds": 200, "cars": 196})
        >>> head.set_domain("cars")
        >>> head(torch.randn(2, 16)).shape
        torch.Size([2, 196])
    """

    def __init__(
        self,
        in_features: int,
        out_features: Mapping[str, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        names = checked_names(type(self).__name__, out_features)
        self._hold(
            {
                name: nn.Linear(in_features, size, bias, device=device, dtype=dtype)
                for name, size in zip(names, out_features.values(), strict=True)
            }
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, out_features: Mapping[str, int]) -> DomainLinear:
        """A layer whose domains start from a copy of ``linear`` where they have as many outputs, else at random.

        Args:
            linear: gives the input's size, bias or none, device and dtype; a subclass too. Its hooks are shared.
            out_features: {domain: number of outputs}.

        Raises:
            NotImplementedError: for other numbers of outputs of a subclass with a forward of its own, and of a layer
                whose weight is computed.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> dense = nn.Linear(16, 1000)
            >>> head = bk.nn.DomainLinear.from_linear(dense, {"imagenet": 1000, "cars": 196})
            >>> bool((head.domains["imagenet"].weight == dense.weight).all())
            True
        """
        head = cls._from_layer("linear", linear, out_features)
        head.in_features = linear.in_features
        return head

    def add_domain(self, name: str, out_features: int) -> None:
        """Adds a domain with new parameters; the others stay as they are.

        Args:
            name: the new domain.
            out_features: its number of outputs.
        """
        super().add_domain(name, out_features)


class DomainConv2d(DomainHead):
    """:class:`torch.nn.Conv2d` with weight, bias and number of output channels of its own for every domain.

    It is a classifier of pixels, or one before a mean over them. :attr:`domains` holds one :class:`torch.nn.Conv2d` per
    domain. The state of a dense layer loads too, also strictly: it becomes that of every domain with as many outputs,
    unless the file has values for that domain.

    Shape:
        - Input: (N, C_in, H, W)
        - Output: (N, C_out of the active domain, oH, oW); of a mixed batch (N, the largest C_out in it, oH, oW)

    Raises:
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import bap_kernels as bk
        >>> head = bk.nn.DomainConv2d.from_conv2d(nn.Conv2d(16, 21, 1), {"voc": 21, "city": 19})
        >>> head.set_domain("city")
        >>> head(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 19, 4, 4])
    """

    _trailing_axes = 2
    _input_axes = 4

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, out_channels: Mapping[str, int]) -> DomainConv2d:
        """A layer whose domains start from a copy of ``conv`` where they have as many outputs, else at random.

        Args:
            conv: gives everything but the number of outputs; its hooks are shared.
            out_channels: {domain: number of outputs}.

        Raises:
            NotImplementedError: for other numbers of outputs with groups, and of a layer whose weight is computed.
        """
        if conv.groups != 1:
            raise NotImplementedError(f"{cls.__name__}.from_conv2d(): expected groups=1, got groups={conv.groups}.")
        return cls._from_layer("conv", conv, out_channels)

    def add_domain(self, name: str, out_channels: int) -> None:
        """Adds a domain with new parameters; the others stay as they are.

        Args:
            name: the new domain.
            out_channels: its number of outputs.
        """
        super().add_domain(name, out_channels)
