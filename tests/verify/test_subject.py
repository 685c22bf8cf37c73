"""The facts that verdicts hold for, and how a child is made to see one device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bap_kernels import _C
from bap_kernels.verify import subject as module
from bap_kernels.verify.subject import cuda_subject, hash_of


@pytest.fixture
def properties(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of a device."""
    found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid="1a2b-3c", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(module, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(module.dispatch, "unsupported_reason", lambda backend: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_facts_name_device_driver_and_builds(properties: SimpleNamespace) -> None:
    found = cuda_subject(1)
    assert (found.index, found.name) == (1, "NVIDIA H200")
    assert found.facts["capability"] == "9.0"
    assert found.facts["driver"] == "580.65.06"
    assert found.facts["torch"] == torch.__version__
    assert all(isinstance(fact, str) and fact for fact in found.facts.values())
    assert set(found.facts) >= {"gpu", "cuda", "triton", "extension", "triton sources"}


@pytest.mark.parametrize(
    ("visible", "name", "expected"),
    [
        (None, "NVIDIA H200", "GPU-1a2b-3c"),
        ("3,2", "NVIDIA H200", "GPU-1a2b-3c"),
        ("GPU-x,GPU-y", "NVIDIA H200", "GPU-y"),
        ("MIG-x,MIG-y", "NVIDIA H200 MIG 1g.18gb", "MIG-y"),
        (None, "NVIDIA H200 MIG 1g.18gb", "MIG-1a2b-3c"),
    ],
)
def test_children_see_one_device(
    visible: str | None, name: str, expected: str, properties: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties.name = name
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_subject(1).environment["CUDA_VISIBLE_DEVICES"] == expected


def test_wgmma_is_for_one_capability(properties: SimpleNamespace) -> None:
    there = [each for each in _C.cuda_families() if "/wgmma/" in each]
    assert sorted(each for each in cuda_subject(0).families if "/wgmma/" in each) == sorted(there)
    properties.minor = 3
    assert not any("/wgmma/" in each for each in cuda_subject(0).families)


def test_families_are_those_of_the_backends_that_run(
    properties: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {each.split("/")[0] for each in cuda_subject(0).families} >= {"triton"}
    monkeypatch.setattr(module.dispatch, "unsupported_reason", lambda backend: "not here")
    assert cuda_subject(0).families == ()


def test_small_memory_runs_fewer_children(properties: SimpleNamespace) -> None:
    assert cuda_subject(0).jobs == 16
    properties.total_memory = 8 * 2**30
    assert cuda_subject(0).jobs == 1


def test_hash_depends_on_names_contents_and_their_borders(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("12")
    b.write_text("3")
    first = hash_of([a, b])
    assert hash_of([b, a]) == first
    a.write_text("1")
    b.write_text("23")
    assert hash_of([a, b]) != first
    assert hash_of([a]) != hash_of([b])


def test_drivers_version_is_read_where_the_kernel_module_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: text if "nvidia" in str(self) else real(self, *a, **k))
    assert module._driver() == "580.65.06"


def test_no_device_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert module.cuda_problem() == "there is no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert str(module.cuda_problem()).endswith("is built without CUDA")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert module.cuda_problem() == "the kernels are for NVIDIA GPUs"
