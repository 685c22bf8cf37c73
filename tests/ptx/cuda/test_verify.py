"""The verifier's cases on the compiled CUDA kernels: each family has some, and the kernels pass them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bap_kernels import _C
from bap_kernels.verify.cases import checks
from tests.ptx.cuda import device
from tests.ptx.cuda.conftest import ARCH
from tests.verify.devices import CpuDevice

SMS = 16


@pytest.fixture(autouse=True)
def _math() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("family", _C.cuda_families())
def test_kernels_are_right(family: str) -> None:
    if "/wgmma" in family and ARCH != 90:
        pytest.skip("a kernel of compute capability 9.0 alone")
    there = CpuDevice()
    there.open()
    if "/split/" in family:
        # One SM is filled by any tile.
        there.sm_count = SMS
        device.set_device(SMS)
    found = list(checks(family, there))
    assert len(found) >= 3
    # Each math mode another third of them, all of them in one.
    for check in found if family.endswith("bfloat16") else found[::3]:
        check.run(there, lambda what: None)


@pytest.mark.arch(90)
def test_cases_reach_every_kernel_of_the_library() -> None:
    there = CpuDevice()
    there.open()
    launched: set[str] = set()
    for family in _C.cuda_families():
        if family.endswith("/bfloat16") and "/split/" not in family:
            with device.kernels() as names:
                for check in checks(family, there):
                    check.run(there, lambda what: None)
            launched |= set(names)
    assert launched >= {"gathered_conv2d", "planar_conv2d", "halo_conv2d", "warpgroup_conv2d", "weight_gradient"}
    assert launched >= {"warpgroup_weight_gradient", "channel_pack", "channel_unpack", "sum_partials"}
