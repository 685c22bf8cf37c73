"""A checkpoint with random weights, and images of its domains as files' content."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bap.config import Config
from bap.data import builtin_suite
from bap.data.transform import normalised
from bap.prune.layers import SwitchBank
from bap.serve.requests import decode, domain_inputs
from bap.train.checkpoint import domain_spec, load_checkpoint, save_checkpoint
from bap.train.network import switched_network
from PIL import Image

import bap_kernels as bk

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


@pytest.fixture(scope="session")
def expected(checkpoint: Path, images: dict[str, list[bytes]]) -> dict[tuple[str, bytes], torch.Tensor]:
    """Probabilities by the network as it was trained, image by image."""
    model, config, specs = load_checkpoint(checkpoint)
    inputs = domain_inputs(config, specs)
    found = {}
    for name, bodies in images.items():
        bk.set_domain(model, name)
        for body in bodies:
            x = normalised(decode(body, inputs[name], 10**6), inputs[name].mean, inputs[name].std)
            with torch.inference_mode():
                found[name, body] = model(x[None])[0].softmax(0)
    return found


def check_answer(content: Mapping[str, Any], name: str, probabilities: torch.Tensor) -> None:
    """The domain and the probabilities of an answer over HTTP."""
    assert content["domain"] == name
    for entry in content["top"]:
        assert entry["probability"] == pytest.approx(float(probabilities[entry["number"]]), abs=1e-4)
    assert content["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
