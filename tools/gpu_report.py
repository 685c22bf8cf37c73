"""Everything that a machine with a GPU can tell, in one command: build, GPU tests, kernels, benches.

    python tools/gpu_report.py --out DIR [--quick]

Needs no network. Each part runs in its own process under a time limit, so that one that fails or hangs does not take
the others with it; without a GPU the parts that need one are reported as skipped. The tests run side by side, before
anything is timed. Leaves report.json, report.md, the studies' reports and plots, and one log for each part in DIR, and
prints a short table last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPLEMENTATIONS = ("dense", "masked", "naive", "best", "oracle", "auto", "aten", "triton", "cuda")
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


@dataclass
class Part:
    """A command of the report.

    Args:
        skip: why it cannot run here; None if it can.
        read: turns its output into data for the report.
        environment: variables that it gets where the user has not set them.
    """

    name: str
    command: list[str]
    limit_s: float
    skip: str | None = None
    read: Callable[[str], dict[str, Any]] | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Report:
    """Runs parts one after the other within a common budget of time and collects their results."""

    def __init__(self, out: Path, budget_s: float) -> None:
        self.out = out
        self.deadline = time.monotonic() + budget_s
        self.results: list[Result] = []

    def run(self, part: Part) -> Result:
        """Runs one part."""
        return self.run_together([part])[0]

    def run_together(self, parts: Sequence[Part]) -> list[Result]:
        """Runs parts side by side, from the repository; their results stand in the order of the parts."""
        results = [Result(part.name, "skipped", part.skip or "") for part in parts]
        self.results += results
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(self._run, parts, results))
        return results

    def _run(self, part: Part, result: Result) -> None:
        limit_s = min(part.limit_s, self.deadline - time.monotonic())
        if part.skip is None and limit_s < 5:
            result.reason = "no time was left for it"
        elif part.skip is None:
            start = time.monotonic()
            try:
                self._execute(result, part, limit_s)
            except (OSError, ValueError) as error:
                result.state, result.reason = "failed", f"{type(error).__name__}: {error}"
            result.seconds = round(time.monotonic() - start, 1)
        print(f"{result.part}: {result.state} {result.reason}", flush=True)

    def _execute(self, result: Result, part: Part, limit_s: float) -> None:
        log = self.out / f"{result.part}.log"
        environment = {**part.environment, **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        with log.open("w", encoding="utf-8") as stream:
            # A session of its own: what a command has started must not run on beside the parts that follow.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                result.state, result.reason = "failed", f"ran past {limit_s:.0f} s, see {log.name}"
                return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if status == 0:
            result.state = "ok"
            result.data = part.read(text) if part.read else {"last_line": lines[-1] if lines else ""}
        else:
            result.state = "failed"
            result.reason = f"status {status}: {lines[-1][:200] if lines else 'no output'}, see {log.name}"

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
        networks = self.out / "networks.md"
        if networks.exists():
            markdown += "\n## Networks, mixed batches, training\n\n" + networks.read_text(encoding="utf-8")
        for study in sorted([*self.out.glob("study-*/report.md"), *self.out.glob("training/report.md")]):
            markdown += f"\n[{study.parent.name}]({study.relative_to(self.out)})\n"
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


def backends_of(text: str) -> dict[str, Any]:
    """What bap_kernels.info says of the GPU's backends: they stand indented, unlike the versions above them."""
    found = dict(re.findall(r"^  (\w+) +(.+)$", text, flags=re.MULTILINE))
    return {name: found.get(name, "not listed") for name in ("triton", "cuda")}


def missing(backend: str, info: dict[str, Any]) -> str | None:
    """Why a backend's kernels cannot be tested; None if they can."""
    state = info.get(backend, "bap_kernels does not load")
    return None if state == "can run" else f"backend {backend}: {state}"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or where the toolkit usually is."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def own_architecture(major: int, minor: int) -> str:
    """The name that a build has for a device's architecture.

    Examples:
        >>> from tools.gpu_report import own_architecture
        >>> own_architecture(8, 0), own_architecture(9, 0)
        ('8.0', '9.0a')
    """
    # The products of warpgroups belong to 9.0a, which is 9.0 and what no other device has.
    return f"{major}.{minor}" + "a" * ((major, minor) == (9, 0))


def built_already() -> str | None:
    """Why nothing has to be compiled: the libraries are younger than all that they are made of."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += [ROOT / "setup.py", ROOT / "tools/build_plan.py", ROOT / "tools/ninja_build.py"]
    libraries = [path for pattern in ("_C.*.so", "_C_cuda.*.so") for path in (ROOT / "bap_kernels").glob(pattern)]
    wanted = 2 if find_tool("nvcc") else 1
    if len(libraries) < wanted or min(p.stat().st_mtime for p in libraries) < max(p.stat().st_mtime for p in sources):
        return None
    return "the libraries are younger than their sources"


def test_parts(out: Path, backend: str, skip: str | None, quick: bool, processes: int) -> list[Part]:
    """The GPU tests of a backend, those that decide about its benches first; "" stands for PyTorch's own ways."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    chosen = {"": "not triton and not cuda", "triton": "triton and not cuda", "cuda": "cuda and not sanitizer"}[backend]
    name = f"tests-{backend}" if backend else "tests"
    limit_s = 60 if quick else 150
    if not backend:
        return [Part(name, [*command, "-k", chosen, f"--junitxml={out / name}.xml"], limit_s, skip)]
    decisive = "(large_tiles or blocks)" if quick else "(kernels_and_layouts or large_tiles or blocks)"
    kinds = {"gate": decisive} if quick else {"gate": decisive, "rest": f"not {decisive}"}
    parts = []
    for kind, which in kinds.items():
        for i in range(1, processes + 1):
            one = f"{name}-{kind}" + (f"-{i}" if processes > 1 else "")
            keywords = ["-k", f"{chosen} and {which}", "--part", f"{i}/{processes}", f"--junitxml={out / one}.xml"]
            parts.append(Part(one, [*command, *keywords], limit_s, skip))
    return parts


def run_tests(report: Report, skip: str | None, no_triton: str | None, no_cuda: str | None, quick: bool) -> list[str]:
    """Runs the GPU tests side by side; returns the backends whose forward is wrong."""
    # Of Triton each case is a compilation.
    processes = max(1, min(4, (os.cpu_count() or 1) // 4))
    parts = [
        *test_parts(report.out, "triton", no_triton, quick, processes),
        *test_parts(report.out, "cuda", no_cuda, quick, 1),
        *test_parts(report.out, "", skip, quick, 1),
    ]
    results = report.run_together(parts)
    gates = [result for result in results if "-gate" in result.part]
    return sorted({result.part.split("-")[1] for result in gates if result.state != "ok"})


def run_sanitizer(report: Report, skip: str | None, quick: bool) -> None:
    """The tests of small cases under compute-sanitizer: memory first, then races in shared memory."""
    tool = find_tool("compute-sanitizer")
    skip = skip or (None if tool else "compute-sanitizer is not installed")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", "sanitizer"]
    for check in ("memcheck",) if quick else ("memcheck", "racecheck"):
        command = [tool or "", "--tool", check, "--error-exitcode", "1", *tests]
        # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        report.run(Part(f"sanitizer-{check}", command, 60, skip, environment=alone))


def run_benches(report: Report, skip: str | None, wrong: Sequence[str], quick: bool) -> None:
    """Everything that is timed, one after the other."""
    python, out = sys.executable, report.out
    short = ["--quick"] if quick else []
    budget = 20 if quick else 60
    variants = ["--variants", ",".join(name for name in IMPLEMENTATIONS if name not in wrong)] if wrong else []

    def study(dtype: str, seconds: int) -> None:
        command = [
            python,
            "-m",
            "benches.study",
            "--device",
            "cuda",
            "--dtype",
            dtype,
            "--budget-seconds",
            str(seconds),
        ]
        command += ["--out", str(out / f"study-{dtype}"), *variants]
        report.run(Part(f"study-{dtype}", command, 2 * seconds + 40, skip))

    study("bfloat16", budget)
    networks = [python, "-m", "tools.gpu_networks", *short, "--budget-seconds", str(budget)]
    networks += ["--json", str(out / "networks.json"), "--markdown", str(out / "networks.md")]
    report.run(Part("networks", networks, 2 * budget + 20, skip, last_json))
    overhead = [python, "-m", "tools.launch_overhead", "--device", "cuda"]
    report.run(Part("launch-overhead", overhead, 40, skip, last_json))
    training = [python, "-m", "benches.training", "--steps", "--device", "cuda"]
    training += ["--budget-seconds", str(budget), "--out", str(out / "training")]
    few = ["--density", "0.5", "--layout", "channels_last", "--no-peaks"] if quick else []
    report.run(Part("training-steps", [*training, *few], 2 * budget + 20, skip))
    study("float32", budget // 2)


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

    facts = report.run(Part("machine", [python, "-c", FACTS], 60, read=last_json))
    gpu = facts.data.get("gpu")
    no_gpu = None if gpu else "no CUDA device here" if facts.state == "ok" else "torch does not run here"
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    report.run(Part("driver", smi, 20, no_gpu))
    capability = facts.data.get("capability")
    # The machine's own architecture alone: the others take their time to compile.
    own = {"TORCH_CUDA_ARCH_LIST": own_architecture(*capability)} if capability else {}
    build = [python, "setup.py", "build_ext", "--inplace"]
    built = report.run(Part("build", build, 90 if arguments.quick else 240, built_already(), environment=own))
    info = report.run(Part("info", [python, "-m", "bap_kernels.info"], 60, read=backends_of))
    broken = None if info.state == "ok" else f"bap_kernels does not load (build: {built.state})"

    no_kernels = no_gpu or broken
    no_triton, no_cuda = (no_kernels or missing(name, info.data) for name in ("triton", "cuda"))
    wrong = run_tests(report, no_kernels, no_triton, no_cuda, arguments.quick)
    run_benches(report, no_kernels, wrong, arguments.quick)
    run_sanitizer(report, no_cuda, arguments.quick)
    # Machine code needs no GPU; it comes last, for the measurements must not lack its time.
    compiled = [python, "-m", "tools.compile_triton", *quick, "--json", str(out / "triton-code.json")]
    absent = None if facts.data.get("triton") else "Triton is not installed"
    report.run(Part("triton-code", compiled, 150, absent or broken))
    found = bool(find_tool("nvcc")) and bool(find_tool("cuobjdump") or facts.data.get("triton"))
    no_nvcc = None if found else "there is no nvcc or no cuobjdump"
    compiled = [python, "-m", "tools.compile_cuda", *quick, "--json", str(out / "cuda-code.json")]
    report.run(Part("cuda-code", compiled, 150, no_nvcc))

    report.write({"gpu": gpu, "commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z")})
    return int(any(result.state == "failed" for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
