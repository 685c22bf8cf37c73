"""Searches small convolutions for wrong results, crashes and hangs of PyTorch's CPU kernels, and of this package.

Cases are drawn by number from a seed, run in child processes that may crash, and compared with float64 loops over
taps in NumPy. All values are small integers, so that a correct result is exact up to its rounding. With a C compiler,
newly allocated memory is filled with NaN, so that reads of uninitialised memory show.

    python -m tools.search_convolution_faults --cases 20000                         # PyTorch's own convolution
    python -m tools.search_convolution_faults --cases 20000 --isa avx512_core_bf16  # as on a CPU without AMX
    python -m tools.search_convolution_faults --cases 20000 --through auto          # the same shapes through our ops
    python -m tools.search_convolution_faults --out faults.json                     # continues where that file ends

The exit status is 1 if there are faults. ``--through``: ``torch`` (``F.conv2d`` and its backward), ``packed``
(oneDNN with a reordered weight), and our backends ``aten``, ``auto`` and ``native``, whose cases also have lists and,
forward, scales, shifts, residuals and ReLUs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("aten", "auto", "native")
IMPLEMENTATIONS = ("torch", "packed", *BACKENDS)
ISAS = ("avx2", "avx512_core", "avx512_core_bf16", "avx512_core_fp16", "avx512_core_amx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Relative to the largest value of a result; sums of integers are exact, so this is rounding alone.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}
DIRECTIONS = ("forward", "input", "weight", "both")
HANG_SECONDS = 30.0
BATCH = 400
QUICK_CASES = 600

# Scale, shift, residual and ReLU behind a convolution.
Epilogue = tuple[Tensor | None, Tensor | None, Tensor | None, bool]


@dataclass(frozen=True)
class Case:
    """One convolution; ``number`` is the seed of its values. Pairs are (height, width)."""

    number: int
    batch: int
    c_in: int
    c_out: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: str
    layout: str
    weight_layout: str
    grad_layout: str
    bias: bool
    threads: int
    direction: str  # of DIRECTIONS: the result, or gradients of input and weight

    @property
    def out(self) -> tuple[int, int]:
        """(oH, oW)."""
        geometry = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((size + 2 * padding - dilation * (k - 1) - 1) // s + 1 for size, k, s, padding, dilation in geometry)
        return h, w

    @property
    def gradients(self) -> list[str]:
        """The gradients to compute."""
        return [name for name in ("input", "weight") if self.direction in (name, "both")]


@dataclass
class Fault:
    """A case with its fault."""

    case: Case
    description: str

    @property
    def kind(self) -> str:
        """``crash``, ``hang``, ``raised``, ``NaN`` or ``wrong``."""
        return next((kind for kind in ("crash", "hang", "raised", "NaN") if kind in self.description), "wrong")


def draw(seed: int, number: int, narrow: bool = False, wide: bool = False) -> Case:
    """Draw a small case with more unusual values than real layers have.

    Args:
        seed: Of the search.
        number: Of the case.
        narrow: Results of at most 5 columns, a horizontal stride or padding, and wider inputs and kernels.
        wide: Kernels of 5 to 16 columns.
    """
    rng = random.Random(f"{seed}/{number}")

    def pair(*values: int) -> tuple[int, int]:
        return rng.choice(values), rng.choice(values)

    while True:
        kind = rng.choice(("dense", "dense", "dense", "depthwise", "grouped"))
        c_in, c_out = (rng.choice((1, 1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 40, 64)) for _ in range(2))
        groups = 1
        if kind == "depthwise":
            groups = c_out = c_in
        elif kind == "grouped":
            groups = rng.choice((2, 3))
            c_in, c_out = c_in * groups, c_out * groups
        large = narrow or wide
        case = Case(
            number,
            rng.choice((1, 1, 2, 2, 3, 16)),
            c_in,
            c_out,
            groups,
            pair(1, 1, 2, 3, 4, 5, 7, 9, 12, 17, 33, *((16, 24, 64) if large else ())),
            pair(1, 1, 2, 3, 3, 5, *((7, 11, 14, 16) if large else ())),
            pair(1, 1, 2, 3, *((4, 7, 16) if large else ())),
            pair(0, 0, 1, 2, *((3,) if narrow else ())),
            pair(1, 1, 1, 2, 3),
            rng.choice((*["float32"] * 3, *["bfloat16"] * 3, "float16", "float64")),
            rng.choice(("contiguous", *["channels_last"] * 2, "ambiguous", "sliced", "sliced_last", "expanded")),
            rng.choice(("contiguous", "contiguous", "channels_last")),
            rng.choice(("contiguous", "channels_last", "ambiguous", "sliced", "expanded")),
            rng.random() < 0.5,
            rng.choice((1, 2)),
            rng.choice(("forward", *DIRECTIONS)),
        )
        work = case.batch * c_out * (c_in // groups) * case.kernel[0] * case.kernel[1]
        if narrow and (case.out[1] > 5 or (case.stride[1] == 1 and case.padding[1] == 0)):
            continue
        if wide and case.kernel[1] < 5:
            continue
        if min(case.out) >= 1 and work * case.out[0] * case.out[1] < 3_000_000:
            return case


def known() -> list[Case]:
    """Cases in which PyTorch 2.14 is wrong or crashes on one CPU or another: some of each class of faults."""
    # (direction, batch, (C_in, C_out, groups), size, kernel, stride, padding, dilation, layout)
    none, unit, last = (0, 0), (1, 1), "channels_last"
    # One output column from several input columns.
    rows: list[tuple[Any, ...]] = [
        ("forward", 2, (c_in, 5, 1), (9, width), (3, kernel), (1, stride), none, unit, layout)
        for c_in, width, kernel, stride in ((1, 3, 3, 2), (1, 7, 2, 7), (13, 5, 3, 3), (2, 3, 2, 2), (40, 4, 2, 2))
        for layout in (last, "sliced_last")
    ]
    rows.append(("forward", 2, (1, 1, 1), (9, 3), (3, 3), (1, 2), none, (2, 1), last))
    for direction in ("forward", "input", "weight"):
        # Output rows or columns that read padding alone.
        rows += [
            (direction, 2, (8, 8, 1), (9, 1), (1, 1), (1, 2), (0, 1), (1, 3), last),
            (direction, 2, (16, 16, 1), (9, 1), (3, 1), (1, 3), (1, 2), (2, 2), last),
            (direction, 2, (6, 6, 6), (9, 1), (3, 1), (1, 2), (0, 1), unit, last),
            (direction, 2, (32, 1, 1), (1, 9), (2, 3), (1, 2), (2, 0), (3, 1), last),
            (direction, 2, (8, 8, 1), (9, 12), (3, 5), (1, 7), (1, 3), unit, last),
        ]
    # Gradients of narrow images.
    rows += [
        (direction, 2, channels, (9, width), (3, kernel), (1, stride), (1, padding), unit, last)
        for direction in ("weight", "both")
        for width, kernel, stride, padding in ((1, 3, 2, 1), (1, 3, 2, 2), (2, 3, 3, 2), (5, 5, 16, 1), (4, 5, 5, 3))
        for channels in ((5, 4, 1), (4, 4, 4))
    ]
    # 1x1 with strides and few channels.
    strides = ((3, 1), (1, 3), (2, 2))
    rows += [("weight", 2, (c, 8, 1), (9, 9), unit, s, none, unit, last) for s in strides for c in (1, 2, 8)]
    # Wide kernels over few channels.
    wide = ((16, 4, 4), (24, 4, 4), (16, 6, 6), (8, 8, 1), (12, 8, 8), (4, 16, 2), (6, 16, 3), (2, 32, 1))
    rows += [
        ("forward", 1, (c_in, 8, 1), (5, 70), (height, width), (1, stride), none, unit, last)
        for c_in, width, stride in wide
        for height in (1, 3)
    ]
    cases: list[Case] = []
    for dtype, (direction, batch, channels, *geometry, layout) in product(("float32", "bfloat16", "float16"), rows):
        fields: list[Any] = [*channels, *geometry, dtype, layout, "contiguous", "contiguous", True, 1, direction]
        cases.append(Case(len(cases), batch, *fields))
    return cases


def lay_out(t: Tensor, layout: str, rng: random.Random) -> Tensor:
    """Return the values of ``t`` in another layout; ``ambiguous`` gives dimensions of size 1 arbitrary strides."""
    if layout == "expanded":
        return t[:1].contiguous().expand(t.shape)
    if layout == "ambiguous":
        _, c, h, w = t.shape
        dense = t.contiguous(memory_format=rng.choice((torch.channels_last, torch.contiguous_format)))
        arbitrary = (1, c, w, h * w, c * h * w, c * w)
        strides = [
            rng.choice((*arbitrary, stride)) if size == 1 else stride
            for size, stride in zip(t.shape, dense.stride(), strict=True)
        ]
        return dense.as_strided(t.shape, strides)
    memory_format = torch.channels_last if layout in ("channels_last", "sliced_last") else torch.contiguous_format
    if layout in ("sliced", "sliced_last"):
        n, c, h, w = t.shape
        base = t.new_full((n + 1, c + 2, h + 1, w + 1), float("nan")).contiguous(memory_format=memory_format)
        return base[1:, 1 : c + 1, 1:, :w].copy_(t)
    return t.contiguous(memory_format=memory_format)


def reference(case: Case, x: Any, w: Any, b: Any, dy: Any) -> dict[str, Any]:
    """Return the result (``forward``) or the gradients that the case asks for, by name, of float64 arrays."""
    (oH, oW), (sH, sW), (dH, dW), (pH, pW) = case.out, case.stride, case.dilation, case.padding
    N, G, (H, W) = case.batch, case.groups, case.size
    x = np.pad(x, ((0, 0), (0, 0), (pH, pH), (pW, pW)))
    x = x.reshape(N, G, -1, *x.shape[2:])
    w, dy = w.reshape(G, -1, *w.shape[1:]), dy.reshape(N, G, -1, oH, oW)
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for i, j in np.ndindex(*case.kernel):
        pixels = (..., slice(i * dH, i * dH + (oH - 1) * sH + 1, sH), slice(j * dW, j * dW + (oW - 1) * sW + 1, sW))
        if case.direction == "forward":
            y += np.einsum("ngchw,gkc->ngkhw", x[pixels], w[..., i, j])
        else:
            dx[pixels] += np.einsum("ngkhw,gkc->ngchw", dy, w[..., i, j])
            dw[..., i, j] = np.einsum("ngkhw,ngchw->gkc", dy, x[pixels])
    if case.direction == "forward":
        return {"forward": y.reshape(N, -1, oH, oW) + (0 if b is None else b[:, None, None])}
    dx = dx.reshape(N, -1, *dx.shape[3:])[:, :, pH : pH + H, pW : pW + W]
    return {"input": dx, "weight": dw.reshape(case.c_out, -1, *case.kernel)}


def run_case(case: Case, implementation: str) -> str | None:
    """Run a case; return what is wrong with its results, or None."""
    if implementation in BACKENDS and case.groups > 1 and not case.groups == case.c_in == case.c_out:
        return None  # our ops are dense or depthwise
    rng, generator = random.Random(case.number), torch.Generator().manual_seed(case.number)
    torch.set_num_threads(case.threads)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(DTYPES[case.dtype])

    x = lay_out(integers(case.batch, case.c_in, *case.size), case.layout, rng)
    w = lay_out(integers(case.c_out, case.c_in // case.groups, *case.kernel), case.weight_layout, rng)
    b = integers(case.c_out) if case.bias else None
    dy = lay_out(integers(case.batch, case.c_out, *case.out), case.grad_layout, rng)
    exact_x, exact_w, exact_dy = (t.double().numpy() for t in (x, w, dy))
    exact_b = None if b is None else b.double().numpy()
    if implementation not in BACKENDS:
        expected = reference(case, exact_x, exact_w, exact_b, exact_dy)
        results = run_pytorch(case, x, w, b, dy, packed=implementation == "packed")
    else:
        in_list, out_list = draw_lists(case, rng)
        read, kept = (range(n) if i is None else i for i, n in ((in_list, case.c_in), (out_list, case.c_out)))
        off = np.setdiff1d(range(case.c_in), read)
        exact_x[:, off] = 0
        exact_dy[:, np.setdiff1d(range(case.c_out), kept)] = 0
        if case.layout != "expanded":
            x[:, off] = float("nan")
        dy = lay_out(dy[:, list(kept)], case.grad_layout, rng)
        expected = reference(case, exact_x, exact_w, exact_b, exact_dy)
        after: Epilogue = (None, None, None, False)
        if case.direction == "forward":
            expected["forward"] = expected["forward"][:, list(kept)]
            if rng.random() < 0.7:
                after = draw_epilogue(expected["forward"].shape, case, rng, generator)
                expected["forward"] = with_epilogue(expected["forward"], after)
            expected["repeated forward"] = expected["forward"]
        else:
            expected["input"][:, off] = 0
        index = [None if i is None else torch.tensor(i, dtype=torch.int32) for i in (in_list, out_list)]
        results = run_backend(case, implementation, x, w, b, dy, index, rng.random() < 0.5, after)
    for name, result in results.items():
        if error := difference(result, expected[name], TOLERANCE[case.dtype]):
            return f"{name}: {error}"
    return None


def draw_lists(case: Case, rng: random.Random) -> tuple[list[int] | None, list[int] | None]:
    """Draw in-list and out-list; they are equal for depthwise cases."""

    def some(n: int) -> list[int] | None:
        return None if rng.random() < 0.4 else rng.sample(range(n), rng.randint(1, n))

    in_list = some(case.c_in)
    return in_list, in_list if case.groups > 1 else some(case.c_out)


def draw_epilogue(shape: tuple[int, ...], case: Case, rng: random.Random, generator: torch.Generator) -> Epilogue:
    """Draw scale, shift, residual (None: there is none) and whether there is a ReLU; all values are integers."""

    def some(*size: int) -> Tensor | None:
        return torch.randint(-3, 4, size, generator=generator) if rng.random() < 0.5 else None

    scale, shift, residual = some(shape[1]), some(shape[1]), some(*shape)
    if residual is not None:
        residual = lay_out(residual.to(DTYPES[case.dtype]), rng.choice((case.layout, case.grad_layout)), rng)
    scale, shift = (None if vector is None else vector.float() for vector in (scale, shift))
    return scale, shift, residual, rng.random() < 0.5


def with_epilogue(y: Any, after: Epilogue) -> Any:
    """The float64 array with scale, shift, residual and ReLU."""
    scale, shift, residual, relu = after
    if scale is not None:
        y = y * scale.double().numpy()[:, None, None]
    if shift is not None:
        y = y + shift.double().numpy()[:, None, None]
    if residual is not None:
        y = y + residual.double().numpy()
    return np.maximum(y, 0) if relu else y


def run_pytorch(case: Case, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, packed: bool) -> dict[str, Tensor]:
    """Results of PyTorch's own convolution, or of oneDNN's with a reordered weight; empty where that does not exist."""
    geometry = case.stride, case.padding, case.dilation
    if packed:
        if case.dtype not in ("float32", "bfloat16") or case.direction != "forward":
            return {}
        order = case.padding, case.stride, case.dilation, case.groups
        weight = torch.ops.mkldnn._reorder_convolution_weight(w.contiguous(), *order, x.shape)
        return {"forward": torch.ops.mkldnn._convolution_pointwise(x, weight, b, *order, "none", [], "")}
    if case.direction == "forward":
        return {"forward": F.conv2d(x, w, b, *geometry, case.groups)}
    mask = [name in case.gradients for name in ("input", "weight", "bias")]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, False, (0, 0), case.groups, mask)
    return {name: {"input": dx, "weight": dw}[name] for name in case.gradients}


def run_backend(
    case: Case,
    backend: str,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    dy: Tensor,
    index: Sequence[Tensor | None],
    cache_packed: bool,
    after: Epilogue,
) -> dict[str, Tensor]:
    """Results of our ops under one backend; empty where they do not support the case."""
    import bap_kernels as bk

    ops = torch.ops.bap_kernels
    geometry = case.stride, [side for side in case.padding for _ in range(2)], case.dilation, case.groups
    bk.use_backend(backend)
    try:
        if case.direction == "forward":
            names = ("forward", "repeated forward")
            if not after[3] and all(part is None for part in after):
                return {name: ops.gathered_conv2d(x, w, b, *index, *geometry, cache_packed) for name in names}
            fusion = (None, None, False, *after, cache_packed)
            return {name: ops._gathered_conv2d_fused(x, w, b, *index, *geometry, *fusion)[0] for name in names}
        mask = [name in case.gradients for name in ("input", "weight", "bias")]
        dx, dw, _ = ops.gathered_conv2d_backward(dy, x, w, *index, *geometry, mask)
        return {name: {"input": dx, "weight": dw}[name] for name in case.gradients}
    except NotImplementedError:
        return {}


def difference(result: Tensor, expected: Any, tolerance: float) -> str | None:
    """Return what is wrong with a result, or None."""
    if tuple(result.shape) != expected.shape:
        return f"shape {tuple(result.shape)} instead of {expected.shape}"
    values = result.double().numpy()
    if np.isnan(values).any():
        return "NaN"
    error, largest = np.abs(values - expected).max(initial=0), np.abs(expected).max(initial=0)
    return f"error {error:.3g} of {largest:.3g}" if error > tolerance * (largest + 1) else None


def run_cases(cases: Sequence[Case], implementation: str, sender: Any) -> None:
    """Run cases and send what is wrong with each, or None."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.disable()  # crashes are expected
    for case in cases:
        try:
            description = run_case(case, implementation)
        except Exception as error:
            description = f"raised {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        sender.send(description)


def run_batch(cases: Sequence[Case], implementation: str) -> list[Fault]:
    """Run cases in forked processes; after a crash or a hang a new process continues with the next case."""
    fork = multiprocessing.get_context("fork")
    faults: list[Fault] = []
    done = 0
    while done < len(cases):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=run_cases, args=(cases[done:], implementation, sender))
        process.start()
        sender.close()
        end = "hang"
        try:
            while done < len(cases) and receiver.poll(HANG_SECONDS):
                if description := receiver.recv():
                    faults.append(Fault(cases[done], description))
                done += 1
        except EOFError:
            process.join()
            end = f"crash, exit code {process.exitcode}"
            # An earlier case may have corrupted memory: run the case alone to see whether the fault is its own.
            if len(cases) > 1 and not run_batch([cases[done]], implementation):
                end += " after other cases"
        process.kill()
        process.join()
        if done < len(cases):
            faults.append(Fault(cases[done], end))
            done += 1
    return faults


def search_environment(isa: str | None, guard: bool) -> dict[str, str]:
    """Return the environment of the searching process: NaN in new memory, and a limited instruction set."""
    env = dict(os.environ, BAP_SEARCH_READY="1", OMP_NUM_THREADS="2", **({"BAP_SEARCH_GUARD": "1"} if guard else {}))
    if isa:
        env |= {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "avx2" if isa == "avx2" else "avx512"}
    source = Path(__file__).with_name("guarded_malloc.c")
    library = Path(tempfile.mkdtemp(prefix="bap_search_")) / "guarded_malloc.so"
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
        env["LD_PRELOAD"] = str(library)
    except (OSError, subprocess.CalledProcessError):
        print("no C compiler: new memory is not filled with NaN", file=sys.stderr)
    return env


def table(faults: Sequence[Fault]) -> str:
    """Return one line for each class of faults, with its smallest case."""
    classes = defaultdict(list)
    for fault in faults:
        c = fault.case
        groups = "dense" if c.groups == 1 else "depthwise" if c.groups == c.c_in == c.c_out else "grouped"
        kernel = "1x1" if c.kernel == (1, 1) else "kxk"
        classes[c.dtype, c.direction, groups, kernel, fault.kind].append(fault)
    lines = []
    for key, members in sorted(classes.items()):
        least = min(members, key=lambda f: (f.case.batch * f.case.c_in * f.case.c_out, sum(f.case.size)))
        c = least.case
        lines.append(
            f"{len(members):5d}  {' '.join(key):40s} N{c.batch} {c.c_in}->{c.c_out} g{c.groups} in{c.size} out{c.out} "
            f"k{c.kernel} s{c.stride} p{c.padding} d{c.dilation} {c.layout}/{c.weight_layout}/{c.grad_layout} "
            f"threads {c.threads}: {least.description}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--through", choices=IMPLEMENTATIONS, default="torch", help="what runs the cases")
    parser.add_argument("--isa", choices=ISAS, help="the highest instruction set that oneDNN may use")
    parser.add_argument("--dtype", choices=DTYPES, help="only cases of this dtype")
    parser.add_argument("--direction", "--wanted", choices=DIRECTIONS, help="only cases of this direction")
    parser.add_argument("--narrow", action="store_true", help="only narrow results, which have most faults")
    parser.add_argument("--wide", action="store_true", help="only wide kernels")
    parser.add_argument("--out", type=Path, help="JSON file; one of the same search is continued")
    parser.add_argument("--guard", action="store_true", help="crash on writes past the end of a tensor; slower")
    parser.add_argument("--case", type=int, help="run one case, in this process")
    parser.add_argument("--known", action="store_true", help="run the cases of known faults instead of a search")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases, within a minute")
    options = parser.parse_args(argv)
    if "BAP_SEARCH_READY" not in os.environ:
        command = [sys.executable, "-m", "tools.search_convolution_faults", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=search_environment(options.isa, options.guard), check=False).returncode

    def case_of(number: int) -> Case:
        return known()[number] if options.known else draw(options.seed, number, options.narrow, options.wide)

    if options.case is not None:
        print(case_of(options.case), run_case(case_of(options.case), options.through), sep="\n")
        return 0
    identity = {name: getattr(options, name) for name in ("seed", "narrow", "wide", "through", "isa", "guard", "known")}
    identity["torch"] = torch.__version__
    state: dict[str, Any] = {**identity, "next": 0, "ran": 0, "faults": []}
    if options.out is not None and options.out.exists():
        saved = json.loads(options.out.read_text())
        state = saved if saved.items() >= identity.items() else state
    last = len(known()) if options.known else state["next"] + (QUICK_CASES if options.quick else options.cases)
    deadline = time.monotonic() + options.seconds
    while state["next"] < last and time.monotonic() < deadline:
        stop = min(state["next"] + BATCH, last)
        cases = [case for case in map(case_of, range(state["next"], stop)) if options.dtype in (None, case.dtype)]
        cases = [case for case in cases if options.direction in (None, case.direction)]
        state["faults"] += [(fault.case.number, fault.description) for fault in run_batch(cases, options.through)]
        state.update(next=stop, ran=state["ran"] + len(cases))
        if options.out is not None:
            options.out.write_text(json.dumps(state))
    faults = [Fault(case_of(number), description) for number, description in state["faults"]]
    print(table(faults))
    print(f"{len(faults)} faults in {state['ran']} cases through {options.through}, torch {torch.__version__}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
