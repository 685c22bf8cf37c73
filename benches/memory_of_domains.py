"""Cost of serving several domains: ``python -m benches.memory_of_domains [--times] [--out DIR]``.

Prints the bytes that one network holds for 1, 3 and 10 domains, planned and layer by layer, for each way to keep packed
weights; they are counted, and the same on a busy machine. ``auto`` may choose other kernels than the native ones, whose
packed weights are counted here.

``--times`` compares one network with the lists of all domains, planned or layer by layer, with one small network per
domain (``bk.specialize``) instead. Memory is the growth of the resident set of a separate process after every domain
was used, including packed weights and what libraries cache per shape. Times are measured in this process: of a switch
to a domain used before, and of the first use of a domain with its forward. The logits of every domain are checked.
Rows are added to ``rows.jsonl`` and the report of the folder, next to those of a study of the same build.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from benches import gate, held_memory, ours, report
from benches.cases import LAYOUTS
from benches.measure import DTYPES
from benches.memory import can_measure_peak, in_fresh_process, resident_bytes
from benches.network_models import NETWORKS, NetworkCell, in_lists, mask_
from benches.networks import TOLERANCE, NetworkBench
from benches.problem import MEMORY_FORMATS, normal_tensors
from benches.rows import Row, row_of
from benches.running import begin, command_line, finish
from benches.summary import DOMAINS
from benches.tables import Table
from benches.timers import Spread

# auto: layer by layer. pruned: one small network per domain.
VARIANTS = ("planned", "auto", "pruned")
SWITCHES = 200
FORWARDS = 5


@dataclass(frozen=True)
class Serving:
    """A network that serves several domains.

    Args:
        network: Of `NETWORKS`.
        domains: Number of domains.
        density: Share of the channels that each domain keeps.
        batch: N.
        layout: ``channels_last`` or ``nchw``.
        dtype: ``float32`` or ``bfloat16``.
    """

    network: str
    domains: int
    density: float
    batch: int
    layout: str
    dtype: str
    lists: ClassVar[str] = "in"
    seed: ClassVar[int] = 0

    @property
    def id(self) -> str:
        """Name of the cell, such as ``resnet26-b8-domains10-d50-in-channels_last``."""
        return f"{self.network}-b{self.batch}-{DOMAINS}{self.domains}-d{self.density * 100:.0f}-in-{self.layout}"

    @property
    def names(self) -> list[str]:
        """Names of the domains."""
        return [f"domain{i}" for i in range(self.domains)]

    def lists_of(self, model: nn.Module, domain: str) -> dict[str, Tensor]:
        """Draw the in-lists of a domain."""
        return in_lists(model, self.density, zlib.crc32(f"{self.network}-{domain}-d{self.density * 100:.0f}".encode()))


class Served:
    """A variant of a cell, whose domains become active one after another.

    Args:
        serving: The cell.
        variant: Of `VARIANTS`.
    """

    def __init__(self, serving: Serving, variant: str) -> None:
        self.variant, self.names = variant, serving.names
        self.bench = NetworkBench(torch.device("cpu"), serving.dtype)
        cell = NetworkCell(serving.network, serving.batch, serving.density, serving.layout)
        self.inputs = self.bench.inputs(cell)
        self.base = self.bench.model(serving.network)
        self.serving = serving
        self.model: Any = None
        self.active: Any = None
        self.small: dict[str, nn.Module] = {}

    def build(self) -> None:
        """Build the network with all lists, and the plan or the small network of the first domain."""
        bk, serving = ours.package(), self.serving
        with normal_tensors():
            # A copy, so that its parameters count.
            self.model = bk.swap_(self.bench.converted(self.base, serving.layout))
            table = {
                name: {layer: bk.ChannelLists(index) for layer, index in serving.lists_of(self.base, name).items()}
                for name in self.names
            }
            bk.attach_(self.model, table)
            bk.use_backend("auto")
            if self.variant == "planned":
                self.model = bk.plan(self.model, self.inputs[0], self.names[0], check=False)
            self.switch(self.names[0])

    def switch(self, name: str) -> None:
        """Make a domain active; on its first use, build its small network."""
        if self.variant != "pruned":
            ours.package().set_domain(self.model, name)
            self.active = self.model
            return
        if name not in self.small:
            with normal_tensors():
                small = ours.package().specialize(self.model, name)
                self.small[name] = small.to(memory_format=MEMORY_FORMATS[self.serving.layout])
        self.active = self.small[name]

    def finish(self) -> None:
        """Drop the shared network if there is a small one for every domain."""
        if self.variant == "pruned":
            self.model = None

    def weight_bytes(self) -> int:
        """Bytes of parameters, statistics and packed weights, each storage once."""
        models = [model for model in (self.model, *self.small.values()) if model]
        storages = [t.untyped_storage() for model in models for t in (*model.parameters(), *model.buffers())]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + ours.packed_bytes()


def memory_bytes(serving: Serving, variant: str) -> tuple[int, int]:
    """(growth of the resident set, bytes of weights and packed weights), in a process of its own."""
    ours.reset_choices()
    served = Served(serving, variant)
    with torch.inference_mode():
        # Libraries allocate memory on their first use, whatever the network.
        served.base(served.inputs[0][:1].to(torch.float32).contiguous())
        before = _resident_after_collection()
        served.build()
        for name in served.names:
            served.switch(name)
            served.active(served.inputs[0])
        served.finish()
        return max(0, _resident_after_collection() - before), served.weight_bytes()


def _resident_after_collection() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def _reference(serving: Serving, model: nn.Module, name: str, x: Tensor) -> Tensor:
    masked = mask_(copy.deepcopy(model).double(), serving.lists_of(model, name))
    return masked(x[:1].double())


def timed_row(serving: Serving, variant: str, memory: tuple[int, int] | None) -> Row:
    """Check every domain, then measure the times.

    Args:
        serving: The cell.
        variant: Of `VARIANTS`.
        memory: From `memory_bytes`.

    Raises:
        WrongResultError: If logits of a domain differ from the masked network's by more than rounding.
    """
    clock: Callable[[], float] = time.perf_counter
    served = Served(serving, variant)
    x = served.inputs[0]
    error, first_uses, forwards, switches = 0.0, [], [], []
    with torch.inference_mode():
        served.build()
        served.active(x)
        for name in served.names:
            start = clock()
            served.switch(name)
            result = torch.as_tensor(served.active(x))
            first_uses.append(clock() - start)
            reference = _reference(serving, served.base, name, x)
            relative = ((result[:1].double() - reference).abs().max() / reference.abs().max()).item()
            if not relative <= TOLERANCE[serving.dtype]:
                raise gate.WrongResultError(
                    f"timed_row(): expected logits of {variant} on {serving.id} to equal the masked network, "
                    f"got a difference of {relative:.1e} in {name}."
                )
            error = max(error, relative)
        for turn in range(FORWARDS):
            start = clock()
            served.active(served.inputs[turn % len(served.inputs)])
            forwards.append(clock() - start)
        for turn in range(SWITCHES):
            name = served.names[turn % len(served.names)]
            start = clock()
            served.switch(name)
            switches.append(clock() - start)
    ours.clear_packed()
    return row_of(
        serving,
        Spread.of(switches),
        network=serving.network,
        case=DOMAINS,
        variant=variant,
        dtype=serving.dtype,
        max_error=error,
        weight_bytes=memory[1] if memory else None,
        forward_s=statistics.median(forwards),
        domains=serving.domains,
        # The first domain was prepared by `build`.
        first_use_s=statistics.median(first_uses[1:] or first_uses),
        resident_bytes=memory[0] if memory else None,
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(
        prog="python -m benches.memory_of_domains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--out", type=Path, default=Path("benches/out/domains"), help="folder (default: %(default)s)")
    command.add_argument("--times", action="store_true", help="resident memory, switches and first uses, timed")
    command.add_argument(
        "--winograd", type=int, choices=(0, 2, 4), default=0, help="of the table: tiles of 3 x 3 layers"
    )
    command.add_argument("--network", choices=tuple(NETWORKS), default="resnet26")
    command.add_argument("--domains", type=int, default=10)
    command.add_argument("--density", type=float, default=0.5)
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    command.add_argument("--threads", type=int, help="threads (default: PyTorch's)")
    return command


def held_table(options: argparse.Namespace) -> str:
    """Return the table of bytes, for up to ``--domains`` domains."""
    build, size = NETWORKS[options.network]
    with normal_tensors():
        model = build().eval().to(memory_format=MEMORY_FORMATS[options.layout])
        x = torch.randn(options.batch, 3, size, size).contiguous(memory_format=MEMORY_FORMATS[options.layout])
        counts = sorted({*(count for count in held_memory.COUNTS if count < options.domains), options.domains})
        return held_memory.table(list(held_memory.held_memory(model, x, options.density, counts, options.winograd)))


def study(options: argparse.Namespace, console: Console) -> None:
    """Measure, then write and print the report.

    Raises:
        ValueError: If an option is out of range.
    """
    if options.domains < 1 or options.batch < 1 or not 0 < options.density <= 1:
        raise ValueError(
            "memory_of_domains: expected --domains and --batch from 1 and --density in (0, 1], "
            f"got {options.domains}, {options.batch} and {options.density}."
        )
    if not options.times:
        print(held_table(options))
        return
    serving = Serving(options.network, options.domains, options.density, options.batch, options.layout, options.dtype)
    ours.reset_choices()
    header, _, journal = begin(options, console, torch.device("cpu"), options.dtype)
    for variant in VARIANTS:
        console.print(f"{serving.id}: {variant} ...", highlight=False)
        memory = in_fresh_process(memory_bytes, serving, variant) if can_measure_peak() else None
        journal.append([timed_row(serving, variant, memory)])
    tables: list[Table] = report.write(options.out, header, journal.rows)
    finish(options.out, console, [table for table in tables if table.title == "Several domains"], journal.rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(study, parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
