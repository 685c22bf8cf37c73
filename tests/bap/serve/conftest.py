"""A checkpoint with random weights, and images of its domains as files' content."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import builtin_suite
from bap.prune.layers import SwitchBank
from bap.train.checkpoint import domain_spec, save_checkpoint
from bap.train.network import switched_network
from PIL import Image

DOMAINS = ["shapes", "digits", "glyphs"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains that keep different channels, and whose batch norms differ."""
    config = Config(domains=DOMAINS, images=100, model_options={"widths": [8, 8, 16], "blocks": [1, 1, 1]})
    suite = builtin_suite(DOMAINS, 100)
    torch.manual_seed(0)
    model = switched_network(config, {name: len(domain.classes) for name, domain in suite.items()})
    bank = SwitchBank(model)
    for number, name in enumerate(bank.domains):
        off = torch.arange(number, sum(bank.sizes), 3)
        bank.write(name, torch.full((sum(bank.sizes),), 1e-2).index_fill(0, off, 0.0))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "domains" in key and "bn" in key:
                parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    specs = {name: domain_spec(domain, 0.66, 50.0, "test") for name, domain in suite.items()}
    save_checkpoint(folder, model.eval(), config, specs)
    return folder


def png(pixels: np.ndarray) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def images() -> dict[str, list[bytes]]:
    """Ten test images of every domain."""
    suite = builtin_suite(DOMAINS, 100)
    return {
        name: [png(image.permute(1, 2, 0).numpy()) for image in domain.splits["test"].images[:10]]
        for name, domain in suite.items()
    }
