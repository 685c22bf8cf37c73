"""The file of verdicts: keyed, replaced as a whole, shared by processes, and never in the way."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bap_kernels import _files
from bap_kernels.verify import Verdict
from bap_kernels.verify import store as module
from bap_kernels.verify.store import Store, key_of
from tests.verify.conftest import ROOT

FACTS = {"gpu": "H200", "driver": "580.1", "extension": "a"}
OK, HANG = Verdict("ok", "3 cases", 1.5, 100.0), Verdict("hang", "no end", 2.0, 200.0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_unusable", set())
    monkeypatch.setattr(module, "_damaged", set())


def test_verdicts_come_back(store: Store, as_later_process: Callable[[], None]) -> None:
    assert store.load(FACTS) == {}
    store.save(FACTS, {"cuda/halo/tf32": OK})
    store.save(FACTS, {"cuda/pack/tf32": HANG})
    for _ in range(2):
        assert store.load(FACTS) == {"cuda/halo/tf32": OK, "cuda/pack/tf32": HANG}
        as_later_process()
    store.save(FACTS, {"cuda/pack/tf32": OK})
    assert store.load(FACTS)["cuda/pack/tf32"] == OK


@pytest.mark.parametrize("fact", FACTS)
def test_any_other_fact_has_verdicts_of_its_own(fact: str, store: Store, as_later_process: Callable[[], None]) -> None:
    store.save(FACTS, {"cuda/halo/tf32": HANG})
    changed = {**FACTS, fact: "another"}
    assert store.load(changed) == {}
    store.save(changed, {"cuda/halo/tf32": OK})
    as_later_process()
    assert store.load(FACTS)["cuda/halo/tf32"] == HANG
    assert store.load(changed)["cuda/halo/tf32"] == OK
    assert key_of(dict(reversed(FACTS.items()))) == key_of(FACTS) != key_of(changed)


def test_the_oldest_devices_are_dropped(store: Store, as_later_process: Callable[[], None]) -> None:
    for number in range(40):
        store.save({"gpu": str(number)}, {"a/b/c": Verdict("ok", time=float(number))})
    as_later_process()
    kept = [number for number in range(40) if store.load({"gpu": str(number)})]
    assert kept == list(range(8, 40))


def test_unknown_counts_its_tries(store: Store) -> None:
    for tries in (1, 2, 3):
        store.save(FACTS, {"a/b/c": Verdict("unknown", "no memory")})
        assert store.load(FACTS)["a/b/c"].tries == tries
    store.save(FACTS, {"a/b/c": OK})
    store.save(FACTS, {"a/b/c": Verdict("unknown")})
    assert store.load(FACTS)["a/b/c"].tries == 1


def test_unknown_is_due_later_each_time_and_after_a_day_at_the_latest() -> None:
    now = 1e9
    for tries, wait in ((1, 600), (2, 1200), (5, 9600), (30, 86400)):
        verdict = Verdict("unknown", time=now, tries=tries)
        assert not verdict.is_due(now + wait - 1)
        assert verdict.is_due(now + wait)
        # The clock was set back.
        assert verdict.is_due(now - 1)
    assert not any(Verdict(each, time=0.0).is_due(now) for each in ("ok", "wrong", "crash", "hang"))


def test_verdict_of_another_name_raises() -> None:
    with pytest.raises(ValueError, match=r"Verdict\(\): expected `verdict` to be one of ok, .*, got 'fine'"):
        Verdict("fine")


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    '{"format": 1}',
    '{"devices": [1]}',
    '{"devices": [{"facts": {}, "families": {"a": {"verdict": "fine"}}}]}',
    '{"devices": [{"facts": {}, "families": {"a": {"verdict": "ok", "reason": "", "seconds": [], "time": 0}}}]}',
    "\0" * 100,
    "[" * 100_000,
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_file_is_named_once_and_replaced(text: str, store: Store, as_later_process: Callable[[], None]) -> None:
    assert store.file is not None
    store.file.parent.mkdir()
    store.file.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.load(FACTS) == {}
        assert store.load(FACTS) == {}
    (warning,) = caught
    assert re.search(r"are found anew, for `.*verdicts-v1.json` is damaged: ", str(warning.message))
    store.save(FACTS, {"a/b/c": OK})
    as_later_process()
    assert store.load(FACTS) == {"a/b/c": OK}


def unusable(store: Store) -> None:
    """What is saved stays in memory; one warning says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for verdict in (HANG, OK):
            store.save(FACTS, {"a/b/c": verdict})
            assert store.load(FACTS) == {"a/b/c": verdict}
    (warning,) = caught
    assert re.search("results stay in memory, for `.*` cannot be used", str(warning.message))


def test_folder_that_nobody_can_write() -> None:
    # Not even root, who may write to any read-only folder.
    unusable(Store(Path("/proc/bap_kernels")))


def test_folder_that_is_a_file(store: Store, cache: Path) -> None:
    cache.write_text("")
    unusable(store)


def test_file_that_is_a_folder(store: Store) -> None:
    assert store.file is not None
    store.file.mkdir(parents=True)
    unusable(store)


def test_full_disk(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = open

    def full_where_written(file: Any, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            os.close(file)
            return Full()
        return real(file, mode, **options)

    monkeypatch.setattr(_files, "open", full_where_written, raising=False)
    unusable(store)
    assert [each.name for each in cache.iterdir() if each.suffix != ".lock"] == []


def test_limit_of_file_size(store: Store, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        unusable(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.name for each in cache.iterdir() if each.suffix != ".lock"] == []


def test_without_a_folder_verdicts_stay_in_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store(None).save(FACTS, {"a/b/c": OK})
        assert Store(None).load(FACTS) == {"a/b/c": OK}
        lock = Store(None).begin(FACTS)
    assert lock == -1
    Store(None).end(lock)


def test_one_process_at_a_time_verifies_a_device(store: Store) -> None:
    lock = store.begin(FACTS)
    assert lock is not None
    assert store.begin(FACTS) is None
    other = store.begin({**FACTS, "gpu": "A100"})
    assert other is not None
    store.end(other)
    store.end(lock)
    again = store.begin(FACTS)
    assert again is not None
    # A worker that is forked does not keep the lock when this process gives it back.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    store.end(again)
    last = store.begin(FACTS)
    assert last is not None
    store.end(last)
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


WRITER = """
import sys
from pathlib import Path
from bap_kernels.verify import Verdict
from bap_kernels.verify.store import Store
for number in range(10):
    Store(Path(sys.argv[1])).save({"gpu": "H200"}, {f"a/{sys.argv[2]}/{number}": Verdict("ok")})
"""


def test_processes_that_write_at_once_lose_nothing(store: Store, cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(cache), str(number)], env=environment)
        for number in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len(store.load({"gpu": "H200"})) == 40
    assert json.loads((cache / "verdicts-v1.json").read_text())["format"] == 1
