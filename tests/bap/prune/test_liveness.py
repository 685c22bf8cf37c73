"""What flows to no consumer, by the package's rules for channels and by gradients, on every backbone."""

from __future__ import annotations

import pytest
import torch
from bap.models import MODELS, build
from bap.prune.layers import SwitchBank
from bap.prune.liveness import find_live, find_live_in
from torch import nn

import bap_kernels as bk
from tests.bap.prune.liveness_oracle import find_live_by_gradients

SMALL = {
    "resnet26": {"widths": (4, 8, 16), "blocks": (2, 1, 1)},
    "wrn28_4": {"depth": 10, "widths": (8, 8, 16), "stem_stride": 1},
}


def switched(name: str, density: float) -> nn.Module:
    if name not in SMALL:
        pytest.importorskip("torchvision")
    model = bk.nn.switch_(build(name, 5, **SMALL.get(name, {})), ["a", "b"], heads={"a": 5, "b": 3})
    bank = SwitchBank(model)
    generator = torch.Generator().manual_seed(0)
    for domain in bank.domains:
        bank.write(domain, torch.where(torch.rand(sum(bank.sizes), generator=generator) < density, 1e-2, 0.0))
    return model


# At 2 % whole layers are off.
@pytest.mark.parametrize("density", [0.5, 0.02])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_gradients_of_a_positive_network(name: str, density: float) -> None:
    model = switched(name, density)
    x = torch.zeros(1, 3, 32 if name in SMALL else 64, 32 if name in SMALL else 64)
    found = find_live_in(model, x, ["a", "b"])
    for domain in "ab" if name in SMALL else "a":
        expected = find_live_by_gradients(model, x, domain)
        for got, wanted in ((found[domain].filters, expected.filters), (found[domain].norms, expected.norms)):
            assert got.keys() == wanted.keys()
            assert [layer for layer in wanted if not torch.equal(got[layer], wanted[layer])] == []
    assert not all(mask.all() for mask in found["a"].filters.values())


def test_find_live_does_not_change_the_model() -> None:
    model = switched("resnet26", 0.5).train()
    bk.set_domain(model, "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_live(model, torch.zeros(1, 3, 32, 32), "a")
    assert all(module.training for module in model.modules())
    assert next(m for m in model.modules() if isinstance(m, bk.nn.SwitchedConv2d)).domain == "b"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_without_a_rule_need_all_channels() -> None:
    part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    part.register_forward_hook(lambda module, args, y: None)
    model = bk.nn.switch_(nn.Sequential(nn.Conv2d(3, 4, 1), part, nn.Conv2d(4, 2, 1)), ["a"])
    with torch.no_grad():
        model[2].domains["a"].score[:] = 0
    live = find_live(model, torch.zeros(1, 3, 8, 8), "a")
    assert live.filters["1.0"].all()
    assert live.norms["1.1"].all()
    assert live.filters["0"].all()


def test_unknown_domains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"find_live\(\): expected `domain` to be one of \['a', 'b'\], got 'c'"):
        find_live(switched("resnet26", 0.5), torch.zeros(1, 3, 32, 32), "c")
