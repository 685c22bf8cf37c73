"""The network of the tests of zeros and masks."""

from __future__ import annotations

import pytest

from tests.integrations.pruned import Net
from tests.networks import randomise


@pytest.fixture
def net() -> Net:
    return randomise(Net())  # type: ignore[return-value]
