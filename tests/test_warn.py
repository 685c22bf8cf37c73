"""Warnings of the C++ code: Python warnings at the caller's line, from every thread, and errors if so filtered."""

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
    """Set a choice file with foreign content, so that its first use warns."""
    path = tmp_path / "wrong.tsv"
    path.write_text("not a table\n")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    yield path
    _C.clear_choices()
    _C.set_choice_file(str(settings.choice_file or ""))


def list_choices() -> None:
    _C.choices()  # a binding that keeps the GIL


def call_the_op() -> None:
    run(make_tensors(Case(1, 5, 4)))


def call_a_layer() -> None:
    bk.nn.GatheredConv2d(3, 4, 3)(torch.randn(1, 3, 6, 6))  # a binding that releases the GIL


def infer() -> None:
    with torch.inference_mode():
        call_a_layer()


def train_a_step() -> None:
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    bk.nn.GatheredConv2d(3, 4, 3)(x).sum().backward()


ACTIONS = (list_choices, call_the_op, call_a_layer, infer, train_a_step)


@pytest.mark.parametrize("action", ACTIONS)
def test_action_warns_once_at_the_callers_line(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        action()
        action()
    (warning,) = [record for record in records if str(wrong_file) in str(record.message)]
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert "another kind of file" in str(warning.message)


@pytest.mark.parametrize("action", ACTIONS)
def test_ignore_filter_hides_the_warning(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="bap_kernels: measured choices stay in memory")
        action()
    assert not [record for record in records if str(wrong_file) in str(record.message)]


@pytest.mark.parametrize("action", ACTIONS)
def test_error_filter_raises_once_and_the_next_call_works(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="another kind of file"):
            action()
        action()
    assert bk.info().choice_problem == "it is another kind of file"


@pytest.mark.parametrize("action", ACTIONS)
def test_warning_of_another_thread_is_recorded(action: Callable[[], None], wrong_file: Path) -> None:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()
    assert len([record for record in records if str(wrong_file) in str(record.message)]) == 1


def backward_with_wrong_list(grad: torch.Tensor, reader: int) -> None:
    """Run a backward whose output gradient contradicts the list of consumed channels."""
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    read = torch.tensor([True, False, True, True])
    torch.ops.bap_kernels.switched_conv2d_backward(
        grad, x, w, torch.ones(3), (1, 1), (0, 0, 0, 0), (1, 1), 1, True, (True,) * 4, read, reader
    )


def test_backward_warning_is_a_python_warning() -> None:
    schema = torch.ops.bap_kernels.switched_conv2d_backward.default._schema
    names = [argument.name for argument in schema.arguments]
    if names[-2:] != ["read", "reader"]:
        pytest.skip(f"the op's arguments end in {names[-2:]}")
    with pytest.warns(UserWarning, match="got other values in channel 1") as records:
        backward_with_wrong_list(torch.ones(1, 4, 3, 3), 10**9 + 1)
    assert records[0].filename != _warn.__file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="got other values in channel 1"):
            backward_with_wrong_list(torch.ones(1, 4, 3, 3), 10**9 + 2)


def test_sources_do_not_use_torch_warn() -> None:
    # TORCH_WARN reaches Python only if a binding has installed torch's handler.
    root = Path(__file__).parents[1] / "csrc"
    users = {path.name for path in root.rglob("*.cpp") if "TORCH_WARN" in path.read_text()}
    assert users <= {"python_hooks.cpp"}
