"""Offline compilation of the CUDA kernels: parsed compiler output, and checks that can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import compile_cuda, ninja_build
from tools.compile_cuda import Instance, examine, functions_of, instance_of, occupancy

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/backends/cuda/kernels"
LARGE, SMALL = (128, 128, 2, 4, 3, 1), (64, 64, 2, 2, 4, 2)
CONV = Instance("conv", "bfloat16", LARGE)
HALO = Instance("halo", "bfloat16", (128, 128, 2, 4, 2, 1))
WARPGROUP = Instance("warpgroup", "bfloat16", (128, 256, 8, 1, 4, 1))
SASS = "LDGSTS.E.BYPASS.128 [R1] ;\nLDSM.16.M88.4 R4 ;\nHMMA.16816.F32.BF16 R8 ;\n"
WARPGROUP_SASS = (
    "LDGSTS.E.BYPASS.128 [R1] ;\nHGMMA.64x256x16.F32.BF16 R8 ;\nUSETMAXREG.DEALLOC ;\nUSETMAXREG.TRY_ALLOC ;\n"
    "UBLKCP.S.G [UR4], [UR8], UR12 ;\n"
)


def test_examine_reports_spills_and_missing_instructions() -> None:
    assert examine(CONV, "80", 128, 0, SASS).wrong == []
    assert examine(CONV, "80", 128, 8, SASS).wrong == ["spills 8 bytes"]
    assert examine(CONV, "80", 128, 0, SASS.replace("128", "64")).wrong == ["no LDGSTS.128"]
    assert examine(CONV, "80", 128, 0, SASS.replace(".BF16", "")).wrong == ["no HMMA.16816.F32.BF16"]
    assert examine(CONV, "80", 128, 0, SASS.replace("LDSM", "LDS")).wrong == ["no LDSM"]
    small = Instance("planar", "bfloat16", SMALL)
    assert examine(small, "80", 255, 0, SASS).wrong == []
    assert examine(small, "80", 300, 0, SASS).wrong == ["a processor holds 1 blocks"]
    assert examine(HALO, "80", 200, 0, SASS).wrong == ["no STS.128"]
    assert examine(HALO, "80", 200, 0, SASS + "STS.128 [R1], R4 ;\n").wrong == []
    assert examine(WARPGROUP, "90a", 168, 0, WARPGROUP_SASS).wrong == []
    for part in ("HGMMA.64x256x16.F32.BF16", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC", "LDGSTS", "UBLKCP"):
        assert len(examine(WARPGROUP, "90a", 168, 0, WARPGROUP_SASS.replace(part, "")).wrong) == 1
    assert examine(WARPGROUP, "90a", 176, 0, WARPGROUP_SASS).wrong == ["a processor holds 0 blocks"]


def test_instance_of_parses_mangled_names() -> None:
    tile = "".join(f"Li{size}E" for size in LARGE)
    name = f"_ZN20planar_conv2d_kernelILNS_8MathModeE2ENS_4TileI{tile}EEEEvNS_10ConvParamsE"
    assert instance_of(name) == Instance("planar", "tf32", LARGE)
    name = "_ZN19channel_pack_kernelI6__halfEEvNS_17ChannelPackParamsE"
    assert instance_of(name) == Instance("pack", "half", ())
    halo = "".join(f"Li{size}E" for size in HALO.tile)
    assert instance_of(f"_ZN18halo_conv2d_kernelILNS_8MathModeE0ENS_4TileI{halo}EEEEvNS_10HaloParamsE") == HALO
    warpgroup = "".join(f"Li{size}E" for size in WARPGROUP.tile)
    name = f"_ZN23warpgroup_conv2d_kernelILNS_8MathModeE0ENS_4TileI{warpgroup}EEEEvNS_10ConvParamsE"
    assert instance_of(name) == WARPGROUP
    assert instance_of("_Z28another_kernelv") is None


def test_functions_of_splits_listing() -> None:
    listing = "head\n\t\tFunction : f\n\tMOV ;\n\t\tFunction : g\n\tADD ;\n"
    assert functions_of(listing) == {"f": "\tMOV ;", "g": "\tADD ;\n"}


def test_occupancy_respects_each_limit() -> None:
    assert occupancy("90a", 8, 255, 98304) == 1
    assert occupancy("90a", 4, 128, 65536) == 3
    assert occupancy("80", 4, 40, 0) == 12


def test_tiles_equal_those_of_the_kernels() -> None:
    text = (KERNELS / "instances.h").read_text()
    tiles = {
        tuple(int(number) for number in numbers.split(","))
        for numbers in re.findall(r"using (?:Large|Small|Thin)Tile = Tile<(\d[\d, ]*)>", text)
    }
    assert {LARGE, SMALL} < tiles
    limit = re.search(r"kHaloSharedBytes = (\d+) \* 1024", (KERNELS / "halo_shape.h").read_text())
    assert limit is not None
    assert HALO.shared_bytes == int(limit.group(1)) * 1024
    # Equals Tile::kSharedBytes, which check_index compares with the limit of every device.
    assert {Instance("conv", "half", tile).shared_bytes for tile in tiles} == {98304, 65536, 81920}
    assert WARPGROUP.shared_bytes == 4 * (128 + 256) * 128 + 4 * 16


needs_nvcc = pytest.mark.skipif(
    ninja_build.platform_facts(os.environ).nvcc is None or compile_cuda.find_cuobjdump() is None,
    reason="there is no nvcc or no cuobjdump",
)


@needs_nvcc
def test_small_kernels_compile_without_faults() -> None:
    nvcc, cuobjdump = ninja_build.platform_facts(os.environ).nvcc, compile_cuda.find_cuobjdump()
    assert nvcc is not None
    assert cuobjdump is not None
    codes = [
        code for name in compile_cuda.SMALL_SOURCES for code in compile_cuda.compile_source(name, "80", nvcc, cuobjdump)
    ]
    kernels, elements = ("pack", "sum", "split epilogue", "unpack"), ("bfloat16", "half", "float32")
    wanted = [(kernel, element) for kernel in kernels for element in elements]
    assert sorted((code.kernel, code.mode) for code in codes) == sorted([*wanted, ("weight tiles", "16 bits")])
    assert all(code.wrong == [] and 0 < code.registers <= 80 for code in codes)


def test_tool_compiles_every_kernel_file() -> None:
    files = {path.stem for path in KERNELS.glob("*.cu")}
    assert files == {f"gathered_conv2d_{name}" for name in compile_cuda.SOURCES} | {
        *(f"warpgroup_conv2d_{name}" for name in compile_cuda.WARPGROUP_SOURCES),
        *compile_cuda.SMALL_SOURCES,
    }


def test_device_code_includes_no_torch_headers() -> None:
    for path in KERNELS.iterdir():
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        others = [name for name in includes if not name.startswith(("backends/cuda/kernels/", "cuda_"))]
        assert all(re.fullmatch(r"\w+|Python\.h", name) for name in others), path


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("header", sorted(path.name for path in KERNELS.glob("*.h")))
def test_what_launchers_share_with_kernels_compiles_without_cuda(header: str, tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text(f'#include "backends/cuda/kernels/{header}"\n')
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-I", str(ROOT / "csrc"), str(source)], check=True)
