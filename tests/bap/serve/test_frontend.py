"""The front end without Ray: its replicas are stood in for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve")

from bap.serve import ServeSettings, deployments
from bap.serve.deployments import Frontend
from bap.serve.requests import DomainInput
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request

from .conftest import png

IMAGE = png(np.zeros((8, 8, 3), np.uint8))


class _Meter:
    def __init__(self, *_: object) -> None:
        self.calls: list[dict] = []

    def inc(self, value: float = 1, tags: dict | None = None) -> None:
        self.calls.append(dict(tags or {}))

    def observe(self, value: float, tags: dict | None = None) -> None:
        self.calls.append(dict(tags or {}))


class _Response:
    def __init__(self, result: Any) -> None:
        self.result, self.cancelled = result, False

    def __await__(self) -> Any:
        async def answer() -> Any:
            if self.result == "never":
                await asyncio.Event().wait()
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

        return answer().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class _Handle:
    """Gives the listed results one after another."""

    def __init__(self, *results: Any) -> None:
        self.responses = [_Response(result) for result in results]
        self.sent: list[_Response] = []

    @property
    def predict(self) -> _Handle:
        return self

    ready = predict

    def remote(self, *_: object) -> _Response:
        self.sent.append(self.responses[len(self.sent)])
        return self.sent[-1]


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Frontend]:
    monkeypatch.setattr(deployments.metrics, "Counter", _Meter)
    monkeypatch.setattr(deployments.metrics, "Histogram", _Meter)

    def make(handle: _Handle, **settings: Any) -> Frontend:
        domain = DomainInput("dots", ("a", "b"), 8, 8, (0.5,) * 3, (0.5,) * 3)
        values = {"checkpoint": "x", "max_image_bytes": 1000, **settings}
        return Frontend(ServeSettings.of(values), {"dots": domain}, [handle], {"dots": 0})  # type: ignore[list-item]

    return make


def _request(domain: str = "dots", parts: tuple[bytes, ...] = (IMAGE,), **headers: str) -> Request:
    """A request whose body comes in parts; after an empty one nothing more comes."""

    async def messages() -> AsyncIterator[dict]:
        for number, part in enumerate(parts):
            if not part:
                await asyncio.Event().wait()
            yield {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}

    stream = messages()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": f"domain={domain}".encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    return Request(scope, stream.__anext__)  # type: ignore[arg-type]


def _answer(frontend: Frontend, request: Request) -> tuple[int, dict, dict]:
    response = asyncio.run(frontend.predict(request))
    return response.status_code, json.loads(bytes(response.body)), dict(response.headers)


def _died() -> ActorDiedError:
    return ActorDiedError()


def test_the_classes_are_named(frontend: Callable[..., Frontend]) -> None:
    status, content, _ = _answer(frontend(_Handle([(1, 0.75), (0, 0.25)])), _request())
    assert status == 200
    assert content == {
        "domain": "dots",
        "class": "b",
        "number": 1,
        "probability": 0.75,
        "top": [
            {"class": "b", "number": 1, "probability": 0.75},
            {"class": "a", "number": 0, "probability": 0.25},
        ],
    }


def test_a_request_whose_replica_died_is_sent_once_more(frontend: Callable[..., Frontend]) -> None:
    handle = _Handle(_died(), [(0, 1.0)])
    assert _answer(frontend(handle), _request())[0] == 200
    assert len(handle.sent) == 2


@pytest.mark.parametrize(
    ("results", "status", "detail"),
    [
        ((_died(), _died()), 503, "no replica could answer, try again later"),
        ((BackPressureError(4, 4),), 503, "too many requests are waiting, try again later"),
        (("FloatingPointError: black",), 500, "the network failed: FloatingPointError: black"),
    ],
)
def test_failures_are_reported(frontend: Callable[..., Frontend], results: tuple, status: int, detail: str) -> None:
    found, content, headers = _answer(frontend(_Handle(*results)), _request())
    assert (found, content) == (status, {"detail": detail})
    assert headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_network_that_never_answers_is_given_up(frontend: Callable[..., Frontend]) -> None:
    handle = _Handle("never")
    status, content, _ = _answer(frontend(handle, timeout=0.05), _request())
    assert (status, content) == (504, {"detail": "no answer within 0.05 s"})
    assert handle.sent[0].cancelled


def test_a_body_that_never_ends_is_given_up(frontend: Callable[..., Frontend]) -> None:
    status, content, _ = _answer(frontend(_Handle(), timeout=0.05), _request(parts=(b"abc", b"", b"abc")))
    assert (status, content) == (408, {"detail": "expected the image within 0.05 s"})


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        (_request(content_length="1001"), 413, "at most 1,000 bytes, got 1001"),
        (_request(content_length="9" * 5000), 413, "at most 1,000 bytes"),
        (_request(content_length="-1", parts=(b"hello",)), 415, "no image"),
        (_request(parts=(bytes(600), bytes(600), b"")), 413, "at most 1,000 bytes, got more"),
        (_request(content_type="Multipart/Form-Data; boundary=x"), 415, "the image itself as the body"),
        (_request("stripes"), 404, "one of ['dots'], got 'stripes'"),
    ],
)
def test_bad_requests_are_refused_before_they_reach_the_network(
    frontend: Callable[..., Frontend], request_: Request, status: int, detail: str
) -> None:
    handle = _Handle()
    found, content, _ = _answer(frontend(handle), request_)
    assert found == status
    assert detail in content["detail"]
    assert handle.sent == []


def test_names_that_clients_make_up_are_no_labels(frontend: Callable[..., Frontend]) -> None:
    front = frontend(_Handle([(0, 1.0)]))
    for domain in ("dots", "stripes"):
        _answer(front, _request(domain))
    assert front._requests.calls == [  # type: ignore[attr-defined]
        {"domain": "dots", "status": "200"},
        {"domain": "", "status": "404"},
    ]
    assert front._latency.calls == [{"domain": "dots"}]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("result", "status", "content"),
    [
        (True, 200, {"status": "ok"}),
        (BackPressureError(4, 4), 200, {"status": "ok"}),
        (_died(), 503, {"status": "unavailable", "reason": "ActorDiedError"}),
        ("never", 503, {"status": "unavailable", "reason": "TimeoutError"}),
    ],
)
def test_health_is_that_of_the_network(
    frontend: Callable[..., Frontend], result: Any, status: int, content: dict
) -> None:
    response = asyncio.run(frontend(_Handle(result), timeout=0.05).healthz(_request()))
    assert (response.status_code, json.loads(bytes(response.body))) == (status, content)
