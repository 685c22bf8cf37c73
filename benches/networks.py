"""Whole networks on photographs: the package against dense, masked and compiled networks; eval mode, in-lists only.

Weights are random (nothing is downloaded); batch norms are calibrated on the photographs, so that activations have
typical magnitudes. Layers with at most four input channels keep all of them.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benches import compiled, engines, gate, ours
from benches.cases import is_ragged
from benches.measure import DTYPES
from benches.memory import can_measure_peak, in_fresh_process, peak_bytes
from benches.network_models import DOMAIN, NETWORKS, NetworkCell, conv_flop, in_lists, mask_, swap_, weight_bytes
from benches.photographs import CROPS, batches
from benches.problem import MEMORY_FORMATS, normal_tensors
from benches.rows import Row, row_of, with_ratios
from benches.summary import WHOLE_NETWORK
from benches.timers import Spread, Timed, clock, interleave, nothing

PLANNED = ("planned", "ordered")
PACKING = (*PLANNED, *ours.BACKENDS)
MIN_ROUNDS = 3
MAX_ROUNDS = 30
# Untimed and timed calls of a network in each round, batch 1 and larger ones. The threads of a network that was not
# called for some milliseconds sleep, and what a call costs then is the operating system's.
BURSTS = {1: (3, 5)}
BURST = (1, 2)
# Relative to the largest logit: rounding in fifty layers stays far below, a wrong channel in one layer is far above.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# Variants of whole networks alone. planned: bk.plan. ordered: bk.plan after bk.order_channels_. pruned: bk.specialize,
# the physically small network of one domain, in PyTorch's own layers. compiled, compiled_dense: pruned and dense under
# torch.compile with frozen weights. onnxruntime, openvino: pruned, exported to these engines.
COMPILED = ("compiled", "compiled_dense")
WHOLE = (*PLANNED, "pruned", *COMPILED, *engines.ENGINES)
# Measured if requested, and in a full study: expensive, or of little interest on a CPU.
OPT_IN = ("ordered", *COMPILED, *engines.ENGINES)
# These do all of the work, and compute another function than the others.
DENSE = ("dense", "compiled_dense")


class NetworkBench:
    """Builds each network once, and measures its cells.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.
        min_rounds: Least number of rounds for each cell.
        peaks: Whether to measure peak memory, if the system can.
    """

    def __init__(self, device: torch.device, dtype: str, min_rounds: int = MIN_ROUNDS, peaks: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.min_rounds = min_rounds
        self.peaks = peaks and can_measure_peak()
        self.clock = clock(device)
        self._models: dict[str, nn.Module] = {}
        # Of the last key (network, batch, layout): the same for all densities.
        self._compiled_dense: tuple[tuple[str, int, str], nn.Module] | None = None

    def model(self, network: str) -> nn.Module:
        """Return the dense network in float32 on the CPU, with calibrated batch norms, in eval mode."""
        if network not in self._models:
            build, size = NETWORKS[network]
            with torch.random.fork_rng(devices=[]), normal_tensors():
                torch.manual_seed(0)
                model = build().train()
                norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
                momenta = [norm.momentum for norm in norms]
                for norm in norms:
                    norm.momentum = 1.0
                model(batches(size, CROPS, count=1)[0])
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
            self._models[network] = model.eval()
        return self._models[network]

    def converted(self, model: nn.Module, layout: str) -> nn.Module:
        """Return a copy of a network on the bench's device, in its dtype and a memory format."""
        clone: Any = copy.deepcopy(model)
        return clone.to(self.device, DTYPES[self.dtype]).to(memory_format=MEMORY_FORMATS[layout])

    def inputs(self, cell: NetworkCell) -> list[Tensor]:
        """Return a pool of batches of photographs in the cell's memory format."""
        return [
            x.to(self.device, DTYPES[self.dtype]).contiguous(memory_format=MEMORY_FORMATS[cell.layout])
            for x in batches(NETWORKS[cell.network][1], cell.batch)
        ]

    @normal_tensors()
    def prepare(self, cell: NetworkCell, names: Sequence[str]) -> dict[str, Timed]:
        """Return the networks of the named variants, with a pool of inputs."""
        model = self.model(cell.network)
        lists = in_lists(model, cell.density, cell.seed, is_ragged(cell.lists))
        inputs = self.inputs(cell)
        prepared = {}
        for name in names:
            enter: Callable[[], None] = nothing
            if name == "dense":
                run = self.converted(model, cell.layout)
            elif name == "masked":
                run = mask_(self.converted(model, cell.layout), lists)
            elif name == "compiled_dense":
                run = self._dense_compiled(cell, model, inputs[0])
            elif name in WHOLE:
                run = self._lowered(name, swap_(self.converted(model, cell.layout), lists), inputs[0])
                enter = _enter("auto") if name in PLANNED else nothing
            else:
                # One network per backend, so that packed weights are counted separately.
                run = swap_(self.converted(model, cell.layout), lists)
                enter = _enter(name)
            prepared[name] = Timed(run, [x.contiguous() for x in inputs] if name in engines.ENGINES else inputs, enter)
        if any(name in engines.ENGINES for name in names):
            return {name: replace(timed, enter=_after_pause(timed.enter)) for name, timed in prepared.items()}
        return prepared

    def _lowered(self, name: str, swapped: nn.Module, example: Tensor) -> nn.Module:
        bk = ours.package()
        if name in PLANNED:
            ours.package().use_backend("auto")
            if name == "ordered":
                bk.order_channels_(swapped, example)
            # The gate checks the result.
            planned: nn.Module = bk.plan(swapped, example, DOMAIN, check=False)
            return planned
        small: nn.Module = bk.specialize(swapped, DOMAIN).to(memory_format=_format_of(example))
        if name in engines.ENGINES:
            return engines.deployed(name, small, example.contiguous(), torch.get_num_threads())
        return small if name == "pruned" else compiled.frozen(small, example)

    def _dense_compiled(self, cell: NetworkCell, model: nn.Module, example: Tensor) -> nn.Module:
        key = cell.network, cell.batch, cell.layout
        if self._compiled_dense is None or self._compiled_dense[0] != key:
            self._compiled_dense = key, compiled.frozen(self.converted(model, cell.layout), example)
        return self._compiled_dense[1]

    def reference(self, cell: NetworkCell, x: Tensor) -> Tensor:
        """Return float64 logits of the masked network for the first image of a batch."""
        model = mask_(
            copy.deepcopy(self.model(cell.network)).double(),
            in_lists(self.model(cell.network), cell.density, cell.seed, is_ragged(cell.lists)),
        )
        return model(x[:1].cpu().double())

    def check(self, name: str, timed: Timed, cell: NetworkCell, reference: Tensor, masked: Tensor | None) -> float:
        """Check the logits of one variant and return their largest error.

        Args:
            name: Of the variant.
            timed: The prepared network.
            cell: For the message.
            reference: float64 logits of the first image.
            masked: Logits of the masked network for the whole batch, if available.

        Raises:
            WrongResultError: If they differ by more than rounding.
        """
        timed.enter()
        result = torch.as_tensor(timed.run(timed.inputs[0])).double().cpu()
        limit = TOLERANCE[self.dtype] * reference.abs().max().item()
        pairs = [(result[:1], reference)] + ([] if masked is None else [(result, masked)])
        errors = [(logits - expected).abs().max().item() for logits, expected in pairs]
        if not max(errors) <= limit:
            raise gate.WrongResultError(
                f"check(): expected logits of {name} on {cell.id} to be within {limit:.3g} of the masked network, "
                f"got {max(errors):.3g}."
            )
        return errors[0]

    def rows(self, cell: NetworkCell, names: Sequence[str], seconds: float) -> list[Row]:
        """Measure one cell in about ``seconds``; dense networks compute another function and are not checked."""
        start = time.perf_counter()
        with torch.inference_mode():
            prepared = self.prepare(cell, names)
            inputs = next(iter(prepared.values())).inputs
            reference = self.reference(cell, inputs[0])
            masked = None
            errors, sizes = {}, {}
            for name, timed in prepared.items():
                before = ours.packed_bytes() if name in PACKING else 0
                if name in DENSE:
                    timed.run(inputs[0])
                    errors[name] = 0.0
                else:
                    errors[name] = self.check(name, timed, cell, reference, masked)
                if name == "masked":
                    masked = torch.as_tensor(timed.run(inputs[0])).double().cpu()
                packed = ours.packed_bytes() - before if name in PACKING else 0
                sizes[name] = weight_bytes(timed.run) + packed  # type: ignore[arg-type]
            remaining = seconds - (time.perf_counter() - start)
            most = max(self.min_rounds, MAX_ROUNDS)
            burst = BURSTS.get(cell.batch, BURST)
            samples = interleave(prepared, self.clock, remaining, self.min_rounds, most, *burst)
            flop = conv_flop(
                self.model(cell.network),
                inputs[0][:1].cpu().float(),
                in_lists(self.model(cell.network), cell.density, cell.seed, is_ragged(cell.lists)),
            )
        if any(name in PACKING for name in names):
            ours.clear_packed()
        spreads = {name: Spread.of(samples[name]) for name in prepared}
        peaks = {name: in_fresh_process(network_peak, cell, name, self.dtype) for name in prepared if self.peaks}
        rows = (self._row(cell, name, spreads[name], errors[name], sizes[name], flop) for name in prepared)
        return with_ratios(replace(row, peak_bytes=peaks.get(row.variant)) for row in rows)

    def _row(
        self, cell: NetworkCell, name: str, spread: Spread, error: float, size: int, flop: tuple[float, float]
    ) -> Row:
        return row_of(
            cell,
            spread,
            cell.batch * flop[0 if name in DENSE else 1],
            network=cell.network,
            case=WHOLE_NETWORK,
            variant=name,
            device=self.device.type,
            dtype=self.dtype,
            max_error=error,
            weight_bytes=size,
        )


def network_peak(cell: NetworkCell, name: str, dtype: str) -> int:
    """Peak bytes of a forward on the CPU beyond weights, packed weights and input; in a process of its own."""
    ours.reset_choices()
    bench = NetworkBench(torch.device("cpu"), dtype)
    with torch.inference_mode():
        timed = bench.prepare(cell, [name])[name]
        timed.enter()
        x = timed.inputs[0]
        # The first calls pack, choose and compile.
        timed.run(x)
        timed.run(x)
        return peak_bytes(lambda: timed.run(x))


def _format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _after_pause(enter: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        engines.pause()
        enter()

    return both


def _enter(backend: str) -> Callable[[], None]:
    return lambda: ours.package().use_backend(backend)
