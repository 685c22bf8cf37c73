"""``bk.verify`` and the command line: tables, JSON, exit statuses, and what they say without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import bap_kernels as bk
from bap_kernels.verify import Verdict, __main__, runner, show
from bap_kernels.verify.store import Store
from tests.verify.conftest import subject

MODULE = sys.modules["bap_kernels.verify"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device in name, whose families are judged on the CPU."""
    monkeypatch.setattr(MODULE, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(MODULE, "cuda_subject", lambda index: subject("right", "wrong", gpu=f"simulated {index}"))


@no_gpu
def test_without_a_gpu_the_command_says_so() -> None:
    process = subprocess.run([sys.executable, "-m", "bap_kernels.verify"], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("bap_kernels.verify: expected a CUDA device to verify the kernels on, got none: ")
    assert len(process.stderr.splitlines()) == 1


@no_gpu
def test_without_a_gpu_the_function_raises() -> None:
    with pytest.raises(RuntimeError, match=r"verify\(\): expected a CUDA device .* Hint: the CPU kernels need"):
        bk.verify()


@pytest.mark.parametrize("wrong", [2, -1, "cuda:5", "cpu", "gpu"])
def test_device_that_is_none_raises(wrong: int | str, device: None) -> None:
    with pytest.raises(ValueError, match=rf"expected `device` to be one of 2 CUDA devices, got {wrong!r}"):
        bk.verify(wrong)


def test_options_out_of_range_raise(device: None) -> None:
    with pytest.raises(ValueError, match=r"expected `timeout` to be a positive number of seconds, got 0"):
        bk.verify(timeout=0)
    with pytest.raises(ValueError, match=r"expected `jobs` to be at least 1, got 0"):
        bk.verify(jobs=0)


def test_table_and_exit_status(device: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 1
    printed = capsys.readouterr()
    assert "simulated 0: 1 ok, 1 wrong" in printed.out
    assert "x/wrong/float32  wrong" in printed.out
    assert printed.out.strip().endswith("verdicts-v1.json")
    assert sorted(line.split("] ")[1].split(":")[0] for line in printed.err.splitlines()) == [
        "x/right/float32",
        "x/wrong/float32",
    ]
    assert __main__.main(["--family", "*/right/*", "--device", "0"]) == 0
    # It is known, and nothing is shown of nothing.
    assert capsys.readouterr().err == ""
    assert __main__.main(["--family", "*/nothing/*"]) == 2
    assert "got '*/nothing/*'" in capsys.readouterr().err


def test_json(device: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--json", "--quiet", "--device", "1"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert found["facts"]["gpu"] == "simulated 1"
    assert {name: each["verdict"] for name, each in found["families"].items()} == {
        "x/right/float32": "ok",
        "x/wrong/float32": "wrong",
    }


def test_interrupted_command_keeps_what_is_there(
    device: None, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(families: list[str], device: object, keep: Callable[[str, Verdict], None], *rest: object) -> None:
        keep(families[0], Verdict("ok"))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert __main__.main([]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(store.load(subject(gpu="simulated 0").facts)) == 1


def test_bar_where_stderr_is_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with show.progress(1) as shown:
        shown.step("a/b/c", "[first] run")
        shown.verdict("a/b/c", Verdict("hang", "no [end]"))
    assert "a/b/c  no [end]" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)


def test_lines_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(show.importlib.util, "find_spec", lambda name: None)
    with show.progress(1) as shown:
        shown.verdict("a/b/c", Verdict("ok", "3 cases", 2.0))
    assert capsys.readouterr().err == "[1/1] a/b/c: ok, 3 cases (2 s)\n"
