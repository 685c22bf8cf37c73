"""Builds the extensions; decisions are in tools/build_plan.py, metadata in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools import ninja_build
from tools.build_plan import BuildError, BuildPlan, TorchFacts, banner, decide, wheel_requirements, wheel_version

# Commands whose result holds the libraries, or describes what does.
_OF_WHEELS = {"bdist_wheel", "dist_info", "editable_wheel"}


def make_plan(torch: TorchFacts, **environment: str) -> BuildPlan:
    try:
        facts = ninja_build.find_sources(), torch, ninja_build.platform_facts(os.environ)
        return decide({**os.environ, **environment}, *facts)
    except BuildError as error:
        raise SystemExit(str(error)) from None


class BoundToTorch(Distribution):
    """A wheel names the torch that it was built with and requires it; the sources do not."""

    def parse_command_line(self) -> bool:
        parsed = super().parse_command_line()
        if _OF_WHEELS & set(self.commands):
            torch = ninja_build.torch_facts()
            self.metadata.version = wheel_version(self.metadata.version, torch, make_plan(torch))
            requirements = wheel_requirements(self.metadata.install_requires, torch)
            self.install_requires = self.metadata.install_requires = requirements
        return parsed


class NinjaBuild(build_ext):
    """Runs the build plan: ninja compiles under build/, setuptools installs the libraries."""

    def finalize_options(self) -> None:
        super().finalize_options()
        torch = ninja_build.torch_facts()
        self.plan = make_plan(torch)
        self.normal_plan = make_plan(torch, BAP_KERNELS_SANITIZE="")
        self.planned = {f"bap_kernels.{part.name}": part for part in self.plan.parts if part.built}
        extensions = self.distribution.ext_modules or []
        self.extensions = [extension for extension in extensions if extension.name in self.planned]
        for extension in self.extensions:
            extension.optional = self.planned[extension.name].optional

    def run(self) -> None:
        print(banner(self.plan), flush=True)
        if not self.plan.sanitize:
            super().run()
            return
        # Uninstrumented objects of the normal build are linked.
        ninja_build.build(self.normal_plan, self.normal_plan.cpu)
        # Stays under build/, next to the normal library; BAP_KERNELS_LIBRARY selects it for one run.
        print(f"sanitizer library: {ninja_build.build(self.plan, self.plan.cpu, verbose=bool(self.verbose > 1))}")

    def build_extension(self, ext: Extension) -> None:
        part = self.planned[ext.name]
        try:
            library = ninja_build.build(self.plan, part)
        except subprocess.CalledProcessError as error:
            # setuptools reports a failed optional extension and builds the rest.
            raise CompileError(f"{ext.name}: ninja ended with status {error.returncode}, see above") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("bap_kernels._C", sources=[]),
            Extension("bap_kernels._C_cuda", sources=[]),
        ],
        cmdclass={"build_ext": NinjaBuild},
        distclass=BoundToTorch,
    )
