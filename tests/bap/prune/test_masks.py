"""Masks in files, and the scores that choose channels at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bap.config import Config
from bap.data import Domain
from bap.files import FileError
from bap.models import build
from bap.prune.layers import SwitchBank
from bap.prune.masks import magnitude_scores, read_masks, saliency_scores, write_masks
from bap.train.network import switched_network
from bap.train.trainer import Trainer
from torch import Tensor, nn

import bap_kernels as bk

OPTIONS = {"widths": [4, 6, 8], "blocks": [1, 1, 1]}


@pytest.fixture
def model() -> nn.Module:
    return switched_network(Config(model_options=OPTIONS), {"a": 5, "b": 3})


def test_saliency_is_gradient_times_activation(model: nn.Module) -> None:
    """Beside PyTorch's own network in float64: |Σ x ∂L/∂x| over images and pixels of what each convolution reads."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 3, 16, 16, generator=generator), torch.randint(0, 5, (6,), generator=generator)) for _ in (0, 1)
    ]
    plain = build("resnet26", 5, **OPTIONS)
    state = {
        key.replace(".domains.a.", "."): value for key, value in model.state_dict().items() if ".domains.b." not in key
    }
    plain.load_state_dict({key: value for key, value in state.items() if not key.endswith(".score")})
    plain.double().train()
    bank = SwitchBank(model)
    read: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            read[name] = given[0].clone()
            read[name].retain_grad()
            return (read[name],)

        return hook

    for name in bank.names:
        plain.get_submodule(name).register_forward_pre_hook(keep(name))
    expected = torch.zeros(sum(bank.sizes), dtype=torch.float64)
    for images, labels in batches:
        plain.zero_grad()
        F.cross_entropy(plain(images.double()), labels).backward()
        expected += torch.cat([(read[name] * read[name].grad).sum((0, 2, 3)) for name in bank.names]).abs()
    with bk.use_backend("aten"):
        found = saliency_scores(model, "a", batches)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    assert (found > 0).any()


def test_magnitudes_are_relative_to_their_layer(model: nn.Module) -> None:
    scores = SwitchBank(model).by_layer(magnitude_scores(model))
    for name, layer in SwitchBank(model).layers:
        weight = layer.weight.detach().double()
        for channel in range(layer.in_channels):
            mine = sum(abs(value) for value in weight[:, channel].flatten().tolist()) / weight[:, channel].numel()
            mean = weight.abs().mean().item()
            assert scores[name][channel].item() == pytest.approx(mine / mean)


def test_fixed_channels_stay_and_nothing_else_is_accepted(
    tiny: Config, suite: dict[str, Domain], tmp_path: Path
) -> None:
    path = tmp_path / "masks.safetensors"
    bank = Trainer(tiny, suite).open().bank
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(sum(bank.sizes), generator=generator) < 0.4 for name in suite}
    write_masks(path, bank, masks)
    for name, mask in read_masks(path, bank, list(suite)).items():
        assert torch.equal(mask, masks[name])
    config = tiny.replace(fixed=str(path), beta=1.0, epochs=2, sharing="union", lr_switch=1.0)
    trainer = Trainer(config, suite, tmp_path / "run").open()
    trainer.fit(until=1)
    assert all(torch.equal(trainer.bank.mask(name), masks[name]) for name in suite)
    assert not any(trainer.projected_off.values())
    # The same file elsewhere goes on, another one does not.
    shutil.copy(path, tmp_path / "moved.safetensors")
    again = Trainer(
        config.replace(fixed=str(tmp_path / "moved.safetensors")), suite, tmp_path / "run", resume=True
    ).open()
    again.fit()
    assert all(torch.equal(again.bank.mask(name), masks[name]) for name in suite)
    write_masks(path, bank, {name: ~mask for name, mask in masks.items()})
    with pytest.raises(ValueError, match=r"switches\.fixed: stored "):
        Trainer(config, suite, tmp_path / "run", resume=True).open()
    with pytest.raises(FileError, match=r"to hold masks of all domains, got none of \['signs'\]"):
        read_masks(path, bank, ["digits", "signs"])
    narrow = SwitchBank(switched_network(Config(model_options=OPTIONS), {"digits": 5}))
    with pytest.raises(FileError, match="to hold masks of this network's layers, got others"):
        read_masks(path, narrow, ["digits"])
