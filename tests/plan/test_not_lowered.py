"""What plans, prunings and reports say of convolutions and channels that they do not serve."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from tests.networks import DataDependent, Residual, randomise, unit
from tests.plan.test_builder import Around


@pytest.fixture(autouse=True)
def _one_backend() -> None:
    with bk.use_backend("aten"):
        yield


class Opaque(nn.Module):
    """All of its code depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DataDependent.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def eight(width: int = 8) -> Tensor:
    return torch.randn(2, width, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_plan_that_lowers_nothing_warns() -> None:
    model = bk.swap_(randomise(Opaque()))
    message = r"plan\(\): no convolution of the model was lowered.* 'inner.conv': inside 'inner' \(Inner\)"
    with pytest.warns(UserWarning, match=message) as caught:
        planned = bk.plan(model, eight())
    assert [one.filename for one in caught] == [__file__]
    assert planned.lowered == ()
    assert list(planned.not_lowered) == ["inner.conv"]
    assert "not lowered (1 of 1): 'inner.conv'" in repr(planned)
    with pytest.warns(UserWarning, match=r"specialize\(\): no convolution"):
        bk.specialize(model, None, eight())


@torch.no_grad()
def test_a_plan_that_lowers_something_does_not_warn() -> None:
    model = bk.swap_(randomise(DataDependent()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = bk.plan(model, eight(3))
        without = bk.plan(nn.Sequential(nn.ReLU()).eval(), eight())
    assert planned.lowered == ("stem.0", "tail")
    assert "not lowered (1 of 3): 'inner.conv'" in repr(planned)
    assert without.lowered == ()


def with_lists(model: nn.Module, lists: dict[str, list[int]]) -> nn.Module:
    model = bk.swap_(randomise(model), layer_type=bk.nn.MaskedConv2d)
    return bk.attach_(model, {"a": {name: bk.ChannelLists(listed) for name, listed in lists.items()}})


@torch.no_grad()
def test_a_pruning_that_drops_nothing_warns() -> None:
    model = with_lists(DataDependent(), {"tail": [0, 1]})
    with pytest.warns(UserWarning, match=r"prune_unused_\(\): no channel was dropped.*'inner'.*has no rule") as caught:
        report = bk.prune_unused_(model, eight(3))
    assert [one.filename for one in caught] == [__file__]
    assert report.parameters[0] == report.parameters[1]
    assert list(report.obstacles) == ["inner"]
    assert "unused channels stay: 'inner'" in str(report)


@torch.no_grad()
def test_a_pruning_with_nothing_to_drop_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bk.prune_unused_(with_lists(Residual(), {}), eight(3))
        assert report.obstacles == {}
        assert bk.prune_unused_(with_lists(Residual(), {"a2": [1, 3]}), eight(3)).parameters[1] < report.parameters[1]


@torch.no_grad()
def test_an_obstacle_beside_what_goes_is_named() -> None:
    model = with_lists(nn.Sequential(unit(3, 8), Opaque(), unit(8, 8), nn.Conv2d(8, 4, 1)), {"2.0": [0, 1], "3": [5]})
    report = bk.prune_unused_(model, eight(3))
    assert report.parameters[1] < report.parameters[0]
    assert list(report.obstacles) == ["1.inner"]


@torch.no_grad()
def test_macs_count_convolutions_wherever_they_run() -> None:
    # 3 -> 8 by 3x3, an opaque 8 -> 8 by 3x3, and 8 -> 5 by 1x1, on 8x8 pixels of two images.
    pixels = 2 * 64
    whole = pixels * (3 * 8 * 9 + 8 * 8 * 9 + 8 * 5)
    model = with_lists(DataDependent(), {})
    assert bk.prune_unused_(model, eight(3)).macs == (whole, whole)
    grouped = with_lists(Around(nn.Conv2d(12, 12, 3, padding=1, groups=4)), {"head": [0, 1, 2]})
    report = bk.prune_unused_(grouped, eight(3))
    before = pixels * (3 * 12 * 9 + 12 * 3 * 9 + 12 * 9 + 9 * 4)
    assert report.macs == (before, before - pixels * (12 * 6 + 6 * 4))


@torch.no_grad()
def test_macs_without_an_example() -> None:
    model = with_lists(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), {"1": [0, 7]})
    pixels = 224 * 224
    assert bk.prune_unused_(model).macs == (pixels * (24 + 32), pixels * (6 + 8))


@torch.no_grad()
def test_a_report_names_what_is_not_served() -> None:
    model = bk.swap_(randomise(Around(nn.Conv2d(12, 12, 3, padding=1, groups=4))))
    report = bk.report(model, eight(3))
    assert list(report.not_served) == ["part"]
    assert "not served: 'part': groups=4" in str(report)
