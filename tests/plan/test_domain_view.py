"""Plans, small copies and pruning of networks with batch norm and classifiers per domain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import bap_kernels as bk

DOMAINS = {"birds": 4, "cars": 7}


def trained() -> nn.Module:
    """A network as training leaves it: half of the switches off, every domain's batch norm its own."""
    torch.manual_seed(2)
    model = bk.nn.switch_(resnet18(num_classes=4), DOMAINS, lambda module, name: name != "conv1", heads=DOMAINS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("score"):
                parameter.uniform_(-0.01, 0.02)
            elif "bn" in name or "downsample.1" in name:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        found[domain] = model(x)
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_plan_and_specialize(swapped: bool) -> None:
    model, x = trained(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = results(model, x)
        if swapped:
            model = bk.swap_(model)
        planned = bk.plan(model, x, "birds")
        for domain, want in expected.items():
            bk.set_domain(planned, domain)
            torch.testing.assert_close(planned(x), want, rtol=1e-3, atol=1e-4)
            small = bk.specialize(model, domain, x)
            torch.testing.assert_close(small(x), want, rtol=1e-3, atol=1e-4)


def test_prune_shrinks_the_batch_norms_of_all_domains() -> None:
    model, x = trained(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = results(model, x)
        bk.swap_(model)
        # Nobody reads these; the filters that write them go, with the entries of both domains' batch norms.
        lists = {
            domain: {
                name: bk.ChannelLists(
                    [c for c in one.in_index.tolist() if c >= 5] if name == "layer1.0.conv2" else one.in_index
                )
                for name, one in layers.items()
            }
            for domain, layers in bk.ChannelTable.from_switches(trained()).items()
        }
        bk.attach_(model, lists)
        expected = results(model, x)
        bk.prune_unused_(model, x)
        assert model.layer1[0].conv1.out_channels <= 64 - 5
        for norm in model.layer1[0].bn1.domains.values():
            assert norm.running_mean.shape == norm.weight.shape == (model.layer1[0].conv1.out_channels,)
        for domain, got in results(model, x).items():
            torch.testing.assert_close(got, expected[domain], rtol=1e-4, atol=1e-4)


def test_prune_refuses_switched_layers_and_other_domains() -> None:
    model = trained()
    model.conv1 = bk.nn.GatheredConv2d.from_conv2d(model.conv1)
    with pytest.raises(NotImplementedError, match="expected layers with fixed lists, got the switched layer"):
        bk.prune_unused_(model, torch.randn(1, 3, 48, 48))
    model = bk.swap_(trained())
    del model.bn1.domains["cars"]
    with pytest.raises(ValueError, match="expected layer 'bn1' to have the lists' domains"):
        bk.prune_unused_(model, torch.randn(1, 3, 48, 48))
