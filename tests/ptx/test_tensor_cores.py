"""Matrix loads, mma.sync and wgmma against matrix products, and the fences and waits of wgmma."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from tests.ptx.executor import Options, PtxError
from tests.ptx.snippets import run

NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}


def tf32(t: Tensor) -> Tensor:
    return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)


def operands(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    return (tf32(a), tf32(b)) if dtype == torch.float32 else (a, b)


@pytest.mark.parametrize("dtype", NAMES)
def test_mma(dtype: torch.dtype) -> None:
    depth = 32 // dtype.itemsize
    a, b = operands(16, depth, 8, dtype)
    c = torch.randn(16, 8)
    name, each = NAMES[dtype], 4 // dtype.itemsize
    # Lane l holds row l / 4 and words of depth l % 4.
    words_a = a.view(torch.int32).view(2, 8, 2, 4)  # row, group, word of depth, place
    words_b = b.t().contiguous().view(torch.int32).view(8, 2, 4)
    packed_a = words_a.permute(1, 3, 2, 0).reshape(32, 4).contiguous()  # lane; register = row + 2 depth
    packed_b = words_b.permute(0, 2, 1).reshape(32, 2).contiguous()
    packed_c = c.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4).contiguous()
    assert each * 8 == depth
    out = torch.zeros(32, 4)
    registers = ".reg .b32 a0, a1, a2, a3, b0, b1, c0, c1, c2, c3;\n.reg .b64 at, to;"
    kinds = f"m16n8k{depth}.row.col.f32.{name}.{name}.f32"
    body = f"""mul.wide.u32 at, tid, 16; add.s64 to, p0, at; ld.global.v4.b32 {{a0, a1, a2, a3}}, [to];
    add.s64 to, p2, at; ld.global.v4.b32 {{c0, c1, c2, c3}}, [to];
    mul.wide.u32 at, tid, 8; add.s64 to, p1, at; ld.global.v2.b32 {{b0, b1}}, [to];
    mma.sync.aligned.{kinds} {{c0, c1, c2, c3}}, {{a0, a1, a2, a3}}, {{b0, b1}}, {{c0, c1, c2, c3}};
    mul.wide.u32 at, tid, 16; add.s64 to, p3, at; st.global.v4.b32 [to], {{c0, c1, c2, c3}};"""
    run(body, [packed_a, packed_b, packed_c, out], registers=registers)
    got = out.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)
    exact = a.double() @ b.double() + c
    torch.testing.assert_close(got, exact.float(), rtol=1e-6, atol=1e-6)
    run(body, [packed_a, packed_b, packed_c, out], registers=registers, options=Options(truncate=True))
    cut = out.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)
    torch.testing.assert_close(cut, exact.float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(cut, got)
    only_some = body.replace("mma.sync", "setp.lt.u32 p, tid, 9; @p mma.sync")
    with pytest.raises(PtxError, match="lanes of a warp differ about an instruction"):
        run(only_some, [packed_a, packed_b, packed_c, out], registers=registers + ".reg .pred p;")


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    registers = ".reg .b32 r0, r1, r2, r3, s, x;\n.reg .b64 at, to;"
    trans = ".trans" if transposed else ""
    body = f"""mul.wide.u32 at, tid, 16; add.s64 to, p0, at; shl.b32 x, tid, 4; mov.u32 s, memory; add.s32 s, s, x;
    ld.global.v4.b32 {{r0, r1, r2, r3}}, [to]; st.shared.v4.b32 [s], {{r0, r1, r2, r3}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{r0, r1, r2, r3}}, [s];
    add.s64 to, p1, at; st.global.v4.b32 [to], {{r0, r1, r2, r3}};"""
    run(body, [matrices, out], registers=registers, shared_bytes=512)
    # Lane l gets of each matrix row l / 4, elements 2 (l % 4) and the next.
    expected = (matrices.transpose(1, 2) if transposed else matrices).reshape(4, 32, 2)
    assert torch.equal(out.view(torch.int16).view(32, 4, 2).transpose(0, 1), expected)
    racing = body.replace("bar.warp.sync -1;", "xor.b32 s, s, 16;")
    with pytest.raises(PtxError, match="race on byte"):
        run(racing, [matrices, out], registers=registers, shared_bytes=512)


# One warpgroup: all threads write both operands to shared memory as the host laid them out, then multiply.
COLUMNS = 16
SUMS = [f"c{k}" for k in range(COLUMNS // 2)]
REGISTERS = f".reg .b32 {', '.join(SUMS)}, r0, r1, r2, r3, s, x, n;\n.reg .b64 at, to, da, db;\n.reg .pred add, p;"


def product(
    kind: str,
    flags: str,
    fence: str = "fence.proxy.async.shared::cta;",
    begin: str = "wgmma.fence.sync.aligned;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    before_wait: str = "",
    scale: int = 1,
) -> str:
    zeros = " ".join(f"mov.b32 {c}, 0f3F000000;" for c in SUMS)
    stores = " ".join(f"st.global.b32 [to + {4 * k}], {c};" for k, c in enumerate(SUMS))
    return f"""mov.u32 x, memory; mov.b32 n, 0;
    again: shl.b32 s, tid, 4; add.s32 s, s, n; cvt.u64.u32 at, s; add.s64 to, p0, at; add.s32 s, s, x;
    ld.global.v4.b32 {{r0, r1, r2, r3}}, [to]; st.shared.v4.b32 [s], {{r0, r1, r2, r3}};
    add.s32 n, n, 2048; setp.lt.u32 p, n, 12288; @p bra again;
    bar.sync 0; {fence}
    {zeros} ld.global.b64 da, [p1]; ld.global.b64 db, [p1 + 8]; setp.eq.u32 add, {scale}, 1;
    {begin}
    wgmma.mma_async.sync.aligned.m64n{COLUMNS}{kind} {{{", ".join(SUMS)}}}, da, db, add, 1, 1{flags};
    wgmma.commit_group.sync.aligned; {before_wait} {wait}
    mul.wide.u32 at, tid, {4 * len(SUMS)}; add.s64 to, p2, at; {stores}"""


BASE = 1024  # where shared memory begins


def swizzled(at: Tensor, span: int) -> Tensor:
    return at ^ ((at >> 7 & (span // 16 - 1)) << 4)


def laid_out(matrix: Tensor, start: int, span: int, memory: Tensor, by_rows: bool = False) -> int:
    """Puts (rows, depth) where a descriptor of this swizzle says, and returns the descriptor's bits."""
    rows, depth = matrix.shape
    each = matrix.element_size()
    row, k = torch.arange(rows)[:, None], torch.arange(depth)[None, :]
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[span]
    if by_rows:
        count = span // each
        leading, stride = 8 * span * (depth // 8), 8 * span
        at = start + row // count * leading + k // 8 * stride + k % 8 * span + row % count * each
    elif span == 16:
        leading, stride = 128, 256
        at = start + row // 8 * stride + row % 8 * 16 + k * each // 16 * leading + k * each % 16
    else:
        leading, stride = 16, 8 * span
        at = start + row // 8 * stride + row % 8 * span + k * each
    at = swizzled(at + BASE, span) - BASE
    raw = matrix.contiguous().view(torch.uint8).view(rows, depth, each)
    memory[at[..., None] + torch.arange(each)] = raw
    return (start + BASE) >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def result(out: Tensor) -> Tensor:
    # warp, row / 8 of the fragment's registers, ...
    return out.view(4, 8, 4, COLUMNS // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, COLUMNS)


def setup(dtype: torch.dtype, span: int, turned: bool = False) -> tuple[Tensor, Tensor, list[Tensor], str, str]:
    depth = 32 // dtype.itemsize
    a, b = operands(64, depth, COLUMNS, dtype)
    memory = torch.zeros(12288, dtype=torch.uint8)
    da = laid_out(a, 0, span, memory)
    db = laid_out(b.t().contiguous(), 8192, span, memory, by_rows=turned)
    bits = torch.tensor([v - (1 << 64) if v >= 1 << 63 else v for v in (da, db)])
    name = NAMES[dtype]
    flags = "" if dtype == torch.float32 else f", 0, {int(turned)}"
    return a, b, [memory, bits, torch.zeros(128, len(SUMS))], f"k{depth}.f32.{name}.{name}", flags


OPTIONS = {"threads": 128, "registers": REGISTERS, "shared_bytes": 12288}


@pytest.mark.parametrize("span", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", NAMES)
def test_wgmma(dtype: torch.dtype, span: int) -> None:
    a, b, tensors, kind, flags = setup(dtype, span)
    run(product(kind, flags), tensors, **OPTIONS)
    expected = a.double() @ b.double()
    torch.testing.assert_close(result(tensors[2]), (expected + 0.5).float(), rtol=1e-6, atol=1e-6)
    run(product(kind, flags, scale=0), tensors, **OPTIONS)
    torch.testing.assert_close(result(tensors[2]), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("span", [32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wgmma_of_columns_side_by_side(dtype: torch.dtype, span: int) -> None:
    a, b, tensors, kind, flags = setup(dtype, span, turned=True)
    run(product(kind, flags), tensors, **OPTIONS)
    torch.testing.assert_close(result(tensors[2]), (a.double() @ b.double() + 0.5).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_every_fence_and_wait_of_wgmma_is_needed(seed: int) -> None:
    _, _, tensors, kind, flags = setup(torch.float16, 128)
    options = {**OPTIONS, "options": Options(seed=seed)}
    with pytest.raises(PtxError, match=r"no fence\.proxy\.async stands behind its write"):
        run(product(kind, flags, fence=""), tensors, **options)
    with pytest.raises(PtxError, match=r"register c0 was written after the last wgmma\.fence"):
        run(product(kind, flags, begin=""), tensors, **options)
    for wait in ("", "wgmma.wait_group.sync.aligned 1;"):
        with pytest.raises(PtxError, match="register c0 belongs to a product that was not waited for"):
            run(product(kind, flags, wait=wait), tensors, **options)
    # Where the warp's own rows lie.
    overwrite = "and.b32 n, tid, 96; shl.b32 n, n, 6; add.s32 n, n, x; st.shared.b32 [n], tid;"
    with pytest.raises(PtxError, match="while a product that was not waited for reads it"):
        run(product(kind, flags, before_wait=overwrite), tensors, **options)


@pytest.mark.parametrize("bit", [49, 52, 14])
def test_descriptors_have_no_other_bits(bit: int) -> None:
    _, _, tensors, kind, flags = setup(torch.float16, 128)
    tensors[1][0] |= 1 << bit
    with pytest.raises(PtxError, match=r"base offset|bits that mean nothing"):
        run(product(kind, flags), tensors, **OPTIONS)


@pytest.mark.parametrize("bit", [0, 32, 62, 63])
def test_other_descriptors_give_other_results(bit: int) -> None:
    a, b, tensors, kind, flags = setup(torch.float16, 128)
    tensors[1][0] ^= -(1 << 63) if bit == 63 else 1 << bit
    expected = a.double() @ b.double() + 0.5
    # Either it reads what nothing has written, or something else than it should.
    with contextlib.suppress(PtxError):
        run(product(kind, flags), tensors, **OPTIONS)
    assert (result(tensors[2]) - expected).abs().max() > 0.1
