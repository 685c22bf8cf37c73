"""The decisions of the build from descriptions of torch and the machine; nothing is compiled."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tools.build_plan import (
    ARCHITECTURES,
    ISA_FLAGS,
    BuildError,
    BuildPlan,
    PlatformFacts,
    TorchFacts,
    banner,
    cuda_archs,
    decide,
    gencode_flags,
    version_tuple,
    wheel_requirements,
    wheel_version,
)
from tools.ninja_build import ninja_text

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "csrc/backends/cpu/conv_kernel.cpp",
    *(f"csrc/backends/cpu/microkernels/tile_{isa}.cpp" for isa in ISA_FLAGS),
    "csrc/module.cpp",
]
CUDA_SOURCES = ["csrc/backends/cuda/kernels/gather.cpp", "csrc/backends/cuda/kernels/gather_kernel.cu"]
TORCH = TorchFacts("2.15.0+cu130", ("/torch/include",), "/torch/lib", "13.0", True, "/torch/lib/libgomp.so.1")
PLATFORM = PlatformFacts(python_include="/py/include", cores=4, nvcc="/usr/bin/nvcc", nvcc_version=(13, 0))


def plan(
    env: dict[str, str] | None = None,
    sources: list[str] | None = None,
    torch: TorchFacts = TORCH,
    platform: PlatformFacts = PLATFORM,
) -> BuildPlan:
    return decide(env or {}, [*SOURCES, *CUDA_SOURCES] if sources is None else sources, torch, platform)


def unit_flags(plan: BuildPlan) -> dict[str, tuple[str, ...]]:
    return {unit.source: unit.flags for unit in plan.cpu.units}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.11.0a0+git1", (2, 11, 0)), ("2.9.1", (2, 9, 1)), ("13.0", (13, 0)), ("", ()), ("dev", ())],
)
def test_version_tuple_has_the_leading_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert version_tuple(text) == expected


def test_old_torch_raises() -> None:
    with pytest.raises(BuildError, match=r"expected torch >= 2\.11, got 2\.9\.1"):
        plan(torch=dataclasses.replace(TORCH, version="2.9.1"))
    assert plan(torch=dataclasses.replace(TORCH, version="2.11.0a0")).cpu.built


def test_microkernels_have_flags_of_their_isa() -> None:
    flags = unit_flags(plan())
    for isa in ARCHITECTURES["x86_64"]:
        assert flags[f"csrc/backends/cpu/microkernels/tile_{isa}.cpp"] == ISA_FLAGS[isa]
    assert flags["csrc/backends/cpu/conv_kernel.cpp"] == ()
    assert not any("-mavx" in flag for flag in plan().cpu.flags)


def test_cuda_sources_are_compiled_by_nvcc_alone() -> None:
    assert not set(unit_flags(plan())) & set(CUDA_SOURCES)
    assert [unit.source for unit in plan().cuda.units] == CUDA_SOURCES
    assert all(unit.compiler == "nvcc" for unit in plan().cuda.units)


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_aarch64_has_neon_alone(machine: str) -> None:
    result = plan(platform=dataclasses.replace(PLATFORM, machine=machine))
    neon = "csrc/backends/cpu/microkernels/tile_neon.cpp"
    assert list(unit_flags(result)) == ["csrc/backends/cpu/conv_kernel.cpp", neon, "csrc/module.cpp"]
    assert result.cpu.targets == ("neon",)
    assert [flag for flag in result.cpu.flags if "BAP_KERNELS_HAVE" in flag] == ["-DBAP_KERNELS_HAVE_NEON=1"]
    assert "ATen stands in" not in banner(result)


def test_other_machines_have_no_microkernels() -> None:
    result = plan(platform=dataclasses.replace(PLATFORM, machine="riscv64"))
    assert list(unit_flags(result)) == ["csrc/backends/cpu/conv_kernel.cpp", "csrc/module.cpp"]
    assert result.cpu.targets == ("none",)
    assert "no kernels for riscv64, ATen stands in" in banner(result)


def test_isa_without_compiler_support_is_left_out() -> None:
    result = plan(platform=dataclasses.replace(PLATFORM, compiled_isas=("avx2", "avx512")))
    assert "csrc/backends/cpu/microkernels/tile_avx512bf16.cpp" not in unit_flags(result)
    assert "-DBAP_KERNELS_HAVE_AVX512=1" in result.cpu.flags
    assert "-DBAP_KERNELS_HAVE_AVX512BF16=1" not in result.cpu.flags
    assert "the compiler lacks avx512bf16" in banner(result)


def test_microkernel_without_isa_suffix_raises() -> None:
    with pytest.raises(BuildError, match="expected a microkernel to end in _avx2"):
        plan(sources=["csrc/backends/cpu/microkernels/tile.cpp"])


def test_library_links_openmp_runtime_of_torch() -> None:
    assert plan().cpu.link_flags[-1] == TORCH.openmp_library
    assert plan(torch=dataclasses.replace(TORCH, openmp_library=None)).cpu.link_flags[-1] == "-fopenmp"


@pytest.mark.parametrize(
    ("torch", "platform", "sources", "reason"),
    [
        (TORCH, PLATFORM, SOURCES, "no CUDA sources in this version"),
        (dataclasses.replace(TORCH, cuda=None), PLATFORM, None, "is not a CUDA build"),
        (TORCH, dataclasses.replace(PLATFORM, nvcc=None), None, "nvcc was not found"),
        (TORCH, dataclasses.replace(PLATFORM, nvcc_version=(12, 8)), None, r"nvcc 12\.8 and torch's CUDA 13\.0"),
    ],
)
def test_cuda_is_left_out_with_reason(
    torch: TorchFacts, platform: PlatformFacts, sources: list[str] | None, reason: str
) -> None:
    result = plan(sources=sources, torch=torch, platform=platform)
    assert result.cpu.built
    assert not result.cuda.built
    with pytest.raises(BuildError, match=r"BAP_KERNELS_WITH_CUDA=1`, got: .*" + reason):
        plan({"BAP_KERNELS_WITH_CUDA": "1"}, sources, torch, platform)
    assert result.cuda.reason in banner(result)


@pytest.mark.parametrize(("setting", "built"), [("", True), ("auto", True), ("1", True), ("0", False)])
def test_with_cuda_setting_selects_cuda(setting: str, built: bool) -> None:
    result = plan({"BAP_KERNELS_WITH_CUDA": setting})
    assert result.cuda.built is built
    assert ("NOT built" in banner(result)) is not built


def test_only_cuda_by_default_is_optional() -> None:
    assert plan().cuda.optional
    assert not plan({"BAP_KERNELS_WITH_CUDA": "1"}).cuda.optional
    assert not plan().cpu.optional


def test_invalid_with_cuda_setting_raises() -> None:
    with pytest.raises(BuildError, match="expected `BAP_KERNELS_WITH_CUDA` to be 0, 1 or auto, got 'yes'"):
        plan({"BAP_KERNELS_WITH_CUDA": "yes"})


@pytest.mark.parametrize(
    ("requested", "nvcc", "expected"),
    [
        (None, (13, 0), ("8.0+PTX", "9.0a", "10.0", "12.0")),
        (" ", (12, 6), ("8.0+PTX", "9.0a")),
        ("", (11, 8), ("8.0+PTX",)),
        ("8.0;9.0a 12.0+PTX", (13, 0), ("8.0", "9.0a", "12.0+PTX")),
    ],
)
def test_cuda_archs_follow_request_or_nvcc(
    requested: str | None, nvcc: tuple[int, ...], expected: tuple[str, ...]
) -> None:
    assert cuda_archs(requested, nvcc) == expected


def test_invalid_cuda_arch_raises() -> None:
    with pytest.raises(BuildError, match=r"expected `TORCH_CUDA_ARCH_LIST` .* got 'Ampere'"):
        cuda_archs("Ampere", (13, 0))


def test_gencode_flags_have_ptx_if_requested() -> None:
    assert gencode_flags(("8.0", "10.0+PTX")) == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    )


def test_sanitizer_build_has_its_own_folder_and_reuses_glue() -> None:
    normal, result = plan(), plan({"BAP_KERNELS_SANITIZE": "address,undefined"})
    assert result.build_dir == "build/sanitize" != normal.build_dir
    flags = unit_flags(result)
    assert "-fsanitize=address,undefined" in flags["csrc/backends/cpu/conv_kernel.cpp"]
    assert "-fsanitize=address,undefined" in flags["csrc/backends/cpu/microkernels/tile_avx2.cpp"]
    assert "-fsanitize=address,undefined" not in flags["csrc/module.cpp"]
    assert "-fsanitize=address,undefined" not in flags["csrc/backends/cpu/microkernels/tile_emulated.cpp"]
    assert not any("-fsanitize" in flag for unit in normal.cpu.units for flag in (*unit.flags, *normal.cpu.flags))
    assert "-fsanitize=address,undefined" in result.cpu.link_flags
    assert "-O3" not in result.cpu.flags
    assert not result.cuda.built
    glue = plan({"BAP_KERNELS_SANITIZE": "address"}, [*SOURCES, "csrc/autograd/conv.cpp"])
    text = ninja_text(glue, glue.cpu)
    assert "csrc/autograd/conv.cpp.o: cxx" not in text
    assert f"{normal.build_dir}/_C.objects/csrc/autograd/conv.cpp.o" in text
    with pytest.raises(BuildError, match="got 'thread'"):
        plan({"BAP_KERNELS_SANITIZE": "thread"})


@pytest.mark.parametrize(
    ("env", "jobs"), [({}, 4), ({"MAX_JOBS": "3"}, 3), ({"MAX_JOBS": "3", "BAP_KERNELS_MAX_JOBS": "2"}, 2)]
)
def test_jobs_follow_environment(env: dict[str, str], jobs: int) -> None:
    assert plan(env).jobs == jobs


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_invalid_jobs_raise(text: str) -> None:
    with pytest.raises(BuildError, match="expected `BAP_KERNELS_MAX_JOBS` to be a positive number"):
        plan({"BAP_KERNELS_MAX_JOBS": text})


def test_ninja_file_builds_every_object_once_and_links_it() -> None:
    result = plan()
    text = ninja_text(result, result.cpu)
    compiled = [source for source in SOURCES if not source.endswith("_neon.cpp")]
    for source in compiled:
        assert len(re.findall(rf"_C\.objects/{re.escape(source)}\.o: cxx {re.escape(source)}(?: \| .*)?\n", text)) == 1
    link = next(line for line in text.splitlines() if line.startswith(f"build {result.build_dir}/_C.so: link"))
    assert all(f"{source}.o" in link for source in compiled)


def test_header_is_precompiled_once_per_set_of_flags() -> None:
    result = plan()
    text = ninja_text(result, result.cpu)
    header = f"{result.build_dir}/_C.header0/precompiled.h.gch"
    assert text.count(f"build {header}: header csrc/precompiled.h\n") == 1
    assert f"csrc/module.cpp.o: cxx csrc/module.cpp | {header}\n" in text
    for unit in result.cpu.units:
        assert (unit.precompiled is None) == ("microkernels" in unit.source)
    checked = plan({"BAP_KERNELS_SANITIZE": "address"})
    assert ninja_text(checked, checked.cpu).count(": header ") == 1
    other = plan(platform=dataclasses.replace(PLATFORM, cxx_version="Debian clang version 14.0.6"))
    assert "precompiled" not in ninja_text(other, other.cpu)


def test_importing_setup_builds_nothing() -> None:
    command = [sys.executable, "-c", "import setup; print('imported')"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "imported\n"


@pytest.mark.parametrize(("setting", "label"), [("0", "torch2.15"), ("auto", "torch2.15"), ("1", "torch2.15.cu13")])
def test_wheel_names_its_torch_and_the_cuda_that_it_must_have(setting: str, label: str) -> None:
    assert wheel_version("0.2.0", TORCH, plan({"BAP_KERNELS_WITH_CUDA": setting})) == f"0.2.0+{label}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("torch>=2.11", "torch==2.15.*"),
        ("torch", "torch==2.15.*"),
        ("torch-pruning", "torch-pruning"),
        ("torchvision", "torchvision"),
    ],
)
def test_wheel_requires_the_torch_that_it_was_built_with(given: str, expected: str) -> None:
    assert wheel_requirements(["numpy>=1.26", given], TORCH) == ["numpy>=1.26", expected]


@pytest.mark.slow
def test_only_wheels_are_bound_to_a_torch(tmp_path: Path) -> None:
    # From the sources alone, as pip reads them before it builds.
    command = [sys.executable, "setup.py", "-q"]
    for name, words in (("egg", ("egg_info", "--egg-base")), ("wheel", ("dist_info", "--output-dir"))):
        (tmp_path / name).mkdir()
        subprocess.run([*command, *words, tmp_path / name], cwd=ROOT, check=True)
    (source,) = tmp_path.glob("egg/*.egg-info/PKG-INFO")
    (wheel,) = tmp_path.glob("wheel/*.dist-info/METADATA")
    torch = metadata.version("torch").split("+")[0].rpartition(".")[0]
    assert "\nRequires-Dist: torch>=2.11\n" in source.read_text()
    assert f"\nRequires-Dist: torch=={torch}.*\n" in wheel.read_text()
    assert f"+torch{torch}" in wheel.parent.name
    assert "+" not in re.search(r"^Version: (.*)$", source.read_text(), flags=re.MULTILINE).group(1)
