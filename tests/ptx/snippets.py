"""Small kernels around a few instructions, for tests of the executor itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ptx.executor import Module, Options

HEAD = ".version 8.4\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n"
_CLASSES = {1: "pred", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, pointers: int, threads: int = 32, registers: str = "") -> str:
    """A kernel with 64-bit parameters, loaded as p0, p1, ...; ``tid`` is the thread."""
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.u64 p{i}, [k_param_{i}];\n" for i in range(pointers))
    names = ", ".join(f"p{i}" for i in range(pointers))
    declared = f".reg .b64 {names};\n" if pointers else ""
    return (
        f"{HEAD}.visible .entry k({parameters})\n.reqntid {threads}\n{{\n{declared}.reg .b32 tid;\n{registers}\n"
        f"{loads}mov.u32 tid, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(
    body: str,
    tensors: list[Tensor],
    threads: int = 32,
    registers: str = "",
    shared_bytes: int = 0,
    options: Options = Options(),  # noqa: B008
    grid: int = 1,
) -> None:
    """Runs a kernel on tensors, whose addresses are p0, p1, ..."""
    module = Module(kernel(body, len(tensors), threads, registers))
    module.launch("k", (grid,), threads, [t.data_ptr() for t in tensors], tensors, shared_bytes, options)


def lanes(line: str, sources: list[list[int]], widths: list[int], to: int) -> list[int]:
    """The result ``d`` of one line for every lane, as unsigned numbers.

    Args:
        sources: bits of a0, a1, ... by lane.
        widths: bytes of each source's register; 1: a predicate.
        to: bytes of the result's register.
    """
    registers, body = f".reg .{_CLASSES[to]} d;\n.reg .b64 at, wide;\n.reg .b32 word;\n", "mul.wide.u32 at, tid, 8;\n"
    inputs = [torch.tensor([v - (1 << 64) if v >= 1 << 63 else v for v in values]) for values in sources]
    out = torch.zeros(32, dtype=torch.int64)
    for k, width in enumerate(widths):
        registers += f".reg .{_CLASSES[width]} a{k};\n.reg .b64 at{k};\n"
        body += f"add.s64 at{k}, p{k}, at;\n"
        if width == 1:
            body += f"ld.global.u32 word, [at{k}];\nsetp.ne.b32 a{k}, word, 0;\n"
        else:
            body += f"ld.global.b{8 * width} a{k}, [at{k}];\n"
    body += line + "\n" + f"add.s64 wide, p{len(sources)}, at;\n"
    body += "selp.b32 word, 1, 0, d;\nst.global.b32 [wide], word;\n" if to == 1 else f"st.global.b{8 * to} [wide], d;\n"
    run(body, [*inputs, out], registers=registers)
    return [v % (1 << 64) for v in out.tolist()]
