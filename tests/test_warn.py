"""Warnings of the C++ part: Python's own, in the caller's line, from every thread, and exceptions where asked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C, _warn
from bap_kernels.settings import settings
from bap_kernels.testing import Case, make_tensors, run


@pytest.fixture
def wrong_file(tmp_path: Path) -> Iterator[Path]:
    """Names a file that is no table of choices: whoever reads it first is warned."""
    path = tmp_path / "wrong.tsv"
    path.write_text("not a table\n")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    yield path
    _C.clear_choices()
    _C.set_choice_file(str(settings.choice_file or ""))


def ask() -> None:
    _C.choices()  # a binding that keeps Python's lock


def call_the_op() -> None:
    run(make_tensors(Case(1, 5, 4)))


def call_a_layer() -> None:
    bk.nn.GatheredConv2d(3, 4, 3)(torch.randn(1, 3, 6, 6))  # a binding that gives it up


def infer() -> None:
    with torch.inference_mode():
        call_a_layer()


def train_a_step() -> None:
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    bk.nn.GatheredConv2d(3, 4, 3)(x).sum().backward()


ACTIONS = (ask, call_the_op, call_a_layer, infer, train_a_step)


@pytest.mark.parametrize("action", ACTIONS)
def test_one_warning_in_the_callers_line(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
        action()
    (warning,) = [one for one in seen if str(wrong_file) in str(one.message)]
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert "another kind of file" in str(warning.message)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_filter_hides_it(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="bap_kernels: measured choices stay in memory")
        action()
    assert not [one for one in seen if str(wrong_file) in str(one.message)]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_filter_makes_it_the_error_of_the_call_and_the_next_call_works(
    action: Callable[[], None], wrong_file: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="another kind of file"):
            action()
        action()
    assert bk.info().choice_problem == "it is another kind of file"


@pytest.mark.parametrize("action", ACTIONS)
def test_threads_are_heard(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()
    assert len([one for one in seen if str(wrong_file) in str(one.message)]) == 1


def refuted_list(grad: torch.Tensor, reader: int) -> None:
    """A backward whose output gradient contradicts what is known of its readers."""
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    read = torch.tensor([True, False, True, True])
    torch.ops.bap_kernels.switched_conv2d_backward(
        grad, x, w, torch.ones(3), (1, 1), (0, 0, 0, 0), (1, 1), 1, True, (True,) * 4, read, reader
    )


def test_the_warning_of_the_backward_is_pythons_too() -> None:
    schema = torch.ops.bap_kernels.switched_conv2d_backward.default._schema
    names = [argument.name for argument in schema.arguments]
    if names[-2:] != ["read", "reader"]:
        pytest.skip(f"the op's arguments end in {names[-2:]}")
    with pytest.warns(UserWarning, match="got other values in channel 1") as seen:
        refuted_list(torch.ones(1, 4, 3, 3), 10**9 + 1)
    assert seen[0].filename != _warn.__file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="got other values in channel 1"):
            refuted_list(torch.ones(1, 4, 3, 3), 10**9 + 2)


def test_no_warning_of_ours_bypasses_python() -> None:
    # TORCH_WARN reaches Python only where a binding has installed torch's handler.
    root = Path(__file__).parents[1] / "csrc"
    users = {path.name for path in root.rglob("*.cpp") if "TORCH_WARN" in path.read_text()}
    assert users <= {"python_hooks.cpp"}
