"""The file of choices: what it holds, damage, processes beside this one, and folders that cannot be used."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C, reference
from bap_kernels.settings import settings
from bap_kernels.testing import Case, assert_close, make_tensors, run

CASE = Case(1, 40, 30, (12, 13), seed=3)
PROGRAM = """
import json, torch
torch.set_num_threads({threads})
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
start = _C.choices()
run(make_tensors(Case(1, 40, 30, (12, {width}), seed=3)))
print(json.dumps([start, _C.choices()]))
"""


pytestmark = pytest.mark.usefixtures("own_choice_table")


def start_process(folder: Path | str, width: int = 13) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(threads=torch.get_num_threads(), width=width)],
        env=os.environ | {"BAP_KERNELS_CACHE_DIR": str(folder), "BAP_KERNELS_BACKEND": "auto"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_new_process(folder: Path | str) -> tuple[list, list, str]:
    """Return the choices at the start and the end of a new process, and its standard error."""
    process = start_process(folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return *json.loads(out.strip().splitlines()[-1]), err


def file_in(folder: Path) -> Path:
    return folder / settings.choice_file.name


def reread(path: Path) -> list[dict]:
    _C.set_choice_file("")
    _C.clear_choices()
    _C.set_choice_file(str(path))
    return _C.choices()


def assert_same_table(actual: list[dict], expected: list[dict]) -> None:
    # The file has fewer digits than memory.
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a["case"], a["backend"]) == (b["case"], b["backend"])
        assert a["candidates"] == pytest.approx(b["candidates"], rel=1e-3)


def test_choice_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    before = _C.choices()
    assert path.stat().st_size > 0
    assert_same_table(reread(path), before)


def test_new_process_reads_choice_file(tmp_path: Path) -> None:
    _C.set_choice_file(str(file_in(tmp_path)))
    run(make_tensors(CASE))
    before = file_in(tmp_path).read_bytes()
    start, after, stderr = in_new_process(tmp_path)
    assert_same_table(start, _C.choices())
    assert_same_table(after, _C.choices())
    assert file_in(tmp_path).read_bytes() == before
    assert "warn" not in stderr.lower()


def test_new_process_ignores_corrupt_file(tmp_path: Path) -> None:
    path = file_in(tmp_path)
    path.write_bytes(b"garbage")
    start, after, stderr = in_new_process(tmp_path)
    assert start == []
    assert len(after) == 1
    assert "warning" in stderr.lower(), stderr
    assert str(path) in stderr
    assert path.read_bytes() == b"garbage"


CORRUPT = {
    "garbage": b"garbage\n",
    "binary": b"\x00\xff\n\t" * 500,
    "later_version": b"bap_kernels choices v999\nmachine\tcase\tnative\t1 2 3 4 5\n",
    "one_long_line": b"x" * 1_000_000,
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_file_warns_and_is_ignored(tmp_path: Path, name: str) -> None:
    path = tmp_path / "choices.tsv"
    path.write_bytes(CORRUPT[name])
    _C.set_choice_file(str(path))
    sample = make_tensors(CASE)
    with pytest.warns(UserWarning, match="choices.tsv"):
        y = run(sample)
    assert_close(y, reference.conv_on_selected(*sample.args), torch.float32, sample.depth)
    assert len(_C.choices()) == 1


@pytest.mark.filterwarnings("error")
def test_empty_file_is_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    path.touch()
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    before = _C.choices()
    assert_same_table(reread(path), before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_file_of_older_version_is_replaced(version: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    _, line = path.read_text().splitlines()
    machine, case, *_ = line.split("\t")
    path.write_text(f"bap_kernels choices {version}\n{machine}\t{case}\tdense\t4 3 2 1\n")
    assert reread(path) == []
    run(make_tensors(CASE))
    written = _C.choices()
    assert len(written) == 1
    assert "\t4 3 2 1" not in path.read_text()
    assert_same_table(reread(path), written)


def test_damaged_fields_warn_and_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    head, line = path.read_text().splitlines()
    machine, case, route, times, counts, when = line.split("\t")
    good = {"machine": machine, "case": case, "route": route, "times": times, "counts": counts, "when": when}
    for damage in (
        {"case": ""},
        {"route": "fastest"},
        {"times": f"{route}=x"},
        {"times": f"{route}=-1 gather=2"},
        {"times": f"{route}=nan"},
        {"times": f"{route}=inf"},
        {"times": f"{route}="},
        {"times": "1 2 3 4"},
        {"times": ""},
        {"counts": "1 1 8"},
        {"counts": "1 1 8 8 8"},
        {"counts": "1 2 8 8"},
        {"counts": "1 1 9 8"},
        {"counts": "-1 -1 8 8"},
        {"counts": "1 1 8 99999999999999999999"},
        {"counts": "a b c d"},
        {"when": ""},
        {"when": "yesterday"},
        {"when": "-5"},
        {"when": "nan"},
        *({name: None} for name in good),
    ):
        fields = [text for text in (good | damage).values() if text is not None]
        path.write_text(head + "\n" + "\t".join(fields) + "\n")
        _C.clear_choices()
        _C.set_choice_file(str(path))
        with pytest.warns(UserWarning, match="1 unreadable line;"):
            run(make_tensors(CASE))
        assert len(_C.choices()) == 1, damage
        path.write_text("\n".join([head, "\t".join(good.values()), ""]))
        assert len(reread(path)) == 1


@pytest.mark.filterwarnings("error")
def test_lines_of_another_machine_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    head, line = path.read_text().splitlines()
    path.write_text(f"{head}\nanother machine\t" + line.split("\t", 1)[1] + "\n")
    assert reread(path) == []
    run(make_tensors(CASE))
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore:bap_kernels")
def test_truncated_line_does_not_affect_others(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    run(make_tensors(CASE.but(size=(12, 15))))
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines[-1]), 7):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        assert 1 <= len(reread(path)) <= 2
        for size in ((12, 13), (12, 15), (12, 16)):
            run(make_tensors(CASE.but(size=size)))
        written = _C.choices()
        assert len(written) == 3
        assert_same_table(reread(path), written)


def in_the_way_of(kind: str, folder: Path) -> Path:
    """Create something other than a choice file at the path of the file or its folder."""
    path = file_in(folder)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "terminal":
        path.symlink_to("/dev/ptmx")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "file for a folder":
        # Not even root can write there.
        (folder / "file").write_text("")
        return file_in(folder / "file" / "cache")
    else:
        return file_in(Path("/proc/nosuch"))
    return path


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "socket", "device", "terminal", "link to itself", "file for a folder", "proc"]
)
def test_unusable_path_warns_once_and_keeps_choices_in_memory(kind: str, tmp_path: Path) -> None:
    path = in_the_way_of(kind, tmp_path)
    _C.set_choice_file(str(path))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for width in (13, 15, 13):
            run(make_tensors(CASE.but(size=(12, width))))
    assert len(_C.choices()) == 2
    (text,) = [str(one.message) for one in seen if "choices" in str(one.message)]
    assert f"`{path}` cannot be used: " in text
    problem = _C.choice_file_problem()
    assert problem in text
    assert len(problem) > 5


@pytest.mark.parametrize("kind", ["pipe", "folder", "file for a folder"])
def test_process_starts_with_unusable_path(kind: str, tmp_path: Path) -> None:
    path = in_the_way_of(kind, tmp_path)
    _, after, stderr = in_new_process(path.parent)
    assert len(after) == 1
    assert stderr.count("UserWarning") == 1
    assert str(path) in stderr


@pytest.mark.parametrize("folder", ["~nosuch", "~nosuch/cache"])
def test_process_starts_without_home(folder: str) -> None:
    _, after, stderr = in_new_process(folder)
    assert len(after) == 1
    assert stderr.count("UserWarning") == 1
    assert f"`{folder}` has no home folder in front" in stderr


def test_info_has_choice_file_and_problem(tmp_path: Path) -> None:
    path = in_the_way_of("pipe", tmp_path)
    _C.set_choice_file(str(path))
    with pytest.warns(UserWarning, match="it is a pipe"):
        info = bk.info()
    assert info.choice_problem == "it is a pipe"
    assert "cannot be used, it is a pipe" in str(info)
    _C.set_choice_file(str(tmp_path / "good.tsv"))
    assert bk.info().choice_problem is None


FULL = """
import resource, sys, torch
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
run(make_tensors(Case(1, 40, 30, (12, 13), seed=3)))
from pathlib import Path
(path,) = Path(sys.argv[1]).iterdir()
limit = path.stat().st_size + 40
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for width in (14, 15, 16):
    run(make_tensors(Case(1, 40, 30, (12, width), seed=3)))
print(len(_C.choices()), _C.choice_file_problem())
"""


def test_full_disk_keeps_choices_in_memory(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env=os.environ | {"BAP_KERNELS_CACHE_DIR": str(tmp_path), "BAP_KERNELS_BACKEND": "auto"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split(maxsplit=1) == ["4", "File too large\n"]
    assert process.stderr.count("UserWarning") == 1
    with pytest.warns(UserWarning, match="1 unreadable line;"):
        assert len(reread(file_in(tmp_path))) == 1


@pytest.mark.filterwarnings("ignore:bap_kernels")
def test_read_only_cache_folder_keeps_choices_in_memory(tmp_path: Path) -> None:
    _C.set_choice_file(str(file_in(tmp_path)))
    run(make_tensors(CASE))
    before = _C.choices()
    file_in(tmp_path).chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert_same_table(reread(file_in(tmp_path)), before)
        run(make_tensors(CASE.but(size=(12, 15))))
        assert len(_C.choices()) == 2
    finally:
        tmp_path.chmod(0o700)


def test_empty_cache_folder_keeps_choices_in_memory(tmp_path: Path) -> None:
    _, after, stderr = in_new_process("")
    assert len(after) == 1
    assert "warn" not in stderr.lower()


def line(machine: str, case: str, filler: int = 0) -> str:
    return "\t".join([machine, case, "gather", "gather=5 dense=7 ", "2 2 16 16", "1700000000", "x" * filler]) + "\n"


@pytest.mark.filterwarnings("error")
def test_long_file_is_compacted(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    head, own = path.read_text().splitlines(keepends=True)
    others = [line("another machine", f"case {i}") for i in range(100)]
    # The same few cases many times, with lines of another machine before and between them.
    repeated = [line("a third machine", f"case {i % 10}", filler=1000) for i in range(5000)]
    path.write_text("".join([head, own, *others[:50], *repeated, *others[50:]]))
    before = path.stat().st_size
    run(make_tensors(CASE.but(size=(12, 15))))
    lines = path.read_text().splitlines(keepends=True)
    assert path.stat().st_size < before / 4
    assert lines[0] == head
    assert own in lines
    assert set(others) < set(lines)
    assert len(lines) == 1 + 2 + 100 + 10
    assert len(reread(path)) == 2
    assert [name.name for name in tmp_path.iterdir()] == ["choices.tsv"]


@pytest.mark.filterwarnings("error")
def test_file_with_too_many_cases_drops_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    head, own = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(line("another machine", f"case {i}", 1000) for i in range(5000)) + own)
    run(make_tensors(CASE.but(size=(12, 15))))
    lines = path.read_text().splitlines()
    assert path.stat().st_size < 2.1 * 2**20
    assert not any("\tcase 0\t" in text for text in lines)
    assert any("\tcase 4999\t" in text for text in lines)
    assert len(reread(path)) == 2


@pytest.mark.filterwarnings("error")
def test_concurrent_processes_keep_the_file_valid(tmp_path: Path) -> None:
    started = [start_process(tmp_path, width) for width in (11, 13, 15)]
    assert [process.communicate(timeout=120) and process.returncode for process in started] == [0, 0, 0]
    assert len(reread(file_in(tmp_path))) == 3
