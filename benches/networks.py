"""Whole networks on photographs: the package against dense, masked and compiled networks; eval mode, in-lists only.

Weights are random (nothing is downloaded); batch norms are calibrated on the photographs, so that activations have
typical magnitudes. Layers with at most four input channels keep all of them.
"""

import copy
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benches import compiled, engines, gate, ours
from benches.cases import draw_list, is_ragged
from benches.measure import DTYPES
from benches.memory import can_measure_peak, in_fresh_process, peak_bytes
from benches.photographs import CROPS, batches
from benches.problem import MEMORY_FORMATS, normal_tensors
from benches.rows import Row, row_of, with_ratios
from benches.summary import WHOLE_NETWORK
from benches.timers import Spread, Timed, clock, interleave, nothing

DOMAIN = "photographs"
FEW_CHANNELS = 4
# Of the networks without a fixed number.
CLASSES = 100
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


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return make


def _bap(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from bap import models

        model: nn.Module = getattr(models, name)(num_classes=CLASSES)
        return model

    return make


# Variants of whole networks alone. planned: bk.plan. ordered: bk.plan after bk.order_channels_. pruned: bk.specialize,
# the physically small network of one domain, in PyTorch's own layers. compiled, compiled_dense: pruned and dense under
# torch.compile with frozen weights. onnxruntime, openvino: pruned, exported to these engines.
COMPILED = ("compiled", "compiled_dense")
WHOLE = (*PLANNED, "pruned", *COMPILED, *engines.ENGINES)
# Measured if requested, and in a full study: expensive, or of little interest on a CPU.
OPT_IN = ("ordered", *COMPILED, *engines.ENGINES)
# These do all of the work, and compute another function than the others.
DENSE = ("dense", "compiled_dense")
# Constructor and image size.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (_torchvision("resnet50"), 224),
    "resnet26": (_bap("ResNet26"), 64),
    "densenet121": (_torchvision("densenet121"), 224),
    "wrn28_4": (_bap("WideResNet"), 64),
    "resnet18": (_torchvision("resnet18"), 224),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 224),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), 224),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 224),
    "vgg11_bn": (_torchvision("vgg11_bn"), 224),
    "vgg16_bn": (_torchvision("vgg16_bn"), 224),
}
# Of the default study.
DEFAULT_NETWORKS = ("resnet50", "resnet26")


@dataclass(frozen=True)
class NetworkCell:
    """A network with batch, density and memory format."""

    network: str
    batch: int
    density: float
    layout: str
    lists: str = "in"

    @property
    def id(self) -> str:
        """Name in ids and tables, such as ``resnet50-b1-network-d50-in-channels_last``."""
        return f"{self.network}-b{self.batch}-{WHOLE_NETWORK}-d{self.density * 100:.0f}-{self.lists}-{self.layout}"

    @property
    def seed(self) -> int:
        """Seed of the lists, the same for all batches and layouts."""
        return zlib.crc32(f"{self.network}-{WHOLE_NETWORK}-d{self.density * 100:.0f}".encode())


def network_cells(
    batches: Sequence[int],
    densities: Sequence[float],
    layouts: Sequence[str],
    networks: Sequence[str] = DEFAULT_NETWORKS,
    lists: Sequence[str] = ("in",),
) -> list[NetworkCell]:
    """Return the networks in every setting, in complete passes over the networks, density 0.5 first."""
    order = sorted(densities, key=lambda density: (abs(density - 0.5), density))
    return [
        NetworkCell(network, batch, density, layout, kind)
        for layout in layouts
        for kind in lists
        for density in order
        for batch in batches
        for network in networks
    ]


class MaskedInputConv2d(nn.Module):
    """A dense convolution of the input times a mask."""

    def __init__(self, conv: nn.Conv2d, in_index: Tensor) -> None:
        super().__init__()
        self.conv = conv
        mask = torch.zeros(1, conv.in_channels, 1, 1)
        mask[:, in_index.long()] = 1
        self.register_buffer("mask", mask.to(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and convolve."""
        return self.conv(x * self.get_buffer("mask"))


def in_lists(model: nn.Module, density: float, seed: int, ragged: bool = False) -> dict[str, Tensor]:
    """Draw an in-list for every convolution with more than `FEW_CHANNELS` input channels; grouped ones read all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: draw_list(module.in_channels, density, ragged, generator)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > FEW_CHANNELS
    }


def mask_(model: nn.Module, lists: dict[str, Tensor]) -> nn.Module:
    """Replace the listed convolutions by masked ones, in place."""
    for name, in_index in lists.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        conv = getattr(owner, child)
        setattr(owner, child, MaskedInputConv2d(conv, in_index))
    return model


def swap_(model: nn.Module, lists: dict[str, Tensor]) -> nn.Module:
    """Replace the convolutions by the package's layers with the lists."""
    bk = ours.package()
    bk.swap_(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, bk.nn.GatheredConv2d)]
    table = bk.ChannelTable({DOMAIN: {name: bk.ChannelLists(lists.get(name)) for name in layers}})
    bk.attach_(model, table)
    bk.set_domain(model, DOMAIN)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def conv_flop(model: nn.Module, example: Tensor, lists: dict[str, Tensor]) -> tuple[float, float]:
    """FLOP (2 per multiply-add) of all convolutions: (dense, with the lists)."""
    full, kept_flop = 0.0, 0.0

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal full, kept_flop
            per_channel = 2.0 * output.numel() * module.weight[0, 0].numel()
            own = module.weight.shape[1]
            full += per_channel * own
            kept_flop += per_channel * (len(lists[name]) if name in lists else own)

        return hook

    hooks = [m.register_forward_hook(count(name)) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model(example)
    for hook in hooks:
        hook.remove()
    return full, kept_flop


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
