"""Engines in which a user would deploy the pruned copy: ONNX Runtime and OpenVINO, for one shape, in float32."""

import time

from bap.export.formats import FORMATS, Run, onnx_bytes, onnxruntime_run, openvino_run, unavailable_reason
from torch import Tensor, nn

_RUN = {"onnxruntime": ("onnx", onnxruntime_run), "openvino": ("openvino", openvino_run)}
ENGINES = tuple(_RUN)
# Idle threads of OpenMP and of the engines spin for some milliseconds, on the cores that the next variant needs.
SPIN_SECONDS = 0.02


def missing_reason(name: str, device: str = "cpu", dtype: str = "float32") -> str:
    """Why an engine cannot be measured; empty if it can."""
    if device != "cpu" or dtype != "float32":
        return f"measured on a CPU in float32 only, not on {device} in {dtype}"
    return unavailable_reason(FORMATS[_RUN[name][0]])


class Engine(nn.Module):
    """A network that an engine runs; its parameters are those of the exported copy.

    Args:
        network: The exported network.
        run: The engine's call, on a contiguous input.
    """

    def __init__(self, network: nn.Module, run: Run) -> None:
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """Run the engine."""
        return self.run(x)


def deployed(name: str, network: nn.Module, example: Tensor, threads: int) -> Engine:
    """Export a network to ONNX and load it into an engine.

    Args:
        name: One of `ENGINES`.
        network: In eval mode, of PyTorch's own layers, float32.
        example: Contiguous input, (N, C, H, W): the one shape that the engine prepares for.
        threads: Threads that the engine may use.

    Raises:
        ValueError: If there is no such engine.
        ImportError: If it is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"deployed(): expected `name` to be of {', '.join(ENGINES)}, got {name!r}.")
    if reason := missing_reason(name):
        raise ImportError(f"deployed(): expected {name} to be installed, got: {reason}.")
    return Engine(network, _RUN[name][1](onnx_bytes(network, example), threads))


def pause() -> None:
    """Wait until the idle threads of the previous variant have gone to sleep."""
    time.sleep(SPIN_SECONDS)
