"""Files of version 0.1.0 load: tables, checkpoints, runs, measured choices.

tests/fixtures/v0.1.0 was written by commit 43adfa9, v0.1.0-early by bdcc40e. Expected outputs are next to the files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bap.config import load_config
from bap.results.run import train_run
from bap.train.checkpoint import load_checkpoint
from bap.train.domains import load_domains
from safetensors.torch import load_file
from torch import nn

import bap_kernels as bk

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ["v0.1.0-early", "v0.1.0"]
PROGRAM = """
import json, torch, warnings
warnings.simplefilter("error")
torch.set_num_threads(1)
import bap_kernels as bk
known = bk.choices()
x, weight = torch.randn(1, 16, 12, 12), torch.randn(12, 16, 3, 3)
lists = (torch.arange(0, size, step, dtype=torch.int32) for size, step in ((16, 2), (12, 3)))
bk.gathered_conv2d(x, weight, None, *lists, padding=1)
print(json.dumps([known, bk.choices()]))
"""


def _expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / request.param


def test_table_loads(folder: Path) -> None:
    table = bk.ChannelTable.load(folder / "table.safetensors")
    lists = {
        domain: {layer: [None if index is None else index.tolist() for index in (lists.in_index, lists.out_index)]
                 for layer, lists in layers.items()}
        for domain, layers in table.items()
    }  # fmt: skip
    assert lists == _expected(folder)["table"]


def test_switched_state_loads_and_computes_old_outputs(folder: Path) -> None:
    expected, outputs = _expected(folder), load_file(folder / "switched_outputs.safetensors")
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    names = expected["domains"]
    model = bk.nn.switch_(plain, names, heads={"zebras": 4, "apples": 2, "maps": 3}).eval()
    model.load_state_dict(load_file(folder / "switched.safetensors"))
    assert list(bk.domain_names(model)) == names == ["zebras", "apples", "maps"]
    with torch.inference_mode(), bk.use_backend("aten"):
        for name in names:
            bk.set_domain(model, name)
            torch.testing.assert_close(model(outputs["input"]), outputs[name], rtol=1e-4, atol=1e-5)
    for name, masks in expected["channels_on"].items():
        for domain, switch in model.get_submodule(name).domains.items():
            assert (switch.score > switch.threshold).nonzero().flatten().tolist() == masks[domain]


@pytest.mark.filterwarnings("ignore:.*is of an earlier format, without digests")
def test_checkpoint_loads_and_computes_old_outputs(folder: Path) -> None:
    outputs = load_file(folder / "run_outputs.safetensors")
    images = load_file(FIXTURES / "v0.1.0" / "run_outputs.safetensors")["input"]
    model, config, domains = load_checkpoint(folder / "run" / "checkpoint")
    assert list(domains) == list(bk.domain_names(model)) == ["digits", "signs"]
    assert config == load_config(FIXTURES / "v0.1.0" / "run" / "config.yaml")
    with torch.inference_mode(), bk.use_backend("aten"):
        for name in domains:
            bk.set_domain(model, name)
            torch.testing.assert_close(model(images), outputs[name], rtol=1e-4, atol=1e-5)


def test_stopped_run_resumes(tmp_path: Path) -> None:
    finished = FIXTURES / "v0.1.0" / "run"
    folder = Path(shutil.copytree(FIXTURES / "v0.1.0" / "half", tmp_path / "run"))
    config = load_config(folder / "config.yaml")
    results = train_run(config, folder, resume=True, domains=load_domains(config))
    expected = json.loads((finished / "results.json").read_text())
    # CPUs round differently, which can change a switch or a prediction in the last of the four epochs.
    assert results["kept"] == pytest.approx(expected["kept"], abs=0.05)
    assert results["projected_off"] == pytest.approx(expected["projected_off"], abs=3)
    assert results["cost"]["backbone_macs"] == expected["cost"]["backbone_macs"]
    records, old = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    for run in (folder, finished))  # fmt: skip
    # The first three records are unchanged, with their times: only the fourth epoch was trained.
    half = (FIXTURES / "v0.1.0" / "half" / "metrics.jsonl").read_text().splitlines()
    assert records[:3] == [json.loads(line) for line in half]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    for name in ("digits", "signs"):
        for key in ("multiplier", "loss"):
            assert records[3]["domains"][name][key] == pytest.approx(old[3]["domains"][name][key], rel=0.02)


def _choices(cache: Path) -> list[list[dict[str, Any]]]:
    """Return the measured choices at the start and the end of a new process, in which warnings are errors."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {"BAP_KERNELS_CACHE_DIR": str(cache), "BAP_KERNELS_BACKEND": "auto", "BAP_KERNELS_WINOGRAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_measured_choices_load(tmp_path: Path) -> None:
    _choices(tmp_path / "new")
    (new,) = (tmp_path / "new").glob("choices-v*.tsv")
    machine = new.read_text().splitlines()[1].split("\t")[0]
    for version in VERSIONS:
        (old,) = (FIXTURES / version).glob("choices-v*.tsv")
        (tmp_path / version).mkdir()
        (tmp_path / version / old.name).write_text(old.read_text().replace("MACHINE", machine))
    start, end = _choices(tmp_path / "v0.1.0")
    assert [[choice["case"], choice["backend"]] for choice in start] == _expected(FIXTURES / "v0.1.0")["choices"]
    assert [choice["case"] for choice in end] == [choice["case"] for choice in start]
    start, end = _choices(tmp_path / "v0.1.0-early")
    assert [[choice["case"], choice["backend"]] for choice in start] == _expected(FIXTURES / "v0.1.0-early")["choices"]
    assert not any(choice["settled"] for choice in start)
    assert [choice["case"] for choice in end] == [choice["case"] for choice in start]
