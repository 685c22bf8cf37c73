"""Networks as pruning tools leave them, and their plans: ``python -m benches.pruned_networks [--out DIR]``.

Each case prunes one network with one tool, lets ``ChannelTable.from_weights`` or ``from_masks`` find the lists, and
times, in one interleaved run, the dense network, the network as the tool leaves it, the small network that the tool
makes (Torch-Pruning alone) and the plan. Weights are random and batch norms calibrated on photographs: times depend on
how many channels are left, not on which. The plan's result is compared with that of the network as the tool leaves it.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import prune

import bap_kernels as bk
from benches import gate, ours
from benches.network_models import NETWORKS, mask_
from benches.networks import TOLERANCE, NetworkBench
from benches.photographs import batches
from benches.report import time_text
from benches.tables import Table
from benches.timers import Timed, interleave

SHARE = 0.5
DOMAIN = "default"
MIN_ROUNDS, MAX_ROUNDS = 5, 40


@dataclass
class Pruned:
    """A network after a tool.

    Args:
        left: as the tool leaves it; its result is what the plan has to compute.
        table: the lists that were found.
        model: what the lists are attached to.
        small: the tool's own small network.
        domain: whose lists.
    """

    left: nn.Module
    table: bk.ChannelTable
    model: nn.Module
    small: nn.Module | None = None
    domain: str = DOMAIN


def _inner(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that read more than an image."""
    return {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and conv.in_channels > 3}


def torch_prune(model: nn.Module, x: Tensor) -> Pruned:
    """``torch.nn.utils.prune.ln_structured`` of input channels: a hook multiplies each weight by its mask."""
    with torch.no_grad():  # a weight with a history cannot be copied
        for conv in _inner(model).values():
            prune.ln_structured(conv, "weight", amount=SHARE, n=2, dim=1)
        left = copy.deepcopy(model)
    for conv in _inner(model).values():
        prune.remove(conv, "weight")
    return Pruned(left, bk.ChannelTable.from_weights(model, example_input=x), model)


def slimming(model: nn.Module, x: Tensor) -> Pruned:
    """Scales of the batch norms inside of residual blocks, the smallest of the whole network set to zero.

    The scales are drawn uniformly, as no trained network is downloaded, so that layers keep odd numbers of channels.
    """
    last = 3 if any("conv3" in name for name, _ in model.named_modules()) else 2
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("bn1", "bn2")[: last - 1]]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms:
            norm.get_parameter("weight").uniform_(generator=generator)
        scales = torch.cat([norm.get_parameter("weight") for norm in norms])
        threshold = scales.quantile(SHARE)
        for norm in norms:
            off = norm.get_parameter("weight") < threshold
            norm.get_parameter("weight")[off] = 0
            norm.get_parameter("bias")[off] = 0
    return Pruned(copy.deepcopy(model), bk.ChannelTable.from_weights(model, example_input=x), model)


def torch_pruning(model: nn.Module, x: Tensor) -> Pruned:
    """Torch-Pruning: its groups set to zero in the network as it is, and removed from a copy."""
    import torch_pruning as tp

    small: Any = copy.deepcopy(model)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.MetaPruner(small, x[:1], importance, pruning_ratio=SHARE, ignored_layers=[small.fc])
    names = {module: name for name, module in small.named_modules()}
    groups = list(pruner.step(interactive=True))
    # Before the first is removed: importances of later groups are those of the whole network in both.
    removed = [
        (names[dep.target.module], pruner.DG.is_out_channel_pruning_fn(dep.pruning_fn), list(idxs))
        for group in groups
        for dep, idxs in group
        if dep.target.module in names
    ]
    for group in groups:
        group.prune()
    with torch.no_grad():
        for name, out, idxs in removed:
            module = model.get_submodule(name)
            weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
            if out or weight.dim() == 1:
                weight[idxs] = 0
                if bias is not None:
                    bias[idxs] = 0
            else:
                weight[:, idxs] = 0
    return Pruned(copy.deepcopy(model), bk.ChannelTable.from_weights(model, example_input=x), model, small)


def task_masks(model: nn.Module, x: Tensor) -> Pruned:
    """Masks of two tasks over the input channels; the network as it is left multiplies every input by its mask."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        task: {
            name: (torch.rand(conv.in_channels, generator=generator) < SHARE).long()
            for name, conv in _inner(model).items()
        }
        for task in ("birds", "cars")
    }
    lists = {name: mask.nonzero().flatten() for name, mask in masks["cars"].items()}
    left = mask_(copy.deepcopy(model), lists)
    return Pruned(left, bk.ChannelTable.from_masks(masks, model=model), model, domain="cars")


# {name: (network, tool, package that has to be installed)}
CASES: dict[str, tuple[str, Callable[[nn.Module, Tensor], Pruned], str]] = {
    "torch.nn.utils.prune": ("resnet50", torch_prune, "torch"),
    "slimming": ("resnet50", slimming, "torch"),
    "torch_pruning": ("resnet50", torch_pruning, "torch_pruning"),
    "masks of tasks": ("resnet18", task_masks, "torch"),
}


def found_text(pruned: Pruned) -> str:
    """What was found, over all layers: ``reads fewer in 52 of 53 layers, 50% of their channels``."""
    convs = {name: module for name, module in pruned.model.named_modules() if isinstance(module, nn.Conv2d)}
    lists = {name: found.in_index for name, found in pruned.table[pruned.domain].items() if found.in_index is not None}
    kept = sum(len(index) for index in lists.values()) / max(1, sum(convs[name].in_channels for name in lists))
    return f"{len(lists)} of {len(convs)}, {kept:.0%}"


def rows_of(name: str, batch_sizes: Sequence[int], seconds: float, image: int | None = None) -> list[dict[str, Any]]:
    """Prune one network, plan it, and measure every batch size.

    Raises:
        WrongResultError: If the plan, or the tool's small network, computes something else than what the tool left.
    """
    network, tool, _ = CASES[name]
    bench = NetworkBench(torch.device("cpu"), "float32")
    dense = bench.model(network)
    size = image or NETWORKS[network][1]
    pruned = tool(copy.deepcopy(dense), batches(size, 1, count=1)[0])
    found = found_text(pruned)
    notes = pruned.table.notes[pruned.domain]
    swapped = bk.attach_(bk.swap_(pruned.model), pruned.table)
    bk.set_domain(swapped, pruned.domain)
    rows = []
    with torch.inference_mode():
        for batch in batch_sizes:
            inputs = batches(size, batch)
            variants = {"dense": dense, "as left": pruned.left, "planned": bk.plan(swapped, inputs[0], pruned.domain)}
            if pruned.small is not None:
                variants["small"] = pruned.small
                variants["small, planned"] = bk.plan(bk.swap_(copy.deepcopy(pruned.small)), inputs[0], None)
            expected = pruned.left(inputs[0])
            errors = {
                variant: float((run(inputs[0]) - expected).abs().max() / expected.abs().max())
                for variant, run in variants.items()
                if variant not in ("dense", "as left")
            }
            for variant, error in errors.items():
                if not error <= TOLERANCE["float32"]:
                    raise gate.WrongResultError(
                        f"rows_of(): expected {variant} of {name} on {network} to compute what the tool left within "
                        f"{TOLERANCE['float32']:g}, got {error:.3g}."
                    )
            timed = {variant: Timed(run, inputs) for variant, run in variants.items()}
            for run in variants.values():
                run(inputs[0])
            samples = interleave(timed, bench.clock, seconds, MIN_ROUNDS, MAX_ROUNDS)
            rows.append(
                {
                    "tool": name,
                    "network": network,
                    "batch": batch,
                    "image": size,
                    "found": found,
                    "notes": notes,
                    "errors": errors,
                    "seconds": {variant: statistics.median(values) for variant, values in samples.items()},
                    "rounds": len(samples["dense"]),
                }
            )
    ours.clear_packed()
    return rows


def table(rows: Sequence[dict[str, Any]], threads: int) -> Table:
    """The rows as a table."""
    lines = []
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            [
                f"{row['network']} b{row['batch']}",
                row["tool"],
                row["found"],
                *(time_text(seconds.get(name)) for name in ("dense", "as left", "small", "small, planned", "planned")),
                f"{seconds['dense'] / seconds['planned']:.2f}",
                f"{seconds['as left'] / seconds['planned']:.2f}",
                f"{row['errors']['planned']:.0e}",
            ]
        )
    note = (
        f"{threads} threads, float32, medians. Found: layers that read fewer channels, and the share of their channels "
        "that is left. Small: the tool's own network. Error: of the plan against the network as the tool left it, "
        "relative to the largest output."
    )
    columns = ["network", "tool", "found", "dense", "as left", "small", "small, planned", "planned"]
    return Table(
        "Pruned networks",
        [*columns, "dense / planned", "as left / planned", "error"],
        lines,
        note,
        left=3,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.pruned_networks", description=__doc__)
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=list(CASES), help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--seconds", type=float, default=18.0, help="to time one case with one batch size")
    parser.add_argument("--image", type=int, help="height and width (default: the network's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for table.md and rows.json, with the note of every layer")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"argument --cases: expected cases of {', '.join(CASES)}, got {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.cases:
        package = CASES[name][2]
        if importlib.util.find_spec(package) is None:
            console.print(f"{name} is left out: {package} is not installed.", highlight=False)
            continue
        console.print(f"{name} ...", highlight=False)
        rows += rows_of(name, options.batch, options.seconds, options.image)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "rows.json").write_text(json.dumps(rows, indent=1))
            (options.out / "table.md").write_text(table(rows, options.threads).markdown())
    console.print(table(rows, options.threads).rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
