"""Parts of the report of a GPU: each runs in a process of its own under a time limit, and its result is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_verdicts import read_verdicts, verdict_table

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """What became of one part: ``ok``, ``failed`` or ``skipped``, with the reason of the last two."""

    part: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Part:
    """A command of the report.

    Args:
        skip: why it cannot run here; None if it can.
        read: turns its output into data for the report.
        environment: variables that it gets where the user has not set them.
        statuses: exit statuses of a part that has done its work.
        again: whether it runs anew where an earlier report has it.
    """

    name: str
    command: list[str]
    limit_s: float
    skip: str | None = None
    read: Callable[[str], dict[str, Any]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = (0,)
    again: bool = False


class Report:
    """Runs parts one after the other within a common budget of time and collects their results.

    Args:
        environment: variables that every part gets.
    """

    def __init__(self, out: Path, budget_s: float, environment: dict[str, str] | None = None) -> None:
        self.out = out
        self.deadline = time.monotonic() + budget_s
        self.environment = environment or {}
        self.head: dict[str, Any] = {}
        self.results: list[Result] = []
        self.earlier: dict[str, Result] = {}
        self._writing = threading.Lock()

    def load_earlier(self) -> dict[str, Any]:
        """Takes over what an earlier run into the same folder has done; returns the facts that it holds for."""
        try:
            content = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
            self.earlier = {each["part"]: Result(**each) for each in content["parts"] if each["state"] == "ok"}
            return content
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def run(self, part: Part) -> Result:
        """Runs one part."""
        return self.run_together([part])[0]

    def run_together(self, parts: Sequence[Part]) -> list[Result]:
        """Runs parts side by side, from the repository; their results stand in the order of the parts."""
        results = []
        for part in parts:
            kept = None if part.again else self.earlier.get(part.name)
            results.append(kept or Result(part.name, "skipped", part.skip or "not reached"))
        self.results += results
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(self._run, parts, results))
        return results

    def _run(self, part: Part, result: Result) -> None:
        if result.state == "ok":
            print(f"{result.part}: ok, in an earlier run", flush=True)
            return
        limit_s = min(part.limit_s, self.deadline - time.monotonic())
        if part.skip is None and limit_s < 5:
            result.reason = "no time was left for it"
        elif part.skip is None:
            start = time.monotonic()
            try:
                self._execute(result, part, limit_s)
            except (OSError, ValueError) as error:
                result.state, result.reason = "failed", f"{type(error).__name__}: {error}"
            result.seconds = round(time.monotonic() - start, 1)
        self.write()
        print(f"{result.part}: {result.state} {result.reason}", flush=True)

    def _execute(self, result: Result, part: Part, limit_s: float) -> None:
        log = self.out / f"{result.part}.log"
        environment = {**part.environment, **os.environ, **self.environment}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        with log.open("w", encoding="utf-8") as stream:
            # A session of its own: what a command has started must not run on beside the parts that follow.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                result.state, result.reason = "failed", f"ran past {limit_s:.0f} s, see {log.name}"
                return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if status in part.statuses:
            result.state, result.reason = "ok", ""
            result.data = part.read(text) if part.read else {"last_line": lines[-1] if lines else ""}
        else:
            result.state = "failed"
            result.reason = f"status {status}: {lines[-1][:200] if lines else 'no output'}, see {log.name}"

    def table(self) -> str:
        """What became of each part, as Markdown."""
        lines = ["| part | state | seconds | remarks |", "|---|---|---|---|"]
        for result in self.results:
            remarks = result.reason or "; ".join(f"{key}: {value}" for key, value in result.data.items())
            remarks = remarks if len(remarks) <= 300 else remarks[:297] + "..."
            lines.append(f"| {result.part} | {result.state} | {result.seconds} | {remarks.replace('|', '/')} |")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Writes report.json and report.md, each as a whole."""
        with self._writing:
            # What was done earlier and comes later in this run is not lost if it is killed before.
            names = {result.part for result in self.results}
            kept = [result for name, result in self.earlier.items() if name not in names]
            content = {**self.head, "parts": [asdict(result) for result in (*self.results, *kept)]}
            self._replace("report.json", json.dumps(content, indent=2) + "\n")
            self._replace("report.md", self._markdown())

    def _replace(self, name: str, text: str) -> None:
        path = self.out / f"{name}.new"
        path.write_text(text, encoding="utf-8")
        path.replace(self.out / name)

    def _markdown(self) -> str:
        facts = "\n".join(f"- {key}: {value}" for key, value in self.head.items())
        markdown = f"# GPU report\n\n{facts}\n\n{self.table()}"
        verdicts = read_verdicts(self.out)
        if verdicts:
            markdown += f"\n## Verdicts on the kernels\n\n{verdict_table(verdicts)}"
        networks = self.out / "networks.md"
        if networks.exists():
            markdown += "\n## Networks, mixed batches, training\n\n" + networks.read_text(encoding="utf-8")
        for study in sorted([*self.out.glob("study-*/report.md"), *self.out.glob("training/report.md")]):
            markdown += f"\n[{study.parent.name}]({study.relative_to(self.out)})\n"
        return markdown
