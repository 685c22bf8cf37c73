"""``python -m benches.depthwise``: its layers are those of the networks, and it measures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from bap_kernels import _C
from benches import depthwise


@pytest.mark.parametrize(("name", "kernel"), [("mobilenet_v2", 3), ("mobilenet_v3_large", 5)])
def test_layers_are_those_of_the_network(name: str, kernel: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
    seen: Counter[tuple[int, int, int]] = Counter()

    def count(conv: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == conv.in_channels and conv.kernel_size == (kernel, kernel):
            seen[(inputs[0].shape[-1], conv.in_channels, conv.stride[0])] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    listed = {
        (layer.size, layer.channels, layer.stride): layer.count for layer in depthwise.LAYERS if layer.network == name
    }
    assert seen == listed


@pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native")))
def test_layers_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["depthwise", "--batch", "1", "--density", "0.5", "--seconds", "0"])
    monkeypatch.setattr(depthwise, "LAYERS", [layer for layer in depthwise.LAYERS if layer.size == 7])
    before = _C.get_backend(), torch.get_num_threads()
    try:
        depthwise.main()
    finally:
        _C.set_backend(before[0])
        torch.set_num_threads(before[1])
    text = capsys.readouterr().out
    assert text.count("mobilenet_v2 3x3/1 481 at 7x7, 3 times") == len(depthwise.LAYOUTS)
    assert text.count("Geometric means of the speed-ups: native ") == len(depthwise.LAYOUTS)
