"""Verdicts where users look: ``bk.info()``, its command, and ``bk.report()``."""

from __future__ import annotations

import sys

import pytest
import torch

import bap_kernels as bk
from bap_kernels.plan.report import NetworkReport, _why
from bap_kernels.verify import Verdict
from bap_kernels.verify.store import Store
from tests.verify.conftest import subject


def test_info_shows_verdicts_and_the_reasons_of_those_that_are_not_ok(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, device = sys.modules["bap_kernels.info"], subject("right", "wrong", "hang")
    monkeypatch.setattr(module, "cuda_problem", lambda: None)
    monkeypatch.setattr(module, "cuda_subject", lambda index: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "simulated")
    assert list(bk.info().verdicts[0]) == []
    assert "verdicts cuda:0  " in str(bk.info())
    assert "none yet in " in str(bk.info())
    store.save(device.facts, {"x/right/float32": Verdict("ok", "3 cases"), "x/hang/float32": Verdict("hang", "no end")})
    found = bk.info()
    assert found.verdicts[0]["x/hang/float32"].verdict == "hang"
    lines = [line.split(maxsplit=2) for line in str(found).splitlines()]
    assert ["verdicts", "cuda:0", f"1 ok, 1 hang in {store.file}"] in lines
    assert ["x/hang/float32", "hang:", "no end"] in lines
    assert not any(line[0] == "x/right/float32" for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_info_without_a_gpu_has_no_verdicts() -> None:
    assert bk.info().verdicts == {}
    assert "verdicts" not in str(bk.info())


def test_report_names_families_that_are_left_out() -> None:
    verdicts = {"cuda/halo/tf32": ("ok", "9 cases"), "cuda/pack/tf32": ("crash", "killed by SIGSEGV")}
    lines = str(NetworkReport((), {}, verdicts)).splitlines()
    assert lines[-2:] == ["kernel families: 1 of 2 verified", "  cuda/pack/tf32: crash, killed by SIGSEGV"]
    assert "families" not in str(NetworkReport((), {}))


def test_report_says_why_a_layer_on_a_gpu_leaves_kernels_out() -> None:
    reasons = {"triton": "triton/pack/tf32: crash, killed by SIGSEGV", "cuda": "", "native": "float64"}
    choice = {"backend": "gather", "candidates": {"gather": 3.0, "cuda": 4.0}, "unsupported": reasons}
    backend, why = _why(choice, on_gpu=True)
    assert backend == "gather"
    assert why == "measured in us: gather 3, cuda 4; no triton: triton/pack/tf32: crash, killed by SIGSEGV"
    assert _why(choice)[1] == "measured in us: gather 3, cuda 4; no native: float64"
