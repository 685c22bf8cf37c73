"""Planned networks on the CUDA kernels, and what they ask of them: inputs that hold some of the weight's channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, lay_out, make_tensors
from tests.ptx.cuda.device import CONV, launches

ops = torch.ops.bap_kernels
STORED = torch.tensor([3, 17, 4, 0, 12, 9, 5], dtype=torch.int32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_compact_input(kernel: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    pad = kernel[0] // 2
    case = Case(in_channels=19, out_channels=40, kernel=kernel, padding=(pad,) * 4, dtype=dtype, layout=layout)
    sample = make_tensors(case.but(in_list="null"))
    compact = torch.zeros_like(sample.input)[:, :7].copy_(sample.input[:, STORED.long()])
    some = torch.tensor([6, 1, 2, 3], dtype=torch.int32)
    nothing = (None, None, False, None, None, None, False)
    for in_index, read in ((None, STORED), (some, STORED[some.long()])):
        expected = reference.gathered_conv2d(sample.input, sample.weight, sample.bias, read, *sample.args[4:])
        for cached in (True, True, False):
            with bk.use_backend("cuda"):
                y, _ = ops._gathered_conv2d_fused(
                    compact, *sample.args[1:3], in_index, *sample.args[4:], *nothing, cached, read
                )
            assert_close(y, expected, dtype, sample.depth)


class Branchy(nn.Module):
    """Strides, a residual sum, a 1x1 shortcut, batch norms in front and behind, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 40, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.second = nn.Conv2d(40, 24, 3, padding=1)
        self.shortcut = nn.Conv2d(40, 24, 1)
        self.before = nn.BatchNorm2d(24)
        self.third = nn.Conv2d(24, 30, 5, padding=2)
        self.fc = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.second(x) + self.shortcut(x)
        return self.fc(self.third(F.relu(self.before(x))).mean((2, 3)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_networks(layout: str) -> None:
    torch.manual_seed(4)
    model = Branchy()
    for norm in (model.norm, model.before):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_mean.uniform_(-0.5, 0.5)
    bk.swap_(model)
    domains = ["birds", "cars"]
    bk.attach_(model, bk.ChannelTable.random(model, domains, 0.5, seed=2)).eval()
    x = lay_out(torch.randn(3, 12, 17, 16), layout)
    with torch.no_grad():
        for domain in domains:
            bk.set_domain(model, domain)
            expected = model(x)
            planned = bk.plan(model, x, domain)
            with bk.use_backend("cuda"), launches() as names:
                y = planned(x)
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
            assert names.count(CONV) == 4
