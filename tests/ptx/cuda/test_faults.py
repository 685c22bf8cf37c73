"""Faults put into the CUDA kernels' PTX by hand: each has to be found, by the executor or by a wrong result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bap_kernels.testing import Case, check_backward, check_forward
from tests.ptx.cuda.conftest import FOUND
from tests.ptx.faults import PACK, PARTS, ROWS, SPLIT, WARPGROUPS, WEIGHT_TILES, WEIGHT_WARPGROUPS, Edit

NHWC = Case(in_list="null", out_list="null", layout="channels_last", dtype=torch.float16)
UNCUT = 5  # SMs: small tiles, of which four fill more than half
# More steps than stages, and ragged on every side.
TILES_OF_WARPGROUPS = NHWC.but(in_channels=136, out_channels=120, size=(9, 12), batch=1)
# Filters that end within 16 bytes, so that the copies count their bytes.
WEIGHTS_OF_WARPGROUPS = NHWC.but(
    in_channels=136, out_channels=119, size=(17, 26), batch=1, kernel=(1, 2), padding=(1, 0, 1, 0)
)
SMALL_TILES = NHWC.but(in_channels=72, out_channels=72, size=(5, 7))
# 27 steps of four tiles, in several parts.
PARTED = SMALL_TILES.but(in_channels=136)
PLANES = Case(in_channels=40, out_channels=36, size=(5, 8), dtype=torch.float16, kernel=(1, 1), padding=(1, 0, 0, 0))


def sampled(edits: list[Edit]) -> list[Any]:
    """Every sixth one for the normal run."""
    return [pytest.param(edit, marks=pytest.mark.sample if k % 6 == 0 else ()) for k, edit in enumerate(edits)]


def check_found(
    edit: Edit, parts: list[str], case: Case, device: Any, check: Callable[[Case, str], bool] = check_forward
) -> None:
    text = edit(device.kernel_text(parts))
    device.replace_kernel(parts, text)
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        check(case, "cuda")
    by_rule = isinstance(caught.value, RuntimeError)
    FOUND.append((parts[0], edit.name, str(caught.value).strip().splitlines()[-1] if by_rule else "a wrong result"))
    if by_rule:
        # From the executor, not from a launch that never began.
        assert re.search("line |no thread can go on|when a copy lands|a block ends", str(caught.value))
    else:
        assert "not close" in str(caught.value)


@pytest.mark.arch(90)
@pytest.mark.parametrize("edit", sampled(WARPGROUPS), ids=lambda edit: edit.name)
def test_warpgroups(edit: Edit, device: Any) -> None:
    check_found(edit, ["warpgroup_conv2d", "MathModeE1", "Li128ELi128E", "Lb0E"], TILES_OF_WARPGROUPS, device)


@pytest.mark.arch(90)
@pytest.mark.parametrize("edit", sampled(WEIGHT_TILES), ids=lambda edit: edit.name)
def test_weight_tiles(edit: Edit, device: Any) -> None:
    check_found(edit, ["weight_tiles"], TILES_OF_WARPGROUPS, device)


@pytest.mark.arch(90)
@pytest.mark.parametrize("edit", sampled(WEIGHT_WARPGROUPS), ids=lambda edit: edit.name)
def test_weight_warpgroups(edit: Edit, device: Any) -> None:
    parts = ["warpgroup_weight_gradient", "MathModeE1"]
    check_found(edit, parts, WEIGHTS_OF_WARPGROUPS, device, check_backward)


@pytest.mark.arch(80)
@pytest.mark.parametrize("edit", sampled(ROWS), ids=lambda edit: edit.name)
def test_rows(edit: Edit, device: Any) -> None:
    device.set_device(UNCUT)
    check_found(edit, ["gathered_conv2d", "MathModeE1", "Li64ELi64E", "Lb0E"], SMALL_TILES, device)


@pytest.mark.arch(80)
@pytest.mark.parametrize("edit", sampled(PARTS), ids=lambda edit: edit.name)
def test_parts(edit: Edit, device: Any) -> None:
    device.set_device(132)
    check_found(edit, ["gathered_conv2d", "MathModeE1", "Li64ELi64E", "Lb0E"], PARTED, device)


@pytest.mark.arch(80)
@pytest.mark.parametrize("edit", sampled(SPLIT), ids=lambda edit: edit.name)
def test_split_epilogue(edit: Edit, device: Any) -> None:
    device.set_device(132)
    check_found(edit, ["split_epilogue", "6__half"], PARTED, device)


@pytest.mark.arch(80)
@pytest.mark.parametrize("edit", sampled(PACK), ids=lambda edit: edit.name)
def test_pack(edit: Edit, device: Any) -> None:
    check_found(edit, ["channel_pack", "6__half"], PLANES, device)


@pytest.mark.sample
def test_without_a_fault_all_is_well(device: Any) -> None:
    for case, sm_count in ((TILES_OF_WARPGROUPS, 1), (SMALL_TILES, UNCUT), (PARTED, 132), (PLANES, 1)):
        device.set_device(sm_count)
        assert check_forward(case, "cuda")
    device.set_device()
    assert check_backward(WEIGHTS_OF_WARPGROUPS, "cuda")
    names = " ".join(device.take_mangled())
    assert "channel_pack_kernelI6__half" in names
    assert "split_epilogue_kernelI6__half" in names
    assert ("warpgroup_conv2d" in names) == (device.arch == 90)
    assert ("warpgroup_weight_gradient" in names) == (device.arch == 90)


def test_edits_that_match_nothing_are_errors() -> None:
    with pytest.raises(ValueError, match="nothing of the kind: 0 matches of frobnicate"):
        Edit("nothing of the kind", "frobnicate")("add.s32 a, b, c;")
