"""What docs/guide/serving.md says exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from bap.cli.commands import app
from bap.serve import ServeSettings
from typer.main import get_command

GUIDE = (Path(__file__).parents[3] / "docs/guide/serving.md").read_text()


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", GUIDE, flags=re.S)
    assert found
    return found[1]


def test_options_exist_with_their_defaults() -> None:
    options = {
        name: parameter
        for parameter in get_command(app).commands["serve"].params  # type: ignore[attr-defined]
        for name in parameter.opts
    }
    named = set(re.findall(r"`(--[a-z-]+)", GUIDE)) | set(re.findall(r"bap serve [^\n]*?(--[a-z-]+)", GUIDE))
    assert named - options.keys() == set()
    defaults = {"max_batch": 8, "max_wait_ms": 2.0, "queue": 64, "max_image_bytes": 10 * 2**20, "timeout": 30.0}
    defaults |= {"max_image_pixels": 33_554_432, "replicas": 1, "cpus": 1, "backend": None}
    fields = {name: ServeSettings.model_fields[name].default for name in defaults}
    of_command = {name: options[f"--{name.replace('_', '-')}"].default for name in defaults}
    assert fields == of_command == defaults


def test_the_config_file_fits_rays_schema_and_our_settings() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(_block("yaml")))
    (application,) = config.applications
    assert ServeSettings.of(application.args).max_batch == 16
    assert [deployment.name for deployment in application.deployments] == ["Network"]


def test_the_answer_is_json() -> None:
    assert json.loads(_block("json")).keys() == {"domain", "class", "number", "probability", "top"}
