"""bap_kernels.flow.norms: which batch norms are known, and what they hold."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from bap_kernels.flow.norms import is_norm, norm_parts, unknown_norm_reason


def _timm(name):
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="timm is not installed")
    return getattr(norm_act, name)


def _plain():
    return nn.BatchNorm2d(4, eps=1e-2)


def _unaffine():
    return nn.BatchNorm2d(4, affine=False)


def _sync():
    return nn.SyncBatchNorm(4)


def _frozen():
    return torchvision.ops.FrozenBatchNorm2d(4, eps=1e-2)


def _act():
    return _timm("BatchNormAct2d")(4, eps=1e-2, act_layer=nn.SiLU)


def _drop():
    return _timm("BatchNormAct2d")(4, drop_layer=nn.Tanh, act_layer=nn.GELU, inplace=False)


def _sync_act():
    return _timm("convert_sync_batchnorm")(_act())


def _bare_sync_act():
    return _timm("SyncBatchNormAct")(4)


def _frozen_act():
    return _timm("freeze_batch_norm_2d")(_act())


_ALL = [_plain, _unaffine, _sync, _frozen, _act, _drop, _sync_act, _bare_sync_act, _frozen_act]


def _varied(norm):
    """Values that are all different, so that no two can be mistaken for each other."""
    torch.manual_seed(0)
    for value in [*norm.parameters(), *norm.buffers()]:
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("make", _ALL)
def test_parts_compute_what_the_norm_computes(make):
    norm = _varied(make())
    parts = norm_parts(norm)
    assert parts is not None
    assert parts.channels == 4
    assert parts.has_statistics
    x = torch.randn(2, 4, 5, 3)
    want = norm(x.clone())
    torch.testing.assert_close(parts(x.clone()), want)
    scale, shift = parts.scale_and_shift()
    by_hand = x * scale[:, None, None] + shift[:, None, None]
    by_class = parts.plain()(x)
    for module in parts.after:
        by_hand, by_class = module(by_hand), module(by_class)
    torch.testing.assert_close(by_hand, want)
    torch.testing.assert_close(by_class, want)


@pytest.mark.parametrize("make", _ALL)
def test_parts_share_the_tensors_and_say_whether_training_moves_them(make):
    norm = _varied(make())
    parts = norm_parts(norm)
    assert parts.running_mean is norm.running_mean
    assert parts.weight is norm.weight
    assert parts.plain().running_var.data_ptr() == norm.running_var.data_ptr()
    before = norm.running_mean.clone()
    # Training of SyncBatchNorm needs a GPU.
    if not isinstance(norm, nn.SyncBatchNorm):
        norm.train()(torch.randn(2, 4, 5, 3) + 7)
        assert torch.equal(before, norm.running_mean) == parts.fixed


@pytest.mark.parametrize(
    ("make", "after"),
    [(_act, [nn.SiLU]), (_drop, [nn.Tanh, nn.GELU]), (_sync_act, [nn.SiLU]), (_frozen_act, [nn.SiLU])],
)
def test_parts_name_what_follows_the_norm_in_its_order(make, after):
    assert [type(module) for module in norm_parts(make()).after] == after


def test_a_norm_without_statistics_is_known_and_says_so():
    norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    parts = norm_parts(norm)
    assert not parts.has_statistics
    assert parts.channels == 4
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(parts(x), norm(x))
    with pytest.raises(ValueError, match="with running statistics"):
        parts.plain()


def test_a_subclass_that_computes_the_same_is_known():
    class Named(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels, eps=1e-3)

        def reset(self):
            self.reset_parameters()

    assert norm_parts(Named(4)).eps == 1e-3
    assert norm_parts(copy.deepcopy(Named(4))) is not None


class _NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class _Called(nn.BatchNorm2d):
    def __call__(self, x):
        return -super().__call__(x)


class _Computed(nn.BatchNorm2d):
    @property
    def weight(self):
        return 1 + self.gain

    def __init__(self, channels):
        super().__init__(channels)
        self.gain = self._parameters.pop("weight")


def _own_forward():
    norm = nn.BatchNorm2d(4)
    norm.forward = torch.relu
    return norm


def _parametrized():
    return nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None)


def _pruned():
    import torch.nn.utils.prune

    return torch.nn.utils.prune.random_unstructured(nn.BatchNorm2d(4), "weight", 0.5)


def _without_act():
    norm = _act()
    del norm.act
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _NormAct(4), "_NormAct is a subclass of BatchNorm2d"),
        (lambda: _Called(4), "_Called is a subclass of BatchNorm2d"),
        (lambda: _Computed(4), "its weight is neither a parameter nor a buffer"),
        (_own_forward, "a forward of its own was set"),
        (_parametrized, "its parameters are parametrized"),
        (_pruned, "its weight is neither a parameter nor a buffer"),
        (_without_act, "it has no module 'act'"),
        (nn.LazyBatchNorm2d, "LazyBatchNorm2d is no batch norm of images"),
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d is no batch norm of images"),
        (lambda: nn.BatchNorm3d(4), "BatchNorm3d is no batch norm of images"),
        (lambda: nn.InstanceNorm2d(4, affine=True), "InstanceNorm2d is no batch norm of images"),
        (lambda: nn.GroupNorm(2, 4), "GroupNorm is no batch norm of images"),
        (lambda: nn.LayerNorm(4), "LayerNorm is no batch norm of images"),
    ],
)
def test_other_norms_are_not_known_and_the_reason_is_named(make, reason):
    norm = make()
    assert norm_parts(norm) is None
    assert reason in unknown_norm_reason(norm)
    assert is_norm(norm)


@pytest.mark.parametrize("make", [nn.ReLU, lambda: nn.Conv2d(3, 4, 1), lambda: nn.Linear(3, 4), nn.Sequential])
def test_modules_that_do_not_normalise_are_no_norms(make):
    assert norm_parts(make()) is None
    assert not is_norm(make())
