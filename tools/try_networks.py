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
import copy
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
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import bap_kernels as bk
from tools.networks import LIST, build, calibrate_, names, relative_error, zero_channels_

DOMAINS = ["a", "b"]
# Relative to the largest value. Rounding in float32 mostly stays below; otherwise float64 decides.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class WrongError(Exception):
    """A result differs."""


class Subject:
    """A network with its lists and expected results."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.dense = calibrate_(build(name), self.x.float()).to(dtype)
        self.table = bk.ChannelTable.random(bk.swap_(copy.deepcopy(self.dense)), DOMAINS, 0.5, seed=0)
        self._expected: dict[str | None, Any] = {}
        self.tolerance = TOLERANCE[dtype]

    def expected(self, domain: str | None) -> Any:
        """Return the result of the masked dense network."""
        if domain not in self._expected:
            model = copy.deepcopy(self.dense)
            for name, lists in self.table[domain].items() if domain is not None else ():
                if lists.in_index is not None:
                    conv = model.get_submodule(name)
                    assert isinstance(conv, nn.Conv2d)
                    mask = torch.zeros(1, conv.in_channels, 1, 1, dtype=self.x.dtype)
                    mask[0, lists.in_index.long()] = 1
                    conv.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
            with torch.no_grad():
                self._expected[domain] = model(self.x)
        return self._expected[domain]

    def swapped(self, layer_type: Any = bk.nn.GatheredConv2d) -> nn.Module:
        """Return a swapped copy with lists."""
        return bk.attach_(bk.swap_(copy.deepcopy(self.dense), layer_type=layer_type), self.table)

    def compare(self, result: Any, expected: Any, name: str) -> None:
        """Raise `WrongError` if a result differs."""
        error = relative_error(result, expected)
        if not error <= self.tolerance:
            raise WrongError(f"{name}: error {error:.1e}")

    def compare_domains(self, model: nn.Module, name: str) -> None:
        """Compare the result of every domain."""
        for domain in DOMAINS:
            bk.set_domain(model, domain)
            with torch.no_grad():
                self.compare(model(self.x), self.expected(domain), f"{name}, domain {domain}")

    def called(self) -> list[str]:
        """Return the names of the convolutions that a call runs."""
        names: dict[str, None] = {}
        model = copy.deepcopy(self.dense)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_, name=name: names.setdefault(name))
        with torch.no_grad():
            model(self.x)
        return list(names)


Outcome = dict[str, Any]


def swap(subject: Subject) -> Outcome:
    """Swapped layers."""
    model = subject.swapped()
    subject.compare_domains(model, "swap")
    bk.set_domain(model, None)
    with torch.no_grad():
        subject.compare(model(subject.x), subject.expected(None), "swap, all channels")
    return {}


def plan(subject: Subject) -> Outcome:
    """A plan, in both domains."""
    planned = bk.plan(subject.swapped(), subject.x, "a")
    subject.compare_domains(planned, "plan")
    called = subject.called()
    lowered = [name for name in called if name in planned.lowered]
    reasons = {name: planned.not_lowered.get(name, "unknown") for name in called if name not in planned.lowered}
    return {"convolutions": len(called), "lowered": len(lowered), "reasons": reasons}


def specialize(subject: Subject) -> Outcome:
    """A small network for each domain."""
    model = subject.swapped()
    for domain in DOMAINS:
        small = bk.specialize(model, domain, subject.x)
        with torch.no_grad():
            subject.compare(small(subject.x), subject.expected(domain), f"specialize, domain {domain}")
    return {"parameters": [sum(p.numel() for p in network.parameters()) for network in (model, small)]}


def prune(subject: Subject) -> Outcome:
    """Remove channels that no domain uses, then run layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.prune_unused_(model, subject.x)
    subject.compare_domains(model, "prune")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the pruned network")
    return {"parameters": list(report.parameters), "macs": list(report.macs)}


def order(subject: Subject) -> Outcome:
    """Reorder channels, then run layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.order_channels_(model, subject.x)
    subject.compare_domains(model, "order")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the ordered network")
    return {"moved": report.moved}


def mixed(subject: Subject) -> Outcome:
    """A batch of both domains, through layers and through a plan."""
    numbers = torch.tensor([1, 0, *[0] * (len(subject.x) - 2)])
    model = subject.swapped()
    results = [subject.expected(bk.domain_names(model)[int(number)]) for number in numbers]
    expected = tree_map(lambda *tensors: torch.stack([t[i] for i, t in enumerate(tensors)]), *results)
    bk.set_domain(model, numbers)
    with torch.no_grad():
        subject.compare(model(subject.x), expected, "mixed batch")
    planned = bk.plan(subject.swapped(), subject.x, "a", check=False)
    bk.set_domain(planned, numbers)
    with torch.no_grad():
        subject.compare(planned(subject.x), expected, "mixed batch of a plan")
    return {}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    torch.stack([t.float().square().mean() for t in tree_leaves(model(x))]).sum().backward()
    optimizer.step()


def _untrainable_reason(subject: Subject) -> str:
    """Why a step of the dense network says nothing about ours; empty if it does."""
    model = copy.deepcopy(subject.dense).train()
    try:
        _train(model, torch.optim.SGD(model.parameters(), lr=1e-3), subject.x)
    except Exception as error:
        return f"the dense network raises in training mode: {error}"
    with torch.no_grad():
        finite = all(t.isfinite().all() for t in tree_leaves(model.eval()(subject.x)))
    return "" if finite else "the dense network's result is not finite after a training step"


def switch(subject: Subject) -> Outcome:
    """Switches, one training step per domain, then fixed layers with the trained lists."""
    model = bk.nn.switch_(copy.deepcopy(subject.dense), DOMAINS)
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        with torch.no_grad():
            subject.compare(model(subject.x), subject.expected(None), f"switch_, domain {domain}, all on")
    if reason := _untrainable_reason(subject):
        return {"status": "no training", "detail": reason}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        _train(model, optimizer, subject.x)
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, bk.nn.SwitchedConv2d)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for offset, domain_state in enumerate(layer.domains.values()):
                score: Any = domain_state.score
                score[(number + offset) % len(score)] = 0
    results = {}
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        with torch.no_grad():
            results[domain] = model(subject.x)
    fixed = bk.swap_(model)
    for domain in DOMAINS:
        bk.set_domain(fixed, domain)
        with torch.no_grad():
            subject.compare(fixed(subject.x), results[domain], f"fixed lists after a step, domain {domain}")
    return {"switched": len(layers)}


def zeros(subject: Subject) -> Outcome:
    """Lists from a network's own zeros: layers and a plan return what the network with zeros returns."""
    pruned = copy.deepcopy(subject.dense)
    zero_channels_(pruned)
    with torch.no_grad():
        expected = pruned(subject.x)
    table = bk.ChannelTable.from_weights(pruned, "zeros", subject.x)
    model = bk.attach_(bk.swap_(copy.deepcopy(pruned)), table)
    bk.set_domain(model, "zeros")
    with torch.no_grad():
        subject.compare(model(subject.x), expected, "layers")
        subject.compare(bk.plan(model, subject.x, "zeros", check=False)(subject.x), expected, "plan")
    return {"read": table.density(model)["zeros"][0]}


OPERATIONS: dict[str, Callable[[Subject], Outcome]] = {
    operation.__name__: operation for operation in (swap, plan, specialize, prune, order, mixed, switch, zeros)
}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
