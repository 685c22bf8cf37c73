"""Peak FLOP/s and copy bandwidth of this machine, and the versions that results depend on."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benches.problem import cache_bytes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "triton", "onnxruntime", "openvino", "bap_kernels")


@dataclass(frozen=True)
class Roofline:
    """Peaks of this machine on the threads of the study.

    Args:
        matmul_flop_per_s: Of the fastest of several matrix products.
        register_flop_per_s: Of multiply-adds in registers; None without a compiler or on a GPU.
        bytes_per_s: Read plus written by copies of tensors far larger than the cache.
    """

    matmul_flop_per_s: float
    register_flop_per_s: float | None
    bytes_per_s: float

    @property
    def flop_per_s(self) -> float:
        """The higher of the two peaks."""
        return max(self.matmul_flop_per_s, self.register_flop_per_s or 0.0)

    def seconds(self, flop: float, moved: float) -> float:
        """Least time for some work, bound by computation or by memory."""
        return max(flop / self.flop_per_s, moved / self.bytes_per_s)


def best_rate(amount: float, run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Highest amount per second over the runs within ``seconds``, after a warm-up."""
    run()
    shortest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - start)
    return amount / shortest


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of square matrix products: the best of several sizes, as far as time allows."""
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (2048, 8192):
        flop = 2.0 * size**3
        # Emulated types are slower by orders of magnitude.
        if best and 3 * flop / best > seconds:
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, best_rate(flop, partial(torch.matmul, a, b), device, seconds / 3))
    return best


def register_rate(threads: int, seconds: float) -> float | None:
    """float32 FLOP/s of multiply-adds in registers on all threads; None without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma_peak.so"
        source = Path(__file__).with_name("fma_peak.cpp")
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(path), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        run = ctypes.CDLL(str(path)).fma_peak
    run.restype = ctypes.c_double
    run.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    steps = 2_000_000
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            sinks = [(ctypes.c_float * 16)() for _ in range(threads)]
            start = time.perf_counter()
            flop = sum(pool.map(lambda sink: run(steps, sink), sinks))
            best = max(best, flop / (time.perf_counter() - start))
    return best


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes per second, read plus written, of copying tensors eight times the cache."""
    numel = min(8 * cache_bytes(device), 1 << 30) // 4
    source, target = (torch.ones(numel, device=device) for _ in range(2))
    return best_rate(8.0 * numel, lambda: target.copy_(source), device, seconds)


def measure_roofline(dtype: torch.dtype, device: torch.device, seconds: float = 3.0) -> Roofline:
    """Measure the peaks on the current number of threads."""
    registers = None
    if device.type == "cpu" and dtype == torch.float32:
        registers = register_rate(torch.get_num_threads(), seconds / 3)
    return Roofline(matmul_rate(dtype, device, seconds / 3), registers, copy_rate(device, seconds / 3))


def cpu_model() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Commit of the checkout, with ``+`` if tracked files differ; ``unknown`` outside a repository."""

    def git(*arguments: str) -> str:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return process.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def _busy_ticks(stat: str) -> int:
    """Clock ticks that the cores of a machine have worked, of the text of /proc/stat; guests are counted as users."""
    user, nice, system, _, _, irq, softirq, *_ = (int(field) for field in stat.split("\n", 1)[0].split()[1:])
    return user + nice + system + irq + softirq


def busy_cores(seconds: float = 1.0, stat: Path = Path("/proc/stat")) -> float | None:
    """How many cores other processes keep busy while this one sleeps; None where the system does not say."""
    try:
        before, start = _busy_ticks(stat.read_text()), time.monotonic()
        time.sleep(seconds)
        ticks, passed = _busy_ticks(stat.read_text()) - before, time.monotonic() - start
    except (OSError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK") / passed


def describe(device: torch.device, dtype: str, roofline: Roofline, build: dict[str, str], isa: str) -> dict[str, Any]:
    """Return the header of a study: machine and versions.

    Rows of two runs may only share a file if their ``environment`` is equal.
    """
    environment = {
        "commit": commit(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "pytorch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }
    if device.type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(device)
    return {
        "environment": environment,
        "cores": os.cpu_count(),
        "busy_cores": busy_cores(),
        "cache_bytes": cache_bytes(device),
        "system": platform.platform(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "dtype": dtype,
        "roofline": {**asdict(roofline), "flop_per_s": roofline.flop_per_s},
        "build": build,
    }
