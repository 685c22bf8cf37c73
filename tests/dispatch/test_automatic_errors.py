"""`auto` on a simulated GPU, for all ops: the next best candidate computes where one raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bap_kernels import _C
from tests.dispatch.simulated_ops import (
    OPS,
    Gpu,
    Op,
    reload,
)

ERRORS = (
    RuntimeError("no kernel"),
    torch.OutOfMemoryError("no memory"),
    NotImplementedError("not this shape"),
    MemoryError(),
    ValueError("out of resources"),
)


def cuda_raises(error: BaseException | type[BaseException]) -> Callable[[str], None]:
    """What fails where the candidate `cuda` runs."""

    def fail(name: str) -> None:
        if name == "cuda":
            raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 3])
def test_errors_of_measured_candidates_do_not_reach_the_user(op: Op, error: Exception, at: int, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}

    def fail(name: str) -> None:
        if name == "cuda" and gpu.measured.count("cuda") == at:
            raise error

    gpu.fails = fail
    assert gpu.call(op) == ["triton"]
    assert gpu.candidates() == {*op.aten, "triton"}
    # It is not tried again.
    gpu.fails = lambda name: None
    gpu.measured.clear()
    assert gpu.call(op) == ["triton"]
    assert gpu.measured == []


def test_all_candidates_that_fail_beside_copies_leave_the_first(op: Op, gpu: Gpu) -> None:
    # As where the copies of the input take the memory: the call itself may have enough.
    gpu.verdicts()
    first = {*op.aten, "cuda", "triton"}

    def fail(name: str) -> None:
        if name not in first:
            raise torch.OutOfMemoryError("no memory")
        first.discard(name)

    gpu.fails = fail
    assert gpu.call(op) == [op.aten[0]]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_the_chosen_candidate_do_not_reach_the_user(op: Op, error: Exception, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}
    assert gpu.call(op) == ["cuda"]

    gpu.chosen_fails = cuda_raises(error)
    assert gpu.call(op) == ["cuda", "triton"]
    assert gpu.call(op) == ["triton"]
    (choice,) = _C.choices()
    assert choice["backend"] == "triton"
    # What fails is forgotten with the choices.
    _C.clear_choices()
    gpu.chosen_fails = lambda name: None
    assert gpu.call(op) == ["cuda"]


def test_several_chosen_candidates_may_fail(op: Op, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}
    gpu.call(op)

    def fail(name: str) -> None:
        if name in ("cuda", "triton"):
            raise RuntimeError(name)

    gpu.chosen_fails = fail
    assert gpu.call(op) == ["cuda", "triton", op.aten[0]]
    assert gpu.call(op) == [op.aten[0]]


def test_nothing_is_declined_where_all_fail(op: Op, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4
    gpu.call(op)

    def fail(name: str) -> None:
        raise torch.OutOfMemoryError(f"no memory for {name}")

    gpu.chosen_fails = fail
    with pytest.raises(torch.OutOfMemoryError, match=f"no memory for {op.aten[0]}"):
        gpu.call(op)
    gpu.chosen_fails = lambda name: None
    assert gpu.call(op) == ["cuda"]


def test_declined_candidate_is_tried_by_a_later_process(gpu: Gpu, tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4
    gpu.call(OPS["forward"])

    gpu.chosen_fails = cuda_raises(RuntimeError("no memory"))
    assert gpu.call(OPS["forward"])[-1] == "gather"
    reload(path)
    gpu.chosen_fails = lambda name: None
    assert gpu.call(OPS["forward"]) == ["cuda"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_reach_the_user(op: Op, stop: type[BaseException], gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4

    gpu.fails = cuda_raises(stop)
    with pytest.raises(stop):
        gpu.call(op)
    gpu.fails = lambda name: None
    assert gpu.call(op) == ["cuda"]
    gpu.chosen_fails = cuda_raises(stop)
    with pytest.raises(stop):
        gpu.call(op)
    gpu.chosen_fails = lambda name: None
    assert gpu.call(op) == ["cuda"]


def test_failed_candidate_is_no_new_one(gpu: Gpu, tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    gpu.verdicts(triton="unknown")

    gpu.fails = cuda_raises(RuntimeError("no kernel"))
    gpu.call(OPS["forward"])
    reload(path)
    gpu.measured.clear()
    assert gpu.call(OPS["forward"]) == ["gather"]
    assert gpu.measured == []
