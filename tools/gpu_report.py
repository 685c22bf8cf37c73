"""Everything that a machine with a GPU can tell, in one command: build, GPU tests, kernels, benches.

    python tools/gpu_report.py --out DIR [--quick]

Needs no network. Each part runs in its own process under a time limit, so that one that fails or hangs does not take
the others with it; without a GPU the parts that need one are reported as skipped. Leaves report.json, report.md and one
log for each part in DIR, and prints a short table last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("dense", "masked", "naive", "best", "oracle", "auto", "aten", "triton", "cuda")
FACTS = """
import json, platform, sys, torch
cuda = torch.cuda.is_available()
try:
    import triton; triton_version = triton.__version__
except ImportError:
    triton_version = None
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton_version, "cudnn": torch.backends.cudnn.version() if cuda else None,
    "gpu": torch.cuda.get_device_name() if cuda else None,
    "capability": torch.cuda.get_device_capability() if cuda else None,
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
}))
"""


@dataclass
class Result:
    """What became of one part: ``ok``, ``failed`` or ``skipped``, with the reason of the last two."""

    part: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


class Report:
    """Runs parts one after the other within a common budget of time and collects their results."""

    def __init__(self, out: Path, budget_s: float) -> None:
        self.out = out
        self.deadline = time.monotonic() + budget_s
        self.results: list[Result] = []

    def run(
        self,
        part: str,
        command: list[str],
        limit_s: float,
        skip: str | None = None,
        read: Callable[[str], dict[str, Any]] | None = None,
    ) -> Result:
        """Runs ``command`` from the repository; ``read`` turns its output into data for the report."""
        result = Result(part, "skipped", skip or "")
        self.results.append(result)
        limit_s = min(limit_s, self.deadline - time.monotonic())
        if skip is None and limit_s < 5:
            result.reason = "no time was left for it"
        elif skip is None:
            start = time.monotonic()
            try:
                self._execute(result, command, limit_s, read)
            except (OSError, ValueError) as error:
                result.state, result.reason = "failed", f"{type(error).__name__}: {error}"
            result.seconds = round(time.monotonic() - start, 1)
        print(f"{result.part}: {result.state} {result.reason}", flush=True)
        return result

    def _execute(
        self, result: Result, command: list[str], limit_s: float, read: Callable[[str], dict[str, Any]] | None
    ) -> None:
        log = self.out / f"{result.part}.log"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with log.open("w", encoding="utf-8") as stream:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=limit_s
                )
            except subprocess.TimeoutExpired:
                result.state, result.reason = "failed", f"ran past {limit_s:.0f} s, see {log.name}"
                return
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if done.returncode == 0:
            result.state = "ok"
            result.data = read(text) if read else {"last_line": lines[-1] if lines else ""}
        else:
            result.state = "failed"
            result.reason = f"status {done.returncode}: {lines[-1][:200] if lines else 'no output'}, see {log.name}"

    def write(self, head: dict[str, Any]) -> None:
        """Writes report.json and report.md and prints the table."""
        content = {**head, "parts": [asdict(result) for result in self.results]}
        (self.out / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        table = ["| part | state | seconds | remarks |", "|---|---|---|---|"]
        for result in self.results:
            remarks = result.reason or "; ".join(f"{key}: {value}" for key, value in result.data.items())
            remarks = remarks if len(remarks) <= 300 else remarks[:297] + "..."
            table.append(f"| {result.part} | {result.state} | {result.seconds} | {remarks.replace('|', '/')} |")
        facts = "\n".join(f"- {key}: {value}" for key, value in head.items())
        markdown = f"# GPU report\n\n{facts}\n\n" + "\n".join(table) + "\n"
        (self.out / "report.md").write_text(markdown, encoding="utf-8")
        print("\n" + "\n".join(table))


def last_json(text: str) -> dict[str, Any]:
    """The object on the last line that holds one."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError("expected a line of JSON in the output, got none")
    return json.loads(lines[-1])


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` where it differs; ``unknown`` outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cuda_line(text: str) -> dict[str, Any]:
    """What bap_kernels.info says of the backend `cuda`."""
    lines = [line.split(None, 1) for line in text.splitlines()]
    return {"cuda": next((line[1].strip() for line in lines if len(line) == 2 and line[0] == "cuda"), "not listed")}


def missing_cuda(info: dict[str, Any]) -> str | None:
    """Why the CUDA C++ kernels cannot be tested; None if they can."""
    state = info.get("cuda", "bap_kernels does not load")
    return None if state == "can run" else f"backend cuda: {state}"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or where the toolkit usually is."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def run_sanitizer(report: Report, tests: list[str], skip: str | None, quick: bool) -> None:
    """The tests of small cases under compute-sanitizer: memory first, then races in shared memory."""
    tool = find_tool("compute-sanitizer")
    skip = skip or (None if tool else "compute-sanitizer is not installed")
    for check in ("memcheck",) if quick else ("memcheck", "racecheck"):
        # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool or "", "--tool", check, "--error-exitcode", "1"]
        report.run(f"sanitizer-{check}", [*command, *tests], 90, skip=skip)


def main() -> int:
    """Runs all parts; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_report", help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="fewer cases, about three minutes instead of ten")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, 175 if arguments.quick else 590)
    python = sys.executable
    quick = ["--quick"] if arguments.quick else []

    facts = report.run("machine", [python, "-c", FACTS], 60, read=last_json)
    gpu = facts.data.get("gpu")
    no_gpu = None if gpu else "no CUDA device here" if facts.state == "ok" else "torch does not run here"
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    report.run("driver", smi, 20, skip=no_gpu)
    built = report.run("build", [python, "setup.py", "build_ext", "--inplace"], 300)
    info = report.run("info", [python, "-m", "bap_kernels.info"], 60, read=cuda_line)
    broken = None if info.state == "ok" else f"bap_kernels does not load (build: {built.state})"

    has_tests = any((ROOT / "tests/gpu").glob("test_*.py"))
    no_tests = no_gpu or broken or (None if has_tests else "tests/gpu holds no tests")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    tests = [*pytest, "-k", "not triton and not cuda", f"--junitxml={out / 'tests.xml'}"]
    report.run("tests", tests, 120 if arguments.quick else 180, skip=no_tests)
    # Each case is a compilation: they have a time of their own, and what is not right keeps them out of the benches.
    chosen = "triton and not cuda" + (" and (kernels_and_layouts or capture or gradients)" if arguments.quick else "")
    triton_tests = [*pytest, "-x", "-k", chosen, f"--junitxml={out / 'tests-triton.xml'}"]
    triton = report.run("tests-triton", triton_tests, 60 if arguments.quick else 180, skip=no_tests)
    cuda_tests = [*pytest, "-k", "cuda", f"--junitxml={out / 'tests-cuda.xml'}"]
    no_cuda = no_tests or missing_cuda(info.data)
    cuda = report.run("tests-cuda", cuda_tests, 60 if arguments.quick else 120, skip=no_cuda)
    run_sanitizer(report, [*pytest, "-k", "sanitizer"], no_cuda, quick=arguments.quick)
    gather = [python, "-m", "tools.gpu_gather", *quick]
    report.run("channel_gather", gather, 60, skip=no_gpu or broken, read=last_json)
    budget = 30 if arguments.quick else 100
    for dtype in ("bfloat16", "float32"):
        study = [python, "-m", "benches.study", "--device", "cuda", "--dtype", dtype, "--budget-seconds", str(budget)]
        study += ["--out", str(out / f"study-{dtype}")]
        wrong = [name for name, tests in (("triton", triton), ("cuda", cuda)) if tests.state != "ok"]
        if wrong:
            study += ["--peers", ",".join(name for name in PEERS if name not in wrong)]
        report.run(f"study-{dtype}", study, 2 * budget + 60, skip=no_gpu or broken)
    # Machine code needs no GPU; it comes last, for the measurements must not lack its time.
    compiled = [python, "-m", "tools.compile_triton", *quick, "--json", str(out / "triton-code.json")]
    no_triton = None if facts.data.get("triton") else "Triton is not installed"
    report.run("triton-code", compiled, 150, skip=no_triton or broken)
    found = bool(find_tool("nvcc")) and bool(find_tool("cuobjdump") or facts.data.get("triton"))
    no_nvcc = None if found else "there is no nvcc or no cuobjdump"
    compiled = [python, "-m", "tools.compile_cuda", *quick, "--json", str(out / "cuda-code.json")]
    report.run("cuda-code", compiled, 150, skip=no_nvcc)

    report.write({"gpu": gpu, "commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z")})
    return int(any(result.state == "failed" for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
