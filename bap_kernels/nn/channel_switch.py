"""The binary switches of one layer in one domain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from bap_kernels._load import _C
from bap_kernels._packed import count_steps
from bap_kernels._values import holds_values, version_of
from bap_kernels.channels import ChannelLists
from bap_kernels.nn.in_backward import once_for_each_forward

__all__ = ["ChannelSwitch"]

# From 1: the operators take 0 for callers without a number.
_numbers = itertools.count(1)


def _state_of(score: Tensor) -> Any:
    """What tells that scores have changed: a copy of their values; on a GPU, all but the values."""
    if score.is_cpu:
        return score.clone()
    version = version_of(score)
    if version < 0:
        return None
    # The storage is held, so that no other gets its address.
    return score.untyped_storage(), score.data_ptr(), version, count_steps(score)


def _is_state(score: Tensor, state: Any) -> bool:
    if isinstance(state, Tensor):
        return score.is_cpu and _C.same_values(score, state)
    if state is None or score.is_cpu:
        return False
    storage, *rest = state
    return score.untyped_storage()._cdata == storage._cdata and rest == [
        score.data_ptr(),
        version_of(score),
        count_steps(score),
    ]


def _without_values(score: Tensor) -> NotImplementedError:
    """For scores that are elsewhere, in parts, or mapped over: lists cannot be read from them."""
    kind = "one on the meta device" if score.is_meta else f"a {type(score).__name__} that stands for others"
    return NotImplementedError(
        f"ChannelSwitch.channels(): expected `score` to hold its values, got {kind}. Hint: offloading, sharding and "
        "torch.func leave none where lists are read; deploy ChannelTable.from_switches of the whole model with swap_, "
        "whose layers need no scores."
    )


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
        # Threshold, scores, and the lists that they made.
        self._listed: tuple[float, Any, ChannelLists] | None = None
        # Its own among all that are alive: by it the backward knows which lists it has seen.
        self.number = next(_numbers)

    def forward(self) -> Tensor:
        """The switches, (C,), float32 zeros and ones, differentiable in the scores."""
        value = self.score.detach()
        # The difference is exactly zero: the result is 0 or 1, and its gradient that of the score.
        return (value > self.threshold).to(value.dtype) + (self.score - value)

    def takes_off_gradient(self) -> bool:
        """Counts a training forward; returns whether channels that are off get a gradient in it.

        Without gradient nothing is counted, and a forward that checkpointing computes again counts once.
        """
        return True if self.ste_every == 1 else once_for_each_forward(self, self._counted)

    def _counted(self) -> bool:
        due = self.since == 0
        self.since = (self.since + 1) % self.ste_every
        return due

    def channels(self) -> ChannelLists:
        """The channels that are on, as the in-list; made anew only after the scores have changed.

        On a CPU the scores are compared by value, so that every change is seen. To read those on a GPU would stall it:
        there a change is seen by the version, by another storage, or by a step of an optimiser, and a write that leaves
        none of these, such as one through ``score.data``, is overlooked.
        """
        # Past nn.Module.__getattr__: an eval forward of a small layer takes only a few microseconds.
        score = self._parameters["score"]
        assert score is not None
        listed = self._listed
        known = listed is not None and listed[0] == self.threshold and type(score) is nn.Parameter
        if listed is not None and known and _is_state(score, listed[1]):
            return listed[2]
        # Tensors made in inference mode have no version, without which lists on a GPU are not kept.
        # Those of a fake mode, in which shapes are followed, have no values; scores do.
        if not (isinstance(score, FakeTensor) or holds_values(score)):
            raise _without_values(score)
        with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
            state = _state_of(score)
            values = state if score.is_cpu else score.detach()
            listed = self._listed = self.threshold, state, ChannelLists.from_mask(values > self.threshold)
        return listed[2]

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
