"""Runs a convolution through PyTorch or this package, and compares it with float64 loops over taps in NumPy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.convolution_cases import DTYPES, Case, Epilogue, draw_epilogue, draw_lists, lay_out

BACKENDS = ("aten", "auto", "native")
IMPLEMENTATIONS = ("torch", "packed", *BACKENDS)
# Relative to the largest value of a result; sums of integers are exact, so this is rounding alone.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}


def reference(case: Case, x: Any, w: Any, b: Any, dy: Any) -> dict[str, Any]:
    """Return the result (``forward``) or the gradients that the case asks for, by name, of float64 arrays."""
    (oH, oW), (sH, sW), (dH, dW), (pH, pW) = case.out, case.stride, case.dilation, case.padding
    N, G, (H, W) = case.batch, case.groups, case.size
    x = np.pad(x, ((0, 0), (0, 0), (pH, pH), (pW, pW)))
    x = x.reshape(N, G, -1, *x.shape[2:])
    w, dy = w.reshape(G, -1, *w.shape[1:]), dy.reshape(N, G, -1, oH, oW)
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for i, j in np.ndindex(*case.kernel):
        pixels = (..., slice(i * dH, i * dH + (oH - 1) * sH + 1, sH), slice(j * dW, j * dW + (oW - 1) * sW + 1, sW))
        if case.direction == "forward":
            y += np.einsum("ngchw,gkc->ngkhw", x[pixels], w[..., i, j])
        else:
            dx[pixels] += np.einsum("ngkhw,gkc->ngchw", dy, w[..., i, j])
            dw[..., i, j] = np.einsum("ngkhw,ngchw->gkc", dy, x[pixels])
    if case.direction == "forward":
        return {"forward": y.reshape(N, -1, oH, oW) + (0 if b is None else b[:, None, None])}
    dx = dx.reshape(N, -1, *dx.shape[3:])[:, :, pH : pH + H, pW : pW + W]
    return {"input": dx, "weight": dw.reshape(case.c_out, -1, *case.kernel)}


def run_case(case: Case, implementation: str) -> str | None:
    """Run a case; return what is wrong with its results, or None."""
    if implementation in BACKENDS and case.groups > 1 and not case.groups == case.c_in == case.c_out:
        return None  # our ops are dense or depthwise
    rng, generator = random.Random(case.number), torch.Generator().manual_seed(case.number)
    torch.set_num_threads(case.threads)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(DTYPES[case.dtype])

    x = lay_out(integers(case.batch, case.c_in, *case.size), case.layout, rng)
    w = lay_out(integers(case.c_out, case.c_in // case.groups, *case.kernel), case.weight_layout, rng)
    b = integers(case.c_out) if case.bias else None
    dy = lay_out(integers(case.batch, case.c_out, *case.out), case.grad_layout, rng)
    exact_x, exact_w, exact_dy = (t.double().numpy() for t in (x, w, dy))
    exact_b = None if b is None else b.double().numpy()
    if implementation not in BACKENDS:
        expected = reference(case, exact_x, exact_w, exact_b, exact_dy)
        results = run_pytorch(case, x, w, b, dy, packed=implementation == "packed")
    else:
        in_list, out_list = draw_lists(case, rng)
        read, kept = (range(n) if i is None else i for i, n in ((in_list, case.c_in), (out_list, case.c_out)))
        off = np.setdiff1d(range(case.c_in), read)
        exact_x[:, off] = 0
        exact_dy[:, np.setdiff1d(range(case.c_out), kept)] = 0
        if case.layout != "expanded":
            x[:, off] = float("nan")
        dy = lay_out(dy[:, list(kept)], case.grad_layout, rng)
        expected = reference(case, exact_x, exact_w, exact_b, exact_dy)
        after: Epilogue = (None, None, None, False)
        if case.direction == "forward":
            expected["forward"] = expected["forward"][:, list(kept)]
            if rng.random() < 0.7:
                after = draw_epilogue(expected["forward"].shape, case, rng, generator)
                expected["forward"] = with_epilogue(expected["forward"], after)
            expected["repeated forward"] = expected["forward"]
        else:
            expected["input"][:, off] = 0
        index = [None if i is None else torch.tensor(i, dtype=torch.int32) for i in (in_list, out_list)]
        results = run_backend(case, implementation, x, w, b, dy, index, rng.random() < 0.5, after)
    for name, result in results.items():
        if error := difference(result, expected[name], TOLERANCE[case.dtype]):
            return f"{name}: {error}"
    return None


def with_epilogue(y: Any, after: Epilogue) -> Any:
    """The float64 array with scale, shift, residual and ReLU."""
    scale, shift, residual, relu = after
    if scale is not None:
        y = y * scale.double().numpy()[:, None, None]
    if shift is not None:
        y = y + shift.double().numpy()[:, None, None]
    if residual is not None:
        y = y + residual.double().numpy()
    return np.maximum(y, 0) if relu else y


def run_pytorch(case: Case, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, packed: bool) -> dict[str, Tensor]:
    """Results of PyTorch's own convolution, or of oneDNN's with a reordered weight; empty where that does not exist."""
    geometry = case.stride, case.padding, case.dilation
    if packed:
        if case.dtype not in ("float32", "bfloat16") or case.direction != "forward":
            return {}
        order = case.padding, case.stride, case.dilation, case.groups
        weight = torch.ops.mkldnn._reorder_convolution_weight(w.contiguous(), *order, x.shape)
        return {"forward": torch.ops.mkldnn._convolution_pointwise(x, weight, b, *order, "none", [], "")}
    if case.direction == "forward":
        return {"forward": F.conv2d(x, w, b, *geometry, case.groups)}
    mask = [name in case.gradients for name in ("input", "weight", "bias")]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, False, (0, 0), case.groups, mask)
    return {name: {"input": dx, "weight": dw}[name] for name in case.gradients}


def run_backend(
    case: Case,
    backend: str,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    dy: Tensor,
    index: Sequence[Tensor | None],
    cache_packed: bool,
    after: Epilogue,
) -> dict[str, Tensor]:
    """Results of our ops under one backend; empty where they do not support the case."""
    import bap_kernels as bk

    ops = torch.ops.bap_kernels
    geometry = case.stride, [side for side in case.padding for _ in range(2)], case.dilation, case.groups
    bk.use_backend(backend)
    try:
        if case.direction == "forward":
            names = ("forward", "repeated forward")
            if not after[3] and all(part is None for part in after):
                return {name: ops.gathered_conv2d(x, w, b, *index, *geometry, cache_packed) for name in names}
            fusion = (None, None, False, *after, cache_packed)
            return {name: ops._gathered_conv2d_fused(x, w, b, *index, *geometry, *fusion)[0] for name in names}
        mask = [name in case.gradients for name in ("input", "weight", "bias")]
        dx, dw, _ = ops.gathered_conv2d_backward(dy, x, w, *index, *geometry, mask)
        return {name: {"input": dx, "weight": dw}[name] for name in case.gradients}
    except NotImplementedError:
        return {}


def difference(result: Tensor, expected: Any, tolerance: float) -> str | None:
    """Return what is wrong with a result, or None."""
    if tuple(result.shape) != expected.shape:
        return f"shape {tuple(result.shape)} instead of {expected.shape}"
    values = result.double().numpy()
    if np.isnan(values).any():
        return "NaN"
    error, largest = np.abs(values - expected).max(initial=0), np.abs(expected).max(initial=0)
    return f"error {error:.3g} of {largest:.3g}" if error > tolerance * (largest + 1) else None
