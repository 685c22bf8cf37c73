"""Runs every operation of the package on the networks of ``tools/networks.txt``.

    python -m tools.try_networks [--only PATTERN] [--operations plan,prune] [--out FILE] [--again] [--table]

Lists are random, for two domains, half of the channels each. Every result is compared with the masked dense network:
PyTorch's own layers with hooks that multiply by masks. Each operation on each network runs in a separate process with a
time limit, so that a crash or a hang is a row like any other. Rows are appended to a file of JSON lines; rows that the
file has are not run again. Prints a table in Markdown and a summary. Needs the extra ``networks``.

    ok        equal to the masked dense network
    refused   an error raised by the package, with its message
    WRONG     a different result without an error
    crash     any other error, or the end of the process
    hang      longer than the time limit
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import multiprocessing as mp
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bap_kernels as bk
from tools.network_operations import DOMAINS, OPERATIONS, Outcome, Subject, WrongError
from tools.networks import LIST, names

# Measuring takes most of the time and does not change results; native is opt-in.
BACKENDS: dict[str, Any] = {"swap": "auto", "plan": "native"}


PACKAGE_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError)


def _outcome(operation: str, subject: Subject) -> Outcome:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            with bk.use_backend(BACKENDS.get(operation, "aten")):
                outcome = {"status": "ok", **OPERATIONS[operation](subject)}
        except WrongError as error:
            outcome = {"status": "WRONG", "detail": str(error)}
        except Exception as error:
            text = str(error)
            of_package = re.match(r"[A-Za-z_.]+\(\): ", text) and isinstance(error, PACKAGE_ERRORS)
            status = "refused" if of_package else "crash"
            if "to equal the masked dense network" in text:
                status = "WRONG"
            outcome = {"status": status, "detail": f"{type(error).__name__}: {text[:600]}"}
            if status == "crash":
                outcome["trace"] = traceback.format_exc()[-2500:]
    messages = list(dict.fromkeys(str(r.message) for r in records if "bap_kernels" in str(r.filename)))
    return {**outcome, "warnings": messages} if messages else outcome


def _try(subject: Subject, name: str, shape: tuple[int, ...], operation: str, pipe: Any) -> None:
    start = time.process_time()
    outcome = _outcome(operation, subject)
    if outcome["status"] == "WRONG":
        in_float64 = _outcome(operation, Subject(name, shape, torch.float64))
        if in_float64["status"] == "ok":
            outcome = {**in_float64, "note": f"float32: {outcome['detail']}; float64 is right"}
    pipe.send({**outcome, "cpu_seconds": round(time.process_time() - start, 1)})


def _try_all(name: str, shape: tuple[int, ...], operations: list[str], limit: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    subject = Subject(name, shape)
    for domain in (None, *DOMAINS):
        subject.expected(domain)
    for operation in operations:
        pipe.send((operation, _in_process(_try, (subject, name, shape, operation), limit)))


def _in_process(run: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> Outcome:
    """Run a function in a new process and return what it sends, or how it failed."""
    # Forked, so that imported packages and the network are available. No thread runs in the parent.
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(*arguments, sender))
    process.start()
    sender.close()
    outcome: Outcome | None = None
    with contextlib.suppress(EOFError):
        outcome = (
            receiver.recv() if receiver.poll(limit) else {"status": "hang", "detail": f"longer than {limit:.0f} s"}
        )
    if outcome is not None and outcome["status"] == "hang":
        process.kill()
    process.join()
    return outcome or {"status": "crash", "detail": f"the process ended with {process.exitcode}"}


def run_network(
    name: str, shape: tuple[int, ...], operations: list[str], limit: float
) -> Iterator[tuple[str, Outcome]]:
    """Yield each operation with its outcome."""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(name, shape, operations, limit, sender))
    process.start()
    sender.close()
    remaining = list(operations)
    try:
        while remaining and receiver.poll(2 * limit):
            operation, outcome = receiver.recv()
            remaining.remove(operation)
            yield operation, outcome
    except EOFError:
        pass
    process.kill()
    process.join()
    for operation in remaining:
        yield operation, {"status": "crash", "detail": "the network could not be built and run"}


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """Read the rows of a file, the last one of each network and operation."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["network"], row["operation"]): row for row in rows}


def table(rows: dict[tuple[str, str], Outcome], networks: list[str]) -> str:
    """Return a table in Markdown and a summary."""
    lines = [
        f"| Network | Convolutions | Lowered | {' | '.join(OPERATIONS)} |",
        f"|---|---|---|{'---|' * len(OPERATIONS)}",
    ]
    notes: list[str] = []
    for name in networks:
        planned = rows.get((name, "plan"), {})
        cells = [str(planned.get(key, "")) for key in ("convolutions", "lowered")]
        for operation in OPERATIONS:
            row = rows.get((name, operation), {})
            cells.append(row.get("status", ""))
            if row.get("status", "ok") != "ok":
                notes.append(f"- {name}, {operation}: {row['status']}: {row.get('detail', '')}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    plans = [rows[name, "plan"] for name in networks if rows.get((name, "plan"), {}).get("status") == "ok"]
    complete = sum(row["lowered"] == row["convolutions"] for row in plans)
    lines += ["", f"{len(networks)} networks; in {complete} the plan lowers every convolution.", ""]
    for operation in OPERATIONS:
        counts = Counter(rows.get((name, operation), {}).get("status", "not run") for name in networks)
        lines.append(f"- {operation}: {', '.join(f'{number} {status}' for status, number in sorted(counts.items()))}")
    if notes:
        lines += ["", "Not ok:", "", *notes]
    reasons = [
        f"- {row['network']}: {len(row['reasons'])} not lowered, such as {next(iter(row['reasons'].items()))}"
        for row in plans
        if row["reasons"]
    ]
    return "\n".join([*lines, "", "Not lowered by plans:", "", *reasons] if reasons else lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.try_networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", type=Path, default=LIST, help="file of names and shapes")
    parser.add_argument("--only", default="*", help="names with * and ?, comma-separated")
    parser.add_argument("--operations", default=",".join(OPERATIONS), help=f"some of {', '.join(OPERATIONS)}")
    parser.add_argument("--out", type=Path, default=Path("build/try_networks.jsonl"))
    parser.add_argument("--limit", type=float, default=300, help="seconds for one operation on one network")
    parser.add_argument("--again", action="store_true", help="also run rows that the file has")
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    options = parser.parse_args()
    patterns = options.only.split(",")
    shapes = names(options.list)
    networks = [name for name in shapes if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    rows = read(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # No thread pool may exist in this process before it forks.
    torch.set_num_threads(1)
    for package, prefix in (("timm", "timm/"), ("torchvision", "tv/")):
        if any(name.startswith(prefix) for name in networks):
            importlib.import_module(package)
    for name in networks:
        operations = [] if options.table else options.operations.split(",")
        operations = [operation for operation in operations if options.again or (name, operation) not in rows]
        for operation, outcome in run_network(name, shapes[name], operations, options.limit) if operations else ():
            rows[name, operation] = {"network": name, "operation": operation, **outcome}
            with options.out.open("a") as file:
                file.write(json.dumps(rows[name, operation]) + "\n")
            print(name, operation, outcome["status"], outcome.get("detail", ""), flush=True)
    print(table(rows, networks))


if __name__ == "__main__":
    main()
