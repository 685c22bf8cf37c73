"""`info`, settings, `use_backend`, and errors of the loader."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _load, dispatch, settings

ROOT = Path(__file__).parents[1]


def test_public_names_exist() -> None:
    for module in (bk, bk.nn, dispatch, settings):
        for name in module.__all__:
            assert hasattr(module, name), name


def test_info_describes_versions_backends_and_caches() -> None:
    info = bk.info()
    assert info.versions["torch"] == torch.__version__
    assert info.versions["bap_kernels"] == bk.__version__
    assert info.isa in (*info.isa_available, "none")
    assert list(info.backends) == ["native", "aten", "triton", "cuda"]
    assert info.backends["aten"] is None
    assert info.backend == "auto"
    with bk.use_backend("aten"):
        assert bk.info().backend == "aten"
    assert info.packed_cache.keys() >= {"bytes", "entries", "limit_bytes", "hits", "misses", "evictions"}
    assert info.choice_file == settings.settings.choice_file
    assert info.cpu
    assert re.search(rf"^cpu +{re.escape(info.cpu)}$", str(info), re.MULTILINE)


def test_info_lists_environment_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAP_KERNELS_BACKEND", "aten")
    assert bk.info().environment["BAP_KERNELS_BACKEND"] == "aten"
    monkeypatch.delenv("BAP_KERNELS_BACKEND")
    assert "BAP_KERNELS_BACKEND" not in bk.info().environment


def test_info_has_size_of_choice_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "choices-v5.tsv").write_bytes(b"12345")
    monkeypatch.setattr(settings, "settings", dataclasses.replace(settings.settings, cache_dir=tmp_path))
    assert bk.info().choice_bytes == 5
    assert str(tmp_path / "choices-v5.tsv") in str(bk.info())
    monkeypatch.setattr(settings, "settings", dataclasses.replace(settings.settings, cache_dir=None))
    assert bk.info().choice_file is None
    assert bk.info().choice_bytes == 0


def test_info_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_module("bap_kernels.info", run_name="__main__", alter_sys=True)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    assert any(line.split() == ["aten", "can", "run"] for line in lines)
    # Neither the command nor an import of the module replaces the function.
    importlib.import_module("bap_kernels.info")
    assert callable(bk.info)


def test_use_backend_context_restores_after_errors() -> None:
    with bk.use_backend("aten") as outer:
        assert repr(outer) == "use_backend('aten')"
        with pytest.raises(KeyError, match="auto"), bk.use_backend("auto"):
            raise KeyError(bk.info().backend)
        assert bk.info().backend == "aten"
    assert bk.info().backend == "auto"


def test_use_backend_call_sets_backend() -> None:
    bk.use_backend("aten")
    try:
        assert bk.info().backend == "aten"
    finally:
        bk.use_backend("auto")
    assert bk.info().backend == "auto"


def test_use_backend_with_unknown_or_missing_backend_raises() -> None:
    with pytest.raises(ValueError, match=r"`name` to be one of auto, heuristic, native, aten, triton, cuda, got 'mkl'"):
        bk.use_backend("mkl")
    missing = [name for name, reason in bk.info().backends.items() if reason is not None]
    for name in missing:
        with pytest.raises(
            ImportError, match=rf"to be a backend that can run here, got '{name}': .*Hint: bap_kernels.info"
        ):
            bk.use_backend(name)
    assert bk.info().backend == "auto"


def test_environment_without_variables_has_defaults() -> None:
    defaults = settings.read_environment({})
    assert defaults == settings.Settings(None, "auto", Path.home() / ".cache" / "bap_kernels", 2**30)
    assert settings.read_environment({"BAP_KERNELS_BACKEND": "", "BAP_KERNELS_ISA": " "}) == defaults


def test_environment_values_are_parsed() -> None:
    values = settings.read_environment(
        {
            "BAP_KERNELS_ISA": "AVX2",
            "BAP_KERNELS_BACKEND": " aten ",
            "BAP_KERNELS_CACHE_DIR": "/somewhere",
            "BAP_KERNELS_PACKED_CACHE_BYTES": "0",
        }
    )
    assert values == settings.Settings("avx2", "aten", Path("/somewhere"), 0)
    assert values.choice_file == Path("/somewhere/choices-v5.tsv")
    assert settings.read_environment({"BAP_KERNELS_CACHE_DIR": ""}).choice_file is None


@pytest.mark.parametrize("text", ["~/x", "~nosuch/x", "~nosuch"])
def test_cache_folder_without_home_is_none_with_reason(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: object) -> None:
        raise KeyError(name)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", missing)
    monkeypatch.setattr("pwd.getpwnam", missing)
    values = settings.read_environment({"BAP_KERNELS_CACHE_DIR": text})
    assert (values.cache_dir, values.choice_file) == (None, None)
    assert values.cache_problem == f"`{text}` has no home folder in front"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BAP_KERNELS_ISA", "sse", f"to be one of {', '.join(settings.ISAS)}, got 'sse'"),
        ("BAP_KERNELS_BACKEND", "fast", "to be one of auto, heuristic, native, aten, triton, cuda, got 'fast'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "-1", "to be a number of bytes, .* got '-1'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "1GiB", "to be a number of bytes, .* got '1GiB'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "nan", "to be a number of bytes, .* got 'nan'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "1e9", "to be a number of bytes, .* got '1e9'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", str(2**63), f"to be a number of bytes, .* got '{2**63}'"),
        ("BAP_KERNELS_PACKED_CACHE_BYTES", "9" * 5000, "to be a number of bytes, .* got '999"),
        ("BAP_KERNELS_AUTOTUNE", "yes", "to be one of 0, 1, got 'yes'"),
        ("BAP_KERNELS_AUTOTUNE", "-1", "to be one of 0, 1, got '-1'"),
    ],
)
def test_invalid_environment_value_raises(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"bap_kernels: expected `{name}` {message}"):
        settings.read_environment({name: value})


def test_environment_table_has_every_variable() -> None:
    names = {variable.name for variable in settings.ENVIRONMENT}
    sources = [
        *ROOT.glob("bap_kernels/**/*.py"),
        *ROOT.glob("tools/*.py"),
        ROOT / "setup.py",
        *ROOT.glob("csrc/**/*.cpp"),
    ]
    # Whole string literals only: macros of the build have the same prefix.
    read = {name for path in sources for name in re.findall(r'"(BAP_KERNELS_[A-Z_]+)"', path.read_text())}
    assert read <= names


def test_missing_library_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_load.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"bap_kernels._C is not built. Hint: build it with .*setup.py build_ext"):
        _load._load_library("")


def test_library_of_another_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    other = "_C.cpython-399-x86_64-linux-gnu.so"
    (tmp_path / other).touch()
    monkeypatch.setattr(_load.importlib, "import_module", missing)
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    here = sys.implementation.cache_tag
    with pytest.raises(ImportError, match=rf"expected the compiled library for {here}, got {other} alone\. Hint"):
        _load._load_library("")


def test_library_that_does_not_load_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(_load.importlib, "import_module", unresolved)
    with pytest.raises(ImportError, match=r"does not load with torch .*undefined symbol.* built against another torch"):
        _load._load_library("")


def test_library_of_another_torch_that_does_not_load_names_its_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    built = _load._C.build_info()["torch"]
    monkeypatch.setattr(_load.importlib, "import_module", unresolved)
    monkeypatch.setattr(_load.torch, "__version__", "2.99.0+cpu")
    message = rf"which the compiled library was built with \({re.escape(built)}\), got torch 2\.99\.0\+cpu\. Hint"
    with pytest.raises(ImportError, match=message):
        _load._load_library("")


@pytest.mark.parametrize(
    ("version", "fits"), [("2.14.0", True), ("2.14.9+cu130", True), ("2.1.4", False), ("3.14.0", False)]
)
def test_library_that_loads_with_another_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    library = types.SimpleNamespace(build_info=lambda: {"torch": "2.14.1+cpu"})
    monkeypatch.setattr(_load.importlib, "import_module", lambda name: library)
    monkeypatch.setattr(_load.torch, "__version__", version)
    if fits:
        assert _load._load_library("") is library
        return
    with pytest.raises(ImportError, match=rf"expected torch 2\.14, .*got torch {version}\. Hint: install a wheel"):
        _load._load_library("")


def test_missing_library_of_environment_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "_C.so")
    with pytest.raises(ImportError, match=rf"`BAP_KERNELS_LIBRARY` to name a built extension, got '{path}'. Hint"):
        _load._load_library(path)


def test_missing_cuda_library_of_environment_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "_C_cuda.so")
    with pytest.raises(ImportError, match=rf"`BAP_KERNELS_CUDA_LIBRARY` to name a built extension, got '{path}'. Hint"):
        _load._load_cuda_library(path)


def test_missing_cuda_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    assert _load._load_cuda_library("") == (None, "bap_kernels._C_cuda is not built")


def test_deprecated_config_module_forwards_names() -> None:
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.dispatch\.use_backend now"):
        assert bk.config.use_backend is bk.use_backend
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.dispatch\.unsupported_reason now"):
        assert bk.config.why_not("aten") is None
    with pytest.warns(DeprecationWarning, match=r"it is bap_kernels\.settings\.settings now"):
        assert bk.config.settings is settings.settings
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bk.config.nothing  # noqa: B018
