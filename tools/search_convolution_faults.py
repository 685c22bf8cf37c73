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
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.convolution_cases import DIRECTIONS, DTYPES, Case, draw, known
from tools.convolution_runs import IMPLEMENTATIONS, run_case

ISAS = ("avx2", "avx512_core", "avx512_core_bf16", "avx512_core_fp16", "avx512_core_amx")
HANG_SECONDS = 30.0
BATCH = 400
QUICK_CASES = 600


@dataclass
class Fault:
    """A case with its fault."""

    case: Case
    description: str

    @property
    def kind(self) -> str:
        """``crash``, ``hang``, ``raised``, ``NaN`` or ``wrong``."""
        return next((kind for kind in ("crash", "hang", "raised", "NaN") if kind in self.description), "wrong")


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
    parser = argparse.ArgumentParser(
        prog="python -m tools.search_convolution_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
