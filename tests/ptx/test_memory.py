"""Memory and order: bounds, alignment, races, barriers, asynchronous copies, and what each forgotten wait leads to."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ptx.executor import Options, PtxError
from tests.ptx.snippets import run

REGISTERS = ".reg .b32 x, y, s, n, other, parity;\n.reg .b64 at, to;\n.reg .pred p, q;"
# The thread's word of shared memory, and that of the thread 32 further on.
PLACES = """mov.u32 s, memory; shl.b32 x, tid, 2; add.s32 s, s, x;
add.s32 other, tid, 32; and.b32 other, other, 63; shl.b32 other, other, 2; mov.u32 x, memory; add.s32 other, other, x;
mul.wide.u32 at, tid, 4; add.s64 to, p0, at;"""


def faults(match: str, body: str, tensors: list, **options) -> None:
    with pytest.raises(PtxError, match=match):
        run(body, tensors, registers=REGISTERS, **options)


def test_accesses_stay_inside_tensors() -> None:
    word = torch.zeros(1, dtype=torch.int32)
    run("setp.eq.u32 p, tid, 0; @p st.global.b32 [p0], tid;", [word], registers=REGISTERS)
    faults(
        "write of 4 bytes outside the launch's tensors.*4 bytes from the start of a tensor of 4 bytes",
        "setp.eq.u32 p, tid, 0; @p st.global.b32 [p0 + 4], tid;",
        [word],
    )
    faults("read of 4 bytes outside the launch's tensors", "ld.global.b32 x, [p0 + -4];", [word])
    faults("read of 8 bytes outside", "ld.global.b64 at, [p0];", [word])


def test_accesses_are_aligned() -> None:
    words = torch.zeros(8, dtype=torch.int32)
    faults("misaligned global address", "ld.global.b32 x, [p0 + 2];", [words])
    faults("read of 16 bytes at the misaligned global address", "ld.global.v4.b32 {x, y, s, n}, [p0 + 4];", [words])
    faults("misaligned byte 2 of shared memory", "ld.shared.b32 x, [memory + 2];", [words], shared_bytes=64)
    faults("which has 64", "st.shared.b32 [memory + 64], tid;", [words], shared_bytes=64)


def test_two_threads_do_not_write_one_place() -> None:
    word = torch.zeros(1, dtype=torch.int32)
    faults("write of global memory that another thread", "st.global.b32 [p0], tid;", [word])
    words = torch.zeros(32, dtype=torch.int32)
    body = "mul.wide.u32 at, tid, 4; add.s64 to, p0, at; st.global.b32 [to], tid; ld.global.b32 x, [p0];"
    faults("read of global memory that another thread", body, [words])


def test_registers_and_shared_memory_have_to_be_written_first() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    faults("register x has no value", "add.s32 y, x, 1;", [out])
    # A move keeps the question open.
    faults("register y has no value", "mov.b32 y, x; add.s32 n, y, 1;", [out])
    faults("predicate p has no value", "@p add.s32 n, tid, 1;", [out])
    faults("which nothing has written", "ld.shared.b32 x, [memory];", [out], shared_bytes=64)
    options = Options(check_registers=False, check_shared=False)
    run("add.s32 y, x, 1; ld.shared.b32 x, [memory];", [out], registers=REGISTERS, shared_bytes=64, options=options)


def exchange(between: str, after: str = "") -> str:
    return f"{PLACES} st.shared.b32 [s], tid; {between} ld.shared.b32 y, [other]; {after} st.global.b32 [to], y;"


@pytest.mark.parametrize("seed", range(5))
def test_a_barrier_orders_threads(seed: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    options = Options(seed=seed)
    run(exchange("bar.sync 0;"), [out], 64, REGISTERS, 256, options)
    assert out.tolist() == [*range(32, 64), *range(32)]
    run(exchange("bar.sync 1, 64;"), [out], 64, REGISTERS, 256, options)
    faults("race on byte|nothing has written", exchange(""), [out], threads=64, shared_bytes=256, options=options)
    # A barrier of one warp orders none with another.
    match = "race on byte|nothing has written"
    faults(match, exchange("bar.warp.sync -1;"), [out], threads=64, shared_bytes=256, options=options)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_read_is_not_overwritten(seed: int) -> None:
    out, options = torch.zeros(64, dtype=torch.int32), Options(seed=seed)
    again = exchange("bar.sync 0;", "bar.sync 0; st.shared.b32 [s], y;")
    run(again, [out], 64, REGISTERS, 256, options)
    without = exchange("bar.sync 0;", "st.shared.b32 [s], y;")
    faults("race on byte", without, [out], threads=64, shared_bytes=256, options=options)


def test_lanes_of_one_warp_race_too() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    neighbour = PLACES.replace("tid, 32", "tid, 1").replace("other, 63", "other, 31")
    body = f"{neighbour} st.shared.b32 [s], tid; %s ld.shared.b32 y, [other]; st.global.b32 [to], y;"
    run(body % "bar.warp.sync -1;", [out], registers=REGISTERS, shared_bytes=128)
    assert out.tolist() == [*range(1, 32), 0]
    faults("race on byte .* thread 0 reads what was written by thread 1", body % "", [out], shared_bytes=128)


def test_threads_that_do_not_come_stop_the_launch() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    faults("no thread can go on; warp 0 waits at line", "setp.lt.u32 p, tid, 32; @p bar.sync 0;", [out], threads=64)
    part = "setp.lt.u32 p, tid, 7; @p bra there; add.s32 x, tid, 1; bra ending; there: bar.sync 0; ending:"
    faults("with some of its lanes|no thread can go on", part, [out])
    faults("different counts", "setp.lt.u32 p, tid, 32; @p bar.sync 1, 64; @!p bar.sync 1, 96;", [out], threads=96)


COPY = f"{PLACES} cp.async.ca.shared.global [s], [to], 4; cp.async.commit_group;"


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_there_when_they_were_waited_for(seed: int) -> None:
    source, options = torch.arange(64, dtype=torch.int32), Options(seed=seed)
    out = torch.zeros(64, dtype=torch.int32)
    end = "ld.shared.b32 y, [other]; add.s64 to, p1, at; st.global.b32 [to], y;"
    run(f"{COPY} cp.async.wait_group 0; bar.sync 0; {end}", [source, out], 64, REGISTERS, 256, options)
    assert out.tolist() == [*range(32, 64), *range(32)]
    run(f"{COPY} cp.async.wait_all; bar.sync 0; {end}", [source, out], 64, REGISTERS, 256, options)
    common = {"threads": 64, "shared_bytes": 256, "options": options}
    faults("while a copy to it is under way", f"{COPY} bar.sync 0; {end}", [source, out], **common)
    faults(
        "while a copy to it is under way", f"{COPY} cp.async.wait_group 1; bar.sync 0; {end}", [source, out], **common
    )
    # A thread waits for its own copies only.
    match = "race on byte|while a copy|nothing has written"
    faults(match, f"{COPY} cp.async.wait_group 0; {end}", [source, out], **common)
    faults("while a copy to it is under way", f"{COPY} st.shared.b32 [s], tid;", [source, out], **common)


def test_copies_fill_with_zeros_and_read_no_further() -> None:
    source, out = torch.arange(1, 5, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    body = """setp.eq.u32 p, tid, 0; @!p bra ending; mov.b32 n, {bytes}; mov.u32 s, memory;
    cp.async.cg.shared.global [s], [p0 + {skip}], 16, n; cp.async.wait_all;
    .reg .b32 a, b, c, d; ld.shared.v4.b32 {{a, b, c, d}}, [s]; st.global.v4.b32 [p1], {{a, b, c, d}}; ending:"""
    run(body.format(bytes=8, skip=0), [source, out], registers=REGISTERS, shared_bytes=16)
    assert out.tolist() == [1, 2, 0, 0]
    # Nothing is read, so the address need not be anywhere.
    run(body.format(bytes=0, skip=4096), [source, out], registers=REGISTERS, shared_bytes=16)
    assert out.tolist() == [0] * 4
    faults("outside the launch's tensors", body.format(bytes=4, skip=4096), [source, out], shared_bytes=16)
    faults("more bytes than it writes", body.format(bytes=20, skip=0), [source, out], shared_bytes=16)
    faults("from a misaligned address", body.format(bytes=0, skip=4), [source, out], shared_bytes=16)


def test_copies_under_a_predicate_read_all_or_nothing() -> None:
    source, out = torch.arange(1, 5, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    body = """setp.eq.u32 p, tid, 0; @!p bra ending; mov.u32 s, memory; setp.{holds}.u32 q, tid, 0;
    cp.async.cg.shared.global [s], [p0 + {skip}], 16, q; cp.async.wait_all;
    .reg .b32 a, b, c, d; ld.shared.v4.b32 {{a, b, c, d}}, [s]; st.global.v4.b32 [p1], {{a, b, c, d}}; ending:"""
    run(body.format(holds="ne", skip=0), [source, out], registers=REGISTERS, shared_bytes=16)
    assert out.tolist() == [1, 2, 3, 4]
    run(body.format(holds="eq", skip=4096), [source, out], registers=REGISTERS, shared_bytes=16)
    assert out.tolist() == [0] * 4
    faults("outside the launch's tensors", body.format(holds="ne", skip=4096), [source, out], shared_bytes=16)


# Warp 0 copies, warp 1 reads behind an mbarrier.
HANDED_OVER = """mov.u32 s, memory; setp.lt.u32 p, tid, 32; setp.eq.u32 q, tid, 0;
@q mbarrier.init.shared::cta.b64 [s + 128], {count}; {meet}
mul.wide.u32 at, tid, 4; add.s64 to, p0, at; @!p bra reader;
shl.b32 x, tid, 2; add.s32 x, s, x;
cp.async.ca.shared.global [x], [to], 4; {arrive} bra ending;
reader: {{ .reg .pred done;
again: mbarrier.try_wait.parity.shared::cta.b64 done, [s + 128], {parity}; @!done bra again; }}
sub.s32 x, tid, 32; xor.b32 x, x, 1; shl.b32 x, x, 2; add.s32 x, s, x; ld.shared.b32 y, [x];
add.s64 to, p1, at; st.global.b32 [to + -128], y; ending:"""
ARRIVE = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [s + 128];"


def handed_over(count: int = 32, meet: str = "bar.sync 0;", arrive: str = ARRIVE, parity: int = 0) -> str:
    return HANDED_OVER.format(count=count, meet=meet, arrive=arrive, parity=parity)


@pytest.mark.parametrize("seed", range(5))
def test_mbarriers_hand_copies_over(seed: int) -> None:
    source, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    common = {"threads": 64, "shared_bytes": 136, "options": Options(seed=seed)}
    run(handed_over(), [source, out], registers=REGISTERS, **common)
    assert out.tolist() == [k ^ 1 for k in range(32)]
    faults("no thread can go on", handed_over(count=33), [source, out], **common)
    # The phase before the first counts as over, so this one does not wait.
    faults("while a copy to it|nothing has written|race", handed_over(parity=1), [source, out], **common)
    # Of several arrivals that are too few, who was waited for is a matter of chance, but never of all.
    faults("while a copy to it is under way|race on byte", handed_over(count=8), [source, out], **common)
    faults("race on byte|no mbarrier was init", handed_over(meet=""), [source, out], **common)
    plain = "mbarrier.arrive.shared::cta.b64 _, [s + 128];"
    faults("while a copy to it is under way|race on byte", handed_over(arrive=plain), [source, out], **common)
    waited = "cp.async.wait_all; " + plain
    run(handed_over(arrive=waited), [source, out], registers=REGISTERS, **common)


# Thread 0 copies 128 bytes at once, warp 1 reads behind an mbarrier.
BULK = """mov.u32 s, memory; setp.lt.u32 p, tid, 32; setp.eq.u32 q, tid, 0; {before}
@q mbarrier.init.shared::cta.b64 [s + 128], 1; {fence} bar.sync 0; @!p bra reader; @!q bra ending; {arrive}
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s + {to}], [p0 + {skip}], {bytes}, [s + 128];
bra ending; reader: {{ .reg .pred done;
again: mbarrier.try_wait.parity.shared::cta.b64 done, [s + 128], {parity}; @!done bra again; }}
sub.s32 x, tid, 32; xor.b32 x, x, 1; shl.b32 x, x, 2; add.s32 x, s, x; ld.shared.b32 y, [x];
mul.wide.u32 at, tid, 4; add.s64 to, p1, at; st.global.b32 [to + -128], y; ending:"""
PROXY = "fence.proxy.async.shared::cta;"


def in_bulk(expected: int = 128, bytes_: int = 128, **changes: object) -> str:
    parts = {
        "before": "", "fence": PROXY, "to": 0, "skip": 0, "bytes": bytes_, "parity": 0,
        "arrive": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [s + 128], {expected};",
    }  # fmt: skip
    return BULK.format(**{**parts, **changes})


@pytest.mark.parametrize("seed", range(5))
def test_bulk_copies_land_at_the_mbarrier_that_counts_them(seed: int) -> None:
    source, out = torch.arange(36, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    common = {"threads": 64, "shared_bytes": 144, "options": Options(seed=seed)}
    run(in_bulk(), [source, out], registers=REGISTERS, **common)
    assert out.tolist() == [k ^ 1 for k in range(32)]
    run(in_bulk(skip=16), [source, out], registers=REGISTERS, **common)
    assert out.tolist() == [(k ^ 1) + 4 for k in range(32)]
    faults("no thread can go on", in_bulk(expected=144), [source, out], **common)
    faults("no thread can go on", in_bulk(expected=112), [source, out], **common)
    plain = "mbarrier.arrive.shared::cta.b64 _, [s + 128];"
    faults("while a copy to it is under way|nothing has written", in_bulk(arrive=plain), [source, out], **common)
    faults("no thread can go on", in_bulk(arrive=""), [source, out], **common)
    twice = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [s + 128], 128;" + plain
    faults("more arrivals at an mbarrier", in_bulk(arrive=twice), [source, out], **common)
    # The phase before the first counts as over.
    match = "while a copy to it|nothing has written|race|ends while a bulk copy"
    faults(match, in_bulk(parity=1), [source, out], **common)


def test_bulk_copies_are_aligned_and_stay_inside() -> None:
    source, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    common = {"threads": 64, "shared_bytes": 160}
    faults("a multiple of 16 bytes", in_bulk(bytes_=24), [source, out], **common)
    faults("a multiple of 16 bytes", in_bulk(bytes_=0), [source, out], **common)
    faults("misaligned byte 8 of shared memory", in_bulk(to=8), [source, out], **common)
    faults("misaligned global address", in_bulk(skip=8), [source, out], **common)
    faults("outside the launch's tensors", in_bulk(skip=16), [source, out], **common)
    faults("which has 160", in_bulk(to=128), [source, out], **common)


def test_bulk_copies_need_a_fence_behind_what_threads_write_and_none_behind_what_they_read() -> None:
    source, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    common = {"threads": 64, "shared_bytes": 144}
    # The set-up of the mbarrier, which the copy reaches through the asynchronous proxy.
    faults("counts at an mbarrier.*no fence", in_bulk(fence=""), [source, out], **common)
    write = "@p shl.b32 x, tid, 2; @p add.s32 x, s, x; @p st.shared.b32 [x], tid;"
    run(in_bulk(before=write), [source, out], registers=REGISTERS, **common)
    assert out.tolist() == [k ^ 1 for k in range(32)]
    # Those of the other threads have no fence then.
    faults("overwrites byte .* no fence", in_bulk(before=write, fence=f"@q {PROXY}"), [source, out], **common)
    # What is read needs order alone.
    read = f"{PROXY} bar.sync 0; @p ld.shared.b32 y, [x];"
    run(in_bulk(before=write, fence=read), [source, out], registers=REGISTERS, **common)
    late_read = in_bulk(before=write).replace("@!q bra", "@!q ld.shared.b32 y, [x]; @!q bra")
    faults("overwrites what is read by|while a copy to it", late_read, [source, out], **common)


def test_registers_that_change_hands() -> None:
    # Two warps have 168 registers a thread each where the launch has 384 threads; here the file is shared by fewer.
    body = "setmaxnreg.dec.sync.aligned.u32 %d; setmaxnreg.inc.sync.aligned.u32 %d;"
    run(body % (136, 168), [], threads=384)
    faults("no thread can go on", body % (136, 184), [], threads=384)
    faults("a number of registers", "setmaxnreg.dec.sync.aligned.u32 100;", [], threads=384)
    faults("the other way", "setmaxnreg.dec.sync.aligned.u32 232;", [], threads=384)


def test_seeds_change_the_order_and_not_the_result() -> None:
    # Threads race on purpose, through memory that the executor does not watch: registers only tell who came first.
    out = torch.zeros(64, dtype=torch.int32)
    messages = set()
    for seed in range(12):
        with pytest.raises(PtxError) as caught:
            run(exchange(""), [out], 64, REGISTERS, 256, Options(seed=seed))
        messages.add(re.sub(r"seed \d+", "", str(caught.value)))
    assert len(messages) > 1
