"""The search for faults of convolutions: its cases, its reference, and that each kind of fault is reported."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import search_convolution_faults as search
from tools.convolution_cases import Case, draw
from tools.convolution_runs import difference, reference


def test_draw_depends_on_seed_and_number_alone() -> None:
    assert draw(1, 5) == draw(1, 5)
    assert draw(1, 5) != draw(2, 5)
    assert all(min(draw(0, i).out) >= 1 for i in range(50))
    assert all(draw(0, i, narrow=True).out[1] <= 5 for i in range(50))


def test_reference_equals_float64_convolution() -> None:
    for number in range(60):
        case = draw(4, number)
        rng = np.random.default_rng(number)
        shapes = (
            (case.batch, case.c_in, *case.size),
            (case.c_out, case.c_in // case.groups, *case.kernel),
            (case.batch, case.c_out, *case.out),
        )
        x, w, dy = (rng.standard_normal(shape) for shape in shapes)
        leaves = [torch.from_numpy(t).requires_grad_() for t in (x, w)]
        y = torch.nn.functional.conv2d(*leaves, None, case.stride, case.padding, case.dilation, case.groups)
        y.backward(torch.from_numpy(dy))
        expected = {"forward": y.detach(), "input": leaves[0].grad, "weight": leaves[1].grad}
        for name, result in reference(case, x, w, None, dy).items():
            np.testing.assert_allclose(result, expected[name].numpy(), atol=1e-9)


def test_each_kind_of_fault_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_case(case: Case, implementation: str) -> str | None:
        if case.number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.number == 3:
            raise RuntimeError("no such convolution")
        if case.number == 4:
            return difference(torch.tensor([1.0, float("nan")]), np.array([1.0, 2.0]), 1e-5)
        if case.number == 5:
            return difference(torch.tensor([1.0, 2.5]), np.array([1.0, 2.0]), 1e-5)
        if case.number == 6:
            time.sleep(3600)
        return None

    monkeypatch.setattr(search, "run_case", run_case)
    monkeypatch.setattr(search, "HANG_SECONDS", 2.0)
    faults = search.run_batch([draw(0, i) for i in range(8)], "torch")
    kinds = [(fault.case.number, fault.kind) for fault in faults]
    assert kinds == [(1, "crash"), (3, "raised"), (4, "NaN"), (5, "wrong"), (6, "hang")]
    assert "crash" in search.table(faults)


def test_search_continues_where_its_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def run_batch(cases: list[Case], implementation: str) -> list[search.Fault]:
        numbers.extend(case.number for case in cases)
        return [search.Fault(cases[0], "NaN")] if cases[0].number == 10 else []

    monkeypatch.setattr(search, "run_batch", run_batch)
    monkeypatch.setenv("BAP_SEARCH_READY", "1")
    command = ["--cases", "10", "--out", str(tmp_path / "state.json")]
    assert [search.main(command) for _ in range(3)] == [0, 1, 1]
    assert numbers == list(range(30))
