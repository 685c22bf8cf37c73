"""torchrun on two machines, which two network namespaces stand for: the same network as from two local processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bap.config import Config
from bap.files import read_tensors

ROOT = Path(__file__).parents[3]
# All of it is gone with the process: namespaces, the mount, the processes inside.
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--fork", "--kill-child")
MACHINES = """
set -e
mount -t tmpfs none /run
ip netns add left
ip netns add right
ip link add cable netns left type veth peer name cable netns right
number=1
for machine in left right; do
    ip -n $machine address add 10.73.0.$number/24 dev cable
    ip -n $machine link set cable up
    ip -n $machine link set lo up
    number=2
done
"""
# As docs/bap/overview.md has it, for each machine.
TRAIN = """
for rank in 0 1; do
    machine=left
    [ $rank = 0 ] || machine=right
    GLOO_SOCKET_IFNAME=cable nsenter --net=/run/netns/$machine "$PYTHON" -m torch.distributed.run \\
        --nnodes 2 --nproc-per-node 1 --node-rank $rank --master-addr 10.73.0.1 --master-port 29500 \\
        -m bap.cli train -c "$FOLDER/config.yaml" -o "$FOLDER/machines" --no-progress \\
        > "$FOLDER/out$rank" 2> "$FOLDER/err$rank" &
    eval "pid$rank=$!"
done
failed=0
wait $pid1 || failed=1
wait $pid0 || failed=1
exit $failed
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "FOLDER": str(folder),
    }
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script], env=env, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture
def machines(tmp_path: Path) -> None:
    missing = [name for name in ("unshare", "ip", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)}")
    done = run(MACHINES + "nsenter --net=/run/netns/left true", tmp_path)
    if done.returncode != 0:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("machines")
def test_two_machines_train_the_network_of_two_local_processes(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(epochs=2, domains=["digits", "glyphs"], sharing="union", train_backbone=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    addresses = "".join(f"nsenter --net=/run/netns/{name} ip -br address\n" for name in ("left", "right"))
    apart = run(MACHINES + addresses, tmp_path)
    assert "10.73.0.1/24" in apart.stdout
    assert "10.73.0.2/24" in apart.stdout
    done = run(MACHINES + TRAIN, tmp_path)
    errors = "".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("err*")))
    assert done.returncode == 0, done.stderr + errors
    # One process prints, and writes.
    assert json.loads((tmp_path / "out0").read_text()) == json.loads((tmp_path / "machines/results.json").read_text())
    assert (tmp_path / "out1").read_text() == ""

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bap.cli"]
    command += ["train", "-c", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "local"), "--no-progress"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    local = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert local.returncode == 0, local.stderr[-3000:]
    mine, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("machines", "local"))
    assert mine["accuracy"] == pytest.approx(other["accuracy"])
    assert mine["kept"] == pytest.approx(other["kept"])
    files = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local/checkpoint").rglob("*.safetensors")]
    assert len(files) >= 3
    for file in files:
        expected, _ = read_tensors(tmp_path / "local" / file)
        found, _ = read_tensors(tmp_path / "machines" / file)
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{file}: {name}")
