"""Benchmarks of whole networks: cells, variants, compiled networks, several domains."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("torchvision")

from bap.export import formats

from benches import (
    compiled,
    engines,
    gate,
    memory_of_domains,
    network_models,
    networks,
    ours,
    packed_memory,
    report,
    rows,
    study,
)
from benches.memory_of_domains import Served, Serving, timed_row
from benches.network_models import NetworkCell, network_cells
from benches.networks import NetworkBench
from tests.benches.test_study import HEADER

CPU = torch.device("cpu")


def _tiny() -> nn.Module:
    from bap.models import ResNet26

    return ResNet26(num_classes=8, widths=(16, 24, 32), blocks=(1, 1, 1))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a small network."""
    monkeypatch.setitem(network_models.NETWORKS, "tiny", (_tiny, 16))
    yield "tiny"
    ours.package().use_backend("auto")
    ours.clear_packed()


def test_network_cells_are_unique_and_begin_with_half_density() -> None:
    default = network_cells((1, 8), (0.5,), ("nchw",))
    assert [cell.network for cell in default] == ["resnet50", "resnet26"] * 2
    cells = network_cells((1,), (0.75, 0.5), ("nchw",), list(network_models.NETWORKS))
    assert len({cell.id for cell in cells}) == len(cells) == 2 * len(network_models.NETWORKS)
    assert cells[0].density == 0.5


@pytest.mark.parametrize("network", network_models.NETWORKS)
def test_networks_accept_their_image_size(network: str) -> None:
    build, size = network_models.NETWORKS[network]
    with torch.device("meta"):
        y = build().eval()(torch.empty(2, 3, size, size))
    assert y.shape[0] == 2
    assert y.dim() == 2


def test_grouped_convolutions_have_no_lists() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    assert list(network_models.in_lists(model, 0.5, 0)) == ["2"]


def test_flop_counts_the_channels_that_a_filter_reads() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1, bias=False))
    full, kept = network_models.conv_flop(model, torch.zeros(1, 8, 5, 5), {"1": torch.arange(3)})
    depthwise = 2 * 8 * 9 * 9
    assert (full, kept) == (depthwise + 2 * 9 * 4 * 8, depthwise + 2 * 9 * 4 * 3)


def test_network_rows_have_errors_and_peaks(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The small network does not exist in a new process.
    monkeypatch.setattr(networks, "can_measure_peak", lambda: True)
    monkeypatch.setattr(networks, "in_fresh_process", lambda *arguments: 1000)
    bench = NetworkBench(CPU, "float32", 4, peaks=True)
    names = ["dense", "masked", "planned", "ordered", "pruned"]
    of_bench = bench.rows(NetworkCell(tiny, 2, 0.5, "channels_last"), names, 0.0)
    assert [row.variant for row in of_bench] == names
    assert all(row.rounds == 8 and row.peak_bytes == 1000 and row.vs_masked for row in of_bench)
    assert all(0 < row.max_error < 1e-3 for row in of_bench[1:])
    assert of_bench[4].weight_bytes < of_bench[0].weight_bytes  # type: ignore[operator]
    (table,) = [table for table in report.tables(HEADER, of_bench) if table.title == "Whole networks"]
    assert len(table.rows) == len(names)


def test_wrong_logits_raise(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "mask_", lambda model, lists: model)
    with pytest.raises(gate.WrongResultError, match="logits of planned on tiny"):
        NetworkBench(CPU, "float32").rows(NetworkCell(tiny, 1, 0.5, "nchw"), ["planned"], 0.0)


@pytest.mark.slow
def test_compiled_dense_network_is_reused(tiny: str) -> None:
    bench = NetworkBench(CPU, "float32", 2)
    of_bench = bench.rows(NetworkCell(tiny, 2, 0.5, "channels_last"), ["dense", "compiled", "compiled_dense"], 0.0)
    assert 0 < of_bench[1].max_error < 1e-3
    assert of_bench[2].gflop == of_bench[0].gflop
    # The next density reuses the dense network.
    compiled_dense = bench._compiled_dense
    bench.rows(NetworkCell(tiny, 2, 0.25, "channels_last"), ["compiled_dense"], 0.0)
    assert bench._compiled_dense is compiled_dense


@pytest.mark.slow
@torch.no_grad()
def test_frozen_compiles_for_each_batch() -> None:
    model = _tiny().eval()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(compiled.frozen(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_engine_rows_stand_beside_the_plan(tiny: str, engine: str) -> None:
    if reason := engines.missing_reason(engine):
        pytest.skip(reason)
    names = ["dense", "masked", "planned", "pruned", engine]
    of_bench = bench_rows(tiny, names)
    assert [row.variant for row in of_bench] == names
    assert 0 < of_bench[4].max_error < 1e-3
    (table,) = [table for table in report.tables(HEADER, of_bench) if table.title == "Whole networks"]
    planned, pruned = table.rows[2], table.rows[3]
    times = {row.variant: row.p50_s for row in of_bench}
    column = table.columns.index("/ fastest copy")
    assert planned[column] == f"{min(times['pruned'], times[engine]) / times['planned']:.2f}"
    assert pruned[column] == "–"


def bench_rows(network: str, names: list[str]) -> list[rows.Row]:
    return NetworkBench(CPU, "float32").rows(NetworkCell(network, 2, 0.5, "channels_last"), names, 0.0)


@pytest.mark.parametrize("engine", engines.ENGINES)
@torch.inference_mode()
def test_engine_results_do_not_overwrite_each_other(engine: str) -> None:
    if reason := engines.missing_reason(engine):
        pytest.skip(reason)
    model, x = _tiny().eval(), torch.randn(2, 3, 16, 16)
    run = engines.deployed(engine, model, x, threads=1)
    first, second = run(x), run(-x)
    torch.testing.assert_close(first, model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, model(-x), rtol=1e-4, atol=1e-4)


def test_engines_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32 only, not on cpu in bfloat16" in engines.missing_reason("openvino", dtype="bfloat16")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(ImportError, match="expected openvino to be installed, got: onnx, onnxscript, openvino not"):
        engines.deployed("openvino", _tiny(), x, 1)
    with pytest.raises(ValueError, match="expected `name` to be of onnxruntime, openvino, got 'tvm'"):
        engines.deployed("tvm", _tiny(), x, 1)
    console = Console(file=io.StringIO())
    with pytest.raises(NotImplementedError, match=r"got openvino: onnx, onnxscript, openvino not installed"):
        study.variant_names(["planned", "openvino"], CPU, torch.float32, console)
    assert "openvino" not in study.variant_names(None, CPU, torch.float32, console, engines_too=True)


@pytest.mark.parametrize("variant", memory_of_domains.VARIANTS)
def test_domains_row_has_times_and_memory(tiny: str, variant: str) -> None:
    serving = Serving(tiny, 3, 0.5, 2, "channels_last", "float32")
    assert serving.id == "tiny-b2-domains3-d50-in-channels_last"
    row = timed_row(serving, variant, (2**20, 2**19))
    assert (row.domains, row.resident_bytes, row.weight_bytes) == (3, 2**20, 2**19)
    assert 0 < row.max_error < 1e-3
    assert row.p50_s > 0
    assert row.first_use_s > 0  # type: ignore[operator]
    assert row.forward_s > 0  # type: ignore[operator]


def test_weight_bytes_include_packed_weights(tiny: str) -> None:
    sizes = {}
    for variant in memory_of_domains.VARIANTS:
        served = Served(Serving(tiny, 3, 0.5, 1, "nchw", "float32"), variant)
        with torch.inference_mode():
            served.build()
            shared = served.weight_bytes()
            for name in served.names:
                served.switch(name)
                served.active(served.inputs[0])
            served.finish()
        sizes[variant] = served.weight_bytes()
        if variant == "pruned":
            assert sizes[variant] < 3 * shared
        else:
            assert sizes[variant] > shared
        ours.clear_packed()


def test_domain_with_wrong_logits_raises(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_of_domains, "mask_", lambda model, lists: model)
    with pytest.raises(gate.WrongResultError, match="logits of planned on tiny-b1-domains2-d50-in-nchw to equal"):
        timed_row(Serving(tiny, 2, 0.5, 1, "nchw", "float32"), "planned", None)


def test_memory_of_domains_command(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The small network does not exist in a new process.
    monkeypatch.setattr(memory_of_domains, "can_measure_peak", lambda: False)
    monkeypatch.setattr(memory_of_domains, "NETWORKS", network_models.NETWORKS)
    arguments = ["--times", "--out", str(tmp_path), "--network", tiny, "--domains", "2", "--batch", "1"]
    assert memory_of_domains.main(arguments) == 0
    assert "Several domains" in capsys.readouterr().out
    _, of_file = rows.read_json(tmp_path / "results.json")
    expected = [(name, "domains", 2) for name in memory_of_domains.VARIANTS]
    assert [(row.variant, row.case, row.domains) for row in of_file] == expected
    assert memory_of_domains.main([*arguments[:-1], "0"]) == 1
    assert "expected --domains and --batch from 1" in capsys.readouterr().out


def test_table_of_held_memory(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory_of_domains, "NETWORKS", network_models.NETWORKS)
    printed = []
    for _ in range(2):
        assert memory_of_domains.main(["--network", tiny, "--domains", "4", "--batch", "1"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    rows = [line.strip("| ").split(" | ") for line in printed[0].splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [kind, memory, count]
        for kind in ("planned", "swapped")
        for memory in ("fast", "auto", "shared")
        for count in ("1", "3", "4")
    ]
    ratios = {tuple(row[:3]): float(row[-1]) for row in rows}
    assert ratios["swapped", "fast", "4"] > 1.5
    assert ratios["swapped", "shared", "4"] <= 1.1
    assert ratios["planned", "shared", "4"] <= 1.1


def test_packed_memory_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case for case in packed_memory.CASES if case.network == "resnet26" and case.H == 8]
    monkeypatch.setattr(packed_memory, "CASES", cases)
    arguments = ["--network", "resnet26", "--batch", "1", "--density", "0.5", "--seconds", "0", "--layout", "nchw"]
    assert packed_memory.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("direct 8x8", "winograd 8x8")) for line in lines) == 2
    assert lines[-1].startswith("| winograd, nchw, 3x3, batch 1 | 1 | ")


def test_study_measures_requested_networks(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--no-layers", "--networks", tiny, "--variants", "dense,masked,planned"]
    arguments += ["--density", "0.5", "--batch", "2", "--layout", "nchw", "--rounds", "3"]
    assert study.main(arguments) == 0
    _, of_file = rows.read_json(tmp_path / "results.json")
    assert [row.variant for row in of_file] == ["dense", "masked", "planned"]
    assert {row.cell for row in of_file} == {"tiny-b2-network-d50-in-nchw"}
    assert study.main(["--out", str(tmp_path), "--no-layers", "--networks", "resnet27"]) == 1
    assert "expected `--networks` to be of resnet50, resnet26" in capsys.readouterr().out.replace("\n", " ")
    assert study.main([*arguments[:-1], "0"]) == 1
    assert "expected `--rounds` to be positive, got 0" in capsys.readouterr().out
