"""Batch norms of every kind in switch_: each domain has a norm of its own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

import bap_kernels as bk
from bap_kernels.nn import DomainBatchNorm2d, DomainNorm, switch_


class NormAct(nn.BatchNorm2d):
    """A subclass that nobody knows."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Foreign(nn.Module):
    """A frozen batch norm of another library."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.rand(channels) + 0.5)
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        return (x - self.running_mean[:, None, None]) * (self.scale / self.running_var.sqrt())[:, None, None]


def _timm(name, *args, **options):
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="timm is not installed")
    return getattr(norm_act, name)(*args, **options)


KINDS = {
    "plain": lambda: nn.BatchNorm2d(4),
    "without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "sync": lambda: nn.SyncBatchNorm(4),
    "frozen": lambda: torchvision.ops.FrozenBatchNorm2d(4),
    "subclass": lambda: NormAct(4),
    "foreign": lambda: Foreign(4),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "timm": lambda: _timm("BatchNormAct2d", 4, act_layer=nn.PReLU),
    "timm, sync": lambda: _timm("convert_sync_batchnorm", _timm("BatchNormAct2d", 4)),
    "timm, frozen": lambda: _timm("freeze_batch_norm_2d", _timm("BatchNormAct2d", 4)),
}
OF_IMAGES = set(KINDS) - {"foreign", "instance norm"}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), KINDS[kind](), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return model


def _storages(module: nn.Module) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in [*module.parameters(), *module.buffers()]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_domain_starts_from_the_plain_norm(kind: str) -> None:
    plain = _model(kind).eval()
    model = switch_(copy.deepcopy(plain), ["a", "b"])
    assert type(model[1]) is (DomainBatchNorm2d if kind in OF_IMAGES else DomainNorm)
    x = torch.randn(2, 3, 6, 5)
    for name in ("a", "b"):
        bk.set_domain(model, name)
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_of_one_domain_leaves_the_others_alone(kind: str) -> None:
    model = switch_(_model(kind), ["a", "b"])
    x = torch.randn(2, 3, 6, 5)
    bk.set_domain(model.eval(), "a")
    for value in model[0].parameters():
        value.requires_grad_(False)
    before = model(x)
    # SyncBatchNorm trains on GPUs only; with its statistics fixed the rest of the layer trains.
    bk.set_domain(model.train(kind not in ("sync", "timm, sync")), "b")
    own = [value for layer in (model[1],) for value in layer.domains["b"].parameters()]
    if own:
        step = torch.optim.SGD(own, 0.5)
        model(5 + 3 * x).square().mean().backward()
        step.step()
    else:
        model(5 + 3 * x)
        for value in model[1].domains["b"].buffers():
            value += 1
    bk.set_domain(model.eval(), "a")
    assert torch.equal(model(x), before)
    bk.set_domain(model, "b")
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_uses_each_domains_norm(kind: str) -> None:
    model = switch_(_model(kind), ["a", "b"]).eval()
    with torch.no_grad():
        for value in [*model[1].domains["b"].parameters(), *model[1].domains["b"].buffers()]:
            if value.is_floating_point():
                value *= 1.5
    x = torch.randn(3, 3, 6, 5)
    if kind == "without statistics":
        x = x[:1].expand(3, -1, -1, -1)
    expected = []
    for sample, name in zip(x.split(1), "bab", strict=True):
        bk.set_domain(model, name)
        expected.append(model(sample))
    bk.set_domain(model, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(model(x), torch.cat(expected))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_gives_every_domain_tensors_of_its_own(kind: str, assign: bool) -> None:
    plain = _model(kind).eval()
    model = switch_(_model(kind), ["a", "b"]).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 1
    model.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    a, b = (_storages(model[1].domains[name]) for name in "ab")
    assert not a & b
    assert not (a | b) & _storages(plain)
    x = torch.randn(2, 3, 6, 5)
    for duplicate in (model, copy.deepcopy(model)):
        for name in "ab":
            bk.set_domain(duplicate, name)
            torch.testing.assert_close(duplicate(x), plain(x))
        a, b = (_storages(duplicate[1].domains[name]) for name in "ab")
        assert not a & b


@pytest.mark.parametrize("kind", ["plain", "timm"])
def test_a_new_domain_starts_anew_or_like_another(kind: str) -> None:
    model = switch_(_model(kind), ["a"]).eval()
    bk.nn.add_domain_(model, "like", like="a")
    bk.nn.add_domain_(model, "new")
    x = torch.randn(2, 3, 6, 5)
    results = {}
    for name in ("a", "like", "new"):
        bk.set_domain(model, name)
        results[name] = model(x)
    assert torch.equal(results["a"], results["like"])
    assert not torch.allclose(results["a"], results["new"])
    assert model[1].domains["new"].running_mean.tolist() == [0] * 4
    assert model[1].domains["new"].running_var.tolist() == [1] * 4
    storages = [_storages(model[1].domains[name]) for name in ("a", "like", "new")]
    assert len(set.union(*storages)) == sum(map(len, storages))


def test_tied_parameters_stay_tied_in_every_domain() -> None:
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    second.weight = first.weight
    model = switch_(nn.Sequential(nn.Conv2d(3, 4, 1), first, second), ["a", "b"])
    for name in "ab":
        assert model[1].domains[name].weight is model[2].domains[name].weight
    assert model[1].domains["a"].weight is not model[1].domains["b"].weight


def test_a_head_norm_of_vectors_has_statistics_for_every_domain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(16))
    switch_(model, ["a", "b"])
    bk.set_domain(model, "b")
    model(torch.randn(3, 3, 2, 2) + 3)
    assert model[2].domains["a"].running_mean.tolist() == [0] * 16
    assert bool((model[2].domains["b"].running_mean != 0).any())


def test_hooks_of_the_plain_norm_see_every_domain_and_can_be_removed() -> None:
    norm = nn.BatchNorm2d(4)
    seen = []
    handle = norm.register_forward_hook(lambda module, args, result: seen.append(module))
    model = switch_(nn.Sequential(nn.Conv2d(3, 4, 1), norm), ["a", "b"])
    for name in "ab":
        bk.set_domain(model, name)
        model(torch.randn(2, 3, 4, 4))
    assert seen == [model[1].domains["a"], model[1].domains["b"]]
    handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert len(seen) == 2


def test_norm_with_its_own_forward_raises_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    old = model[1].forward
    model[1].forward = lambda x: old(x)
    with pytest.raises(NotImplementedError, match=r"switch_.*'1'.*BatchNorm2d"):
        switch_(model, ["a", "b"])
    assert type(model[0]) is nn.Conv2d
    # Left to all domains on purpose.
    switch_(model, ["a", "b"], lambda module, name: name == "0")
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("convert", ["torch", "timm"])
def test_conversion_to_sync_batch_norm_reaches_the_active_domain(convert: str) -> None:
    model = switch_(_model("plain"), ["a", "b"]).eval()
    bk.set_domain(model, "b")
    x = torch.randn(2, 3, 6, 5)
    before = model(x)
    if convert == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        model = _timm("convert_sync_batchnorm", model)
    norm = model[1]
    assert [type(one) for one in norm.domains.values()] == [nn.SyncBatchNorm] * 2
    torch.testing.assert_close(model(x), before)
    assert norm.active is norm.domains["b"]
    assert norm.domain == "b"
    assert len({id(one.weight) for one in norm.domains.values()}) == 2
    bk.set_domain(model, "a")
    assert norm.active is norm.domains["a"]


def test_recalibration_of_each_kind_of_norm() -> None:
    batch = torch.randn(4, 3, 6, 5)
    model = switch_(_model("subclass"), ["a", "b"])
    bk.nn.recalibrate_bn(model, [batch], "b")
    torch.testing.assert_close(model[1].domains["b"].running_mean, model[0](batch).mean((0, 2, 3)))
    model = switch_(_model("frozen"), ["a", "b"])
    with pytest.raises(ValueError, match="running statistics to compute"):
        bk.nn.recalibrate_bn(model, [batch], "b")


@pytest.mark.parametrize("kind", ["plain", "timm", "frozen"])
def test_files_and_pickles_keep_the_domains_apart(kind: str) -> None:
    model = switch_(_model(kind), ["a", "b"]).eval()
    with torch.no_grad():
        for value in [*model[1].domains["b"].parameters(), *model[1].domains["b"].buffers()]:
            if value.is_floating_point():
                value *= 1.5
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = switch_(_model(kind), ["a", "b"]).eval()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    x = torch.randn(2, 3, 6, 5)
    for duplicate in (other, pickle.loads(pickle.dumps(model))):
        for name in "ab":
            bk.set_domain(model, name)
            bk.set_domain(duplicate, name)
            assert torch.equal(duplicate(x), model(x))
