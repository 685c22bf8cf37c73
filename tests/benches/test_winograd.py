"""``python -m benches.winograd``: its layers are those of the networks, and it measures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bap_kernels import _C
from benches import winograd
from benches.network_models import NETWORKS


@pytest.mark.parametrize(
    ("name", "same"), [("resnet50", ""), ("resnet26", ""), ("vgg16_bn", ""), ("wrn28_4", "resnet26")]
)
def test_layers_are_those_of_the_network(name: str, same: str) -> None:
    make, side = NETWORKS[name]
    with torch.device("meta"):
        model = make().eval()
    seen: Counter[tuple[int, int, int]] = Counter()

    def count(conv: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.in_channels >= 64:
            seen[(inputs[0].shape[-1], conv.in_channels, conv.out_channels)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, side, side, device="meta"))
    assert seen == {(c.W, c.C_in, c.C_out): c.count for c in winograd.LAYERS if c.network == (same or name)}


@pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))
def test_layers_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "sys.argv", ["winograd", "--only", "resnet26", "--batch", "1", "--layout", "nchw", "--seconds", "0"]
    )
    monkeypatch.setattr(winograd, "LAYERS", [case for case in winograd.LAYERS if case.H == 8])
    before = _C.get_backend(), _C.get_winograd(), torch.get_num_threads()
    try:
        winograd.main()
    finally:
        _C.set_backend(before[0])
        _C.set_winograd(before[1])
        torch.set_num_threads(before[2])
    text = capsys.readouterr().out
    assert "resnet26 8x8-256-256-k3s1" in text
    assert "auto over the oracle" in text
    errors = [float(cell) for cell in text.split("resnet26 8x8")[1].split("|")[11:13]]
    assert 0 < errors[1] < errors[0] < 1e-4, "F(2x2) rounds less than F(4x4)"
