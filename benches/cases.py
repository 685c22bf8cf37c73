"""The cases: every distinct convolution of ResNet-50 at 224x224 and of ResNet-26 at 64x64.

The table is a literal so that results stay comparable between commits; a test compares it with the networks.
"""

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCHES = (1, 8)
DENSITIES = (0.75, 0.5, 0.25)
# In-lists only or both lists; of round counts, or ragged as training leaves them: every channel drawn by itself.
LISTS = ("in", "both", "in_ragged", "both_ragged")
LAYOUTS = ("channels_last", "nchw")

# Layers with fewer input channels (stems and their successors) are timed but not part of the means.
MIN_MEAN_CHANNELS = 64


@dataclass(frozen=True)
class Case:
    """One convolution with a square kernel, padding kernel // 2, no bias and no groups.

    Args:
        network: Network of the convolution.
        H: Height of the input.
        W: Width of the input.
        C_in: Input channels.
        C_out: Output channels.
        kernel: kH = kW.
        stride: Stride of both axes.
        count: Number of occurrences in the network.
    """

    network: str
    H: int
    W: int
    C_in: int
    C_out: int
    kernel: int
    stride: int
    count: int

    @property
    def padding(self) -> int:
        """Zero padding on every side."""
        return self.kernel // 2

    @property
    def output_size(self) -> tuple[int, int]:
        """(oH, oW)."""
        shrink = self.kernel - 2 * self.padding
        return (self.H - shrink) // self.stride + 1, (self.W - shrink) // self.stride + 1

    @property
    def shape(self) -> str:
        """Name such as ``56x56-64-64-k3s1``, unique within the network."""
        return f"{self.H}x{self.W}-{self.C_in}-{self.C_out}-k{self.kernel}s{self.stride}"


CASES: tuple[Case, ...] = tuple(
    Case(*row)
    for row in (
        ("resnet50", 224, 224, 3, 64, 7, 2, 1),
        ("resnet50", 56, 56, 64, 64, 1, 1, 1),
        ("resnet50", 56, 56, 64, 64, 3, 1, 3),
        ("resnet50", 56, 56, 64, 256, 1, 1, 4),
        ("resnet50", 56, 56, 256, 64, 1, 1, 2),
        ("resnet50", 56, 56, 256, 128, 1, 1, 1),
        ("resnet50", 56, 56, 128, 128, 3, 2, 1),
        ("resnet50", 28, 28, 128, 512, 1, 1, 4),
        ("resnet50", 56, 56, 256, 512, 1, 2, 1),
        ("resnet50", 28, 28, 512, 128, 1, 1, 3),
        ("resnet50", 28, 28, 128, 128, 3, 1, 3),
        ("resnet50", 28, 28, 512, 256, 1, 1, 1),
        ("resnet50", 28, 28, 256, 256, 3, 2, 1),
        ("resnet50", 14, 14, 256, 1024, 1, 1, 6),
        ("resnet50", 28, 28, 512, 1024, 1, 2, 1),
        ("resnet50", 14, 14, 1024, 256, 1, 1, 5),
        ("resnet50", 14, 14, 256, 256, 3, 1, 5),
        ("resnet50", 14, 14, 1024, 512, 1, 1, 1),
        ("resnet50", 14, 14, 512, 512, 3, 2, 1),
        ("resnet50", 7, 7, 512, 2048, 1, 1, 3),
        ("resnet50", 14, 14, 1024, 2048, 1, 2, 1),
        ("resnet50", 7, 7, 2048, 512, 1, 1, 2),
        ("resnet50", 7, 7, 512, 512, 3, 1, 2),
        ("resnet26", 64, 64, 3, 32, 3, 1, 1),
        ("resnet26", 64, 64, 32, 64, 3, 2, 1),
        ("resnet26", 32, 32, 64, 64, 3, 1, 7),
        ("resnet26", 32, 32, 64, 128, 3, 2, 1),
        ("resnet26", 16, 16, 128, 128, 3, 1, 7),
        ("resnet26", 16, 16, 128, 256, 3, 2, 1),
        ("resnet26", 8, 8, 256, 256, 3, 1, 7),
    )
)


@dataclass(frozen=True)
class Cell:
    """A case with batch, density, kind of lists and memory format: the unit on which variants are compared."""

    case: Case
    batch: int
    density: float
    lists: str
    layout: str

    @property
    def id(self) -> str:
        """Name in ids and tables, such as ``resnet50-b1-56x56-64-64-k3s1-d50-in-nchw``."""
        return (
            f"{self.case.network}-b{self.batch}-{self.case.shape}-d{self.density * 100:.0f}-{self.lists}-{self.layout}"
        )

    @property
    def row_fields(self) -> dict[str, Any]:
        """Fields of `benches.rows.Row` that describe the convolution."""
        case = self.case
        return {
            "network": case.network,
            "case": case.shape,
            "C_in": case.C_in,
            "C_out": case.C_out,
            "H": case.H,
            "W": case.W,
            "kernel": case.kernel,
            "stride": case.stride,
            "K_in": self.K_in,
            "K_out": self.K_out,
        }

    @property
    def seed(self) -> int:
        """Seed of the lists, the same for all layouts, kinds of lists and batches."""
        return zlib.crc32(f"{self.case.network}-{self.case.shape}-d{self.density * 100:.0f}".encode())

    @property
    def K_in(self) -> int:  # noqa: N802
        """Input channels kept."""
        return len(self.channel_lists()[0]) if self.ragged else kept(self.case.C_in, self.density)

    @property
    def K_out(self) -> int:  # noqa: N802
        """Output channels computed."""
        if not has_out_lists(self.lists):
            return self.case.C_out
        out_index = self.channel_lists()[1] if self.ragged else None
        return kept(self.case.C_out, self.density) if out_index is None else len(out_index)

    @property
    def ragged(self) -> bool:
        """Whether every channel is drawn by itself."""
        return is_ragged(self.lists)

    def channel_lists(self) -> tuple[Tensor, Tensor | None]:
        """Draw (in_index, out_index): sorted, unique int32; out_index is None for in-lists only."""
        generator = torch.Generator().manual_seed(self.seed)
        in_index = draw_list(self.case.C_in, self.density, self.ragged, generator)
        both = has_out_lists(self.lists)
        return in_index, draw_list(self.case.C_out, self.density, self.ragged, generator) if both else None


def is_ragged(lists: str) -> bool:
    """Whether a kind of lists draws every channel by itself."""
    return lists.endswith("_ragged")


def has_out_lists(lists: str) -> bool:
    """Whether a kind of lists has out-lists, too."""
    return lists.startswith("both")


def draw_list(channels: int, density: float, ragged: bool, generator: torch.Generator) -> Tensor:
    """Draw a list, sorted, int32: of just the density's count, or of every channel by itself, at least one."""
    if not ragged:
        return draw(channels, kept(channels, density), generator)
    numbers = torch.rand(channels, generator=generator)
    return torch.nonzero((numbers < density) | (numbers == numbers.min())).flatten().int()


def kept(channels: int, density: float) -> int:
    """Number of channels kept at a density, at least one."""
    return max(1, round(channels * density))


def draw(channels: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of ``channels`` numbers uniformly; sorted, int32."""
    return torch.randperm(channels, generator=generator)[:count].sort().values.int()


def full_cells(
    batches: Sequence[int] = BATCHES,
    densities: Sequence[float] = DENSITIES,
    lists: Sequence[str] = LISTS,
    layouts: Sequence[str] = LAYOUTS,
    cases: Iterable[Case] = CASES,
) -> list[Cell]:
    """Return every case in every setting, settings outermost."""
    settings = itertools.product(layouts, batches, lists, densities)
    cases = tuple(cases)
    return [Cell(case, batch, density, kind, layout) for layout, batch, kind, density in settings for case in cases]


def default_cells() -> list[Cell]:
    """Return the cells of the default study: batch 1 and the cases that count in the means.

    channels_last with all kinds of lists, the ragged ones at half of the channels, and NCHW with in-lists. The most
    informative settings come first, so that a study whose time runs out has complete passes over the cases.
    """
    cases = [case for case in CASES if case.C_in >= MIN_MEAN_CHANNELS]
    passes = (
        ("channels_last", "in", 0.5),
        ("channels_last", "both", 0.5),
        ("nchw", "in", 0.5),
        ("channels_last", "in_ragged", 0.5),
        ("channels_last", "both_ragged", 0.5),
        ("channels_last", "in", 0.25),
        ("channels_last", "in", 0.75),
        ("channels_last", "both", 0.25),
        ("channels_last", "both", 0.75),
        ("nchw", "in", 0.25),
        ("nchw", "in", 0.75),
    )
    return [Cell(case, 1, density, kind, layout) for layout, kind, density in passes for case in cases]
