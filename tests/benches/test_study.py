"""The speed-up study: rows, variants, aggregates, report and command line."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benches import baselines, gate, memory, ours, report, rows, study, summary, timers
from benches.cases import BATCHES, CASES, LAYOUTS, LISTS, Cell, default_cells
from benches.machine import Roofline
from benches.measure import Bench
from benches.network_models import NETWORKS, MaskedInputConv2d, in_lists, mask_
from tests.benches.test_cases import SMALL

CPU = torch.device("cpu")
PYTORCH_VARIANTS = ("dense", "masked", "naive", "gather_conv", "oracle", "oracle8")


def make_row(of: Cell = SMALL, p50_s: float = 1e-3, **changes: object) -> rows.Row:
    fields: dict[str, object] = {"variant": "auto", "network": of.case.network, "inputs": "rotated", "max_error": 1e-6}
    fields |= {**of.row_fields, "bytes": 10, "roofline_share": 0.5}
    return rows.row_of(of, timers.Spread(0.9 * p50_s, p50_s, 1.1 * p50_s, 5), 1e9, **{**fields, **changes})


def synthetic(cells: list[Cell]) -> list[rows.Row]:
    """Rows with times that are simple functions of the density."""
    cost = {"dense": lambda c: 1.0, "masked": lambda c: 1.1, "naive": lambda c: c.density + 0.4}
    cost |= {"gather_conv": lambda c: c.density + 0.1, "oracle": lambda c: c.density, "auto": lambda c: 0.9 * c.density}
    cost |= {"native": lambda c: 0.8 * c.density}
    return [
        row
        for cell in cells
        for row in rows.with_ratios(
            make_row(of=cell, variant=variant, p50_s=1e-3 * seconds(cell)) for variant, seconds in cost.items()
        )
    ]


HEADER = {
    "environment": {
        "commit": "abc",
        "cpu": "a | b <c>",
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
    "roofline": {"matmul_flop_per_s": 1e11, "register_flop_per_s": None, "bytes_per_s": 1e10, "flop_per_s": 1e11},
    "build": {},
}


def test_rows_are_equal_after_json(tmp_path: Path) -> None:
    of_cell = [
        *synthetic([SMALL]),
        make_row(C_in=None, kernel=None, roofline_share=None, weight_bytes=3, candidate="a+b"),
    ]
    rows.write_json(tmp_path / "r.json", HEADER, of_cell)
    rows.write_csv(tmp_path / "r.csv", of_cell)
    assert rows.read_json(tmp_path / "r.json") == (HEADER, of_cell)
    with (tmp_path / "r.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row.variant for row in of_cell]


def test_rows_of_another_schema_raise() -> None:
    with pytest.raises(ValueError, match=r"from_dict\(\): expected `values`.*unknown_field"):
        rows.from_dict({"unknown_field": 1})


def test_speedups_are_ratios_of_medians() -> None:
    dense, fast = rows.with_ratios([make_row(variant="dense", p50_s=2.0), make_row(variant="native", p50_s=0.5)])
    assert (fast.vs_dense, dense.vs_dense, fast.vs_oracle) == (4.0, 1.0, None)


def test_journal_continues_and_drops_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = rows.Journal(path, HEADER)
    first.append([make_row(variant="dense"), make_row(variant="native")])
    path.write_text(path.read_text()[:-40])
    second = rows.Journal(path, HEADER)
    assert [row.variant for row in second.rows] == ["dense"]
    second.append([make_row(variant="dense", p50_s=7.0), make_row(variant="native")])
    third = rows.Journal(path, HEADER)
    assert [(row.variant, row.p50_s) for row in third.rows] == [("dense", 7.0), ("native", 1e-3)]


def test_journal_of_another_build_raises(tmp_path: Path) -> None:
    rows.Journal(tmp_path / "rows.jsonl", HEADER)
    with pytest.raises(ValueError, match=r"another commit.*--out"):
        rows.Journal(tmp_path / "rows.jsonl", {**HEADER, "environment": {**HEADER["environment"], "commit": "def"}})  # type: ignore[dict-item]


def test_journal_with_nan_time_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="p50_s"):
        rows.Journal(tmp_path / "rows.jsonl", HEADER).append([make_row(p50_s=math.nan)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lists", LISTS)
def test_baselines_are_right_on_every_kind_of_case(layout: str, lists: str) -> None:
    bench = Bench(CPU, "float32", Roofline(1e11, None, 1e10))
    for shape in ("8x8-256-256-k3s1", "7x7-512-2048-k1s1", "28x28-256-256-k3s2", "14x14-1024-2048-k1s2"):
        case = next(case for case in CASES if case.shape == shape)
        cell = Cell(case, 1, 0.25, lists, layout)
        measured = bench.rows(cell, PYTORCH_VARIANTS, seconds=0)
        rounded = ["oracle8"] if cell.K_in % 8 or cell.K_out % 8 else []
        assert [row.variant for row in measured] == ["dense", "masked", "naive", "gather_conv", "oracle", *rounded]
        assert cell.ragged or not rounded
        assert all(0 < row.max_error < 1e-4 and row.p20_s <= row.p50_s <= row.p80_s for row in measured)
        share = 1 / (4 if lists == "in" else 16)
        share = cell.K_in * cell.K_out / (case.C_in * case.C_out) if cell.ragged else share
        assert measured[0].gflop * share == pytest.approx(measured[1].gflop)  # type: ignore[operator]
        assert all(row.inputs == "rotated" and row.rounds >= 5 for row in measured)


def test_oracle8_is_timed_for_odd_channel_counts() -> None:
    stem = next(case for case in CASES if case.C_in == 3 and case.network == "resnet26")
    measured = Bench(CPU, "float32").rows(Cell(stem, 1, 0.5, "both", "nchw"), PYTORCH_VARIANTS, seconds=0)
    assert [row.variant for row in measured][-1] == "oracle8"


def test_wrong_list_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CPU, "float32")
    prepare = baselines.prepare

    def wrong(
        name: str, problem: baselines.Problem, clock: baselines.Clock, pool_share: float = 1.0
    ) -> baselines.Variant:
        variant = prepare(name, problem, clock, pool_share)
        if name == "naive":
            # One channel of the list is wrong.
            index = problem.in_index.clone()
            index[3] = index[2] + 1 if index[3] != index[2] + 1 else index[4]
            weight = problem.sliced_weight
            variant.run = lambda x: torch.conv2d(x.index_select(1, index), weight, None, *problem.conv_args)
        return variant

    monkeypatch.setattr(baselines, "prepare", wrong)
    with pytest.raises(gate.WrongResultError, match="naive on resnet26-b1-8x8"):
        bench.rows(SMALL, ("dense", "naive"), seconds=0)


def test_means_have_worst_case_and_losses_exceed_noise() -> None:
    cells = [cell for cell in default_cells() if cell.density == 0.5 and cell.lists == "in" and cell.layout == "nchw"][
        :2
    ]
    slow = make_row(of=cells[0], variant="auto", vs_dense=1.0, vs_gather_conv=0.9, candidate="gather")
    fast = make_row(of=cells[1], variant="auto", vs_dense=4.0, vs_gather_conv=0.96)
    (mean,) = summary.means([slow, fast], ["auto"], ["dense"])
    assert (mean.geomean, mean.count, mean.worst, mean.worst_case) == (pytest.approx(2.0), 2, 1.0, cells[0].id)
    assert [(loss.cell, loss.base, loss.candidate) for loss in summary.losses([slow, fast])] == [
        (cells[0].id, "gather_conv", "gather")
    ]


def test_unsteadiness_is_median_of_p80_over_p20() -> None:
    measured = [make_row(p20_s=1.0, p80_s=spread) for spread in (1.1, 9.0, 1.2)]
    assert summary.unsteadiness(measured) == pytest.approx(1.2)


def test_layers_with_few_channels_are_not_in_means() -> None:
    stem = Cell(next(case for case in CASES if case.C_in == 32), 1, 0.5, "in", "nchw")
    assert summary.means([make_row(of=stem, vs_dense=9.0)], ["auto"]) == []


def test_verdicts_compare_speedups_with_targets() -> None:
    measured = synthetic(default_cells())
    verdicts = {
        (v.target.title, v.setting.layout, v.setting.density): v for v in summary.verdicts(measured, ["native", "auto"])
    }
    over_dense = verdicts["in over dense", "nchw", 0.5]
    assert over_dense.speedups == pytest.approx({"native": 2.5, "auto": 1 / 0.45})
    assert over_dense.met
    assert verdicts["in over oracle, each", "nchw", 0.25].speedups["auto"] == pytest.approx(1 / 0.9)
    assert not verdicts["both over dense", "channels_last", 0.25].met
    assert verdicts["1x1 in over naive", "channels_last", 0.25].count == sum(
        c.kernel == 1 and c.C_in >= 64 for c in CASES
    )
    assert ("1x1 in over naive", "nchw", 0.25) not in verdicts


def test_report_has_tables_plots_and_files(tmp_path: Path) -> None:
    every = synthetic(default_cells())
    for batch in BATCHES:
        cell = {"network": "resnet26", "case": summary.WHOLE_NETWORK, "cell": f"n{batch}", "batch": batch, "C_in": None}
        every += rows.with_ratios([make_row(variant=variant, **cell) for variant in ("dense", "masked", "auto")])
    every += [make_row(network=summary.OVERHEAD, case="one", cell="overhead", variant="op", C_in=None)]
    tables = report.write(tmp_path, HEADER, every)
    assert {table.title for table in tables} >= {"Targets", "Whole networks", "Time of one call", "Every case"}
    page = (tmp_path / "report.html").read_text()
    assert "a | b &lt;c&gt;" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == len(list((tmp_path / "plots").glob("*.png"))) >= 6
    text = (tmp_path / "report.md").read_text()
    assert all((tmp_path / link).exists() for link in re.findall(r"\]\((plots/[^)]+)\)", text))
    assert "| in over dense | nchw b1 | 0.5 | 27 | 1.90 | 2.50 | 2.22 | met |" in text
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == len(every)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(every)


def test_masked_network_ignores_unlisted_channels() -> None:
    model = NETWORKS["resnet26"][0]().eval()
    lists = in_lists(model, 0.5, seed=1)
    assert "conv1" not in lists
    assert len(lists["layer1.0.conv1"]) == 16
    mask_(model, lists)
    conv = model.layer2[0].conv1
    assert isinstance(conv, MaskedInputConv2d)
    x = torch.randn(1, 64, 8, 8)
    changed = x.clone()
    off = sorted(set(range(64)) - set(lists["layer2.0.conv1"].tolist()))
    changed[:, off] += 1
    assert torch.equal(conv(x), conv(changed))


@pytest.mark.slow
def test_study_continues_after_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    arguments = [
        "--out",
        str(tmp_path),
        "--full",
        "--only",
        "resnet26-b1-8x8.*-d50-in-",
        "--variants",
        "dense,gather_conv,oracle",
    ]
    assert study.main([*arguments, "--threads", threads]) == 0
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines()
    assert len([line for line in lines if '"C_in": 256' in line]) == 3 * len(LAYOUTS)
    assert study.main([*arguments, "--threads", threads]) == 0
    # Only the overhead is measured again.
    again = path.read_text().splitlines()
    assert [line for line in again if '"C_in": 256' in line] == [line for line in lines if '"C_in": 256' in line]
    assert "Report:" in capsys.readouterr().out


def test_study_without_package_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError("not built")

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    assert study.main(["--out", str(tmp_path)]) == 1
    assert "expected bap_kernels to be importable, got: not built" in capsys.readouterr().out.replace("\n", " ")


def test_study_with_unknown_variant_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--out", str(tmp_path), "--variants", "dense,fastest"]) == 1
    assert "fastest" in capsys.readouterr().out


def test_auto_seems_to_lose_only_beyond_noise() -> None:
    from benches.measure import seems_to_lose

    assert seems_to_lose({"auto": [1.2, 1.2], "dense": [2.0, 2.0], "gather_conv": [1.0, 1.0]})
    assert not seems_to_lose({"auto": [1.04, 1.04], "dense": [2.0, 2.0], "gather_conv": [1.0, 1.0]})
    assert not seems_to_lose({"native": [3.0], "dense": [1.0]})


@pytest.mark.skipif(not memory.can_measure_peak(), reason="malloc is not glibc's")
def test_keep_freed_avoids_page_faults() -> None:
    program = (
        "import resource, torch\nfrom benches import memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    blocks = [torch.ones(7 << 20) for _ in range(3)]\n"
        "    del blocks\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "memory._return_freed(1)\n"
        "returned = min(faults() for _ in range(6))\n"
        "assert memory.keep_freed()\n"
        "kept = [faults() for _ in range(12)][-1]\n"
        "assert kept < 100 and returned > 5000, (kept, returned)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
