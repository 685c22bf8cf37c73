"""The recipes load, and ask for what their suites have."""

from __future__ import annotations

from pathlib import Path

import pytest
from bap.config import load_config
from bap.models import MODELS
from bap.results.demo import BUILTIN_RECIPE

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_recipes_cover_all_models() -> None:
    models = {load_config(path).model.name for path in CONFIGS}
    assert models == {"resnet26", "resnet26_rebuffi", "wrn28_4", "resnet50", "densenet121"} <= set(MODELS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    for beta in (1, 0.75, 0.5, 0.25):
        for sharing in ("int", "union", "jaccard", "null"):
            config = load_config(path, [f"beta={beta}", f"sharing={sharing}"])
            assert config.budget.beta == beta
            assert config.sharing.loss == (None if sharing == "null" else sharing)
    kind, _, model = path.stem.partition("_")
    assert config.data.suite == kind
    assert config.model.name == (model or "resnet26")


def test_the_demo_has_the_settings_of_its_recipe() -> None:
    path = next(path for path in CONFIGS if path.stem == "builtin")
    assert load_config(path) == load_config(base=BUILTIN_RECIPE)
