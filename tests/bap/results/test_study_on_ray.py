"""A study on two machines of Ray, one of which is lost, has the table of the serial one."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bap.config import Config
from bap.data import Domain
from bap.results import study_on_ray as module
from bap.results.study import StudyGrid, study
from bap.results.study_on_ray import RayOptions, StudyError, study_on_ray
from bap.train.lock import LOCK

GRID = StudyGrid((0.5,), (None,), (0, 1), baseline=False)


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def runs_in_progress(folder: Path) -> dict[Path, int]:
    """{run: process} of the locks that cells hold."""
    found = {}
    for path in folder.glob(f"beta*/{LOCK}"):
        try:
            found[path.parent] = int(json.loads(path.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            continue
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs; tests add machines. Nothing is left behind."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # What a machine that is gone takes to be noticed.
    system = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4}
    store = 100 * 2**20
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": store,
            "include_dashboard": False,
            "_system_config": system,
        },
    )
    made.add_machine = lambda: made.add_node(num_cpus=1, object_store_memory=store)
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
def test_lost_machine_leaves_the_table_of_the_serial_study(
    cluster: Any, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(epochs=6, pretrain_epochs=1, domains=["shapes", "digits"])
    nodes = [cluster.add_machine(), cluster.add_machine()]
    said: list[str] = []
    lost: list[tuple[str, int]] = []
    stop = threading.Event()

    def lose_a_machine() -> None:
        # The one that computes a cell first goes in the middle of it.
        while not stop.is_set() and not lost:
            for run, pid in runs_in_progress(tmp_path / "ray").items():
                if not (run / "metrics.jsonl").exists() or (run / "results.json").exists():
                    continue
                try:
                    raylet = parent_of(pid)
                except OSError:
                    continue
                for node in nodes:
                    if raylet in [each.process.pid for each in node.all_processes["raylet"]]:
                        cluster.remove_node(node, allow_graceful=False)
                        lost.append((run.name, pid))
                        return
            time.sleep(0.02)

    killer = threading.Thread(target=lose_a_machine)
    killer.start()
    try:
        path = study_on_ray(config, tmp_path / "ray", GRID, said.append)
    finally:
        stop.set()
        killer.join()
    assert len(lost) == 1, said
    assert not is_alive(lost[0][1])
    assert sorted(line.split(":")[0] for line in said) == ["beta0.5_none_seed0", "beta0.5_none_seed1"]
    serial = study(config, tmp_path / "serial", GRID, lambda line: None)
    assert path.read_text() == serial.read_text()
    rows = [
        json.loads((folder / "study.json").read_text())["rows"] for folder in (tmp_path / "ray", tmp_path / "serial")
    ]
    assert [row["accuracy"] for row in rows[0]] == [row["accuracy"] for row in rows[1]]

    # Everything is on disk: no run starts again, and no task is needed for a cell.
    times = {run: run.stat().st_mtime_ns for run in (tmp_path / "ray").glob("*/results.json")}
    assert len(times) == 2
    study_on_ray(config, tmp_path / "ray", GRID, said.append)
    assert len(said) == 2
    assert times == {run: run.stat().st_mtime_ns for run in (tmp_path / "ray").glob("*/results.json")}


@pytest.mark.slow
def test_failed_cell_is_named_and_the_others_finish(cluster: Any, tiny: Config, tmp_path: Path) -> None:
    cluster.add_machine()
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    # A folder that cannot be written: as with a full or read-only disk.
    (tmp_path / "beta0.5_none_seed0").write_text("in the way")
    said: list[str] = []
    with pytest.raises(StudyError, match=r"got 1 that failed: beta0\.5_none_seed0 \(FileError: .*expected a folder"):
        study_on_ray(config, tmp_path, StudyGrid((1.0, 0.5), (None,), (0,)), said.append)
    assert any(line.startswith("beta0.5_none_seed0: FileError: ") for line in said)
    assert (tmp_path / "beta1_none_seed0" / "results.json").exists()
    (tmp_path / "beta0.5_none_seed0").unlink()
    path = study_on_ray(config, tmp_path, StudyGrid((1.0, 0.5), (None,), (0,)), said.append)
    assert len(path.read_text().splitlines()) == 4
    scores = [row["scores"]["S"] for row in json.loads((tmp_path / "study.json").read_text())["rows"]]
    assert len(scores) == 2
    # What depends on a failed run is told apart from it.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "backbone_seed0.safetensors").write_text("damaged")
    with pytest.raises(StudyError, match=r"backbone_seed0 \(.*beta1_none_seed0 \(not run, for want of backbone_seed0"):
        study_on_ray(config, tmp_path / "other", StudyGrid((1.0,), (None,), (0,), False), said.append)


def plan_of(config: Config, folder: Path, grid: StudyGrid) -> module._Study:
    return module._Study(config, folder, os.getcwd(), grid, progress=False)


@pytest.mark.parametrize("taught_by", ["settings", "variant"])
def test_order_of_steps(tiny: Config, tmp_path: Path, taught_by: str) -> None:
    config, variants = tiny.replace(teacher="dense", distill_weight=1.0), {}
    cells = ["beta1_none_seed3", "beta0.5_none_seed3"]
    if taught_by == "variant":
        config, variants = tiny, {"taught": ["teacher=dense", "distill_weight=1"]}
        cells += ["beta1_taught_seed3", "beta0.5_taught_seed3"]
    grid = StudyGrid((1.0, 0.5), (None,), (3,), compare=("dense",), match=("flop",), variants=variants)
    steps = dict(module._steps(plan_of(config, tmp_path, grid), ["a", "b"]))
    needs = {step.name: [each.name for each in before] for step, before in steps.items()}
    alone = ["finetune_a_seed3", "finetune_b_seed3"]
    assert needs == {
        "backbone_seed3": [],
        **{name: ["backbone_seed3"] for name in alone},
        "dense_seed3": alone,
        **{name: ["dense_seed3"] for name in cells},
        "compare_seed3": cells,
    }


def test_steps_in_order_make_the_serial_study(tiny: Config, suite: dict[str, Domain], tmp_path: Path) -> None:
    # What tasks do, in this process.
    config = tiny.replace(epochs=1, pretrain_epochs=1, domains=["shapes", "digits"])
    variants = {"steep": ["lr_switch=0.1"]}
    grid = StudyGrid((0.5,), (None,), (0,), compare=("magnitude",), match=("flop",), variants=variants)
    plan = plan_of(config, tmp_path / "tasks", grid)
    plan.folder.mkdir()
    said = [line for step in dict(module._steps(plan, config.data.domains)) for line in module._task(plan, step)]
    assert said[0].startswith("beta0.5_none_seed0: accuracy ")
    assert said[1].startswith("beta0.5_steep_seed0: accuracy ")
    more: list[str] = []
    path = study(config, plan.folder, grid, more.append)
    assert more == []
    other = study(config, tmp_path / "serial", grid, lambda line: None)
    # The second table has seconds.
    assert path.read_text().split("\n\n")[0] == other.read_text().split("\n\n")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": -1.0}, r"expected `cpus` to be at least 0, got -1"),
        ({"gpus": -0.5}, r"expected `gpus` to be at least 0, got -0\.5"),
        ({"gpus": 1.5}, r"expected `gpus` to be whole or at most 1, got 1\.5"),
        ({"retries": -2}, r"expected `retries` to be at least -1, got -2"),
    ],
)
def test_impossible_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayOptions(**options)


def test_gpu_without_gpus_raises(tiny: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"expected tasks with GPUs for `run.device` 'cuda:0', got gpus=0. Hint"):
        study_on_ray(tiny.replace(device="cuda:0"), tmp_path, options=RayOptions())


@pytest.mark.parametrize(("address", "expected"), [(None, "local"), ("auto", "auto")])
def test_other_clusters_are_joined_by_their_address_alone(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, expected: str
) -> None:
    ray = pytest.importorskip("ray")
    asked: list[str] = []

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="no cluster"):
        study_on_ray(tiny, tmp_path, options=RayOptions(address))
    assert asked == [expected]


def test_machine_that_is_not_there_is_an_error_here_and_a_line_on_a_cluster() -> None:
    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [
                {"Alive": True, "Resources": {"CPU": 4.0}},
                {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
            ]

    said: list[str] = []
    module._check_machines(Ray, RayOptions(cpus=4), said.append)
    with pytest.raises(ValueError, match=r"expected a machine with 1 CPUs and 1 GPUs, got 4 CPUs and 0 GPUs\."):
        module._check_machines(Ray, RayOptions(gpus=1), said.append)
    assert said == []
    module._check_machines(Ray, RayOptions("auto", cpus=8), said.append)
    assert said == ["no machine has 8 CPUs and 0 GPUs now (4 CPUs and 0 GPUs): tasks wait for one"]
