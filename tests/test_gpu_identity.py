"""What measured choices on a GPU are kept under."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bap_kernels import _C, _gpu


@pytest.fixture(autouse=True)
def _gpu_of_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H200 number\t{index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


def test_identity_names_device_driver_libraries_and_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "driver_version", lambda: "570.86.10")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(_gpu, "_triton_version", lambda: "3.6.0")
    text = _gpu.gpu_identity(1)
    assert re.fullmatch(
        r"NVIDIA H200 number 1 9\.0, driver 570\.86\.10, cuda 13\.0, cudnn 91002, triton 3\.6\.0, build [0-9a-f]{8}",
        text,
    )
    for module, name, value in (
        (_gpu, "driver_version", lambda: "580.1"),
        (torch.version, "cuda", "12.9"),
        (torch.backends.cudnn, "version", lambda: 91100),
        (_gpu, "_triton_version", lambda: "3.7.0"),
        (_gpu, "extension_hash", lambda: "01234567"),
        (torch.cuda, "get_device_capability", lambda index: (10, 0)),
        (torch.cuda, "get_device_name", lambda index: "NVIDIA B200"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert _gpu.gpu_identity(1) != text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Wed Jan 22 2025\nGCC version: 12.2.0\n",
            "570.86.10",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
    ],
)
def test_driver_version_is_the_kernel_module(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(text)
    assert _gpu.driver_version(file) == expected


@pytest.mark.parametrize("text", [None, "", "no number here\n"])
def test_driver_version_without_a_file(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert _gpu.driver_version(file) == "CUDA 13000"
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion")
    assert _gpu.driver_version(file) == "unknown"


def test_build_is_that_of_the_loaded_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu.extension_hash.cache_clear()
    before = _gpu.extension_hash()
    assert _gpu.extension_hash() == before
    other = tmp_path / "_C.so"
    other.write_bytes(Path(_C.__file__ or "").read_bytes() + b"x")
    _gpu.extension_hash.cache_clear()
    monkeypatch.setattr(_C, "__file__", str(other))
    assert _gpu.extension_hash() != before
    _gpu.extension_hash.cache_clear()
