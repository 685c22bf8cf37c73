"""recalibrate_bn: statistics of one domain anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels.nn import DomainBatchNorm2d, recalibrate_bn


def _norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"])
        self.shared = _norm()
        self.conv = bk.nn.SwitchedConv2d(6, 6, 1, domains=["a", "b"])
        self.last = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"])
        self.unused = DomainBatchNorm2d.from_batch_norm2d(_norm(), ["a", "b"])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.last(self.conv(self.shared(self.first(x)))))


def test_recalibration_is_the_mean_over_batches_of_what_the_switches_let_through() -> None:
    model = Unused().train()
    model.first.eval()
    with torch.no_grad():
        model.conv.domains["b"].score[[0, 3]] = 0
    bk.set_domain(model, "a")
    data = [torch.randn(8, 6, 4, 4) * (number + 1) + number for number in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}

    recalibrate_bn(model, [(x, "label") for x in data], "b", batches=3)

    x = torch.stack(data[:3]).double()
    means, variances = x.mean((1, 3, 4)), x.transpose(1, 2).flatten(2).var(2)
    first = model.first.domains["b"]
    torch.testing.assert_close(first.running_mean.double(), means.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.running_var.double(), variances.mean(0), rtol=1e-5, atol=1e-5)
    # What comes after sees batches normalised by their own statistics, and only the channels that are on.
    with torch.no_grad():
        inner = [
            model.conv.double()(
                model.shared.double().eval()(
                    nn.functional.batch_norm(x, None, None, first.weight.double(), first.bias.double(), True, eps=1e-3)
                )
                * torch.tensor([0.0, 1, 1, 0, 1, 1])[:, None, None]
            )
            for x in torch.stack(data[:3]).double()
        ]
    expected = torch.stack([y.mean((0, 2, 3)) for y in inner]).mean(0)
    torch.testing.assert_close(model.last.domains["b"].running_mean.double(), expected, rtol=1e-4, atol=1e-4)

    model.float()
    model.shared.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"{layer}.domains.b.{key}"
        for layer in ("first", "last")
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(layer.domain == "a" for layer in (model.first, model.conv, model.last, model.unused))
    assert first.momentum == 0.3


@pytest.mark.parametrize("batches", [None, 0])
def test_recalibration_that_fails_changes_nothing(batches: int | None) -> None:
    model = Unused()
    bk.set_domain(model, "a")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loader():
        yield torch.randn(2, 6, 4, 4)
        raise OSError("disk")

    with pytest.raises(OSError if batches is None else ValueError, match=r"disk|at least one batch, got none"):
        recalibrate_bn(model, loader(), "b", batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.first.domain == "a"
    assert model.first.domains["b"].momentum == 0.3
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_bn(model, [], "b")
    with pytest.raises(ValueError, match=r"recalibrate_bn\(\): expected `domain` to be one of \['a', 'b'\], got 'c'"):
        recalibrate_bn(model, [], "c")
    with pytest.raises(ValueError, match="`model` to have DomainBatchNorm2d layers, got none"):
        recalibrate_bn(nn.Sequential(nn.BatchNorm2d(3)), [], "b")


def test_recalibration_reaches_synchronised_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(bk.nn.switch_(nn.Sequential(_norm()), ["a", "b"]))
    bk.set_domain(model, "a")
    assert type(model[0].active) is nn.SyncBatchNorm
    model[0].active.forward = lambda x: model[0].active.running_mean.add_(1)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module[0].active.momentum))
    recalibrate_bn(model, [torch.randn(2, 6, 3, 3)], "a")
    assert seen == [None]
    assert model[0].active.momentum == 0.3
