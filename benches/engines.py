"""Engines in which a user would deploy the pruned copy: ONNX Runtime and OpenVINO, for one shape, in float32."""

import importlib.util
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

ENGINES = ("onnxruntime", "openvino")
# Idle threads of OpenMP and of the engines spin for some milliseconds, on the cores that the next variant needs.
SPIN_SECONDS = 0.02


def unavailable_reason(name: str, device: str = "cpu", dtype: str = "float32") -> str:
    """Why an engine cannot be measured; empty if it can."""
    if device != "cpu" or dtype != "float32":
        return f"measured on a CPU in float32 only, not on {device} in {dtype}"
    needed = (name, "onnx", "onnxscript")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"{', '.join(missing)} not installed; `pip install -e '.[engines]'` does it" if missing else ""


class Engine(nn.Module):
    """A network that an engine runs; its parameters are those of the exported copy.

    Args:
        network: The exported network.
        run: The engine's call, on a contiguous input.
    """

    def __init__(self, network: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
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
    if reason := unavailable_reason(name):
        raise ImportError(f"deployed(): expected {name} to be installed, got: {reason}.")
    program = _onnx_program(network, example)
    run = _onnxruntime(program, threads) if name == "onnxruntime" else _openvino(program, threads)
    return Engine(network, run)


def pause() -> None:
    """Wait until the idle threads of the previous variant have gone to sleep."""
    time.sleep(SPIN_SECONDS)


def _onnx_program(network: nn.Module, example: Tensor) -> bytes:
    with warnings.catch_warnings(), torch.no_grad(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        # The exporter's tracing refuses inference tensors.
        program = torch.onnx.export(
            network, (example.clone(),), input_names=["x"], output_names=["y"], dynamo=True, verbose=False
        )
    assert program is not None
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised


def _onnxruntime(program: bytes, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def _openvino(program: bytes, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(core.read_model(program), "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True)[0])
