"""Results do not depend on the number of threads, on repetition or on other threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bap_kernels
from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, random_case, run

CASES = {
    "3x3": Case(2, 40, 36, (30, 31)),
    "1x1": Case(2, 96, 70, (28, 28), kernel=(1, 1), padding=(0, 0, 0, 0)),
    "strided": Case(1, 40, 36, (31, 30), stride=(2, 2), layout="channels_last"),
    "bfloat16": Case(2, 40, 36, (20, 21), dtype=torch.bfloat16),
    "depthwise": Case(2, 48, depthwise=True, size=(30, 31)),
    "one_image_many_channels": Case(1, 64, 257, (5, 7), out_list="null"),
    "many_images": Case(33, 20, 20, (5, 5), layout="channels_last"),
}
NATIVE = [("native", name) for name, case in CASES.items() if not case.depthwise]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def with_threads(count: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("aten", name) for name in CASES] + [("auto", name) for name in CASES] + NATIVE,
    indirect=["backend"],
)
def test_repeats_are_bit_equal(backend: str, name: str) -> None:
    sample = make_tensors(CASES[name])
    first = run(sample, backend)
    for _ in range(5):
        assert torch.equal(run(sample, backend), first)


@pytest.mark.parametrize(("backend", "name"), NATIVE, indirect=["backend"])
def test_native_results_are_bit_equal_for_any_number_of_threads(backend: str, name: str) -> None:
    sample = make_tensors(CASES[name])
    first = with_threads(1, lambda: run(sample, backend))
    for count in (2, 3, 4):
        assert torch.equal(with_threads(count, lambda: run(sample, backend)), first)


def test_results_do_not_depend_on_alignment(backend: str) -> None:
    # Copies at other alignments.
    sample = make_tensors(CASES["3x3"])
    first = run(sample, backend)
    for shift in (1, 3, 7):
        storage = torch.empty(sample.input.numel() + shift)
        moved = storage[shift:].view(sample.input.shape).copy_(sample.input)
        sample.input = moved
        assert torch.equal(run(sample, backend), first)


def hammer(jobs: list[Callable[[], None]], threads: int = 4) -> None:
    barrier = threading.Barrier(threads)

    def work(part: int) -> None:
        barrier.wait()
        for job in jobs[part::threads]:
            job()

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, part) for part in range(threads)]:
            future.result()


@pytest.mark.parametrize("cache_packed", [False, True])
def test_concurrent_calls_are_right(backend: str, cache_packed: bool) -> None:
    work = []
    for seed in range(24):
        case = random_case(random.Random(5000 + seed)).but(dtype=torch.float32)
        sample = make_tensors(case)
        work.append((sample, reference.conv_on_selected(*sample.args)))

    def job(sample: Sample, expected: torch.Tensor) -> None:
        for _ in range(3):
            try:
                y = run(sample, backend, cache_packed)
            except NotImplementedError:
                assert backend == "native"
                return
            assert_close(y, expected, torch.float32, sample.depth)

    hammer([lambda w=w: job(*w) for w in work])


def test_concurrent_calls_with_one_weight_and_many_lists_are_right() -> None:
    sample = make_tensors(Case(1, 24, 24, (9, 9), in_list="null", out_list="null"))

    def job(seed: int) -> None:
        rng = random.Random(seed)
        lists = [torch.tensor(rng.sample(range(24), rng.randint(0, 24)), dtype=torch.int32) for _ in (0, 1)]
        args = (*sample.args[:3], *lists, *sample.args[5:])
        expected = reference.conv_on_selected(*args)
        for _ in range(4):
            y = torch.ops.bap_kernels.gathered_conv2d(*args, True)
            assert_close(y, expected, torch.float32, 9 * 24)

    before = _C.packed_cache_info()["limit_bytes"]
    _C.set_packed_cache_limit(200_000)
    try:
        hammer([lambda s=s: job(s) for s in range(40)])
        assert _C.packed_cache_info()["bytes"] <= 200_000
    finally:
        _C.set_packed_cache_limit(before)


def test_concurrent_calls_on_different_backends_are_right() -> None:
    names = [name for name in ("auto", "aten", "native") if _C.unsupported_reason(name) is None]
    sample = make_tensors(CASES["3x3"].but(size=(9, 10)))
    expected = reference.conv_on_selected(*sample.args)

    def job(name: str) -> None:
        for _ in range(10):
            assert_close(run(sample, name, cache_packed=True), expected, torch.float32, sample.depth)

    before = _C.get_backend()
    hammer([lambda n=n: job(n) for n in names * 4])
    assert _C.get_backend() == before


def test_backend_contexts_of_two_threads_are_independent() -> None:
    before = _C.get_backend()
    inside, outside = threading.Event(), threading.Event()

    def first() -> None:
        with bap_kernels.use_backend("aten"):
            inside.set()
            assert other_inside.wait(10)
            assert _C.get_backend() == "aten"
        outside.set()

    other_inside = threading.Event()

    def second() -> None:
        assert inside.wait(10)
        with bap_kernels.use_backend("auto"):
            other_inside.set()
            assert outside.wait(10)
            assert _C.get_backend() == "auto"

    hammer([first, second], threads=2)
    assert _C.get_backend() == before


def test_concurrent_backwards_are_right() -> None:
    samples = [make_tensors(CASES["3x3"].but(seed=seed, size=(8, 9))) for seed in range(8)]

    def job(sample: Sample) -> None:
        weight = sample.weight.detach().requires_grad_()
        y = torch.ops.bap_kernels.gathered_conv2d(sample.input, weight, *sample.args[2:])
        (result,) = torch.autograd.grad(y.sum(), weight)
        grad = torch.ones(sample.output_shape)
        expected = reference.gathered_conv2d_backward(grad, sample.input, sample.weight, *sample.args[3:])[1]
        assert_close(result, expected, torch.float32, 200)

    hammer([lambda s=s: job(s) for s in samples])
