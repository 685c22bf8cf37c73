"""An op and a simulated GPU for tests of `auto`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.dispatch.simulated_ops import OPS, Gpu, Op


@pytest.fixture(params=list(OPS))
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


@pytest.fixture
def gpu(own_choice_table: None, no_verifier: None) -> Iterator[Gpu]:
    """Its kernel families are those of TF32."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield Gpu()
    torch.backends.cudnn.allow_tf32 = tf32
