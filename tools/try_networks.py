"""Tries every operation of the package on the networks of ``tools/networks.txt``.

    python -m tools.try_networks [--only PATTERN] [--operations plan,prune] [--out FILE] [--again] [--table]

Lists are random, for two domains, half of the channels each. Every result is compared with the masked dense network:
PyTorch's own layers with hooks that multiply by masks. Each operation on each network runs in a process of its own with
a time limit, so that a crash or a hang is a row like any other. Rows go to a file of JSON lines as they are made; what
the file already holds is not run again. Prints a table in Markdown, and a summary. Needs the extra ``networks``.

    ok        equal to the masked dense network
    refused   an error of the package, with its text
    WRONG     another result without an error
    crash     any other error, or the end of the process
    hang      no end within the time limit
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from tools.networks import LIST, build, calibrate_, names, relative_error

DOMAINS = ["a", "b"]
# Share of the largest number. Rounding in float32 mostly stays below; where it does not, float64 decides.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class WrongError(Exception):
    """A result that differs without an error."""


class Subject:
    """A network with its lists, and what it should compute."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.dense = calibrate_(build(name), self.x.float()).to(dtype)
        self.table = bk.ChannelTable.random(bk.swap_(copy.deepcopy(self.dense)), DOMAINS, 0.5, seed=0)
        self._expected: dict[str | None, Any] = {}
        self.tolerance = TOLERANCE[dtype]

    def expected(self, domain: str | None) -> Any:
        """What the masked dense network computes."""
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
        """A copy with lists."""
        return bk.attach_(bk.swap_(copy.deepcopy(self.dense), layer_type=layer_type), self.table)

    def compare(self, got: Any, expected: Any, what: str) -> None:
        """Raises where a result is another one."""
        error = relative_error(got, expected)
        if not error <= self.tolerance:
            raise WrongError(f"{what}: error {error:.1e}")

    def compare_domains(self, model: nn.Module, what: str) -> None:
        """Compares every domain's result."""
        for domain in DOMAINS:
            bk.set_domain(model, domain)
            with torch.no_grad():
                self.compare(model(self.x), self.expected(domain), f"{what}, domain {domain}")

    def called(self) -> list[str]:
        """The convolutions that a call of the network runs."""
        found: dict[str, None] = {}
        model = copy.deepcopy(self.dense)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_, name=name: found.setdefault(name))
        with torch.no_grad():
            model(self.x)
        return list(found)


Facts = dict[str, Any]


def swap(subject: Subject) -> Facts:
    """Layers alone."""
    model = subject.swapped()
    subject.compare_domains(model, "swap")
    bk.set_domain(model, None)
    with torch.no_grad():
        subject.compare(model(subject.x), subject.expected(None), "swap, all channels")
    return {}


def plan(subject: Subject) -> Facts:
    """A plan for one domain, then the other; on a smaller batch, too."""
    planned = bk.plan(subject.swapped(), subject.x, "a")
    subject.compare_domains(planned, "plan")
    called = subject.called()
    lowered = [name for name in called if name in planned.lowered]
    reasons = {name: planned.not_lowered.get(name, "not seen") for name in called if name not in planned.lowered}
    return {"convolutions": len(called), "lowered": len(lowered), "reasons": reasons}


def specialize(subject: Subject) -> Facts:
    """A small network for each domain."""
    model = subject.swapped()
    for domain in DOMAINS:
        small = bk.specialize(model, domain, subject.x)
        with torch.no_grad():
            subject.compare(small(subject.x), subject.expected(domain), f"specialize, domain {domain}")
    count = [sum(p.numel() for p in one.parameters()) for one in (model, small)]
    return {"parameters": count}


def prune(subject: Subject) -> Facts:
    """Drops what no domain reads, then runs layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.prune_unused_(model, subject.x)
    subject.compare_domains(model, "prune")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the pruned network")
    return {"parameters": list(report.parameters), "macs": list(report.macs)}


def order(subject: Subject) -> Facts:
    """Reorders channels, then runs layers and a plan."""
    model = subject.swapped(bk.nn.MaskedConv2d)
    report = bk.order_channels_(model, subject.x)
    subject.compare_domains(model, "order")
    subject.compare_domains(bk.plan(model, subject.x, "a", check=False), "plan of the ordered network")
    return {"moved": report.moved}


def mixed(subject: Subject) -> Facts:
    """A batch of both domains through layers and through a plan."""
    numbers = torch.tensor([1, 0, *[0] * (len(subject.x) - 2)])
    model = subject.swapped()
    ordered = bk.domain_names(model) if hasattr(bk, "domain_names") else DOMAINS
    both = [subject.expected(ordered[int(number)]) for number in numbers]
    expected = _rows(both)
    bk.set_domain(model, numbers)
    with torch.no_grad():
        subject.compare(model(subject.x), expected, "mixed batch")
    planned = bk.plan(subject.swapped(), subject.x, "a", check=False)
    bk.set_domain(planned, numbers)
    with torch.no_grad():
        subject.compare(planned(subject.x), expected, "mixed batch of a plan")
    return {}


def _rows(results: list[Any]) -> Any:
    """Of the n-th result its n-th sample."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack([one[number] for number, one in enumerate(results)])
    if isinstance(first, dict):
        return {key: _rows([one[key] for one in results]) for key in first}
    return type(first)([_rows([one[place] for one in results]) for place in range(len(first))])


def _total(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result.float().square().mean()
    parts = list(result.values()) if isinstance(result, dict) else list(result)
    return torch.stack([_total(part) for part in parts]).sum()


def switch(subject: Subject) -> Facts:
    """Switches, one step of training in each domain, then the trained lists in fixed layers."""
    model = bk.nn.switch_(copy.deepcopy(subject.dense), DOMAINS)
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        with torch.no_grad():
            subject.compare(model(subject.x), subject.expected(None), f"switch_, domain {domain}, all on")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for domain in DOMAINS:
        bk.set_domain(model, domain)
        optimizer.zero_grad()
        _total(model(subject.x)).backward()
        optimizer.step()
    model.eval()
    layers = [one for one in model.modules() if isinstance(one, bk.nn.SwitchedConv2d)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for at, one in enumerate(layer.domains.values()):
                score: Any = one.score
                score[(number + at) % len(score)] = 0
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


OPERATIONS: dict[str, Callable[[Subject], Facts]] = {
    one.__name__: one for one in (swap, plan, specialize, prune, order, mixed, switch)
}


# Measuring what is fastest takes most of the time, and says nothing about results. What is native has to be named.
BACKENDS: dict[str, Any] = {"swap": "auto", "plan": "native"}


def _outcome(operation: str, subject: Subject) -> Facts:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with bk.use_backend(BACKENDS.get(operation, "aten")):
                facts = {"status": "ok", **OPERATIONS[operation](subject)}
        except WrongError as error:
            facts = {"status": "WRONG", "detail": str(error)}
        except Exception as error:
            text = str(error)
            by_name = re.match(r"[A-Za-z_.]+\(\): ", text) and isinstance(
                error, (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError)
            )
            status = "refused" if by_name else "crash"
            if "to equal the masked dense network" in text:
                status = "WRONG"
            facts = {"status": status, "detail": f"{type(error).__name__}: {text[:600]}"}
            if status == "crash":
                facts["trace"] = traceback.format_exc()[-2500:]
    said = list(dict.fromkeys(str(one.message) for one in caught if "bap_kernels" in str(one.filename)))
    return {**facts, "warnings": said} if said else facts


def _try(subject: Subject, name: str, shape: tuple[int, ...], operation: str, pipe: Any) -> None:
    start = time.process_time()
    facts = _outcome(operation, subject)
    if facts["status"] == "WRONG":
        again = _outcome(operation, Subject(name, shape, torch.float64))
        if again["status"] == "ok":
            facts = {**again, "note": f"float32: {facts['detail']}; float64 is right"}
    pipe.send({**facts, "cpu_seconds": round(time.process_time() - start, 1)})


def _try_all(name: str, shape: tuple[int, ...], operations: list[str], limit: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    subject = Subject(name, shape)
    for domain in (None, *DOMAINS):
        subject.expected(domain)
    for operation in operations:
        pipe.send((operation, _in_a_process(_try, (subject, name, shape, operation), limit)))


def _in_a_process(run: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> Facts:
    """What a function sends from a process of its own, whatever becomes of it."""
    # Forked: what was imported and built here is there. No thread runs in the parent.
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(*arguments, theirs))
    process.start()
    theirs.close()
    facts: Facts | None = None
    with contextlib.suppress(EOFError):
        facts = ours.recv() if ours.poll(limit) else {"status": "hang", "detail": f"no end within {limit:.0f} s"}
    if facts is not None and facts["status"] == "hang":
        process.kill()
    process.join()
    return facts or {"status": "crash", "detail": f"the process ended with {process.exitcode}"}


def of_network(name: str, shape: tuple[int, ...], operations: list[str], limit: float) -> Iterator[tuple[str, Facts]]:
    """Each operation and what became of it."""
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(name, shape, operations, limit, theirs))
    process.start()
    theirs.close()
    left = list(operations)
    try:
        while left and ours.poll(2 * limit):
            operation, facts = ours.recv()
            left.remove(operation)
            yield operation, facts
    except EOFError:
        pass
    process.kill()
    process.join()
    for operation in left:
        yield operation, {"status": "crash", "detail": "the network could not be built and run"}


def read(path: Path) -> dict[tuple[str, str], Facts]:
    """The rows of a file, the last of each network and operation."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["network"], row["operation"]): row for row in rows}


def table(rows: dict[tuple[str, str], Facts], networks: list[str]) -> str:
    """A table in Markdown, and a summary."""
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
    whole = sum(row["lowered"] == row["convolutions"] for row in plans)
    lines += ["", f"{len(networks)} networks; in {whole} the plan lowers every convolution.", ""]
    for operation in OPERATIONS:
        counts: dict[str, int] = {}
        for name in networks:
            status = rows.get((name, operation), {}).get("status", "not run")
            counts[status] = counts.get(status, 0) + 1
        lines.append(f"- {operation}: {', '.join(f'{number} {status}' for status, number in sorted(counts.items()))}")
    if notes:
        lines += ["", "What is not ok:", "", *notes]
    reasons = [
        f"- {row['network']}: {len(row['reasons'])} not lowered, such as {next(iter(row['reasons'].items()))}"
        for row in plans
        if row["reasons"]
    ]
    return "\n".join([*lines, "", "What plans do not lower:", "", *reasons] if reasons else lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=LIST, help="file of names and shapes")
    parser.add_argument("--only", default="*", help="names, with * and ?; several with commas")
    parser.add_argument("--operations", default=",".join(OPERATIONS), help=f"some of {', '.join(OPERATIONS)}")
    parser.add_argument("--out", type=Path, default=Path("build/try_networks.jsonl"))
    parser.add_argument("--limit", type=float, default=300, help="seconds for one operation on one network")
    parser.add_argument("--again", action="store_true", help="run what the file already holds, too")
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    options = parser.parse_args()
    patterns = options.only.split(",")
    shapes = names(options.list)
    networks = [name for name in shapes if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    rows = read(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Before any process is forked: no pool of threads may exist in this one.
    torch.set_num_threads(1)
    for package, prefix in (("timm", "timm/"), ("torchvision", "tv/")):
        if any(name.startswith(prefix) for name in networks):
            importlib.import_module(package)
    for name in networks:
        wanted = [] if options.table else options.operations.split(",")
        wanted = [operation for operation in wanted if options.again or (name, operation) not in rows]
        for operation, facts in of_network(name, shapes[name], wanted, options.limit) if wanted else ():
            rows[name, operation] = {"network": name, "operation": operation, **facts}
            with options.out.open("a") as file:
                file.write(json.dumps(rows[name, operation]) + "\n")
            print(name, operation, facts["status"], facts.get("detail", ""), flush=True)
    print(table(rows, networks))


if __name__ == "__main__":
    main()
