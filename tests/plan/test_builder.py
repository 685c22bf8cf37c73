"""Operations beyond plain convolutions: every way through the package equals the masked dense network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.flow.graph import Op
from bap_kernels.nn import MaskedConv2d
from bap_kernels.plan.planned import PlannedNetwork
from bap_kernels.plan.trace import trace
from tests.networks import masked_dense, randomise
from tests.plan.test_planned import assert_equal

pytestmark = pytest.mark.usefixtures("aten")


class Around(nn.Module):
    """A part between convolutions that are swapped."""

    def __init__(self, part: nn.Module | Callable[[Tensor], Tensor], c_in: int = 12, c_out: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c_in, 3, padding=1), nn.BatchNorm2d(c_in))
        self.part = part
        self.mid = nn.Sequential(nn.Conv2d(c_out, 9, 1), nn.BatchNorm2d(9), nn.ReLU())
        self.head = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.part(self.stem(x))))


def ops_of(model: nn.Module, x: Tensor, domain: str | None = None) -> list[Op]:
    return trace("plan", model, (x,), domain).ops


def check(model: nn.Module, kind: str | None = None, shape: tuple[int, ...] = (2, 3, 12, 10)) -> PlannedNetwork:
    """Layers, plan (of other sizes and batches, too), specialize, prune, order and mixed batches; returns a plan."""
    model = randomise(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = torch.randn((3, 3, shape[2] + 4, shape[3] + 2), generator=torch.Generator().manual_seed(1))
    for both in (False, True):
        dense = copy.deepcopy(model)
        swapped = bk.swap_(copy.deepcopy(model), layer_type=MaskedConv2d)
        table = bk.ChannelTable.random(swapped, ["a", "b"], 0.4, 5, both)
        bk.attach_(swapped, table)
        with torch.no_grad():
            masked = {name: masked_dense(copy.deepcopy(dense), table, name) for name in table}
            expected = {name: one(x) for name, one in masked.items()}
            planned = bk.plan(copy.deepcopy(swapped), x, "a")
            for name in table:
                bk.set_domain(planned, name)
                assert_equal(planned(x), expected[name])
                assert_equal(planned(other), masked[name](other))
                assert_equal(bk.specialize(swapped, name, x)(x), expected[name])
            numbers = torch.tensor([1, 0])
            bk.set_domain(planned, numbers)
            mixed = torch.stack([expected["b"][0], expected["a"][1]])
            assert_equal(planned(x), mixed)
            for change in (bk.prune_unused_, bk.order_channels_):
                changed = copy.deepcopy(swapped)
                change(changed, x)
                for name in table:
                    bk.set_domain(changed, name)
                    assert_equal(changed(x), expected[name])
                    assert_equal(bk.plan(changed, x, name)(x), expected[name])
        if kind is not None:
            assert kind in {op.kind for op in ops_of(swapped, x, "a")}
    bk.set_domain(planned, "a")
    return planned


def step_kinds(planned: PlannedNetwork) -> list[str]:
    return [step.kind for step in planned._program.steps]


# Grouped convolutions.


@pytest.mark.parametrize(
    ("c_in", "c_out", "groups"), [(12, 12, 4), (12, 18, 3), (12, 24, 12), (12, 6, 6), (12, 8, 2)], ids=str
)
def test_grouped_convolutions(c_in: int, c_out: int, groups: int) -> None:
    part = nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=groups == 4), nn.BatchNorm2d(c_out), nn.ReLU()
    )
    planned = check(Around(part, c_in, c_out), "grouped")
    assert "part.0" in planned.lowered
    assert not planned.not_lowered
    assert "opaque" not in step_kinds(planned)


@torch.no_grad()
def test_groups_that_nothing_reads_are_not_computed_and_are_dropped() -> None:
    part = nn.Conv2d(12, 12, 3, padding=1, groups=4, bias=False)
    model = randomise(Around(part))
    bk.swap_(model, layer_type=MaskedConv2d)
    bk.attach_(model, {"a": {"mid.0": bk.ChannelLists([0, 2, 7])}})
    x = torch.randn(1, 3, 8, 8)
    planned = bk.plan(model, x, "a")
    step = next(step for step in planned._program.steps if step.name == "part")
    assert step.note == "2/4 groups"
    assert step.weight.shape == (6, 3, 3, 3)
    bk.set_domain(model, "a")
    before = model(x)
    bk.prune_unused_(model, x)
    assert (model.part.groups, tuple(model.part.weight.shape)) == (2, (6, 3, 3, 3))
    assert model.stem[0].out_channels == 6
    assert_equal(model(x), before)


def test_groups_are_whole_where_a_sum_ties_them() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.flat = nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 1, groups=12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.deep(x) * self.flat(x)

    assert "opaque" not in step_kinds(check(Around(Sum()), "grouped"))


# Channels that the model's code takes.


def _split(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [2, 6, 4], 1)
    return torch.cat([c, F.relu(b), a], 1)


def _chunk(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, dim=1)
    return torch.cat([a * b, c, a], 1)


def _slices(x: Tensor) -> Tensor:
    return torch.cat([x[:, 3:], x[:, :3].sigmoid()], 1)


def _narrow(x: Tensor) -> Tensor:
    return torch.cat([x.narrow(1, 5, 7), x.narrow(1, 0, 5)], 1)


def _steps_of_two(x: Tensor) -> Tensor:
    return torch.cat([x[:, ::2], x[:, 1::2] + 1], 1)


def _shuffle(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    return x.view(N, 3, C // 3, H, W).transpose(1, 2).contiguous().view(N, -1, H, W)


def _shuffle_by_reshape(x: Tensor) -> Tensor:
    N, C, H, W = x.size()
    return x.reshape(N, C // 2, 2, H, W).permute(0, 2, 1, 3, 4).reshape(N, C, H, W)


def _shuffle_in_a_batch(x: Tensor) -> Tensor:
    N, C, H, W = x.size()
    x = x.reshape(N * C // 2, 2, H * W).permute(1, 0, 2)
    x = x.reshape(2, -1, C // 2, H, W)
    return torch.cat([x[0], x[1]], 1)


TAKEN = {
    one.__name__.strip("_"): one
    for one in (_split, _chunk, _slices, _narrow, _steps_of_two, _shuffle, _shuffle_by_reshape)
}


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", TAKEN)
def test_splits_and_slices(name: str) -> None:
    planned = check(Around(Called(TAKEN[name])), "take")
    assert "opaque" not in step_kinds(planned)
    assert not planned.not_lowered


def test_channel_shuffle_layers() -> None:
    assert "opaque" not in step_kinds(check(Around(nn.ChannelShuffle(4)), "take"))


def test_a_shuffle_through_the_batch_axis_is_right() -> None:
    check(Around(Called(_shuffle_in_a_batch)))


@torch.no_grad()
def test_unread_halves_are_not_computed() -> None:
    model = randomise(Around(Called(lambda x: x.chunk(2, 1)[1]), 12, 6))
    bk.swap_(model)
    x = torch.randn(1, 3, 8, 8)
    planned = bk.plan(model, x)
    assert next(step.kept for step in planned._program.steps if step.name == "stem.0") == "6/12"
    assert_equal(planned(x), model(x))


def test_views_of_the_pixels_are_no_shuffle() -> None:
    # With as many rows as groups, a view that mixes pixels and channels has the same shape.

    check(Around(Called(lambda x: x.transpose(2, 3).reshape(x.shape))))
    check(Around(Called(lambda x: x.flatten(1).view(x.shape[0], 12, x.shape[3], x.shape[2]).transpose(2, 3))))


# Norms.


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        self.conv, self.norm = nn.Conv2d(12, 12, 3, padding=1, bias=False), FrozenBatchNorm2d(12)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.running_var.uniform_(0.5, 1.5)
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def test_frozen_norms() -> None:
    planned = check(Around(Frozen()), "norm")
    assert step_kinds(planned).count("conv+norm+relu") == 2
    assert "opaque" not in step_kinds(planned)


class NormAct(nn.Module):
    def __init__(self, act: str) -> None:
        super().__init__()
        layers = pytest.importorskip("timm.layers")
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12 if act == "silu" else 1)
        self.norm = layers.BatchNormAct2d(12, act_layer=layers.get_act_layer(act), drop_layer=nn.Dropout2d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("act", ["relu", "silu", "hard_swish", "gelu_tanh", "prelu"])
def test_norms_with_activation(act: str) -> None:
    planned = check(Around(NormAct(act)), "norm")
    assert ("opaque" in step_kinds(planned)) == (act == "prelu")
    if act == "relu":
        assert step_kinds(planned).count("conv+norm+relu") == 2


# Padding.


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding(mode: str) -> None:
    planned = check(Around(nn.Conv2d(12, 12, 3, padding=1, padding_mode=mode)))
    assert not planned.not_lowered


@pytest.mark.parametrize("groups", [1, 12])
def test_same_padding_of_timm(groups: int) -> None:
    conv = pytest.importorskip("timm.layers").Conv2dSame(12, 12, 3, stride=2, groups=groups)
    planned = check(Around(conv), shape=(2, 3, 13, 10))
    assert "part" in planned.lowered
    assert "opaque" not in step_kinds(planned)


# Gates, scales and other arithmetic.


class Gated(nn.Module):
    """Squeeze and excitation, a spatial gate, and a scale for each channel and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.where = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1), nn.Conv2d(12, 1, 3, padding=1)
        self.gamma, self.beta = nn.Parameter(torch.rand(12, 1, 1)), nn.Parameter(torch.rand(1, 12, 1, 1))
        self.alpha = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True))))
        y = x * torch.sigmoid(y)
        y = torch.sigmoid(self.where(y)) * y
        return 1 - self.alpha * (y * self.gamma + self.beta) + x / 2


def test_gates_and_scales() -> None:
    planned = check(Around(Gated()), "map")
    assert not planned.not_lowered


@pytest.mark.parametrize("slopes", [1, 12])
def test_prelu(slopes: int) -> None:
    prelu = nn.PReLU(slopes)
    with torch.no_grad():
        prelu.weight.uniform_(-1, 1)
    check(Around(prelu))


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(12, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.small(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        z = F.interpolate(y, scale_factor=2.0)[:, :, : x.shape[2], : x.shape[3]]
        return x + z


def test_sizes_need_no_channels() -> None:
    planned = check(Around(Resized()), "size")
    assert not planned.not_lowered


@torch.no_grad()
def test_a_size_keeps_nothing_alive() -> None:
    class Size(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.small = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            big = self.big(x)
            return F.interpolate(self.small(x), size=big.shape[2:]) * big.shape[1]

    model = bk.swap_(randomise(Size()))
    x = torch.randn(1, 3, 8, 8)
    planned = bk.plan(model, x)
    assert_equal(planned(x), model(x))
    assert_equal(bk.specialize(model, None, x)(x), model(x))
    assert next(step.kept for step in planned._program.steps if step.name == "big") == "1/16"


def test_blur_pooling_of_timm() -> None:
    blur = pytest.importorskip("timm.layers").BlurPool2d
    for part in (blur(12), blur()):
        assert "opaque" not in step_kinds(check(Around(part)))


def test_layers_called_with_keywords() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(input=x))

    planned = check(Around(Keyword()))
    assert "part.conv" in planned.lowered
