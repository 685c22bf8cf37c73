"""Starts the service and stops it: in a Ray of its own on this machine, or in a cluster that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bap.serve.settings import ServeError, ServeSettings

__all__ = ["check_port", "run", "running"]

# Answers of a few kilobytes pass through it; Ray's own default is a third of the memory.
_OBJECT_STORE_BYTES = 100 * 2**20


def check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on.

    Raises:
        ValueError: for numbers that no port has.
        ServeError: if the port is in use, or the host is not this machine's.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"serve(): expected `port` to be from 1 to 65535, got {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: connections of an earlier one that still wait do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(
            f"serve(): expected `host` and `port` to be free, got {host}:{port}: {error.strerror or error}. "
            "Hint: --port takes another one."
        ) from None


def _check_cluster(address: str) -> None:
    """Refuses an address where nothing listens, which Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        # Names such as ``auto``, whose errors Ray reports at once.
        return
    try:
        socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ServeError(
            f"serve(): expected `address` to be a Ray cluster's, got {address!r}: {error.strerror or error}."
        ) from None


def _start_ray(settings: ServeSettings, address: str | None, metrics_port: int | None, cpus: int | None) -> None:
    # Before Ray is imported: nothing is sent to its authors unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Serve replaces a proxy that takes longer, and gives up the start with it; its own 5 seconds are few where the
    # machine is busy.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Ray runs its workers at the niceness of background jobs, 15, unless it is told not to.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "serve"}
    if address is not None:
        _check_cluster(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ServeError(
                f"serve(): expected `address` to be a Ray cluster's, got {address!r}: {error}. "
                "Hint: RAY_AUTH_MODE=token for a cluster that asks for a token."
            ) from None
        available = ray.cluster_resources().get("CPU", 0)
    else:
        available = os.cpu_count() or 1
    needed = settings.replicas * settings.cpus
    if cpus is None and needed > available:
        raise ServeError(
            f"serve(): expected `replicas` x `cpus` to be at most the {available:g} CPUs there are, got "
            f"{settings.replicas} x {settings.cpus}."
        )
    if address is None:
        ray.init(
            address="local",
            num_cpus=cpus or needed,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _metrics_export_port=metrics_port,
            **options,
        )


@contextlib.contextmanager
def running(
    settings: ServeSettings,
    application: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    name: str = "bap",
    route: str = "/",
    metrics_port: int | None = None,
    cpus: int | None = None,
) -> Iterator[str]:
    """The service while the context lasts; at its end replicas finish what they compute.

    Args:
        settings: of the service.
        application: from :func:`bap.serve.app`.
        host, port: where requests are taken; a cluster that serves already keeps its own.
        address: of a Ray cluster, ``auto`` for the one on this machine; None starts one that ends with the service.
        name: of the application in the cluster.
        route: prefix of its paths.
        metrics_port: of Ray's metrics; None takes a free one. A cluster keeps its own.
        cpus: that a Ray of its own may give out, whether the machine has them or not; None: what the replicas need.

    Yields:
        One line: where the service and its metrics are.

    Raises:
        ServeError: if it cannot be started.
        ValueError: for options that cannot be used.
    """
    if not route.startswith("/"):
        raise ValueError(f"serve(): expected `route` to begin with '/', got {route!r}.")
    if address is None:
        check_port(host, port)
    _start_ray(settings, address, metrics_port, cpus)
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            serve.run(application, name=name, route_prefix=route, logging_config=quiet)
        except (RuntimeError, TimeoutError, RayError) as error:
            raise ServeError(f"serve(): expected the service to start, got: {error}") from None
        node = next(node for node in ray.nodes() if node["Alive"])
        metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        # A cluster that serves already keeps its own; there is no public way to ask.
        client: Any = _get_global_client()
        http = client.http_config
        prefix = route if route.endswith("/") else f"{route}/"
        shown = f"[{http.host}]" if ":" in http.host else http.host
        yield f"http://{shown}:{http.port}{prefix} (metrics: {metrics})"
    finally:
        with contextlib.suppress(Exception):
            # Replicas finish what they compute, which the end of Ray, or of Serve, would cut off.
            serve.delete(name)
        ray.shutdown()


def run(settings: ServeSettings, report: Callable[[str], None], **options: Any) -> None:
    """Serves a checkpoint until SIGTERM or Ctrl-C.

    Args:
        settings: of the service.
        report: is given one line once requests are answered.
        **options: of :func:`running`.
    """
    from bap.serve import app

    stopped = threading.Event()
    with running(settings, app(settings.model_dump()), **options) as line:
        # After the start: Ray has handlers of its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        report(line)
        while not stopped.wait(0.5):
            pass
