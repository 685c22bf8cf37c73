"""File formats of other runtimes: how a network of PyTorch's own layers is written, and how its file is run again."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = [
    "FORMATS",
    "Format",
    "Run",
    "executorch_program",
    "onnx_bytes",
    "onnxruntime_run",
    "openvino_run",
    "unavailable_reason",
]

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        name: as ``bap export --format`` takes it.
        suffix: of the file.
        runtime: what runs the file, in words.
        packages: what has to be installed.
        write: ``write(network, example, path)`` writes the file, and further ones beside it.
        load: ``load(path, threads)`` gives a function of one tensor, float32, (N, C, H, W), of the example's shape.
    """

    name: str
    suffix: str
    runtime: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path, int], Run]


def unavailable_reason(format: Format) -> str:
    """Why a format cannot be written here; empty if it can.

    Examples:
        >>> from bap.export import FORMATS, unavailable_reason
        >>> unavailable_reason(FORMATS["pt2"])
        ''
    """
    missing = [package for package in format.packages if importlib.util.find_spec(package) is None]
    return f"{', '.join(missing)} not installed (`pip install {' '.join(missing)}`)" if missing else ""


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' own notes about themselves; outside of inference mode, which tracing refuses."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def onnx_bytes(network: nn.Module, example: Tensor) -> bytes:
    """A network as an ONNX model with the input ``x`` and the output ``y``, for one shape.

    Args:
        network: in eval mode, of PyTorch's own layers.
        example: (N, C, H, W), float32.
    """
    with _quietly():
        program = torch.onnx.export(
            network, (example.clone(),), input_names=["x"], output_names=["y"], dynamo=True, verbose=False
        )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def onnxruntime_run(model: bytes | Path, threads: int) -> Run:
    """ONNX Runtime's session on a CPU.

    Args:
        model: an ONNX model, or its file.
        threads: of one call.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def openvino_run(model: bytes | Path, threads: int) -> Run:
    """OpenVINO's compiled model on a CPU, computing in float32.

    Args:
        model: an ONNX model, or the file of an OpenVINO model.
        threads: of one call.
    """
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    source = model if isinstance(model, bytes) else str(model)
    request = core.compile_model(core.read_model(source), "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True)[0])


def _write_onnx(network: nn.Module, example: Tensor, path: Path) -> None:
    path.write_bytes(onnx_bytes(network, example))


def _write_openvino(network: nn.Module, example: Tensor, path: Path) -> None:
    import openvino

    model = openvino.Core().read_model(onnx_bytes(network, example))
    # Its default keeps weights in float16.
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _exported(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    with _quietly():
        return torch.export.export(network, (example.clone(),))


def _write_pt2(network: nn.Module, example: Tensor, path: Path) -> None:
    torch.export.save(_exported(network, example), path)


def _load_pt2(path: Path, threads: int) -> Run:
    module: Run = torch.export.load(path).module()
    return _with_threads(module, threads)


def _write_aoti(network: nn.Module, example: Tensor, path: Path) -> None:
    from torch import _inductor

    with _quietly():
        _inductor.aoti_compile_and_package(_exported(network, example), package_path=str(path))


def _load_aoti(path: Path, threads: int) -> Run:
    from torch import _inductor

    return _with_threads(_inductor.aoti_load_package(str(path)), threads)


def _with_threads(run: Run, threads: int) -> Run:
    """PyTorch's own runtimes use the threads of the process."""

    def call(x: Tensor) -> Tensor:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return run(x)

    return call


def executorch_program(networks: Mapping[str, nn.Module], example: Tensor) -> bytes:
    """An ExecuTorch program, lowered to XNNPACK, with a method for each network; equal tensors are stored once.

    Args:
        networks: {method: network}, in eval mode, of PyTorch's own layers.
        example: (N, C, H, W), float32.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with _quietly():
        program = to_edge_transform_and_lower(
            {method: _exported(network, example) for method, network in networks.items()},
            partitioner={method: [XnnpackPartitioner()] for method in networks},
        )
        data: bytes = program.to_executorch().buffer
    return data


def _write_executorch(network: nn.Module, example: Tensor, path: Path) -> None:
    path.write_bytes(executorch_program({"forward": network}, example))


def _load_executorch(path: Path, threads: int) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda x: method.execute([x])[0].clone()


FORMATS = {
    format.name: format
    for format in (
        Format("onnx", ".onnx", "ONNX Runtime", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, onnxruntime_run),
        Format("openvino", ".xml", "OpenVINO", ("onnx", "onnxscript", "openvino"), _write_openvino, openvino_run),
        Format("pt2", ".pt2", "torch.export, run by PyTorch", (), _write_pt2, _load_pt2),
        Format("aoti", ".aoti.pt2", "AOTInductor's compiled library", (), _write_aoti, _load_aoti),
        Format("executorch", ".pte", "ExecuTorch with XNNPACK", ("executorch",), _write_executorch, _load_executorch),
    )
}
