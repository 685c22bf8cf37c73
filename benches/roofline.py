"""Roofline times on GPUs, also on absent ones, from bytes, FLOPs, L2 traffic and launches.

    python -m benches.roofline [--gpu H200] [--dtype bfloat16] [--batch 64] [--lists in]

    time = launches * launch_s + max(FLOP / peak, bytes from memory / bandwidth, bytes from L2 / L2 bandwidth)

summed over the kernels of a variant. This is a lower bound: no kernel reaches all peaks. The report of a GPU shows it
next to the measured time.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from benches.cases import BATCHES, CASES, DENSITIES, Case, kept
from benches.rows import Row
from benches.tables import Table

# Of a memory transaction: a random list of a channels_last tensor touches nearly all sectors.
SECTOR_BYTES = 32
# Tile (pixels, filters) assumed for the L2 traffic.
TILE = (128, 128)


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU.

    Args:
        bytes_per_s: Of the memory (datasheet).
        l2_bytes_per_s: Of the L2 cache (order of magnitude of published measurements).
        flop_per_s: Dense peak by dtype (datasheet); float32 is TF32.
        launch_s: Of a kernel in a full stream (assumed).
    """

    bytes_per_s: float
    l2_bytes_per_s: float
    flop_per_s: dict[str, float]
    launch_s: float = 2e-6


_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}
GPUS: dict[str, Gpu] = {
    "H200": Gpu(4.8e12, 7e12, _HOPPER),
    "H100": Gpu(3.35e12, 7e12, _HOPPER),
    "A100": Gpu(2.04e12, 4.5e12, {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}),
}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """Work of one kernel: FLOP (2 per multiply-add), bytes of memory traffic, bytes of L2 traffic."""

    flop: float
    moved: float
    l2: float

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        """Least time on a GPU, including the launch."""
        limits = (self.flop / gpu.flop_per_s[dtype], self.moved / gpu.bytes_per_s, self.l2 / gpu.l2_bytes_per_s)
        return gpu.launch_s + max(limits)


def touched(density: float, layout: str, size: int) -> float:
    """Expected share of a tensor's sectors that a random list reads.

    Examples:
        >>> from benches.roofline import touched
        >>> touched(0.5, "nchw", 2), round(touched(0.5, "channels_last", 2), 4)
        (0.5, 1.0)
    """
    return density if layout == "nchw" else 1 - (1 - density) ** (SECTOR_BYTES // size)


def convolution(case: Case, batch: int, C_in: int, C_out: int, size: int, read: float | None = None) -> Work:
    """Work of the convolution of a case with other channel counts.

    Args:
        case: Geometry.
        batch: N.
        C_in: Input channels.
        C_out: Output channels.
        size: Bytes of an element.
        read: Bytes of the input that are read from memory; by default those of ``C_in`` dense channels.
    """
    oH, oW = case.output_size
    pixels, depth = batch * oH * oW, C_in * case.kernel**2
    x = batch * C_in * _read_pixels(case) * size if read is None else read
    weight, result = C_out * depth * size, pixels * C_out * size
    # Every tile of filters reads its pixels once per tap, and every tile of pixels its weights.
    l2 = pixels * depth * size * math.ceil(C_out / TILE[1]) + weight * math.ceil(pixels / TILE[0]) + result
    return Work(2.0 * pixels * C_out * depth, x + weight + result, l2)


def _read_pixels(case: Case) -> int:
    oH, oW = case.output_size
    # A strided 1x1 convolution skips pixels.
    return case.H * case.W if case.kernel >= case.stride else oH * oW


def kernels(case: Case, batch: int, density: float, lists: str, layout: str, dtype: str, variant: str) -> list[Work]:
    """Work of the kernels of a variant.

    ``dense`` and ``masked`` compute all channels; ``oracle`` reads compact tensors; ``naive``, ``gather_conv``,
    ``auto`` and ``aten`` copy the listed channels first; ``triton`` does so unless the convolution is 1x1 in NCHW.

    Raises:
        ValueError: For another variant.
    """
    size = BYTES[dtype]
    K_in, K_out = kept(case.C_in, density), kept(case.C_out, density) if lists == "both" else case.C_out
    if variant in ("dense", "masked"):
        return [convolution(case, batch, case.C_in, case.C_out, size)]
    compact = convolution(case, batch, K_in, K_out, size)
    if variant in ("oracle", "oracle8"):
        return [compact]
    whole = batch * case.C_in * _read_pixels(case) * size
    read = whole * touched(K_in / case.C_in, layout, size)
    if variant == "triton" and layout == "nchw" and case.kernel == 1 and case.stride == 1:
        return [convolution(case, batch, K_in, K_out, size, read)]
    if variant in ("naive", "gather_conv", "aten", "auto", "triton"):
        written = batch * K_in * _read_pixels(case) * size
        return [Work(0.0, read + written, read + written), compact]
    raise ValueError(f"kernels(): expected `variant` to be a modelled one, got {variant!r}.")


def predicted(row: Row, gpu: Gpu) -> float | None:
    """Predicted seconds of a row's layer on a GPU; None if it is not modelled (networks, other variants)."""
    if row.C_in is None or row.dtype not in gpu.flop_per_s:
        return None
    case = Case(row.network, row.H, row.W, row.C_in, row.C_out, row.kernel, row.stride, 1)  # type: ignore[arg-type]
    try:
        work = kernels(case, row.batch, row.density, row.lists, row.layout, row.dtype, row.variant)
    except ValueError:
        return None
    return sum(kernel.seconds(gpu, row.dtype) for kernel in work)


def known_gpu(name: str | None) -> str | None:
    """Return the key of ``GPUS`` for a device name such as ``NVIDIA H200``, or None.

    Examples:
        >>> from benches.roofline import known_gpu
        >>> known_gpu("NVIDIA A100-SXM4-80GB")
        'A100'
    """
    return next((key for key in GPUS if name and key in name), None)


def measured_gpu(peaks: Mapping[str, float], dtype: str) -> Gpu:
    """Return an unlisted GPU with measured peaks and an unlimited L2 cache.

    Args:
        peaks: From the header of a study, see `benches.machine.Roofline`.
        dtype: Of the measured matrix product.
    """
    return Gpu(peaks["bytes_per_s"], math.inf, {dtype: peaks["matmul_flop_per_s"]})


def prediction_table(
    gpu_name: str | None, rows: Sequence[Row], peaks: Mapping[str, float] | None = None, dtype: str = ""
) -> Table | None:
    """Predicted and measured times of the rows of a GPU; None if there are none.

    Args:
        gpu_name: Of the device.
        rows: Of a study.
        peaks: Measured peaks, for a GPU that is not listed.
        dtype: Of the measured matrix product.
    """
    name = known_gpu(gpu_name)
    if gpu_name is None or (name is None and peaks is None):
        return None
    gpu: Gpu = GPUS[name] if name is not None else measured_gpu(peaks or {}, dtype)
    lines = []
    for row in rows:
        seconds = predicted(row, gpu) if row.device == "cuda" else None
        if seconds is not None:
            lines.append(
                [row.cell, row.variant, f"{seconds * 1e6:.1f}", f"{row.p50_s * 1e6:.1f}", f"{seconds / row.p50_s:.2f}"]
            )
    origin = name if name is not None else "this GPU's measured peaks"
    note = f"Roofline of {origin}: bytes, FLOPs, L2 traffic and launches."
    columns = ["case", "variant", "predicted [µs]", "measured [µs]", "predicted / measured"]
    return Table("Predicted and measured", columns, lines, note, left=2, screen=False) if lines else None


def main() -> None:
    """Print the predicted times of every case."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="H200")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bfloat16")
    parser.add_argument("--batch", type=int, default=max(BATCHES))
    parser.add_argument("--lists", choices=("in", "both"), default="in")
    options = parser.parse_args()
    variants = ("dense", "oracle", "gather_conv", "triton")
    lines = []
    for layout, density, case in product(("channels_last", "nchw"), DENSITIES, CASES):
        setting = options.batch, density, options.lists, layout, options.dtype
        times = {
            variant: sum(work.seconds(GPUS[options.gpu], options.dtype) for work in kernels(case, *setting, variant))
            for variant in variants
        }
        figures = [f"{seconds * 1e6:.1f}" for seconds in times.values()]
        ratio = f"{times['dense'] / times['triton']:.2f}"
        lines.append([f"{case.network} {case.shape}", f"{density:g}", layout, *figures, ratio])
    columns = ["case", "d", "layout", *(f"{variant} [µs]" for variant in variants), "triton over dense"]
    print(Table(f"Roofline of {options.gpu}, {options.dtype}", columns, lines).markdown())


if __name__ == "__main__":
    main()
