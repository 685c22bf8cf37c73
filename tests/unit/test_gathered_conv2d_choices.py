"""The table of `auto`: one measurement for each case, kept on disk, and never in the way when the disk is not right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bap_kernels import _C, reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

CASE = Case(1, 40, 30, (12, 13), seed=3)
# Another process has another number of candidates ready; the table itself must agree.
PROGRAM = """
import json, warnings, torch
import bap_kernels
from bap_kernels import _C
from bap_kernels.testing import Case, make_tensors, run
start = _C.choices()
run(make_tensors(Case(1, 40, 30, (12, 13), seed=3)))
print(json.dumps([start, _C.choices()]))
"""


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path) -> Iterator[None]:
    _C.set_choice_file("")
    _C.clear_choices()
    yield
    from bap_kernels import config

    _C.clear_choices()
    _C.set_choice_file(str(config.settings.choice_file or ""))


def in_new_process(folder: Path) -> tuple[list, list, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"BAP_KERNELS_CACHE_DIR": str(folder), "BAP_KERNELS_BACKEND": "auto"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def test_one_measurement_for_each_case() -> None:
    sample = make_tensors(CASE)
    run(sample)
    first = _C.choices()
    assert len(first) == 1
    for _ in range(5):
        run(sample)
    assert _C.choices() == first


def test_cases_are_told_apart() -> None:
    changes = (
        {"size": (12, 14)},
        {"stride": (2, 1)},
        {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
        {"layout": "channels_last"},
        {"dtype": torch.bfloat16},
        {"in_list": "one"},
        {"batch": 2},
        {"dilation": (2, 2)},
    )
    run(make_tensors(CASE))
    for count, change in enumerate(changes, 2):
        run(make_tensors(CASE.but(**change)))
        assert len(_C.choices()) == count, change


def test_named_backends_and_trivial_cases_measure_nothing() -> None:
    run(make_tensors(CASE), "aten")
    run(make_tensors(CASE.but(batch=0)))
    run(make_tensors(CASE.but(in_list="zero")))
    run(make_tensors(CASE.but(out_list="zero")))
    assert _C.choices() == []


def test_clear_forgets() -> None:
    run(make_tensors(CASE))
    _C.clear_choices()
    assert _C.choices() == []


def test_results_do_not_change_with_the_choice() -> None:
    sample = make_tensors(CASE)
    expected = reference.gathered_conv2d(*sample.args)
    for _ in range(5):
        _C.clear_choices()
        for _ in range(2):
            assert_close(run(sample), expected, torch.float32, sample.depth)


def test_table_on_disk_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    before = _C.choices()
    assert path.stat().st_size > 0
    _C.set_choice_file("")
    _C.clear_choices()
    assert _C.choices() == []
    _C.set_choice_file(str(path))
    assert _C.choices() == before


def test_table_serves_a_new_process(tmp_path: Path) -> None:
    start, after, _ = in_new_process(tmp_path)
    assert start == []
    assert len(after) == 1
    again, unchanged, stderr = in_new_process(tmp_path)
    assert again == after
    assert unchanged == after
    assert "warn" not in stderr.lower()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00\xff" * 500, b"bap_kernels choices 999\n1\t2\t3\n"])
def test_corrupt_table_is_ignored_with_a_warning(tmp_path: Path, content: bytes) -> None:
    in_new_process(tmp_path)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    path.write_bytes(content)
    start, after, stderr = in_new_process(tmp_path)
    assert start == []
    assert len(after) == 1
    if content:
        assert "warning" in stderr.lower(), stderr
        assert str(path) in stderr
    again, _, stderr = in_new_process(tmp_path)
    assert again == after
    assert "warning" not in stderr.lower()


def test_damaged_line_does_not_take_the_others_along(tmp_path: Path) -> None:
    path = tmp_path / "choices.tsv"
    _C.set_choice_file(str(path))
    run(make_tensors(CASE))
    run(make_tensors(CASE.but(size=(12, 15))))
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines[-1])):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        _C.set_choice_file("")
        _C.clear_choices()
        _C.set_choice_file(str(path))
        assert len(_C.choices()) <= 2
        sample = make_tensors(CASE)
        assert_close(run(sample), reference.conv_on_selected(*sample.args), torch.float32, sample.depth)


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # A file where the folder should be: not even root can write below it.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    _, after, _ = in_new_process(blocked / "cache")
    assert len(after) == 1


def test_read_only_cache_folder(tmp_path: Path) -> None:
    in_new_process(tmp_path)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    modes = path.stat().st_mode, tmp_path.stat().st_mode
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        start, after, _ = in_new_process(tmp_path)
    finally:
        tmp_path.chmod(modes[1])
        path.chmod(modes[0])
    assert start == after
    assert len(after) == 1


def test_no_cache_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"BAP_KERNELS_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(json.loads(done.stdout.strip().splitlines()[-1])[1]) == 1


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"BAP_KERNELS_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    program = PROGRAM.replace("(12, 13)", "(12, {width})")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program.replace("{width}", str(w))], env=environment, stdout=subprocess.DEVNULL
        )
        for w in (11, 13, 15)
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    start, _, stderr = in_new_process(tmp_path)
    assert len(start) >= 1
    assert "warning" not in stderr.lower()
