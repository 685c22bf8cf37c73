"""The version, and modules and names of version 0.1.0 that can still be imported."""

from __future__ import annotations

import importlib
import sys

import bap
import pytest
from bap._moved import MOVED, RENAMED

import bap_kernels


def test_version() -> None:
    assert bap.__version__ == bap_kernels.__version__


@pytest.mark.parametrize("old", MOVED)
def test_old_modules(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated, use {MOVED[old][0]}"):
        module = importlib.import_module(old)
    for target in MOVED[old]:
        for name in getattr(importlib.import_module(target), "__all__", ["app"]):
            assert hasattr(module, name)


@pytest.mark.parametrize(
    "old",
    ["facts.conv_facts", "journal.Journal", "resume.learning_rate", "network.load_domains", "evaluate.evaluating",
     "run.final_split", "deploy.speed_facts", "demo.EMBEDDED"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:bap.* is deprecated")
def test_old_names(old: str) -> None:
    module, _, name = old.partition(".")
    assert hasattr(importlib.import_module(f"bap.{module}"), name)
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_old_names_of_the_builtin_suite() -> None:
    import bap.data

    with pytest.warns(DeprecationWarning, match="use builtin_suite"):
        assert bap.data.embedded_suite is bap.data.builtin_suite
