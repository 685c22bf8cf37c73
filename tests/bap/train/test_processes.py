"""Training under torchrun on two processes: they stay equal, one of them writes, a resumption goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bap.config import Config
from bap.data import Domain
from bap.train.checkpoint import load_checkpoint
from bap.train.evaluate import evaluate
from bap.train.run_log import read_metrics

import bap_kernels as bk

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from pathlib import Path
import torch
from bap.cli import main
from bap.config import load_config
from bap.files import write_tensors
from bap.train.domains import load_domains
from bap.results.run import train_run
from bap.train.trainer import Trainer
folder = Path(sys.argv[1])
config = load_config(folder / "config.yaml")
domains = load_domains(config)
half = Trainer(config, domains, folder / "run").open()
half.fit(until=1)
assert half.processes.world == 2
write_tensors(folder / f"half{half.processes.rank}.safetensors", half.model.state_dict(), {})
train_run(config, folder / "run", resume=True, baseline={}, domains=domains)
whole = Trainer(config, domains, folder / "run", resume=True).open()
assert whole.epoch == 2
half.processes.wait()
sys.argv = ["bap", "train", "-c", str(folder / "config.yaml"), "-o", str(folder / "command"), "-s", "epochs=1"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
half.processes.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"round_robin": "joint", "train_backbone": True}], ids=["turns", "joint"]
)
def test_two_processes(tiny: Config, suite: dict[str, Domain], tmp_path: Path, changes: dict) -> None:
    config = tiny.replace(epochs=2, domains=["digits", "glyphs"], sharing="union", **changes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from bap.files import read_tensors

    first, second = (read_tensors(tmp_path / f"half{rank}.safetensors")[0] for rank in range(2))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)
    assert [one["epoch"] for one in read_metrics(tmp_path / "run")] == [1, 2]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(value <= 0.5 for value in results["kept"].values())
    # The command prints one result.
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "command" / "results.json").read_text())
    assert not (tmp_path / "command" / ".lock").exists()
    # What two processes evaluated together is what one finds.
    model, _, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    with bk.use_backend("aten"):
        for name in config.data.domains:
            assert evaluate(model, suite[name]).percent == pytest.approx(results["accuracy"][name])
