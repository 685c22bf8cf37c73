"""Rebuffi's ResNet-26: its sizes, its forward, and the names in released weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bap.models import MODELS, RebuffiResNet26, build, load_weights, renamed_keys
from bap.prune.deploy import deploy
from bap.prune.layers import SwitchBank
from bap.prune.prune import prune_
from torch import Tensor, nn

import bap_kernels as bk

WIDTHS, BLOCKS = (8, 12, 16), (2, 1, 2)


def _norm(name: str, channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    draw = torch.rand(4, channels, generator=generator, dtype=torch.float64)
    values = {
        "weight": draw[0] + 0.5,
        "bias": draw[1] - 0.5,
        "running_mean": draw[2] - 0.5,
        "running_var": draw[3] + 0.5,
    }
    return {**{f"{name}.{key}": value for key, value in values.items()}, f"{name}.num_batches_tracked": torch.tensor(3)}


def _released(classes: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the authors' files."""
    generator = torch.Generator().manual_seed(seed)

    def conv(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.conv.weight": 0.2 * torch.randn(out, into, 3, 3, generator=generator, dtype=torch.float64)}

    stem = WIDTHS[0] // 2
    state = conv("pre_layers_conv", stem, 3) | _norm("pre_layers_conv.bns.0", stem, generator)
    before = stem
    for stage, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS, strict=True), 1):
        for block in range(blocks):
            for part, into in (("conv1", before), ("conv2.1", width)):
                name = f"layer{stage}.{block}.{part}"
                state |= conv(name, width, into) | _norm(f"{name}.bns.0", width, generator)
            before = width
    state |= _norm("end_bns.0.0", before, generator)
    state["linears.0.weight"] = torch.randn(classes, before, generator=generator, dtype=torch.float64)
    state["linears.0.bias"] = torch.randn(classes, generator=generator, dtype=torch.float64)
    return state


def _reference(state: dict[str, Tensor], x: Tensor, last_relu: bool = True) -> Tensor:
    """The published network as plain arithmetic on the file's entries, in eval mode."""

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    y = norm("pre_layers_conv.bns.0", F.conv2d(x, state["pre_layers_conv.conv.weight"], padding=1))
    for stage, blocks in enumerate(BLOCKS, 1):
        for block in range(blocks):
            first, second = f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2.1"
            opens = block == 0
            z = F.conv2d(y, state[f"{first}.conv.weight"], stride=2 if opens else 1, padding=1)
            z = norm(f"{first}.bns.0", z).clamp_min(0)
            z = norm(f"{second}.bns.0", F.conv2d(z, state[f"{second}.conv.weight"], padding=1))
            if opens:
                y = y.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
                y = torch.cat([y, y.new_zeros(len(y), z.shape[1] - y.shape[1], *y.shape[2:])], 1)
            y = (y + z).clamp_min(0)
    y = norm("end_bns.0.0", y)
    y = (y.clamp_min(0) if last_relu else y).mean((2, 3))
    return y @ state["linears.0.weight"].T + state["linears.0.bias"]


def test_published_sizes() -> None:
    model = RebuffiResNet26(1000)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(parameter.numel() for module in norms for parameter in module.parameters()) == 7744
    assert (len(convs), len(norms)) == (25, 26)
    plain = build("resnet26", 1000)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters()) == 512
    # The old one keeps its entries.
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        f"end_bn.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("wrapped", ["net", "plain"])
def test_released_weights_load_and_give_the_published_network(wrapped: str, tmp_path: Path) -> None:
    state = _released(7)
    torch.save({"net": state, "acc": 60.0} if wrapped == "net" else state, tmp_path / "weights.pth")
    backbone = MODELS["resnet26_rebuffi"]
    model = build("resnet26_rebuffi", 7, widths=list(WIDTHS), blocks=list(BLOCKS)).double().eval()
    assert load_weights(model, tmp_path / "weights.pth", backbone.head, backbone.renamed) == []
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), _reference(state, x), rtol=1e-9, atol=1e-9)
    other = build("resnet26_rebuffi", 5, widths=list(WIDTHS), blocks=list(BLOCKS))
    left_out = load_weights(other, tmp_path / "weights.pth", backbone.head, backbone.renamed)
    assert sorted(left_out) == ["fc.bias", "fc.weight"]


def test_url_names_and_what_is_refused(tmp_path: Path) -> None:
    model = build("resnet26_rebuffi", 7, widths=list(WIDTHS), blocks=list(BLOCKS))
    backbone = MODELS["resnet26_rebuffi"]
    url = {key.replace("fc.", "cls_fn.0."): value for key, value in model.state_dict().items()}
    url |= {"cls_fn.1.weight": torch.zeros(3, WIDTHS[2]), "cls_fn.1.bias": torch.zeros(3)}
    torch.save({"net": url}, tmp_path / "url.pth")
    # URL's own network has no last ReLU.
    state = _released(7)
    torch.save(renamed_keys(state), tmp_path / "same.pth")
    own = build("resnet26_url", 7, widths=list(WIDTHS), blocks=list(BLOCKS)).double().eval()
    assert load_weights(own, tmp_path / "same.pth", "fc", MODELS["resnet26_url"].renamed) == []
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(own(x), _reference(state, x, last_relu=False), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(own(x), _reference(state, x))
    again = build("resnet26_rebuffi", 7, widths=list(WIDTHS), blocks=list(BLOCKS))
    assert load_weights(again, tmp_path / "url.pth", backbone.head, backbone.renamed) == []
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    one = renamed_keys({"cls_fn.weight": torch.zeros(1), "other": torch.zeros(1)})
    assert list(one) == ["fc.weight", "other"]
    # Weights with adapters are of another network.
    adapted = _released(7) | {"layer1.0.conv1.parallel_conv.0.conv.weight": torch.zeros(8, 4, 1, 1)}
    torch.save(adapted, tmp_path / "adapted.pth")
    with pytest.raises(ValueError, match=r"for \['layer1.0.conv1.parallel_conv.0.conv.weight'\]"):
        load_weights(again, tmp_path / "adapted.pth", backbone.head, backbone.renamed)
    with pytest.raises(ValueError, match="to hold the backbone's entries, got none for"):
        load_weights(build("resnet26", 7, widths=list(WIDTHS), blocks=list(BLOCKS)), tmp_path / "adapted.pth", "fc")


@pytest.mark.parametrize("name", ["resnet26_rebuffi", "resnet26_url"])
def test_they_are_switched_pruned_and_narrowed(name: str) -> None:
    model = build(name, 7, widths=list(WIDTHS), blocks=list(BLOCKS))
    heads = {"a": 7, "b": 3}
    bk.nn.switch_(model, list(heads), lambda module, layer: layer != "conv1", heads=heads)
    bank = SwitchBank(model.eval())
    generator = torch.Generator().manual_seed(2)
    for domain in bank.domains:
        scores = torch.full((sum(bank.sizes),), 1e-2)
        scores[torch.rand(sum(bank.sizes), generator=generator) < 0.5] = 0
        bank.write(domain, scores)
    example = torch.zeros(1, 3, 32, 32)
    assert deploy(model, example).largest_change < 1e-4
    pruned = prune_(model, example)
    assert pruned.largest_change < 1e-5
    assert pruned.after.weights < pruned.before.weights
