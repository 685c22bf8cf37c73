"""Offline compilation of the Triton kernels: machine code, and checks that can fail."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from bap_kernels.triton import configs
from tools import compile_triton
from tools.compile_triton import Case, check, copies_of_16, occupancy

GOOD = {"REG": 128, "STACK": 0, "LOCAL": 0}
PTX = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\nwgmma.mma_async.sync.aligned"
CASE = Case("planar", 90, "16", "large")


@pytest.mark.parametrize("case", compile_triton.quick_cases(), ids=lambda case: f"{case.kernel} sm_{case.arch}")
def test_machine_code_has_no_fault(case: Case) -> None:
    code = compile_triton.compile_case(case)
    assert code.wrong == []
    assert code.copies_16 > 0
    assert code.spill_bytes == 0
    assert code.blocks_per_sm >= 1


def test_check_reports_spills_and_missing_instructions() -> None:
    assert check(CASE, PTX, GOOD, 1000) == []
    assert check(CASE, PTX.replace("0x10", "0x4"), GOOD, 1000) == ["no copy of 16 bytes"]
    assert check(CASE, PTX.replace("wgmma", "fma"), GOOD, 1000) == ["no wgmma.mma_async"]
    assert check(CASE, PTX, {**GOOD, "LOCAL": 8}, 1000) == ["spills 8 bytes"]
    assert check(CASE, PTX, GOOD, 10**6)[0] == f"1000000 bytes of shared memory of {227 * 1024}"
    turned = Case("wgrad 3x3", 90, "tf32", "large")
    assert check(turned, PTX.replace("0x10", "0x4"), GOOD, 1000) == []
    old = dataclasses.replace(turned, arch=80)
    assert check(old, "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;\nmma.sync", GOOD, 1000) == [
        "no copy of 16 bytes"
    ]
    assert check(dataclasses.replace(CASE, kernel="fwd 3x3 channel by channel"), "wgmma.mma_async", GOOD, 0) == []


def test_copies_of_16_ignores_smaller_copies() -> None:
    copy = "cp.async.{} [ %r1 + 0 ], [ %rd1 + 0 ], {}, %r2;\n"
    text = copy.format("cg.shared.global", "0x10") + copy.format("ca.shared.global", "0x4")
    assert copies_of_16(text) == 1


def test_occupancy_respects_each_limit() -> None:
    assert occupancy(90, 4, 32, 0) == 16
    assert occupancy(90, 8, 128, 0) == 2
    assert occupancy(90, 4, 32, 100_000) == 2
    assert occupancy(80, 4, 32, 100_000) == 1
    assert occupancy(80, 1, 8, 0) == 32


def test_table_cases_cover_every_configuration() -> None:
    cases = compile_triton.table_cases(compile_triton.ARCHS)
    covered = {(configs.architecture(case.arch).table, case.products, case.shape) for case in cases}
    configured = {
        (table, products, shape)
        for (table, products), shapes in configs.TABLE.items()
        for shape in shapes
        if table != "small"
    }
    assert covered == configured
    assert {case.kernel for case in cases} == set(compile_triton.CASES)
