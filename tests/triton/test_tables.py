"""What the Triton backend decides on the host: configurations, and when it can run."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bap_kernels as bk
from bap_kernels import dispatch

pytest.importorskip("triton")

from bap_kernels.triton import configs
from bap_kernels.triton.configs import ARCHITECTURES, TABLE, Config, Problem


def test_every_shape_has_a_configuration_on_every_architecture() -> None:
    for capability, facts in ARCHITECTURES.items():
        for products in ("16", "tf32", "ieee"):
            table = TABLE[facts.table, products]
            for rows in (1, 40, 200, 3000, 200_000):
                for columns in (1, 33, 65, 300, 4000):
                    assert configs.from_table(rows, columns, products, capability) in table.values()


def test_tiles_grow_with_the_product() -> None:
    areas = [c.BM * c.BN for c in (configs.from_table(rows, 512, "16", 90) for rows in (49, 3136, 200_000))]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]
    assert configs.from_table(200_000, 32, "16", 90).BN == 32
    assert configs.from_table(64, 200_000, "16", 90).BM == 64


def test_unknown_architectures_take_an_older_one() -> None:
    assert configs.architecture(87).capability == 86
    assert configs.architecture(75).capability == 80
    assert configs.architecture(999).capability == max(ARCHITECTURES)


@pytest.mark.parametrize("pixels", [1, 63, 64, 6272, 100_352, 10**7])
@pytest.mark.parametrize("tile_count", [1, 36, 1000])
def test_chunks_cover_the_pixels(pixels: int, tile_count: int) -> None:
    count, length = configs.chunks(pixels, tile_count, 64, 132)
    assert length % 64 == 0
    assert (count - 1) * length < pixels <= count * length
    assert count * tile_count <= max(2 * 132, tile_count)
    # The launch derives the length from the number alone.
    assert -(-pixels // (count * 64)) * 64 * count >= pixels


def test_override_is_undone() -> None:
    mine = Config(16, 16, 16, 1, 1)
    problem = Problem("fwd", 10, 10, 10, 1, 0)
    with configs.overriding(mine):
        assert configs.choose(problem, "16", 90) == mine
        with ThreadPoolExecutor(1) as other:
            assert other.submit(configs.choose, problem, "16", 90).result() != mine
    assert configs.choose(problem, "16", 90) == configs.from_table(10, 10, "16", 90) != mine


def test_what_was_measured_goes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, mine = Problem("fwd", 10, 10, 10, 1, 0), Config(16, 16, 16, 1, 1)
    monkeypatch.setitem(configs.tuned, (90, "16", problem), mine)
    assert configs.choose(problem, "16", 90) == mine
    for other in (problem._replace(depth=11), problem._replace(kernel="planar"), problem._replace(kind=8)):
        assert configs.choose(other, "16", 90) != mine
    assert configs.choose(problem, "16", 80) != mine
    assert configs.choose(problem, "tf32", 90) != mine


def test_unsupported_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        assert dispatch.unsupported_reason("triton") == "there is no CUDA device"
        with pytest.raises(ImportError, match=r"got 'triton': there is no CUDA device\. Hint: bap_kernels\.info"):
            bk.use_backend("triton")
    monkeypatch.setattr(dispatch, "OLDEST_TRITON", (99, 0))
    assert "is older than 99.0" in str(dispatch.unsupported_reason("triton"))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.unsupported_reason("triton") == "Triton is not installed"


def test_calls_on_a_cpu_import_no_kernels() -> None:
    code = """
import sys, torch, bap_kernels as bk
y = bk.gathered_conv2d(torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3), None, torch.tensor([0, 2], dtype=torch.int32))
assert y.shape == (1, 3, 3, 3)
assert [name for name in sys.modules if "triton" in name and "bap_kernels" in name] == ["bap_kernels.triton"]
"""
    environment = os.environ | {"BAP_KERNELS_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cpu_tensors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from bap_kernels.triton import ops

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    reason = ops.unsupported_reason(x, w, 1, (3, 3), interpreted=False)
    assert reason == "it computes on CUDA devices, the tensors are on cpu"
    with pytest.raises(NotImplementedError, match=r"conv\(\): expected a call that backend `triton` can run.*on cpu"):
        ops.refuse("conv", reason)
    big = torch.empty(2**16, 1, 2**8, 2**8, device="meta")
    assert ops.unsupported_reason(big, w, 1, (256, 256), True) == "the shape is beyond 32-bit tile arithmetic"


def test_tiles_leave_room_for_what_the_end_of_a_kernel_holds() -> None:
    from bap_kernels.triton import launch
    from bap_kernels.triton.launch import DualStore, Epilogue
    from bap_kernels.triton.launch_spec import Target

    x = torch.empty(1, device="meta")
    dual = DualStore(x, x)
    for kernel, epilogue, sums in (
        ("fwd", Epilogue(x, x, x), 128),
        ("fwd", Epilogue(residual=x), 64),
        ("fwd", Epilogue(residual=x, dual=dual), 32),
        ("planar", Epilogue(residual=x, dual=dual), 64),
    ):
        config = launch.config_of(Problem(kernel, 200_000, 512, 64, 1, 0), torch.float16, Target(90), epilogue)
        assert config.BM * config.BN / (32 * config.warps) == sums
    small = Config(64, 32, 16, 4, 3)
    assert configs.within_registers(small, 32) == small
