"""The cases themselves, and what families devices have; on true kernels in tests/interpret and tests/ptx/cuda."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import Case, make_fused, make_tensors
from bap_kernels.verify import cases, families
from bap_kernels.verify.cases import DTYPES, call_of, problems
from bap_kernels.verify.families import MATHS, is_main, matching, ordered


@pytest.mark.parametrize("math", MATHS)
def test_aten_passes_every_case(math: str) -> None:
    """Expected values and tolerances are those of a right implementation."""
    from tests.verify.devices import CpuDevice

    if math == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch adds parts of bfloat16 gradients in bfloat16 on this CPU")
    # One SM: large tiles are reached with few pixels.
    for problem in problems(math, sm_count=1):
        check = cases.Check(str(problem), "aten", math, problem, call_of(problem))
        check.run(CpuDevice(), lambda what: None)


def test_a_wrong_result_fails_every_case() -> None:
    for problem in problems("bfloat16", sm_count=1):
        call = call_of(problem)
        for _, expected, depth in call.expected:
            moved = expected.clone().flatten()
            moved[0] += 0.2 * max(1, depth) ** 0.5 + 0.1 * moved[0].abs()
            with pytest.raises(AssertionError):
                cases._close(moved.view(expected.shape).bfloat16(), expected, "bfloat16", depth)


def test_channels_that_are_left_out_hold_nan() -> None:
    for problem in problems("float32", sm_count=1):
        call = call_of(problem)
        listed = problem.case.in_list != "null" or problem.block
        some = any(isinstance(each, torch.Tensor) and each.isnan().any() for each in call.arguments)
        assert some or not listed or (problem.op == "switched_conv2d_backward" and problem.off_gradient)
        assert not any(expected.isnan().any() for _, expected, _ in call.expected)


def test_large_cases_fill_a_device_with_large_tiles() -> None:
    rows = [
        p.case.batch * p.case.size[0] * p.case.size[1] // 128 * -(-p.case.out_channels // 128)
        for p in problems("bfloat16", sm_count=132)
    ]
    assert sum(tiles >= 132 for tiles in rows) >= 5


def test_fused_reference_equals_the_loops() -> None:
    sample = make_tensors(Case(in_channels=9, out_channels=7, size=(4, 5)))
    fused = make_fused(sample, cases._FLAGS, torch.float32)
    expected = reference.gathered_conv2d_fused(*sample.args, **fused)
    torch.testing.assert_close(cases._fused_reference(sample, fused), expected, rtol=1e-10, atol=1e-10)


def test_cases_are_of_the_dtype_of_their_math() -> None:
    for math, dtype in DTYPES.items():
        assert {problem.case.dtype for problem in problems(math, 1)} == {dtype}


def test_order_begins_with_what_inference_needs() -> None:
    names = [f"triton/{kernel}/{math}" for kernel in families.TRITON_KERNELS for math in MATHS]
    names += ["cuda/nhwc/bfloat16", "cuda/mixed/bfloat16", "cuda/nhwc/float16"]
    found = ordered(reversed(names))
    main = [is_main(each) for each in found]
    assert main == sorted(main, reverse=True)
    assert sorted(found) == sorted(names)
    assert found[:2] == ("triton/forward/bfloat16", "cuda/nhwc/bfloat16")


def test_matching_of_names_patterns_and_the_main_ones() -> None:
    names = ("triton/forward/bfloat16", "cuda/nhwc/tf32", "triton/mixed/tf32")
    assert matching(["*/tf32"], names) == names[1:]
    assert matching(["triton/mixed/tf32", "main"], names) == names
    with pytest.raises(ValueError, match=r"expected `families` to name families of this device, got 'cuda/\*/float16'"):
        matching(["*/tf32", "cuda/*/float16"], names)
