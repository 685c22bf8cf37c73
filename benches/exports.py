"""Files for other runtimes beside the plan: ``python -m benches.exports [--formats onnx,openvino,...]``.

Two domains at half of the channels, lists of their own, for ResNet-26 at 64x64 and MobileNet-V2 at 224x224. Each file
is run again and compared with the plan's output. Formats whose packages are not installed are left out, by name. With
ExecuTorch the size of one program with a method for each domain is printed beside those of the domains' own programs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from bap.export import FORMATS, executorch_program, export_domain, unavailable_reason
from rich.console import Console
from torch import nn

import bap_kernels as bk
from benches.network_models import NETWORKS
from benches.networks import NetworkBench
from benches.report import time_text
from benches.tables import Table

DOMAINS = ("birds", "cars")
DEFAULT = ("resnet26", "mobilenet_v2")


def _model(network: str) -> nn.Module:
    model = bk.swap_(NetworkBench(torch.device("cpu"), "float32").model(network))
    return bk.attach_(model, bk.ChannelTable.random(model, DOMAINS, 0.5))


def _example(network: str, batch: int) -> torch.Tensor:
    size = NETWORKS[network][1]
    return torch.zeros(batch, 3, size, size)


def rows_of(network: str, formats: Sequence[str], batch: int, rounds: int, folder: Path) -> list[dict[str, object]]:
    """Write and measure the files of one network, those of all domains of a format one after the other."""
    model, example = _model(network), _example(network, batch)
    return [
        {"network": network, "batch": batch, **row.as_dict()}
        for domain in DOMAINS
        for row in export_domain(model, domain, example, folder / network, list(formats), rounds=rounds)
    ]


def together_text(network: str, batch: int) -> str:
    """The size of one ExecuTorch program with a method for each domain, and of the programs that it replaces."""
    model, example = _model(network), _example(network, batch)
    small = {domain: bk.specialize(model, domain, example) for domain in DOMAINS}
    own = sum(len(executorch_program({"forward": part}, example)) for part in small.values())
    together = len(executorch_program(small, example))
    return f"{network}: programs of {len(small)} domains {own / 2**20:.2f} MiB, one program {together / 2**20:.2f} MiB."


def table(rows: Sequence[dict[str, object]], threads: int) -> Table:
    """The rows as a table."""
    lines = [
        [
            f"{row['network']} b{row['batch']}",
            str(row["domain"]),
            str(row["format"]),
            f"{float(str(row['bytes'])) / 2**20:.2f}",
            f"{float(str(row['change'])):.0e}",
            time_text(float(str(row["milliseconds"])) * 1e-3),
            time_text(float(str(row["plan_milliseconds"])) * 1e-3),
            f"{float(str(row['over plan'])):.2f}",
        ]
        for row in rows
    ]
    note = f"Half of the channels, {threads} threads, float32. Error: relative to the largest output. Above 1: faster."
    return Table(
        "Exported files",
        ["network", "domain", "runtime", "MiB", "error", "time", "plan", "/ plan"],
        lines,
        note,
        left=3,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.exports", description=__doc__)
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--networks", type=split, default=list(DEFAULT), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--formats", type=split, help=f"of {', '.join(FORMATS)} (default: all that are installed)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the files and rows.json (default: a temporary one)")
    options = parser.parse_args(arguments)
    # Files and pipes have no width of their own, and would cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(options.threads)
    formats = options.formats or list(FORMATS)
    for name in [] if options.formats else list(formats):
        if reason := unavailable_reason(FORMATS[name]):
            console.print(f"{name} is left out: {reason}.", highlight=False)
            formats.remove(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        rows = [
            row
            for network in options.networks
            for row in rows_of(network, formats, options.batch, options.rounds, folder)
        ]
        if options.out:
            (options.out / "rows.json").write_text(json.dumps(rows, indent=1))
    console.print(table(rows, options.threads).rich())
    if "executorch" in formats:
        console.print(f"ExecuTorch {metadata.version('executorch')} with torch {torch.__version__}.", highlight=False)
        for network in options.networks:
            console.print(together_text(network, options.batch), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
