"""Machine code read without a GPU: loops, paths, divisions, and the times that are calculated from them."""

from __future__ import annotations

import pytest

from benches.roofline import GPUS
from tools.code_figures import Figures, figures_of, is_copy
from tools.compile_cuda import Instance
from tools.kernel_figures import LAYERS, Layer, choice, layer_time, least_time
from tools.machine_code import Code, divisions, parse

LARGE = (128, 128, 2, 4, 3, 1)


def listing(*lines: str) -> str:
    """Lines as cuobjdump prints them; a number in angle brackets is that of the line that a branch goes to."""
    text = "".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */\n" for i, line in enumerate(lines))
    for i in range(len(lines)):
        text = text.replace(f"<{i}>", f"0x{16 * i:x}")
    return text


# A prologue that divides, a loop that copies or does not, an inner loop that waits, the end, and padding.
LOOP = listing(
    *("MOV R1, R2", "MUFU.RCP R3, R4", "@P0 BRA <9>"),
    *("IADD3 R5, R5, R6, RZ", "@P1 BRA <6>", "LDGSTS.E.128 [R1], [R2.64]"),
    *("@!P2 BRA <6>", "HMMA.16816.F32 R8, R4, R6, R8", "@P3 BRA <3>"),
    *("STG.E.128 [R1.64], R4", "EXIT", "BRA <11>", "NOP"),
)


def test_parse_reads_predicates_names_and_targets_and_leaves_padding_out() -> None:
    found = parse(LOOP)
    assert len(found) == 11
    assert found[2].predicate == "@P0"
    assert found[2].target == 9 * 16
    assert found[7].name == "HMMA.16816.F32"
    assert divisions(found) == 1


def test_loops_are_found_with_what_is_before_them() -> None:
    code = Code(LOOP)
    assert [len(loop.instructions) for loop in code.loops] == [1, 6]
    main = code.innermost(lambda one: one.name.startswith("HMMA"))
    assert main is not None
    assert main.count("LDGSTS") == 1
    assert [one.name for one in code.before(main)] == ["MOV", "MUFU.RCP", "BRA"]
    assert code.innermost(lambda one: one.name == "STG.E.128") is None


def test_paths_take_what_is_wanted_and_are_then_the_shortest() -> None:
    code = Code(LOOP)
    main = code.loops[-1]
    assert code.path(main.head, main.head, main.blocks) == 5
    assert code.path(main.head, main.head, main.blocks, is_copy) == 6
    assert code.path(main.head, main.head, main.blocks, is_copy, enough=0) == 5
    assert code.path(0, main.head) == 3
    assert code.path(0, None) == 5
    assert code.path(0, None, longest=True) == 11
    with pytest.raises(ValueError, match="to be reached from"):
        code.path(main.head, 0, main.blocks)


def test_a_branch_that_is_always_taken_has_one_successor() -> None:
    code = Code(listing("BRA <2>", "MOV R1, R2", "EXIT"))
    assert code.successors == [[2], [2], []]
    assert code.dominators[1] == set()


def test_figures_of_a_loop_are_per_step() -> None:
    products = ["HMMA.16816.F32 R8, R4, R6, R8"] * 32
    code = listing(
        "MUFU.RCP R3, R4", *products, "LDGSTS.E.128 [R1], [R2.64]", "@P0 BRA <1>", "STG.E.128 [R1.64], R4",
        "@P0 BRA <35>", "EXIT",
    )  # fmt: skip
    f = figures_of(Instance("conv", "half", (64, 64, 2, 2, 4, 2)), False, code, 128, 0, "90a")
    assert (f.loop, f.static, f.before, f.before_divisions, f.behind, f.store) == (34, 34, 1, 1, 34, 2)
    assert f.step_bytes == 16384
    assert f.limits("H200")["issue"] == 4 * 34 / 4
    twice = code.replace("<", "")
    assert figures_of(Instance("conv", "half", (64, 32, 2, 2, 4, 2)), False, twice, 128, 0, "90a").loop == 17
    with pytest.raises(ValueError, match="expected a loop"):
        figures_of(Instance("conv", "half", LARGE), False, listing("EXIT"), 128, 0, "90a")


def figures(**changes) -> Figures:
    """A large tile whose step is bound by the tensor cores on an A100."""
    values = {
        "instance": Instance("conv", "half", LARGE), "gradient": False, "loop": 100, "copying": 0, "static": 100,
        "loop_divisions": 0, "before": 0, "before_divisions": 0, "behind": 0, "store": 0, "matrix_loads": 8,
        "registers": 128, "shared_bytes": 0, "spills": 0, "blocks": 1,
    }  # fmt: skip
    return Figures(**{**values, **changes})


def test_a_layer_takes_its_steps_and_what_is_around_them() -> None:
    layer = Layer(256, 128, 16, 3)
    tiles_of_an_sm = -(-64 * 256 // 128 // 108)
    cycles = max(figures().limits("A100").values())
    seconds, limit = layer_time(layer, 64, "A100", figures())
    assert seconds == pytest.approx(tiles_of_an_sm * 36 * cycles / 1.41e9)
    assert limit in figures().limits("A100")
    slower, limit = layer_time(layer, 64, "A100", figures(before=40000))
    assert slower == pytest.approx(seconds + tiles_of_an_sm * 40000 * 8 / 4 / 1.41e9)
    assert limit == "instructions around the loop"
    assert layer_time(layer, 64, "A100", figures(loop=5000))[1] == "issue"


def test_no_layer_is_faster_than_the_peaks() -> None:
    for layer in LAYERS:
        kernel, tile, parts = choice(layer, 64, "A100")
        assert (kernel, parts) == ("conv", 1)
        warps = {(128, 128): (2, 4), (64, 64): (2, 2), (128, 32): (4, 1)}[tile]
        f = figures(instance=Instance("conv", "half", (*tile, *warps, 3, 1)), loop=1)
        assert layer_time(layer, 64, "A100", f)[0] >= least_time(layer, 64, "A100")


def test_choice_follows_the_launcher() -> None:
    assert choice(Layer(64, 256, 56, 1), 64, "H200") == ("warpgroup", (128, 256), 1)
    assert choice(Layer(256, 64, 56, 1), 64, "H200") == ("conv", (64, 64), 1)
    assert choice(Layer(64, 32, 56, 1), 64, "H200") == ("conv", (128, 32), 1)
    # Half of the SMs are enough for WGMMA.
    assert choice(Layer(512, 512, 7, 3), 64, "H200") == ("warpgroup", (128, 128), 1)
    assert choice(Layer(512, 512, 7, 3), 64, "A100") == ("conv", (64, 64), 1)
    assert choice(Layer(64, 256, 56, 1), 64, "A100") == ("conv", (128, 128), 1)
    # Few tiles and long sums.
    assert choice(Layer(512, 512, 7, 3), 1, "H200") == ("conv", (64, 64), 16)
    assert choice(Layer(512, 512, 7, 3), 8, "H200") == ("warpgroup", (128, 128), 8)
    assert choice(Layer(512, 512, 7, 3), 8, "A100") == ("conv", (64, 64), 1)


def test_parts_shorten_a_layer_of_few_tiles_and_cost_their_bytes() -> None:
    layer = Layer(512, 512, 7, 3)
    cycles = max(figures().limits("A100", 4).values())
    whole, _ = layer_time(layer, 1, "A100", figures())
    assert whole == pytest.approx(72 * cycles / 1.41e9)
    parted, _ = layer_time(layer, 1, "A100", figures(), 16)
    adding = 16 * 49 * 512 * 4 / GPUS["A100"].l2_bytes_per_s
    assert parted == pytest.approx(5 * max(figures().limits("A100", 64).values()) / 1.41e9 + adding)
    assert parted < whole


def test_few_sms_get_more_of_l2_each() -> None:
    l2 = [figures().limits("A100", sms)["L2"] for sms in (0, 54, 1)]
    assert l2[0] == pytest.approx(2 * l2[1]) or l2[1] == 32768 / 64
    assert l2[2] == 32768 / 64
