"""The log of a run: metrics.jsonl, TensorBoard curves, progress lines on stderr."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, StrictInt, ValidationError

from bap.files import FileError, read_bytes, read_json, write_bytes

__all__ = ["Pace", "RunLog", "checked_results", "read_metrics", "read_results"]


class _DomainRecord(BaseModel):
    evaluated: FiniteFloat
    kept: FiniteFloat
    multiplier: FiniteFloat


class _Record(BaseModel):
    """Required fields of a line of metrics.jsonl."""

    epoch: StrictInt
    domains: dict[str, _DomainRecord]
    union: FiniteFloat
    intersection: FiniteFloat


class _Cost(BaseModel):
    flop: FiniteFloat
    exact_flop: FiniteFloat
    params: FiniteFloat


class _Results(BaseModel):
    """Required fields of results.json."""

    model_config = ConfigDict(extra="allow")

    accuracy: dict[str, FiniteFloat]
    mean_accuracy: FiniteFloat
    beta: FiniteFloat
    sharing: str | None
    kept: dict[str, FiniteFloat]
    projected_off: dict[str, StrictInt]
    union: FiniteFloat
    intersection: FiniteFloat
    cost: _Cost
    scores: dict[str, Any] | None = None
    protocol: dict[str, Any] | None = None


def _checked(model: type[BaseModel], value: Any, where: str) -> Any:
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise FileError(
            f"read_results(): expected {where} to be as a run wrote it, got {place}: {first['msg']}"
        ) from None
    return value


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, one for each epoch; none if there is no such file.

    Raises:
        FileError: if a line is damaged; it is named.
    """
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileError(f"read_metrics(): expected line {number} of {path} to be JSON, got {error}.") from None
        records.append(_checked(_Record, value, f"line {number} of {path}"))
    return records


def _curves(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record as {"loss/digits": value}."""
    named = {f"run/{key}": value for key, value in record.items() if key != "epoch"}
    for domain, values in record["domains"].items():
        named.update({f"{key}/{domain}": value for key, value in values.items()})
    return {name: value for name, value in named.items() if isinstance(value, (int, float))}


class _Curves:
    """An event file for TensorBoard, written synchronously, so that a full disk raises here.

    TensorBoard's own writer leaves that to a thread, which ends with a traceback and keeps the others waiting.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record = Event, Summary, RecordWriter
        # TensorBoard reads files in the order of their names: the number, too, must sort as text.
        second, number = f"{int(time.time()):010d}", f"{next(self._numbers):06d}"
        self.path = folder / f"events.out.tfevents.{second}.{socket.gethostname()}.{os.getpid()}.{number}"
        # Records of epochs that are trained again are hidden.
        start = SessionLog(status=SessionLog.START)
        self._append(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first, session_log=start),
        )

    def add(self, values: dict[str, float], step: int) -> None:
        """Appends numbers by name, all or none of them."""
        values_of = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values_of)))

    def _append(self, *events: Any) -> None:
        before = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                before = file.tell()
                writer = self._record(_Whole(file))
                for event in events:
                    writer.write(event.SerializeToString())
        except OSError as error:
            if before is not None:
                os.truncate(self.path, before)
            raise FileError(
                f"RunLog.add(): expected to write curves to {self.path}, got {error.strerror or error}. "
                "Hint: is the disk full?"
            ) from None


class _Whole:
    """Writes all bytes or raises: an unbuffered file may take a part of them."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.file.write(data) :]


class Pace:
    """When a line of progress is due inside an epoch.

    Args:
        every: steps between two lines; 0: none for their number.
        seconds: the longest time without a line; 0: none for the time.
        clock: seconds, as :func:`time.monotonic` tells them.

    Examples:
        >>> from bap.train.run_log import Pace
        >>> now = iter([0.0, 1.0, 2.0, 31.0])
        >>> pace = Pace(every=2, seconds=30.0, clock=lambda: next(now))
        >>> pace.due(1), pace.due(2), pace.due(3)
        (False, True, False)
    """

    def __init__(self, every: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.seconds, self.clock = every, seconds, clock
        self.last = clock()

    def due(self, step: int) -> bool:
        """Whether a line is due after a step, counted from 1; if so, the time starts anew."""
        now = self.clock()
        due = (self.every > 0 and step % self.every == 0) or (0 < self.seconds <= now - self.last)
        if due:
            self.last = now
        return due


class RunLog:
    """Writes the records of a run.

    The file is replaced as a whole with every record, so that it never ends in half a line.

    Args:
        folder: of the run; None writes nothing.
        epochs: of the run, for the progress line.
        keep: records of earlier epochs to go on from.
        progress: whether lines are printed; None: where the error stream is a terminal.
        every: steps between two lines inside an epoch; 0: none.
        seconds: a line is also printed once so many have passed since the last one; 0: not.
        clock: seconds, as :func:`time.monotonic` tells them.
    """

    def __init__(
        self,
        folder: Path | None,
        epochs: int,
        keep: int = 0,
        progress: bool | None = None,
        every: int = 200,
        seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.epochs = epochs
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.pace = Pace(every, seconds, clock)
        self.records = read_metrics(folder)[:keep] if folder is not None else []
        self._curves: _Curves | None = None
        self._first = keep + 1

    def add(self, record: dict[str, Any]) -> None:
        """Writes the record of an epoch.

        Raises:
            FileError: if it cannot be written.
        """
        self.records.append(record)
        if self.folder is not None:
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.records)
            write_bytes(self.folder / "metrics.jsonl", text.encode())
            self._write_curves(self.folder / "tensorboard", record)
        if self.progress:
            self.pace.last = self.pace.clock()
            print(self._line(record), file=sys.stderr, flush=True)

    def step(self, epoch: int, step: int, steps: int, domain: str, loss: Callable[[], float]) -> None:
        """Prints a line where it is time for one; ``loss`` is called for it only, as it waits for the device."""
        if self.progress and self.pace.due(step):
            print(
                f"epoch {epoch}/{self.epochs}  step {step}/{steps}  {domain}  mean loss {loss():.3f}",
                file=sys.stderr,
                flush=True,
            )

    def _write_curves(self, folder: Path, record: dict[str, Any]) -> None:
        if self._curves is None:
            try:
                self._curves = _Curves(folder, self._first)
            except ImportError:
                # The same numbers are in metrics.jsonl.
                return
        self._curves.add(_curves(record), record["epoch"])

    def _line(self, record: dict[str, Any]) -> str:
        domains = record["domains"].values()
        accuracy = sum(values["evaluated"] for values in domains) / len(domains)
        kept = " ".join(f"{name} {values['kept']:.3f}" for name, values in record["domains"].items())
        return (
            f"epoch {record['epoch']}/{self.epochs}  accuracy {accuracy:.2f} %  kept {kept}  "
            f"union {record['union']:.3f}  intersection {record['intersection']:.3f}  {record['seconds']:.1f} s"
        )


def checked_results(value: Any, path: str | Path) -> dict[str, Any]:
    """The content of a results.json, as it is.

    Raises:
        FileError: if it is not as a run writes it.
    """
    return _checked(_Results, value, str(path))


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results.json of a finished run.

    Raises:
        FileError: if there is none, or it is not as a run writes it.
    """
    path = Path(folder, "results.json")
    return checked_results(read_json(path), path)
