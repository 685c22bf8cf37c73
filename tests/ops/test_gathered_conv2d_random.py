"""Forward of the gathered convolution on seeded random cases and on hypothesis cases."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import LAYOUTS, LISTS, Case, check_forward, lay_out, make_tensors, random_case, run

CHUNKS, CASES_PER_CHUNK = 12, 50


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_forward_equals_reference_on_random_cases(chunk: int, backend: str, nan_filled_empty: None) -> None:
    # "auto" measures every new case and runs candidates that the other backends test.
    seeds = range(chunk * CASES_PER_CHUNK, (chunk + 1) * CASES_PER_CHUNK, 2 if backend == "auto" else 1)
    ran = 0
    torch.set_num_threads(2 if backend == "native" and chunk % 3 == 2 else 1)
    for seed in seeds:
        case = random_case(random.Random(seed))
        if backend == "native" and case.dtype not in (torch.float32, torch.bfloat16):
            case = case.but(dtype=torch.float32)
        try:
            ran += check_forward(case, backend)
        except Exception as error:
            raise AssertionError(f"random_case(random.Random({seed})) on backend {backend}: {case}") from error
    assert ran >= len(seeds) // 2


cases = st.builds(
    Case,
    batch=st.integers(0, 3),
    in_channels=st.integers(1, 40),
    out_channels=st.integers(1, 20),
    size=st.tuples(st.integers(3, 14), st.integers(3, 40)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    depthwise=st.booleans(),
    in_list=st.sampled_from(LISTS),
    out_list=st.sampled_from(LISTS),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
few = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(case=cases)
def test_forward_equals_references_on_hypothesis_cases(backend: str, case: Case) -> None:
    check_forward(case, backend)


@few
@given(case=cases, scale=st.sampled_from((0.0, -1.0, 4.0)))
def test_result_is_linear_in_the_input(case: Case, scale: float) -> None:
    # Powers of two do not change rounding: equality is exact.
    sample = make_tensors(case.but(bias=False))
    before = run(sample, "aten")
    sample.input = lay_out(sample.input * scale, case.layout)
    assert torch.equal(run(sample, "aten"), before * scale)


@few
@given(case=cases, data=st.data())
def test_result_follows_the_order_of_the_out_list(case: Case, data: st.DataObject) -> None:
    case = case.but(depthwise=False, out_list="all")
    sample = make_tensors(case)
    backend = "aten" if _C.unsupported_reason("native") or case.dtype == torch.float64 else "native"
    before = run(sample, backend)
    order = data.draw(st.permutations(range(case.out_channels)))
    sample.out_index = torch.tensor(order, dtype=torch.int32)
    torch.testing.assert_close(run(sample, backend), before[:, order], rtol=1e-2, atol=1e-2)


def test_function_equals_the_op() -> None:
    for seed in range(7000, 7080):
        case = random_case(random.Random(seed))
        sides = case.padding[::2]
        case = case.but(padding=(sides[0], sides[0], sides[1], sides[1]))
        if min(make_tensors(case).output_shape[2:]) < 1:
            continue
        sample = make_tensors(case)
        leaves = [t.requires_grad_() for t in sample.args[:3] if t is not None]
        expected = run(sample, "aten")
        with bap_kernels.use_backend("aten"):
            actual = bap_kernels.gathered_conv2d(*sample.args[:6], sides, *sample.args[7:])
        assert torch.equal(actual, expected), (seed, case)
        grad = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for result, exact in zip(torch.autograd.grad(actual, leaves, grad), expected_grads, strict=True):
            assert torch.equal(result, exact), (seed, case)


def test_function_calls_torch_function_modes() -> None:
    sample = make_tensors(Case())
    args = (*sample.args[:6], 1, *sample.args[7:])
    with torch.autocast("cpu", torch.bfloat16):
        assert bap_kernels.gathered_conv2d(*args).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = bap_kernels.gathered_conv2d(*args)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == sample.output_shape
    meta = bap_kernels.gathered_conv2d(*sample.to("meta").args[:6], 1)
    assert (meta.device.type, meta.shape) == ("meta", sample.output_shape)
