"""A new domain beside trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from bap.data import builtin_suite
from bap.train.checkpoint import domains_of, load_checkpoint
from bap.train.evaluate import evaluate
from bap.train.new_domain import add_domain

import bap_kernels as bk


def test_a_new_domain_leaves_the_others_untouched(finished: Path, copy_of) -> None:
    folder = copy_of(finished / "checkpoint")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    data = builtin_suite(["textures"], 100)["textures"]
    specs = add_domain(folder, "textures", {"epochs": 3, "batch": 16}, data=data, progress=False)
    after = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        folder / "domains" / "textures" / n for n in ("domain.safetensors", "domain_config.json")
    }
    assert domains_of(folder) == ["shapes", "digits", "glyphs", "textures"]
    assert specs["kept"] <= 0.5
    model, _, _ = load_checkpoint(folder, ["textures"])
    with bk.use_backend("aten"):
        assert evaluate(model, data).percent == specs["accuracy"]
    with pytest.raises(ValueError, match="to be new, got 'textures'"):
        add_domain(folder, "textures", data=data)
    with pytest.raises(ValueError, match=r"`optimiser.train_backbone` to be off"):
        add_domain(folder, "signs", {"train_backbone": True}, data=data)
