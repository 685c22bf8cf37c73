"""The package's op under each of its backends, as layers in eval mode call it: packed weights are cached."""

import importlib
from typing import Any

import torch

from benches.baselines import Variant
from benches.problem import Problem, normal_tensors

BACKENDS = ("native", "auto", "aten", "triton", "cuda")
DEFAULT_BACKENDS = {"cpu": ("native", "auto", "aten"), "cuda": ("auto", "cuda", "triton", "aten")}


class PackageMissingError(ImportError):
    """The package that is to be measured cannot be imported."""


def package() -> Any:
    """Import the package.

    Raises:
        PackageMissingError: If it cannot be imported, with the reason and what to do.
    """
    try:
        return importlib.import_module("bap_kernels")
    except ImportError as error:
        raise PackageMissingError(
            f"benches: bap_kernels cannot be imported: {error}. "
            "Hint: `--variants dense,masked,naive,best,oracle` measures PyTorch alone."
        ) from error


def library() -> Any:
    """Return the compiled library: build facts, choices, caches."""
    package()
    return importlib.import_module("bap_kernels._load")._C


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot run convolutions of a dtype on this machine; None if it can."""
    if reason := library().why_not(backend):
        return str(reason)
    x = torch.ones(1, 64, 8, 8, dtype=dtype, device=device)
    index = torch.arange(32, dtype=torch.int32, device=device)
    before = library().get_backend()
    try:
        package().use_backend(backend)
        package().gathered_conv2d(x, torch.ones(64, 64, 3, 3, dtype=dtype, device=device), None, index)
    except NotImplementedError as error:
        return str(error)
    finally:
        package().use_backend(before)
    return None


def fresh_choices() -> None:
    """Let ``auto`` choose from measurements of this run alone, and leave the user's file of choices as it is."""
    compiled = library()
    compiled.set_choice_file("")
    compiled.clear_choices()


def forget_packed() -> None:
    """Drop the packed weights of the last cell."""
    library().clear_packed_cache()


def prepare(backend: str, problem: Problem) -> Variant:
    """Prepare the op under one backend; its first call packs the weight, and under ``auto`` measures and chooses."""
    use_backend = package().use_backend
    op = torch.ops.bap_kernels.gathered_conv2d.default
    stride, padding = problem.conv_args
    in_index, out_index = problem.in_index, problem.out_index
    with normal_tensors():
        # Its own: packed weights that another backend has just read would be found in the cache.
        weight = problem.weight.clone()
    strides, paddings, dilations = [stride] * 2, [padding] * 4, [1, 1]
    variant = Variant(
        lambda x: op(x, weight, None, in_index, out_index, strides, paddings, dilations, 1, True),
        problem.inputs,
        enter=lambda: use_backend(backend),
        length=problem.sliced_weight[0].numel(),
    )
    variant.enter()
    variant.run(problem.inputs[0])
    if backend == "auto" and problem.weight.device.type == "cpu":
        facts = library().explain(problem.inputs[0], weight, None, in_index, out_index, strides, paddings, dilations, 1)
        variant.candidate = str(facts["backend"])
    return variant


def packed_bytes() -> int:
    """Bytes that packed weights hold now."""
    return int(library().packed_cache_info()["bytes"])
