"""The tiles under ``csrc/backends/cpu/microkernels`` and what packs their panels, by programs without torch: see
``tests/microkernels/*.cpp``.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tools import tile_test

# Tables of the program, with the CPU flags that each needs.
TABLES = {
    "avx2": "avx2",
    "neon_emulated": "emulated",
    "avx512_emulated": "emulated",
    "avx512_emulated_pairs": "emulated",
    "avx512": "avx512",
    "avx512_pairs": "avx512bf16",
}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("compiles the tile test program, and found no g++ on the PATH")
    if "avx2" not in tile_test.isas_here():
        pytest.skip("this CPU has no AVX2")
    return found


@pytest.fixture(scope="module")
def program(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiles") / "tile_test"
    tile_test.build(made, tile_test.isas_here(), cxx=compiler)
    return made


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("table", TABLES)
def test_tiles_equal_loops(table: str, program: Path) -> None:
    if TABLES[table] not in tile_test.isas_here():
        pytest.skip(f"this CPU has no {TABLES[table]}; tools/emulate_avx512.sh runs these tiles in an emulator")
    process = run(program, "--rounds", "1", table)
    assert process.returncode == 0, process.stdout
    assert re.search(rf"^{table}: [1-9]\d* calls: ok$", process.stdout, re.M), process.stdout


def test_unknown_table_fails(program: Path) -> None:
    process = run(program, "avx1024")
    assert process.returncode == 2
    assert "avx1024: not compiled in" in process.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "statuses"),
    [
        ("rounded = bits + 0x7fff", "rounded = bits + 0x7ffe", [1]),
        # Seen beside the result, or by the page behind it.
        ("i < count; ++i) p[i] = part[i]", "i <= count; ++i) p[i] = part[i]", [1, -signal.SIGSEGV]),
    ],
    ids=["rounds_down", "writes_past_the_end"],
)
def test_mutated_tile_fails(right: str, wrong: str, statuses: list[int], compiler: str, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    for part in ("backends/cpu/microkernels", "backends/cpu/cpu_features.h", "backends/cpu/cpu_features.cpp"):
        source = tile_test.ROOT / "csrc" / part
        (sources / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, sources / part) if source.is_dir() else shutil.copy(source, sources / part)
    tile = sources / "backends/cpu/microkernels/simd.h"
    text = tile.read_text()
    assert text.count(right) == 1
    tile.write_text(text.replace(right, wrong))
    tile_test.build(tmp_path / "tile_test", ["avx2"], sources=sources, cxx=compiler)
    process = run(tmp_path / "tile_test", "--rounds", "1", "avx2")
    assert process.returncode in statuses, process.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "status"),
    [
        ("", "", 0),
        (
            "_mm256_maskload_ps(src, all_lanes(mask))",
            "_mm256_and_ps(_mm256_loadu_ps(src), _mm256_castsi256_ps(all_lanes(mask)))",
            -signal.SIGSEGV,
        ),
        ("_mm256_set1_epi32(0x7fff)", "_mm256_set1_epi32(0x8000)", 1),
        ("return _mm256_and_ps(v, _mm256_castsi256_ps(all_lanes(mask)));", "return v;", 1),
    ],
    ids=["as_it_is", "reads_past_the_mask", "rounds_up", "shifts_the_padding"],
)
def test_row_packing_equals_loops_and_mutations_fail(
    right: str, wrong: str, status: int, compiler: str, tmp_path: Path
) -> None:
    process = run(mutated("pack_row", "pack_row_avx2.cpp", right, wrong, compiler, tmp_path))
    assert process.returncode == status, process.stdout
    assert status or re.fullmatch(r"[1-9]\d* calls: ok\n", process.stdout)


def mutated(program: str, source: str, right: str, wrong: str, compiler: str, folder: Path) -> Path:
    """Build a program with a change in the source of its microkernel."""
    sources = folder / "csrc"
    shutil.copytree(tile_test.ROOT / "csrc/backends/cpu/microkernels", sources / "backends/cpu/microkernels")
    changed = sources / "backends/cpu/microkernels" / source
    text = changed.read_text()
    assert not right or text.count(right) == 1
    changed.write_text(text.replace(right, wrong) if right else text)
    tile_test.build_program(program, folder / program, "avx2", sources=sources, cxx=compiler)
    return folder / program


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("", ""),
        ("bits_of(part[c]) & keep[c]", "bits_of(part[c])"),
        ("+ 0x7fff + ((bits >> 16) & 1)", "+ 0x8000"),
        ("0x31", "0x20"),
        ("if (i < odd_count) row", "row"),
    ],
    ids=["as_it_is", "keeps_all", "rounds_up", "swaps_halves", "writes_past_the_end"],
)
def test_gradient_rows_equal_loops_and_mutations_fail(right: str, wrong: str, compiler: str, tmp_path: Path) -> None:
    process = run(mutated("gradient_rows", "gradient_rows_kernel.h", right, wrong, compiler, tmp_path))
    assert (process.returncode != 0) == bool(right), process.stdout
    assert right or re.fullmatch(r"[1-9]\d* calls: ok\n", process.stdout)


# ---- aarch64, in QEMU's emulator of a process

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture(scope="module")
def aarch64() -> None:
    missing = [tool for tool in (CROSS_COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")


def test_neon_tiles_equal_loops(aarch64: None, tmp_path: Path) -> None:
    tile_test.build(tmp_path / "tile_test", ["neon"], static=True, cxx=CROSS_COMPILER)
    process = subprocess.run([EMULATOR, tmp_path / "tile_test", "neon"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert re.search(r"^neon: [1-9]\d* calls: ok$", process.stdout, re.M), process.stdout


@pytest.mark.parametrize("program", tile_test.PROGRAMS)
def test_neon_packing_and_gradients_equal_loops(program: str, aarch64: None, tmp_path: Path) -> None:
    tile_test.build_program(program, tmp_path / program, "neon", static=True, cxx=CROSS_COMPILER)
    process = subprocess.run([EMULATOR, tmp_path / program], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert re.fullmatch(r"[1-9]\d* calls: ok\n", process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in (tile_test.ROOT / "csrc/backends/cpu").glob("*.cpp")))
def test_drivers_compile_for_aarch64(source: str, aarch64: None) -> None:
    """Their logic runs in the tests of the ops with ``BAP_KERNELS_ISA=neon_emulated``; PyTorch's headers serve both."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    command = [
        CROSS_COMPILER,
        "-std=c++20",
        "-fopenmp",
        "-fsyntax-only",
        "-Wall",
        "-Werror",
        "-DBAP_KERNELS_HAVE_NEON=1",
    ]
    command += [f"-I{tile_test.ROOT / 'csrc'}", *(flag for folder in includes for flag in ("-isystem", folder))]
    path = tile_test.ROOT / "csrc/backends/cpu" / source
    process = subprocess.run([*command, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_isas_here_parses_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: a\nflags\t\t: fpu fma avx2 avx512f avx512dq avx512vl avx512bw\n")
    assert tile_test.isas_here(cpuinfo) == ["avx2", "emulated", "avx512"]
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f avx512_bf16\n")
    assert tile_test.isas_here(cpuinfo) == []
    assert tile_test.isas_here(tmp_path / "absent") == []
