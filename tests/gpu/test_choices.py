"""What `auto` does on a GPU: it measures each case once, by the device's events, and never in a capture."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, assert_close, check_fused, make_tensors, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_choice_table")]

CASE = Case(4, 40, 36, (14, 15), layout="channels_last")


def test_each_case_is_measured_once() -> None:
    sample = make_tensors(CASE)
    expected = reference.gathered_conv2d(*sample.args)
    sample = sample.to("cuda")
    for _ in range(3):
        assert_close(run(sample), expected, CASE.dtype, sample.depth)
    (choice,) = _C.choices()
    assert choice["case"].endswith(f" on {torch.cuda.get_device_name()}")
    assert {"gather", "gather_flat", "masked"} <= set(choice["candidates"])
    assert choice["backend"] in choice["candidates"]
    # Longer than a launch is on the device, shorter than anything of this size.
    assert all(1 < microseconds < 1e5 for microseconds in choice["candidates"].values())


def test_nothing_is_measured_in_a_capture() -> None:
    sample = make_tensors(CASE)
    expected = reference.gathered_conv2d(*sample.args)
    sample = sample.to("cuda")
    run(sample, "aten")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(sample)
    assert _C.choices() == []
    graph.replay()
    assert_close(y, expected, CASE.dtype, sample.depth)


def test_the_reasons_of_those_that_are_left_out() -> None:
    sample = make_tensors(CASE).to("cuda")
    reasons = _C.explain(*sample.args)["unsupported"]
    for name in ("triton", "cuda"):
        reason = reasons[name]
        # Verified, unable to run here, or without the verdict of a family, which is named.
        assert reason == "" or reason == _C.unsupported_reason(name) or f"{name}/" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dual_stores(layout: str, kernel: tuple[int, int], dtype: torch.dtype, gpu_backend: str) -> None:
    case = CASE.but(layout=layout, kernel=kernel, padding=(kernel[0] // 2,) * 4, dtype=dtype, out_channels=130)
    for kind in ("odd", "shuffled", "all"):
        flags = ("out_scale", "residual", "out_relu")
        check_fused(case.but(out_list="null"), flags, gpu_backend, torch.float32, device="cuda", dual_store=kind)
