"""Idle threads in the native kernels, as simulated from their own tasks."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import _C
from benches.cases import Case
from tools import simulate_threads
from tools.simulate_threads import Busy, busy, cases, network_idle, regions_of

pytestmark = pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))

# (rows, lanes) of the register tiles.
TILES = {"avx512": (14, 16), "avx2": (6, 8), "neon": (12, 4)}


def test_busy_by_hand() -> None:
    # Two threads: runs of two and one tasks; then one task alone; then runs of at least two.
    regions = [(1, [1.0, 2.0, 4.0]), (1, [3.0]), (2, [1.0, 1.0, 1.0]), (1, [])]
    assert busy(regions, 2) == Busy(13.0, 4.0 + 3.0 + 2.0, 3.0)
    assert busy(regions, 1) == Busy(13.0, 13.0, 3.0)


def grid_of_two(case: Case, batch: int, layout: str) -> tuple[int, int]:
    """(blocks of pixels, groups of channels) for two threads, as these were tuned with."""
    rows, lanes = TILES[_C.isa()]
    width, kept = 2 * lanes, case.C_in // 2
    oH, oW = case.output_size
    pixels, taps = batch * oH * oW, case.kernel**2
    if layout == "channels_last":
        tiles, panels = -(-pixels // rows), -(-case.C_out // width)
        # Where vectors gather, pixels a multiple of 4096 bytes apart are packed, as those of several taps are.
        crowded = _C.isa() == "avx512" and 4 * case.C_in % 4096 == 0
        per_block = (240 if taps > 1 or crowded else 120) // rows
        if tiles < per_block and panels >= 2:
            return max(1, (tiles + per_block // 2) // per_block), 2
        blocks = max(1, (tiles + per_block // 2) // per_block)
        return min(tiles, -(-blocks // 2) * 2), 1
    tiles, panels = -(-pixels // width), -(-case.C_out // rows)
    per_block = min(max(200 * 1024 // (min(kept * taps, 320) * width * 4), 5), 31)
    blocks = (tiles + per_block // 2) // per_block

    def cycles(some_pixels: int, channels: int) -> float:
        return some_pixels * channels / 16 + 0.6 * some_pixels + 0.25 * channels

    by_pixels, by_channels = min(-(-tiles // 2) * width, pixels), min(-(-panels // 2) * rows, case.C_out)
    if blocks < 2 <= panels and cycles(pixels, by_channels) < cycles(by_pixels, case.C_out):
        return max(1, blocks), 2
    return min(tiles, -(-max(1, blocks) // 2) * 2), 1


@pytest.mark.skipif(_C.isa() not in TILES, reason="tiles of other sizes")
@pytest.mark.parametrize("layout", simulate_threads.FORMATS)
@pytest.mark.parametrize("batch", [1, 8])
def test_grids_of_two_threads_are_as_tuned(batch: int, layout: str) -> None:
    for case in cases("direct"):
        ((grain, cycles),) = regions_of(case, batch, layout, "direct", 2)
        blocks, groups = grid_of_two(case, batch, layout)
        assert (grain, len(cycles)) == (1, blocks * groups), case.shape


@pytest.mark.parametrize("kind", simulate_threads.KINDS)
def test_tasks_do_the_same_work_for_any_number_of_threads(kind: str) -> None:
    case = next(case for case in cases(kind) if case.kernel == 3 and case.H == 14)
    one = busy(regions_of(case, 1, "channels_last", kind, 1), 1).work
    for threads in (2, 8, 64):
        work = busy(regions_of(case, 1, "channels_last", kind, threads), threads).work
        # What is packed, read or transformed once more for a part.
        assert one * 0.99 <= work <= 3 * one, threads


# The most that may be idle, with tiles of 16 lanes and with narrower ones: wide panels of filters are few where images
# are small.
IDLE = {
    ("direct", 8): (0.15, 0.1),
    ("direct", 64): (0.4, 0.3),
    ("winograd", 8): (0.1, 0.1),
    ("winograd", 64): (0.2, 0.1),
    ("gradients", 8): (0.25, 0.25),
    ("winograd gradients", 8): (0.2, 0.2),
    ("winograd gradients", 16): (0.25, 0.25),
}


@pytest.mark.parametrize("layout", simulate_threads.FORMATS)
@pytest.mark.parametrize(("kind", "threads"), IDLE)
def test_few_threads_are_idle(kind: str, threads: int, layout: str) -> None:
    wide, narrow = IDLE[kind, threads]
    idle, _ = network_idle(kind, 1, layout, threads)
    assert idle <= (wide if _C.isa() == "avx512" else narrow)


def test_recording_computes_nothing_and_ends() -> None:
    x, w = torch.ones(1, 64, 8, 8), torch.ones(64, 64, 3, 3)
    op = torch.ops.bap_kernels.gathered_conv2d
    arguments = (x, w, None, None, None, [1, 1], [1] * 4, [1, 1], 1)
    before = _C.get_backend()
    _C.set_backend("native")
    try:
        assert len(_C.record_tasks(lambda: op(*arguments, True))) == 2
        assert _C.packed_cache_info()["entries"] == 0
        with pytest.raises(ZeroDivisionError):
            _C.record_tasks(lambda: 1 // 0)
        y = op(*arguments, True)
    finally:
        _C.set_backend(before)
        _C.clear_packed_cache()
    assert y[0, 0, 4, 4] == 576


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    some = [case for case in simulate_threads.CASES if case.shape in ("14x14-256-256-k3s1", "7x7-512-2048-k1s1")]
    monkeypatch.setattr(simulate_threads, "CASES", some)
    assert simulate_threads.main(["--threads", "2,16", "--batch", "1", "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| idle share of | 2 threads | 16 threads |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| direct, channels_last, batch 1",
        "|   14x14-256-256-k3s1",
        "|   7x7-512-2048-k1s1",
    ]
    assert len(lines) == 2 + 2 * (5 * 1 + 3 * 2 + 2 * 1)
