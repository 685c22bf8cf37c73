"""Choices of `auto` on a simulated GPU: real candidates with a simulated clock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, Sample, assert_close, make_tensors, poison, run
from tests.simulated_gpu import choose_as_on_gpu

pytestmark = pytest.mark.usefixtures("own_choice_table", "no_verifier")

CASE = Case(2, 20, 18, (6, 7), seed=1)
TIMES = {"gather": 3e-4, "gather_flat": 3e-4, "masked": 3e-4, "cuda": 3e-4, "triton": 3e-4}


def clock(**times: float) -> Callable[[str], float]:
    return lambda route: (TIMES | times)[route]


def chosen(sample: Sample, seconds: Callable[[str], float], name: str = "H200", **options) -> str:
    route, y = choose_as_on_gpu(*sample.args, name=name, seconds=seconds, **options)
    assert_close(y, reference.gathered_conv2d(*sample.args), sample.input.dtype, sample.depth)
    return route


def refusing(route: str) -> float:
    raise AssertionError(f"{route} was measured")


def candidates() -> set[str]:
    (choice,) = _C.choices()
    return set(choice["candidates"])


@pytest.mark.parametrize("run", range(4))
@pytest.mark.parametrize("fastest", ["gather", "masked"])
def test_one_pause_does_not_rule_out_the_fastest(fastest: str, run: int) -> None:
    runs: list[str] = []

    def paused(route: str) -> float:
        runs.append(route)
        pause = route == fastest and runs.count(route) == run + 1
        return clock(**{fastest: 1e-4})(route) + 0.04 * pause

    assert chosen(make_tensors(CASE), paused) == fastest


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_candidates_depend_on_layout(layout: str) -> None:
    compact = {"gather", "gather_flat"} if layout == "channels_last" else {"gather"}
    chosen(make_tensors(CASE.but(layout=layout)), clock())
    assert candidates() == compact | {"masked"}
    _C.clear_choices()
    # Without a list there is one candidate, and nothing is measured.
    for change in ({"in_list": "null"}, {"depthwise": True, "layout": "contiguous"}):
        assert chosen(make_tensors(CASE.but(layout=layout).but(**change)), refusing) == "gather"


@pytest.mark.parametrize("fastest", ["gather", "gather_flat", "masked"])
def test_fastest_candidate_is_chosen_once(fastest: str) -> None:
    sample = make_tensors(CASE.but(layout="channels_last"))
    assert chosen(sample, clock(**{fastest: 1e-4})) == fastest
    assert chosen(sample, refusing) == fastest
    (choice,) = _C.choices()
    assert choice["backend"] == fastest
    assert choice["candidates"][fastest] == pytest.approx(100)
    assert choice["case"].endswith(" on H200")


def test_tie_within_noise_chooses_first_candidate() -> None:
    sample = make_tensors(CASE)
    assert chosen(sample, clock(masked=0.98 * TIMES["gather"])) == "gather"
    assert chosen(sample, clock(masked=0.9 * TIMES["gather"]), "another") == "masked"


def test_choices_are_per_device(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    sample = make_tensors(CASE)
    assert chosen(sample, clock(masked=1e-4), "A100") == "masked"
    assert chosen(sample, clock(gather=1e-4), "H200") == "gather"
    run(sample)
    assert len(_C.choices()) == 3
    assert chosen(sample, refusing, "A100") == "masked"
    # As in another process.
    _C.set_choice_file("")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    assert chosen(sample, refusing, "A100") == "masked"
    assert chosen(sample, refusing, "H200") == "gather"
    run(sample)
    assert len(_C.choices()) == 3


def test_capture_does_not_measure() -> None:
    sample = make_tensors(CASE)
    assert chosen(sample, refusing, capturing=True) == "gather"
    assert _C.choices() == []
    assert chosen(sample, clock(masked=1e-4)) == "masked"
    assert chosen(sample, refusing, capturing=True) == "masked"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_masked_candidate_ignores_unlisted_channels(layout: str, dtype: torch.dtype, value: float) -> None:
    for change in ({}, {"kernel": (1, 1), "padding": (0,) * 4}, {"padding": (2, 0, 1, 0), "stride": (2, 1)}):
        case = CASE.but(layout=layout, dtype=dtype, out_list="odd", **change)
        expected = reference.gathered_conv2d(*make_tensors(case).args)
        sample = poison(make_tensors(case), value)
        route, y = choose_as_on_gpu(*sample.args, name="H200", seconds=clock(masked=1e-4))
        assert route == "masked"
        assert_close(y, expected, dtype, sample.depth)


class Machine:
    """A simulated GPU whose candidates take prescribed times."""

    def __init__(self, name: str = "H200", **times: float) -> None:
        # Starts now, because `choices()` computes ages by the real clock.
        self.name, self.times, self.now = name, TIMES | times, time.time()
        self.runs: list[str] = []
        self.measuring = 0.0
        self.sample = make_tensors(CASE)

    def seconds(self, route: str) -> float:
        self.runs.append(route)
        self.measuring += self.times[route]
        self.now += self.times[route]
        return self.times[route]

    def call(self, count: int = 1, **options) -> str:
        route = ""
        for _ in range(count):
            route, _ = choose_as_on_gpu(
                *self.sample.args, name=self.name, seconds=self.seconds, now=lambda: self.now, **options
            )
            self.now += self.times[route]
        return route

    def calls_until(self, measured: int, most: int) -> int:
        """Call, an hour apart, until so many measurements were made."""
        for count in range(1, most + 1):
            self.now += 3600
            self.call()
            if self.choice()["measurements"] >= measured:
                return count
        return most + 1

    def choice(self) -> dict:
        (choice,) = [one for one in _C.choices() if one["case"].endswith(f" on {self.name}")]
        return choice


def test_disturbed_choice_is_corrected_later() -> None:
    machine = Machine(gather=6e-4)
    assert machine.call() == "masked"
    assert machine.choice()["measurements"] == 1
    assert not machine.choice()["settled"]
    machine.times["gather"] = 1e-4
    # Not within the same minute, regardless of the number of calls.
    calls_in_it = int(50 / machine.times["masked"])
    assert machine.call(min(calls_in_it, 300)) == "masked"
    assert machine.choice()["measurements"] == 1
    assert machine.calls_until(2, 1000) < 1000
    assert machine.call() == "gather"
    # Two measurements disagree: it continues until two in a row agree.
    assert not machine.choice()["settled"]
    assert machine.calls_until(3, 10000) < 10000
    assert machine.call() == "gather"
    assert machine.choice()["settled"] == (machine.choice()["confidence"] > 0.75)


def test_clear_choice_is_final_after_second_measurement() -> None:
    machine = Machine(gather=1e-4)
    machine.call()
    assert machine.choice()["confidence"] == pytest.approx(0.9)  # eight rounds of eight
    assert machine.choice()["margin"] == pytest.approx(3)
    assert machine.calls_until(2, 1000) < 1000
    assert machine.choice()["settled"]
    runs = len(machine.runs)
    assert machine.calls_until(3, 3) == 4
    machine.now -= 3600 * 4
    machine.call(500)
    assert len(machine.runs) == runs


def test_final_choice_is_measured_again_after_a_month(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    machine = Machine(gather=1e-4)
    machine.call()
    assert machine.calls_until(2, 1000) < 1000
    machine.times["gather"] = 9e-4

    def in_a_later_process(days: int) -> int:
        _C.clear_choices()
        _C.set_choice_file(str(path))
        machine.now += days * 86400
        machine.call(40)
        return machine.choice()["measurements"]

    assert in_a_later_process(29) == 2
    assert in_a_later_process(2) == 3


def test_open_choice_is_measured_again_by_later_process(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    machine = Machine(gather=6e-4)
    assert machine.call() == "masked"
    machine.times["gather"] = 1e-4
    for age, expected, count in ((30, "masked", 1), (100, "gather", 2)):
        _C.clear_choices()
        _C.set_choice_file(str(path))
        machine.now += age
        machine.call(2)
        assert machine.call() == expected
        assert machine.choice()["measurements"] == count
    assert len(path.read_text().splitlines()) == 3


def test_repeated_measurements_take_at_most_two_percent() -> None:
    machine = Machine(gather=0.02, masked=0.0201)
    machine.call()
    first = machine.measuring
    for calls in range(1, 1500):
        machine.now += 3600
        machine.call()
        assert machine.measuring - first <= 0.01 + 0.02 * (calls + 1) * 0.02 + 1e-9
    # Close: measured until four agreed.
    assert machine.measuring > first
    assert machine.choice()["measurements"] >= 2


def test_close_choice_becomes_final() -> None:
    machine = Machine(gather=1e-4, masked=0.99e-4)
    machine.call()
    assert machine.choice()["confidence"] < 0.2  # slower in all rounds, but within noise
    assert machine.calls_until(4, 5000) < 5000
    assert machine.choice()["settled"]
    assert machine.call() == "gather"


def test_unstable_choice_becomes_final() -> None:
    machine = Machine(masked=1e-4)
    machine.call()
    for count in range(2, 9):
        machine.times = TIMES | {("gather", "masked")[count % 2]: 1e-4 / 1.5**count}
        assert machine.calls_until(count, 20000) < 20000
    assert machine.choice()["settled"]


@pytest.mark.parametrize("first_run_tells", [False, True])
def test_large_case_is_measured_within_time_limit(first_run_tells: bool) -> None:
    machine = Machine(gather=0.42, masked=1.8)
    assert machine.call(first_run_tells=first_run_tells) == "gather"
    # One run of each candidate; a second one only if the first is inconclusive.
    assert sorted(machine.runs) == ["gather", "masked"] * 1 if first_run_tells else ["gather"] * 2 + ["masked"] * 2
    close = Machine("close", gather=0.42, masked=0.4)
    assert close.call(first_run_tells=first_run_tells) == "masked"
    assert sorted(close.runs) == ["gather"] * 2 + ["masked"] * 2
    middle = Machine("middle", gather=0.02, masked=0.021)
    middle.call(first_run_tells=first_run_tells)
    assert middle.measuring <= 2.5 * 0.1 + 0.041 + 1e-9


def test_many_cases_get_less_time_each() -> None:
    machine = Machine(gather=2e-3, masked=2.2e-3)
    rounds = []
    for width in range(5, 5 + 260):
        machine.sample = make_tensors(Case(1, 4, 4, (3, width), seed=1))
        machine.runs.clear()
        machine.call()
        rounds.append(len(machine.runs) // 2)
    assert rounds[0] > 20
    assert 8 <= rounds[-1] < 16


def test_candidate_with_error_is_skipped() -> None:
    for error in (RuntimeError("no kernel"), MemoryError(), torch.OutOfMemoryError("no memory"), ValueError("no")):

        def seconds(route: str, error: Exception = error) -> float:
            if route == "gather":
                raise error
            return 1e-3

        _C.clear_choices()
        assert chosen(make_tensors(CASE), seconds) == "masked"
        assert candidates() == {"masked"}


def test_candidate_with_error_during_measurement_is_skipped() -> None:
    runs = []

    def seconds(route: str) -> float:
        runs.append(route)
        if runs.count("masked") == 3:
            raise RuntimeError("no memory any more")
        return 1e-3

    assert chosen(make_tensors(CASE), seconds) == "gather"
    assert candidates() == {"gather"}


def test_first_error_is_raised_if_all_candidates_fail() -> None:
    def seconds(route: str) -> float:
        raise RuntimeError(f"{route} fails")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="gather fails"):
            choose_as_on_gpu(*make_tensors(CASE).args, name="H200", seconds=seconds)
    assert _C.choices() == []
    assert chosen(make_tensors(CASE), clock(masked=1e-4)) == "masked"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_exit_exceptions_propagate_and_leave_no_choice(stop: type[BaseException], at: int) -> None:
    runs = []

    def seconds(route: str) -> float:
        runs.append(route)
        if len(runs) == at:
            raise stop
        return 1e-3

    with pytest.raises(stop):
        choose_as_on_gpu(*make_tensors(CASE).args, name="H200", seconds=seconds)
    assert _C.choices() == []
    assert chosen(make_tensors(CASE), clock(masked=1e-4)) == "masked"


CTRL_C = """
import ctypes, functools, signal, torch
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors
from tests.simulated_gpu import choose_as_on_gpu
torch.set_num_threads(1)
# Shells have jobs in the background ignore it, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
# From C, so that Python does not see it before the next run.
press = ctypes.PyDLL(None)["raise"]
sample = make_tensors(Case(8, 128, 64, (112, 112), dtype=torch.float64))
try:
    choose_as_on_gpu(*sample.args, name="H200", seconds=functools.partial(press, signal.SIGINT))
except KeyboardInterrupt:
    print("heard", _C.choices())
"""


def test_keyboard_interrupt_stops_measurement() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CTRL_C],
        env=os.environ | {"BAP_KERNELS_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.stdout.strip() == "heard []", process.stderr
    assert process.returncode == 0


def test_other_threads_run_during_measurement() -> None:
    sample = make_tensors(CASE)
    inside, done = threading.Event(), threading.Event()

    def seconds(route: str) -> float:
        inside.set()
        assert done.wait(60)
        return {"gather": 3e-4}.get(route, 1e-4)

    thread = threading.Thread(target=lambda: chosen(sample, seconds))
    thread.start()
    assert inside.wait(60)
    assert chosen(sample, refusing) == "gather"
    assert _C.choices() == []
    done.set()
    thread.join()
    assert chosen(sample, refusing) == "masked"
