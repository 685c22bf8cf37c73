"""Hours from measured steps."""

from __future__ import annotations

import pytest
import torch
from bap.config import Config
from bap.results.estimate import estimate
from bap.results.step_profile import profile_step


def test_estimate_multiplies_what_it_measured(tiny: Config) -> None:
    config = tiny.replace(data="decathlon", root="nowhere", domains=[], size=32, batch=8, epochs=3)
    made = estimate(config, steps=2, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert made["steps"] == 3 * (12 + 6)
    assert made["hours"] == pytest.approx(made["steps"] * made["seconds_per_step"] / 3600)
    assert made["peak_bytes"] > 10**7
    assert 100 < made["profile"]["operators"] < 1000
    assert made["profile"]["reads"] == 0
    assert made["profile"]["kernels"] is None
    assert 0 < sum(made["profile"]["shares"].values()) <= 1
    assert made["trained"]["head"] > 57 * 16
    assert made["trained"]["switch"] % 2 == 0 < made["trained"]["norm"]
    assert made["trained"]["backbone"] == 0
    whole = estimate(config.replace(train_backbone=True), steps=1, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert whole["trained"]["backbone"] > 10**3
    joint = estimate(config.replace(round_robin="joint"), steps=1, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert joint["steps"] == 3 * 12 * 2
    short = config.replace(round_robin="joint", steps=4)
    assert estimate(short, steps=1, images={"dtd": (47, 100), "svhn": (10, 50)})["steps"] == 3 * 4 * 2
    with pytest.raises(ValueError, match="expected `images` for 'builtin', got None"):
        estimate(tiny)


def test_a_step_is_profiled() -> None:
    x = torch.ones(8, 8)
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.Adam([weight], fused=True)

    def step() -> None:
        weight.grad = torch.ones(8)
        optimizer.step()
        x.view(64).detach().add(1).sum().item()

    step()
    made = profile_step(step, torch.device("cpu"))
    # Of the reads only item()'s counts: Adam's are of its own counts. Views are no operators.
    assert made.reads == 1
    assert {"aten::add", "aten::sum"} <= profile_step(step, torch.device("cpu"), most=99).shares.keys()
    assert made.operators >= 4
    assert profile_step(lambda: x.view(64).detach(), torch.device("cpu")).operators == 0


def test_a_step_for_many_domains_has_no_more_operators_and_reads_nothing(tiny: Config) -> None:
    config = tiny.replace(data="decathlon", root="nowhere", domains=[], size=32, batch=8, sharing="union", relaxed=True)
    few, many = (
        estimate(config, steps=1, images={f"d{n}": (5, 50) for n in range(count)})["profile"] for count in (2, 10)
    )
    assert few["operators"] == many["operators"]
    assert few["reads"] == many["reads"] == 0
