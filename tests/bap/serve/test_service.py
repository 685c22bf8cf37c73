"""`bap serve` as its users start it: one service for all tests here, reached over HTTP and broken by signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import check_answer, png

pytest.importorskip("ray.serve")

# No test depends on time: these end one that would hang.
GUARD = 240


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A running service.

    Args:
        port: of HTTP.
        session: id of the session that all its processes belong to.
        line: what it printed when it was ready.
    """

    port: int
    session: int
    line: str

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GUARD)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            kind = response.headers.get("content-type", "")
            return (
                response.status,
                json.loads(content) if "json" in kind else content.decode(),
                {name.lower(): value for name, value in response.headers.items()},
            )

    def processes(self, title: str = "") -> list[int]:
        """Numbers of its processes whose command begins so."""
        return [pid for pid in _session(self.session) if _command(pid).startswith(title)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _session(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def _wait(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port, log = _free_port(), tmp_path_factory.mktemp("service") / "log"
    command = [sys.executable, "-m", "bap.cli", "serve", str(checkpoint), "--port", str(port)]
    command += ["--max-batch", "4", "--queue", "16", "--max-image-bytes", "100000", "--max-image-pixels", "1000000"]
    command += ["--timeout", str(GUARD)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait(lambda: "http://" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield Service(port, process.pid, log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(GUARD) == 0, log.read_text()
        _wait(lambda: not _session(process.pid))
    finally:
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _stopped(pids: list[int]) -> Iterator[None]:
    """The processes do nothing meanwhile; requests gather."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


NETWORK = "ray::ServeReplica:bap:Network"


def test_one_line_says_where_it_is(service: Service) -> None:
    assert service.line.count("\n") == 1
    assert service.line.startswith(f"bap serve: http://127.0.0.1:{service.port}/ (metrics: http://")


def test_the_domains_the_page_and_the_health(service: Service) -> None:
    status, content, _ = service.call("GET", "/domains")
    assert status == 200
    assert [(domain["name"], len(domain["classes"])) for domain in content["domains"]] == [
        ("shapes", 24),
        ("digits", 10),
        ("glyphs", 20),
    ]
    status, page, headers = service.call("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<title>bap serve</title>" in page
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert service.call("GET", "/healthz")[:2] == (200, {"status": "ok"})


def test_random_domains_at_once_are_not_mixed_up_and_bad_images_spoil_no_others(
    service: Service, images: dict[str, list[bytes]], expected: dict[tuple[str, bytes], torch.Tensor]
) -> None:
    requests = list(expected) * 2
    bad = [("digits", b"no image"), ("shapes", images["shapes"][0][:-200]), ("glyphs", b"")]
    requests += bad * 5
    random.Random(0).shuffle(requests)

    def ask(number: int, request: tuple[str, bytes]) -> tuple[int, Any, dict]:
        name, body = request
        return service.call("POST", f"/predict/{name}" if number % 2 else f"/predict?domain={name}", body)

    # As many as a batch and the queue hold, so that none is refused.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(len(requests)), requests))
    for request, (status, content, _) in zip(requests, answers, strict=True):
        if request in expected:
            assert status == 200, content
            check_answer(content, request[0], expected[request])
        else:
            assert status in (400, 415)
            assert "expected an image" in content["detail"]


@pytest.mark.parametrize(
    ("method", "path", "size", "status", "detail"),
    [
        ("POST", "/predict/nothing", 10, 404, "expected `domain` to be one of ['shapes', 'digits', 'glyphs']"),
        ("POST", "/predict/../../etc/passwd", 10, 404, ""),
        ("POST", "/predict/%00%ff", 10, 404, "expected `domain`"),
        ("POST", "/predict", 10, 400, "got none"),
        ("POST", "/predict/digits", 100_001, 413, "at most 100,000 bytes"),
        ("GET", "/predict/digits", 0, 405, "Method Not Allowed"),
        ("GET", "/nowhere", 0, 404, "Not Found"),
    ],
)
def test_wrong_requests_are_refused(
    service: Service, method: str, path: str, size: int, status: int, detail: str
) -> None:
    found, content, _ = service.call(method, path, bytes(size) if size else None)
    assert found == status
    assert detail in content["detail"]


def test_an_image_of_too_many_pixels_is_refused(service: Service) -> None:
    status, content, _ = service.call("POST", "/predict/digits", png(np.zeros((1000, 1001, 3), np.uint8)))
    assert (status, content["detail"]) == (
        413,
        "expected a smaller image, got 1001 x 1000 pixels, more than 1,000,000",
    )


def test_a_full_queue_refuses_and_answers_the_others_later(
    service: Service, expected: dict[tuple[str, bytes], torch.Tensor]
) -> None:
    # More than two batches at the replica and the queue hold, even if Ray, which counts late, lets some more in.
    requests = list(expected) * 2
    assert len(requests) >= 2 * 4 + 16 + 10
    with ThreadPoolExecutor(len(requests)) as pool:
        with _stopped(service.processes(NETWORK)):
            futures = [pool.submit(service.call, "POST", f"/predict/{name}", body) for name, body in requests]
            _wait(lambda: any(future.done() for future in futures))
        answers = [future.result() for future in futures]
    refused = [answer for answer in answers if answer[0] == 503]
    assert refused
    assert all(headers["retry-after"] == "1" for _, _, headers in refused)
    # Ray itself refuses those that the front end has no room for either.
    ours = {"detail": "too many requests are waiting, try again later"}
    assert any(content == ours for _, content, _ in refused)
    assert all(content == ours or "backpressure" in content for _, content, _ in refused)
    for (name, body), (status, content, _) in zip(requests, answers, strict=True):
        assert status in (200, 503)
        if status == 200:
            check_answer(content, name, expected[name, body])
    assert len(refused) < len(requests)


def test_requests_of_a_killed_replica_are_answered_by_the_next(
    service: Service, expected: dict[tuple[str, bytes], torch.Tensor]
) -> None:
    requests = list(expected)[::10]
    (before,) = service.processes(NETWORK)
    futures: list[Future] = []
    with ThreadPoolExecutor(len(requests)) as pool:
        with _stopped([before]):
            futures = [pool.submit(service.call, "POST", f"/predict/{name}", body) for name, body in requests]
            time.sleep(0.5)  # so that they are probably at the replica; the results are the same if they are not
            os.kill(before, signal.SIGKILL)
        answers = [future.result() for future in futures]
    for (name, body), (status, content, _) in zip(requests, answers, strict=True):
        assert status == 200, content
        check_answer(content, name, expected[name, body])
    (after,) = service.processes(NETWORK)
    assert after != before
    assert service.call("GET", "/healthz")[0] == 200


def test_metrics_count_requests_by_domain(service: Service, images: dict[str, list[bytes]]) -> None:
    service.call("POST", "/predict/digits", images["digits"][0])
    address = service.line.partition("metrics: http://")[2].partition("/")[0]

    def counted() -> bool:
        connection = http.client.HTTPConnection(address, timeout=GUARD)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        lines = [line for line in text.splitlines() if "bap_requests" in line and 'domain="digits"' in line]
        return any('status="200"' in line for line in lines) and "bap_batch_images_bucket" in text

    _wait(counted)
