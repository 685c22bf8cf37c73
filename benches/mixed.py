"""Batches of several domains: ``python -m benches.mixed [--out DIR]``.

A batch of ``domains * samples`` images, spread over the domains in random order, against a batch of the same size
of one domain, and against one call per domain. Results are checked: each sample equals its result in its own domain.
Times are medians of interleaved rounds with rotating inputs; weights are packed before.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bap_kernels as bk
from benches import memory
from benches.machine import commit, cpu_model, versions
from benches.network_models import NETWORKS
from benches.timers import CpuClock, Spread, Timed, interleave


def _network(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    return build(), size


def _by_domain(run: Any, model: nn.Module, names: list[str], numbers: Tensor, x: Tensor) -> Tensor:
    """Make one call per domain; return the results in the order of the batch."""
    result: Tensor | None = None
    for number, name in enumerate(names):
        samples = (numbers == number).nonzero().flatten()
        bk.set_domain(model, name)
        part = run(x.index_select(0, samples).contiguous(memory_format=torch.channels_last))
        result = part.new_empty(len(x), *part.shape[1:]) if result is None else result
        result[samples] = part
    assert result is not None
    return result


def measure(
    network: str, planned: bool, density: float, domains: int, samples: int, seconds: float, seed: int = 0
) -> dict[str, Any]:
    """Return one row: seconds of the mixed batch, of one domain and of the loop over domains."""
    model, size = _network(network)
    names = [f"domain{i}" for i in range(domains)]
    bk.swap_(model.eval().to(memory_format=torch.channels_last))
    bk.attach_(model, bk.ChannelTable.random(model, names, density, seed=seed))
    count = domains * samples
    numbers = torch.arange(count).remainder(domains)[torch.randperm(count)]
    pool = [torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    mixed = model
    with torch.inference_mode():
        single = model
        if planned:
            mixed, single = (bk.plan(model, pool[0][:1], names[0], check=False) for _ in range(2))
        runs = {
            "mixed": Timed(mixed, pool, lambda: bk.set_domain(mixed, numbers)),
            "one domain": Timed(single, pool, lambda: bk.set_domain(single, names[0])),
            "loop": Timed(lambda x: _by_domain(single, single, names, numbers, x), pool),
        }
        bk.set_domain(mixed, numbers)
        result = mixed(pool[0])
        expected = _by_domain(single, single, names, numbers, pool[0])
        error = ((result - expected).abs().max() / expected.abs().max()).item()
        if not error < 1e-4:
            raise RuntimeError(f"measure(): expected a mixed batch to equal the loop, got an error of {error:.1e}.")
        times = interleave(runs, CpuClock(), seconds, min_rounds=5)
    row: dict[str, Any] = {"network": network, "planned": planned, "density": density, "domains": domains}
    row |= {"samples": samples, "threads": torch.get_num_threads(), "max_error": error, "size": size}
    return row | {f"{name.replace(' ', '_')}_s": Spread.of(list(times[name][1:])).p50 for name in runs}


def main() -> None:
    """Measure, print a table, and write mixed.json to ``--out``."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.mixed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for mixed.json")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet26")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each domain")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per row")
    options = parser.parse_args()
    memory.keep_freed()
    rows = [
        measure(options.network, planned, options.density, options.domains, options.samples, options.seconds)
        for planned in (False, True)
    ]
    table = Table(title=f"{options.network}, {options.domains} domains x {options.samples} samples, CPU")
    for heading in ("", "mixed", "one domain", "loop", "one domain / mixed", "loop / mixed"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [row["mixed_s"], row["one_domain_s"], row["loop_s"]]
        ratios = [f"{time / row['mixed_s']:.2f}" for time in times[1:]]
        table.add_row("planned" if row["planned"] else "swapped", *[f"{1e3 * time:.1f} ms" for time in times], *ratios)
    Console().print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"cpu": cpu_model(), "commit": commit(), "versions": versions(), "rows": rows}
        (options.out / "mixed.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
