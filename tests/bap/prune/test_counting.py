"""What is counted is what the outputs depend on, through residual additions, concatenations and pre-activation."""

from __future__ import annotations

import re

import pytest
import torch
from bap.models import MODELS, build, load_weights, stem_and_shortcuts
from bap.prune.counting import backbone_params, count
from bap.prune.layers import SwitchBank
from bap.prune.liveness import find_live
from safetensors.torch import save_file
from torch import Tensor, nn

import bap_kernels as bk


class _Dense(nn.Module):
    """A dense block: concatenation, pooling and pre-activation, as in DenseNet."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1, bias=False)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv0(x), 2)
        y = self.conv1(torch.relu(self.bn1(x)))
        return self.head(self.conv2(torch.relu(self.bn2(torch.cat([x, y], 1)))).mean((2, 3)))


def _network(kind: str) -> nn.Module:
    if kind == "dense":
        plain: nn.Module = _Dense(5)
    elif kind == "resnet26":
        plain = build("resnet26", 5, widths=(4, 8, 16), blocks=(2, 1, 1))
    else:
        plain = build("wrn28_4", 5, depth=10, widths=(8, 8, 16), stem_stride=1)
    model = bk.nn.switch_(plain, ["a", "b"], heads={"a": 5, "b": 3}).eval()
    bank = SwitchBank(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                # Positive shifts: few channels are dead because of ReLU alone.
                module.bias.uniform_(0, 1)
                module.running_mean.normal_(0, 0.1)
        for domain in "ab":
            bank.write(domain, torch.where(torch.rand(sum(bank.sizes)) < 0.5, 0.0, 1e-2))
    return model


@pytest.mark.parametrize("kind", ["dense", "resnet26", "wrn"])
def test_only_live_filters_change_the_output(kind: str) -> None:
    torch.manual_seed(3)
    model = _network(kind)
    x = torch.randn(4, 3, 16, 16)
    with bk.use_backend("aten"), torch.no_grad():
        for domain in "ab":
            live = find_live(model, x, domain)
            bk.set_domain(model, domain)
            expected = model(x)
            changed = 0
            found = 0
            for name, kept in live.filters.items():
                weight = model.get_submodule(name).weight
                for k in range(len(kept)):
                    before = weight[k].clone()
                    weight[k] += 3
                    differs = not torch.equal(model(x), expected)
                    weight[k] = before
                    reads = len(model.get_submodule(name).channels(domain).in_index)
                    if not kept[k]:
                        found += 1
                        assert not differs, (name, k)
                    elif reads:
                        # A filter behind a ReLU that is off for all four images would be an accident.
                        changed += differs
                        assert differs, (name, k)
            assert found > 1
            assert changed > 5


def _brute(model: nn.Module, domains: str = "ab") -> int:
    """Weights and batch-norm entries on which the output of some domain depends."""
    total = 0
    live = {name: find_live(model, torch.zeros(1, 3, 16, 16), name) for name in domains}
    for name, layer in model.named_modules():
        if isinstance(layer, bk.nn.SwitchedConv2d):
            used = torch.zeros(layer.weight.shape[:2], dtype=torch.bool)
            rows = torch.zeros(layer.out_channels, dtype=torch.bool)
            columns = torch.zeros(layer.in_channels, dtype=torch.bool)
            for domain in domains:
                rows |= live[domain].filters[name]
                columns[layer.channels(domain).in_index.long()] = True
            used[rows.nonzero(), columns.nonzero().T] = True
            total += int(used.sum()) * layer.weight[0, 0].numel() + int(rows.sum()) * (layer.bias is not None)
    return total


@pytest.mark.parametrize("kind", ["dense", "resnet26", "wrn"])
def test_counts(kind: str) -> None:
    model = _network(kind)
    x = torch.zeros(1, 3, 16, 16)
    cost = count(model, x)
    assert cost.weights == _brute(model)
    shares = SwitchBank(model).masks().float().mean(1)
    assert 0.3 < cost.flop < 0.7, shares
    assert cost.exact_flop < cost.flop
    assert all(one.weights <= cost.weights for one in cost.domains.values())
    plain = count(model, x, prune=False)
    assert plain.weights == sum(
        p.numel()
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
        for p in (layer.weight, layer.bias)
        if p is not None
    )
    switches = sum(SwitchBank(model).sizes)
    assert plain.domains["a"].switches == switches
    norm = backbone_params(model) - plain.weights
    assert plain.params == pytest.approx((plain.weights + 2 * norm + 2 * switches / 32) / backbone_params(model))
    assert cost.params < plain.params
    # The dense network has nothing to drop.
    bank = SwitchBank(model)
    for domain in "ab":
        bank.write(domain, torch.full((switches,), 1e-2))
    whole = count(model, x)
    assert (whole.flop, whole.exact_flop, whole.weights) == (1, 1, plain.weights)


def test_own_backbones_have_the_published_shapes() -> None:
    wide = build("wrn28_4", 10)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in wide.modules()) == 25
    small = build("resnet26", 10)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in small.modules()) == 26
    x = torch.randn(1, 3, 64, 64)
    shapes = []
    for module in (small.layer1, small.layer2, small.layer3, wide.layer1, wide.layer3):
        module.register_forward_hook(lambda _m, _i, y: shapes.append(tuple(y.shape[1:])))
    with torch.no_grad():
        assert small(x).shape == wide(x).shape == (1, 10)
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (64, 32, 32), (256, 8, 8)]
    assert stem_and_shortcuts(wide) == {"conv1", *(f"layer{i}.0.shortcut" for i in (1, 2, 3))}
    assert stem_and_shortcuts(small) == {"conv1"}


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vgg16"])
def test_torchvision_backbones_keep_their_keys(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = build(name, 7)
        theirs = getattr(torchvision.models, name)(weights=None)
    head = MODELS[name].head
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert model.get_submodule(head).out_features == 7
    assert any("downsample" in one for one in stem_and_shortcuts(model)) == (name == "resnet50")


def test_weights_come_from_a_file_and_the_head_only_where_it_fits(tmp_path) -> None:
    options = {"widths": (4, 8, 16), "blocks": (1, 1, 1)}
    source = build("resnet26", 5, **options)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.pth")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        same = build("resnet26", 5, **options)
        assert load_weights(same, tmp_path / name, "fc") == []
        assert torch.equal(same.fc.weight, source.fc.weight)
        other = build("resnet26", 9, **options)
        before = other.fc.weight.clone()
        assert load_weights(other, tmp_path / name, "fc") == ["fc.weight", "fc.bias"]
        assert torch.equal(other.layer3[0].conv2.weight, source.layer3[0].conv2.weight)
        assert torch.equal(other.fc.weight, before)
    with pytest.raises(ValueError, match=r"got none for .* or of other shapes"):
        load_weights(build("resnet26", 5), tmp_path / "a.pth", "fc")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"to be a checkpoint of tensors, got .*broken\.pth"):
        load_weights(source, tmp_path / "broken.pth", "fc")


def test_names_of_older_densenet_files_are_understood(tmp_path) -> None:
    pytest.importorskip("torchvision")
    model = build("densenet121", 4)
    state = model.state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    torch.save(older, tmp_path / "older.pth")
    assert load_weights(model, tmp_path / "older.pth", "classifier") == []


def test_unknown_models_and_options_raise() -> None:
    with pytest.raises(ValueError, match=r"one of \['resnet26', .*got 'alexnet'"):
        build("alexnet", 10)
    with pytest.raises(ValueError, match=r"options of 'resnet50' to be among .*got 'widths'"):
        build("resnet50", 10, widths=(1, 2, 3))
    with pytest.raises(ValueError, match=r"6 n \+ 4, at least 10, got 12"):
        build("wrn28_4", 10, depth=12)
