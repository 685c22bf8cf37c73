"""The report of a GPU: parts that fail, hang or cannot run, files, and a run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from tools import gpu_report
from tools.gpu_parts import Part, Report, Result

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
    report.write()
    written = json.loads((tmp_path / "report.json").read_text())
    assert [part["state"] for part in written["parts"]] == [result.state for result in report.results]
    assert "| a row |" in (tmp_path / "report.md").read_text()
    assert "| failing | failed |" in report.table()
    assert "failing: failed status 3" in capsys.readouterr().out


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


def test_parts_run_every_gpu_test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = collected("tests/gpu")
    monkeypatch.setattr(gpu_report.os, "cpu_count", lambda: 8)
    parts = parts_of(lambda report: gpu_report.run_tests(report, None, 60), tmp_path)
    chosen = [collected(*part.command[6:]) for part in parts]
    assert len(chosen) == 2
    assert abs(len(chosen[0]) - len(chosen[1])) <= 1
    sanitized = {test for test in everything if "sanitizer" in test}
    assert len(sanitized) == 1
    assert chosen[0] | chosen[1] == everything - sanitized
    assert not chosen[0] & chosen[1]


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


VERDICTS = {
    "triton/forward/bfloat16": {"verdict": "ok", "reason": "9 cases"},
    "triton/forward/tf32": {"verdict": "wrong", "reason": "off by 1 | 2"},
    "cuda/nhwc/bfloat16": {"verdict": "hang", "reason": "no end"},
    "cuda/nhwc/tf32": {"verdict": "ok", "reason": "9 cases"},
}


def with_verdicts(out: Path) -> None:
    """What the verifier leaves in the report's cache, behind an older build."""
    devices = [{"facts": {}, "families": {}}, {"facts": {}, "families": VERDICTS}]
    (out / "cache").mkdir()
    (out / "cache/verdicts-v1.json").write_text(json.dumps({"format": 1, "devices": devices}))


def parts_of(run: Callable[[Report], None], out: Path) -> list[Part]:
    """The parts that would be run, without running them."""
    report, parts = Report(out, 60), []

    def note(part: Part) -> Result:
        parts.append(part)
        return Result(part.name, "ok")

    report.run = note  # type: ignore[method-assign]
    report.run_together = lambda several: [note(part) for part in several]  # type: ignore[method-assign]
    run(report)
    return parts


def option(part: Part, name: str) -> str:
    return part.command[part.command.index(name) + 1]


def test_benches_leave_out_what_is_not_verified(tmp_path: Path) -> None:
    parts = {part.name: part for part in parts_of(lambda report: gpu_report.run_benches(report, None), tmp_path)}
    assert option(parts["networks"], "--without") == "triton,cuda"
    with_verdicts(tmp_path)
    parts = {part.name: part for part in parts_of(lambda report: gpu_report.run_benches(report, None), tmp_path)}
    assert option(parts["networks"], "--without") == "cuda"
    variants = {name: set(option(parts[f"study-{name}"], "--variants").split(",")) for name in ("bfloat16", "float32")}
    assert {"auto", "triton"} <= variants["bfloat16"]
    assert "cuda" not in variants["bfloat16"]
    # By TF32, which float32 convolutions use where nothing else is asked for.
    assert {"auto", "cuda"} <= variants["float32"]
    assert "triton" not in variants["float32"]


def test_budgets_fit_their_limits(tmp_path: Path) -> None:
    for part in parts_of(lambda report: gpu_report.run_benches(report, None), tmp_path):
        if "--budget-seconds" in part.command:
            assert int(option(part, "--budget-seconds")) < part.limit_s <= 150


def test_parts_run_without_a_gpu_are_skipped(tmp_path: Path) -> None:
    report = Report(tmp_path, 60)
    gpu_report.run_benches(report, "no CUDA device here")
    assert {(result.state, result.reason) for result in report.results} == {("skipped", "no CUDA device here")}


def test_verdicts_are_part_of_the_report_and_the_page(tmp_path: Path) -> None:
    with_verdicts(tmp_path)
    report = Report(tmp_path, 60)
    report.head = {"gpu": "H200", "commit": "abc"}
    (tmp_path / "study-first").mkdir()
    study = "# Study\n\n## Targets\n\nno\n\n## Speed-up of single layers\n\n| layers |\n\n![plot](a.png)\n"
    (tmp_path / "study-first/report.md").write_text(study)
    (tmp_path / "networks.md").write_text("| a network |\n")
    report.write()
    page = gpu_report.page_of(report)
    for text in ((tmp_path / "report.md").read_text(), page):
        assert "| triton/forward | ok | wrong |" in text
        assert "- triton/forward/tf32: wrong, off by 1 / 2" in text
        assert "H200" in text
    assert "## Speed-up of single layers: study-first\n\n| layers |" in page
    assert "| a network |" in page
    assert "a.png" not in page
    assert "\nno\n" not in page


def test_verifier_part_takes_verdicts_that_are_not_ok_for_a_result(tmp_path: Path) -> None:
    with_verdicts(tmp_path)
    (part,) = parts_of(
        lambda report: gpu_report.run_verifier(report, "verify-main", ["--family", "main"], 90, None), tmp_path
    )
    assert part.command[1:] == ["-m", "bap_kernels.verify", "--family", "main"]
    assert part.statuses == (0, 1)
    assert part.read is not None
    assert part.read("") == {"verdicts": "2 ok, 1 wrong, 1 hang"}


def test_killed_report_goes_on(tmp_path: Path) -> None:
    """Each part's result is on disk when it ends, and is not computed again."""
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    parts = [Part("first", python(count), 400), Part("second", python("raise SystemExit(1)"), 400)]
    report = Report(tmp_path, 500)
    for part in parts:
        report.run(part)
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["parts"][-1]["part"] == part.name
    again = Report(tmp_path, 500)
    again.load_earlier()
    # Before it is its turn, it is in the file, too.
    again.run(Part("new", python("print(1)"), 400))
    assert [each["part"] for each in json.loads((tmp_path / "report.json").read_text())["parts"]] == ["new", "first"]
    results = [again.run(part) for part in (*parts, Part("first", python(count), 400, again=True))]
    assert [result.state for result in results] == ["ok", "failed", "ok"]
    assert (tmp_path / "count").read_text() == "xx"


def test_another_gpu_or_commit_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"gpu": "H200", "torch": "2", "cuda": "13", "triton": None, "capability": None}
    for name, gpu, commit, kept in (
        ("same", "H200", "abc", True),
        ("gpu", "A100", "abc", False),
        ("commit", "H200", "abd", False),
    ):
        out = tmp_path / name
        out.mkdir()
        parts = [{"part": "networks", "state": "ok", "reason": "", "seconds": 1.0, "data": {}}]
        (out / "report.json").write_text(json.dumps({"gpu": gpu, "commit": commit, "parts": parts}))
        report = Report(out, 500)
        report.head = {"commit": "abc"}
        report.run = lambda part: Result(part.name, "ok", data=dict(facts))  # type: ignore[method-assign]
        report.run_together = lambda several: [Result(part.name, "ok") for part in several]  # type: ignore[method-assign]
        gpu_report.run_everything(report, quick=True)
        assert (report.earlier != {}) == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run without a GPU")
def test_quick_report_without_a_gpu_says_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--quick", "--out", str(tmp_path), "--page", str(page)])
    monkeypatch.setattr(gpu_report, "built_already", lambda: "built for this test")
    assert gpu_report.main() == 0
    found = {each["part"]: each for each in json.loads((tmp_path / "report.json").read_text())["parts"]}
    for name in ("driver", "verify-main", "study-first"):
        assert (found[name]["state"], found[name]["reason"]) == ("skipped", "no CUDA device here")
    assert found["info"]["state"] == "ok"
    assert "without a GPU there is nothing to write" in capsys.readouterr().out
    assert not page.exists()
