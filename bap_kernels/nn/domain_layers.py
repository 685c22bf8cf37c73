"""Batch norm and linear layers with one set of parameters per domain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bap_kernels.nn.mixed import Runs
from bap_kernels.nn.per_domain import PerDomain, checked_names

__all__ = ["DomainBatchNorm2d", "DomainLinear"]

_LINEAR_KEYS = ("weight", "bias")
_NORM_KEYS = (*_LINEAR_KEYS, "running_mean", "running_var", "num_batches_tracked")


def _spread_dense_keys(layer: PerDomain, state: dict[str, Any], prefix: str, keys: tuple[str, ...]) -> None:
    """Gives the values under a dense layer's keys to every domain that has none in ``state``."""
    dense = {key: state.pop(prefix + key) for key in keys if prefix + key in state}
    if not dense:
        return
    for name, module in layer.domains.items():
        place = f"{prefix}domains.{name}."
        if any(key.startswith(place) for key in state):
            continue
        values = dense
        if isinstance(module, nn.Linear) and "weight" in dense and dense["weight"].shape != module.weight.shape:
            # A classifier for other classes: the domain keeps what it has.
            values = module.state_dict()
        state.update({place + key: value for key, value in values.items()})


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A batch norm with fixed statistics as y = scale * x + shift, (C,) each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


class DomainBatchNorm2d(PerDomain):
    """:class:`torch.nn.BatchNorm2d` with weight, bias and running statistics of its own for every domain.

    :attr:`domains` holds one :class:`torch.nn.BatchNorm2d` per domain. The state of a dense batch norm loads too, also
    strictly: every domain then starts from it, unless the file has values for that domain.

    Args:
        num_features: C.
        domains: names of the domains.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.

    Shape:
        - Input: (N, C, H, W)
        - Output: (N, C, H, W)

    Raises:
        ValueError: for names of domains that are empty, have dots or repeat.
        RuntimeError: when called before a domain was chosen.

    Examples:
        >>> import torch
        >>> import bap_kernels as bk
        >>> norm = bk.nn.DomainBatchNorm2d(4, ["birds", "cars"])
        >>> norm.set_domain("cars")
        >>> y = norm(torch.randn(2, 4, 5, 5) + 3)
        >>> norm.domains["birds"].running_mean
        tensor([0., 0., 0., 0.])
        >>> bool((norm.domains["cars"].running_mean > 0.2).all())
        True
    """

    def __init__(
        self,
        num_features: int,
        domains: Iterable[str],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self._hold(
            {
                name: nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, **options)
                for name in checked_names(type(self).__name__, domains)
            }
        )

    @classmethod
    def from_batch_norm2d(cls, norm: nn.BatchNorm2d, domains: Iterable[str]) -> DomainBatchNorm2d:
        """A layer whose domains all start from the affine parameters and the statistics of ``norm``, as copies.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> norm = bk.nn.DomainBatchNorm2d.from_batch_norm2d(nn.BatchNorm2d(4, momentum=0.2), ["birds"])
            >>> norm.domains["birds"].momentum
            0.2
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold({name: copy.deepcopy(norm) for name in checked_names(cls.__name__, domains)})
        layer.training = norm.training
        return layer

    def add_domain(self, name: str, like: str | None = None) -> None:
        """Adds a domain; the others stay as they are.

        Args:
            name: the new domain.
            like: the domain to copy parameters and statistics from; None starts as a new batch norm does.
        """
        pattern = self._module_of(next(iter(self.domains)) if like is None else like)
        assert isinstance(pattern, nn.BatchNorm2d)
        made = copy.deepcopy(pattern)
        if like is None:
            made.reset_parameters()
        self._add(name, made)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises with the active domain's parameters and statistics."""
        if self._mixed is not None:
            return self._normalised_mixed(input, self._mixed)
        active = self._active
        if active is None:
            raise self._no_domain()
        return active(input)

    def _normalised_mixed(self, input: Tensor, runs: Runs) -> Tensor:
        norms: list[nn.BatchNorm2d] = runs.states
        fixed = all(not (norm.training or norm.running_var is None) for norm in norms)
        if not fixed or torch.is_autocast_enabled(input.device.type):
            return runs.apply(self, input, lambda part, norm: norm(part))
        runs.batch.check(self, input)
        # One scale and one shift for each sample and channel: a single pass over the batch.
        scales, shifts = zip(*(_scale_and_shift(norm) for norm in norms), strict=True)
        counts = torch.tensor(runs.batch.counts, device=input.device)
        scale, shift = (
            torch.stack(rows)
            .repeat_interleave(counts, 0, output_size=runs.batch.size)[:, :, None, None]
            .to(input.dtype)
            for rows in (scales, shifts)
        )
        return torch.addcmul(shift, input, scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _spread_dense_keys(self, state_dict, prefix, _NORM_KEYS)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DomainLinear(PerDomain):
    """:class:`torch.nn.Linear` with weight, bias and number of outputs of its own for every domain.

    :attr:`domains` holds one :class:`torch.nn.Linear` per domain. The state of a dense layer loads too, also strictly:
    it becomes that of every domain with as many outputs, unless the file has values for that domain.

    Args:
        in_features: size of the last axis of the input.
        out_features: {domain: size of the last axis of the output}.
        bias, device, dtype: as in :class:`torch.nn.Linear`.

    Shape:
        - Input: (*, in_features)
        - Output: (*, out_features of the active domain); of a mixed batch (N, *, the largest out_features in it)

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
            linear: gives the input's size, bias or none, device and dtype.
            out_features: {domain: number of outputs}.

        Examples:
            >>> from torch import nn
            >>> import bap_kernels as bk
            >>> dense = nn.Linear(16, 1000)
            >>> head = bk.nn.DomainLinear.from_linear(dense, {"imagenet": 1000, "cars": 196})
            >>> bool((head.domains["imagenet"].weight == dense.weight).all())
            True
        """
        weight = linear.weight
        layer = cls(linear.in_features, out_features, linear.bias is not None, weight.device, weight.dtype)
        for module in layer.domains.values():
            if module.out_features == linear.out_features:
                module.load_state_dict(linear.state_dict())
                for new, old in zip(module.parameters(), linear.parameters(), strict=True):
                    new.requires_grad_(old.requires_grad)
        return layer.train(linear.training)

    def add_domain(self, name: str, out_features: int) -> None:
        """Adds a domain with new parameters; the others stay as they are.

        Args:
            name: the new domain.
            out_features: its number of outputs.
        """
        pattern = next(iter(self.domains.values()))
        weight = pattern.weight
        has_bias = pattern.bias is not None
        self._add(name, nn.Linear(self.in_features, out_features, has_bias, weight.device, weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the active domain's layer; in a mixed batch, each sample's, with -inf beyond its domain's outputs."""
        if self._mixed is not None:
            return self._applied_mixed(input, self._mixed)
        active = self._active
        if active is None:
            raise self._no_domain()
        return active(input)

    def _applied_mixed(self, input: Tensor, runs: Runs) -> Tensor:
        most = max(linear.out_features for linear in runs.states)

        def one(part: Tensor, linear: nn.Linear) -> Tensor:
            # No probability and never the largest: softmax and argmax are each domain's own.
            return F.pad(linear(part), (0, most - linear.out_features), value=-torch.inf)

        return runs.apply(self, input, one)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _spread_dense_keys(self, state_dict, prefix, _LINEAR_KEYS)
        super()._load_from_state_dict(state_dict, prefix, *args)
