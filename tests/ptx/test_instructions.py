"""Each family of instructions by itself, against plain Python arithmetic."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable

import pytest
import torch

from tests.ptx.executor import Module, PtxError, known_spellings
from tests.ptx.snippets import HEAD, kernel, lanes, run


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def numbers(bits: int, seed: int) -> list[int]:
    """Random ones, small ones, and those at the ends of the range."""
    draw = random.Random(seed)
    special = [0, 1, 2, 3, 7, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    return [*special, *(draw.getrandbits(draw.choice((4, bits // 2, bits))) for _ in range(24))]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shifted(a: int, n: int, bits: int, left: bool) -> int:
    return (a << n if n < bits else 0) if left else a >> min(n, 200)


BINARY: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul.lo": lambda a, b, n: a * b,
    "mul.hi": lambda a, b, n: a * b >> n,
    "div": lambda a, b, n: quotient(a, b) if b else -1,
    "rem": lambda a, b, n: a - quotient(a, b) * b if b else a,
    "min": lambda a, b, n: min(a, b),
    "max": lambda a, b, n: max(a, b),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(name: str, kind: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    a, b = numbers(bits, 1), list(reversed(numbers(bits, 2)))
    got = lanes(f"{name}.{kind} d, a0, a1;", [a, b], [bits // 8] * 2, bits // 8)
    assert got == [BINARY[name](read(x), read(y), bits) % (1 << bits) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    a, b, c = numbers(bits, 1), list(reversed(numbers(bits, 2))), numbers(2 * bits, 3)
    got = lanes(f"mul.wide.{kind} d, a0, a1;", [a, b], [bits // 8] * 2, bits // 4)
    products = [read(x) * read(y) for x, y in zip(a, b, strict=True)]
    assert got == [p % (1 << 2 * bits) for p in products]
    got = lanes(f"mad.wide.{kind} d, a0, a1, a2;", [a, b, c], [bits // 8] * 2 + [bits // 4], bits // 4)
    assert got == [(p + z) % (1 << 2 * bits) for p, z in zip(products, c, strict=True)]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_products_with_a_sum(kind: str) -> None:
    bits = int(kind[1:])
    a, b, c = numbers(bits, 1), list(reversed(numbers(bits, 2))), numbers(bits, 3)
    got = lanes(f"mad.lo.{kind} d, a0, a1, a2;", [a, b, c], [bits // 8] * 3, bits // 8)
    assert got == [(x * y + z) % (1 << bits) for x, y, z in zip(a, b, c, strict=True)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits: int) -> None:
    a, b = numbers(bits, 1), list(reversed(numbers(bits, 2)))
    for name, function in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        got = lanes(f"{name}.b{bits} d, a0, a1;", [a, b], [bits // 8] * 2, bits // 8)
        assert got == [function(x, y) for x, y in zip(a, b, strict=True)]
    assert lanes(f"not.b{bits} d, a0;", [a], [bits // 8], bits // 8) == [(1 << bits) - 1 - x for x in a]
    count = [random.Random(k).choice((k, k + 40)) for k in range(32)]
    got = lanes(f"shl.b{bits} d, a0, a1;", [a, count], [bits // 8, 4], bits // 8)
    assert got == [shifted(x, n, bits, True) % (1 << bits) for x, n in zip(a, count, strict=True)]
    for kind, read in (("s", lambda v: signed(v, bits)), ("u", lambda v: v)):
        got = lanes(f"shr.{kind}{bits} d, a0, a1;", [a, count], [bits // 8, 4], bits // 8)
        assert got == [shifted(read(x), n, bits, False) % (1 << bits) for x, n in zip(a, count, strict=True)]


def test_bit_fields() -> None:
    a, b = numbers(32, 1), numbers(32, 2)
    at, length = [k % 32 for k in range(32)], [k * 7 % 33 for k in range(32)]
    fields = [(x >> p) & ((1 << n) - 1) for x, p, n in zip(a, at, length, strict=True)]
    assert lanes("bfe.u32 d, a0, a1, a2;", [a, at, length], [4] * 3, 4) == fields
    expected = []
    for x, p, n in zip(a, at, length, strict=True):
        # Beyond the top bit the sign goes on.
        wide = signed(x, 32) >> p
        expected.append(signed(wide, n) % (1 << 32) if n and p + n <= 32 else (wide % (1 << 32) if n else 0))
    assert lanes("bfe.s32 d, a0, a1, a2;", [a, at, length], [4] * 3, 4) == expected
    masks = [(((1 << n) - 1) << p) & 0xFFFFFFFF for p, n in zip(at, length, strict=True)]
    inserted = [y & ~m | (x << p & m) for x, y, p, m in zip(a, b, at, masks, strict=True)]
    assert lanes("bfi.b32 d, a0, a1, a2, a3;", [a, b, at, length], [4] * 4, 4) == inserted
    selectors = [random.Random(k).getrandbits(16) & 0x7777 for k in range(32)]
    bytes_ = [(x | y << 32).to_bytes(8, "little") for x, y in zip(a, b, strict=True)]
    permuted = [
        int.from_bytes(bytes(each[s >> 4 * k & 7] for k in range(4)), "little")
        for each, s in zip(bytes_, selectors, strict=True)
    ]
    assert lanes("prmt.b32 d, a0, a1, a2;", [a, b, selectors], [4] * 3, 4) == permuted


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_comparisons_and_selection(kind: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    a, b = numbers(bits, 1), list(reversed(numbers(bits, 2)))
    b[3] = a[3]
    third = [k % 2 for k in range(32)]
    pairs = [(read(x), read(y)) for x, y in zip(a, b, strict=True)]
    for how in ("eq", "ne", "lt", "le", "gt", "ge"):
        holds = [int(getattr(int, f"__{how}__")(x, y)) for x, y in pairs]
        assert lanes(f"setp.{how}.{kind} d, a0, a1;", [a, b], [bits // 8] * 2, 1) == holds
        got = lanes(f"setp.{how}.and.{kind} d, a0, a1, a2;", [a, b, third], [bits // 8] * 2 + [1], 1)
        assert got == [x & y for x, y in zip(holds, third, strict=True)]
    got = lanes(f"selp.b{bits} d, a0, a1, a2;", [a, b, third], [bits // 8] * 2 + [1], bits // 8)
    assert got == [x if p else y for x, y, p in zip(a, b, third, strict=True)]


def test_predicates() -> None:
    a, b = [k & 1 for k in range(32)], [k >> 1 & 1 for k in range(32)]
    for name, function in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        got = lanes(f"{name}.pred d, a0, a1;", [a, b], [1, 1], 1)
        assert got == [function(x, y) for x, y in zip(a, b, strict=True)]
    assert lanes("not.pred d, a0;", [a], [1], 1) == [1 - x for x in a]
    assert lanes("mov.b32 d, 7;\n@!a0 mov.b32 d, 9;\n@a0 add.s32 d, d, 1;", [a], [1], 4) == [8 if x else 9 for x in a]


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


FLOATS = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-40, 65504.0, 65519.9, 65520.0, 1e38, 3.1e-5]
FLOATS += [random.Random(k).gauss(0, 10.0 ** (k - 12)) for k in range(19)]


def test_float_arithmetic() -> None:
    a = torch.tensor(FLOATS)
    b, c = a.flip(0).clone(), a.roll(5)
    sources = [[bits_of(x) for x in t.tolist()] for t in (a, b, c)]
    for name, expected in {"add": a + b, "sub": a - b, "mul": a * b}.items():
        got = torch.tensor([float_of(v) for v in lanes(f"{name}.f32 d, a0, a1;", sources[:2], [4, 4], 4)])
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    got = torch.tensor([float_of(v) for v in lanes("fma.rn.f32 d, a0, a1, a2;", sources, [4] * 3, 4)])
    # In float64 a product of floats is exact; the sum is then rounded twice, which shows only at ties.
    torch.testing.assert_close(got, (a.double() * b + c).float(), rtol=2e-7, atol=0, equal_nan=True)
    exact = [
        float_of(v)
        for v in lanes("fma.rn.f32 d, a0, a0, a1;", [[bits_of(1 + 2.0**-12)] * 32, [bits_of(-1.0)] * 32], [4, 4], 4)
    ]
    assert exact == [2.0**-11 + 2.0**-24] * 32
    got = [float_of(v) for v in lanes("max.NaN.f32 d, a0, a1;", sources[:2], [4, 4], 4)]
    for x, y, z in zip(a.tolist(), b.tolist(), got, strict=True):
        assert math.isnan(z) if math.isnan(x) or math.isnan(y) else z == max(x, y)
    ordered = [int(x < y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert lanes("setp.lt.f32 d, a0, a1;", sources[:2], [4, 4], 1) == ordered
    unordered = [int(not x >= y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert lanes("setp.ltu.f32 d, a0, a1;", sources[:2], [4, 4], 1) == unordered


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_conversions(dtype: torch.dtype) -> None:
    name = "f16" if dtype == torch.float16 else "bf16"
    a = torch.tensor(FLOATS)
    source = [bits_of(x) for x in FLOATS]
    rounded = torch.tensor([signed(v, 16) for v in lanes(f"cvt.rn.{name}.f32 d, a0;", [source], [4], 2)]).short()
    torch.testing.assert_close(rounded.view(dtype), a.to(dtype), rtol=0, atol=0, equal_nan=True)
    every = list(range(0, 1 << 16, 97))[: 32 * 21]
    for first in range(0, len(every), 32):
        part = every[first : first + 32]
        wide = torch.tensor([float_of(v) for v in lanes(f"cvt.f32.{name} d, a0;", [part], [2], 4)])
        expected = torch.tensor([signed(v, 16) for v in part]).short().view(dtype).float()
        torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)
    pairs = lanes(f"cvt.rn.{name}x2.f32 d, a0, a1;", [source, source[::-1]], [4, 4], 4)
    high = torch.tensor([signed(v >> 16, 16) for v in pairs]).short().view(dtype)
    torch.testing.assert_close(high, a.to(dtype), rtol=0, atol=0, equal_nan=True)
    low = torch.tensor([signed(v, 16) for v in pairs]).short().view(dtype)
    torch.testing.assert_close(low, a.flip(0).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_rounding_to_tf32() -> None:
    source = [bits_of(x) for x in FLOATS]
    for before, after in zip(source, lanes("cvt.rna.tf32.f32 d, a0;", [source], [4], 4), strict=True):
        value = float_of(before)
        if not math.isfinite(value):
            assert after == before
            continue
        step = 1 << 13
        assert after == (before + step // 2) // step * step


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_conversions(kind: str, to: str) -> None:
    bits, wide = int(kind[1:]), int(to[1:])
    a = numbers(bits, 1)
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v)
    assert lanes(f"cvt.{to}.{kind} d, a0;", [a], [bits // 8], wide // 8) == [read(x) % (1 << wide) for x in a]


def test_moves_of_halves() -> None:
    a, b = numbers(16, 1), numbers(16, 2)
    assert lanes("mov.b32 d, {a0, a1};", [a, b], [2, 2], 4) == [x | y << 16 for x, y in zip(a, b, strict=True)]
    words = numbers(32, 3)
    got = lanes("{.reg .b16 low, high;\nmov.b32 {low, high}, a0;\nmov.b32 d, {high, low};\n}", [words], [4], 4)
    assert got == [w >> 16 | (w & 0xFFFF) << 16 for w in words]


def test_vectors_and_signs() -> None:
    source, out = torch.arange(-64, 64, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    registers = ".reg .b64 at, from, to;\n.reg .b32 a, b, c, e;"
    body = """mul.wide.u32 at, tid, 16;
    add.s64 from, p0, at; add.s64 to, p1, at;
    ld.global.v4.b32 {a, b, c, e}, [from];
    st.global.v2.b32 [to + 8], {a, b};
    st.global.v2.b32 [to], {c, e};"""
    run(body, [source, out], registers=registers)
    assert torch.equal(out.view(32, 2, 2), source.view(32, 2, 2).flip(1))
    # A narrow load fills a wider register by its type.
    narrow = torch.arange(-16, 16, dtype=torch.int16)
    wide = torch.zeros(32, dtype=torch.int64)
    body = """mul.wide.u32 at, tid, 2; add.s64 from, p0, at; ld.global.s16 from, [from];
    mul.wide.u32 at, tid, 8; add.s64 to, p1, at; st.global.b64 [to], from;"""
    run(body, [narrow, wide], registers=registers)
    assert torch.equal(wide, narrow.long())


def test_shuffles() -> None:
    a = numbers(32, 1)
    expected = {
        "idx": [a[5]] * 32,
        "bfly": [a[k ^ 5] for k in range(32)],
        "down": [a[k + 5] if k + 5 < 32 else a[k] for k in range(32)],
        "up": [a[k - 5] if k >= 5 else a[k] for k in range(32)],
    }
    for name, values in expected.items():
        clamp = 0 if name == "up" else 31
        assert lanes(f"shfl.sync.{name}.b32 d, a0, 5, {clamp}, -1;", [a], [4], 4) == values


def test_lanes_that_part_and_meet() -> None:
    # Every lane goes round its own number of times; all meet for the shuffle.
    out = torch.zeros(32, dtype=torch.int32)
    registers = ".reg .b32 n, sum, first;\n.reg .pred more;\n.reg .b64 at;"
    body = """mov.b32 n, 0; mov.b32 sum, 0;
    again: add.s32 sum, sum, n; add.s32 n, n, 1; setp.le.u32 more, n, tid; @more bra again;
    shfl.sync.idx.b32 first, sum, 31, 31, -1; sub.s32 sum, first, sum;
    mul.wide.u32 at, tid, 4; add.s64 at, p0, at; st.global.b32 [at], sum;"""
    run(body, [out], registers=registers)
    assert out.tolist() == [31 * 32 // 2 - k * (k + 1) // 2 for k in range(32)]


def test_special_registers() -> None:
    out = torch.zeros(2, 64, 3, dtype=torch.int32)
    registers = ".reg .b32 block, lane, at, blocks;\n.reg .b64 to;"
    body = """mov.u32 block, %ctaid.x; mov.u32 lane, %laneid; mov.u32 blocks, %nctaid.x;
    mad.lo.s32 at, block, 64, tid; mul.wide.u32 to, at, 12; add.s64 to, p0, to;
    st.global.b32 [to], block; st.global.b32 [to + 4], lane; st.global.b32 [to + 8], blocks;"""
    run(body, [out], threads=64, registers=registers, grid=2)
    assert out[1, :, 0].eq(1).all()
    assert out[0, :, 1].tolist() == [*range(32)] * 2
    assert out[..., 2].eq(2).all()


def test_unknown_instructions_are_named_with_their_line() -> None:
    with pytest.raises(PtxError, match=r"line 11: unknown instruction tanh\.approx\.f32 tid, tid"):
        Module(kernel("tanh.approx.f32 tid, tid;", 0))
    with pytest.raises(PtxError, match="no label nowhere"):
        Module(kernel("bra nowhere;", 0))
    with pytest.raises(PtxError, match=r"unknown directive \.func"):
        Module(HEAD + ".func f() { ret; }")


def test_the_table_is_larger_than_what_is_tested_here() -> None:
    # A sample of what compilers write today; the tests of kernels meet the rest.
    known = set(known_spellings())
    assert {"cp.async.cg.shared.global", "bar.sync", "mbarrier.try_wait.parity.shared.b64", "max.NaN.f32"} <= known
    assert not any("tcgen05" in name for name in known)
