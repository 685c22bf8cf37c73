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
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, it finds the package `tools`, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.gpu_parts import ROOT, Part, Report
from tools.gpu_verdicts import not_verified, read_verdicts, summary_of, verdict_table

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


def run_verifier(report: Report, name: str, options: list[str], limit_s: float, skip: str | None) -> None:
    """Has families verified, each of which is kept at once; what the time limit leaves is left to a later part."""

    def read(text: str) -> dict[str, Any]:
        return {"verdicts": summary_of(read_verdicts(report.out))}

    # Status 1: a family is not ok, which is a result.
    command = [sys.executable, "-m", "bap_kernels.verify", *options]
    report.run(Part(name, command, limit_s, skip, read, statuses=(0, 1), again=True))


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
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
