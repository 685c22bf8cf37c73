"""The switched convolution and its gradients on seeded random cases, against autograd of the masked dense one."""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels as bk
from bap_kernels.testing import Case, lay_out, random_case
from bap_kernels.testing_switched import check_switched, check_switched_backward, make_switched, run_switched

CHUNKS, CASES_PER_CHUNK = 10, 30
GRAD_LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_last", "expanded", "transposed")


def draw(seed: int) -> tuple[Case, str, bool]:
    rng = random.Random(seed)
    case = random_case(rng).but(dtype=rng.choice((torch.float32, torch.bfloat16)), seed=seed)
    return case, rng.choice(GRAD_LAYOUTS), rng.random() < 0.8


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_op_equals_masked_dense_convolution_on_random_cases(chunk: int, backend: str, nan_filled_empty: None) -> None:
    ran = 0
    for seed in range(9000 + chunk * CASES_PER_CHUNK, 9000 + (chunk + 1) * CASES_PER_CHUNK):
        case, grad_layout, off_gradient = draw(seed)
        try:
            # The loops of the reference run on small cases only; autograd is the reference everywhere.
            ran += check_switched_backward(case, backend, grad_layout, off_gradient, loops=seed % 10 == 0)
            if backend == "auto" or seed % 10 == 0:
                check_switched(case, backend)
        except Exception as error:
            raise AssertionError(f"draw({seed}) on backend {backend}: {case}, {grad_layout}, {off_gradient}") from error
    assert ran >= CASES_PER_CHUNK // 2


def test_random_cases_cover_every_kind() -> None:
    drawn = [draw(seed) for seed in range(9000, 9000 + CHUNKS * CASES_PER_CHUNK)]
    cases = [case for case, _, _ in drawn]
    assert {layout for _, layout, _ in drawn} == set(GRAD_LAYOUTS)
    assert sum(case.dtype == torch.bfloat16 for case in cases) > 100
    assert sum(case.depthwise for case in cases) > 30
    on = [make_switched(case).switch for case in cases]
    assert sum(not switch.any() for switch in on) > 10
    assert sum(bool(switch.all()) for switch in on) > 10
    assert sum(bool(switch.any() and not switch.all()) for switch in on) > 100


def test_function_equals_the_op() -> None:
    for seed in range(9500, 9540):
        case, _, off_gradient = draw(seed)
        sides = case.padding[::2]
        case = case.but(padding=(sides[0], sides[0], sides[1], sides[1]))
        sample = make_switched(case)
        if min(sample.output_shape[2:]) < 1:
            continue
        leaves = [t.requires_grad_() for t in sample.tensors]
        expected = run_switched(sample, "aten", off_gradient)
        with bk.use_backend("aten"):
            actual = bk.switched_conv2d(*sample.args[:5], sides, *sample.args[6:], off_gradient=off_gradient)
        assert torch.equal(actual, expected), (seed, case)
        grad = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for result, exact in zip(torch.autograd.grad(actual, leaves, grad), expected_grads, strict=True):
            assert torch.equal(result, exact), (seed, case)


def test_result_is_linear_in_the_input() -> None:
    # Powers of two do not change rounding: equality is exact.
    for seed in range(9600, 9630):
        case, _, _ = draw(seed)
        sample = make_switched(case.but(bias=False))
        before = run_switched(sample, "aten")
        sample.input = lay_out(sample.input * -4, case.layout)
        assert torch.equal(run_switched(sample, "aten"), before * -4), (seed, case)


def test_switch_and_complement_sum_to_dense_result() -> None:
    # The results of a switch and its complement sum to the dense result.
    for seed in range(9700, 9730):
        case, _, _ = draw(seed)
        sample = make_switched(case.but(bias=False, dtype=torch.float64))
        one = run_switched(sample)
        sample.switch = 1 - sample.switch
        other = run_switched(sample)
        sample.switch = torch.ones_like(sample.switch)
        torch.testing.assert_close(one + other, run_switched(sample), rtol=1e-10, atol=1e-10)
