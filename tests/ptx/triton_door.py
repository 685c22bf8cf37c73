"""Triton's launches, executed as PTX: the launcher's own arguments, CPU tensors, no GPU.

Inside :func:`executing` a :class:`~bap_kernels.triton.launch_spec.Launch` is compiled for a GPU of the given
architecture and its PTX is run on the tensors' memory. Everything above it (ops, routes, packing, grids, strides,
constants) is the product's own code. What is bypassed: Triton's launcher, which passes the same arguments by itself,
the choice of the target, which asks a device, and the refusal of CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor

from tests.ptx.executor import Module, Options


@dataclass
class Run:
    """What was executed inside :func:`executing`."""

    kernels: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # PTX, in order


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def arguments_of(step: Any) -> tuple[list[int], list[Tensor]]:
    """A launch's arguments as the compiled kernel takes them, and its tensors."""
    numbers, tensors = [], []
    for parameter, group in zip(step.spec.kernel.params, step.arguments, strict=True):
        if parameter.is_constexpr:
            continue
        for value in _flat(group):
            # Ones and what is not there are compiled in.
            if value is None or (isinstance(value, int) and value == 1):
                continue
            if isinstance(value, Tensor):
                tensors.append(value)
            numbers.append(value.data_ptr() if isinstance(value, Tensor) else value)
    return numbers, tensors


_compiled: dict[Any, tuple[str, Module, int, int]] = {}


def compiled(step: Any, arch: int, edit: Callable[[str, str], str] | None = None) -> tuple[str, Module, int, int]:
    """A launch's PTX, the parsed module, and bytes of shared memory and warps of a block."""
    import triton
    from triton.backends.compiler import GPUTarget

    from tools.compile_triton import source_of

    source = source_of(step)
    key = (source.hash(), arch, tuple(sorted(step.spec.options.items())))
    if key not in _compiled:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=step.spec.options)
        text = made.asm["ptx"]
        _compiled[key] = text, Module(text), int(made.metadata.shared), int(made.metadata.num_warps)
    text, module, shared, warps = _compiled[key]
    if edit is not None:
        edited = edit(step.spec.kernel.__name__, text)
        if edited != text:
            return edited, Module(edited), shared, warps
    return text, module, shared, warps


@contextlib.contextmanager
def executing(
    arch: int,
    tf32: bool = False,
    options: Options = Options(),  # noqa: B008
    edit: Callable[[str, str], str] | None = None,
) -> Iterator[Run]:
    """Runs Triton launches on CPU tensors as PTX of an architecture.

    Args:
        arch: compute capability without its point.
        edit: from a kernel's name and PTX to the PTX that is executed, for faults that are put in by hand.
    """
    from bap_kernels import dispatch
    from bap_kernels.triton import families, launch_spec, mixed, ops, private_ops, switched
    from bap_kernels.triton.launch_spec import Launch, Target

    run, apart = Run(), []
    target = Target(arch, tf32=tf32)
    real_offset = mixed._offset

    def execute(step: Launch) -> None:
        text, module, shared, warps = compiled(step, arch, edit)
        numbers, tensors = arguments_of(step)
        name = step.spec.kernel.__name__
        run.kernels.append(name)
        run.modules.append(text)
        module.launch(name, step.spec.grid, 32 * warps, numbers, [*tensors, *apart], shared, options)

    def offset(tensor: Tensor, first: Tensor) -> int:
        # Runs of a mixed batch are reached from the first one's address.
        apart.append(tensor)
        return real_offset(tensor, first)

    with contextlib.ExitStack() as stack:
        for module in (families, launch_spec, mixed, ops, switched):
            stack.enter_context(mock.patch.object(module, "target_of", return_value=target))
        for module in (dispatch, private_ops):
            stack.enter_context(mock.patch.object(module, "interpreting", return_value=True))
        stack.enter_context(mock.patch.object(launch_spec, "_INTERPRETED", False))
        stack.enter_context(mock.patch.object(Launch, "run", execute))
        stack.enter_context(mock.patch.object(mixed, "_offset", offset))
        yield run
