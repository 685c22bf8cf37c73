"""Searches small convolutions for wrong results, crashes and hangs of PyTorch's own CPU kernels, and of ours on them.

Cases are drawn by number from a seed, run in child processes that may crash, and compared with float64 loops over
taps in NumPy. All values are small integers, so that a right result is exact but for its rounding. With a C compiler
every block of memory is filled with NaN when it is allocated: what reads it before it writes it shows.

    python -m tools.search_convolution_faults --cases 20000                         # PyTorch's own convolution
    python -m tools.search_convolution_faults --cases 20000 --isa avx512_core_bf16  # as on a CPU without AMX
    python -m tools.search_convolution_faults --cases 20000 --through auto          # the same shapes through our ops
    python -m tools.search_convolution_faults --out faults.json                     # goes on where that file ends

The exit status is 1 when faults were found. ``--through``: ``torch`` (``F.conv2d`` and its backward), ``packed``
(oneDNN with a reordered weight), and our backends ``aten``, ``auto`` and ``native``, whose cases also have lists.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

THROUGH = ("torch", "packed", "aten", "auto", "native")
ISAS = ("avx2", "avx512_core", "avx512_core_bf16", "avx512_core_fp16", "avx512_core_amx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Relative to the largest value of a result; sums of integers are exact, so this is rounding alone.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}
LAYOUTS = ("contiguous", "channels_last", "ambiguous", "sliced", "sliced_last", "expanded")
HANG_SECONDS = 30.0
BATCH = 400


@dataclass(frozen=True)
class Case:
    """One convolution; ``number`` fixes its values. Pairs are (rows, columns); ``groups`` 0 is one for each channel."""

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
    wanted: str  # forward, input, weight or both: the result, or a gradient

    @property
    def out(self) -> tuple[int, int]:
        """(oH, oW)."""
        h, w = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return h, w


def draw(seed: int, number: int, narrow: bool = False, wide: bool = False) -> Case:
    """The case of a number: small in every way, with the odd ones more often than real layers have them.

    ``narrow`` ones have results of at most 5 columns, a stride or padding of columns, and wider inputs and kernels.
    ``wide`` ones have kernels of 5 to 16 columns.
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
        more = (16, 24, 64) if narrow or wide else ()
        case = Case(
            number,
            rng.choice((1, 1, 2, 2, 3, 16)),
            c_in,
            c_out,
            groups,
            pair(1, 1, 2, 3, 4, 5, 7, 9, 12, 17, 33, *more),
            pair(1, 1, 2, 3, 3, 5, *((7, 11, 14, 16) if narrow or wide else ())),
            pair(1, 1, 2, 3, *((4, 7, 16) if narrow or wide else ())),
            pair(0, 0, 1, 2, *((3,) if narrow else ())),
            pair(1, 1, 1, 2, 3),
            rng.choice(("float32", "float32", "float32", "bfloat16", "bfloat16", "bfloat16", "float16", "float64")),
            rng.choice(
                ("contiguous", "channels_last", "channels_last", "ambiguous", "sliced", "sliced_last", "expanded")
            ),
            rng.choice(("contiguous", "contiguous", "channels_last")),
            rng.choice(("contiguous", "channels_last", "ambiguous", "sliced", "expanded")),
            rng.random() < 0.5,
            rng.choice((1, 2)),
            rng.choice(("forward", "forward", "input", "weight", "both")),
        )
        work = case.batch * c_out * (c_in // groups) * case.kernel[0] * case.kernel[1]
        if narrow and (case.out[1] > 5 or (case.stride[1] == 1 and case.padding[1] == 0)):
            continue
        if wide and case.kernel[1] < 5:
            continue
        if min(case.out) >= 1 and work * case.out[0] * case.out[1] < 3_000_000:
            return case


def known() -> list[Case]:
    """Cases in which PyTorch 2.14 is wrong or crashes, on one CPU or another: some of each class of faults."""

    def case(
        dtype: str,
        wanted: str,
        channels: tuple[int, int],
        width: int,
        kernel: int,
        stride: int | tuple[int, int],
        **more: Any,
    ) -> Case:
        rows = more.pop("rows", 3)
        fields: dict[str, Any] = {"batch": 2, "groups": 1, "size": (9, width), "kernel": (rows, kernel)}
        strides = (1, stride) if isinstance(stride, int) else stride
        fields |= {"stride": strides, "padding": (0, 0), "dilation": (1, 1), "weight_layout": "contiguous"}
        fields |= {"layout": "channels_last", "grad_layout": "contiguous", "bias": True, "threads": 1}
        fields |= {"c_in": channels[0], "c_out": channels[1], "dtype": dtype, "wanted": wanted, "number": len(found)}
        return Case(**(fields | more))

    found: list[Case] = []
    for dtype in ("float32", "bfloat16", "float16"):
        # One column of results, from several columns.
        for c_in, width, kernel, stride in ((1, 3, 3, 2), (1, 7, 2, 7), (13, 5, 3, 3), (2, 3, 2, 2), (40, 4, 2, 2)):
            for layout in ("channels_last", "sliced_last"):
                found.append(case(dtype, "forward", (c_in, 5), width, kernel, stride, layout=layout))
        found.append(case(dtype, "forward", (1, 1), 3, 3, 2, groups=1, dilation=(2, 1)))
        # Rows or columns of results that read padding alone.
        for wanted in ("forward", "input", "weight"):
            found.append(case(dtype, wanted, (8, 8), 1, 1, 2, padding=(0, 1), dilation=(1, 3), rows=1))
            found.append(case(dtype, wanted, (16, 16), 1, 1, 3, padding=(1, 2), dilation=(2, 2)))
            found.append(case(dtype, wanted, (6, 6), 1, 1, 2, padding=(0, 1), groups=6))
            found.append(case(dtype, wanted, (32, 1), 9, 3, 2, size=(1, 9), padding=(2, 0), dilation=(3, 1), rows=2))
            found.append(case(dtype, wanted, (8, 8), 12, 5, 7, padding=(1, 3)))
        # Gradients of narrow images.
        for wanted in ("weight", "both"):
            for width, kernel, stride, padding in (
                (1, 3, 2, 1),
                (1, 3, 2, 2),
                (2, 3, 3, 2),
                (5, 5, 16, 1),
                (4, 5, 5, 3),
            ):
                found.append(case(dtype, wanted, (5, 4), width, kernel, stride, padding=(1, padding)))
                found.append(case(dtype, wanted, (4, 4), width, kernel, stride, padding=(1, padding), groups=4))
        # 1x1 with strides and few channels.
        for strides in ((3, 1), (1, 3), (2, 2)):
            for c_in in (1, 2, 8):
                found.append(case(dtype, "weight", (c_in, 8), 9, 1, strides, rows=1))
        # Wide kernels over few channels.
        for c_in, kernel, stride in (
            (16, 4, 4),
            (24, 4, 4),
            (16, 6, 6),
            (8, 8, 1),
            (12, 8, 8),
            (4, 16, 2),
            (6, 16, 3),
            (2, 32, 1),
        ):
            for rows in (1, 3):
                found.append(case(dtype, "forward", (c_in, 8), 70, kernel, stride, rows=rows, size=(5, 70), batch=1))
    return found


# --- values and their layouts -----------------------------------------------------------------------------------------


def lay_out(t: Tensor, layout: str, rng: random.Random) -> Tensor:
    """``t`` in other memory; ``ambiguous`` gives dimensions of size 1 strides that mean nothing."""
    n, c, h, w = t.shape
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "ambiguous":
        last = rng.random() < 0.5
        made = t.contiguous(memory_format=torch.channels_last) if last else t.contiguous()
        strides = [
            rng.choice((1, c, w, h * w, c * h * w, c * w, s)) if d == 1 else s
            for d, s in zip(t.shape, made.stride(), strict=True)
        ]
        return made.as_strided(t.shape, strides)
    if layout in ("sliced", "sliced_last"):
        wide = t.new_full((n + 1, c + 2, h + 1, w + 1), float("nan"))
        if layout == "sliced_last":
            wide = wide.contiguous(memory_format=torch.channels_last)
        view = wide[1:, 1 : c + 1, 1:, :w]
        return view.copy_(t)
    if layout == "expanded":
        return t[:1].contiguous().expand(n, c, h, w)
    return t.contiguous()


def integers(shape: Sequence[int], dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    """Whole numbers from -3 to 3."""
    return torch.from_numpy(rng.integers(-3, 4, tuple(shape)).astype(np.float64)).to(dtype)


def taps(case: Case) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Each tap with the rows and columns of the padded input that it meets."""
    (oh, ow), (sh, sw), (dh, dw) = case.out, case.stride, case.dilation
    for i in range(case.kernel[0]):
        for j in range(case.kernel[1]):
            rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
            yield i, j, (rows, slice(j * dw, j * dw + (ow - 1) * sw + 1, sw))


def padded(case: Case, x: np.ndarray) -> np.ndarray:
    """The input with its zeros around it, and groups in a dimension of their own: (N, G, C / G, H, W)."""
    (ph, pw), g = case.padding, case.groups
    full = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    return full.reshape(case.batch, g, -1, *full.shape[2:])


def reference(case: Case, x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """The result in float64."""
    full, filters = padded(case, x), w.reshape(case.groups, -1, *w.shape[1:])
    y = np.zeros((case.batch, case.groups, filters.shape[1], *case.out))
    for i, j, place in taps(case):
        y += np.einsum("ngchw,gkc->ngkhw", full[..., place[0], place[1]], filters[..., i, j])
    whole = y.reshape(case.batch, -1, *case.out)
    return whole if b is None else whole + b[:, None, None]


def reference_backward(case: Case, dy: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of input and weight in float64."""
    full, filters = padded(case, x), w.reshape(case.groups, -1, *w.shape[1:])
    grads = dy.reshape(case.batch, case.groups, -1, *case.out)
    dx, dw = np.zeros_like(full), np.zeros_like(filters)
    for i, j, place in taps(case):
        dx[..., place[0], place[1]] += np.einsum("ngkhw,gkc->ngchw", grads, filters[..., i, j])
        dw[..., i, j] = np.einsum("ngkhw,ngchw->gkc", grads, full[..., place[0], place[1]])
    (h, wide), (ph, pw) = case.size, case.padding
    dx = dx.reshape(case.batch, -1, *dx.shape[3:])[:, :, ph : ph + h, pw : pw + wide]
    return dx, dw.reshape(w.shape)


# --- one case ---------------------------------------------------------------------------------------------------------


def lists_of(case: Case, rng: random.Random) -> tuple[list[int] | None, list[int] | None]:
    """In-list and out-list of a case for our ops; equal for depthwise ones."""

    def some(n: int) -> list[int] | None:
        return None if rng.random() < 0.4 else rng.sample(range(n), rng.randint(1, n))

    first = some(case.c_in)
    return first, first if case.groups > 1 else some(case.c_out)


def run_case(case: Case, through: str) -> str | None:
    """None for a right result, else what is wrong."""
    rng, numbers = random.Random(case.number), np.random.default_rng(case.number)
    dtype = DTYPES[case.dtype]
    torch.set_num_threads(case.threads)
    x = lay_out(integers((case.batch, case.c_in, *case.size), dtype, numbers), case.layout, rng)
    w = integers((case.c_out, case.c_in // case.groups, *case.kernel), dtype, numbers)
    w = lay_out(w, case.weight_layout, rng)
    b = integers((case.c_out,), dtype, numbers) if case.bias else None
    dy = lay_out(integers((case.batch, case.c_out, *case.out), dtype, numbers), case.grad_layout, rng)
    exact = [t.double().numpy() if t is not None else None for t in (x, w, b, dy)]
    run = {"torch": run_torch, "packed": run_packed}.get(through, run_ours)
    for got, want, name in run(case, (x, w, b, dy), exact, through, rng):
        error = compare(got, want, case)
        if error:
            return f"{name}: {error}"
    return None


Results = Iterable[tuple[Tensor, Any, str]]


def run_torch(case: Case, tensors: Any, exact: Any, through: str, rng: random.Random) -> Results:
    """PyTorch's own convolution and its backward."""
    (x, w, b, dy), (nx, nw, nb, ndy) = tensors, exact
    options = (case.stride, case.padding, case.dilation)
    if case.wanted == "forward":
        return [(F.conv2d(x, w, b, *options, case.groups), reference(case, nx, nw, nb), "forward")]
    mask = [case.wanted != "weight", case.wanted != "input", False]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *options, False, (0, 0), case.groups, mask)
    wanted = reference_backward(case, ndy, nx, nw)
    return [r for r, m in zip(((dx, wanted[0], "input"), (dw, wanted[1], "weight")), mask[:2], strict=True) if m]


def run_packed(case: Case, tensors: Any, exact: Any, through: str, rng: random.Random) -> Results:
    """A convolution of oneDNN with a weight that was reordered for it."""
    (x, w, b, _), (nx, nw, nb, _) = tensors, exact
    if case.dtype not in ("float32", "bfloat16"):
        return []
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        w.contiguous(), case.padding, case.stride, case.dilation, case.groups, x.shape
    )
    y = torch.ops.mkldnn._convolution_pointwise(
        x, packed, b, case.padding, case.stride, case.dilation, case.groups, "none", [], ""
    )
    return [(y, reference(case, nx, nw, nb), "forward")]


def run_ours(case: Case, tensors: Any, exact: Any, through: str, rng: random.Random) -> Results:
    """Our ops with lists; what they leave out is NaN."""
    import bap_kernels as bk

    if case.groups not in (1, case.c_in) or (case.groups > 1 and case.c_out != case.c_in):
        return []
    (x, w, b, dy), (nx, nw, nb, ndy) = tensors, exact
    in_list, out_list = lists_of(case, rng)
    read = list(range(case.c_in)) if in_list is None else in_list
    kept = list(range(case.c_out)) if out_list is None else out_list
    if in_list is not None and case.layout != "expanded":
        x[:, [c for c in range(case.c_in) if c not in set(in_list)]] = float("nan")
    groups = 1 if case.groups == 1 else len(read)
    part = dataclasses.replace(case, c_in=len(read), c_out=len(kept), groups=groups)
    nw_part = nw[kept] if case.groups > 1 else nw[np.ix_(kept, read)]
    nx_part, nb_part, ndy_part = nx[:, read], None if nb is None else nb[kept], ndy[:, kept]
    index = [None if i is None else torch.tensor(i, dtype=torch.int32) for i in (in_list, out_list)]
    sides = tuple(side for side in case.padding for _ in range(2))
    bk.use_backend(through)
    if case.wanted == "forward":
        op = torch.ops.bap_kernels.gathered_conv2d
        want = reference(part, nx_part, nw_part, nb_part)
        cached = rng.random() < 0.5
        args = (x, w, b, *index, case.stride, sides, case.dilation, case.groups, cached)
        try:
            return [(op(*args), want, "forward"), (op(*args), want, "forward, again")]
        except NotImplementedError:
            return []
    mask = [case.wanted != "weight", case.wanted != "input", False]
    dy_part = lay_out(dy[:, kept], case.grad_layout, rng)
    try:
        dx, dw, _ = torch.ops.bap_kernels.gathered_conv2d_backward(
            dy_part, x, w, *index, case.stride, sides, case.dilation, case.groups, mask
        )
    except NotImplementedError:
        return []
    dx_part, dw_part = reference_backward(
        part, ndy_part if case.grad_layout != "expanded" else dy_part.double().numpy(), nx_part, nw_part
    )
    want_dx, want_dw = np.zeros(nx.shape), np.zeros(nw.shape)
    want_dx[:, read] = dx_part
    if case.groups > 1:
        want_dw[kept] = dw_part
    else:
        want_dw[np.ix_(kept, read)] = dw_part
    return [r for r, m in zip(((dx, want_dx, "input"), (dw, want_dw, "weight")), mask[:2], strict=True) if m]


def compare(got: Tensor, want: np.ndarray, case: Case) -> str | None:
    """What is wrong with a result, or None."""
    if tuple(got.shape) != want.shape:
        return f"shape {tuple(got.shape)} for {want.shape}"
    values = got.double().numpy()
    if np.isnan(values).any():
        return "NaN"
    error = float(np.abs(values - want).max(initial=0))
    largest = float(np.abs(want).max(initial=0))
    return f"error {error:.3g} of {largest:.3g}" if error > TOLERANCE[case.dtype] * (largest + 1) else None


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A case that went wrong, and how."""

    case: Case
    what: str

    @property
    def kind(self) -> str:
        """Wrong, NaN, crash, hang or raised."""
        for word in ("crash", "hang", "raised", "NaN"):
            if word in self.what:
                return word
        return "wrong"


def child(cases: Sequence[Case], through: str, pipe: int) -> None:
    """Runs cases and writes one line for each before and after it."""
    for case in cases:
        os.write(pipe, f"start {case.number}\n".encode())
        try:
            what = run_case(case, through)
        except Exception as error:
            what = f"raised {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        os.write(pipe, f"end {case.number} {json.dumps(what)}\n".encode())


def run_batch(cases: Sequence[Case], through: str) -> list[Fault]:
    """All cases in forked processes: a new one after each crash, from the next case on."""
    faults: list[Fault] = []
    first = 0
    by_number = {case.number: i for i, case in enumerate(cases)}
    while first < len(cases):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child(cases[first:], through, write_end)
            os._exit(0)
        os.close(write_end)
        text, hang, last = b"", False, first
        while True:
            if not select.select([read_end], [], [], HANG_SECONDS)[0]:
                hang = True
                os.kill(pid, signal.SIGKILL)
                break
            chunk = os.read(read_end, 65536)
            if not chunk:
                break
            text += chunk
        os.close(read_end)
        _, status = os.waitpid(pid, 0)
        running = None
        for line in text.decode().splitlines():
            word, number, *rest = line.split(" ", 2)
            last = by_number[int(number)]
            running = last if word == "start" else None
            what = json.loads(rest[0]) if rest else None
            if what:
                faults.append(Fault(cases[last], what))
        if running is not None or status != 0:
            at = last if running is None else running
            how = "hang" if hang else f"crash by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "crash"
            # Memory that an earlier case spoiled may end a later one: alone, the case shows whether it is its own.
            alone = len(cases) > 1 and not hang and not run_batch([cases[at]], through)
            faults.append(Fault(cases[at], how + (" after other cases" if alone else "")))
            first = at + 1
        else:
            first = len(cases)
    return faults


def poisoned_environment(isa: str | None, guard: bool) -> dict[str, str]:
    """Environment of the process that searches: NaN in new memory, and the CPU that it is to take itself for."""
    env = dict(os.environ, BAP_SEARCH_READY="1", OMP_NUM_THREADS="2")
    if isa:
        env["ONEDNN_MAX_CPU_ISA"] = isa
        env["ATEN_CPU_CAPABILITY"] = "avx2" if isa == "avx2" else "avx512"
    if guard:
        env["BAP_SEARCH_GUARD"] = "1"
    folder = Path(tempfile.gettempdir()) / f"bap_search_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    source, library = Path(__file__).with_name("guarded_malloc.c"), folder / f"guarded_malloc_{os.getpid()}.so"
    compiler = os.environ.get("CC", "cc")
    try:
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True, capture_output=True
        )
        env["LD_PRELOAD"] = str(library)
    except (OSError, subprocess.CalledProcessError):
        print("no C compiler: new memory is not filled with NaN", file=sys.stderr)
    return env


# --- what was found ---------------------------------------------------------------------------------------------------


def family(fault: Fault) -> tuple[str, ...]:
    """The class of a fault in the table."""
    c = fault.case
    groups = "dense" if c.groups == 1 else "depthwise" if c.groups == c.c_in == c.c_out else "grouped"
    kernel = "1x1" if c.kernel == (1, 1) else "kxk"
    return c.dtype, c.wanted, groups, kernel, fault.kind


def table(faults: Sequence[Fault]) -> str:
    """One line for each class of faults, with its smallest case."""
    classes = collections.defaultdict(list)
    for fault in faults:
        classes[family(fault)].append(fault)
    lines = []
    for key, members in sorted(classes.items()):
        least = min(members, key=lambda f: (f.case.batch * f.case.c_in * f.case.c_out, sum(f.case.size)))
        c = least.case
        lines.append(
            f"{len(members):5d}  {' '.join(key):40s} N{c.batch} {c.c_in}->{c.c_out} g{c.groups} in{c.size} out{c.out} "
            f"k{c.kernel} s{c.stride} p{c.padding} d{c.dilation} {c.layout}/{c.weight_layout}/{c.grad_layout} "
            f"threads {c.threads}: {least.what}"
        )
    return "\n".join(lines)


def search(
    seed: int,
    kind: tuple[bool, bool],
    first: int,
    count: int,
    through: str,
    keep: Callable[[Case], bool],
    seconds: float,
) -> tuple[int, int, list[Fault]]:
    """(next number, cases run, faults) of the cases from ``first`` on, until their count or the time is reached."""
    faults: list[Fault] = []
    end, number, ran = time.monotonic() + seconds, first, 0
    while number < first + count and time.monotonic() < end:
        stop = min(number + BATCH, first + count)
        cases = [case for case in (draw(seed, i, *kind) for i in range(number, stop)) if keep(case)]
        faults += run_batch(cases, through)
        ran += len(cases)
        number = stop
    return number, ran, faults


def _case(fields: dict[str, Any]) -> Case:
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Case(**plain)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--through", choices=THROUGH, default="torch")
    parser.add_argument("--isa", choices=ISAS, help="the most that oneDNN may take from this CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="only cases of this dtype")
    parser.add_argument("--wanted", choices=("forward", "input", "weight", "both"), help="only cases of this direction")
    parser.add_argument("--narrow", action="store_true", help="only narrow results, where most faults are")
    parser.add_argument("--wide", action="store_true", help="only wide kernels")
    parser.add_argument("--out", type=Path, help="JSON; a file of the same search is gone on with")
    parser.add_argument("--guard", action="store_true", help="crash where memory is written behind its end; slower")
    parser.add_argument("--case", type=int, help="run one case, in this process")
    parser.add_argument("--known", action="store_true", help="the cases of known faults, and no search")
    parser.add_argument("--quick", action="store_true", help="600 cases, within a minute")
    options = parser.parse_args(argv)
    if "BAP_SEARCH_READY" not in os.environ:
        command = [sys.executable, "-m", "tools.search_convolution_faults", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=poisoned_environment(options.isa, options.guard), check=False).returncode
    if options.case is not None:
        case = (
            known()[options.case] if options.known else draw(options.seed, options.case, options.narrow, options.wide)
        )
        print(case, run_case(case, options.through), sep="\n")
        return 0
    if options.known:
        faults = run_batch(known(), options.through)
        print(table(faults))
        print(
            f"{len(faults)} faults in {len(known())} known cases through {options.through}, torch {torch.__version__}"
        )
        return 1 if faults else 0
    if options.quick:
        options.cases = 600
    facts = {
        "seed": options.seed,
        "narrow": options.narrow,
        "wide": options.wide,
        "through": options.through,
        "isa": options.isa,
        "guard": options.guard,
        "torch": torch.__version__,
    }
    state: dict[str, Any] = {**facts, "next": 0, "ran": 0, "faults": []}
    if options.out is not None and options.out.exists():
        before = json.loads(options.out.read_text())
        if all(before[key] == value for key, value in facts.items()):
            state = before

    def keep(case: Case) -> bool:
        return options.dtype in (None, case.dtype) and options.wanted in (None, case.wanted)

    following, ran, faults = search(
        options.seed,
        (options.narrow, options.wide),
        state["next"],
        options.cases,
        options.through,
        keep,
        options.seconds,
    )
    state.update(next=following, ran=state["ran"] + ran)
    state["faults"] += [{"case": dataclasses.asdict(f.case), "what": f.what} for f in faults]
    if options.out is not None:
        options.out.write_text(json.dumps(state))
    everything = [Fault(_case(f["case"]), f["what"]) for f in state["faults"]]
    print(table(everything))
    print(f"{len(everything)} faults in {state['ran']} cases through {options.through}, torch {torch.__version__}")
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
