"""Listed channels of channels_last pixels that are copied side by side, whole vectors at a time where there are any."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import bap_kernels
from bap_kernels import reference
from bap_kernels.testing import Case, Sample, assert_close, make_fused, make_tensors, poison, run

DTYPES = (torch.float32, torch.bfloat16)
# Channels and how many are listed: short pixels, whole and cut vectors, and lists with up to 32 vectors of channels for
# one vector of listed ones.
COUNTS = [(1, 1), (7, 4), (15, 15), (31, 9), (32, 32), (33, 17), (63, 33), (64, 32), (100, 50), (160, 9), (999, 33)]


def sample_of(channels: int, listed: int, **changes: Any) -> tuple[Case, Sample]:
    case = Case(2, channels, 37, (5, 6), layout="channels_last", in_list="all", out_list="null").but(**changes)
    sample = make_tensors(case)
    order = random.Random(channels).sample(range(channels), listed)
    sample.in_index = torch.tensor(sorted(order), dtype=torch.int32)
    return case, sample


@pytest.mark.parametrize("layout", ["channels_last", "sliced_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "listed"), COUNTS)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
        {"kernel": (1, 1), "padding": (2, 1, 1, 3), "stride": (2, 2)},
        {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
        {"kernel": (3, 2), "padding": (0, 2, 3, 0), "stride": (1, 2)},
        {"kernel": (1, 2), "padding": (1, 1, 8, 8), "dilation": (1, 3)},
    ],
)
def test_listed_channels_and_no_others_are_read(
    geometry: dict[str, tuple[int, ...]], channels: int, listed: int, dtype: torch.dtype, layout: str
) -> None:
    case, sample = sample_of(channels, listed, dtype=dtype, layout=layout, **geometry)
    expected = reference.gathered_conv2d(*sample.args)
    assert_close(run(poison(sample), "native"), expected, case.dtype, sample.depth)


@pytest.mark.parametrize("flags", [("in_scale",), ("in_shift",), ("in_relu",), ("in_scale", "in_shift", "in_relu")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "listed"), COUNTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_prologue_is_applied_to_what_is_copied(
    kernel: int, channels: int, listed: int, dtype: torch.dtype, flags: tuple[str, ...]
) -> None:
    case, sample = sample_of(channels, listed, dtype=dtype, kernel=(kernel,) * 2, padding=(kernel // 2,) * 4)
    fused = make_fused(sample, flags, torch.float32)
    expected = reference.gathered_conv2d_fused(*sample.args, **fused)
    with bap_kernels.use_backend("native"):
        y, _ = torch.ops.bap_kernels._gathered_conv2d_fused(*poison(sample).args, **fused)
    assert_close(y, expected, case.dtype, 4 * sample.depth + 4)
