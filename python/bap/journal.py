"""What a run writes down: metrics.jsonl, curves for TensorBoard, a line per epoch on a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bap.files import read_json, write_bytes

__all__ = ["Journal", "read_metrics"]


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, one for each epoch; none if there is no such file."""
    path = Path(folder, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _curves(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record as {"loss/digits": value}."""
    found = {f"run/{key}": value for key, value in record.items() if isinstance(value, (int, float)) and key != "epoch"}
    for domain, values in record["domains"].items():
        found.update({f"{key}/{domain}": value for key, value in values.items() if isinstance(value, (int, float))})
    return found


class Journal:
    """Keeps the records of a run.

    The file is replaced as a whole with every record, so that it never ends in half a line.

    Args:
        folder: of the run; None writes nothing.
        epochs: of the run, for the progress line.
        keep: records of earlier epochs to go on from.
        progress: whether lines are printed; None: where the output is a terminal.
    """

    def __init__(self, folder: Path | None, epochs: int, keep: int = 0, progress: bool | None = None) -> None:
        self.folder = folder
        self.epochs = epochs
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.records = read_metrics(folder)[:keep] if folder is not None else []
        self._writer: Any = None
        self._purge = keep

    def add(self, record: dict[str, Any]) -> None:
        """Writes the record of an epoch.

        Raises:
            FileError: if it cannot be written.
        """
        self.records.append(record)
        if self.folder is not None:
            text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in self.records)
            write_bytes(self.folder / "metrics.jsonl", text.encode())
            self._write_curves(record)
        if self.progress:
            print(self._line(record), file=sys.stderr, flush=True)

    def _write_curves(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                # The same numbers are in metrics.jsonl.
                return
            assert self.folder is not None
            # Records of epochs that are trained again are hidden.
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge + 1)
        for name, value in _curves(record).items():
            self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def _line(self, record: dict[str, Any]) -> str:
        domains = record["domains"].values()
        accuracy = sum(one["evaluated"] for one in domains) / len(domains)
        kept = " ".join(f"{name} {one['kept']:.3f}" for name, one in record["domains"].items())
        return (
            f"epoch {record['epoch']}/{self.epochs}  accuracy {accuracy:.2f} %  kept {kept}  "
            f"union {record['union']:.3f}  intersection {record['intersection']:.3f}  {record['seconds']:.1f} s"
        )

    def close(self) -> None:
        """Closes the curves' file."""
        if self._writer is not None:
            self._writer.close()


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results.json of a finished run.

    Raises:
        FileError: if there is none.
    """
    return read_json(Path(folder, "results.json"))
