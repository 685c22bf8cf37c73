"""Mixed batches of planned networks: each domain's samples run through its plan, and the results are joined."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bap_kernels.nn.mixed import MixedBatch, selected_samples
from bap_kernels.plan.compare import largest_error, tolerance_of
from bap_kernels.plan.program import Program

__all__ = ["MixedPlans"]

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
_HINT = "Hint: call the model itself, which takes mixed batches whatever it returns, or plans of one domain each."


class MixedPlans:
    """The plans of the domains that occur in a batch.

    Which axis of a result counts the samples is not guessed from its size: at its first mixed batch each plan runs once
    on three samples and once on two of them; the axis that grows is taken. Networks whose results for a sample depend
    on the others of the batch are found by the same two runs, and refused.

    Args:
        batch: the batch.
        domains: the names of its domains.
        programs: the plan of each of them.
        example: the inputs that the plans were made with.
    """

    def __init__(
        self, batch: MixedBatch, domains: list[str], programs: Sequence[Program], example: tuple[Any, ...]
    ) -> None:
        self.batch = batch
        self.domains = domains
        self.programs = list(programs)
        self.example = example

    def run(self, inputs: tuple[Any, ...]) -> Any:
        """The results of all samples, in the caller's order.

        Raises:
            ValueError: for inputs without the batch's samples, and for results whose other axes differ.
            NotImplementedError: for results of which it cannot be told what belongs to which sample.
        """
        sampled = self._sampled(inputs)
        if self.batch.size == 0:
            return self.programs[0].run(inputs)
        for program in self.programs:
            if program.probe is None:
                probe = _three_samples(inputs, sampled)
                three = program.run(probe)
                two = program.run(_with_samples(probe, sampled, itemgetter(slice(2))))
                _check_samples(two, three, "output")
                program.probe = _without_data(two, three)
        probes = [program.probe for program in self.programs if program.probe is not None]
        if len(self.programs) == 1:
            results = [self.programs[0].run(inputs)]
        else:
            # Sorted once for all steps of a plan; each domain's samples are then a view.
            inputs = _with_samples(inputs, sampled, self.batch.sorted)
            ends = list(accumulate(self.batch.counts))
            results = [
                program.run(_with_samples(inputs, sampled, itemgetter(slice(end - count, end))))
                for program, count, end in zip(self.programs, self.batch.counts, ends, strict=True)
            ]
        return self._joined(results, probes, "output")

    def _sampled(self, inputs: tuple[Any, ...]) -> set[int]:
        """Which of the inputs' tensors, in order, hold the samples."""
        N = self.batch.size
        tensors, examples = _tensors(inputs), _tensors(self.example)
        usual = next((tensor.shape[0] for tensor in examples if tensor.dim() > 0), None)
        sampled: set[int] = set()
        for number, (tensor, example) in enumerate(zip(tensors, examples, strict=True)):
            if tensor.dim() == 0 or example.dim() == 0 or example.shape[0] != usual:
                continue
            if tensor.shape[0] == N:
                sampled.add(number)
            elif not sampled or tensor.shape[0] != example.shape[0]:
                raise ValueError(
                    f"PlannedNetwork(): expected an input with the {N} samples of the mixed batch, got shape "
                    f"{tuple(tensor.shape)}. Hint: set_domain(planned, numbers) takes one number for each sample of "
                    "the next batch."
                )
        if not sampled:
            raise ValueError(f"PlannedNetwork(): expected an input with the {N} samples of the mixed batch, got none.")
        return sampled

    def _joined(self, results: Sequence[Any], probes: Sequence[tuple[Any, Any]], path: str) -> Any:
        first = results[0]
        every = _every(results, probes)
        if any(type(result) is not type(first) for result in every):
            raise _refusal(path, "values of different types", sorted({type(result).__name__ for result in every}))
        if isinstance(first, Tensor):
            return self._joined_tensors(results, probes, path)
        if isinstance(first, _PLAIN):
            if any(result != first for result in every):
                raise _refusal(path, "a value that varies with the samples", first)
            return first
        if type(first) in (dict, OrderedDict):
            if any(list(result) != list(first) for result in every):
                raise _refusal(path, "keys that vary with the samples", list(first))
            parts = ((key, self._joined(*_entries(results, probes, key), f"{path}[{key!r}]")) for key in first)
            return type(first)(parts)
        if type(first) in (list, tuple) or hasattr(first, "_fields"):
            return self._joined_sequences(results, probes, path)
        raise _refusal(path, "a value of a type that is not known,", type(first).__name__)

    def _joined_sequences(self, results: Sequence[Any], probes: Sequence[tuple[Any, Any]], path: str) -> Any:
        first = results[0]
        lengths = [(len(two), len(three)) for two, three in probes]
        if all(pair == (2, 3) for pair in lengths) and [len(result) for result in results] == self.batch.counts:
            # One entry for each sample.
            entries = [entry for result in results for entry in result]
            if self.batch.inverse is not None:
                entries = [entries[index] for index in self.batch.inverse.tolist()]
            return type(first)(entries)
        if any(len(result) != len(first) for result in _every(results, probes)):
            raise _refusal(path, "lengths that vary with the samples,", [len(result) for result in results])
        values = [self._joined(*_entries(results, probes, i), f"{path}[{i}]") for i in range(len(first))]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)

    def _joined_tensors(self, results: Sequence[Any], probes: Sequence[tuple[Any, Any]], path: str) -> Tensor:
        first: Tensor = results[0]
        if all(result is first for result in _every(results, probes)):
            # A parameter or a constant of the model.
            return first
        axes = {_axis_of_samples(two, three) for two, three in probes}
        axis = axes.pop()
        if (
            axes
            or axis is None
            or any(result.shape[axis] != n for result, n in zip(results, self.batch.counts, strict=True))
        ):
            shapes = [tuple(result.shape) for result in probes[0]]
            raise _refusal(path, "no axis that counts the samples: of two and three, shapes", shapes)
        others = {(*result.shape[:axis], *result.shape[axis + 1 :]) for result in results}
        if len(others) > 1:
            if first.dim() != 2 or axis != 0 or not first.is_floating_point():
                raise ValueError(
                    f"PlannedNetwork(): expected all domains of a mixed batch to give results of one shape, got "
                    f"{sorted(others)} at {path!r}. {_HINT}"
                )
            most = max(result.shape[1] for result in results)
            # No probability and never the largest: softmax and argmax are each domain's own.
            results = [F.pad(result, (0, most - result.shape[1]), value=-torch.inf) for result in results]
        whole = torch.cat(list(results), axis)
        if self.batch.inverse is None or len(results) == 1:
            return whole
        if axis == 0:
            return self.batch.restored(whole)
        return whole.index_select(axis, self.batch.on("inverse", whole.device))


def _three_samples(inputs: tuple[Any, ...], sampled: set[int]) -> tuple[Any, ...]:
    """Three samples like the first one; numbers that are no integers differ between them."""
    generator = torch.Generator().manual_seed(0)

    def varied(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (3,) or not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + noise * (tensor.abs().mean() + 0.1)

    numbers = iter(range(len(_tensors(inputs))))
    repeated = _with_samples(
        inputs,
        sampled,
        lambda tensor: selected_samples(tensor, torch.zeros(3, dtype=torch.int64, device=tensor.device)),
    )
    return tree_map_only(Tensor, lambda tensor: varied(tensor) if next(numbers) in sampled else tensor, repeated)


def _check_samples(two: Any, three: Any, path: str) -> None:
    """Raises where the first two of three samples get other results than the same two alone."""
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        axis = _axis_of_samples(two, three)
        if axis is not None and not _alike(two, three.narrow(axis, 0, 2)):
            raise _refusal(path, "results that depend on the other samples of the batch: shapes", tuple(three.shape))
    elif isinstance(two, dict) and isinstance(three, dict):
        for key in two.keys() & three.keys():
            _check_samples(two[key], three[key], f"{path}[{key!r}]")
    elif isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)):
        for index, (of_two, of_three) in enumerate(zip(two, three, strict=False)):
            if isinstance(of_two, Tensor) and isinstance(of_three, Tensor) and (len(two), len(three)) == (2, 3):
                if not _alike(of_two, of_three):
                    raise _refusal(path, "results that depend on the other samples of the batch: entry", index)
            else:
                _check_samples(of_two, of_three, f"{path}[{index}]")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding, which may turn single decisions."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return a.numel() == 0 or (a != b).double().mean().item() <= 0.01
    return largest_error(a, b)[0] <= 10 * tolerance_of(a.dtype)


def _without_data(two: Any, three: Any) -> tuple[Any, Any]:
    """Two results with tensors of the same shapes in place of theirs; a tensor that stands in both stays."""
    same = {id(leaf) for leaf in tree_leaves(two)} & {id(leaf) for leaf in tree_leaves(three)}

    def shape_of(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in same else torch.empty(tensor.shape, device="meta")

    return tree_map_only(Tensor, shape_of, two), tree_map_only(Tensor, shape_of, three)


def _axis_of_samples(two: Tensor, three: Tensor) -> int | None:
    if two.dim() != three.dim():
        return None
    grown = [axis for axis in range(two.dim()) if two.shape[axis] != three.shape[axis]]
    if len(grown) != 1 or (two.shape[grown[0]], three.shape[grown[0]]) != (2, 3):
        return None
    return grown[0]


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among inputs, also in dictionaries."""
    tensors: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            tensors += _tensors(value)
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            if not all(isinstance(item, _PLAIN) for item in value):
                raise NotImplementedError(
                    "PlannedNetwork(): expected the inputs of a mixed batch to be tensors or dictionaries of tensors, "
                    f"got a {type(value).__name__} of {type(value[0]).__name__}. {_HINT}"
                )
        elif not isinstance(value, _PLAIN):
            raise NotImplementedError(
                "PlannedNetwork(): expected the inputs of a mixed batch to be tensors or dictionaries of tensors, got "
                f"{type(value).__name__}. {_HINT}"
            )
    return tensors


def _with_samples(inputs: tuple[Any, ...], sampled: set[int], select: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The inputs with the samples that ``select`` takes of each tensor, in the order of :func:`_tensors`."""
    number = -1

    def selected(value: Any) -> Any:
        nonlocal number
        if isinstance(value, dict):
            return {key: selected(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        number += 1
        return select(value) if number in sampled else value

    return tuple(selected(value) for value in inputs)


def _every(results: Sequence[Any], probes: Sequence[tuple[Any, Any]]) -> list[Any]:
    return [*results, *(part for pair in probes for part in pair)]


def _entries(
    results: Sequence[Any], probes: Sequence[tuple[Any, Any]], key: Any
) -> tuple[list[Any], list[tuple[Any, Any]]]:
    return [result[key] for result in results], [(two[key], three[key]) for two, three in probes]


def _refusal(path: str, what: str, got: object) -> NotImplementedError:
    return NotImplementedError(
        f"PlannedNetwork(): expected results of a mixed batch that can be joined, got {what} {got} at {path!r}. {_HINT}"
    )
