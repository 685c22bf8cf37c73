"""Packed weights of several lists: a copy for each, or one for all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C, reference
from bap_kernels.settings import PACKED_MEMORY, read_environment, settings
from bap_kernels.testing import Case, Sample, assert_close, index_list, make_tensors, poison, run

pytestmark = pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))

BASE = Case(batch=2, in_channels=37, out_channels=41, size=(9, 11), in_list="odd", out_list="null", seed=4)
CASES = {
    "3x3": BASE,
    "1x1": BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "1x1_strided": BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2)),
    "shuffled": BASE.but(in_list="shuffled"),
    "one_channel": BASE.but(in_list="one"),
    "all_listed": BASE.but(in_list="all"),
    "passes": BASE.but(batch=1, in_channels=210, size=(5, 6)),
    "passes_1x1": BASE.but(in_channels=1500, kernel=(1, 1), padding=(0, 0, 0, 0), size=(5, 6)),
    "few_filters": BASE.but(out_channels=5),
    "uneven": BASE.but(kernel=(3, 2), stride=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2)),
    "many_images": BASE.but(batch=33, size=(3, 2)),
    "weight_last": BASE.but(weight_layout="channels_last"),
}
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    _C.clear_packed_cache()
    before = _C.get_packed_memory()
    with bk.use_backend("native"):
        yield
    _C.set_packed_memory(before)
    _C.clear_packed_cache()


def entries() -> int:
    return bk.packed_cache_info()["entries"]


def kept(sample: Sample, memory: str, backend: str = "native") -> Tensor:
    _C.set_packed_memory(memory)
    return run(sample, backend, cache_packed=True)


def with_list(sample: Sample, in_index: Tensor | None, out_index: Tensor | None = None) -> Sample:
    return Sample(sample.input, sample.weight, sample.bias, in_index, out_index, *sample.args[5:])


def lists_of(count: int, channels: int, seed: int = 0) -> list[Tensor]:
    rng = random.Random(seed)
    return [torch.tensor(sorted(rng.sample(range(channels), channels // 2)), dtype=torch.int32) for _ in range(count)]


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_shared_equals_own(name: str, layout: str) -> None:
    sample = make_tensors(CASES[name].but(layout=layout))
    expected = reference.gathered_conv2d(*sample.args)
    own = kept(sample, "fast")
    assert_close(own, expected, torch.float32, sample.depth)
    _C.clear_packed_cache()
    for _ in range(2):
        assert torch.equal(kept(sample, "shared"), own)
    # What is packed is that of a call without a list.
    kept(with_list(sample, None), "shared")
    assert entries() == 1
    assert torch.equal(kept(sample, "auto"), own)
    for value in (torch.nan, torch.inf):
        assert torch.equal(kept(poison(make_tensors(CASES[name].but(layout=layout)), value), "shared"), own)


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [4, 2])
def test_shared_winograd_equals_own(size: int, layout: str) -> None:
    _C.force_winograd(size)
    try:
        for case in (BASE, BASE.but(in_list="shuffled", in_channels=50, out_channels=9), BASE.but(in_list="one")):
            sample = make_tensors(case.but(layout=layout))
            own = kept(sample, "fast")
            _C.clear_packed_cache()
            assert torch.equal(kept(sample, "shared"), own)
            kept(with_list(sample, None), "shared")
            assert entries() == 1
            for value in (torch.nan, torch.inf):
                assert torch.equal(kept(poison(make_tensors(case.but(layout=layout)), value), "shared"), own)
    finally:
        _C.force_winograd(0)


@pytest.mark.parametrize(
    ("memory", "batch", "count"), [("fast", 6, 5), ("auto", 6, 1), ("auto", 5, 5), ("shared", 6, 1), ("shared", 5, 1)]
)
def test_copies_of_five_lists(memory: str, batch: int, count: int) -> None:
    # 9 x 11 pixels: six images have the 512 from which one copy of a small weight serves all lists.
    sample = make_tensors(BASE.but(batch=batch))
    for in_index in (*lists_of(4, 37), None):
        kept(with_list(sample, in_index), memory)
    assert entries() == count


@pytest.mark.parametrize(("pixels", "count"), [(512, 3), (1536, 1)])
def test_copies_of_a_large_weight(pixels: int, count: int) -> None:
    case = Case(1, 600, 440, (1, pixels), kernel=(1, 1), padding=(0,) * 4, seed=1)
    sample = make_tensors(case)
    for in_index in (*lists_of(2, 600), None):
        kept(with_list(sample, in_index), "auto")
    assert entries() == count


@pytest.mark.parametrize(("memory", "count"), [("fast", 4), ("auto", 4), ("shared", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_other_lists(memory: str, count: int, dtype: torch.dtype) -> None:
    """Where one copy cannot serve all lists, that of the last is kept, and every result is right."""
    sample = make_tensors(BASE.but(dtype=dtype))
    pairs = [(inputs, lists_of(1, 41)[0] if dtype == torch.float32 else None) for inputs in lists_of(4, 37)]
    for in_index, out_index in (*pairs, *pairs):
        listed = with_list(sample, in_index, out_index)
        for _ in range(2):
            assert_close(kept(listed, memory), reference.gathered_conv2d(*listed.args), dtype, sample.depth)
    info = bk.packed_cache_info()
    assert info["entries"] == count


def test_last_list_is_packed_once() -> None:
    sample = make_tensors(BASE)
    first, second = (with_list(sample, inputs, lists_of(1, 41)[0]) for inputs in lists_of(2, 37))
    misses = [bk.packed_cache_info()["misses"]]
    for listed in (first, first, second, second, second, first):
        kept(listed, "shared")
        misses.append(bk.packed_cache_info()["misses"])
    assert [after - before for before, after in itertools.pairwise(misses)] == [1, 0, 1, 0, 0, 1]


def test_changes_of_the_weight_are_seen() -> None:
    sample = make_tensors(BASE)
    lists = lists_of(3, 37)
    for change in (
        lambda: sample.weight.mul_(2),
        lambda: sample.weight.data.add_(1),
        lambda: sample.weight[:, lists[0].long()].numel() and sample.weight[:, lists[0].long()[0]].zero_(),
    ):
        change()
        for in_index in lists:
            listed = with_list(sample, in_index)
            assert_close(kept(listed, "shared"), reference.gathered_conv2d(*listed.args), torch.float32, sample.depth)
    assert entries() == 1


def test_weights_beyond_the_limit_are_not_kept() -> None:
    sample, limit = make_tensors(BASE), bk.packed_cache_info()["limit_bytes"]
    own = kept(sample, "fast")
    try:
        for most in (sample.weight.nbytes, 3 * sample.weight.nbytes):
            bk.set_packed_cache_limit(most)
            for _ in range(2):
                assert torch.equal(kept(sample, "shared"), own)
                other = make_tensors(BASE.but(seed=5))
                assert torch.equal(kept(other, "shared"), kept(other, "fast"))
            assert bk.packed_cache_info()["bytes"] <= most
    finally:
        bk.set_packed_cache_limit(limit)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_input(layout: str) -> None:
    """The weight's list is another than the input's, as in plans."""
    sample = make_tensors(BASE.but(layout=layout))
    assert sample.in_index is not None
    expected = kept(sample, "fast")
    _C.clear_packed_cache()
    op = torch.ops.bap_kernels._gathered_conv2d_fused
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    compact = sample.input[:, sample.in_index.long()].contiguous(memory_format=format)
    wide = torch.cat([torch.full_like(compact[:, :3], torch.nan), compact], 1).contiguous(memory_format=format)
    places = torch.arange(3, 3 + len(sample.in_index), dtype=torch.int32)
    nothing = (None, None, False, None, None, None, False)
    _C.set_packed_memory("shared")
    for x, in_index in ((compact, None), (wide, places)):
        arguments = (x, sample.weight, sample.bias, in_index, None, *sample.args[5:], *nothing)
        y, _ = op(*arguments, True, sample.in_index)
        assert torch.equal(y, expected)
    assert entries() == 1


def test_setting_belongs_to_the_thread() -> None:
    _C.set_packed_memory("shared")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_C.get_packed_memory).result() == settings.packed_memory
    assert _C.get_packed_memory() == "shared"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_batch_shares(layout: str) -> None:
    layer = bk.nn.GatheredConv2d(37, 41, 3, padding=1).eval()
    names = ["a", "b", "c"]
    bk.attach_(model := torch.nn.Sequential(layer), bk.ChannelTable.random(model, names, 0.5, 0))
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(5, 37, 8, 7).contiguous(memory_format=format)
    numbers = torch.tensor([2, 0, 1, 0, 2])
    results = {}
    with torch.no_grad():
        for memory in ("fast", "shared"):
            _C.clear_packed_cache()
            _C.set_packed_memory(memory)
            bk.set_domain(model, numbers)
            results[memory] = model(x)
            assert entries() == (3 if memory == "fast" else 1)
        assert torch.equal(results["fast"], results["shared"])
        for i, number in enumerate(numbers.tolist()):
            bk.set_domain(model, names[number])
            assert torch.equal(model(x[i : i + 1]), results["shared"][i : i + 1])


def test_training_packs_its_own() -> None:
    layer = bk.nn.GatheredConv2d(37, 41, 3, channels=bk.ChannelLists(lists_of(1, 37)[0]))
    x = torch.randn(2, 37, 6, 6)
    gradients = []
    for memory in ("fast", "shared"):
        _C.set_packed_memory(memory)
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
        assert entries() == 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("both", [False, True], ids=["in", "both"])
def test_threads_with_lists_of_their_own(both: bool) -> None:
    sample = make_tensors(BASE)
    calls = [with_list(sample, inputs, lists_of(1, 41)[0] if both else None) for inputs in lists_of(4, 37)]
    expected = [reference.gathered_conv2d(*call.args) for call in calls]

    def work(number: int) -> None:
        _C.set_packed_memory("shared")
        for _ in range(50):
            assert_close(run(calls[number], "native", cache_packed=True), expected[number], torch.float32, sample.depth)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    assert entries() == 1


def test_auto_measures_what_shares() -> None:
    sample = make_tensors(BASE)
    _C.set_choice_file("")
    _C.clear_choices()
    try:
        for memory, text in zip(PACKED_MEMORY, ("", " own-weights", " one-weight"), strict=True):
            kept(sample, memory, "auto")
            (choice,) = [choice for choice in _C.choices() if choice["case"].endswith(f"cached no-winograd{text} t1")]
            assert ("gather" in choice["candidates"]) == (memory != "shared")
        assert len(_C.choices()) == 3
    finally:
        _C.clear_choices()


def test_setting() -> None:
    assert read_environment({}).packed_memory == "auto"
    assert read_environment({"BAP_KERNELS_PACKED_MEMORY": "Shared"}).packed_memory == "shared"
    with pytest.raises(ValueError, match="`BAP_KERNELS_PACKED_MEMORY` to be one of auto, fast, shared, got 'much'"):
        read_environment({"BAP_KERNELS_PACKED_MEMORY": "much"})
    with pytest.raises(ValueError, match="expected `name` to be auto, fast or shared, got much"):
        _C.set_packed_memory("much")


def test_lists_beyond_the_ordinary() -> None:
    sample = make_tensors(BASE)
    for kind in ("one", "all", "shuffled", "odd"):
        listed = with_list(sample, index_list(kind, 37, random.Random(1)))
        assert_close(kept(listed, "shared"), reference.gathered_conv2d(*listed.args), torch.float32, sample.depth)
    nothing = with_list(sample, torch.zeros(0, dtype=torch.int32))
    assert torch.equal(kept(nothing, "shared"), kept(nothing, "fast"))
