"""Roofline times: the formula, and the table in the report of a GPU."""

from __future__ import annotations

import pytest

from benches import roofline
from benches.cases import CASES, Case
from benches.roofline import GPUS, Gpu, Work, convolution, kernels, touched

POINTWISE = Case("resnet50", 56, 56, 256, 64, 1, 1, 1)
SQUARE = Case("resnet50", 28, 28, 256, 256, 3, 1, 1)


def test_time_is_launch_plus_longest_limit() -> None:
    gpu = Gpu(100.0, 200.0, {"float32": 1000.0}, launch_s=0.5)
    assert Work(1000, 10, 10).seconds(gpu, "float32") == 1.5
    assert Work(10, 200, 10).seconds(gpu, "float32") == 2.5
    assert Work(10, 10, 600).seconds(gpu, "float32") == 3.5


def test_work_of_a_convolution() -> None:
    work = convolution(POINTWISE, 2, 256, 64, 2)
    pixels = 2 * 56 * 56
    assert work.flop == 2 * pixels * 256 * 64
    assert work.moved == 2 * (pixels * 256 + 256 * 64 + pixels * 64)
    assert convolution(Case("n", 56, 56, 256, 64, 1, 2, 1), 2, 256, 64, 2).moved == pytest.approx(
        2 * (pixels / 4 * 256 + 256 * 64 + pixels / 4 * 64)
    )


def test_random_list_touches_most_sectors_of_channels_last() -> None:
    assert touched(0.25, "nchw", 2) == 0.25
    assert touched(0.5, "channels_last", 2) > 0.9999
    assert touched(0.25, "channels_last", 4) == pytest.approx(1 - 0.75**8)


def test_triton_reads_planes_in_place_for_pointwise_only() -> None:
    (triton,) = kernels(POINTWISE, 8, 0.5, "in", "nchw", "bfloat16", "triton")
    (compact,) = kernels(POINTWISE, 8, 0.5, "in", "nchw", "bfloat16", "oracle")
    assert triton == compact
    assert len(kernels(POINTWISE, 8, 0.5, "in", "channels_last", "bfloat16", "triton")) == 2
    assert len(kernels(SQUARE, 8, 0.5, "in", "nchw", "bfloat16", "triton")) == 2


@pytest.mark.parametrize("gpu", list(GPUS))
def test_oracle_is_fastest_and_gather_conv_slowest(gpu: str) -> None:
    for case in CASES:
        for layout in ("nchw", "channels_last"):
            seconds = {
                variant: sum(
                    w.seconds(GPUS[gpu], "bfloat16") for w in kernels(case, 8, 0.5, "in", layout, "bfloat16", variant)
                )
                for variant in ("dense", "oracle", "gather_conv", "triton")
            }
            assert seconds["oracle"] <= seconds["dense"]
            assert seconds["oracle"] <= seconds["triton"] <= seconds["gather_conv"]


def test_unknown_variant_raises_and_unknown_gpu_has_no_table() -> None:
    with pytest.raises(ValueError, match="expected `variant` to be a modelled one, got 'cuda'"):
        kernels(SQUARE, 1, 0.5, "in", "nchw", "bfloat16", "cuda")
    assert roofline.known_gpu("NVIDIA GeForce RTX 3090") is None
    assert roofline.known_gpu(None) is None
    assert roofline.prediction_table(None, []) is None


def test_gpu_report_has_predictions() -> None:
    from benches.report import tables
    from tests.benches.test_study import HEADER, make_row

    rows = [
        make_row(device="cuda", dtype="bfloat16", variant=variant, p50_s=5e-6) for variant in ("dense", "auto", "cuda")
    ]
    table = roofline.prediction_table("NVIDIA H200", rows)
    assert table is not None
    assert [line[1] for line in table.rows] == ["dense", "auto"]
    assert all(float(line[2]) > 0 and float(line[4]) > 0 for line in table.rows)
    environment = {**HEADER["environment"], "gpu": "NVIDIA H200"}
    titles = [each.title for each in tables({**HEADER, "environment": environment}, rows)]
    assert "Predicted and measured" in titles


def test_unlisted_gpu_uses_measured_peaks() -> None:
    from tests.benches.test_study import make_row

    rows = [make_row(device="cuda", dtype="bfloat16", variant="dense", p50_s=5e-6)]
    peaks = {"bytes_per_s": 1e12, "matmul_flop_per_s": 1e14, "register_flop_per_s": None}
    slow, fast = (
        roofline.prediction_table("NVIDIA GeForce RTX 3090", rows, each, "bfloat16")
        for each in (peaks, {**peaks, "bytes_per_s": 4e12, "matmul_flop_per_s": 4e14})
    )
    assert slow is not None
    assert fast is not None
    assert float(slow.rows[0][2]) > float(fast.rows[0][2]) > 0
    assert "measured peaks" in slow.note
    assert roofline.prediction_table("NVIDIA GeForce RTX 3090", rows, peaks, "float32") is None
    assert roofline.prediction_table("NVIDIA GeForce RTX 3090", rows) is None


def test_command_prints_every_case(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["roofline", "--gpu", "A100", "--batch", "1"])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| resnet")]) == 6 * len(CASES)
