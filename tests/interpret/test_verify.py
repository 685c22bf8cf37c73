"""The verifier's cases on the Triton kernels, and that they find a fault in each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.triton.families import KERNELS
from bap_kernels.verify import runner
from bap_kernels.verify.cases import Check, call_of, checks, problems
from bap_kernels.verify.subject import Subject
from tests.verify.devices import CpuDevice

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    """Instead of the other tests' override: tiles are forced by the cases."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def cases_of(kernel: str, math: str) -> list[Check]:
    return list(checks(f"triton/{kernel}/{math}", CpuDevice()))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_right(kernel: str) -> None:
    # Weight gradients take the longest, so each kernel has one math mode.
    math = ("float32", "float16", "bfloat16")[KERNELS.index(kernel) % 3]
    found = cases_of(kernel, math)
    assert len(found) >= 4
    assert len({check.config for check in found}) > 1
    # Every other one, as a sample.
    for check in found[::2]:
        check.run(CpuDevice(), lambda what: None)


LAUNCHED = {
    "gathered_conv2d_fwd_kernel": "forward",
    "gathered_conv2d_planar_fwd_kernel": "planar",
    "channel_pack_kernel": "pack",
    "gathered_conv2d_dgrad_kernel": "input_gradient",
    "gathered_conv2d_wgrad_kernel": "weight_gradient",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_families_of_a_call_are_those_that_it_launches(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton.launch_spec import Launch

    launched: set[str] = set()
    # What they compute is of no interest.
    monkeypatch.setattr(Launch, "run", lambda self: launched.add(self.spec.kernel.__name__))
    for problem in problems(dtype, 1):
        arguments = call_of(problem).arguments
        named = {each for each in _C.call_families(problem.op, arguments) if each.startswith("triton/")}
        special = next((name for name in ("switched", "mixed") if name in problem.op), None)
        launched.clear()
        with torch.no_grad(), bk.use_backend("triton"):
            getattr(torch.ops.bap_kernels, problem.op)(*arguments)
        kernels = {LAUNCHED[name] for name in launched if name in LAUNCHED} | ({special} if special else set())
        assert named == {f"triton/{kernel}/{dtype}" for kernel in kernels}, problem


def test_fault_in_a_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import launch

    real = launch.planar
    # One filter too few.
    from bap_kernels.triton.lists import ChannelList

    def short(y, x, packed, in_list, out_list, *rest, **options):
        less = ChannelList(out_list.entries, out_list.kind, out_list.length - 1)
        return real(y, x, packed, in_list, less, *rest, **options)

    monkeypatch.setattr(launch, "planar", short)
    check = cases_of("planar", "float32")[0]
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check.run(CpuDevice(), lambda what: None)


def test_child_judges_a_family() -> None:
    subject = Subject(
        0,
        {"gpu": "interpreter"},
        ("triton/planar/float16", "triton/forward/tf32"),
        {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])},
        "tests.verify.devices:Interpreter",
    )
    found = {}
    runner.run(subject.families, subject, found.__setitem__, timeout=600)
    assert found["triton/planar/float16"].verdict == "ok"
    # The interpreter has no TF32.
    assert found["triton/forward/tf32"].verdict == "unknown"
    assert found["triton/forward/tf32"].reason == "none of the calls that are tried runs it here"
