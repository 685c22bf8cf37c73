"""Decides what a build makes: pure functions from facts to a plan, without torch and without side effects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# Flags of one microkernel file, by the suffix after its last underscore.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mavx2",
        "-mprefer-vector-width=512",
        # GCC 12 warns of its own _mm512_undefined_*() wherever one is inlined (GCC bug 105593).
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ),
}
ISA_FLAGS["avx512bf16"] = (*ISA_FLAGS["avx512"], "-mavx512bf16")
# The AVX-512 tiles in AVX2 code, for tests: speed does not matter, compile time does.
ISA_FLAGS["emulated"] = (*ISA_FLAGS["avx2"], "-O1", "-Wno-psabi")
ISA_FLAGS["neon"] = ()
# What each architecture can have, by the names of Python's platform.machine().
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "x86_64": ("avx2", "avx512", "avx512bf16", "emulated"),
    "aarch64": ("neon",),
}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}

# Compute capabilities built by default, with the first nvcc that knows each. Code of 8.0 runs on 8.6 and 8.9, that of
# 10.0 on 10.3, that of 12.0 on 12.1; they have no instruction that the kernels would use besides, and each more would
# cost a fifth of the build. WGMMA needs 9.0a, whose code runs on 9.0 and nowhere else.
DEFAULT_ARCHS: dict[str, tuple[int, int]] = {
    "8.0": (11, 0),
    "9.0a": (12, 0),
    "10.0": (12, 8),
    "12.0": (12, 8),
}
MIN_TORCH = (2, 11)
SANITIZERS = ("address", "undefined")


class BuildError(Exception):
    """What was asked for cannot be built here."""


@dataclass(frozen=True)
class TorchFacts:
    """What the build needs to know of the installed torch."""

    version: str
    include_dirs: tuple[str, ...] = ()
    lib_dir: str = ""
    cuda: str | None = None
    cxx11_abi: bool = True
    openmp_library: str | None = None
    cudart_library: str | None = None


@dataclass(frozen=True)
class PlatformFacts:
    """What the build needs to know of the machine, the interpreter and the compilers."""

    system: str = "Linux"
    machine: str = "x86_64"
    python_tag: str = "cp310"
    python_include: str = ""
    cxx: str = "c++"
    cxx_version: str = ""
    compiled_isas: tuple[str, ...] = tuple(ISA_FLAGS)
    nvcc: str | None = None
    nvcc_version: tuple[int, ...] = ()
    cores: int = 1


# Sources of the library bap_kernels._C_cuda; all others are those of bap_kernels._C.
CUDA_FOLDER = "csrc/backends/cuda/kernels/"
# What a build with sanitizers checks: code that reads and writes memory itself.
CHECKED = ("csrc/ops/", "csrc/dispatch/", "csrc/backends/cpu/", "csrc/plan/", "csrc/backends/aten/pixel_gather.cpp")
# And of these what it takes as it is: tables and bindings, and what stands in for another CPU's instructions.
UNCHECKED = ("csrc/dispatch/choice", "csrc/dispatch/measured", "csrc/dispatch/verdict", "csrc/dispatch/python_hooks")
# Precompiled for the sources that include torch.
PRECOMPILED = "csrc/precompiled.h"


@dataclass(frozen=True)
class Unit:
    """One source file with the flags that only it gets."""

    source: str
    compiler: str = "cxx"
    flags: tuple[str, ...] = ()
    precompiled: tuple[str, ...] | None = None  # flags of the precompiled header that it reads
    reused: bool = False  # not compiled here: the object of the normal build is linked


@dataclass(frozen=True)
class Part:
    """One shared library, or the reason for its absence."""

    name: str
    built: bool
    reason: str
    targets: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    optional: bool = False  # a failure leaves the part out and goes on


@dataclass(frozen=True)
class BuildPlan:
    """Everything that a build does: its parts, where they go, and how many jobs run at once."""

    cpu: Part
    cuda: Part
    build_dir: str
    jobs: int
    cxx: str
    nvcc: str | None = None
    sanitize: tuple[str, ...] = ()
    normal_dir: str = ""  # where the build without sanitizers puts its objects
    notes: tuple[str, ...] = field(default=())

    @property
    def parts(self) -> tuple[Part, Part]:
        """Both parts, the CPU one first."""
        return self.cpu, self.cuda


def version_tuple(text: str) -> tuple[int, ...]:
    """Turns ``"2.11.0a0+git"`` into ``(2, 11, 0)``; versions are compared as tuples, never as text."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(piece) for piece in match.group().split(".")) if match else ()


def cuda_archs(requested: str | None, nvcc_version: Sequence[int]) -> tuple[str, ...]:
    """Compute capabilities to build: ``TORCH_CUDA_ARCH_LIST`` as given, or those of the default that nvcc knows."""
    if requested and requested.strip():
        archs = tuple(re.split(r"[;,\s]+", requested.strip(" ;,")))
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise BuildError(
                    f"setup: expected `TORCH_CUDA_ARCH_LIST` to hold capabilities such as 8.0 or 9.0+PTX, got {arch!r}."
                )
        return archs
    known = [arch for arch, first in DEFAULT_ARCHS.items() if tuple(nvcc_version) >= first]
    # Devices without code of their own compile the PTX of the oldest. That of the newest would ask for a driver as new
    # as nvcc.
    return tuple(arch + "+PTX" * (place == 0) for place, arch in enumerate(known))


def gencode_flags(archs: Sequence[str]) -> tuple[str, ...]:
    """The nvcc flags for a list of capabilities; ``+PTX`` adds code that later devices can compile."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


def decide(env: Mapping[str, str], sources: Sequence[str], torch: TorchFacts, platform: PlatformFacts) -> BuildPlan:
    """Makes the plan of a build from plain facts.

    Args:
        env: the environment; reads ``BAP_KERNELS_WITH_CUDA``, ``BAP_KERNELS_MAX_JOBS``, ``BAP_KERNELS_SANITIZE``,
            ``MAX_JOBS`` and ``TORCH_CUDA_ARCH_LIST``.
        sources: the paths under ``csrc``, relative to the repository.
        torch: facts of the installed torch.
        platform: facts of the machine and its compilers.

    Raises:
        BuildError: torch is too old, a setting is invalid, or CUDA was demanded and is impossible.
    """
    if version_tuple(torch.version) < MIN_TORCH:
        raise BuildError(f"setup: expected torch >= {'.'.join(map(str, MIN_TORCH))}, got {torch.version}.")
    sanitize = _sanitizers(env.get("BAP_KERNELS_SANITIZE", ""))
    normal = f"{platform.python_tag}-torch{torch.version}"
    return BuildPlan(
        cpu=_cpu_part(sources, torch, platform, sanitize),
        cuda=_cuda_part(env, sources, torch, platform, sanitize),
        build_dir=str(PurePosixPath("build", "sanitize" if sanitize else normal)),
        jobs=_jobs(env, platform.cores),
        cxx=platform.cxx,
        nvcc=platform.nvcc,
        sanitize=sanitize,
        normal_dir=str(PurePosixPath("build", normal)),
        notes=_notes(torch, platform, sanitize),
    )


def wheel_version(version: str, torch: TorchFacts, plan: BuildPlan) -> str:
    """The version of a wheel: its local part names what the libraries were built for.

    The CUDA library is named only where it must be there: one that is optional may fail to compile.
    """
    label = f"torch{_minor(torch)}"
    if plan.cuda.built and not plan.cuda.optional:
        label += f".cu{version_tuple(torch.cuda or '')[0]}"
    return f"{version}+{label}"


def wheel_requirements(requirements: Sequence[str], torch: TorchFacts) -> list[str]:
    """A wheel's requirements: the minor version of torch that it was built with; others as they are."""
    pinned = f"torch=={_minor(torch)}.*"
    return [pinned if re.fullmatch(r"torch\b(?!-).*", each) else each for each in requirements]


def _minor(torch: TorchFacts) -> str:
    return ".".join(map(str, version_tuple(torch.version)[:2]))


def banner(plan: BuildPlan) -> str:
    """Text for the screen: what is built, for which instruction sets and devices, and what is not and why."""
    lines = ["bap_kernels build", *(f"  {note}" for note in plan.notes)]
    for part in plan.parts:
        targets = " for " + ", ".join(part.targets) if part.targets else ""
        state = f"built{targets}" if part.built else "NOT built"
        lines.append(f"  {part.name:<8} {state}: {part.reason}")
    lines.append(f"  {plan.jobs} jobs in {plan.build_dir}")
    return "\n".join(lines)


def _notes(torch: TorchFacts, platform: PlatformFacts, sanitize: Sequence[str]) -> tuple[str, ...]:
    notes = [f"torch {torch.version}, {platform.cxx_version or platform.cxx}, {platform.system} {platform.machine}"]
    if sanitize:
        notes.append(f"sanitizers {', '.join(sanitize)}: a library of its own, the normal one stays as it is")
    return tuple(notes)


def _sanitizers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in re.split(r"[,\s]+", text) if name)
    for name in names:
        if name not in SANITIZERS:
            raise BuildError(f"setup: expected `BAP_KERNELS_SANITIZE` to name {' or '.join(SANITIZERS)}, got {name!r}.")
    return names


def _jobs(env: Mapping[str, str], cores: int) -> int:
    text = env.get("BAP_KERNELS_MAX_JOBS") or env.get("MAX_JOBS")
    if not text:
        return max(cores, 1)
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"setup: expected `BAP_KERNELS_MAX_JOBS` to be a positive number, got {text!r}.")
    return int(text)


def _includes(torch: TorchFacts, platform: PlatformFacts) -> tuple[str, ...]:
    # System directories: their warnings are not ours, and they stay out of the dependency files.
    system = (*torch.include_dirs, platform.python_include)
    return ("-Icsrc", *(flag for directory in system if directory for flag in ("-isystem", directory)))


def _cpu_part(sources: Sequence[str], torch: TorchFacts, platform: PlatformFacts, sanitize: Sequence[str]) -> Part:
    machine = platform.machine.lower()
    possible = ARCHITECTURES.get(_ALIASES.get(machine, machine), ())
    isas = tuple(isa for isa in possible if isa in platform.compiled_isas)
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer"] if sanitize else ["-O3", "-g0"]
    flags += ["-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}"]
    flags += [f"-DBAP_KERNELS_HAVE_{isa.upper()}=1" for isa in isas]
    # Undefined behaviour must end the run; vptr checks would need the type information of torch's hidden classes.
    checks = (f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-fno-sanitize=vptr") if sanitize else ()
    facts = (
        f'-DBAP_KERNELS_BUILD_FLAGS="{" ".join((*flags, *checks))}"',
        f'-DBAP_KERNELS_BUILD_ISAS="{",".join(isas)}"',
        f'-DBAP_KERNELS_BUILD_COMPILER="{platform.cxx_version}"',
        f'-DBAP_KERNELS_BUILD_TORCH="{torch.version}"',
    )
    missing = [isa for isa in possible if isa not in isas]
    reason = "always built"
    if missing:
        reason += f"; the compiler lacks {', '.join(missing)}, ATen stands in"
    elif not possible:
        reason += f"; no kernels for {platform.machine}, ATen stands in"
    libraries = ("c10", "torch", "torch_cpu", "torch_python")
    link = [*checks, f"-L{torch.lib_dir}", *(f"-l{library}" for library in libraries)]
    # The runtime that torch has loaded, by its own file: a second OpenMP in one process would have its own threads.
    link.append(torch.openmp_library or "-fopenmp")
    return Part(
        "_C",
        True,
        reason,
        isas or ("none",),
        _cpu_units(sources, isas, facts, checks, "clang" not in platform.cxx_version.lower()),
        (*flags, *_includes(torch, platform)),
        tuple(link),
    )


def _cpu_units(
    sources: Sequence[str], isas: Sequence[str], facts: tuple[str, ...], checks: tuple[str, ...], is_gcc: bool
) -> tuple[Unit, ...]:
    units = []
    for source in sources:
        path = PurePosixPath(source)
        if path.suffix != ".cpp" or source.startswith(CUDA_FOLDER):
            continue
        flags = facts if source == "csrc/module.cpp" else ()
        if path.parent.name == "microkernels":
            isa = path.stem.rpartition("_")[2]
            if isa not in ISA_FLAGS:
                raise BuildError(f"setup: expected a microkernel to end in _{', _'.join(ISA_FLAGS)}, got {source}.")
            if isa not in isas:
                continue
            flags = ISA_FLAGS[isa]
        # The registrations hold no memory of their own, and their templates take minutes to compile with checks.
        is_checked = source.startswith(CHECKED) and not source.startswith(UNCHECKED)
        own_checks = checks if is_checked and not path.stem.endswith("_emulated") else ()
        reused = bool(checks) and not own_checks and flags is not facts
        includes_torch = path.parent.name != "microkernels"
        # Worth it where many sources share it.
        precompiled = own_checks if is_gcc and includes_torch and own_checks == checks else None
        units.append(Unit(source, flags=(*flags, *own_checks), precompiled=precompiled, reused=reused))
    return tuple(units)


def _cuda_part(
    env: Mapping[str, str],
    sources: Sequence[str],
    torch: TorchFacts,
    platform: PlatformFacts,
    sanitize: Sequence[str],
) -> Part:
    wish = env.get("BAP_KERNELS_WITH_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise BuildError(f"setup: expected `BAP_KERNELS_WITH_CUDA` to be 0, 1 or auto, got {wish!r}.")
    units = tuple(
        Unit(source, compiler="nvcc")
        for source in sources
        if source.startswith(CUDA_FOLDER) and source.endswith((".cu", ".cpp"))
    )
    obstacle = _cuda_obstacle(units, torch, platform, sanitize)
    if wish == "0":
        return Part("_C_cuda", False, "BAP_KERNELS_WITH_CUDA=0")
    if obstacle:
        if wish == "1":
            raise BuildError(f"setup: expected CUDA to be possible with `BAP_KERNELS_WITH_CUDA=1`, got: {obstacle}.")
        return Part("_C_cuda", False, obstacle)
    archs = cuda_archs(env.get("TORCH_CUDA_ARCH_LIST"), platform.nvcc_version)
    flags: tuple[str, ...] = (
        "-O3",
        "-std=c++20",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        "--threads=1",
    )
    return Part(
        "_C_cuda",
        True,
        f"nvcc {'.'.join(map(str, platform.nvcc_version))}, torch with CUDA {torch.cuda}",
        tuple(f"sm_{arch.replace('.', '')}" for arch in archs),
        units,
        (*flags, *gencode_flags(archs), "-Icsrc", "-isystem", platform.python_include),
        (torch.cudart_library or "-lcudart",),
        optional=wish == "auto",
    )


def _cuda_obstacle(
    units: Sequence[Unit], torch: TorchFacts, platform: PlatformFacts, sanitize: Sequence[str]
) -> str | None:
    if sanitize:
        return "the sanitizer build has the CPU part only"
    if not units:
        return "no CUDA sources in this version"
    if torch.cuda is None:
        return f"torch {torch.version} is not a CUDA build"
    if platform.nvcc is None:
        return "nvcc was not found on PATH or under CUDA_HOME"
    if platform.nvcc_version[:1] != version_tuple(torch.cuda)[:1]:
        found = ".".join(map(str, platform.nvcc_version))
        return f"nvcc {found} and torch's CUDA {torch.cuda} differ in their major version"
    return None
