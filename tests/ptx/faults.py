"""Faults that are put into PTX by hand: one edit each, of the kind that a person or a compiler makes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One change of a kernel's text.

    Args:
        name: what is wrong then.
        pattern: regular expression of the instruction.
        to: what stands in its place, with groups.
        which: number of the match that is changed; -1: the last one; None: all.
    """

    name: str
    pattern: str
    to: str = ""
    which: int | None = 0

    def __call__(self, text: str) -> str:
        """The changed text.

        Raises:
            ValueError: if it does not occur, so that a fault cannot get lost when a compiler changes its ways.
        """
        found = list(re.finditer(self.pattern, text))
        if not found or (self.which is not None and not -len(found) <= self.which < len(found)):
            raise ValueError(f"{self.name}: {len(found)} matches of {self.pattern}")
        chosen = found if self.which is None else [found[self.which]]
        for match in reversed(chosen):
            text = text[: match.start()] + match.expand(self.to) + text[match.end() :]
        return text


def without(name: str, instruction: str, which: int | None = 0) -> Edit:
    """A fault that leaves an instruction out."""
    return Edit(name, instruction, "", which)


_WAIT = r"(mbarrier\.try_wait\.parity\S* done, \[[^\]]+\], )(%r\d+);"
_ODD = r"{.reg .b32 odd; xor.b32 odd, \2, 1; \1odd;}"
_INIT = r"(mbarrier\.init\S* \[[^\]]+\], )%r\d+;"
_DESCRIPTOR = 0x4000004000010000

# Of the loops of warpgroup_pipeline.cuh, in every kernel that has them.
_STAGES = [
    without("no barrier behind the set-up of the mbarriers", r"bar\.sync\s+0;"),
    Edit("one arrival too few at an empty stage", _INIT, r"\g<1>7;", 1),
    Edit("one arrival too many at an empty stage", _INIT, r"\g<1>9;", 1),
    without("an mbarrier that is not set up", r"mbarrier\.init[^;]+;", 3),
    Edit("the multiplying warps wait for the other parity", _WAIT, _ODD, 0),
    Edit("the copying warps wait for the other parity", _WAIT, _ODD, 1),
    # The first one stands behind the set-up of the mbarriers.
    without("no fence between copies and products", r"fence\.proxy\.async[^;]*;", 1),
    without("no fence before products", r"wgmma\.fence[^;]*;"),
    without("products that are not committed", r"wgmma\.commit_group[^;]*;"),
    Edit("a product too many is left running", r"wgmma\.wait_group(\S*) 1;", r"wgmma.wait_group\1 2;"),
    Edit("the last product is not waited for", r"wgmma\.wait_group(\S*) 0;", r"wgmma.wait_group\1 1;"),
    without("stages are never given back", r"(?<!\.)mbarrier\.arrive\.shared[^;]+;"),
    Edit("a stage counts as full before its copies land", r"cp\.async\.mbarrier\.arrive\.noinc\S* (\[[^\]]+\]);",
         r"mbarrier.arrive.shared::cta.b64 _, \1;"),
    without("stages are never full", r"cp\.async\.mbarrier\.arrive\.noinc[^;]+;"),
    Edit("registers are not given up", r"setmaxnreg\.dec\S* \d+;", "setmaxnreg.dec.sync.aligned.u32 168;"),
    Edit("more registers than there are", r"setmaxnreg\.inc\S* \d+;", "setmaxnreg.inc.sync.aligned.u32 192;"),
    Edit("sums that are not added to", r"setp\.eq\.u32 added, 0, 0;", "setp.ne.u32 added, 0, 0;", 2),
    Edit("a product of the other element type", r"k16\.f32\.f16\.f16", "k16.f32.bf16.bf16", 1),
    Edit("padding is read", r"(cp\.async\.cg\S* \[[^\]]+\], \[[^\]]+\], 16, )%r\d+;", r"\g<1>16;", None),
    Edit("copies go to a place without its swizzle", r"xor\.b32(\s+%r\d+, )(%r\d+), (%r\d+);", r"or.b32\1\2, \3;", 0),
]  # fmt: skip
_EXPECT = r"mbarrier\.arrive\.expect_tx(\S*) _, (\[[^\]]+\]), (\d+);"
_BULK = r"(cp\.async\.bulk\S*) \[(%r\d+)\], \[(%rd\d+)\], (\d+), \[(%r\d+)\];"
WARPGROUPS = [
    *_STAGES,
    Edit("one arrival too few at a full stage", _INIT, r"\g<1>128;", 0),
    Edit("one arrival too many at a full stage", _INIT, r"\g<1>130;", 0),
    without("no fence behind the set-up of the mbarriers", r"fence\.proxy\.async[^;]*;", 0),
    Edit("a stage does not wait for its weights", _EXPECT, r"mbarrier.arrive\1 _, \2;"),
    without("the thread that copies weights does not arrive", _EXPECT),
    Edit("a stage waits for fewer bytes than come", _EXPECT, r"mbarrier.arrive.expect_tx\1 _, \2, 16368;"),
    Edit("a stage waits for more bytes than come", _EXPECT, r"mbarrier.arrive.expect_tx\1 _, \2, 16400;"),
    without("weights are not copied", _BULK),
    Edit("a chunk of weights too few", _BULK, r"\1 [\2], [\3], 16368, [\5];"),
    Edit("a chunk of weights too many", _BULK, r"\1 [\2], [\3], 16400, [\5];"),
    Edit("weights of the next row", _BULK, r"\1 [\2], [\3+128], \4, [\5];"),
    Edit("weights from an unaligned address", _BULK, r"\1 [\2], [\3+8], \4, [\5];"),
    Edit("weights go where rows are", _BULK, r"\1 [\2+-16384], [\3], \4, [\5];"),
    Edit("weights count where stages are given back", _BULK, r"\1 [\2], [\3], \4, [\5+8];"),
    without("sums are staged while others still multiply", r"bar\.sync\s+1, 256;"),
    without("sums are stored before all are staged", r"bar\.sync\s+1, 256;", 1),
    Edit("a barrier for threads that do not come", r"bar\.sync\s+1, 256;", "bar.sync 1, 384;"),
    Edit("a descriptor without its swizzle", str(_DESCRIPTOR), str(_DESCRIPTOR - (1 << 62)), 0),
    Edit("a descriptor with half the swizzle", str(_DESCRIPTOR), str(_DESCRIPTOR + (1 << 62)), 1),
    Edit("a descriptor with half the stride", str(_DESCRIPTOR), str(_DESCRIPTOR - (1 << 37)), 2),
    Edit("a descriptor with a base offset", str(_DESCRIPTOR), str(_DESCRIPTOR + (1 << 49)), 3),
    Edit("columns as if they lay turned", r"added, 1, 1, 0, 0;", "added, 1, 1, 0, 1;", 0),
]  # fmt: skip
_TRANSPOSED = 0x4000004002000000
WEIGHT_WARPGROUPS = [
    *_STAGES,
    Edit("one arrival too few at a full stage", _INIT, r"\g<1>127;", 0),
    Edit("one arrival too many at a full stage", _INIT, r"\g<1>129;", 0),
    Edit("a descriptor without its swizzle", str(_TRANSPOSED), str(_TRANSPOSED - (1 << 62)), 0),
    Edit("a descriptor with half the swizzle", str(_TRANSPOSED), str(_TRANSPOSED + (1 << 62)), 1),
    Edit("groups of pixels that lie half as far apart", str(_TRANSPOSED), str(_TRANSPOSED - (1 << 37)), 2),
    Edit("panels that lie half as far apart", str(_TRANSPOSED), str(_TRANSPOSED - (1 << 24)), None),
    Edit("a descriptor with a base offset", str(_TRANSPOSED), str(_TRANSPOSED + (1 << 49)), 3),
    Edit("rows that are not turned", r"added, 1, 1, 1, 1;", "added, 1, 1, 0, 1;", 0),
    Edit("columns that are not turned", r"added, 1, 1, 1, 1;", "added, 1, 1, 1, 0;", 1),
    Edit("a sum goes a column further", r"st\.global\.f32\s+\[(%rd\d+)\]", r"st.global.f32 [\1+4]", 0),
    without("a sum is not stored", r"st\.global\.f32[^;]+;", 0),
]  # fmt: skip

_COPY = r"(cp\.async\.c[ag]\S* \[[^\]]+\], \[[^\]]+\], (?:16|0x10), )%r\d+;"
_B = r"(mma\.sync[^;]+?\}, \{[^}]+\}, )\{(%r\d+), (%r\d+)\}"

ROWS = [
    without("no barrier between steps", r"bar\.sync\s+0;"),
    Edit("a copy too many is left running", r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;"),
    without("copies of the first steps are not told apart", r"cp\.async\.commit_group;", 0),
    without("copies of later steps are not committed", r"cp\.async\.commit_group;", 1),
    without("sums are staged over operands in use", r"bar\.sync\s+0;", 1),
    without("sums are stored before all are staged", r"bar\.sync\s+0;", 2),
    Edit("padding is read", _COPY, r"\g<1>16;", None),
    Edit("a matrix is loaded turned", r"ldmatrix(\S*)\.x4\.shared", r"ldmatrix\1.x4.trans.shared", 1),
    Edit("a matrix is loaded from the next row", r"(ldmatrix\S* \{[^}]+\}, \[%r\d+)\]", r"\1+128]", 2),
    Edit("halves of the second operand are exchanged", _B, r"\1{\3, \2}", 0),
    Edit("sums are staged a column too far", r"st\.shared\.f32\s+\[(%r\d+)\+4\]", r"st.shared.f32 [\1+8]", 0),
    Edit("a product of the other element type", r"f32\.f16\.f16\.f32", "f32.bf16.bf16.f32", 0),
    Edit("one row of the source too many", r"setp\.lt\.u32", "setp.le.u32", None),
    without("one product too few", r"mma\.sync[^;]+;", 5),
    Edit("results are stored a row further", r"st\.global\.v4\.u32\s+\[(%rd\d+)\]", r"st.global.v4.u32 [\1+16]", 0),
    Edit("results are stored unaligned", r"st\.global\.v4\.u32\s+\[(%rd\d+)\]", r"st.global.v4.u32 [\1+8]", 0),
]  # fmt: skip

# Of a kernel whose sums are cut into parts, and of the one that adds them.
PARTS = [
    Edit("every block takes the first part", r"mov\.u32\s+(%r\d+), %ctaid\.z;", r"mov.u32 \1, 0;", None),
    Edit("a part's sum goes a column further", r"st\.global\.f32\s+\[(%rd\d+)\]", r"st.global.f32 [\1+4]", 0),
    without("a part's sum is not stored", r"st\.global\.f32[^;]+;", 0),
]
_PART = r"(ld\.global\.v4\.f32 \{[^}]+\}, \[%rd\d+)(\];)"
SPLIT = [
    without("no barrier before added sums are stored", r"bar\.sync\s+0;"),
    without("a part that is not loaded", _PART, 1),
    Edit("a part is loaded from the next columns", _PART, r"\1+16\2", 0),
    Edit("a part is loaded unaligned", _PART, r"\1+4\2", 2),
    Edit("sums are staged further on", r"st\.shared\.v4\.f32\s+\[(%r\d+)\]", r"st.shared.v4.f32 [\1+16]", 0),
]

_TRITON_B = r"(mma\.sync[^;]+?\}, \{[^}]+\}, )\{ (%r\d+), (%r\d+) \}"

PACK = [
    without("no barrier before what was turned is read", r"bar\.sync\s+0;"),
    Edit("one channel too many", r"setp\.ge\.s32", "setp.gt.s32", None),
]

# Of the packing of weights for the kernel of warpgroups.
_STORE = r"st\.global\.v4\.u32\s+\[(%rd\d+)\]"
WEIGHT_TILES = [
    Edit("weights without their swizzle", r"xor\.b32(\s+%r\d+, )(%r\d+), (%r\d+);", r"or.b32\1\2, \3;", 0),
    Edit("a swizzle of four rows", r"and\.b32(\s+%r\d+, %r\d+, )7;", r"and.b32\g<1>3;", 0),
    Edit("every tile is the first one", r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;", None),
    without("a weight is not read", r"ld\.global\S*\.u16[^;]+;", 3),
    Edit("one filter too many", r"setp\.ge\.s32", "setp.gt.s32", None),
    Edit("weights are stored unaligned", _STORE, r"st.global.v4.u32 [\1+8]", 0),
    Edit("weights are stored a chunk further", _STORE, r"st.global.v4.u32 [\1+16]", 0),
]

TRITON_ROWS = [
    # Some of Triton's other barriers are not needed; so leaving them out is no fault.
    without("no barrier between steps", r"bar\.sync\s+0;", 4),
    Edit("a copy too many is left running", r"cp\.async\.wait_group\s+(\d+);", "cp.async.wait_group 9;", 0),
    without("copies that are not committed", r"cp\.async\.commit_group;", 1),
    Edit("padding is read", _COPY, r"\g<1>16;", None),
    Edit("a matrix is loaded turned", r"ldmatrix(\S*)\.x4\.shared", r"ldmatrix\1.x4.trans.shared", 1),
    without("one product too few", r"mma\.sync[^;]+;", 3),
    Edit("halves of the second operand are exchanged", _TRITON_B, r"\1{ \3, \2 }", 0),
    Edit("results are stored under the opposite predicate", r"@(%p\d+) st\.global", r"@!\1 st.global", 0),
    Edit("results are stored further on", r"st\.global\.b16 \[ (%rd\d+) \+ 0 \]", r"st.global.b16 [ \1 + 64 ]", 0),
    Edit("staged further on", r"(st\.shared\S*\.v\d\.b\d+\s+\[ ?%r\d+) ?\+ ?(?:0|512) ?\]", r"\1 + 16 ]", 0),
    without("stored before all is staged", r"bar\.sync\s+0;", -1),
    Edit("a swizzle that is an addition", r"xor\.b32(\s+%r\d+, )(%r\d+), (%r\d+);", r"add.s32\1\2, \3;", 0),
]  # fmt: skip

TRITON_WARPGROUPS = [
    without("no fence between copies and products", r"fence\.proxy\.async[^;]*;", None),
    without("no fence before products", r"wgmma\.fence[^;]*;", 0),
    without("products that are not committed", r"wgmma\.commit_group[^;]*;", 0),
    Edit("a product too many is left running", r"wgmma\.wait_group(\S*) 1;", r"wgmma.wait_group\1 3;", 0),
    Edit("the last product is not waited for", r"wgmma\.wait_group(\S*) 0;", r"wgmma.wait_group\1 1;", -1),
    Edit("a descriptor without its swizzle", r"4611686293305294848", str(4611686293305294848 - (1 << 62)), 0),
    # The first two are those of the first slice, whatever the compiler adds for the others.
    Edit("a slice too far along the depth", r"4611686293305294848", "4611686293305294852", 1),
    Edit("a copy too many is left running", r"cp\.async\.wait_group\s+(\d+);", "cp.async.wait_group 9;", 0),
    without("no barrier between steps", r"bar\.sync\s+0;", 3),
    Edit("columns as if they lay turned", r"1, 1, 0, 1;|1, 1, 0, 0;", "1, 1, 1, 0;", 0),
]
