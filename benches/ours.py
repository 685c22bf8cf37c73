"""The package's op under each backend, called as layers in eval mode call it: packed weights are cached."""

import importlib
from typing import Any

import torch

from benches.baselines import Variant
from benches.problem import Problem, normal_tensors

BACKENDS = ("native", "auto", "aten", "triton", "cuda")
DEFAULT_BACKENDS = {"cpu": ("native", "auto", "aten"), "cuda": ("auto", "cuda", "triton", "aten")}


class PackageMissingError(ImportError):
    """The package cannot be imported."""


def package() -> Any:
    """Import the package.

    Raises:
        PackageMissingError: If it cannot be imported.
    """
    try:
        return importlib.import_module("bap_kernels")
    except ImportError as error:
        raise PackageMissingError(
            f"benches: expected bap_kernels to be importable, got: {error}. "
            "Hint: `--variants dense,masked,naive,gather_conv,oracle` measures PyTorch alone."
        ) from error


def library() -> Any:
    """Return the compiled library, for build information, choices and caches."""
    package()
    return importlib.import_module("bap_kernels._load")._C


def unsupported_reason(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run convolutions of a dtype on this machine; None if it can."""
    if reason := library().unsupported_reason(backend):
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


def reset_choices() -> None:
    """Drop measured choices: ``auto`` measures anew, and neither reads nor writes the user's choice file."""
    compiled = library()
    compiled.set_choice_file("")
    compiled.clear_choices()


def clear_packed() -> None:
    """Drop all packed weights."""
    library().clear_packed_cache()


def prepare(backend: str, problem: Problem) -> Variant:
    """Prepare the op under one backend: call it once, which packs the weight and, under ``auto``, measures."""
    use_backend = package().use_backend
    op = torch.ops.bap_kernels.gathered_conv2d.default
    stride, padding = problem.conv_args
    in_index, out_index = problem.in_index, problem.out_index
    with normal_tensors():
        # A copy, so that no packed weight of another backend is already in the CPU's cache.
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
        call = problem.inputs[0], weight, None, in_index, out_index, strides, paddings, dilations, 1
        variant.candidate = str(library().explain(*call)["backend"])
    return variant


def packed_bytes() -> int:
    """Bytes of all packed weights."""
    return int(library().packed_cache_info()["bytes"])
