"""The study of training: its gate, memory, variants, rows, targets, curves and command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benches import gate, memory, rows
from benches.cases import CASES, LAYOUTS, Cell
from benches.training import __main__ as command
from benches.training import curve, layers, parts, report, step_baselines, steps, summary
from benches.training.cells import MODES, LayerCell, StepCell, layer_cells, passes, step_cells

TINY = Cell(next(case for case in CASES if case.shape == "7x7-512-512-k3s1"), 1, 0.25, "in", "nchw")
STEP = StepCell(2, 0.5, "nchw", "trained")
needs_peak = pytest.mark.skipif(not memory.can_measure_peak(), reason="needs glibc and /proc/self/clear_refs")


def test_cells_cover_every_setting_once() -> None:
    cells = layer_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES)
    assert len({cell.id for cell in cells}) == len(cells) == 27 * 2 * 3 * 2
    assert {(cell.cell.case.network, cell.cell.batch) for cell in cells} == {("resnet50", 8), ("resnet26", 32)}
    assert [cell.mode for cell in cells[:2]] == ["frozen", "trained"]
    assert {cell.cell.batch for cell in layer_cells(LAYOUTS, (0.5,), MODES, batch=3)} == {3}
    assert len({cell.id for cell in step_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES)}) == 12


def test_passes_begin_with_what_says_most_and_leave_nothing_out() -> None:
    found = passes(("channels_last", "nchw"), (0.9, 0.25, 0.5))
    assert found[:3] == [("nchw", 0.5), ("channels_last", 0.5), ("nchw", 0.25)]
    assert sorted(found) == sorted((layout, d) for layout in LAYOUTS for d in (0.9, 0.25, 0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_layer(layout: str, mode: str) -> None:
    cell = LayerCell(replace(TINY, layout=layout), mode)
    made = {row.variant: row for row in layers.LayerBench(peaks=False).rows(cell, layers.BASELINES, seconds=0)}
    assert tuple(made) == layers.BASELINES
    assert all(0 < row.max_error < 1e-4 and row.mode == mode and row.rounds >= 5 for row in made.values())
    assert all(
        row.forward_s and row.backward_s and row.forward_s + row.backward_s < 2 * row.p80_s for row in made.values()
    )
    x = 512 * 7 * 7 * 4
    assert {name: row.saved_bytes for name, row in made.items()} == {
        "masked": 2 * x,
        "dense": x,
        # The compact input, the sliced weight and, for the gathers, nothing but the list.
        "naive": x // 4 + 512 * 128 * 9 * 4 + 128 * 4,
        "auto": x,
    }
    dense, auto = made["dense"].gflop, made["auto"].gflop
    assert dense is not None
    full = dense / (3 if mode == "trained" else 2)
    assert auto == pytest.approx(full * (1.5 if mode == "trained" else 1.25))
    assert made["auto"].vs_masked == pytest.approx(made["masked"].p50_s / made["auto"].p50_s)


@pytest.mark.parametrize("wrong", ["input", "weight", "switch", "result"])
def test_gate_refuses_a_wrong_gradient(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.Variant.differentiate

    def spoilt(variant: layers.Variant, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        found = right(variant, x, grad)
        if "switch" in found:
            # The last channel alone is off by a little.
            found[wrong].select(min(1, found[wrong].dim() - 1), -1).add_(2e-3 * found[wrong].abs().max())
        return found

    monkeypatch.setattr(layers.Variant, "differentiate", spoilt)
    bench = layers.LayerBench(peaks=False)
    bench.rows(LayerCell(TINY, "trained"), ("dense", "naive"), 0)
    with pytest.raises(gate.WrongResultError, match=rf"auto \({wrong}\) on resnet50-b1-7x7"):
        bench.rows(LayerCell(TINY, "trained"), ("dense", "auto"), 0)


def test_output_gradients_are_no_inputs() -> None:
    layer = layers.LayerBench(peaks=False).layer(TINY)
    assert layer.problem.inputs[0].shape == layer.gradients[0].shape
    both = torch.stack([layer.problem.inputs[0].detach().flatten(), layer.gradients[0].flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05
    assert layer.switch.sum() == TINY.K_in == 128


def test_variants_are_named() -> None:
    with pytest.raises(ValueError, match=r"variant\(\): expected `name` to be one of masked.*got 'fast'"):
        layers.LayerBench(peaks=False).layer(TINY).variant("fast", "frozen")
    with pytest.raises(ValueError, match=r"model\(\): expected `name` to be one of masked.*got 'best'"):
        steps.StepBench(peaks=False).model(STEP, "best")


def test_saved_bytes_counts_tensors_once_and_no_parameters() -> None:
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)

    def forward() -> Tensor:
        y = torch.conv2d(x, weight)
        return torch.conv2d(y.relu_(), weight) * y

    assert memory.saved_bytes(forward, [weight]) == 3 * x.numel() * 4
    assert memory.saved_bytes(forward, []) == 3 * x.numel() * 4 + weight.numel() * 4
    with torch.no_grad():
        assert memory.saved_bytes(forward, [weight]) == 0


def _three_at_once() -> int:
    def run() -> None:
        first = torch.ones(8 << 18)
        second = first + 1
        third = first + second
        del first, second, third
        torch.ones(8 << 18)

    # Threads and code that the first call brings in do not count here.
    run()
    return memory.peak_bytes(run)


@needs_peak
def test_peak_is_what_is_held_at_once() -> None:
    assert memory.in_fresh_process(_three_at_once) / 2**20 == pytest.approx(24, abs=1)


@needs_peak
def test_peak_of_a_layer() -> None:
    bench = layers.LayerBench()
    cell = LayerCell(replace(TINY, batch=16), "frozen")
    try:
        made = {row.variant: row.peak_bytes for row in bench.rows(cell, ("masked", "auto"), 0)}
    finally:
        bench.close()
    # The result and the input's gradient at least; masked also keeps the product.
    x = 16 * 512 * 49 * 4
    assert made["auto"] is not None
    assert made["masked"] is not None
    assert made["auto"] > 1.9 * x
    assert made["masked"] > 2.9 * x


def test_steps_are_the_same_network() -> None:
    bench = steps.StepBench(peaks=False)
    cell = replace(STEP, mode="frozen")
    models = {name: bench.model(cell, name) for name in steps.BASELINES}
    named = {name: {where for where, _ in steps.trained(model)} for name, model in models.items()}
    assert named["auto"] == named["masked"]
    scores = {where for where in named["auto"] if where.endswith(".score")}
    assert len(scores) == 24
    assert not any(where.startswith("conv1") for where in scores)
    assert named["dense"] == named["naive"] == named["auto"] - scores
    assert len(named["dense"]) == 2 * 25 + 2
    for where, score in steps.trained(models["auto"]):
        if where in scores:
            assert (score > steps.THRESHOLD).sum() == len(score) // 2
            naive = models["naive"].get_submodule(where.removesuffix(".score"))
            assert isinstance(naive, step_baselines.NaiveSwitchConv2d)
            assert naive.on.tolist() == (score > steps.THRESHOLD).nonzero().flatten().tolist()


def test_rows_of_a_step() -> None:
    made = {row.variant: row for row in steps.StepBench(peaks=False).rows(STEP, steps.BASELINES, seconds=0)}
    assert tuple(made) == steps.BASELINES
    masked, auto, naive = made["masked"], made["auto"], made["naive"]
    assert all(0 < row.max_error < steps.TOLERANCE for row in (masked, auto, naive))
    assert auto.saved_bytes is not None
    assert masked.saved_bytes is not None
    assert made["dense"].saved_bytes == pytest.approx(auto.saved_bytes, rel=0.01)
    assert masked.saved_bytes > 1.3 * auto.saved_bytes
    # Half of every weight and of every input is copied, beside what batch norm and ReLU keep.
    assert naive.saved_bytes is not None
    weights = [p for name, p in step_baselines.plain().named_parameters() if p.dim() == 4 and name != "conv1.weight"]
    sliced = 4 * sum(weight.numel() for weight in weights) / 2
    assert auto.saved_bytes + sliced < naive.saved_bytes < masked.saved_bytes + sliced
    assert naive.vs_masked == pytest.approx(masked.p50_s / naive.p50_s)
    assert all(row.forward_s and row.backward_s and row.optimiser_s and row.case == "step" for row in made.values())


def _unscored(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if name != "layer1.0.conv1.score"}


def _nudged(found: dict[str, Tensor]) -> dict[str, Tensor]:
    found["layer3.1.conv2.score"][-1] += 0.05 * found["layer3.1.conv2.score"].norm()
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_nudged, r"auto on resnet26-b2-step.*layer3\.1\.conv2\.score"), (_unscored, "same parameters")],
)
def test_gate_refuses_a_wrong_step(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = steps.gradients
    bench = steps.StepBench(peaks=False)
    reference = bench.reference(STEP)
    step = bench.prepare(STEP, "auto")
    bench.gated("auto", step, STEP, reference)
    monkeypatch.setattr(steps, "gradients", lambda *given: spoil(right(*given)))
    with pytest.raises(gate.WrongResultError, match=message):
        bench.gated("auto", step, STEP, reference)


def test_gate_refuses_a_naive_step_of_other_channels() -> None:
    bench = steps.StepBench(peaks=False)
    reference = bench.reference(STEP)
    step = bench.prepare(STEP, "naive")
    assert bench.gated("naive", step, STEP, reference) < steps.TOLERANCE
    layer = step.model.get_submodule("layer3.1.conv2")
    assert isinstance(layer, step_baselines.NaiveSwitchConv2d)
    off = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    off[layer.on] = False
    layer.on[0] = off.nonzero()[0, 0]
    with pytest.raises(gate.WrongResultError, match="naive on resnet26-b2-step"):
        bench.gated("naive", step, STEP, reference)


def test_turned_switches_are_noticed() -> None:
    model = steps.StepBench(peaks=False).model(STEP, "masked")
    steps.check_density("masked", model, STEP)
    with torch.no_grad():
        dict(steps.trained(model))["layer2.0.conv1.score"][0] *= -1
    with pytest.raises(gate.WrongResultError, match=r"keep its switches, got masked: layer2\.0\.conv1\.score"):
        steps.check_density("masked", model, STEP)


def make_row(cell: LayerCell | StepCell, variant: str, seconds: float, **changes: object) -> rows.Row:
    inner = cell.cell if isinstance(cell, LayerCell) else cell
    values: dict[str, object] = {
        "network": "resnet26",
        "case": "step",
        "cell": cell.id,
        "variant": variant,
        "candidate": "",
        "device": "cpu",
        "dtype": "float32",
        "layout": inner.layout,
        "batch": inner.batch,
        "density": inner.density,
        "lists": "in",
        "seed": inner.seed,
        "threads": 2,
        "inputs": "warm",
        "rounds": 5,
        "p20_s": 0.9 * seconds,
        "p50_s": seconds,
        "p80_s": 1.1 * seconds,
        "max_error": 1e-6,
        "mode": cell.mode,
        "forward_s": seconds / 3,
        "backward_s": seconds / 2,
        "optimiser_s": seconds / 6,
        "saved_bytes": 2**20,
        "peak_bytes": int(2**21 * seconds),
    }
    if isinstance(cell, LayerCell):
        case = cell.cell.case
        values |= {"network": case.network, "case": case.shape, "C_in": case.C_in, "optimiser_s": None}
    return rows.Row(**{**values, **changes})  # type: ignore[arg-type]


def synthetic() -> list[rows.Row]:
    """Rows on which ours takes 0.4 + 0.4 d of the reference's time, and so of its memory."""
    found = []
    for cell in [*layer_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES), *step_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES)]:
        density = cell.cell.density if isinstance(cell, LayerCell) else cell.density
        pairs = [("masked", 1.0), ("dense", 0.9), ("naive", 0.8), ("auto", 0.4 + 0.4 * density)]
        found += rows.with_ratios(make_row(cell, variant, seconds) for variant, seconds in pairs)
    return found


HEADER = {
    "same": {
        "commit": "abc",
        "cpu": "a",
        "threads": 2,
        "isa": "avx2",
        "pytorch_isa": "AVX2",
        "versions": {"torch": "2"},
    },
    "cores": 2,
    "cache_bytes": 2**25,
    "system": "Linux",
    "started": "now",
    "dtype": "float32",
    "roof": {"matmul_flop_per_s": 1e11, "register_flop_per_s": None, "bytes_per_s": 1e10, "flop_per_s": 1e11},
    "build": {},
}


def test_verdicts() -> None:
    found = {(v.title, v.setting.layout, v.setting.mode, v.setting.density): v for v in summary.verdicts(synthetic())}
    assert len(found) == 4 * 12
    layer = found[summary.LAYER, "nchw", "trained", 0.5]
    assert (layer.figure, layer.count, layer.met) == (pytest.approx(1 / 0.6), 27, True)
    step = found[summary.WHOLE_STEP, "channels_last", "frozen", 0.25]
    assert (step.figure, step.wanted, step.met) == (pytest.approx(2.0), 2.2, False)
    assert found[f"step, {summary.MEMORY}", "nchw", "frozen", 0.25].figure == pytest.approx(0.5, rel=1e-3)


def test_memory_is_missed_by_one_case() -> None:
    made = [
        make_row(cell, variant, 1.0)
        for cell in layer_cells(("nchw",), (0.5,), ("frozen",))
        for variant in ("masked", "auto")
    ]
    assert made[-1].peak_bytes is not None
    made[-1] = replace(made[-1], peak_bytes=made[-1].peak_bytes + 1)
    (verdict,) = [v for v in summary.verdicts(made) if v.title.endswith(summary.MEMORY)]
    assert not verdict.met


def make_curves() -> list[curve.Curve]:
    found = []
    for dtype, difference in (("float32", 0.25), ("float64", 0.0)):
        found.append(curve.Curve("masked", dtype, [3.0, 2.0] * 30, 0.5, [True, False]))
        found.append(curve.Curve("auto", dtype, [3.0, 2.0] * 29 + [3.0, 2.0 - difference], 1.0, [True, True]))
        found.append(curve.Curve("channels_last", dtype, [3.0, 2.0] * 28 + [3.0, 2.5] * 2, 0.5, [True, False]))
        found.append(curve.Curve("reversed", dtype, [3.0, 2.0] * 29 + [3.0, 2.125], 0.5, [True, False]))
    return found


def test_report_from_rows_and_curves_alone(tmp_path: Path) -> None:
    made, curves = synthetic(), make_curves()
    curve.write(tmp_path, curves)
    assert curve.read(tmp_path) == curves
    tables = {table.title: table for table in report.write(tmp_path, HEADER, made, curves)}
    table = tables["Loss curves: differences"]
    assert table.rows[0][:7] == ["float32", "ours", "0.0e+00", "2.5e-01", "59", "59", "1 of 2"]
    assert table.rows[3][:7] == ["float64", "ours", "0.0e+00", "0.0e+00", "never", "never", "1 of 2"]
    assert [row[5] for row in table.rows[:3]] == ["59", "57", "59"]
    assert "In float32 ours parts from masked autograd no sooner than, and no further than, masked" in table.note
    text = (tmp_path / "report.md").read_text()
    assert "| layer over masked autograd | nchw | trained | 0.5 | 27 | 1.40 | 1.67 | met |" in text
    assert (
        "| nchw | frozen | 0.25 | ours | 500 ms | 167 ms | 250 ms | 83.3 ms | 2.00 | 1.80 | 1.60 | 1.0 | 1.0 |" in text
    )
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == {"layers", "steps", "memory", "curve"}
    assert rows.read_json(tmp_path / "results.json")[1] == rows.read_csv(tmp_path / "results.csv") == made


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_step(mode: str, tmp_path: Path) -> None:
    cell = replace(STEP, mode=mode)
    (one,) = parts.measure_all(steps.StepBench(peaks=False), [cell], tmp_path, lambda: True, lambda: None)
    assert parts.read(tmp_path) == [one]
    assert one.forward_work == pytest.approx(0.5)
    # First convolutions of blocks get a gradient in half of their channels, second ones in all; of the four of a stage,
    # the one that halves the resolution has half of the work.
    live = (3.5 * 0.5 + 4) / 7.5
    assert one.backward_work == pytest.approx(live if mode == "frozen" else live * (1 + 0.5) / 2, rel=1e-3)
    assert all(value > 0 for seconds in one.seconds.values() for value in seconds.values())
    table = report.parts_table([one])
    assert [row[3] for row in table.rows] == ["masked autograd", "ours"]


def test_bound_is_what_the_arithmetic_leaves() -> None:
    seconds = dict(zip((parts.FORWARD, parts.BACKWARD, parts.NORM, parts.REST), (4.0, 4.0, 1.0, 3.0), strict=True))
    one = parts.Parts("", "nchw", "frozen", 0.5, {"masked": seconds, "auto": {**seconds, parts.REST: 1.0}}, 0.5, 0.75)
    assert one.bound == pytest.approx(12 / (2 + 3 + 1 + 1))
    assert one.speedup == pytest.approx(12 / 10)
    names = (
        "aten::mkldnn_convolution",
        "bap_kernels::switched_conv2d_backward",
        "aten::native_batch_norm",
        "aten::mul",
    )
    assert [parts.part_of(name) for name in names] == [parts.FORWARD, parts.BACKWARD, parts.NORM, parts.REST]


def test_older_rows_are_of_inference() -> None:
    values = {name: value for name, value in vars(synthetic()[0]).items() if name in rows.REQUIRED}
    assert rows.from_dict(values).mode == "inference"


def test_nothing_turns_no_report_into_an_error(tmp_path: Path) -> None:
    assert [table.title for table in report.write(tmp_path, HEADER, [], [])] == ["Machine", "Every case"]


@pytest.mark.slow
def test_command_goes_on_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--layers", "--only", "7x7-512-512", "--layout", "nchw", "--density", "0.5"]
    arguments += ["--batch", "1", "--no-peaks"]
    assert command.main([*arguments, "--mode", "frozen", "--device", "cpu"]) == 0
    first = (tmp_path / "rows.jsonl").read_text()
    assert command.main(arguments) == 0
    assert (tmp_path / "rows.jsonl").read_text().startswith(first)
    assert {row.mode for row in rows.read_json(tmp_path / "results.json")[1]} == {"frozen", "trained"}
    assert "Report:" in capsys.readouterr().out
