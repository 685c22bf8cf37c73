"""The ops pass opcheck, and their Meta kernels have the shapes, dtypes and strides of real results."""

from __future__ import annotations

import random

import pytest
import torch

import bap_kernels
from bap_kernels.testing import LAYOUTS, Case, Sample, make_fused, make_tensors, random_case

ops = torch.ops.bap_kernels
SAMPLES = {
    "lists": Case(in_channels=5, out_channels=4, size=(5, 6)),
    "null": Case(in_channels=5, out_channels=4, size=(5, 6), in_list="null", out_list="null", bias=False),
    "empty_in": Case(in_channels=5, out_channels=4, size=(5, 6), in_list="zero"),
    "empty_out": Case(in_channels=5, out_channels=4, size=(5, 6), out_list="zero"),
    "strided": Case(in_channels=5, out_channels=4, size=(5, 6), kernel=(3, 2), stride=(2, 1), layout="channels_last"),
    "depthwise": Case(in_channels=5, size=(5, 6), depthwise=True),
    "bfloat16": Case(in_channels=5, out_channels=4, size=(5, 6), dtype=torch.bfloat16),
}
FUSED = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name: str) -> None:
    sample = make_tensors(SAMPLES[name])
    torch.library.opcheck(ops.gathered_conv2d.default, sample.args)
    leaves = [None if t is None else t.requires_grad_() for t in sample.args[:3]]
    torch.library.opcheck(ops.gathered_conv2d.default, (*leaves, *sample.args[3:], True))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, False), (True, False, True)])
def test_opcheck_backward(name: str, mask: tuple[bool, bool, bool]) -> None:
    sample = make_tensors(SAMPLES[name])
    grad = torch.randn(sample.output_shape).to(sample.input.dtype)
    args = (grad, *sample.args[:2], *sample.args[3:], list(mask))
    torch.library.opcheck(ops.gathered_conv2d_backward.default, args)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("flags", [(), FUSED, ("out_shift", "out_relu")])
def test_opcheck_fused(name: str, flags: tuple[str, ...]) -> None:
    sample = make_tensors(SAMPLES[name])
    fused = make_fused(sample, flags, sample.input.dtype)
    torch.library.opcheck(ops._gathered_conv2d_fused.default, sample.args, fused)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_dual_store(name: str) -> None:
    sample = make_tensors(SAMPLES[name])
    fused = make_fused(sample, ("out_shift", "residual", "out_relu"), sample.input.dtype)
    copy_index = torch.arange(0, sample.kept[1], 2, dtype=torch.int32)
    torch.library.opcheck(ops._gathered_conv2d_fused.default, sample.args, fused | {"dual_store_index": copy_index})


def on_meta(tensor: torch.Tensor | None) -> torch.Tensor | None:
    # Tensor.to() would make expanded tensors dense.
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def meta_args(sample: Sample) -> list:
    return [on_meta(a) if isinstance(a, torch.Tensor) else a for a in sample.args]


def assert_same_metadata(meta: torch.Tensor, real: torch.Tensor, what: object) -> None:
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype), what
    # The stride of an axis of size 0 or 1 is arbitrary.
    reaching = [dim for dim, size in enumerate(real.shape) if size > 1 and real.numel() > 0]
    assert [meta.stride(dim) for dim in reaching] == [real.stride(dim) for dim in reaching], what


@pytest.mark.parametrize("chunk", range(4))
def test_meta_has_metadata_of_real_result(chunk: int, backend: str) -> None:
    for seed in range(3000 + 40 * chunk, 3040 + 40 * chunk):
        case = random_case(random.Random(seed)).but(dtype=torch.float32)
        sample = make_tensors(case)
        with bap_kernels.use_backend(backend):
            try:
                real = ops.gathered_conv2d(*sample.args)
            except NotImplementedError:
                assert backend == "native"
                continue
        assert_same_metadata(ops.gathered_conv2d(*meta_args(sample)), real, (seed, case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_meta_of_other_ops_has_metadata_of_real_result(name: str, layout: str) -> None:
    sample = make_tensors(SAMPLES[name].but(layout=layout, weight_layout=layout))
    args = meta_args(sample)
    fused = make_fused(sample, FUSED, torch.float32)
    meta_fused = {k: on_meta(v) if isinstance(v, torch.Tensor) else v for k, v in fused.items()}
    real, none = ops._gathered_conv2d_fused(*sample.args, **fused)
    meta_real, meta_none = ops._gathered_conv2d_fused(*args, **meta_fused)
    assert none is None
    assert meta_none is None
    assert_same_metadata(meta_real, real, name)
    copy_index = torch.arange(0, sample.kept[1], 2, dtype=torch.int32)
    dual = ops._gathered_conv2d_fused(*sample.args, **fused, dual_store_index=copy_index)
    meta_dual = ops._gathered_conv2d_fused(*args, **meta_fused, dual_store_index=on_meta(copy_index))
    for meta, one in zip(meta_dual, dual, strict=True):
        assert_same_metadata(meta, one, name)
    grad = torch.randn_like(real)
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        real_grads = ops.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:], mask)
        meta_grads = ops.gathered_conv2d_backward(on_meta(grad), *args[:2], *args[3:], mask)
        for meta_grad, real_grad in zip(meta_grads, real_grads, strict=True):
            assert_same_metadata(meta_grad, real_grad, (name, mask))


def test_export_supports_symbolic_sizes() -> None:
    sample = make_tensors(SAMPLES["lists"].but(dtype=torch.float32))

    def conv(x: torch.Tensor) -> torch.Tensor:
        return ops.gathered_conv2d(x, *sample.args[1:])

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return conv(x)

    program = torch.export.export(
        Module(), (sample.input,), dynamic_shapes=({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    )
    other = torch.randn(2, 5, 9, 7)
    assert torch.equal(program.module()(other), conv(other))
