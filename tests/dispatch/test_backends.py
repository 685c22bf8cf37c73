"""Selection of a backend, and of every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

import bap_kernels
from bap_kernels import _C, dispatch, reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

CASE = Case(in_channels=20, out_channels=12)
native = pytest.mark.skipif(_C.unsupported_reason("native") is not None, reason="the native backend cannot run here")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def explain(case: Case) -> dict:
    sample = make_tensors(case)
    return _C.explain(*sample.args[:5], *map(list, sample.args[5:8]), sample.groups, False)


def test_nested_contexts_restore_backend() -> None:
    start = _C.get_backend()
    with bap_kernels.use_backend("aten"):
        assert _C.get_backend() == "aten"
        with bap_kernels.use_backend("auto"):
            assert _C.get_backend() == "auto"
            with bap_kernels.use_backend("aten"):
                assert _C.get_backend() == "aten"
            assert _C.get_backend() == "auto"
        assert _C.get_backend() == "aten"
    assert _C.get_backend() == start


def test_context_restores_backend_after_exception() -> None:
    start = _C.get_backend()
    with pytest.raises(KeyError), bap_kernels.use_backend("aten"):
        raise KeyError
    assert _C.get_backend() == start
    with pytest.raises(TypeError), bap_kernels.use_backend("aten"):
        torch.ops.bap_kernels.gathered_conv2d(
            *make_tensors(CASE).args[:1],
            torch.zeros(5, 20, 3, 3).double(),
            None,
            None,
            None,
            (1, 1),
            (0,) * 4,
            (1, 1),
            1,
        )
    assert _C.get_backend() == start


def test_call_sets_backend_permanently() -> None:
    start = _C.get_backend()
    try:
        bap_kernels.use_backend("aten")
        assert _C.get_backend() == "aten"
    finally:
        bap_kernels.use_backend(start)
    assert _C.get_backend() == start


def test_unknown_backend_raises() -> None:
    start = _C.get_backend()
    with pytest.raises(ValueError, match=r"use_backend\(\): expected `name` to be one of auto, .*, got 'fast'"):
        bap_kernels.use_backend("fast")
    assert _C.get_backend() == start


@pytest.mark.parametrize("name", ["native", "aten", "triton", "cuda"])
def test_backend_runs_or_raises_with_reason(name: str) -> None:
    reason = _C.unsupported_reason(name)
    if reason is None:
        with bap_kernels.use_backend(name):
            assert _C.get_backend() == name
        return
    assert len(reason) > 10
    start = _C.get_backend()
    with pytest.raises(ImportError) as error:
        bap_kernels.use_backend(name)
    assert f"got '{name}'" in str(error.value)
    assert reason.removeprefix(f"{name}: ") in str(error.value)
    assert _C.get_backend() == start


def test_aten_and_auto_always_run() -> None:
    assert _C.unsupported_reason("aten") is None
    assert _C.unsupported_reason("auto") is None


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_backend_raises_with_reason_for_unsupported_dtype(dtype: torch.dtype) -> None:
    case = CASE.but(dtype=dtype)
    reason = explain(case)["unsupported"]["native"]
    with pytest.raises(NotImplementedError) as error:
        run(make_tensors(case), "native")
    line = str(error.value).splitlines()[0]
    assert line.startswith("gathered_conv2d(): expected ")
    assert "native" in line
    assert reason in line
    sample = make_tensors(case)
    assert_close(run(sample, "auto"), reference.gathered_conv2d(*sample.args), dtype, sample.depth)


def test_explain_has_case_and_times_of_every_candidate() -> None:
    run(make_tensors(CASE))
    explanation = explain(CASE)
    assert set(explanation) >= {"case", "backend", "candidates", "unsupported"}
    assert explanation["backend"] in explanation["candidates"]
    assert all(isinstance(name, str) and micros > 0 for name, micros in explanation["candidates"].items())
    # A candidate must be faster by more than noise.
    assert explanation["candidates"][explanation["backend"]] <= 1.05 * min(explanation["candidates"].values())
    assert "20" in explanation["case"]


ISA_PROGRAM = """
import random, sys, torch
import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import Case, check_backward, check_forward, check_fused, random_case

assert _C.isa() == {isa!r}, _C.isa()
named = "native" if _C.unsupported_reason("native") is None else "aten"
assert named == {named!r}, _C.unsupported_reason("native")
ran = 0
for seed in range(30):
    case = random_case(random.Random(seed))
    if case.dtype not in (torch.float32, torch.bfloat16):
        case = case.but(dtype=torch.bfloat16)
    ran += check_forward(case, named)
    check_forward(case, "auto")
    check_fused(case, ("in_scale", "in_relu", "out_shift", "residual", "out_relu"), named)
check_backward(Case(), "auto")
assert ran >= 15, ran
print("ran", ran)
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "avx512_emulated", "neon_emulated", "none"])
def test_forced_instruction_set_is_used(isa: str) -> None:
    available = _C.isa_available()
    named = "aten" if isa == "none" else "native"
    process = run_python(ISA_PROGRAM.format(isa=isa, named=named), BAP_KERNELS_ISA=isa)
    if isa in (*available, "none") or (isa.endswith("_emulated") and "avx2" in available):
        assert process.returncode == 0, process.stdout + process.stderr
        assert "ran" in process.stdout
    else:
        assert process.returncode != 0
        last = process.stderr.strip().splitlines()[-1]
        assert "BAP_KERNELS_ISA" in last
        assert "expected" in last
        assert isa in last


def test_best_instruction_set_is_used() -> None:
    available = _C.isa_available()
    assert _C.isa() in {"avx512", "avx2", "none"}
    assert _C.isa() in (*available, "none")
    if not os.environ.get("BAP_KERNELS_ISA"):
        assert _C.isa() == next((isa for isa in ("avx512", "avx2") if isa in available), "none")
    assert isinstance(_C.has_avx512_bf16(), bool)


@pytest.mark.parametrize("name", ["BAP_KERNELS_ISA", "BAP_KERNELS_BACKEND"])
def test_invalid_environment_variable_raises(name: str) -> None:
    process = run_python("import bap_kernels", **{name: "fastest"})
    assert process.returncode != 0
    assert f"expected `{name}` to be one of" in process.stderr
    assert "got 'fastest'" in process.stderr


def test_environment_variable_sets_backend() -> None:
    process = run_python("from bap_kernels import _C; print(_C.get_backend())", BAP_KERNELS_BACKEND="aten")
    assert process.stdout.split() == ["aten"], process.stderr


def backward_backend(forward: str, backward: str, in_thread: bool = False) -> str:
    """Return the backend of the backward pass, by whether it raises for a dtype that only `native` lacks."""
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with bap_kernels.use_backend(forward):
        y = bap_kernels.gathered_conv2d(x, torch.randn(4, 3, 3, 3, dtype=torch.float64)).sum()
    seen = []

    def run_backward() -> None:
        with bap_kernels.use_backend(backward):
            try:
                y.backward()
                seen.append("not native")
            except NotImplementedError:
                seen.append("native")

    if in_thread:
        thread = threading.Thread(target=run_backward)
        thread.start()
        thread.join()
    else:
        run_backward()
    return seen[0]


@native
@pytest.mark.parametrize("in_thread", [False, True])
def test_backward_uses_backend_of_forward(in_thread: bool) -> None:
    # Native has no float64 kernel.
    assert backward_backend("aten", "native", in_thread) == "not native"
    assert backward_backend("auto", "native", in_thread) == "not native"
    with pytest.raises(NotImplementedError, match="native"):
        backward_backend("native", "aten", in_thread)


def test_switched_backward_uses_backend_of_forward() -> None:
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    with bap_kernels.use_backend("aten"):
        y = bap_kernels.switched_conv2d(x, torch.randn(4, 3, 3, 3), None, torch.ones(3)).sum()
    _C.set_unsupported_reason(lambda name: "")
    try:
        # Triton cannot run here: a backward through it would fail.
        with bap_kernels.use_backend("triton"):
            y.backward()
    finally:
        _C.set_unsupported_reason(dispatch._gpu_backend_unsupported_reason)
    assert x.grad is not None


def in_thread(action: Callable[[], str]) -> str:
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(action()))
    thread.start()
    thread.join()
    return seen[0]


def test_backend_setting_is_per_thread() -> None:
    start = _C.get_backend()
    with bap_kernels.use_backend("aten"):
        assert in_thread(_C.get_backend) == start

        def sets_its_own() -> str:
            bap_kernels.use_backend("aten")
            return _C.get_backend()

        with bap_kernels.use_backend("auto"):
            assert in_thread(sets_its_own) == "aten"
            assert _C.get_backend() == "auto"


@pytest.mark.parametrize("value", ["", " ", "none", "NONE", " None "])
def test_isa_variable_is_parsed(value: str) -> None:
    process = run_python("from bap_kernels import _C; print(_C.isa(), *_C.isa_available())", BAP_KERNELS_ISA=value)
    found, best, *_ = process.stdout.split()
    assert found == ("none" if value.strip() else best)


@pytest.mark.parametrize("value", ["aten", " ATEN ", "Aten"])
def test_backend_variable_is_default_of_every_thread(value: str) -> None:
    code = (
        "import threading; from bap_kernels import _C, use_backend; seen = []\n"
        "with use_backend('auto'):\n"
        "    thread = threading.Thread(target=lambda: seen.append(_C.get_backend()))\n"
        "    thread.start(); thread.join()\n"
        "print(*seen, _C.get_backend())"
    )
    process = run_python(code, BAP_KERNELS_BACKEND=value)
    assert process.stdout.split() == ["aten", "aten"], process.stderr


class _Backends(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> bool:
        return _C.get_backend() == "aten"


def test_forked_workers_inherit_backend() -> None:
    loader = torch.utils.data.DataLoader(_Backends(), num_workers=1, multiprocessing_context="fork")
    with bap_kernels.use_backend("aten"):
        assert [bool(seen) for seen in loader] == [True, True]
    assert [bool(seen) for seen in loader] == [False, False]


def test_build_information_is_text() -> None:
    information = _C.build_info()
    assert information
    assert all(isinstance(k, str) and isinstance(v, str) and v for k, v in information.items())
