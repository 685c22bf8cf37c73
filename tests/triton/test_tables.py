"""What the Triton backend decides on the host: lists, packed weights, configurations, and when it can run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C, dispatch

pytest.importorskip("triton")

from bap_kernels._packed import packed_weights
from bap_kernels.triton import configs, lists, weights
from bap_kernels.triton.configs import ARCHITECTURES, TABLE, Config, Problem


def held() -> tuple[int, int]:
    return packed_weights.held_bytes, len(packed_weights.entries)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("b", lists.BLOCKS)
def test_blocks_are_found(b: int) -> None:
    channels = [b * c + d for c in (5, 0, 3) for d in range(b)]
    assert lists.block_length(channels) == b
    found = lists.channel_list(ints(channels), 8 * b)
    assert (found.kind, found.length) == (b, 3 * b)
    assert found.entries is not None
    assert found.entries.tolist() == [5, 0, 3]
    assert found.entries.dtype == torch.int32


@pytest.mark.parametrize(
    "channels",
    [[], [0], list(range(1, 9)), list(range(7)), [*range(7), 8], [7, 6, 5, 4, 3, 2, 1, 0], [*range(8), *range(9, 17)]],
)
def test_what_is_no_block(channels: list[int]) -> None:
    assert lists.block_length(channels) == 1
    found = lists.channel_list(ints(channels), 32)
    assert (found.kind, found.length) == (1, len(channels))
    assert found.entries is not None
    assert found.entries.tolist() == channels


def test_no_list_and_strided_lists() -> None:
    assert lists.channel_list(None, 12) == lists.ChannelList(None, 0, 12)
    stepped = torch.arange(32, dtype=torch.int32)[::3]
    entries = lists.channel_list(stepped, 32).entries
    assert entries is not None
    assert entries.is_contiguous()
    assert entries.tolist() == stepped.tolist()


def test_a_changed_list_is_read_again_and_a_dropped_one_forgotten() -> None:
    index = torch.arange(16, dtype=torch.int32)
    assert lists.channel_list(index, 32).kind == 16
    assert lists.channel_list(index, 32) is lists.channel_list(index, 32)
    index[0] = 20
    assert lists.channel_list(index, 32).kind == 1
    with torch.inference_mode():
        assert lists.channel_list(torch.arange(16, dtype=torch.int32), 32).kind == 1
    gc.collect()
    before = len(lists._found)
    del index
    gc.collect()
    assert len(lists._found) == before - 1


@pytest.mark.parametrize("by_input", [False, True])
def test_packed_weight(by_input: bool) -> None:
    weight, rows, columns = torch.randn(7, 9, 3, 2), ints([6, 1, 2]), ints([8, 0])
    packed = weights.pack_weight(weight, rows, columns, by_input)
    slices = weight[rows.long()][:, columns.long()]
    slices = slices.transpose(0, 1) if by_input else slices
    first, last = slices.shape[:2]
    assert packed.shape == (first, 6, 16)
    assert torch.equal(packed[:, :, :last], slices.permute(0, 2, 3, 1).reshape(first, 6, last))
    assert not packed[:, :, last:].any()


def test_kept_weights_go_with_their_parameters_and_keep_to_the_limit() -> None:
    packed_weights.clear()
    one, two = torch.randn(16, 16, 1, 1), torch.randn(16, 16, 1, 1)
    first = weights.cached_weight(one, None, None)
    assert weights.cached_weight(one, None, None) is first
    one.add_(1)
    second = weights.cached_weight(one, None, None)
    assert torch.equal(second[:, 0], one[:, :, 0, 0])
    assert held() == (1024, 1)
    weights.cached_weight(two, None, ints([3]))
    # The list is gone already, and the entry with it.
    assert held() == (1024, 1)
    index = ints([3])
    weights.cached_weight(two, None, index)
    assert held() == (2048, 2)
    assert bk.packed_cache_info()["entries"] >= 2
    limit = bk.packed_cache_info()["limit_bytes"]
    try:
        bk.set_packed_cache_limit(1500)
        assert held() == (1024, 1)
        bk.set_packed_cache_limit(100)
        assert held() == (0, 0)
        assert torch.equal(weights.cached_weight(one, None, None), second)
        assert held() == (0, 0)
    finally:
        bk.set_packed_cache_limit(limit)
    weights.cached_weight(one, None, None)
    del one
    gc.collect()
    assert held() == (0, 0)
    with torch.inference_mode():
        weights.cached_weight(torch.randn(16, 16, 1, 1), None, None)
    assert held() == (0, 0)


def test_one_limit_bounds_all_packed_weights() -> None:
    bk.clear_packed_cache()
    limit = bk.packed_cache_info()["limit_bytes"]
    native, other = bk.nn.GatheredConv2d(64, 64, 3).eval(), torch.randn(64, 64, 3, 3)
    try:
        with torch.no_grad():
            native(torch.randn(1, 64, 9, 9))
        before = bk.packed_cache_info()
        packed = weights.pack_weight(other, None, None).nbytes
        assert packed <= before["bytes"] < 2 * packed
        bk.set_packed_cache_limit(2 * packed - 1)
        assert bk.packed_cache_info()["bytes"] == before["bytes"]
        weights.cached_weight(other, None, None)
        # Those of the C++ part have made room.
        after = bk.packed_cache_info()
        assert (after["bytes"], after["entries"], after["limit_bytes"]) == (packed, 1, 2 * packed - 1)
        bk.clear_packed_cache()
        assert bk.packed_cache_info()["entries"] == 0
        assert _C.packed_cache_info()["limit_bytes"] == 2 * packed - 1
    finally:
        bk.set_packed_cache_limit(limit)


def test_every_shape_has_a_configuration_on_every_architecture() -> None:
    for capability, facts in ARCHITECTURES.items():
        for products in ("16", "tf32", "ieee"):
            table = TABLE[facts.table, products]
            for rows in (1, 40, 200, 3000, 200_000):
                for columns in (1, 33, 65, 300, 4000):
                    assert configs.from_table(rows, columns, products, capability) in table.values()


def test_tiles_grow_with_the_product() -> None:
    areas = [c.BM * c.BN for c in (configs.from_table(rows, 512, "16", 90) for rows in (49, 3136, 200_000))]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]
    assert configs.from_table(200_000, 32, "16", 90).BN == 32
    assert configs.from_table(64, 200_000, "16", 90).BM == 64


def test_unknown_architectures_take_an_older_one() -> None:
    assert configs.architecture(87).capability == 86
    assert configs.architecture(75).capability == 80
    assert configs.architecture(999).capability == max(ARCHITECTURES)


@pytest.mark.parametrize("pixels", [1, 63, 64, 6272, 100_352, 10**7])
@pytest.mark.parametrize("tile_count", [1, 36, 1000])
def test_chunks_cover_the_pixels(pixels: int, tile_count: int) -> None:
    count, length = configs.chunks(pixels, tile_count, 64, 132)
    assert length % 64 == 0
    assert (count - 1) * length < pixels <= count * length
    assert count * tile_count <= max(2 * 132, tile_count)
    # The launch derives the length from the number alone.
    assert -(-pixels // (count * 64)) * 64 * count >= pixels


def test_override_is_undone() -> None:
    mine = Config(16, 16, 16, 1, 1)
    problem = Problem("fwd", 10, 10, 10, 1, 0)
    with configs.overriding(mine):
        assert configs.choose(problem, "16", 90) == mine
        with ThreadPoolExecutor(1) as other:
            assert other.submit(configs.choose, problem, "16", 90).result() != mine
    assert configs.choose(problem, "16", 90) == configs.from_table(10, 10, "16", 90) != mine


def test_what_was_measured_goes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, mine = Problem("fwd", 10, 10, 10, 1, 0), Config(16, 16, 16, 1, 1)
    monkeypatch.setitem(configs.tuned, (90, "16", problem), mine)
    assert configs.choose(problem, "16", 90) == mine
    for other in (problem._replace(depth=11), problem._replace(kernel="planar"), problem._replace(kind=8)):
        assert configs.choose(other, "16", 90) != mine
    assert configs.choose(problem, "16", 80) != mine
    assert configs.choose(problem, "tf32", 90) != mine


def test_unsupported_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        assert dispatch.unsupported_reason("triton") == "there is no CUDA device"
        with pytest.raises(ImportError, match=r"got 'triton': there is no CUDA device\. Hint: bap_kernels\.info"):
            bk.use_backend("triton")
    monkeypatch.setattr(dispatch, "OLDEST_TRITON", (99, 0))
    assert "is older than 99.0" in str(dispatch.unsupported_reason("triton"))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.unsupported_reason("triton") == "Triton is not installed"


def test_calls_on_a_cpu_import_no_kernels() -> None:
    code = """
import sys, torch, bap_kernels as bk
y = bk.gathered_conv2d(torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3), None, torch.tensor([0, 2], dtype=torch.int32))
assert y.shape == (1, 3, 3, 3)
assert [name for name in sys.modules if "triton" in name and "bap_kernels" in name] == ["bap_kernels.triton"]
"""
    environment = os.environ | {"BAP_KERNELS_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cpu_tensors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import ops

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    reason = ops.unsupported_reason(x, w, 1, (3, 3), interpreted=False)
    assert reason == "it computes on CUDA devices, the tensors are on cpu"
    with pytest.raises(NotImplementedError, match=r"conv\(\): expected a call that backend `triton` can run.*on cpu"):
        ops.refuse("conv", reason)
    big = torch.empty(2**16, 1, 2**8, 2**8, device="meta")
    assert ops.unsupported_reason(big, w, 1, (256, 256), True) == "the shape is beyond 32-bit tile arithmetic"


def test_what_a_capture_records_is_not_kept_for_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_weights.clear()
    weight, index = torch.randn(16, 16, 1, 1), ints([1, 5])
    monkeypatch.setattr(weights, "capturing", lambda tensor: True)
    recorded = weights.cached_weight(weight, None, index)
    weights.keep_for_graphs(weight, recorded)
    assert held() == (0, 0)
    monkeypatch.undo()
    kept = weights.cached_weight(weight, None, index)
    assert kept is not recorded
    assert weights.cached_weight(weight, None, index) is kept
    # What a graph reads lives as long as the weight, whatever the cache drops.
    monkeypatch.setattr(weights, "capturing", lambda tensor: True)
    weights.keep_for_graphs(weight, kept)
    monkeypatch.undo()
    packed_weights.clear()
    assert {id(part) for part in weights._of_graphs[weight].values()} == {id(recorded), id(kept)}
    before = len(weights._of_graphs)
    del weight
    gc.collect()
    assert len(weights._of_graphs) == before - 1


def test_tiles_leave_room_for_what_the_end_of_a_kernel_holds() -> None:
    from bap_kernels.triton import launch
    from bap_kernels.triton.launch import DualStore, Epilogue
    from bap_kernels.triton.launch_spec import Target

    x = torch.empty(1, device="meta")
    dual = DualStore(x, x)
    for kernel, epilogue, sums in (
        ("fwd", Epilogue(x, x, x), 128),
        ("fwd", Epilogue(residual=x), 64),
        ("fwd", Epilogue(residual=x, dual=dual), 32),
        ("planar", Epilogue(residual=x, dual=dual), 64),
    ):
        found = launch.config_of(Problem(kernel, 200_000, 512, 64, 1, 0), torch.float16, Target(90), epilogue)
        assert found.BM * found.BN / (32 * found.warps) == sums
    small = Config(64, 32, 16, 4, 3)
    assert configs.within_registers(small, 32) == small
