"""The command ``bap serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from bap.cli.options import Checkpoint, Domains

__all__ = ["serve"]


def serve(
    checkpoint: Checkpoint,
    domain: Domains = None,
    host: Annotated[str, typer.Option(help="Interface; 0.0.0.0 takes requests from other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    replicas: Annotated[int, typer.Option(help="Processes that hold the network.")] = 1,
    cpus: Annotated[int, typer.Option(help="CPUs, and threads, of each replica.")] = 1,
    backend: Annotated[str | None, typer.Option(help="heuristic (if none is given), native, aten or auto.")] = None,
    max_batch: Annotated[int, typer.Option(help="Images of a batch.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(help="Milliseconds that a batch waits for more images.")] = 2.0,
    queue: Annotated[int, typer.Option(help="Images that may wait for a replica; further ones are refused.")] = 64,
    max_image_bytes: Annotated[int, typer.Option(help="Bytes of a request.")] = 10 * 2**20,
    max_image_pixels: Annotated[int, typer.Option(help="Pixels of an image, before it is resized.")] = 2**25,
    timeout: Annotated[float, typer.Option(help="Seconds for receiving a request, and for answering it.")] = 30.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to serve in, auto: the one that runs here; none starts one.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the application in the cluster; replaces one that has it.")] = "bap",
    route: Annotated[str, typer.Option(help="Prefix of all paths.")] = "/",
    metrics_port: Annotated[int | None, typer.Option(help="Port of the metrics; a free one if none is given.")] = None,
) -> None:
    """Answer requests for all domains over HTTP, with a page to try images; Ctrl-C stops it."""
    from bap.serve import ServeSettings
    from bap.serve.run import run

    settings = ServeSettings.of(
        {
            "checkpoint": checkpoint,
            "domains": tuple(domain) if domain else None,
            "replicas": replicas,
            "cpus": cpus,
            "backend": backend,
            "max_batch": max_batch,
            "max_wait_ms": max_wait_ms,
            "queue": queue,
            "max_image_bytes": max_image_bytes,
            "max_image_pixels": max_image_pixels,
            "timeout": timeout,
        }
    )
    run(
        settings,
        lambda line: typer.echo(f"bap serve: {line}", err=True),
        host=host,
        port=port,
        address=address,
        name=name,
        route=route,
        metrics_port=metrics_port,
    )
