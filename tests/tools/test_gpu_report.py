"""The report of a GPU: parts that fail, hang or cannot run, files, and a run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from tools import gpu_report
from tools.gpu_report import Part, Report

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_killed(process: int) -> bool:
    """Whether a killed process ends within seconds."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_failing_or_hanging_parts_do_not_affect_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Only the part that hangs has a short limit, so that the others pass on a busy machine.
    report = Report(tmp_path, 500)
    parts = [
        Part("fine", python("print('{\"cases\": 3}')"), 400, read=gpu_report.last_json),
        Part("failing", python("print('why'); raise SystemExit(3)"), 400),
        Part("hanging", ["sh", "-c", f"sleep 100000 & echo $! > {tmp_path}/child; wait"], 5.5),
        Part("left out", python("print(1)"), 400, skip="no CUDA device here"),
        Part("silent", python("print('no JSON')"), 400, read=gpu_report.last_json),
        Part("missing", ["/nowhere/program"], 400),
        Part("told", python("import os; print(os.environ['SOME_SETTING'])"), 400, environment={"SOME_SETTING": "7"}),
    ]
    results = {result.part: result for result in report.run_together(parts)}
    assert [result.part for result in report.results] == [part.name for part in parts]
    assert (results["fine"].state, results["fine"].data) == ("ok", {"cases": 3})
    assert (results["failing"].state, results["failing"].reason) == ("failed", "status 3: why, see failing.log")
    assert results["hanging"].state == "failed"
    assert results["hanging"].reason.startswith("ran past ")
    child = tmp_path / "child"
    assert not child.exists() or is_killed(int(child.read_text())), "its child process is still running"
    assert (results["left out"].state, results["left out"].reason) == ("skipped", "no CUDA device here")
    assert "expected a line of JSON" in results["silent"].reason
    assert results["missing"].reason.startswith("FileNotFoundError")
    assert results["told"].data == {"last_line": "7"}
    (tmp_path / "networks.md").write_text("| a row |\n")
    report.write({"gpu": None})
    written = json.loads((tmp_path / "report.json").read_text())
    assert [part["state"] for part in written["parts"]] == [result.state for result in report.results]
    assert "| a row |" in (tmp_path / "report.md").read_text()
    assert "| failing | failed |" in capsys.readouterr().out


def test_part_without_remaining_time_is_skipped(tmp_path: Path) -> None:
    result = Report(tmp_path, 1).run(Part("late", python("print(1)"), 30))
    assert (result.state, result.reason) == ("skipped", "no time was left for it")


def test_backends_of_parses_info() -> None:
    text = str(bk.info())
    assert "cuda of torch" in text
    backends = gpu_report.backends_of(text)
    for name in ("triton", "cuda"):
        reason = bk.dispatch.unsupported_reason(name)
        assert backends[name] == (reason or "can run")
        assert gpu_report.missing(name, backends) == (None if reason is None else f"backend {name}: {reason}")
    assert gpu_report.missing("cuda", {}) == "backend cuda: bap_kernels does not load"


def collected(*options: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return {line for line in process.stdout.splitlines() if "::" in line}


def test_parts_run_every_gpu_test_once(tmp_path: Path) -> None:
    everything = collected("tests/gpu")
    parts = [
        *gpu_report.test_parts(tmp_path, "triton", None, False, 2),
        *gpu_report.test_parts(tmp_path, "cuda", None, False, 1),
        *gpu_report.test_parts(tmp_path, "", None, False, 1),
    ]
    chosen = [collected(*part.command[6:]) for part in parts]
    assert all(chosen)
    assert sum(map(len, chosen)) == len(set().union(*chosen))
    sanitized = {test for test in everything if "sanitizer" in test}
    assert set().union(*chosen) == everything - sanitized
    assert len(sanitized) == 1
    gates = [tests for part, tests in zip(parts, chosen, strict=True) if "triton-gate" in part.name]
    assert abs(len(gates[0]) - len(gates[1])) <= 1
    (short,) = gpu_report.test_parts(tmp_path, "triton", None, True, 1)
    assert collected(*short.command[6:]) < set().union(*gates)


@pytest.mark.parametrize("text", ["3/2", "a/b"])
def test_invalid_part_option_fails(text: str) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu", "--part", text]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 4
    assert "--part" in process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
@pytest.mark.slow
def test_gpu_networks_runs_on_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_networks", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    command += ["--markdown", str(tmp_path / "rows.md")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {"network", "mixed", "training"}
    assert not [row for row in rows if "failed" in row]
    assert all(row["p50_s"] > 0 for row in rows)
    last = gpu_report.last_json(process.stdout)
    assert (last["failed"], last["left_out"]) == (0, [])
    assert "| planned, auto |" in (tmp_path / "rows.md").read_text()


@pytest.mark.parametrize("quick", [False, True])
def test_training_part_fits_its_time(quick: bool, tmp_path: Path) -> None:
    report = Report(tmp_path, 60)
    gpu_report.run_benches(report, "no CUDA device here", (), quick)
    found = {result.part: result for result in report.results}
    assert (found["training-steps"].state, found["training-steps"].reason) == ("skipped", "no CUDA device here")
    parts: list[Part] = []
    report.run = lambda part: parts.append(part) or found[part.name]  # type: ignore[method-assign]
    gpu_report.run_benches(report, None, (), quick)
    (part,) = [part for part in parts if part.name == "training-steps"]
    assert part.command[1:6] == ["-m", "benches.training", "--steps", "--device", "cuda"]
    assert part.command[part.command.index("--out") + 1] == str(tmp_path / "training")
    budget = int(part.command[part.command.index("--budget-seconds") + 1])
    assert budget < part.limit_s <= (60 if quick else 150)
    assert ("--no-peaks" in part.command) == quick
