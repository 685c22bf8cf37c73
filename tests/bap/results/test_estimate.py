"""Hours from measured steps."""

from __future__ import annotations

import pytest
from bap.config import Config
from bap.results.estimate import estimate


def test_estimate_multiplies_what_it_measured(tiny: Config) -> None:
    config = tiny.replace(data="decathlon", root="nowhere", domains=[], size=32, batch=8, epochs=3)
    made = estimate(config, steps=2, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert made["steps"] == 3 * (12 + 6)
    assert made["hours"] == pytest.approx(made["steps"] * made["seconds_per_step"] / 3600)
    assert made["peak_bytes"] > 10**7
    joint = estimate(config.replace(round_robin="joint"), steps=1, images={"dtd": (47, 100), "svhn": (10, 50)})
    assert joint["steps"] == 3 * 12 * 2
    short = config.replace(round_robin="joint", steps=4)
    assert estimate(short, steps=1, images={"dtd": (47, 100), "svhn": (10, 50)})["steps"] == 3 * 4 * 2
    with pytest.raises(ValueError, match="expected `images` for 'builtin', got None"):
        estimate(tiny)
