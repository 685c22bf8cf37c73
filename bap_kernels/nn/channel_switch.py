"""The binary switches of one layer in one domain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bap_kernels.channels import ChannelLists

__all__ = ["ChannelSwitch"]

# From 1: the operators take 0 for callers without a number.
_numbers = itertools.count(1)


class ChannelSwitch(nn.Module):
    r"""The binary switches of one layer in one domain, trained through real scores.

    .. math:: s_c = 1[\tilde s_c > \tau], \qquad \partial L / \partial \tilde s_c := \partial L / \partial s_c

    The gradient passes unchanged, also where a channel is off: the straight-through estimator of *Budget-Aware Adapters
    for Multi-Domain Learning* (arXiv 1905.06242) [Q]. Scores stay float32 when the model's dtype changes, as rounding
    them could turn a switch.

    Args:
        channels: C.
        threshold: τ.
        initial: the value of all scores to start with.
        ste_every: channels that are off get a gradient in every ``ste_every``-th training forward, from the first on.
        device: of the scores.

    Attributes:
        score: the parameter, (C,), float32.

    Examples:
        >>> import torch
        >>> from bap_kernels.nn import ChannelSwitch
        >>> switch = ChannelSwitch(3)
        >>> with torch.no_grad():
        ...     switch.score[1] = 0
        >>> switch()
        tensor([1., 0., 1.], grad_fn=<AddBackward0>)
        >>> switch.channels()
        ChannelLists(in_index=[0, 2], out_index=None)
    """

    score: nn.Parameter

    def __init__(
        self,
        channels: int,
        threshold: float = 5e-3,
        initial: float = 1e-2,
        ste_every: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(ste_every, bool) or not isinstance(ste_every, int) or ste_every < 1:
            raise ValueError(f"ChannelSwitch(): expected `ste_every` to be an int of at least 1, got {ste_every!r}.")
        self.threshold = threshold
        self.initial = initial
        self.ste_every = ste_every
        # Training forwards since the channels that are off last got a gradient.
        self.since = 0
        self.score = nn.Parameter(torch.full((channels,), float(initial), dtype=torch.float32, device=device))
        self._listed: tuple[tuple[int, int, float], ChannelLists] | None = None
        # Its own among all that are alive: by it the backward knows which lists it has seen.
        self.number = next(_numbers)

    def forward(self) -> Tensor:
        """The switches, (C,), float32 zeros and ones, differentiable in the scores."""
        value = self.score.detach()
        # The difference is exactly zero: the result is 0 or 1, and its gradient that of the score.
        return (value > self.threshold).to(value.dtype) + (self.score - value)

    def takes_off_gradient(self) -> bool:
        """Counts a training forward; says whether channels that are off get a gradient in it."""
        if self.ste_every == 1:
            return True
        due = self.since == 0
        self.since = (self.since + 1) % self.ste_every
        return due

    def channels(self) -> ChannelLists:
        """The channels that are on, as the in-list; made anew only after the scores have changed.

        As the packed weights do, this overlooks writes through ``score.data``, except those that move it.
        """
        # Past nn.Module.__getattr__: an eval forward of a small layer takes only a few microseconds.
        score = self._parameters["score"]
        assert score is not None
        if score.is_inference():
            return ChannelLists.from_mask(score > self.threshold)
        state = score.data_ptr(), score._version, self.threshold
        listed = self._listed
        if listed is None or listed[0] != state:
            # Tensors made in inference mode have no version, without which no packed weights are kept.
            with torch.inference_mode(False):
                listed = self._listed = state, ChannelLists.from_mask(score.detach() > self.threshold)
        return listed[1]

    def reset_parameters(self) -> None:
        """Sets all scores to :attr:`initial`."""
        with torch.no_grad():
            self.score.fill_(self.initial)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelSwitch:
        before = self.score.detach()
        super()._apply(fn, recurse)
        score, gradient = self.score, self.score.grad
        if score.dtype != torch.float32:
            score.data = torch.empty_like(score, dtype=torch.float32) if before.is_meta else before.to(score.device)
            if gradient is not None:
                score.grad = None
                score.grad = gradient.float()
        self._listed = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A pointer and a version say nothing about a copy.
        return {**self.__dict__, "_listed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = next(_numbers)

    def extra_repr(self) -> str:
        """Width and threshold."""
        return f"{len(self.score)}, threshold={self.threshold:g}"
