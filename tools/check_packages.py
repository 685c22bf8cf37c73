"""Builds the sdist, a wheel from it, and tries the wheel in a clean environment without a compiler (``make package``).

    python -m tools.check_packages --out dist [--other-torch 2.13.0] [--wheel FILE]

The wheel is built from the unpacked sdist with the torch that is installed here, and installed with the same version.
Packages come from pip's index, so this needs a network, and the minutes that the compiler takes. What was checked is
printed line by line; the first failure ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a clean environment has on its PATH besides its own programs: no compiler, no CUDA toolkit.
_TOOLS = ("sh", "env", "uname")
_COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc", "ninja")
_SEES = """
import json, bap_kernels as bk
from importlib.metadata import requires, version
from pathlib import Path
print(json.dumps({
    "version": version("bap_kernels"),
    "requires": [each for each in requires("bap_kernels") if each.startswith("torch") and "extra" not in each],
    "file": bk.__file__,
    "backends": bk.info().backends,
}))
"""


class CheckError(Exception):
    """A package is not as it should be."""


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def run(command: Sequence[str | Path], cwd: Path, env: dict[str, str] | None = None, fails: bool = False) -> str:
    """The output of a command; one that ends otherwise than it should is an error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if (done.returncode != 0) is not fails:
        raise CheckError(f"{' '.join(words)[:300]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def missing_from_sdist(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Files of a build that an sdist lacks, and outputs of builds that it has.

    Args:
        names: in the sdist, relative to its folder.
        tracked: files of the repository.
    """
    have = set(names)
    needed = [name for name in tracked if name.startswith(("csrc/", "tools/", "bap_kernels/", "python/bap/"))]
    needed += ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
    wrong = [f"lacks {name}" for name in needed if name not in have]
    outputs = [name for name in have if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]
    return wrong + [f"has {name}" for name in sorted(outputs)]


def names_of_sdist(file: Path) -> list[str]:
    """Files of an sdist, relative to its folder."""
    with tarfile.open(file) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]


def clean_path(venv: Path) -> str:
    """A PATH with the programs of an environment and a shell, without compilers."""
    folder = venv / "without-compilers"
    folder.mkdir(exist_ok=True)
    for tool in _TOOLS:
        for place in ("/usr/bin", "/bin"):
            if Path(place, tool).exists() and not (folder / tool).exists():
                (folder / tool).symlink_to(Path(place, tool))
    return f"{venv / 'bin'}:{folder}"


class Environment:
    """A virtual environment with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run([sys.executable, "-m", "venv", folder], folder.parent)
        self.python = folder / "bin/python"

    def install(self, *words: str | Path, fails: bool = False) -> str:
        """Installs by pip."""
        return run([self.python, "-m", "pip", "install", "-q", *words], self.folder, fails=fails)

    def run(self, *words: str | Path, fails: bool = False) -> str:
        """Runs one of its programs, without compilers on the PATH and without packages of another place."""
        other = ("PYTHON", "BAP_", "CUDA", "CXX")
        env = {name: value for name, value in os.environ.items() if not name.startswith(other)}
        env |= {"PATH": clean_path(self.folder), "HOME": str(self.folder)}
        env |= {"BAP_KERNELS_CACHE_DIR": str(self.folder / "cache")}
        return run([self.folder / "bin" / words[0], *words[1:]], self.folder, env, fails)


def build_sdist(out: Path) -> Path:
    """Builds the sdist and checks what is in it."""
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT], ROOT)
    file = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    tracked = run(["git", "ls-files"], ROOT).splitlines()
    names = names_of_sdist(file)
    wrong = missing_from_sdist(names, tracked)
    if wrong:
        raise CheckError(f"{file.name} {', '.join(wrong[:10])}")
    say(f"sdist {file.name}: {len(names)} files, {file.stat().st_size / 1e6:.1f} MB")
    return file


def build_wheel(sdist: Path, out: Path, work: Path) -> Path:
    """Builds a wheel from the unpacked sdist, with the torch of this environment."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    source = work / sdist.name.removesuffix(".tar.gz")
    fresh = work / "wheel"
    shutil.rmtree(fresh, ignore_errors=True)
    # Not this repository's modules: its working directory is the sources'.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", fresh, source], source, env)
    (wheel,) = fresh.glob("*.whl")
    return Path(shutil.copy2(wheel, out))


def check_contents(wheel: Path) -> str:
    """Checks the files of a wheel; returns the torch that it requires, such as "2.14"."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    needed = ["bap_kernels/triton/forward.py", "bap_kernels/py.typed", "bap_kernels/_C.pyi", "bap/cli/__init__.py"]
    wrong = [f"lacks {name}" for name in needed if name not in names]
    wrong += [f"has {name}" for name in names if not name.startswith(("bap_kernels", "bap/"))]
    if not any(re.match(r"bap_kernels/_C\..*so$", name) for name in names):
        wrong.append("lacks bap_kernels/_C")
    required = re.search(r"^Requires-Dist: torch==([\d.]+)\.\*$", metadata, flags=re.MULTILINE)
    if required is None or f"+torch{required.group(1)}" not in wheel.name:
        wrong.append("does not name its torch")
    if wrong or required is None:
        raise CheckError(f"{wheel.name} {', '.join(wrong[:10])}")
    cuda = "with" if any("_C_cuda" in name for name in names) else "without"
    say(f"wheel {wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, {cuda} the CUDA library")
    return required.group(1)


def check_installed(wheel: Path, work: Path, torch: str) -> None:
    """Installs a wheel with the extra ``method`` and runs what the README shows."""
    clean = Environment(work / "clean")
    clean.install(f"bap_kernels[method] @ {wheel.resolve().as_uri()}", f"torch=={torch}.*")
    found = clean.run("python", "-c", f"import shutil; print([n for n in {_COMPILERS!r} if shutil.which(n)])")
    if found.strip() != "[]":
        raise CheckError(f"the clean environment has compilers: {found}")
    sees = clean.run("python", "-W", "error::DeprecationWarning:bap_kernels", "-c", _SEES)
    if str(clean.folder) not in sees:
        raise CheckError(f"another bap_kernels was imported: {sees}")
    say(f"installed: {sees.strip()}")
    clean.run("python", "-m", "bap_kernels.info")
    if "export" not in clean.run("bap", "--help"):
        raise CheckError("bap --help does not list its commands")
    readme = clean.folder / "readme.py"
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    readme.write_text(next(block for block in blocks if "import bap_kernels as bk" in block))
    table = clean.run("python", readme)
    lines = len(table.splitlines())
    say(f"README's example, which prints {lines} lines, python -m bap_kernels.info and bap --help run")


def check_other_torch(wheel: Path, work: Path, torch: str) -> None:
    """With another torch pip refuses the wheel; forced in, it says what is wrong when it is imported."""
    other = Environment(work / "other")
    other.install(f"torch=={torch}", "numpy", "safetensors")
    refused = other.install(wheel, f"torch=={torch}", fails=True)
    other.install("--no-deps", wheel)
    message = other.run("python", "-c", "import bap_kernels", fails=True).strip().splitlines()[-1]
    if "expected torch" not in message or "ImportError" not in message:
        raise CheckError(f"with torch {torch} the import ended with: {message}")
    conflict = [line for line in refused.splitlines() if "conflict" in line]
    say(f"with torch {torch}, pip: {conflict[0] if conflict else refused.strip()}")
    say(f"with torch {torch}, import: {message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_packages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the packages go")
    parser.add_argument("--other-torch", help="version of torch that the wheel has to refuse")
    parser.add_argument("--wheel", type=Path, help="check this wheel, build nothing")
    parser.add_argument("--work", type=Path, help="folder for environments, kept; a temporary one if it is not given")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            wheel = options.wheel or build_wheel(build_sdist(options.out), options.out, work)
            check_installed(wheel, work, check_contents(wheel))
            if options.other_torch:
                check_other_torch(wheel, work, options.other_torch)
    except CheckError as error:
        say(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
