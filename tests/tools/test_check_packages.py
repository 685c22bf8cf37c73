"""What the checks of packages find; the checks themselves need a network (`make package`)."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import check_packages
from tools.check_packages import CheckError, check_contents, missing_from_sdist, names_of_sdist

ROOT = Path(check_packages.__file__).parents[1]
BASE = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/a.cpp"]
GOOD = {
    "bap_kernels/_C.cpython-311-x86_64-linux-gnu.so": "",
    "bap_kernels/_C.pyi": "",
    "bap_kernels/py.typed": "",
    "bap_kernels/triton/forward.py": "",
    "bap/cli/__init__.py": "",
    "bap_kernels-0.2.0+torch2.14.dist-info/METADATA": "Name: bap_kernels\nRequires-Dist: torch==2.14.*\n",
}


def wheel(folder: Path, content: dict[str, str]) -> Path:
    path = folder / "bap_kernels-0.2.0+torch2.14-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def test_sdist_without_a_source_and_with_an_output_is_found() -> None:
    assert missing_from_sdist(BASE, ["csrc/a.cpp", "tests/test_a.py"]) == []
    found = missing_from_sdist([*BASE, "bap_kernels/_C.so"], ["csrc/a.cpp", "csrc/b.h"])
    assert found == ["lacks csrc/b.h", "has bap_kernels/_C.so"]


@pytest.mark.slow
def test_sdist_has_all_sources_and_no_outputs(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    (file,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert missing_from_sdist(names_of_sdist(file), listed.stdout.splitlines()) == []


def test_good_wheel_names_its_torch(tmp_path: Path) -> None:
    assert check_contents(wheel(tmp_path, GOOD)) == "2.14"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bap_kernels/_C.cpython-311-x86_64-linux-gnu.so", None, "lacks bap_kernels/_C"),
        ("bap_kernels/triton/forward.py", None, "lacks bap_kernels/triton/forward.py"),
        ("tests/test_a.py", "", "has tests/test_a.py"),
        ("bap_kernels-0.2.0+torch2.14.dist-info/METADATA", "Requires-Dist: torch>=2.11\n", "does not name its torch"),
    ],
)
def test_faults_of_wheels_are_found(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    content = {key: value for key, value in {**GOOD, name: text}.items() if value is not None}
    with pytest.raises(CheckError, match=message):
        check_contents(wheel(tmp_path, content))


def test_clean_path_has_no_compiler(tmp_path: Path) -> None:
    path = check_packages.clean_path(tmp_path)
    found = subprocess.run(
        ["/bin/sh", "-c", "command -v env; for c in c++ g++ gcc cc clang nvcc; do command -v $c; done"],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines() == [str(tmp_path / "without-compilers/env")]
