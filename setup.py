"""Builds the extensions; decisions are in tools/build_plan.py, metadata in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools import ninja_build
from tools.build_plan import BuildError, banner, decide


class NinjaBuild(build_ext):
    """Runs the build plan: ninja compiles under build/, setuptools installs the libraries."""

    def finalize_options(self) -> None:
        super().finalize_options()
        facts = ninja_build.find_sources(), ninja_build.torch_facts(), ninja_build.platform_facts(os.environ)
        try:
            self.plan = decide(os.environ, *facts)
            self.normal_plan = decide({**os.environ, "BAP_KERNELS_SANITIZE": ""}, *facts)
        except BuildError as error:
            raise SystemExit(str(error)) from None
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
    )
