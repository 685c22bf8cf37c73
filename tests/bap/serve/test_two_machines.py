"""A service with a replica on each of two machines of Ray, one of which is lost while requests flow."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bap.serve import ServeSettings, app
from bap.serve.run import running

from .conftest import check_answer

pytest.importorskip("ray.serve")

# No test depends on time: this ends one that would hang.
GUARD = 120
STORE = 100 * 2**20
NETWORK = "ray::ServeReplica:bap:Network"


def _wait(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.05)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, which takes the requests, and two machines with one CPU each."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # What a machine that is gone takes to be noticed; and workers at the tests' own priority.
    system = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4}
    system["worker_niceness"] = 0
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": system}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_machine = lambda: made.add_node(wait=False, num_cpus=1, object_store_memory=STORE)
        made.machines = [made.add_machine() for _ in range(2)]
        made.wait_for_nodes()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            made.port = int(probe.getsockname()[1])
        # All machines have one address here, so that only one of them can listen.
        ray.init(address=made.address, log_to_driver=False, namespace="serve")
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": made.port})
        ray.shutdown()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def replicas(machine: Any) -> list[int]:
    """Processes of the network's replicas that a machine has started."""
    starters = [each.process.pid for each in machine.all_processes["raylet"]]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in starters and (entry / "cmdline").read_text().startswith(NETWORK):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def running_replicas() -> int:
    """How many replicas of the network Serve counts as running."""
    from ray import serve

    states = serve.status().applications["bap"].deployments["Network"].replica_states
    return states.get("RUNNING", 0)


@dataclass
class Clients:
    """Threads that send images of random domains, one after another, until they are stopped.

    Args:
        port: of HTTP.
        requests: (domain, body).
        answers: (request, status, content), in the order in which they came.
    """

    port: int
    requests: list[tuple[str, bytes]]
    answers: list[tuple[tuple[str, bytes], int, Any]] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, name: str, body: bytes) -> tuple[int, Any]:
        """One request, which must be answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GUARD)
        with contextlib.closing(connection):
            connection.request("POST", f"/predict/{name}", body)
            response = connection.getresponse()
            content = response.read()
            is_json = "json" in response.headers.get("content-type", "")
            return response.status, json.loads(content) if is_json else content.decode()

    def _run(self, number: int) -> None:
        chosen = random.Random(number)
        try:
            while not self.stop.is_set():
                request = chosen.choice(self.requests)
                self.answers.append((request, *self.ask(*request)))
        except BaseException as error:
            self.errors.append(error)

    @contextlib.contextmanager
    def sending(self, count: int) -> Iterator[None]:
        """With so many clients; at the end all have got their answers."""
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def wait_for(self, count: int) -> None:
        """Waits for so many answers more that are good."""
        start = len(self.answers)
        _wait(
            lambda: (
                self.errors
                or sum(status == 200 for _, status, _ in itertools.islice(self.answers, start, None)) >= count
            ),
            f"{count} answers",
        )


@pytest.mark.slow
def test_a_lost_machine_leaves_every_request_answered_and_none_mixed_up(
    cluster: Any, checkpoint: Path, expected: dict[tuple[str, bytes], torch.Tensor]
) -> None:
    settings = ServeSettings.of(
        {"checkpoint": str(checkpoint), "replicas": 2, "max_batch": 4, "queue": 64, "timeout": GUARD}
    )
    with running(settings, app(settings.model_dump()), address=cluster.address) as line:
        assert line.startswith(f"http://127.0.0.1:{cluster.port}/ ")
        assert running_replicas() == 2
        assert [len(replicas(machine)) for machine in cluster.machines] == [1, 1]
        clients = Clients(cluster.port, list(expected))
        with clients.sending(8):
            clients.wait_for(60)
            lost = cluster.machines[0]
            processes = replicas(lost)
            cluster.remove_node(lost, allow_graceful=False)
            clients.wait_for(60)
            # Another one takes its place.
            new = cluster.add_machine()
            _wait(lambda: replicas(new) and running_replicas() == 2, "a second replica again")
            clients.wait_for(60)
        assert not clients.errors
        assert len(processes) == 1
        assert not Path(f"/proc/{processes[0]}").exists()
        # A front end on the lost machine takes what it held with it; what is sent later is answered.
        statuses = [status for _, status, _ in clients.answers]
        assert set(statuses) <= {200, 500, 503}, [answer for answer in clients.answers if answer[1] != 200]
        answers = [answer for answer in clients.answers if answer[1] == 200]
        answers += [(request, *clients.ask(*request)) for request in list(expected)[::5]]
        for (name, body), status, content in answers:
            assert status == 200, content
            check_answer(content, name, expected[name, body])
