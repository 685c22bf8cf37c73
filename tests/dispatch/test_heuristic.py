"""`heuristic`: kernels by rule, where `auto` would measure."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case, Sample, make_tensors, run

pytestmark = pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))

WIDE = Case(batch=2, in_channels=40, out_channels=48, size=(16, 16))


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    """Nothing is measured, with Winograd's kernels allowed."""
    before = _C.choices()
    with bk.use_winograd(True):
        yield
    assert _C.choices() == before


def by_winograd(sample: Sample) -> torch.Tensor:
    _C.force_winograd(4)
    try:
        return run(sample, "native")
    finally:
        _C.force_winograd(0)


@pytest.mark.parametrize("lists", [("odd", "odd"), ("null", "null")])
def test_wide_3x3_convolutions_are_winograds(lists: tuple[str, str]) -> None:
    sample = make_tensors(WIDE.but(in_channels=80, out_channels=96, in_list=lists[0], out_list=lists[1]))
    assert torch.equal(run(sample, "heuristic"), by_winograd(sample))
    with bk.use_winograd(False):
        assert torch.equal(run(sample, "heuristic"), run(sample, "native"))


@pytest.mark.parametrize(
    "case",
    [
        WIDE.but(in_channels=8, out_channels=8),
        WIDE.but(stride=(2, 2)),
        WIDE.but(kernel=(1, 1), padding=(0, 0, 0, 0)),
        WIDE.but(dtype=torch.bfloat16),
    ],
    ids=["narrow", "stride", "1x1", "bfloat16"],
)
def test_others_are_direct(case: Case) -> None:
    sample = make_tensors(case)
    assert torch.equal(run(sample, "heuristic"), run(sample, "native"))


def test_what_native_kernels_do_not_cover_is_pytorchs() -> None:
    sample = make_tensors(WIDE.but(dtype=torch.float64))
    assert torch.equal(run(sample, "heuristic"), run(sample, "aten"))
    with bk.use_backend("native"), pytest.raises(NotImplementedError):
        torch.ops.bap_kernels.gathered_conv2d(*sample.args)


def test_gradients_follow_the_rule_of_the_forward() -> None:
    sample = make_tensors(WIDE)
    leaves = [t.requires_grad_() for t in (sample.input, sample.weight)]
    grad = torch.randn(sample.output_shape)
    grads = {}
    for name in ("heuristic", "native"):
        with bk.use_backend(name):
            y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        grads[name] = torch.autograd.grad(y, leaves, grad)
    for fast, direct in zip(grads["heuristic"], grads["native"], strict=True):
        assert not torch.equal(fast, direct)
        torch.testing.assert_close(fast, direct, rtol=0, atol=2e-5 * float(direct.abs().max()))


def test_layers_and_plans() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 40, 3)
    ).eval()
    bk.swap_(model)
    bk.attach_(model, bk.ChannelTable.random(model, domains=["a", "b"], density=0.5, seed=0))
    x = torch.randn(2, 3, 20, 20)
    with bk.use_backend("heuristic"), torch.inference_mode():
        bk.set_domain(model, "b")
        y = model(x)
        planned = bk.plan(copy.deepcopy(model), x, "b")
        torch.testing.assert_close(planned(x), y, rtol=1e-4, atol=1e-4)
        assert torch.equal(planned(x), planned(x))
        bk.set_domain(model, torch.tensor([1, 0]))
        torch.testing.assert_close(model(x)[:1], y[:1], rtol=1e-4, atol=1e-4)
        bk.set_domain(model, "b")
        text = str(bk.report(model, x))
    assert "by the rule of use_backend('heuristic')" in text


def test_name_and_environment() -> None:
    with bk.use_backend("heuristic") as scope:
        assert repr(scope) == "use_backend('heuristic')"
        assert bk.info().backend == "heuristic"
    assert "heuristic" not in bk.info().backends
    code = "import bap_kernels as bk; print(bk.info().backend)"
    environment = {**os.environ, "BAP_KERNELS_BACKEND": "heuristic"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "heuristic"
    with pytest.raises(ValueError, match="to be one of auto, heuristic, native, aten, triton, cuda, got 'fast'"):
        bk.use_backend("fast")
