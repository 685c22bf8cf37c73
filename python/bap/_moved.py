"""Names of modules in version 0.1.0, which can still be imported for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# {old module: new modules}; bap.prune and bap.train keep their names as packages.
MOVED = {
    "bap.adding": ["bap.train.new_domain"], "bap.budget": ["bap.train.budget"],
    "bap.checkpoint": ["bap.train.checkpoint"], "bap.commands": ["bap.cli.commands"],
    "bap.counting": ["bap.prune.counting"], "bap.data.embedded": ["bap.data.builtin"],
    "bap.demo": ["bap.results.demo"], "bap.deploy": ["bap.prune.deploy", "bap.results.report"],
    "bap.estimate": ["bap.results.estimate"], "bap.evaluate": ["bap.train.evaluate", "bap.models.eval_mode"],
    "bap.facts": ["bap.prune.layers"], "bap.journal": ["bap.train.run_log"], "bap.liveness": ["bap.prune.liveness"],
    "bap.lock": ["bap.train.lock"], "bap.metrics": ["bap.results.scores"],
    "bap.network": ["bap.train.network", "bap.train.domains"], "bap.pretrain": ["bap.train.pretrain"],
    "bap.processes": ["bap.train.processes"], "bap.published": ["bap.results.published"],
    "bap.report": ["bap.results.report"], "bap.resume": ["bap.train.resume", "bap.train.schedule"],
    "bap.run": ["bap.results.run", "bap.train.evaluate"], "bap.sharing": ["bap.train.sharing"],
    "bap.state": ["bap.train.state"], "bap.study": ["bap.results.study"], "bap.timing": ["bap.train.layer_times"],
}  # fmt: skip
RENAMED = {
    "EMBEDDED": "BUILTIN_RECIPE", "DOMAINS": "BUILTIN_DOMAINS", "Journal": "RunLog", "LayerFacts": "ConvSpec",
    "conv_facts": "conv_specs", "data_facts": "data_fingerprint", "embedded_suite": "builtin_suite",
    "speed_facts": "speed_report",
}  # fmt: skip


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        targets = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is deprecated, use {' or '.join(targets)}", DeprecationWarning, stacklevel=2)
        for target in targets:
            vars(module).update({k: v for k, v in vars(importlib.import_module(target)).items() if k[:2] != "__"})
        vars(module).update({old: vars(module)[new] for old, new in RENAMED.items() if new in vars(module)})


def install() -> None:
    """Lets old names be imported, each with a DeprecationWarning."""
    sys.meta_path.insert(0, _Finder())
