"""The application on Ray Serve: front ends that take requests and decode images, and replicas of the network.

    client -> Ray's HTTP proxy -> Frontend (checks, decodes, waits) -> Network (batches, computes)

Both have their own number of processes, on any node. A request that finds the queue full is refused by Ray, at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from bap.serve.network import Answer, Query, ServedNetwork, answer_each
from bap.serve.requests import DomainInput, RequestError, decode, domain_inputs, find_domain
from bap.serve.settings import ServeSettings
from bap.train.checkpoint import load_checkpoint

__all__ = ["Frontend", "Network", "application", "build", "network_deployment"]

_RETRY_AFTER = 1
# Threads that decode images in one front end; each may hold a whole image.
_DECODERS = 2
_MILLISECONDS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0]
_COUNTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
# No other site's pages, scripts or images: the page needs none.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Network:
    """A replica of the network.

    Args:
        settings: of the service.
        make: loads the network.
    """

    def __init__(self, settings: ServeSettings, make: Callable[[ServeSettings], ServedNetwork] = ServedNetwork) -> None:
        self._network = make(settings)
        batch: Any = self._batch
        batch.set_max_batch_size(settings.max_batch)
        batch.set_batch_wait_timeout_s(settings.max_wait_ms / 1e3)
        self._sizes = metrics.Histogram("bap_batch_images", "Images of a batch.", _COUNTS)
        self._domains = metrics.Histogram("bap_batch_domains", "Domains of a batch.", _COUNTS)
        self._times = metrics.Histogram("bap_batch_ms", "Milliseconds of computing a batch.", _MILLISECONDS)

    @serve.batch
    async def _batch(self, queries: list[Query]) -> list[Answer]:
        # On the event loop: meanwhile requests gather, so that the next batch is as large as it can be.
        started = time.perf_counter()
        answers = answer_each(self._network, queries)
        self._times.observe(1e3 * (time.perf_counter() - started))
        self._sizes.observe(len(queries))
        self._domains.observe(len({domain for domain, _ in queries}))
        return answers

    async def predict(self, domain: str, pixels: np.ndarray) -> Answer:
        """The most probable classes of one image, computed in a batch with others."""
        answer: Answer = await self._batch((domain, pixels))
        return answer

    async def ready(self) -> bool:
        """Whether requests are answered."""
        return True


class Frontend:
    """Takes requests.

    Args:
        settings: of the service.
        inputs: the domains.
        networks: the replicas that answer.
        network_of: {domain: index into ``networks``}.
    """

    def __init__(
        self,
        settings: ServeSettings,
        inputs: Mapping[str, DomainInput],
        networks: list[DeploymentHandle],
        network_of: Mapping[str, int],
    ) -> None:
        self._settings, self._inputs = settings, dict(inputs)
        self._networks, self._network_of = networks, dict(network_of)
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self._page = files("bap.serve").joinpath("page.html").read_text(encoding="utf-8")
        labels: Any = ("domain", "status")
        self._requests = metrics.Counter("bap_requests", "Requests answered.", labels)
        self._latency = metrics.Histogram(
            "bap_request_ms", "Milliseconds from a request to its answer.", _MILLISECONDS, ("domain",)
        )

    async def page(self, request: Request) -> Response:
        """A page to try images."""
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def domains(self, request: Request) -> Response:
        """The domains, their classes, and what the checkpoint says of them."""
        domains = [
            {"name": d.name, "classes": d.classes, "size": d.size, "accuracy": d.accuracy, "kept": d.kept}
            for d in self._inputs.values()
        ]
        return JSONResponse({"domains": domains})

    async def healthz(self, request: Request) -> Response:
        """200 if every network answers or is busy, else 503."""
        for network in self._networks:
            try:
                await self._within(network.ready.remote(), min(5.0, self._settings.timeout))
            except BackPressureError:
                continue
            except Exception as error:
                return JSONResponse({"status": "unavailable", "reason": type(error).__name__}, 503)
        return JSONResponse({"status": "ok"})

    async def predict(self, request: Request) -> Response:
        """The most probable classes of the image in the body; the path or the query names the domain."""
        domain = request.path_params.get("domain") or request.query_params.get("domain")
        started = time.perf_counter()
        try:
            status, content = 200, await self._predict(request, domain)
        except RequestError as error:
            status, content = error.status, {"detail": error.message}
            if status == 404:
                content["domains"] = list(self._inputs)
        # Names that clients make up are no labels.
        label = domain if domain in self._inputs else ""
        self._requests.inc(tags={"domain": label or "", "status": str(status)})
        if status == 200:
            self._latency.observe(1e3 * (time.perf_counter() - started), tags={"domain": label or ""})
        return JSONResponse(content, status, {"Retry-After": str(_RETRY_AFTER)} if status == 503 else None)

    async def _predict(self, request: Request, name: str | None) -> dict[str, Any]:
        domain = find_domain(self._inputs, name)
        try:
            body = await asyncio.wait_for(self._body(request), self._settings.timeout)
        except asyncio.TimeoutError:
            raise RequestError(408, f"expected the image within {self._settings.timeout:g} s") from None
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, decode, body, domain, self._settings.max_image_pixels)
        answer = await self._answer(domain.name, pixels)
        if isinstance(answer, str):
            raise RequestError(500, f"the network failed: {answer}")
        top = [
            {"class": domain.classes[number], "number": number, "probability": probability}
            for number, probability in answer
        ]
        return {"domain": domain.name, **top[0], "top": top}

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.max_image_bytes
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise RequestError(
                415, "expected the image itself as the body, got a form. Hint: curl --data-binary @image.png"
            )
        announced = request.headers.get("content-length", "0")
        # Python refuses to convert numbers of thousands of digits.
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise RequestError(413, f"expected an image of at most {limit:,} bytes, got {announced[:18]}")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise RequestError(413, f"expected an image of at most {limit:,} bytes, got more")
        return bytes(body)

    async def _answer(self, domain: str, pixels: np.ndarray) -> Answer:
        """The network's answer; a request whose replica died is sent once more."""
        network = self._networks[self._network_of[domain]]
        limit = time.monotonic() + self._settings.timeout
        try:
            try:
                return await self._within(network.predict.remote(domain, pixels), limit - time.monotonic())
            except (RayActorError, ReplicaUnavailableError):
                return await self._within(network.predict.remote(domain, pixels), limit - time.monotonic())
        except BackPressureError:
            raise RequestError(503, "too many requests are waiting, try again later") from None
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
            raise RequestError(503, "no replica could answer, try again later") from None
        except asyncio.TimeoutError:
            raise RequestError(504, f"no answer within {self._settings.timeout:g} s") from None

    @staticmethod
    async def _within(response: Any, seconds: float) -> Any:
        async def answer() -> Any:
            return await response

        try:
            return await asyncio.wait_for(answer(), max(seconds, 0.0))
        except asyncio.TimeoutError:
            response.cancel()
            raise


def _asgi() -> Starlette:
    """Routes to the methods of the front end of this process."""

    def route(path: str, name: str, method: str) -> Route:
        async def call(request: Request) -> Response:
            response: Response = await getattr(serve.get_replica_context().servable_object, name)(request)
            return response

        return Route(path, call, methods=[method])

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=[
            route("/", "page", "GET"),
            route("/domains", "domains", "GET"),
            route("/healthz", "healthz", "GET"),
            route("/predict", "predict", "POST"),
            route("/predict/{domain}", "predict", "POST"),
        ],
        exception_handlers={HTTPException: refused},
    )


def network_deployment(
    settings: ServeSettings, make: Callable[[ServeSettings], ServedNetwork] = ServedNetwork, name: str = "Network"
) -> serve.Application:
    """The replicas of one network.

    Args:
        settings: of the service.
        make: loads the network in each replica.
        name: of the deployment.
    """
    deployment = serve.deployment(
        name=name,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.timeout,
    )
    return deployment(Network).bind(settings, make)


def application(
    settings: ServeSettings,
    inputs: Mapping[str, DomainInput],
    networks: list[serve.Application],
    network_of: Mapping[str, int],
) -> serve.Application:
    """The whole service.

    Args:
        settings: of the service.
        inputs: its domains.
        networks: from :func:`network_deployment`.
        network_of: {domain: index into ``networks``}.
    """
    # As many as the networks take and queue, and some that are decoded or refused meanwhile.
    ongoing = len(networks) * (settings.queue + settings.replicas * settings.max_ongoing) + 16
    deployment = serve.deployment(
        name="Frontend",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config=BackpressureConfig(retry_after_s=_RETRY_AFTER),
        graceful_shutdown_timeout_s=settings.timeout,
    )
    frontend = serve.ingress(_asgi)(Frontend)
    return deployment(frontend).bind(settings, dict(inputs), networks, dict(network_of))


def build(settings: ServeSettings) -> serve.Application:
    """The application of a checkpoint: one network answers all domains.

    Raises:
        FileError: if the checkpoint cannot be loaded.
        ValueError: if its domains cannot be served together.
    """
    _, config, specs = load_checkpoint(settings.checkpoint, settings.domains)
    inputs = domain_inputs(config, specs)
    return application(settings, inputs, [network_deployment(settings)], dict.fromkeys(inputs, 0))
