"""What is refused before Ray starts, and the command line."""

from __future__ import annotations

import builtins
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bap.cli import main
from bap.serve import ServeError, app, run
from bap.serve.run import check_port


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs `bap serve` with arguments that are refused: exit status and errors."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bap", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


def test_a_free_port_is_accepted(taken: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_port("127.0.0.1", port)


def test_a_port_in_use_is_named(taken: int) -> None:
    with pytest.raises(ServeError, match=rf"to be free, got 127.0.0.1:{taken}: Address already in use.*--port"):
        check_port("127.0.0.1", taken)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.77"])
def test_a_host_that_is_not_this_machine_is_named(host: str) -> None:
    with pytest.raises(ServeError, match=f"to be free, got {host}:8000: "):
        check_port(host, 8000)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_have_bounds(port: int) -> None:
    with pytest.raises(ValueError, match=rf"`port` to be from 1 to 65535, got {port}\."):
        check_port("127.0.0.1", port)


def test_mistakes_are_one_line(
    serve: Callable[..., tuple[int, str]], checkpoint: Path, taken: int, tmp_path: Path
) -> None:
    pytest.importorskip("ray.serve")
    for arguments, message in (
        ((tmp_path / "none",), "config.json"),
        ((checkpoint, "--domain", "stripes"), "to have one of ['shapes', 'digits', 'glyphs'], got 'stripes'"),
        ((checkpoint, "--max-batch", "0"), "expected `max_batch` to fit"),
        ((checkpoint, "--port", taken), "Address already in use"),
        ((checkpoint, "--replicas", "4000"), "expected `replicas` x `cpus` to be at most"),
        ((checkpoint, "--route", "birds"), "expected `route` to begin with '/', got 'birds'"),
        ((checkpoint, "--address", "127.0.0.1:1"), "to be a Ray cluster's, got '127.0.0.1:1': Connection refused"),
    ):
        status, errors = serve(*arguments)
        assert status == 2
        assert errors.startswith("bap: ")
        assert message in errors
        assert errors.count("\n") == 1


def test_a_missing_extra_is_named(
    serve: Callable[..., tuple[int, str]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_ray(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "bap.serve.deployments", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_ray)
    status, errors = serve(checkpoint)
    assert (status, errors) == (
        2,
        "bap: expected the package 'ray', got none. Hint: pip install 'bap_kernels[serve]'\n",
    )


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_worker_niceness", "0"),
        ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"),
    ],
)
def test_what_ray_is_told_is_left_to_the_user(monkeypatch: pytest.MonkeyPatch, name: str, default: str) -> None:
    """No usage statistics, no low priority, and time for a slow start; unless the user says something else."""
    ray = pytest.importorskip("ray")
    seen = []
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(run.os.environ[name]))
    settings = run.ServeSettings.of({"checkpoint": "a"})
    for value in (None, "1"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        run._start_ray(settings, None, None, None)
    assert seen == [default, "1"]


def test_a_service_that_ray_cannot_start_is_a_mistake_of_one_line(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    pytest.importorskip("ray.serve")
    from ray import serve
    from ray.exceptions import ActorDiedError

    def fails(**_: Any) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(run, "_start_ray", lambda *_: None)
    monkeypatch.setattr(run, "check_port", lambda *_: None)
    monkeypatch.setattr(serve, "start", fails)
    monkeypatch.setattr(serve, "delete", lambda _: None)
    running = run.running(run.ServeSettings.of({"checkpoint": str(checkpoint)}), None)
    with pytest.raises(ServeError, match=r"serve\(\): expected the service to start, got: The actor died"), running:
        pass


def test_the_builder_takes_the_strings_of_rays_command_line(checkpoint: Path) -> None:
    pytest.importorskip("ray.serve")
    application = app({"checkpoint": str(checkpoint), "domains": "digits,glyphs", "replicas": "2"})
    assert type(application).__name__ == "Application"
    with pytest.raises(ValueError, match="expected `replica` to be one of checkpoint, "):
        app({"checkpoint": str(checkpoint), "replica": "2"})
