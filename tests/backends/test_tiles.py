"""The tiles under ``csrc/backends/cpu/microkernels`` and what packs their panels, by programs without torch: see
``tests/microkernels/*.cpp``.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tools import tile_test
from tools.build_plan import ISA_FLAGS

# Tables of the program, with the CPU flags that each needs.
TABLES = {
    "avx2": "avx2",
    "avx512_emulated": "emulated",
    "avx512_emulated_pairs": "emulated",
    "avx512": "avx512",
    "avx512_pairs": "avx512bf16",
}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++")
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
    ("right", "wrong", "status"),
    [
        ("rounded = bits + 0x7fff", "rounded = bits + 0x7ffe", 1),
        ("i < count; ++i) p[i] = part[i]", "i <= count; ++i) p[i] = part[i]", -signal.SIGSEGV),
    ],
    ids=["rounds_down", "writes_past_the_end"],
)
def test_mutated_tile_fails(right: str, wrong: str, status: int, compiler: str, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    for part in ("backends/cpu/microkernels", "backends/cpu/cpu_features.h", "backends/cpu/cpu_features.cpp"):
        source = tile_test.ROOT / "csrc" / part
        (sources / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, sources / part) if source.is_dir() else shutil.copy(source, sources / part)
    tile = sources / "backends/cpu/microkernels/tile_kernel.h"
    text = tile.read_text()
    assert text.count(right) == 1
    tile.write_text(text.replace(right, wrong))
    tile_test.build(tmp_path / "tile_test", ["avx2"], sources=sources, cxx=compiler)
    process = run(tmp_path / "tile_test", "--rounds", "1", "avx2")
    assert process.returncode == status, process.stdout


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
    source = tile_test.ROOT / "csrc/backends/cpu/microkernels/pack_row_avx2.cpp"
    text = source.read_text()
    assert not right or text.count(right) == 1
    changed = tmp_path / source.name
    changed.write_text(text.replace(right, wrong) if right else text)
    flags = ["-O2", "-std=c++20", "-Wall", f"-I{tile_test.ROOT / 'csrc'}"]
    test = tile_test.ROOT / "tests/microkernels/pack_row_test.cpp"
    packing = [compiler, *flags, *ISA_FLAGS["avx2"], "-c", changed, "-o", tmp_path / "pack_row.o"]
    subprocess.run(packing, check=True)
    subprocess.run([compiler, *flags, test, tmp_path / "pack_row.o", "-o", tmp_path / "pack_row_test"], check=True)
    process = run(tmp_path / "pack_row_test")
    assert process.returncode == status, process.stdout
    assert status or re.fullmatch(r"[1-9]\d* calls: ok\n", process.stdout)


def test_isas_here_parses_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: a\nflags\t\t: fpu fma avx2 avx512f avx512dq avx512vl avx512bw\n")
    assert tile_test.isas_here(cpuinfo) == ["avx2", "emulated", "avx512"]
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f avx512_bf16\n")
    assert tile_test.isas_here(cpuinfo) == []
    assert tile_test.isas_here(tmp_path / "absent") == []
