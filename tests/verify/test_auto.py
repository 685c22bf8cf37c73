"""From the first call of ``auto`` on a simulated GPU to the choice: what a child has judged is what is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from bap_kernels import _C
from bap_kernels.settings import settings
from bap_kernels.testing import Case, make_tensors, run
from bap_kernels.verify import trigger
from bap_kernels.verify.subject import Subject
from tests.simulated_gpu import devices, simulated_gpu
from tests.verify.conftest import subject

FAMILIES = {"cuda": ["cuda/pack/tf32", "cuda/nhwc/tf32"], "triton": ["triton/forward/tf32"]}
NAMES = tuple(name for names in FAMILIES.values() for name in names)
TIMES = {"gather": 3e-4, "gather_flat": 3e-4, "masked": 3e-4, "cuda": 2e-4, "triton": 1e-4}


@pytest.fixture
def gpu() -> Iterator[int]:
    """The number of a simulated GPU that no call has met."""
    number, tf32 = next(devices), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    _C.set_choice_file("")
    _C.clear_choices()
    yield number
    torch.backends.cudnn.allow_tf32 = tf32
    _C.set_verdicts(number, {})
    _C.set_verify_hook(trigger.first_use)
    _C.clear_choices()
    _C.set_choice_file(str(settings.choice_file or ""))


def call(number: int, behaviours: dict[str, str], monkeypatch: pytest.MonkeyPatch, capturing: bool = False) -> str:
    """The candidate that computes a call, on a GPU whose families behave as named or rightly."""
    monkeypatch.setenv("TEST_VERIFY_BEHAVIOURS", json.dumps({name: behaviours.get(name, "right") for name in NAMES}))
    base = subject(**{"behaviours": json.dumps(behaviours)})
    device = Subject(number, base.facts, NAMES, base.environment, base.device, base.checks)
    _C.set_verify_hook(lambda index: trigger.first_use(index, lambda _: device))
    sample = make_tensors(Case(2, 20, 18, (6, 7), seed=1))
    with simulated_gpu("H200", TIMES.__getitem__, capturing=capturing, number=number, families=FAMILIES) as ran:
        run(sample)
        thread = trigger._threads.pop(number, None)
        if thread is not None:
            # The first call did not wait.
            assert ran == ["gather"]
            thread.join()
        run(sample)
    return ran[-1]


def test_verified_kernels_are_taken(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(gpu, {}, monkeypatch) == "triton"


@pytest.mark.parametrize("behaviour", ["wrong", "no_memory"])
def test_family_that_fails_is_never_taken(behaviour: str, gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One of two families that a call needs is enough.
    assert call(gpu, {"triton/forward/tf32": behaviour, "cuda/pack/tf32": behaviour}, monkeypatch) == "gather"


def test_other_backend_is_taken_in_place_of_one_that_fails(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(gpu, {"triton/forward/tf32": "crash"}, monkeypatch) == "cuda"


def test_nothing_starts_in_a_capture(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(gpu, {}, monkeypatch, capturing=True) == "gather"
    assert _C.verdicts(gpu) == {}
