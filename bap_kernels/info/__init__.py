"""What is installed, what it can run here and what it keeps."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bap_kernels import settings
from bap_kernels._load import _C, cuda_library_problem
from bap_kernels._version import __version__
from bap_kernels.dispatch import choices, packed_cache_info, unsupported_reason
from bap_kernels.verify import VerifyReport, known_verdicts
from bap_kernels.verify.show import summary
from bap_kernels.verify.subject import cuda_problem, cuda_subject

__all__ = ["Info", "info"]


@dataclass(frozen=True)
class Info:
    """Facts about this installation; printing it shows them as a table.

    Attributes:
        versions: of bap_kernels, torch, Python, and CUDA as torch was built for.
        cpu: the processor's name.
        isa: the CPU kernels in use, "avx512", "avx2" or "none".
        isa_available: those that this machine could use.
        avx512_bf16: whether the machine has bfloat16 products.
        threads: threads that torch computes with.
        backend: the one set with :class:`~bap_kernels.use_backend`.
        backends: each backend's reason why it cannot run here; None if it can.
        cuda_library: why the CUDA library is not loaded; None if it is.
        gpus: names of the GPUs.
        verdicts: for each GPU, by its number, which kernel families are verified there, with reasons; see
            :func:`~bap_kernels.verify`.
        build: compiler, flags and ISAs of the build.
        choice_file: where ``auto`` keeps what it measured; None: in memory.
        choice_problem: why that file is not used, such as a folder that cannot be written; None if it is, or if it was
            not tried yet.
        choice_bytes: size of that file.
        choices: cases measured so far.
        packed_cache: see :func:`~bap_kernels.packed_cache_info`.
        environment: the variables that are set.
    """

    versions: dict[str, str]
    cpu: str
    isa: str
    isa_available: list[str]
    avx512_bf16: bool
    threads: int
    backend: str
    backends: dict[str, str | None]
    cuda_library: str | None
    gpus: list[str]
    verdicts: dict[int, VerifyReport]
    build: dict[str, str]
    choice_file: Path | None
    choice_problem: str | None
    choice_bytes: int
    choices: int
    packed_cache: dict[str, int]
    environment: dict[str, str]

    def __str__(self) -> str:
        cache = self.packed_cache
        rows = [
            *self.versions.items(),
            ("cpu", self.cpu),
            ("isa", f"{self.isa} (available: {', '.join(self.isa_available) or 'none'})"),
            ("avx512_bf16", "yes" if self.avx512_bf16 else "no"),
            ("threads", str(self.threads)),
            ("gpus", ", ".join(self.gpus) or "none"),
            *self._verdict_rows(),
            ("backend", self.backend),
            *((f"  {name}", "can run" if reason is None else reason) for name, reason in self.backends.items()),
            ("cuda library", self.cuda_library or "loaded"),
            ("choices", f"{self.choices} in {self._choice_place()}"),
            ("packed weights", f"{cache['entries']} in {cache['bytes']} of {cache['limit_bytes']} bytes"),
            (
                "  calls",
                f"{cache['hits']} found, {cache['misses']} made anew, {cache['evictions']} dropped for room; "
                f"{cache['compared']} compared a whole weight, {cache['not_kept']} could keep none (report says why)",
            ),
            *((f"build: {name}", text) for name, text in self.build.items()),
            *self.environment.items(),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _verdict_rows(self) -> list[tuple[str, str]]:
        rows = []
        for number, table in self.verdicts.items():
            rows.append((f"verdicts cuda:{number}", f"{summary(table)} in {table.file or 'memory'}"))
            rows += [
                (f"  {family}", f"{each.verdict}: {each.reason}")
                for family, each in table.items()
                if each.verdict != "ok"
            ]
        return rows

    def _choice_place(self) -> str:
        if self.choice_problem is not None:
            return f"memory: {self.choice_file or 'no file'} cannot be used, {self.choice_problem}"
        return f"{self.choice_file or 'memory'} ({self.choice_bytes} bytes)"


def _verdicts() -> dict[int, VerifyReport]:
    if cuda_problem() is not None:
        return {}
    return {number: known_verdicts(cuda_subject(number)) for number in range(torch.cuda.device_count())}


def info() -> Info:
    """Collects versions, CPU kernels, backends with the reasons why they cannot run, and what is cached where.

    Also printed by ``python -m bap_kernels.info``.

    Examples:
        >>> import bap_kernels as bk
        >>> bk.info().backends["aten"] is None
        True
    """
    file = settings.settings.choice_file
    count = len(choices())  # reads the file, which may show that it cannot be used
    return Info(
        versions={
            "bap_kernels": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
            "cuda of torch": torch.version.cuda or "none",
        },
        cpu=_C.cpu_model(),
        isa=_C.isa(),
        isa_available=list(_C.isa_available()),
        avx512_bf16=_C.has_avx512_bf16(),
        threads=torch.get_num_threads(),
        backend=_C.get_backend(),
        backends={name: unsupported_reason(name) for name in settings.NAMED_BACKENDS},
        cuda_library=cuda_library_problem,
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        verdicts=_verdicts(),
        build=dict(_C.build_info()),
        choice_file=file,
        choice_problem=_C.choice_file_problem() or None,
        choice_bytes=os.path.getsize(file) if file is not None and os.path.isfile(file) else 0,
        choices=count,
        packed_cache=packed_cache_info(),
        environment={each.name: os.environ[each.name] for each in settings.ENVIRONMENT if each.name in os.environ},
    )
