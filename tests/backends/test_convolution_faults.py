"""PyTorch's wrong CPU convolutions do not reach our results; the search for them finds what it is to find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bap_kernels as bk
from bap_kernels import _C
from tools import search_convolution_faults as search

ROOT = Path(__file__).parents[2]
BACKENDS = [
    "aten",
    "auto",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(_C.why_not("native") is not None, reason=f"backend native: {_C.why_not('native')}"),
    ),
]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: what is searched for may crash, and memory that it allocates is NaN.
    command = [sys.executable, "-m", "tools.search_convolution_faults", *args]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_faults_do_not_reach_us(backend: str) -> None:
    done = run("--known", "--through", backend)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("0 faults")


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_a_search_finds_nothing(backend: str) -> None:
    done = run("--quick", "--narrow", "--seed", "3", "--through", backend)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("0 faults")


def took_columns(x: torch.Tensor, w: torch.Tensor, backward: bool = False, **options: int) -> bool:
    """Whether a call of the ATen path was kept away from PyTorch's own convolution."""
    before = _C.get_backend()
    _C.set_backend("aten")
    try:
        with torch.autograd.profiler.profile() as profile:
            y = bk.gathered_conv2d(x, w.requires_grad_(backward), **options)
            if backward:
                y.sum().backward()
    finally:
        _C.set_backend(before)
    names = {event.name for event in profile.function_events}
    assert ("aten::im2col" in names) != ("aten::convolution" in names)
    return "aten::im2col" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_common_networks_keep_pytorchs_convolution(dtype: torch.dtype) -> None:
    for c, size, kernel, stride, padding, groups in (
        (3, 56, 7, 2, 3, 1),  # stems
        (3, 32, 16, 16, 0, 1),
        (3, 32, 4, 4, 0, 1),
        (64, 14, 3, 1, 1, 1),
        (64, 14, 3, 2, 1, 1),
        (64, 7, 1, 1, 0, 1),
        (32, 14, 1, 2, 0, 1),
        (64, 1, 1, 1, 0, 1),  # squeeze and excitation
        (32, 2, 3, 1, 1, 1),
        (32, 14, 5, 1, 2, 32),
        (32, 14, 7, 1, 3, 32),
    ):
        x, w = torch.ones(1, c, size, size, dtype=dtype), torch.ones(c, c // groups, kernel, kernel, dtype=dtype)
        # Two columns of results with a stride are kept away in every dtype, by the margin of the rule.
        expected = kernel == 16
        assert took_columns(x, w, stride=stride, padding=padding, groups=groups) == expected


def test_what_is_kept_away() -> None:
    def away(
        dtype: torch.dtype, x: tuple[int, ...], w: tuple[int, ...], backward: bool = False, **options: int
    ) -> bool:
        return took_columns(torch.ones(x, dtype=dtype), torch.ones(w, dtype=dtype), backward, **options)

    half, full, double = torch.bfloat16, torch.float32, torch.float64
    assert away(full, (2, 1, 9, 3), (4, 1, 3, 3), stride=2)  # one column
    assert away(half, (2, 8, 9, 5), (4, 8, 3, 3), stride=3)
    assert away(half, (2, 8, 9, 1), (4, 8, 1, 1), padding=1)  # padding alone is read
    assert away(half, (2, 16, 32, 32), (4, 16, 4, 4), stride=4)  # wrong with AMX
    assert not away(full, (2, 16, 32, 32), (4, 16, 4, 4), stride=4)
    assert not away(double, (2, 1, 9, 3), (4, 1, 3, 3), stride=2)  # no kernel of oneDNN
    assert not away(full, (2, 1, 9, 9), (4, 1, 1, 1), stride=3)


def test_many_columns_are_made_in_parts() -> None:
    # 8 channels, 8 x 8 taps, 40 x 41 results: ten times what is held at once.
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (100, 8, 47, 48)).bfloat16()
    w = torch.randint(-2, 3, (2, 8, 8, 8)).bfloat16().requires_grad_()
    _C.set_backend("aten")
    try:
        y = bk.gathered_conv2d(x, w)
        y[:, :, ::13, ::13].sum().backward()
    finally:
        _C.set_backend("auto")
    wide = w.detach().double().requires_grad_()
    want = torch.nn.functional.conv2d(x.double(), wide)
    want[:, :, ::13, ::13].sum().backward()
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1)
    torch.testing.assert_close(w.grad.double(), wide.grad, rtol=1e-2, atol=1)


# --- the search itself ------------------------------------------------------------------------------------------------


def test_cases_follow_from_their_number() -> None:
    assert search.draw(1, 5) == search.draw(1, 5)
    assert search.draw(1, 5) != search.draw(2, 5)
    assert all(min(search.draw(0, i).out) >= 1 for i in range(50))
    assert all(search.draw(0, i, narrow=True).out[1] <= 5 for i in range(50))


def test_references_agree_with_float64_convolutions() -> None:
    for number in range(60):
        case = search.draw(4, number)
        rng = np.random.default_rng(number)
        x, w, dy = (
            rng.standard_normal(shape)
            for shape in (
                (case.batch, case.c_in, *case.size),
                (case.c_out, case.c_in // case.groups, *case.kernel),
                (case.batch, case.c_out, *case.out),
            )
        )
        tensors = [torch.from_numpy(t).requires_grad_() for t in (x, w)]
        y = torch.nn.functional.conv2d(*tensors, None, case.stride, case.padding, case.dilation, case.groups)
        y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(search.reference(case, x, w, None), y.detach().numpy(), atol=1e-9)
        dx, dw = search.reference_backward(case, dy, x, w)
        np.testing.assert_allclose(dx, tensors[0].grad.numpy(), atol=1e-9)
        np.testing.assert_allclose(dw, tensors[1].grad.numpy(), atol=1e-9)


def test_what_goes_wrong_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_case(case: search.Case, through: str) -> str | None:
        if case.number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.number == 3:
            raise RuntimeError("no such convolution")
        if case.number == 4:
            return search.compare(torch.tensor([1.0, float("nan")]), np.array([1.0, 2.0]), case)
        if case.number == 5:
            return search.compare(torch.tensor([1.0, 2.5]), np.array([1.0, 2.0]), case)
        if case.number == 6:
            time.sleep(3600)
        return None

    monkeypatch.setattr(search, "run_case", run_case)
    monkeypatch.setattr(search, "HANG_SECONDS", 2.0)
    faults = search.run_batch([search.draw(0, i) for i in range(8)], "torch")
    assert [(f.case.number, f.kind) for f in faults] == [
        (1, "crash"),
        (3, "raised"),
        (4, "NaN"),
        (5, "wrong"),
        (6, "hang"),
    ]
    assert "crash" in search.table(faults)


def test_a_search_goes_on_where_its_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(search, "run_batch", lambda cases, through: ran.extend(c.number for c in cases) or [])
    monkeypatch.setenv("BAP_SEARCH_READY", "1")
    for _ in range(2):
        assert search.main(["--cases", "10", "--out", str(tmp_path / "found.json")]) == 0
    assert ran == list(range(20))


@pytest.mark.parametrize("groups", [4, 2], ids=["depthwise", "grouped"])
def test_steps_of_plans_are_kept_away(groups: int) -> None:
    # One column of results at a stride of 2, and rows of results that read padding only.
    model = nn.Sequential(nn.Conv2d(4, 8 if groups == 2 else 4, 2, (1, 2), (2, 0), groups=groups)).eval().bfloat16()
    x = torch.randn(2, 4, 5, 3).bfloat16().to(memory_format=torch.channels_last)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    expected = nn.functional.conv2d(x.double(), weight, bias, (1, 2), (2, 0), 1, groups)
    with torch.no_grad():
        got = bk.plan(bk.swap_(model), x)(x)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


def test_a_switched_layer_without_a_domain_is_kept_away() -> None:
    layer = bk.nn.SwitchedConv2d(1, 3, 2, (1, 2), domains=["a"])
    x = torch.randn(2, 1, 4, 3).to(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), (1, 2))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
