"""`auto` on a simulated GPU, for all ops: which candidates it weighs, and when."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
from tests.dispatch.simulated_ops import (
    DY,
    FAMILIES,
    GEOMETRY,
    IN,
    OPS,
    OUT,
    SWITCH,
    B,
    Gpu,
    Op,
    W,
    X,
    aten_result,
    ops,
    reload,
    single,
)
from tests.simulated_gpu import simulated_gpu

pytestmark = pytest.mark.usefixtures("own_choice_table", "no_verifier")


@pytest.mark.parametrize("fast", ["cuda", "triton"])
def test_verified_backend_is_taken_where_faster(op: Op, fast: str, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times[fast] = 1e-4
    assert gpu.call(op) == [fast]
    assert gpu.candidates() == {*op.aten, "cuda", "triton"}
    gpu.measured.clear()
    assert gpu.call(op) == [fast]
    assert gpu.measured == []


def test_verified_backend_is_not_taken_where_slower(op: Op, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times |= {"cuda": 4e-4, "triton": 4e-4}
    assert gpu.call(op) == [op.aten[0]]


@pytest.mark.parametrize("verdict", ["wrong", "crash", "hang", "unknown", "missing", "one of two"])
def test_unverified_backend_is_never_run(op: Op, verdict: str, gpu: Gpu) -> None:
    gpu.times |= {"cuda": 1e-5, "triton": 1e-5}
    if verdict == "missing":
        _C.set_verdicts(gpu.number, {})
    elif verdict == "one of two":
        gpu.verdicts(nhwc="wrong", triton="wrong")
    else:
        gpu.verdicts(cuda=verdict, triton=verdict)
    assert gpu.call(op) == [op.aten[0]]
    assert not {"cuda", "triton"} & set(gpu.measured)


def test_verdicts_of_another_device_do_not_count(op: Op, gpu: Gpu) -> None:
    Gpu().verdicts()
    gpu.times |= {"cuda": 1e-5, "triton": 1e-5}
    assert gpu.call(op) == [op.aten[0]]


def test_verdicts_of_another_math_mode_do_not_count(gpu: Gpu) -> None:
    # The choice of one setting must not hold for the other.
    gpu.verdicts()
    gpu.times["cuda"] = 1e-5
    assert gpu.call(OPS["forward"]) == ["cuda"]
    torch.backends.cudnn.allow_tf32 = False
    assert gpu.call(OPS["forward"]) == ["gather"]
    torch.backends.cudnn.allow_tf32 = True
    assert gpu.call(OPS["forward"]) == ["cuda"]


@pytest.mark.parametrize("other_process", [False, True])
def test_newly_verified_backend_is_measured_at_the_next_call(
    op: Op, other_process: bool, gpu: Gpu, tmp_path: Path
) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    gpu.verdicts(cuda="unknown", triton="unknown")
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}
    assert gpu.call(op) == [op.aten[0]]
    for verdicts, expected in (({"cuda": "unknown"}, "triton"), ({}, "cuda")):
        if other_process:
            reload(path)
        gpu.verdicts(**verdicts)
        gpu.measured.clear()
        assert gpu.call(op) == [expected]
        assert {expected, op.aten[0]} <= set(gpu.measured)
        gpu.measured.clear()
        assert gpu.call(op) == [expected]
        assert gpu.measured == []


def test_settled_choice_does_not_hide_new_candidates(gpu: Gpu, tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    now = itertools.count(1_800_000_000.0, 3600.0)
    gpu.verdicts(cuda="unknown", triton="unknown")
    gpu.times["gather"] = 2e-4
    while not (_C.choices() and _C.choices()[0]["settled"] and _C.choices()[0]["measurements"] > 1):
        gpu.call(OPS["forward"], now=lambda: next(now))
    reload(path)
    gpu.verdicts(triton="unknown")
    gpu.times["cuda"] = 1e-4
    assert gpu.call(OPS["forward"], now=lambda: next(now)) == ["cuda"]


def test_choice_stops_at_once_where_the_verdict_changes(op: Op, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}
    assert gpu.call(op) == ["cuda"]
    gpu.verdicts(nhwc="wrong")
    assert gpu.call(op, capturing=True) == ["triton"]
    assert gpu.call(op) == ["triton"]
    gpu.verdicts(cuda="wrong", triton="hang")
    assert gpu.call(op) == [op.aten[0]]
    gpu.verdicts()
    assert gpu.call(op) == ["cuda"]


def test_nothing_is_measured_during_capture(op: Op, gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4
    assert gpu.call(op, capturing=True) == [op.aten[0]]
    assert gpu.measured == []
    assert _C.choices() == []
    assert gpu.call(op) == ["cuda"]
    gpu.measured.clear()
    assert gpu.call(op, capturing=True) == ["cuda"]
    # A newly verified candidate waits for the end of the capture.
    gpu.verdicts()
    assert gpu.call(op, capturing=True) == ["cuda"]
    assert gpu.measured == []


def test_verifier_is_asked_by_the_first_call_of_any_op(op: Op, gpu: Gpu) -> None:
    asked: list[int] = []
    _C.set_verify_hook(asked.append)
    gpu.call(op, capturing=True)
    assert asked == []
    gpu.call(op)
    gpu.call(op)
    assert asked == [gpu.number]


def test_verdicts_that_the_verifier_sets_hold_for_the_same_call(op: Op, gpu: Gpu) -> None:
    # As with BAP_KERNELS_VERIFY=block.
    gpu.times["cuda"] = 1e-4
    _C.set_verify_hook(lambda number: gpu.verdicts())
    assert gpu.call(op) == ["cuda"]


def test_named_backend_asks_for_no_verdict(gpu: Gpu) -> None:
    asked: list[int] = []
    _C.set_verify_hook(asked.append)
    with bk.use_backend("aten"):
        gpu.call(OPS["forward"])
    assert asked == []


def test_eight_threads_while_verdicts_change(op: Op, gpu: Gpu) -> None:
    gpu.times |= {"cuda": 1e-4, "triton": 2e-4}
    expected = aten_result(op)
    errors: list[BaseException] = []
    start = threading.Barrier(9)

    def work() -> None:
        start.wait()
        try:
            with simulated_gpu(seconds=gpu.times.__getitem__, number=gpu.number, families=FAMILIES):
                for _ in range(40):
                    for got, wanted in zip(op.call(), expected, strict=True):
                        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    for verdicts in ({}, {"cuda": "wrong"}, {"cuda": "wrong", "triton": "hang"}, {}) * 5:
        gpu.verdicts(**verdicts)
    for thread in threads:
        thread.join()
    assert errors == []
    assert gpu.call(op) == ["cuda"]


def test_training_chooses_for_each_op(gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with simulated_gpu(seconds=gpu.seconds, number=gpu.number, families=FAMILIES) as ran:
        ops.gathered_conv2d(x, w, None, IN, OUT, *GEOMETRY, 1).backward(DY[:, :3])
        ops.switched_conv2d(x, w, None, SWITCH, *GEOMETRY, 1).backward(DY)
    assert ran == ["cuda"] * 4
    cases = sorted(choice["case"].split(" Float")[0] for choice in _C.choices())
    assert [case for case in cases if " " not in case] == ["backward", "switched"]
    assert "switched backward" in cases


def test_mixed_batches_of_like_sizes_are_one_case(gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.times["cuda"] = 1e-4
    x = torch.randn(8, 12, 7, 6)

    def of(*counts: int) -> Op:
        lists = [IN, None, IN][: len(counts)]
        return Op(
            lambda: single(ops._gathered_conv2d_mixed(x[: sum(counts)], W, B, lists, counts, *GEOMETRY)), ("gather",)
        )

    for counts in ((2, 3), (4, 4), (1, 7)):
        gpu.call(of(*counts))
        assert len(_C.choices()) == 1
    gpu.call(of(2, 1, 2))
    gpu.call(of(1, 1))
    assert len(_C.choices()) == 3


def test_cases_name_the_kernels_and_the_device(gpu: Gpu) -> None:
    gpu.verdicts()
    gpu.call(OPS["forward"], name="H200, driver 1")
    gpu.call(OPS["forward"], name="H200, driver 2")
    assert [choice["case"].split(" g1 ")[1] for choice in _C.choices()] == [
        f"bias tf32 via nhwc+pack on H200, driver {n}" for n in (1, 2)
    ]


def test_explain_says_why_a_backend_is_left_out(gpu: Gpu) -> None:
    args = (X, W, B, IN, OUT, *GEOMETRY, 1)
    with simulated_gpu(number=gpu.number, families=FAMILIES):
        assert _C.explain(*args)["unsupported"]["cuda"] == "cuda/nhwc/tf32 is not verified on this GPU"
        gpu.verdicts(pack="wrong", triton="hang")
        reasons = _C.explain(*args)["unsupported"]
        assert reasons["cuda"] == "cuda/pack/tf32: wrong, a reason"
        assert reasons["triton"] == "triton/forward/tf32: hang, a reason"
        gpu.verdicts()
        assert _C.explain(*args)["unsupported"]["cuda"] == ""


def test_new_candidate_of_a_cpu_is_measured(tmp_path: Path) -> None:
    # As where a later version has a way of computing that the one which wrote the file had not.
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    sample = make_tensors(Case(2, 20, 18, (6, 7), seed=1))
    run(sample)
    head, line = path.read_text().splitlines()
    machine, case, _, times, _, when = line.split("\t")
    known = " ".join(time for time in times.split() if time.split("=")[0] != "dense")
    fields = [machine, case, "gather", known, "4 4 32 32", when]
    path.write_text("\n".join([head, "\t".join(fields), ""]))
    reload(path)
    run(sample)
    (choice,) = _C.choices()
    assert "dense" in choice["candidates"]
    assert choice["measurements"] == 1
