"""CUDA graphs of plans: a plan's launches are recorded once for inputs of some shape, and replayed in one call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bap_kernels.plan.program import Program

__all__ = ["MOST_GRAPHS", "CudaCapture", "PlanGraphs", "capture_for"]

# Graphs that one planned network keeps; the one that was not replayed for longest is dropped first.
MOST_GRAPHS = 32
# Runs before a capture: they choose backends and pack weights, which a capture may not.
_WARM_UPS = 3


class CudaCapture:
    """What graphs need of a device; tests have another class in its place.

    Args:
        device: of the plan.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Of all graphs: only one of them runs at a time, and what it returns is copied first.
        self.pool = torch.cuda.graph_pool_handle()
        self.last: torch.cuda.Event | None = None

    def capturing(self) -> bool:
        """Whether the caller records a graph already."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Runs on a side stream, as a capture does."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """(the graph of a run, what the run returned, which each replay overwrites)."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        mode = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), mode:
            result = run()
        return graph, result

    def begin(self) -> None:
        """Waits, on the current stream, for the replay before this one, which may have run on another."""
        if self.last is not None:
            torch.cuda.current_stream(self.device).wait_event(self.last)

    def end(self) -> None:
        """Notes that a replay and the copies of its results are under way."""
        self.last = torch.cuda.current_stream(self.device).record_event()


def capture_for(op: str, device: torch.device) -> CudaCapture:
    """What captures graphs on a device.

    Raises:
        ValueError: for a device that has none.
    """
    if device.type != "cuda":
        raise ValueError(
            f"{op}(): expected `cuda_graph` to be False for a plan on {device.type}, got True. "
            "Hint: CUDA graphs need the example, and the model, on a CUDA device."
        )
    return CudaCapture(device)


class PlanGraphs:
    """The graphs of a planned network, by program and shapes of inputs.

    Args:
        capture: what captures them.
        memory_format: of the plan.
        most: graphs that are kept.
    """

    def __init__(self, capture: CudaCapture, memory_format: torch.memory_format, most: int = MOST_GRAPHS) -> None:
        self.capture, self.memory_format, self.most = capture, memory_format, most
        self.graphs: OrderedDict[tuple[Any, ...], tuple[Program, list[Any], Any, Any]] = OrderedDict()
        # Copies of inputs, the replay and copies of results belong together.
        self.lock = threading.Lock()

    def clear(self) -> None:
        """Drops all graphs."""
        with self.lock:
            self.graphs.clear()

    def run(self, program: Program, inputs: tuple[Any, ...]) -> Any:
        """What the program returns, in memory of the caller's own.

        Raises:
            RuntimeError: if the program does what a graph cannot record.
        """
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.capture.capturing() or any(x.device != self.capture.device for x in tensors):
            return program.run(inputs)
        # What is no tensor is as in the example. The program is held, so that no other one gets its identity.
        key = (id(program), *((x.shape, x.dtype) for x in tensors))
        with self.lock:
            if key not in self.graphs:
                self.graphs[key] = self._captured(program, leaves, structure)
                while len(self.graphs) > self.most:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            _, static, graph, result = self.graphs[key]
            self.capture.begin()
            for own, x in zip(static, tensors, strict=True):
                own.copy_(x)
            graph.replay()
            copied = tree_map_only(Tensor, torch.clone, result)
            self.capture.end()
            return copied

    def _captured(self, program: Program, leaves: list[Any], structure: Any) -> tuple[Program, list[Any], Any, Any]:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            static = [self._own(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(static, structure)
        # What autocast keeps of a weight goes at the end of its context, and a graph would read it afterwards.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self.capture.warm_up(lambda: program.run(inputs))
            graph, result = self._recorded(lambda: program.run(inputs))
        finally:
            torch.set_autocast_cache_enabled(cached)
        return program, [leaf for leaf in static if isinstance(leaf, Tensor)], graph, result

    def _recorded(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        try:
            return self.capture.capture(run)
        except Exception as error:
            raise RuntimeError(
                "PlannedNetwork(): expected a network whose steps a CUDA graph can record, as with `cuda_graph=True`, "
                f"got {type(error).__name__} while recording: {error}. Hint: steps that wait for the device, such as "
                ".item(), can't be recorded; plan with cuda_graph=False."
            ) from error

    def _own(self, x: Tensor) -> Tensor:
        images = x.dim() == 4 and x.is_floating_point()
        # clone() of a tensor that overlaps itself, or with gaps, is dense.
        return x.clone(memory_format=self.memory_format if images else torch.contiguous_format)
