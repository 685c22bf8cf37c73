"""Everything that a machine with a GPU can tell, in one command: build, verdicts on the kernels, benches, tests.

    python tools/gpu_report.py --out DIR [--quick] [--page docs/benchmarks/gpu.md]

Needs no network. What says most comes first: the verdicts on the kernels of plain inference and a table of their speed
are there within four minutes (``--quick`` stops then), everything within twelve. Each part runs in its own process
under a time limit, so that one that fails or hangs does not take the others with it; without a GPU the parts that need
one are reported as skipped. What is done is in DIR at any moment: report.json, report.md, the verdicts (cache), the
studies' reports and plots, and one log for each part. The same command goes on where it was stopped. ``--page`` writes
the page of the documentation.
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
import threading
import time
from collections import Counter
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
        statuses: exit statuses of a part that has done its work.
        again: whether it runs anew where an earlier report has it.
    """

    name: str
    command: list[str]
    limit_s: float
    skip: str | None = None
    read: Callable[[str], dict[str, Any]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = (0,)
    again: bool = False


class Report:
    """Runs parts one after the other within a common budget of time and collects their results.

    Args:
        environment: variables that every part gets.
    """

    def __init__(self, out: Path, budget_s: float, environment: dict[str, str] | None = None) -> None:
        self.out = out
        self.deadline = time.monotonic() + budget_s
        self.environment = environment or {}
        self.head: dict[str, Any] = {}
        self.results: list[Result] = []
        self.earlier: dict[str, Result] = {}
        self._writing = threading.Lock()

    def load_earlier(self) -> dict[str, Any]:
        """Takes over what an earlier run into the same folder has done; returns the facts that it holds for."""
        try:
            content = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
            self.earlier = {each["part"]: Result(**each) for each in content["parts"] if each["state"] == "ok"}
            return content
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def run(self, part: Part) -> Result:
        """Runs one part."""
        return self.run_together([part])[0]

    def run_together(self, parts: Sequence[Part]) -> list[Result]:
        """Runs parts side by side, from the repository; their results stand in the order of the parts."""
        results = []
        for part in parts:
            kept = None if part.again else self.earlier.get(part.name)
            results.append(kept or Result(part.name, "skipped", part.skip or "not reached"))
        self.results += results
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(self._run, parts, results))
        return results

    def _run(self, part: Part, result: Result) -> None:
        if result.state == "ok":
            print(f"{result.part}: ok, in an earlier run", flush=True)
            return
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
        self.write()
        print(f"{result.part}: {result.state} {result.reason}", flush=True)

    def _execute(self, result: Result, part: Part, limit_s: float) -> None:
        log = self.out / f"{result.part}.log"
        environment = {**part.environment, **os.environ, **self.environment}
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
        if status in part.statuses:
            result.state, result.reason = "ok", ""
            result.data = part.read(text) if part.read else {"last_line": lines[-1] if lines else ""}
        else:
            result.state = "failed"
            result.reason = f"status {status}: {lines[-1][:200] if lines else 'no output'}, see {log.name}"

    def table(self) -> str:
        """What became of each part, as Markdown."""
        lines = ["| part | state | seconds | remarks |", "|---|---|---|---|"]
        for result in self.results:
            remarks = result.reason or "; ".join(f"{key}: {value}" for key, value in result.data.items())
            remarks = remarks if len(remarks) <= 300 else remarks[:297] + "..."
            lines.append(f"| {result.part} | {result.state} | {result.seconds} | {remarks.replace('|', '/')} |")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Writes report.json and report.md, each as a whole."""
        with self._writing:
            # What was done earlier and comes later in this run is not lost if it is killed before.
            names = {result.part for result in self.results}
            kept = [result for name, result in self.earlier.items() if name not in names]
            content = {**self.head, "parts": [asdict(result) for result in (*self.results, *kept)]}
            self._replace("report.json", json.dumps(content, indent=2) + "\n")
            self._replace("report.md", self._markdown())

    def _replace(self, name: str, text: str) -> None:
        path = self.out / f"{name}.new"
        path.write_text(text, encoding="utf-8")
        path.replace(self.out / name)

    def _markdown(self) -> str:
        facts = "\n".join(f"- {key}: {value}" for key, value in self.head.items())
        markdown = f"# GPU report\n\n{facts}\n\n{self.table()}"
        verdicts = read_verdicts(self.out)
        if verdicts:
            markdown += f"\n## Verdicts on the kernels\n\n{verdict_table(verdicts)}"
        networks = self.out / "networks.md"
        if networks.exists():
            markdown += "\n## Networks, mixed batches, training\n\n" + networks.read_text(encoding="utf-8")
        for study in sorted([*self.out.glob("study-*/report.md"), *self.out.glob("training/report.md")]):
            markdown += f"\n[{study.parent.name}]({study.relative_to(self.out)})\n"
        return markdown


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
    states = dict(re.findall(r"^  (\w+) +(.+)$", text, flags=re.MULTILINE))
    return {name: states.get(name, "not listed") for name in ("triton", "cuda")}


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


def read_verdicts(out: Path) -> dict[str, dict[str, Any]]:
    """The verdicts by family that the verifier has left in the report's cache, of the build that it saw last."""
    try:
        content = json.loads((out / "cache/verdicts-v1.json").read_text(encoding="utf-8"))
        return content["devices"][-1]["families"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def verdict_table(verdicts: dict[str, dict[str, Any]]) -> str:
    """Verdicts as Markdown: kernels by math modes, then the reasons of those that are not ok.

    Examples:
        >>> from tools.gpu_report import verdict_table
        >>> found = {"cuda/halo/tf32": {"verdict": "ok"}, "cuda/pack/tf32": {"verdict": "hang", "reason": "no end"}}
        >>> print(verdict_table(found))
        | kernel | tf32 |
        |---|---|
        | cuda/halo | ok |
        | cuda/pack | hang |
        <BLANKLINE>
        - cuda/pack/tf32: hang, no end
        <BLANKLINE>
    """
    maths = list(dict.fromkeys(family.rpartition("/")[2] for family in verdicts))
    kernels = list(dict.fromkeys(family.rpartition("/")[0] for family in verdicts))
    lines = [f"| kernel | {' | '.join(maths)} |", f"|---|{'---|' * len(maths)}"]
    for kernel in kernels:
        cells = [verdicts.get(f"{kernel}/{math}", {}).get("verdict", "–") for math in maths]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    left_out = [(name, each) for name, each in verdicts.items() if each["verdict"] != "ok"]
    lines += ["", *(f"- {name}: {each['verdict']}, {each['reason'].replace('|', '/')}" for name, each in left_out)]
    return "\n".join(lines) + "\n"


def not_verified(verdicts: dict[str, dict[str, Any]], math: str) -> list[str]:
    """Backends that must not be named in a bench of a math mode: a family of theirs is not ok there, or has no verdict.

    Examples:
        >>> from tools.gpu_report import not_verified
        >>> not_verified({"cuda/halo/tf32": {"verdict": "ok"}, "triton/pack/tf32": {"verdict": "hang"}}, "tf32")
        ['triton']
        >>> not_verified({}, "tf32")
        ['triton', 'cuda']
    """
    unverified = []
    for backend in ("triton", "cuda"):
        own = [each for name, each in verdicts.items() if name.startswith(f"{backend}/") and name.endswith(f"/{math}")]
        if not own or any(each["verdict"] != "ok" for each in own):
            unverified.append(backend)
    return unverified


def run_verifier(report: Report, name: str, options: list[str], limit_s: float, skip: str | None) -> None:
    """Has families verified, each of which is kept at once; what the time limit leaves is left to a later part."""

    def read(text: str) -> dict[str, Any]:
        return {"verdicts": summary_of(read_verdicts(report.out))}

    # Status 1: a family is not ok, which is a result.
    command = [sys.executable, "-m", "bap_kernels.verify", *options]
    report.run(Part(name, command, limit_s, skip, read, statuses=(0, 1), again=True))


def summary_of(verdicts: dict[str, dict[str, Any]]) -> str:
    """How many families have which verdict."""
    counts = Counter(each["verdict"] for each in verdicts.values())
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def run_tests(report: Report, skip: str | None, limit_s: float) -> None:
    """The tests on a GPU, each part a share of them."""
    processes = max(1, min(4, (os.cpu_count() or 1) // 4))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", "not sanitizer"]
    parts = []
    for i in range(1, processes + 1):
        name = f"tests-{i}"
        own = ["--part", f"{i}/{processes}", f"--junitxml={report.out / name}.xml"]
        parts.append(Part(name, [*command, *own], limit_s, skip))
    report.run_together(parts)


def run_sanitizer(report: Report, skip: str | None) -> None:
    """The tests of small cases under compute-sanitizer: memory first, then races in shared memory."""
    tool = find_tool("compute-sanitizer")
    skip = skip or (None if tool else "compute-sanitizer is not installed")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", "sanitizer"]
    for check in ("memcheck", "racecheck"):
        command = [tool or "", "--tool", check, "--error-exitcode", "1", *tests]
        # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        report.run(Part(f"sanitizer-{check}", command, 40, skip, environment=alone))


def run_study(
    report: Report, name: str, dtype: str, seconds: int, skip: str | None, options: Sequence[str] = ()
) -> None:
    """The study of layers and networks; a backend that is not verified for the dtype is left out."""
    wrong = not_verified(read_verdicts(report.out), {"float32": "tf32"}.get(dtype, dtype))
    command = [sys.executable, "-m", "benches.study", "--device", "cuda", "--dtype", dtype]
    command += ["--budget-seconds", str(seconds), "--out", str(report.out / name), *options]
    command += ["--variants", ",".join(each for each in IMPLEMENTATIONS if each not in wrong)] if wrong else []
    report.run(Part(name, command, 2 * seconds + 30, skip))


def run_benches(report: Report, skip: str | None) -> None:
    """Everything that is timed, one after the other."""
    python, out = sys.executable, report.out
    run_study(report, "study-bfloat16", "bfloat16", 45, skip)
    wrong = not_verified(read_verdicts(out), "bfloat16")
    networks = [python, "-m", "tools.gpu_networks", "--budget-seconds", "45", "--without", ",".join(wrong)]
    networks += ["--json", str(out / "networks.json"), "--markdown", str(out / "networks.md")]
    report.run(Part("networks", networks, 100, skip, last_json))
    overhead = [python, "-m", "tools.launch_overhead", "--device", "cuda"]
    report.run(Part("launch-overhead", overhead, 40, skip, last_json))
    training = [python, "-m", "benches.training", "--steps", "--device", "cuda"]
    training += ["--budget-seconds", "45", "--out", str(out / "training")]
    report.run(Part("training-steps", training, 100, skip))
    run_study(report, "study-float32", "float32", 20, skip)


def section(text: str, title: str) -> str:
    r"""The body of a section of a Markdown file; empty where there is none.

    Examples:
        >>> from tools.gpu_report import section
        >>> section("# A\n\n## B\n\none\n\n## C\n\ntwo\n", "B")
        'one'
    """
    body = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    return body[1].strip() if body else ""


def page_of(report: Report) -> str:
    """The documentation's page of a GPU's results."""
    names = ("gpu", "driver", "torch", "cuda", "triton", "commit", "date")
    facts = "\n".join(f"| {name} | {report.head[name]} |" for name in names if report.head.get(name))
    verdicts = read_verdicts(report.out)
    parts = [
        "# Results on a GPU\n\nWritten by `tools/gpu_report.py`; what the verdicts mean: [](../guide/gpu.md).",
        f"| | |\n|---|---|\n{facts}",
        f"## Verdicts on the kernels\n\n{verdict_table(verdicts)}" if verdicts else "",
    ]
    for study in sorted(report.out.glob("study-*/report.md")):
        text = study.read_text(encoding="utf-8")
        for title in ("Speed-up of single layers", "Whole networks"):
            body = section(text, title)
            if body:
                parts.append(f"## {title}: {study.parent.name}\n\n{body}")
    networks = report.out / "networks.md"
    if networks.exists():
        parts.append(f"## Plans, mixed batches, training\n\n{networks.read_text(encoding='utf-8').strip()}")
    parts.append(f"## What ran\n\n{report.table()}")
    # Plots stay in the report's folder.
    return re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", "\n\n".join(filter(None, parts))).strip() + "\n"


def run_everything(report: Report, quick: bool) -> None:
    """All parts, what says most first."""
    python, out = sys.executable, report.out
    before = report.load_earlier()
    facts = report.run(Part("machine", [python, "-c", FACTS], 60, read=last_json, again=True))
    gpu = facts.data.get("gpu")
    names = ("gpu", "torch", "cuda", "triton")
    report.head |= {name: facts.data.get(name) for name in names}
    if any(before.get(name) != report.head[name] for name in ("gpu", "commit")):
        report.earlier = {}
    no_gpu = None if gpu else "no CUDA device here" if facts.state == "ok" else "torch does not run here"
    smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    driver = report.run(Part("driver", smi, 20, no_gpu, again=True))
    report.head["driver"] = driver.data.get("last_line")
    capability = facts.data.get("capability")
    # The machine's own architecture alone: the others take their time to compile.
    own = {"TORCH_CUDA_ARCH_LIST": own_architecture(*capability)} if capability else {}
    build = [python, "setup.py", "build_ext", "--inplace"]
    built = report.run(Part("build", build, 240, built_already(), environment=own, again=True))
    info = report.run(Part("info", [python, "-m", "bap_kernels.info"], 60, read=backends_of, again=True))
    broken = None if info.state == "ok" else f"bap_kernels does not load (build: {built.state})"
    skip = no_gpu or broken
    no_cuda = skip or missing("cuda", info.data)

    run_verifier(report, "verify-main", ["--family", "main"], 90, skip)
    first = ["--batch", "8", "--density", "0.5", "--lists", "in", "--layout", "channels_last"]
    run_study(report, "study-first", "bfloat16", 25, skip, first)
    if quick:
        return
    run_verifier(report, "verify-all", [], 150, skip)
    run_benches(report, skip)
    run_tests(report, skip, 60)
    run_sanitizer(report, no_cuda)
    # Machine code needs no GPU; it comes last, for the measurements must not lack its time.
    compiled = [python, "-m", "tools.compile_triton", "--quick", "--json", str(out / "triton-code.json")]
    absent = None if facts.data.get("triton") else "Triton is not installed"
    report.run(Part("triton-code", compiled, 150, absent or broken))
    has_tools = bool(find_tool("nvcc")) and bool(find_tool("cuobjdump") or facts.data.get("triton"))
    no_nvcc = None if has_tools else "there is no nvcc or no cuobjdump"
    compiled = [python, "-m", "tools.compile_cuda", "--quick", "--json", str(out / "cuda-code.json")]
    report.run(Part("cuda-code", compiled, 150, no_nvcc))


def main() -> int:
    """Runs all parts; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_report", help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="only what is there within four minutes")
    parser.add_argument("--restart", action="store_true", help="run again what an earlier run has done")
    parser.add_argument("--page", type=Path, help="also write the page of the documentation, where there is a GPU")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.restart:
        (out / "report.json").unlink(missing_ok=True)
    # Verdicts and choices of this report alone; nothing is verified beside what is timed.
    environment = {"BAP_KERNELS_CACHE_DIR": str(out / "cache"), "BAP_KERNELS_VERIFY": "0"}
    report = Report(out, 235 if arguments.quick else 710, environment)
    report.head = {"commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    run_everything(report, arguments.quick)
    report.write()
    print("\n" + report.table())
    if arguments.page and report.head.get("gpu"):
        arguments.page.write_text(page_of(report), encoding="utf-8")
        print(f"page: {arguments.page}")
    elif arguments.page:
        print(f"page: {arguments.page} is left as it is, without a GPU there is nothing to write")
    return int(any(result.state == "failed" for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
