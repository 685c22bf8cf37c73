"""Facts, settings, and errors of the loader."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _load, dispatch, settings

ROOT = Path(__file__).parents[1]


def test_public_names_are_there() -> None:
    for module in (bk, bk.nn, dispatch, settings):
        for name in module.__all__:
            assert hasattr(module, name), name


def test_info_states_the_facts() -> None:
    facts = bk.info()
    assert facts.versions["torch"] == torch.__version__
    assert facts.versions["bap_kernels"] == bk.__version__
    assert facts.isa in (*facts.isa_available, "none")
    assert list(facts.backends) == ["native", "aten", "triton", "cuda"]
    assert facts.backends["aten"] is None
    assert facts.backend == "auto"
    with bk.use_backend("aten"):
        assert bk.info().backend == "aten"
    assert facts.packed_cache.keys() >= {"bytes", "entries", "limit_bytes", "hits", "misses", "evictions"}
    assert facts.choice_file == settings.settings.choice_file
    assert facts.cpu
    assert re.search(rf"^cpu +{re.escape(facts.cpu)}$", str(facts), re.MULTILINE)


def test_info_names_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAP_KERNELS_BACKEND", "aten")
    assert bk.info().environment["BAP_KERNELS_BACKEND"] == "aten"
    monkeypatch.delenv("BAP_KERNELS_BACKEND")
    assert "BAP_KERNELS_BACKEND" not in bk.info().environment


def test_info_counts_the_choice_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "choices-v5.tsv").write_bytes(b"12345")
    monkeypatch.setattr(settings, "settings", dataclasses.replace(settings.settings, cache_dir=tmp_path))
    assert bk.info().choice_bytes == 5
    assert str(tmp_path / "choices-v5.tsv") in str(bk.info())
    monkeypatch.setattr(settings, "settings", dataclasses.replace(settings.settings, cache_dir=None))
    assert bk.info().choice_file is None
    assert bk.info().choice_bytes == 0


def test_info_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_module("bap_kernels.info", run_name="__main__", alter_sys=True)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    assert any(line.split() == ["aten", "can", "run"] for line in lines)
    # The command and a plain import leave the function in its place.
    importlib.import_module("bap_kernels.info")
    assert callable(bk.info)


def test_use_backend_nests_and_restores_after_errors() -> None:
    with bk.use_backend("aten") as outer:
        assert repr(outer) == "use_backend('aten')"
        with pytest.raises(KeyError, match="auto"), bk.use_backend("auto"):
            raise KeyError(bk.info().backend)
        assert bk.info().backend == "aten"
    assert bk.info().backend == "auto"


def test_use_backend_as_a_setter() -> None:
    bk.use_backend("aten")
    try:
        assert bk.info().backend == "aten"
    finally:
        bk.use_backend("auto")
    assert bk.info().backend == "auto"


def test_use_backend_refuses() -> None:
    with pytest.raises(ValueError, match=r"`name` to be one of auto, native, aten, triton, cuda, got 'mkl'"):
        bk.use_backend("mkl")
    missing = [name for name, reason in bk.info().backends.items() if reason is not None]
    for name in missing:
        with pytest.raises(
            ImportError, match=rf"to be a backend that can run here, got '{name}': .*Hint: bap_kernels.info"
        ):
            bk.use_backend(name)
    assert bk.info().backend == "auto"


def test_environment_defaults() -> None:
    defaults = settings.read_environment({})
    assert defaults == settings.Settings(None, "auto", Path.home() / ".cache" / "bap_kernels", 2**30)
    assert settings.read_environment({"BAP_KERNELS_BACKEND": "", "BAP_KERNELS_ISA": " "}) == defaults


def test_environment_values() -> None:
    found = settings.read_environment(
        {
            "BAP_KERNELS_ISA": "AVX2",
            "BAP_KERNELS_BACKEND": " aten ",
            "BAP_KERNELS_CACHE_DIR": "/somewhere",
            "BAP_KERNELS_PACKED_CACHE_BYTES": "0",
        }
    )
    assert found == settings.Settings("avx2", "aten", Path("/somewhere"), 0)
    assert found.choice_file == Path("/somewhere/choices-v5.tsv")
    assert settings.read_environment({"BAP_KERNELS_CACHE_DIR": ""}).choice_file is None


@pytest.mark.parametrize("text", ["~/x", "~nosuch/x", "~nosuch"])
def test_a_cache_folder_without_a_home_is_none_and_says_why(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: object) -> None:
        raise KeyError(name)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", missing)
    monkeypatch.setattr("pwd.getpwnam", missing)
    found = settings.read_environment({"BAP_KERNELS_CACHE_DIR": text})
    assert (found.cache_dir, found.choice_file) == (None, None)
    assert found.cache_problem == f"`{text}` has no home folder in front"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BAP_KERNELS_ISA", "sse", f"to be one of {', '.join(settings.ISAS)}, got 'sse'"),
        ("BAP_KERNELS_BACKEND", "fast", "to be one of auto, native, aten, triton, cuda, got 'fast'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "-1", "to be a number of bytes, .* got '-1'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "1GiB", "to be a number of bytes, .* got '1GiB'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "nan", "to be a number of bytes, .* got 'nan'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "1e9", "to be a number of bytes, .* got '1e9'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", str(2**63), f"to be a number of bytes, .* got '{2**63}'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "9" * 5000, "to be a number of bytes, .* got '999"),
        *(
            ("BAP_KERNELS_SIMULATED_PROCESSORS", value, f"to be a number, .* got '{value}'")
            for value in ("0", "-1", "nan", "1.5", "many", "9999999999")
        ),
        ("BAP_KERNELS_SIMULATED_WARPGROUPS", "2", "to be one of 0, 1, got '2'"),
        ("BAP_KERNELS_AUTOTUNE", "yes", "to be one of 0, 1, got 'yes'"),
        ("BAP_KERNELS_AUTOTUNE", "-1", "to be one of 0, 1, got '-1'"),
    ],
)
def test_environment_refuses(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"bap_kernels: expected `{name}` {message}"):
        settings.read_environment({name: value})


def test_the_table_names_every_variable_that_is_read() -> None:
    names = {each.name for each in settings.ENVIRONMENT}
    sources = [
        *ROOT.glob("bap_kernels/**/*.py"),
        *ROOT.glob("tools/*.py"),
        ROOT / "setup.py",
        *ROOT.glob("csrc/**/*.cpp"),
    ]
    # As a whole string literal: macros of the build have the same prefix.
    read = {name for path in sources for name in re.findall(r'"(BAP_KERNELS_[A-Z_]+)"', path.read_text())}
    assert read <= names


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_load.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"bap_kernels._C is not built. Hint: build it with .*setup.py build_ext"):
        _load._load_library("")


def test_library_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(_load.importlib, "import_module", unresolved)
    with pytest.raises(ImportError, match=r"does not load with torch .*undefined symbol.* built against another torch"):
        _load._load_library("")


def test_named_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "_C.so")
    with pytest.raises(ImportError, match=rf"`BAP_KERNELS_LIBRARY` to name a built extension, got '{path}'. Hint"):
        _load._load_library(path)


def test_named_cuda_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "_C_cuda.so")
    with pytest.raises(ImportError, match=rf"`BAP_KERNELS_CUDA_LIBRARY` to name a built extension, got '{path}'. Hint"):
        _load._load_cuda_library(path)


def test_cuda_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    assert _load._load_cuda_library("") == (None, "bap_kernels._C_cuda is not built")


def test_the_old_module_says_where_its_names_are() -> None:
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.dispatch\.use_backend now"):
        assert bk.config.use_backend is bk.use_backend
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.dispatch\.unsupported_reason now"):
        assert bk.config.why_not("aten") is None
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.settings\.settings now"):
        assert bk.config.settings is settings.settings
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bk.config.nothing  # noqa: B018
