"""Verdicts on kernel families: their tables, the verifier's hook, and the families that calls name."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
from tests.simulated_gpu import devices, simulated_gpu

pytestmark = pytest.mark.usefixtures("own_choice_table", "no_verifier")

SAMPLE = make_tensors(Case(2, 20, 18, (6, 7), seed=1))


def call_on(device: int, **options) -> None:
    with simulated_gpu(number=device, **options):
        run(SAMPLE)


def test_tables_are_replaced_whole_and_per_device() -> None:
    first, second = next(devices), next(devices)
    _C.set_verdicts(second, {})
    _C.set_verdicts(first, {"cuda/nhwc/float16": ("ok", ""), "triton/pack/tf32": ("wrong", "off by one")})
    _C.set_verdicts(first, {"cuda/halo/float16": ("hang", "60 s")})
    assert _C.verdicts(first) == {"cuda/halo/float16": ("hang", "60 s")}
    assert _C.verdicts(second) == {}
    _C.set_verdicts(first, {})
    assert _C.verdicts(first) == {}


def test_verdicts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"verdict of `cuda/nhwc/tf32` to be ok, wrong, crash, hang or unknown, got "):
        _C.set_verdicts(0, {"cuda/nhwc/tf32": ("good", "")})
    for device in (-1, 128):
        with pytest.raises(ValueError, match=rf"set_verdicts\(\): expected `device` to be from 0 to 127, got {device}"):
            _C.set_verdicts(device, {})
        with pytest.raises(ValueError, match=rf"verdicts\(\): expected `device` to be from 0 to 127, got {device}"):
            _C.verdicts(device)


def test_families_are_of_known_ops() -> None:
    with pytest.raises(ValueError, match=r"expected `op` to be one of gathered_conv2d, .*, got conv2d"):
        _C.call_families("conv2d", ())


def test_hook_is_called_once_per_device() -> None:
    asked: list[int] = []
    _C.set_verify_hook(asked.append)
    first, second = next(devices), next(devices)
    for device in (first, second, first, second):
        call_on(device)
    assert asked == [first, second]


def test_hook_is_not_called_by_other_calls() -> None:
    asked: list[int] = []
    _C.set_verify_hook(asked.append)
    run(SAMPLE)
    device = next(devices)
    call_on(device, capturing=True)
    assert asked == []
    call_on(device)
    assert asked == [device]


def test_hook_is_called_once_by_eight_threads() -> None:
    asked: list[int] = []
    start = threading.Barrier(8)
    device = next(devices)

    def work() -> None:
        start.wait()
        call_on(device)

    _C.set_verify_hook(asked.append)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [device]


def test_error_of_hook_becomes_one_warning() -> None:
    def fail(device: int) -> None:
        raise RuntimeError(f"no room on {device}")

    _C.set_verify_hook(fail)
    device = next(devices)
    with pytest.warns(UserWarning, match=rf"GPU {device} could not be verified.*no room on {device}"):
        call_on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_on(device)


def test_interrupt_of_hook_propagates_and_asks_again() -> None:
    def stop(device: int) -> None:
        raise KeyboardInterrupt

    _C.set_verify_hook(stop)
    device = next(devices)
    with pytest.raises(KeyboardInterrupt):
        call_on(device)
    asked: list[int] = []
    _C.set_verify_hook(asked.append)
    call_on(device)
    assert asked == [device]


def test_cuda_families_have_no_float32() -> None:
    names = _C.cuda_families()
    assert all(name.startswith("cuda/") and not name.endswith("/float32") for name in names)
    # Either all or, without the library, none.
    assert len(names) in (0, 31)
    assert "cuda/wgmma/tf32" not in names


def test_families_of_calls_on_cpus_need_a_backend_that_runs_there() -> None:
    expected = [name for name in ("cuda", "triton") if _C.unsupported_reason(name) is None]
    names = _C.call_families("gathered_conv2d", SAMPLE.args)
    assert sorted({name.split("/")[0] for name in names}) == expected


def test_simulated_gpu_is_of_one_thread() -> None:
    with simulated_gpu():
        thread = threading.Thread(target=lambda: run(SAMPLE))
        thread.start()
        thread.join()
    assert all(" on H200" not in choice["case"] for choice in _C.choices())
    call_on(next(devices))
    assert any(choice["case"].endswith(" on H200") for choice in _C.choices())
    assert torch.equal(run(SAMPLE), run(SAMPLE))
