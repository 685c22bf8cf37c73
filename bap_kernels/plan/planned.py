"""The planned network: what :func:`bap_kernels.plan` returns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bap_kernels._arguments import check_module
from bap_kernels._load import _C
from bap_kernels.flow.graph import first_reasons
from bap_kernels.flow.liveness import Liveness
from bap_kernels.layer_kinds import PlannedModel
from bap_kernels.nn.domains import domain_names
from bap_kernels.nn.leaf import Proxy, as_one_step
from bap_kernels.nn.mixed import MixedBatch, mixed_numbers
from bap_kernels.plan import graphs
from bap_kernels.plan.compare import PlanDiffersError, compared
from bap_kernels.plan.held import NetworkMemory, layer_uses, network_memory, step_uses
from bap_kernels.plan.inputs import applied, check_inputs, inputs_of_shapes, refuse_other_dtypes, refuse_without_values
from bap_kernels.plan.layout import Layout
from bap_kernels.plan.lowering import lower, vector_bytes
from bap_kernels.plan.mixed import MixedPlans
from bap_kernels.plan.program import Program
from bap_kernels.plan.recording import Recording
from bap_kernels.plan.trace import call_copied, same_widths, trace
from bap_kernels.plan.watch import Watch
from bap_kernels.settings import PACKED_MEMORY

__all__ = ["PlannedNetwork", "plan"]

# Which dtype autocast gives on the device of a plan; None outside of it.
_Cast = torch.dtype | None


class PlannedNetwork(PlannedModel):
    """A network lowered for one domain at a time: compact activations, no dead filters, everything fused.

    Made by :func:`bap_kernels.plan`. The weights are the model's own parameters, read at every call. Batch norms,
    filters of grouped convolutions and lists are copied when the plan is made; a call that finds that the model's have
    changed since plans again first, for which the model must be in eval mode. After a change of the model's modules or
    code call :meth:`remake`, and on a GPU also after a write to a batch norm that neither changes its version nor is a
    step of an optimiser. It serves inference: no gradient flows through it, and it refuses training mode. Copies,
    pickles and moves to another device or dtype plan again.

    Attributes:
        model: the network that was planned.
        domain: the active domain; :func:`bap_kernels.set_domain` changes it, and takes numbers for a mixed batch too.
        max_error: the largest difference from the masked dense network on the example, as a share of its largest
            number; None if it was not checked.
        lowered: names of the convolutions that the plan runs on the channels that are read.
        not_lowered: {convolution: reason} of those that it runs as they are, on all channels.
    """

    max_error: float | None
    lowered: tuple[str, ...]
    not_lowered: dict[str, str]

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        domain: str | None,
        check: bool,
        tolerance: float | None,
        memory_format: torch.memory_format | None,
        cuda_graph: bool = False,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.domain = domain
        self._example = example
        self._options = (check, tolerance, memory_format, cuda_graph, memory)
        self._programs: dict[tuple[str | None, _Cast], tuple[Program, float | None]] = {}
        self._recordings: dict[_Cast, Recording] = {}
        # While a mixed batch is set.
        self._mixed: dict[_Cast, MixedPlans] | None = None
        self.training = False
        self._device = next((x.device for x in example if isinstance(x, Tensor)), torch.device("cpu"))
        self._graphs = self._new_graphs()
        self._cast = self._cast_now()
        self._remaking = threading.Lock()
        # Before planning: a change meanwhile is then noticed at the first call.
        self._watch = self._new_watch()
        self._program, self.max_error = self._program_of(domain)

    def _new_watch(self) -> Watch:
        # A graph reads packed weights, and wide tensors have weights of their own.
        return Watch(self.model, self._graphs is not None or vector_bytes(self._device) > 0)

    def _new_graphs(self) -> graphs.PlanGraphs | None:
        if not self._options[3]:
            return None
        return graphs.PlanGraphs(graphs.capture_for("plan", self._device), self._format())

    @contextlib.contextmanager
    def _packed_memory(self) -> Iterator[None]:
        """Sets the calling thread's for a run of the plan."""
        before = _C.get_packed_memory()
        if self._options[4] != "auto":
            _C.set_packed_memory(self._options[4])
        try:
            yield
        finally:
            _C.set_packed_memory(before)

    def _format(self) -> torch.memory_format:
        if self._options[2] is not None:
            return self._options[2]
        first = next((x for x in self._example if isinstance(x, Tensor)), torch.empty(0))
        nhwc = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if nhwc and not first.is_contiguous() else torch.contiguous_format

    def _cast_now(self) -> _Cast:
        kind = self._device.type
        if kind == "meta":
            return None
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _program_of(self, domain: str | None) -> tuple[Program, float | None]:
        key = domain, self._cast_now()
        if key not in self._programs:
            self._programs[key] = self._make(domain)
        return self._programs[key]

    def _make(self, domain: str | None) -> tuple[Program, float | None]:
        refuse_without_values(self.model, self._example)
        check, cast = self._options[0], self._cast_now()
        # Without a check, one recording serves all domains.
        recording = None if check or not same_widths(self.model) else self._recordings.get(cast)
        graph = trace("plan", self.model, self._example, domain, recording=recording)
        self._recordings[cast] = graph.recording
        self.lowered, self.not_lowered = graph.lowered, graph.not_lowered
        if not self._programs:
            graph.warn_if_nothing("plan")
        device = self._device
        program = lower(graph, Layout(graph, Liveness(graph)), self._format(), device, vector_bytes(device))
        if not check:
            return program, None
        with self._packed_memory():
            # The first run may count bytes step by step; what is compared is the way that calls take.
            for _ in range(1 + program.counts_first):
                result = call_copied(lambda *inputs: program.run(inputs), self._example, graph.draws)
        return program, compared(result, graph.expected, self._options[1], cast, self.model, self._example)

    def prepare_domain(self, name: str | Tensor | None, domains: Sequence[str] | None = None) -> Callable[[], None]:
        """Makes the plans of a domain or of a mixed batch, which are kept, and returns what activates them."""
        cast = self._cast_now()
        if isinstance(name, Tensor) or (name, cast) not in self._programs:
            if isinstance(name, str) and name not in (known_names := domain_names(self.model)):
                raise ValueError(f"set_domain(): expected `name` to be one of {known_names}, got {name!r}.")
            # All plans that are kept are of one state of the model.
            self._renew()
        if isinstance(name, Tensor):
            known = list(domain_names(self.model) if domains is None else domains)
            batch = MixedBatch(mixed_numbers(name, known))
            mixed = {cast: self._plans_of(batch, [known[number] for number in batch.numbers])}
            return lambda: setattr(self, "_mixed", mixed)
        program, error = self._program_of(name)

        def activate() -> None:
            self._program, self.max_error, self._cast = program, error, cast
            self.domain = name
            self._mixed = None

        return activate

    def _plans_of(self, batch: MixedBatch, domains: list[str]) -> MixedPlans:
        return MixedPlans(batch, domains, [self._program_of(domain)[0] for domain in domains], self._example)

    def remake(self) -> PlannedNetwork:
        """Plans again from the model as it is now, and drops the plans of other domains and batches."""
        self._graphs = self._new_graphs()
        watch = self._new_watch()
        self._programs.clear()
        self._recordings.clear()
        self._mixed = None
        self._program, self.max_error = self._program_of(self.domain)
        self._cast = self._cast_now()
        self._watch = watch
        return self

    def _renew(self) -> None:
        """Makes the active plan, and that of a mixed batch, again where the model has changed."""
        with self._remaking:
            if not self._watch.changed():
                return
            mixed = self._mixed
            self.remake()
            if mixed is not None:
                plans = next(iter(mixed.values()))
                self._mixed = {self._cast: self._plans_of(plans.batch, plans.domains)}

    def forward(self, *inputs: Any) -> Any:
        """Runs the active domain's plan.

        Args:
            inputs: as the model's, with any batch size; the size of images may differ from the example's where the
                model itself is written for any. What is no tensor (flags, numbers, None) is what it was in the example.

        Raises:
            ValueError: for another number of inputs, for inputs of another width, and for other flags.
            NotImplementedError: for an input that needs a gradient.
        """
        # torch.fx hands over all arguments of a model that it records as one placeholder.
        if isinstance(inputs, Proxy) or (inputs and isinstance(inputs[0], Proxy)):
            return as_one_step(self, *((inputs,) if isinstance(inputs, Proxy) else inputs))
        if not torch.is_grad_enabled():
            return self._run_kept(inputs)
        if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            raise NotImplementedError(
                "PlannedNetwork(): expected inputs that need no gradient, got one with requires_grad=True. "
                "Hint: a plan serves inference; train the model itself."
            )
        with torch.no_grad():
            return self._run_kept(inputs)

    def _run_kept(self, inputs: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():
            return self._run(inputs)
        try:
            if self._options[4] == "auto":
                return self._run(inputs)
            with self._packed_memory():
                return self._run(inputs)
        except TypeError as error:
            refuse_other_dtypes(inputs, self._example, error)
            raise

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        check_inputs(inputs, self._example)
        if not torch.compiler.is_compiling() and self._watch.changed():
            self._renew()
        # Under another autocast than when the domain was set, plans are made at first use and kept.
        cast, mixed = self._cast_now(), self._mixed
        if mixed is None:
            program = self._program if cast is self._cast else self._program_of(self.domain)[0]
            if self._graphs is not None and not torch.compiler.is_compiling():
                return self._graphs.run(program, inputs)
            return program.run(inputs)
        if cast not in mixed:
            plans = next(iter(mixed.values()))
            mixed[cast] = self._plans_of(plans.batch, plans.domains)
        return mixed[cast].run(inputs)

    def peak_bytes(self, *shapes: Sequence[int]) -> int:
        """Most bytes of activations held at once, found without running: the inputs and the results of steps.

        Weights, packed weights and a kernel's own working memory are not counted. On CPUs large batches are taken in
        chunks, and hold less.

        Args:
            shapes: the inputs' shapes; none: the example's.

        Raises:
            TypeError: for numbers in place of shapes.
            ValueError: for another number of shapes, or another width, than the example's.

        Examples:
            >>> import torch, bap_kernels as bk
            >>> model = bk.swap_(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1), torch.nn.Conv2d(16, 8, 1))).eval()
            >>> bk.plan(model, torch.randn(1, 8, 5, 5)).peak_bytes()  # (8 + 16) and then (16 + 8) channels of 4 bytes
            2400
        """
        example = inputs_of_shapes(shapes, self._example) if shapes else self._example
        with torch.no_grad():
            return self._program.peak_bytes(example)

    def memory(self) -> NetworkMemory:
        """Counts the bytes that the model and its plans hold now, for every domain that was planned."""
        plans = [(domain, program.steps) for (domain, _), (program, _) in self._programs.items()]
        uses = [use for domain, steps in plans for use in step_uses(domain, steps)]
        return network_memory(self.model, [*uses, *layer_uses(self.model)], plans, self.peak_bytes())

    def train(self, mode: bool = True) -> PlannedNetwork:
        """Refuses training mode.

        Raises:
            ValueError: for ``mode=True``.
        """
        if mode:
            raise ValueError(
                "PlannedNetwork.train(): expected `mode` to be False, got True. "
                "Hint: train the model itself, then plan."
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlannedNetwork:
        super()._apply(fn, recurse)
        self._example = tree_map_only(Tensor, lambda x: applied(fn, x), self._example)
        self._device = next((x.device for x in self._example if isinstance(x, Tensor)), self._device)
        # After to_empty() there is nothing to compare. The watch is still that of the plan before: the next call plans.
        with contextlib.suppress(PlanDiffersError):
            self.remake()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return PlannedNetwork, (self.model, self._example, self.domain, *self._options)

    def __repr__(self) -> str:
        error = "not checked" if self.max_error is None else f"largest error {self.max_error:.1e}"
        domain = "all channels" if self.domain is None else f"domain {self.domain!r}"
        steps = len(self._program.steps)
        text = f"PlannedNetwork({domain}, {steps} steps, {error})\n{self._program.table()}"
        if self.not_lowered:
            count = len(self.lowered) + len(self.not_lowered)
            text += f"\nnot lowered ({len(self.not_lowered)} of {count}): {first_reasons(self.not_lowered, 10)}"
        return text


def plan(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    domain: str | None = None,
    *,
    check: bool = True,
    tolerance: float | None = None,
    memory_format: torch.memory_format | None = None,
    cuda_graph: bool = False,
    memory: str = "auto",
) -> PlannedNetwork:
    """Lowers a whole network for one domain.

    The model is recorded while it runs on the example. Its layers' lists decide which channels of every tensor are
    read; the plan computes and stores only these, each tensor in the order in which its consumer reads it. Batch norms,
    ReLUs, ReLU6 and sums are fused into the convolution before them, or into the one after them in networks that
    normalise first. Operations without a rule are run as they are, on all channels; printing the plan names the
    convolutions among them. Grouped convolutions compute whole groups. Filters of depthwise and grouped convolutions,
    and weights that a layer computes (standardised, parametrized), are copied when the plan is made. On a GPU compact
    tensors are rounded up to whole vectors of 16 bytes, with zeros in the weights that write and read the channels
    added; these weights are then copied, too. The result equals the masked dense network, in which each layer convolves
    x times the mask of its in-list, up to rounding; this is checked on the example.

    Args:
        model: a network in eval mode, swapped and with lists, or any other.
        example_input: what to call it with: a tensor, or a tuple of all arguments. Kept for plans of further domains.
        domain: whose lists, as for :func:`bap_kernels.set_domain`, which also switches a planned network; None keeps
            all channels.
        check: compare with the masked dense network on the example, in every domain that is planned. It runs both
            networks; without it, further domains are planned without running anything.
        tolerance: the largest difference that passes, as a share of the largest number in the result; None: 1e-8, 1e-3,
            0.1, 0.02 for float64, float32, bfloat16, float16.
        memory_format: of all activations, ``torch.channels_last`` or ``torch.contiguous_format``; None: the example's.
        cuda_graph: record the plan's launches in a CUDA graph, one for each domain, autocast dtype and shape of inputs,
            at the first call with it, and replay it afterwards. Inputs are copied into the graph's own, and results
            out of it, so that they stay as they are. All graphs of a planned network share their memory, and run one
            after the other; the 32 last used are kept. After a change of weights or lists, which is noticed as without
            graphs, they are recorded again. Mixed batches, and calls while the caller records a graph, run without.
        memory: how much memory packed weights of several domains may take. ``"fast"``: every domain has a packed copy
            of the slices that it lists. ``"shared"``: on CPUs all domains share one packed copy of a float32 weight
            whose list names input channels only, of which each call copies the listed part; of any other weight with
            lists the copy of the domain that ran last is kept, so that the first call after a switch of domains packs
            again. ``"auto"``: one copy for lists of input channels alone where a call computes so many pixels that
            copying its part takes little of the time; other copies as with ``"fast"``. The environment variable
            ``BAP_KERNELS_PACKED_MEMORY`` sets another meaning of ``"auto"``, also for layers outside of plans, and for
            plans under ``torch.compile``.

    Returns:
        A :class:`PlannedNetwork`. It shares the model's parameters, and follows changes of its batch norms. A warning
        names the first obstacles if no convolution could be lowered.

    Raises:
        ValueError: if the model is in training mode, does not know the domain, cannot be recorded, or does not take the
            example; for ``cuda_graph=True`` on another device than a CUDA GPU; for another ``memory``.
        RuntimeError: if the plan's result differs from the masked dense network by more than ``tolerance``, which NaN
            and infinities in weights or the example may lead to; at a call, if the network does what a CUDA graph
            can't record.

    Examples:
        >>> import torch, bap_kernels as bk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
        >>> bk.attach_(bk.swap_(model), bk.ChannelTable({"birds": {"3": bk.ChannelLists([1, 4, 5])}}))[0].training
        False
        >>> planned = bk.plan(model, torch.randn(1, 3, 8, 8), "birds", check=False)
        >>> planned
        PlannedNetwork(domain 'birds', 3 steps, not checked)
        step  kind            layer    kept
        0     input           input_1  3/3
        1     conv+norm+relu  0        3/8   reads 3/3
        2     conv            3        8/8   reads 3/8
    """
    check_module("plan", model)
    if not (tolerance is None or isinstance(tolerance, Real)):
        raise TypeError(f"plan(): expected `tolerance` to be a number or None, got {tolerance!r}.")
    formats = (None, torch.channels_last, torch.contiguous_format)
    if memory_format not in formats:
        raise ValueError(f"plan(): expected `memory_format` to be one of {formats}, got {memory_format!r}.")
    if memory not in PACKED_MEMORY:
        raise ValueError(f"plan(): expected `memory` to be one of {', '.join(PACKED_MEMORY)}, got {memory!r}.")
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    return PlannedNetwork(model, example, domain, check, tolerance, memory_format, cuda_graph, memory)
