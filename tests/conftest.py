"""Seeds, threads, markers and a fresh cache folder for every run; a fixture that fills new tensors with NaN."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# Set before bap_kernels is imported, so that measured choices of another run do not decide what is tested.
_CACHE = tempfile.TemporaryDirectory(prefix="bap_kernels_test_")
os.environ["BAP_KERNELS_CACHE_DIR"] = _CACHE.name
# Nothing is verified beside the tests of a machine that has a GPU.
os.environ["BAP_KERNELS_VERIFY"] = "0"
# Nor the machine's mood: tolerances are those of direct convolutions, and tests of Winograd convolutions ask for them.
os.environ.setdefault("BAP_KERNELS_WINOGRAD", "0")

import pytest  # noqa: E402
import torch  # noqa: E402

from bap_kernels import _C  # noqa: E402

_EMULATED = ("avx512_emulated", "neon_emulated") if "avx2" in _C.isa_available() else ()


def pytest_configure() -> None:
    # Small cases are slower on many threads. Tests of threads set their own number.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_large = pytest.mark.skip(reason="large test: set BAP_KERNELS_TEST_LARGE=1 to run it")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("large") and os.environ.get("BAP_KERNELS_TEST_LARGE") != "1":
            item.add_marker(no_large)


@pytest.fixture(params=[name for name in (*_C.isa_available(), *_EMULATED) if name != "none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that native kernels have here, emulated ones too."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def own_choice_table() -> Iterator[None]:
    """An empty table of measured choices without a file, for one test."""
    from bap_kernels.settings import settings

    _C.set_choice_file("")
    _C.clear_choices()
    yield
    _C.clear_choices()
    _C.set_choice_file(str(settings.choice_file or ""))


@pytest.fixture
def no_verifier() -> Iterator[None]:
    """Calls on a simulated GPU start no verifier, for one test."""
    from bap_kernels.verify.trigger import first_use

    _C.set_verify_hook(None)
    yield
    _C.set_verify_hook(first_use)


@pytest.fixture
def aten() -> Iterator[None]:
    """The backend aten for one test: `auto` may take another from a second call on, whose rounding differs."""
    import bap_kernels as bk

    with bk.use_backend("aten"):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("aten", "native", "auto"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for CPU tensors."""
    reason = _C.unsupported_reason(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Every ``empty`` of a floating dtype, in C++ too, is NaN while the test runs."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
