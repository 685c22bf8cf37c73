"""The study of training: gate, memory, variants, rows, targets, curves and command line."""

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

from benches import gate, memory, rows, timers
from benches.cases import CASES, LAYOUTS, Cell
from benches.training import __main__ as command
from benches.training import curve, layers, parts, report, step_baselines, steps, summary
from benches.training.cells import MODES, LayerCell, StepCell, layer_cells, passes, step_cells
from tests.benches.test_study import HEADER

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


def test_passes_begin_with_half_density_and_are_complete() -> None:
    pairs = passes(("channels_last", "nchw"), (0.9, 0.25, 0.5))
    assert pairs[:3] == [("nchw", 0.5), ("channels_last", 0.5), ("nchw", 0.25)]
    assert sorted(pairs) == sorted((layout, d) for layout in LAYOUTS for d in (0.9, 0.25, 0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layer_rows_have_errors_memory_and_work(layout: str, mode: str) -> None:
    cell = LayerCell(replace(TINY, layout=layout), mode)
    by_variant = {row.variant: row for row in layers.LayerBench(peaks=False).rows(cell, layers.VARIANTS, seconds=0)}
    assert tuple(by_variant) == layers.VARIANTS
    assert all(0 < row.max_error < 1e-4 and row.mode == mode and row.rounds >= 5 for row in by_variant.values())
    assert all(
        row.forward_s and row.backward_s and row.forward_s + row.backward_s < 2 * row.p80_s
        for row in by_variant.values()
    )
    x = 512 * 7 * 7 * 4
    assert {name: row.saved_bytes for name, row in by_variant.items()} == {
        "masked": 2 * x,
        "dense": x,
        # Compact input, sliced weight and the list.
        "naive": x // 4 + 512 * 128 * 9 * 4 + 128 * 4,
        "auto": x,
    }
    dense, auto = by_variant["dense"].gflop, by_variant["auto"].gflop
    assert dense is not None
    full = dense / (3 if mode == "trained" else 2)
    assert auto == pytest.approx(full * (1.5 if mode == "trained" else 1.25))
    assert by_variant["auto"].vs_masked == pytest.approx(by_variant["masked"].p50_s / by_variant["auto"].p50_s)


@pytest.mark.parametrize("wrong", ["input", "weight", "switch", "result"])
def test_wrong_gradient_raises(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    differentiate = layers.Variant.differentiate

    def corrupt(variant: layers.Variant, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        results = differentiate(variant, x, grad)
        if "switch" in results:
            # Only the last channel has a small error.
            tensor = results[wrong]
            tensor.select(min(1, tensor.dim() - 1), -1).add_(2e-3 * tensor.abs().max())
        return results

    monkeypatch.setattr(layers.Variant, "differentiate", corrupt)
    bench = layers.LayerBench(peaks=False)
    bench.rows(LayerCell(TINY, "trained"), ("dense", "naive"), 0)
    with pytest.raises(gate.WrongResultError, match=rf"auto \({wrong}\) on resnet50-b1-7x7"):
        bench.rows(LayerCell(TINY, "trained"), ("dense", "auto"), 0)


def test_output_gradients_are_independent_of_inputs() -> None:
    layer = layers.LayerBench(peaks=False).layer(TINY)
    assert layer.problem.inputs[0].shape == layer.gradients[0].shape
    both = torch.stack([layer.problem.inputs[0].detach().flatten(), layer.gradients[0].flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05
    assert layer.switch.sum() == TINY.K_in == 128


def test_unknown_variant_raises() -> None:
    with pytest.raises(ValueError, match=r"variant\(\): expected `name` to be one of masked.*got 'fast'"):
        layers.LayerBench(peaks=False).layer(TINY).variant("fast", "frozen")
    with pytest.raises(ValueError, match=r"model\(\): expected `name` to be one of masked.*got 'fast'"):
        steps.StepBench(peaks=False).model(STEP, "fast")


def test_saved_bytes_counts_tensors_once_without_parameters() -> None:
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)

    def forward() -> Tensor:
        y = torch.conv2d(x, weight)
        return torch.conv2d(y.relu_(), weight) * y

    assert memory.saved_bytes(forward, [weight]) == 3 * x.numel() * 4
    assert memory.saved_bytes(forward, []) == 3 * x.numel() * 4 + weight.numel() * 4
    with torch.no_grad():
        assert memory.saved_bytes(forward, [weight]) == 0


def _peak_of_three_tensors() -> int:
    def run() -> None:
        first = torch.ones(8 << 18)
        second = first + 1
        third = first + second
        del first, second, third
        torch.ones(8 << 18)

    # The first call starts threads and loads code.
    run()
    return memory.peak_bytes(run)


@needs_peak
def test_peak_counts_live_tensors() -> None:
    assert memory.in_fresh_process(_peak_of_three_tensors) / 2**20 == pytest.approx(24, abs=1)


@needs_peak
def test_layer_peak_includes_gradients() -> None:
    bench = layers.LayerBench()
    cell = LayerCell(replace(TINY, batch=16), "frozen")
    try:
        by_variant = {row.variant: row.peak_bytes for row in bench.rows(cell, ("masked", "auto"), 0)}
    finally:
        bench.close()
    # At least result and input gradient; masked also saves the product.
    x = 16 * 512 * 49 * 4
    assert by_variant["auto"] is not None
    assert by_variant["masked"] is not None
    assert by_variant["auto"] > 1.9 * x
    assert by_variant["masked"] > 2.9 * x


def test_step_variants_share_parameters() -> None:
    bench = steps.StepBench(peaks=False)
    cell = replace(STEP, mode="frozen")
    models = {name: bench.model(cell, name) for name in steps.VARIANTS}
    named = {name: {parameter for parameter, _ in steps.trained(model)} for name, model in models.items()}
    assert named["auto"] == named["masked"]
    scores = {parameter for parameter in named["auto"] if parameter.endswith(".score")}
    assert len(scores) == 24
    assert not any(parameter.startswith("conv1") for parameter in scores)
    assert named["dense"] == named["naive"] == named["auto"] - scores
    assert len(named["dense"]) == 2 * 25 + 2
    for parameter, score in steps.trained(models["auto"]):
        if parameter in scores:
            assert (score > steps.THRESHOLD).sum() == len(score) // 2
            naive = models["naive"].get_submodule(parameter.removesuffix(".score"))
            assert isinstance(naive, step_baselines.NaiveSwitchConv2d)
            assert naive.on.tolist() == (score > steps.THRESHOLD).nonzero().flatten().tolist()


def test_step_rows_have_errors_memory_and_phases() -> None:
    by_variant = {row.variant: row for row in steps.StepBench(peaks=False).rows(STEP, steps.VARIANTS, seconds=0)}
    assert tuple(by_variant) == steps.VARIANTS
    masked, auto, naive = by_variant["masked"], by_variant["auto"], by_variant["naive"]
    assert all(0 < row.max_error < steps.TOLERANCE for row in (masked, auto, naive))
    assert auto.saved_bytes is not None
    assert masked.saved_bytes is not None
    assert by_variant["dense"].saved_bytes == pytest.approx(auto.saved_bytes, rel=0.01)
    assert masked.saved_bytes > 1.3 * auto.saved_bytes
    # Naive also saves copies of half of every weight.
    assert naive.saved_bytes is not None
    weights = [p for name, p in step_baselines.plain().named_parameters() if p.dim() == 4 and name != "conv1.weight"]
    sliced = 4 * sum(weight.numel() for weight in weights) / 2
    assert auto.saved_bytes + sliced < naive.saved_bytes < masked.saved_bytes + sliced
    assert naive.vs_masked == pytest.approx(masked.p50_s / naive.p50_s)
    assert all(
        row.forward_s and row.backward_s and row.optimiser_s and row.case == "step" for row in by_variant.values()
    )


def _without_score(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in gradients.items() if name != "layer1.0.conv1.score"}


def _with_wrong_score(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients["layer3.1.conv2.score"][-1] += 0.05 * gradients["layer3.1.conv2.score"].norm()
    return gradients


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [(_with_wrong_score, r"auto on resnet26-b2-step.*layer3\.1\.conv2\.score"), (_without_score, "same parameters")],
)
def test_wrong_step_raises(
    corrupt: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = steps.gradients
    bench = steps.StepBench(peaks=False)
    reference = bench.reference(STEP)
    step = bench.prepare(STEP, "auto")
    bench.check("auto", step, STEP, reference)
    monkeypatch.setattr(steps, "gradients", lambda *arguments: corrupt(gradients(*arguments)))
    with pytest.raises(gate.WrongResultError, match=message):
        bench.check("auto", step, STEP, reference)


def test_naive_step_of_wrong_channels_raises() -> None:
    bench = steps.StepBench(peaks=False)
    reference = bench.reference(STEP)
    step = bench.prepare(STEP, "naive")
    assert bench.check("naive", step, STEP, reference) < steps.TOLERANCE
    layer = step.model.get_submodule("layer3.1.conv2")
    assert isinstance(layer, step_baselines.NaiveSwitchConv2d)
    off = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    off[layer.on] = False
    layer.on[0] = off.nonzero()[0, 0]
    with pytest.raises(gate.WrongResultError, match="naive on resnet26-b2-step"):
        bench.check("naive", step, STEP, reference)


def test_flipped_switch_raises() -> None:
    model = steps.StepBench(peaks=False).model(STEP, "masked")
    steps.check_density("masked", model, STEP)
    with torch.no_grad():
        dict(steps.trained(model))["layer2.0.conv1.score"][0] *= -1
    with pytest.raises(gate.WrongResultError, match=r"keep its switches, got masked: layer2\.0\.conv1\.score"):
        steps.check_density("masked", model, STEP)


def make_row(cell: LayerCell | StepCell, variant: str, seconds: float, **changes: object) -> rows.Row:
    inner = cell.cell if isinstance(cell, LayerCell) else cell
    fields: dict[str, object] = {"network": "resnet26", "case": "step", "cell": cell.id, "variant": variant}
    fields |= {"max_error": 1e-6, "mode": cell.mode, "saved_bytes": 2**20, "peak_bytes": int(2**21 * seconds)}
    fields |= {"forward_s": seconds / 3, "backward_s": seconds / 2, "optimiser_s": seconds / 6}
    if isinstance(cell, LayerCell):
        case = cell.cell.case
        fields |= {"network": case.network, "case": case.shape, "C_in": case.C_in, "optimiser_s": None}
    spread = timers.Spread(0.9 * seconds, seconds, 1.1 * seconds, 5)
    return rows.row_of(inner, spread, **{**fields, **changes})


def synthetic() -> list[rows.Row]:
    """Rows in which ours takes 0.4 + 0.4 d of the reference's time and memory."""
    result = []
    for cell in [*layer_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES), *step_cells(LAYOUTS, (0.75, 0.5, 0.25), MODES)]:
        density = cell.cell.density if isinstance(cell, LayerCell) else cell.density
        pairs = [("masked", 1.0), ("dense", 0.9), ("naive", 0.8), ("auto", 0.4 + 0.4 * density)]
        result += rows.with_ratios(make_row(cell, variant, seconds) for variant, seconds in pairs)
    return result


def test_verdicts_compare_ratios_with_targets() -> None:
    verdicts = {
        (v.title, v.setting.layout, v.setting.mode, v.setting.density): v for v in summary.verdicts(synthetic())
    }
    assert len(verdicts) == 4 * 12
    layer = verdicts[summary.LAYER, "nchw", "trained", 0.5]
    assert (layer.ratio, layer.count, layer.met) == (pytest.approx(1 / 0.6), 27, True)
    step = verdicts[summary.WHOLE_STEP, "channels_last", "frozen", 0.25]
    assert (step.ratio, step.goal, step.met) == (pytest.approx(2.0), 2.2, False)
    assert verdicts[f"step, {summary.MEMORY}", "nchw", "frozen", 0.25].ratio == pytest.approx(0.5, rel=1e-3)


def test_largest_case_decides_for_memory() -> None:
    measured = [
        make_row(cell, variant, 1.0)
        for cell in layer_cells(("nchw",), (0.5,), ("frozen",))
        for variant in ("masked", "auto")
    ]
    assert measured[-1].peak_bytes is not None
    measured[-1] = replace(measured[-1], peak_bytes=measured[-1].peak_bytes + 1)
    (verdict,) = [v for v in summary.verdicts(measured) if v.title.endswith(summary.MEMORY)]
    assert not verdict.met


def make_curves() -> list[curve.Curve]:
    curves = []
    for dtype, difference in (("float32", 0.25), ("float64", 0.0)):
        curves.append(curve.Curve("masked", dtype, [3.0, 2.0] * 30, 0.5, [True, False]))
        curves.append(curve.Curve("auto", dtype, [3.0, 2.0] * 29 + [3.0, 2.0 - difference], 1.0, [True, True]))
        curves.append(curve.Curve("channels_last", dtype, [3.0, 2.0] * 28 + [3.0, 2.5] * 2, 0.5, [True, False]))
        curves.append(curve.Curve("reversed", dtype, [3.0, 2.0] * 29 + [3.0, 2.125], 0.5, [True, False]))
    return curves


def test_report_has_tables_plots_and_files(tmp_path: Path) -> None:
    measured, curves = synthetic(), make_curves()
    curve.write(tmp_path, curves)
    assert curve.read(tmp_path) == curves
    tables = {table.title: table for table in report.write(tmp_path, HEADER, measured, curves)}
    table = tables["Loss curves: differences"]
    assert table.rows[0][:7] == ["float32", "ours", "0.0e+00", "2.5e-01", "59", "59", "1 of 2"]
    assert table.rows[3][:7] == ["float64", "ours", "0.0e+00", "0.0e+00", "never", "never", "1 of 2"]
    assert [row[5] for row in table.rows[:3]] == ["59", "57", "59"]
    assert "In float32 ours diverges from masked autograd no sooner than, and no further than, masked" in table.note
    text = (tmp_path / "report.md").read_text()
    assert "| layer over masked autograd | nchw | trained | 0.5 | 27 | 1.40 | 1.67 | met |" in text
    assert (
        "| nchw | frozen | 0.25 | ours | 500 ms | 167 ms | 250 ms | 83.3 ms | 2.00 | 1.80 | 1.60 | 1.0 | 1.0 |" in text
    )
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == {"layers", "steps", "memory", "curve"}
    assert rows.read_json(tmp_path / "results.json")[1] == measured


@pytest.mark.parametrize("mode", MODES)
def test_parts_have_work_and_seconds(mode: str, tmp_path: Path) -> None:
    cell = replace(STEP, mode=mode)
    (profile,) = parts.measure_all(steps.StepBench(peaks=False), [cell], tmp_path, lambda: True, lambda: None)
    assert parts.read(tmp_path) == [profile]
    assert profile.forward_work == pytest.approx(0.5)
    # First convolutions of blocks get a gradient in half of their channels, second ones in all; of the four of a stage,
    # the one that halves the resolution has half of the work.
    live = (3.5 * 0.5 + 4) / 7.5
    assert profile.backward_work == pytest.approx(live if mode == "frozen" else live * (1 + 0.5) / 2, rel=1e-3)
    assert all(value > 0 for seconds in profile.seconds.values() for value in seconds.values())
    table = report.parts_table([profile])
    assert [row[3] for row in table.rows] == ["masked autograd", "ours"]


def test_bound_scales_convolutions_by_their_work() -> None:
    seconds = dict(zip((parts.FORWARD, parts.BACKWARD, parts.NORM, parts.REST), (4.0, 4.0, 1.0, 3.0), strict=True))
    profile = parts.Parts(
        "", "nchw", "frozen", 0.5, {"masked": seconds, "auto": {**seconds, parts.REST: 1.0}}, 0.5, 0.75
    )
    assert profile.bound == pytest.approx(12 / (2 + 3 + 1 + 1))
    assert profile.speedup == pytest.approx(12 / 10)
    names = (
        "aten::mkldnn_convolution",
        "bap_kernels::switched_conv2d_backward",
        "aten::native_batch_norm",
        "aten::mul",
    )
    assert [parts.part_of(name) for name in names] == [parts.FORWARD, parts.BACKWARD, parts.NORM, parts.REST]


def test_row_without_mode_is_inference() -> None:
    values = {name: value for name, value in vars(synthetic()[0]).items() if name in rows.REQUIRED}
    assert rows.from_dict(values).mode == "inference"


def test_report_without_rows_has_machine_and_cases(tmp_path: Path) -> None:
    assert [table.title for table in report.write(tmp_path, HEADER, [], [])] == ["Machine", "Every case"]


@pytest.mark.slow
def test_command_continues_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--layers", "--only", "7x7-512-512", "--layout", "nchw", "--density", "0.5"]
    arguments += ["--batch", "1", "--no-peaks"]
    assert command.main([*arguments, "--mode", "frozen", "--device", "cpu"]) == 0
    first = (tmp_path / "rows.jsonl").read_text()
    assert command.main(arguments) == 0
    assert (tmp_path / "rows.jsonl").read_text().startswith(first)
    assert {row.mode for row in rows.read_json(tmp_path / "results.json")[1]} == {"frozen", "trained"}
    assert "Report:" in capsys.readouterr().out
