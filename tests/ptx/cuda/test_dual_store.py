"""The second, compact store of a result: equal to the bit to selecting from it, and written by the same launch."""

from __future__ import annotations

import random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bap_kernels
from bap_kernels.testing import Case, check_fused, index_list, make_tensors, random_case
from tests.kernel_contract import DTYPES, FLAGS, affordable
from tests.ptx.cuda import device

op = torch.ops.bap_kernels._gathered_conv2d_fused
# A halo (any strides), NHWC as it lies, and planes of whole chunks: columns of several tiles.
HALO = Case(in_channels=20, out_channels=150, size=(5, 8), in_list="shuffled", out_list="null")
DIRECT = HALO.but(in_channels=64, in_list="null", layout="channels_last")
PLANES = HALO.but(kernel=(1, 1), padding=(0, 0, 0, 0))
PACKED = PLANES.but(layout="channels_last")


def copied(case: Case, copy_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with bap_kernels.use_backend("cuda"):
        return op(*make_tensors(case).args, None, None, False, None, None, None, True, dual_store_index=copy_index)


def selections(case: Case, copy_index: torch.Tensor) -> int:
    """Selections from the result: the op's own way where a backend leaves the second store to it."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        y, copy = copied(case, copy_index)
    assert torch.equal(copy, y.index_select(1, copy_index))
    selected = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::index_select"]
    return selected.count(list(y.shape))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one", "odd", "all", "shuffled"])
@pytest.mark.parametrize("case", [HALO, DIRECT, PLANES, PACKED], ids=["halo", "direct", "planes", "packed"])
def test_routes(case: Case, kind: str, dtype: torch.dtype) -> None:
    flags = ("out_scale", "out_shift", "residual", "out_relu")
    assert check_fused(case.but(dtype=dtype), flags, "cuda", dual_store=kind)
    copy_index = index_list(kind, case.out_channels, random.Random(0))
    assert copy_index is not None
    assert selections(case.but(dtype=dtype), copy_index) == 0


def test_an_empty_copy_and_an_empty_result() -> None:
    assert check_fused(DIRECT, FLAGS, "cuda", dual_store="zero")
    for wrong in ({"batch": 0}, {"in_list": "zero"}, {"out_list": "zero"}):
        assert check_fused(HALO.but(**wrong), ("out_shift",), "cuda", dual_store="odd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [HALO, DIRECT, PACKED], ids=["halo", "direct", "packed"])
def test_blocks_of_the_copy(case: Case, dtype: torch.dtype) -> None:
    # Whole chunks of the copy, out of order; places that start between chunks; and a list that is the identity.
    blocks = [8 * block + c for block in (9, 0, 17, 4) for c in range(8)]
    for channels in (blocks, [149, *blocks], list(range(150)), list(range(3, 150))):
        case = case.but(dtype=dtype)
        index = torch.tensor(channels, dtype=torch.int32)
        y, copy = copied(case, index)
        assert torch.equal(copy, y.index_select(1, index))


def test_one_channel_and_one_pixel_are_ambiguous_layouts() -> None:
    for layout in ("contiguous", "channels_last"):
        for case in (HALO, DIRECT, PLANES, PACKED):
            case = case.but(layout=layout)
            assert check_fused(case.but(size=(1, 1)), ("out_relu",), "cuda", dual_store="odd")
            assert check_fused(case.but(out_channels=1), ("out_relu",), "cuda", dual_store="all")
            assert check_fused(case.but(out_channels=9), ("out_relu",), "cuda", dual_store="one")


def test_results_of_planes_by_way_of_a_copy_are_selected_from_afterwards() -> None:
    # Planes of 98 bytes: the result is spread from a compact tensor.
    case = PLANES.but(size=(7, 7), dtype=torch.bfloat16)
    assert selections(case, torch.tensor([3, 1, 140], dtype=torch.int32)) == 1


@pytest.mark.arch(90)
@pytest.mark.parametrize("columns", [136, 256])
@pytest.mark.parametrize("kind", ["odd", "shuffled"])
def test_warpgroups(kind: str, columns: int) -> None:
    case = DIRECT.but(dtype=torch.bfloat16, size=(9, 9), out_channels=columns)
    with device.kernels() as names:
        assert check_fused(case, ("out_scale", "residual", "out_relu"), "cuda", dual_store=kind)
    assert names.count("warpgroup_conv2d") == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed + 900)
    case = affordable(random_case(rng), 6, 60, 60)
    assert check_fused(case, rng.sample(FLAGS, 3), "cuda", dual_store=rng.choice(("odd", "shuffled", "one", "all")))
