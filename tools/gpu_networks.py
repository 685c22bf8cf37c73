"""Times on a GPU what benches.study leaves out: plans by backend, CUDA graphs, mixed batches, training of layers.

    python -m tools.gpu_networks [--quick] [--budget-seconds S] [--json FILE] [--markdown FILE]

Everything is compared with the masked dense network, or with autograd of the masked convolution, before it is timed;
what is wrong or raises is a row with the reason. A part that does not fit into the budget is left out and named. Prints
one line of JSON last. ``--device cpu`` runs small cases of the same code without a GPU: a rehearsal, no measurement,
that leaves nothing out however busy the machine is.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bap_kernels as bk
from benches.network_models import DOMAIN, NETWORKS, in_lists, mask_, swap_
from benches.timers import Spread, Timed, clock, interleave

Call = Callable[[Tensor], Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Share of the largest value: a wrong channel is far above, rounding through fifty layers far below.
TOLERANCE = {"bfloat16": 0.1, "float32": 2e-3}


@dataclass
class Setting:
    """What all parts share."""

    device: torch.device
    deadline: float
    quick: bool
    without: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device.type == "cpu"

    def backends(self) -> list[str]:
        """The backends that can run here, besides the CPU's and those that are left out."""
        names = [name for name in ("auto", "triton", "cuda") if name not in self.without]
        return [name for name in names if bk.dispatch.unsupported_reason(name) is None]

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.perf_counter()


def under(backend: str, run: Call) -> Call:
    """A call with a backend named."""

    def call(x: Tensor) -> Tensor:
        with bk.use_backend(backend):
            return run(x)

    return call


def graphed(run: Call, x: Tensor) -> Call:
    """The call captured in a CUDA graph; the input is copied into it, which is part of the call."""
    given = x.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(given)

    def replay(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return result

    return replay


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Largest error as a share of the largest value."""
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)).item()


def measured(
    setting: Setting,
    case: dict[str, Any],
    makers: dict[str, Callable[[], Call]],
    pool: Sequence[Tensor],
    wanted: Tensor,
    free: Sequence[str] = (),
    view: Callable[[Any], Tensor] = torch.as_tensor,
) -> Iterator[dict[str, Any]]:
    """A row for each maker: checked, then timed in interleaved rounds.

    Args:
        makers: by name, what prepares a call.
        wanted: the right result for the first input of the pool.
        free: names of those that compute something else and are not checked.
        view: what of a result is compared.
    """
    ready: dict[str, Timed] = {}
    errors: dict[str, float] = {}
    for name, make in makers.items():
        try:
            run = make()
            error = 0.0 if name in free else error_of(view(run(pool[0])), wanted)
            if not error <= TOLERANCE[case["dtype"]]:
                raise RuntimeError(f"wrong by {error:.2g} of the largest value")
            errors[name], ready[name] = error, Timed(run, pool)
        except Exception as reason:  # whatever one of them raises, the others are measured
            yield {**case, "variant": name, "failed": f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}"}
    seconds = 0.0 if setting.small else max(0.2, min(2.0 if setting.quick else 5.0, setting.left() / 4))
    rounds = 1 if setting.small else 10
    samples = interleave(ready, clock(setting.device), seconds, min_rounds=rounds + 1) if ready else {}
    for name, times in samples.items():
        spread = Spread.of(times[1:])
        yield {
            **case,
            "variant": name,
            "p20_s": spread.p20,
            "p50_s": spread.p50,
            "p80_s": spread.p80,
            "rounds": spread.rounds,
            "max_error": errors[name],
        }


def placed(model: nn.Module, setting: Setting, dtype: str) -> Any:
    """A copy on the device, in channels_last."""
    made: Any = copy.deepcopy(model)
    return made.to(setting.device, DTYPES[dtype]).to(memory_format=torch.channels_last)


def images(setting: Setting, dtype: str, count: int, size: int) -> list[Tensor]:
    """A pool of inputs."""
    made = [torch.randn(count, 3, size, size) for _ in range(2)]
    return [x.to(setting.device, DTYPES[dtype]).contiguous(memory_format=torch.channels_last) for x in made]


def network(name: str) -> tuple[nn.Module, int]:
    """A network in eval mode, its batch norms at home with its activations, and its image size."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, size, size))
    return model.eval(), size


def plans(setting: Setting, name: str, batch: int, density: float, dtype: str) -> Iterator[dict[str, Any]]:
    """A network for one domain: dense, masked, pruned, and planned by each backend; eager and in a graph."""
    model, size = network(name)
    lists = in_lists(model, density, seed=1)
    pool = images(setting, dtype, batch, size)
    swapped = swap_(placed(model, setting, dtype), lists)
    masked = mask_(placed(model, setting, dtype), lists)

    def planned(backend: str) -> Call:
        with bk.use_backend(backend):
            return under(backend, bk.plan(swapped, pool[0], DOMAIN, check=False))

    small = partial(bk.specialize, swapped)
    eager: dict[str, Callable[[], Call]] = {
        "dense": lambda: placed(model, setting, dtype),
        "masked": lambda: masked,
        "pruned": lambda: small(DOMAIN).to(memory_format=torch.channels_last),
        **{f"planned, {each}": partial(planned, each) for each in setting.backends()},
    }
    makers = dict(eager)
    if not setting.small:
        makers |= {
            f"{each}, graph": partial(lambda make: graphed(make(), pool[0]), make) for each, make in eager.items()
        }
    case = {"part": "network", "network": name, "batch": batch, "density": density, "dtype": dtype}
    yield from measured(setting, case, makers, pool, masked(pool[0]).clone(), ("dense", "dense, graph"))


def mixed_batches(setting: Setting, name: str, domains: int, samples: int, dtype: str) -> Iterator[dict[str, Any]]:
    """A batch of several domains at once, against one of one domain and the loop over domains, by backend."""
    model, size = network(name)
    names = [f"domain{i}" for i in range(domains)]
    swapped = bk.swap_(placed(model, setting, dtype))
    bk.attach_(swapped, bk.ChannelTable.random(swapped, names, 0.5, seed=0))
    numbers = torch.arange(domains * samples) % domains
    pool = images(setting, dtype, domains * samples, size)

    def loop(x: Tensor) -> Tensor:
        parts = []
        for number, domain in enumerate(names):
            bk.set_domain(swapped, domain)
            parts.append(swapped(x[number::domains].contiguous(memory_format=torch.channels_last)))
        return torch.stack(parts, 1).flatten(0, 1)

    def as_one(domain: str | Tensor) -> Call:
        # Lists belong to the layers: each call sets its own.
        def call(x: Tensor) -> Tensor:
            bk.set_domain(swapped, domain)
            return swapped(x)

        return call

    with bk.use_backend("aten"):
        wanted = loop(pool[0])
    makers: dict[str, Callable[[], Call]] = {}
    for backend in setting.backends():
        makers[f"mixed, {backend}"] = partial(under, backend, as_one(numbers))
        makers[f"one domain, {backend}"] = partial(under, backend, as_one(names[0]))
        makers[f"loop, {backend}"] = partial(under, backend, loop)
    free = [each for each in makers if each.startswith("one domain")]
    case = {"part": "mixed", "network": name, "batch": domains * samples, "density": 0.5, "dtype": dtype}
    yield from measured(setting, {**case, "domains": domains}, makers, pool, wanted, free)


def training(setting: Setting, shape: Sequence[int], kernel: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Forward and backward of one convolution with switches, against masked autograd; weights are trained."""
    N, C_in, C_out, side = shape
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    pool = [draw(N, C_in, side, side).to(setting.device, DTYPES[dtype]) for _ in range(2)]
    pool = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in pool]
    weight = (draw(C_out, C_in, kernel, kernel) / (C_in * kernel**2) ** 0.5).to(setting.device, DTYPES[dtype])
    weight.requires_grad_()
    switch = (torch.arange(C_in) % 2).float().to(setting.device).requires_grad_()
    grad = draw(N, C_out, side, side).to(setting.device, DTYPES[dtype]).contiguous(memory_format=torch.channels_last)

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, weight, switch), grad)

    def masked(x: Tensor) -> tuple[Tensor, ...]:
        s = switch.to(x.dtype)[:, None, None]
        return gradients(x, nn.functional.conv2d(x * s, weight, padding=kernel // 2))

    def switched(x: Tensor) -> tuple[Tensor, ...]:
        return gradients(x, bk.switched_conv2d(x, weight, None, switch, padding=kernel // 2))

    def together(found: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([each.float().flatten() / each.float().abs().max() for each in found])

    makers: dict[str, Callable[[], Call]] = {"masked autograd": lambda: masked}
    for backend in setting.backends():
        makers[f"switched, {backend}"] = partial(under, backend, switched)
    name = f"{C_in}->{C_out} {kernel}x{kernel} at {side}x{side}"
    case = {"part": "training", "network": name, "batch": N, "density": 0.5, "dtype": dtype}
    yield from measured(setting, case, makers, pool, together(masked(pool[0])), view=together)


def parts(setting: Setting) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """What is measured, what says most first."""
    if setting.small:
        return {
            "plans": lambda: plans(setting, "resnet26", 1, 0.5, "float32"),
            "mixed": lambda: mixed_batches(setting, "resnet26", 2, 1, "float32"),
            "training": lambda: training(setting, (2, 32, 32, 8), 3, "float32"),
        }
    layers = [(32, 256, 256, 28), (32, 512, 512, 14), (32, 64, 64, 56)]
    found: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "ResNet-50, d = .5": lambda: plans(setting, "resnet50", 64, 0.5, "bfloat16"),
        "mixed": lambda: mixed_batches(setting, "resnet26", 8, 8, "bfloat16"),
    }
    for kernel in (3, 1):
        for shape in layers[: 1 if setting.quick else 3]:
            name = f"training {shape} {kernel}"
            found[name] = partial(training, setting, shape, kernel, "bfloat16")
    if not setting.quick:
        for density in (0.25, 0.75):
            found[f"ResNet-50, d = {density}"] = partial(plans, setting, "resnet50", 64, density, "bfloat16")
        found["ResNet-26"] = partial(plans, setting, "resnet26", 64, 0.5, "bfloat16")
        found["ResNet-50, batch 1"] = partial(plans, setting, "resnet50", 1, 0.5, "bfloat16")
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, each with its speed-up over the first of its case."""
    lines = [
        "| part | case | batch | d | dtype | what | ms | over the first | remarks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = tuple(row[name] for name in ("part", "network", "batch", "density", "dtype"))
        if "failed" in row:
            lines.append(
                f"| {' | '.join(map(str, key))} | {row['variant']} | – | – | {row['failed'].replace('|', '/')} |"
            )
            continue
        base = first.setdefault(key, row["p50_s"])
        figures = f"{row['p50_s'] * 1e3:.3f} | {base / row['p50_s']:.2f}"
        lines.append(f"| {' | '.join(map(str, key))} | {row['variant']} | {figures} | error {row['max_error']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every part that fits into the budget."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget-seconds", type=float, default=90.0)
    parser.add_argument("--without", default="", help="backends that are left out, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    budget = math.inf if options.device == "cpu" else options.budget_seconds
    without = tuple(options.without.split(","))
    setting = Setting(torch.device(options.device), time.perf_counter() + budget, options.quick, without)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    left_out = []
    for name, part in parts(setting).items():
        if setting.left() < 0.1 * budget:
            left_out.append(name)
            continue
        try:
            with torch.set_grad_enabled(name.startswith("training")):
                rows += part()
        except Exception as reason:  # the parts that follow are measured all the same
            rows.append(
                {
                    "part": name,
                    "network": "",
                    "batch": "",
                    "density": "",
                    "dtype": "",
                    "variant": "all",
                    "failed": f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}",
                }
            )
        print(f"{name}: {setting.left():.0f} s left", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    failed = sum("failed" in row for row in rows)
    print(json.dumps({"rows": len(rows), "failed": failed, "left_out": left_out}))


if __name__ == "__main__":
    main()
