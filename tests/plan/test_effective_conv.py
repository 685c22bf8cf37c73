"""Convolutions of other classes: those with a computed weight are lowered, others run as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from tests.networks import randomise
from tests.plan.test_builder import Around, check

pytestmark = pytest.mark.usefixtures("aten")


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(input, weight.reshape_as(self.weight), self.bias, 1, self.padding, groups=self.groups)


class Named(nn.Conv2d):
    """It only has another name."""


class Scaled(nn.Conv2d):
    """Something is done to the result."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Sized(nn.Conv2d):
    """Its weight depends on the input."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * input.shape[-1], self.bias)


@pytest.mark.parametrize("cls", [Standardised, Named, Scaled])
@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions_with_a_computed_weight_are_lowered(cls: type[nn.Conv2d], groups: int) -> None:
    planned = check(Around(cls(12, 12, 3, padding=1, groups=groups)))
    assert "part" in planned.lowered
    assert not planned.not_lowered


def test_convolutions_without_a_rule_run_as_they_are() -> None:
    planned = check(Around(Sized(12, 12, 3, padding=1)))
    assert "part" not in planned.lowered
    assert list(planned.not_lowered.values()) == ["a call of F.conv2d whose weight is no parameter"]


class Remembering(nn.Conv2d):
    """It keeps what it was called with last."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.last: object = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.last, self.calls = input, self.calls + 1
        return super().forward(input)


@torch.no_grad()
def test_a_plan_leaves_nothing_in_a_convolution() -> None:
    model = bk.swap_(randomise(Around(Remembering(12, 12, 3, padding=1))))
    bk.plan(model, torch.randn(1, 3, 8, 8))
    assert model.part.last is None
    assert model.part.calls == 0


def test_parametrized_convolutions() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
    assert "part" in check(Around(conv)).lowered
