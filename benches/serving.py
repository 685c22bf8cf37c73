"""Requests per second of a service: ``python -m benches.serving [--out DIR]``, under four minutes on an idle machine.

Closed-loop clients on this machine send images of random domains to ``bap serve``, in three forms that differ in what
stands behind the front end:

    shared      bap serve: every replica has one planned network, and batches mix domains
    per domain  a replica for each domain, with that domain's network only
    reloading   replicas that hold one domain's small network, and read another one's weights when the domain changes

ResNet-26 at 64x64 with random weights, each domain on half of the channels of its own. Every answer is compared with
that of the shared network before anything is timed. A row is printed, and ``serving.json`` written, as soon as it is
measured; a form that fails is named, and the others go on. Memory is the proportional set size of all replicas of the
network.
"""

import argparse
import contextlib
import copy
import http.client
import io
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bap.config import Config
from bap.data.transform import normalised
from bap.prune.deploy import deploy
from bap.prune.layers import SwitchBank
from bap.serve.network import Query, ServedNetwork
from bap.serve.run import running
from bap.serve.settings import ServeError, ServeSettings
from bap.train.checkpoint import load_checkpoint, save_checkpoint
from bap.train.network import switched_network
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import bap_kernels as bk
from benches.machine import commit, cpu_model, versions
from benches.tables import Table

SIZE, CLASSES, DENSITY = 64, 100, 0.5
FORMS = ("shared", "per domain", "reloading")
TITLE = "ray::ServeReplica:bap:Network"


def write_checkpoint(folder: Path, domains: Sequence[str]) -> None:
    """A network with random weights whose domains keep other channels, half of every layer's."""
    config = Config()
    torch.manual_seed(0)
    model = switched_network(config, dict.fromkeys(domains, CLASSES)).eval()
    bank = SwitchBank(model)
    for name in bank.domains:
        scores = [torch.full((size,), 1e-2) for size in bank.sizes]
        for layer in scores:
            layer[torch.randperm(len(layer))[: int(len(layer) * (1 - DENSITY))]] = 0.0
        bank.write(name, torch.cat(scores))
    classes = [str(number) for number in range(CLASSES)]
    spec = {"classes": classes, "size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint(folder, model, config, {name: dict(spec) for name in domains})


class ReloadingNetwork(ServedNetwork):
    """The small network of one domain at a time, whose weights are read from a file when the domain changes."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(settings)
        model, _, _ = load_checkpoint(settings.checkpoint)
        narrow = deploy(model, torch.zeros(1, 3, SIZE, SIZE)).model
        del self._planned
        self._folder = tempfile.TemporaryDirectory()
        self._skeletons = {}
        for name in self.inputs:
            small = bk.specialize(narrow, name)
            save_file({key: x.contiguous() for key, x in small.state_dict().items()}, self._file(name))
            self._skeletons[name] = small.to("meta")
        self._loaded: tuple[str, torch.nn.Module] | None = None

    def _file(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.safetensors"

    def _network(self, name: str) -> torch.nn.Module:
        if self._loaded is None or self._loaded[0] != name:
            model = copy.deepcopy(self._skeletons[name])
            model.load_state_dict(load_file(self._file(name)), assign=True)
            self._loaded = name, model.eval()
        return self._loaded[1]

    def logits(self, queries: Sequence[Query]) -> torch.Tensor:
        """Domain by domain, beginning with the one that is loaded."""
        if hasattr(self, "_planned"):
            return super().logits(queries)
        self._use_settings()
        result = torch.empty(len(queries), CLASSES)
        loaded = self._loaded[0] if self._loaded else ""
        for name in sorted({name for name, _ in queries}, key=lambda name: (name != loaded, name)):
            chosen = [number for number, query in enumerate(queries) if query[0] == name]
            domain = self.inputs[name]
            x = torch.stack([normalised(queries[number][1], domain.mean, domain.std) for number in chosen])
            with torch.inference_mode():
                result[chosen] = self._network(name)(x)
        return result


def application_of(form: str, settings: ServeSettings) -> Any:
    """The Ray Serve application of one form."""
    from bap.serve.deployments import application, build, network_deployment
    from bap.serve.requests import domain_inputs

    if form == "shared":
        return build(settings)
    _, config, specs = load_checkpoint(settings.checkpoint)
    inputs = domain_inputs(config, specs)
    if form == "reloading":
        return application(settings, inputs, [network_deployment(settings, ReloadingNetwork)], dict.fromkeys(inputs, 0))
    networks = [
        network_deployment(settings.model_copy(update={"domains": (name,), "replicas": 1}), name=f"Network-{number}")
        for number, name in enumerate(inputs)
    ]
    return application(settings, inputs, networks, {name: number for number, name in enumerate(inputs)})


def images(count: int) -> list[bytes]:
    """PNG files of noise."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def ask(connection: http.client.HTTPConnection, domain: str, body: bytes) -> dict[str, Any]:
    """One request; anything but an answer is an error of the bench."""
    connection.request("POST", f"/predict/{domain}", body)
    response = connection.getresponse()
    content: dict[str, Any] = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"expected an answer, got {response.status}: {content}")
    return content


def load(port: int, domains: Sequence[str], bodies: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """Latencies, in seconds, of the requests that clients got answered one after another."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    errors: list[BaseException] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        choose = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            with contextlib.closing(connection):
                while (started := time.perf_counter()) < end:
                    ask(connection, choose.choice(domains), choose.choice(bodies))
                    latencies[number].append(time.perf_counter() - started)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [latency for each in latencies for latency in each]


def replica_bytes() -> int:
    """Proportional set size of the processes that hold networks."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_text().startswith(TITLE):
                found = re.search(r"^Pss:\s+(\d+) kB", (entry / "smaps_rollup").read_text(), flags=re.M)
                total += 1024 * int(found[1]) if found else 0
        except OSError:
            continue
    return total


def measure(
    form: str,
    settings: ServeSettings,
    domains: Sequence[str],
    counts: Sequence[int],
    options: argparse.Namespace,
    expected: dict[str, dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Reports the rows of one form; ``expected`` takes the first form's answers, and checks those of the others."""
    bodies = images(16)
    cpus = len(domains) if form == "per domain" else None
    port = options.port
    with running(settings, application_of(form, settings), port=port, cpus=cpus):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            for name in domains:
                answer = ask(connection, name, bodies[0])
                known = expected.setdefault(name, answer)
                if abs(answer["probability"] - known["probability"]) > 1e-4:
                    raise RuntimeError(f"expected {form} to answer as shared, got {answer} in place of {known}.")
        for count in counts:
            load(port, domains[:count], bodies, options.clients, options.seconds / 4)
            started = time.perf_counter()
            latencies = load(port, domains[:count], bodies, options.clients, options.seconds)
            cuts = statistics.quantiles(latencies, n=100)
            report(
                {
                    "form": form,
                    "domains": count,
                    "requests": len(latencies),
                    "requests_per_second": len(latencies) / (time.perf_counter() - started),
                    "p50_ms": 1e3 * cuts[49],
                    "p99_ms": 1e3 * cuts[98],
                    "replica_bytes": replica_bytes(),
                }
            )


def table(rows: Sequence[dict[str, Any]], note: str) -> Table:
    """The rows as a table."""
    lines = [
        [
            str(row["form"]),
            str(row["domains"]),
            f"{row['requests_per_second']:.0f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['replica_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return Table("Serving", ["form", "domains", "requests/s", "p50 ms", "p99 ms", "MiB"], lines, note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.serving", description=__doc__)
    split = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--domains", type=split, default=[1, 4, 10], help="numbers of domains in random order")
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS), help=", ".join(FORMS))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement, after a quarter of it unseen")
    parser.add_argument("--replicas", type=int, default=1, help="of shared and reloading")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--port", type=int, default=8799)
    parser.add_argument("--out", type=Path, help="folder for serving.json")
    options = parser.parse_args(arguments)
    console = Console()
    domains = [f"domain{number}" for number in range(max(options.domains))]
    facts = {
        "cpu": cpu_model(),
        "commit": commit(),
        "versions": versions(),
        **{name: getattr(options, name) for name in ("clients", "seconds", "replicas", "max_batch")},
    }
    rows: list[dict[str, Any]] = []
    expected: dict[str, dict[str, Any]] = {}
    failed = 0

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(
            f"{row['form']}, {row['domains']} domains: {row['requests_per_second']:.0f} requests/s, "
            f"p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms",
            highlight=False,
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "serving.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), domains)
        settings = ServeSettings.of(
            {"checkpoint": folder, "replicas": options.replicas, "max_batch": options.max_batch, "queue": 1024}
        )
        for form in options.forms:
            try:
                measure(form, settings, domains, options.domains, options, expected, report)
            except (RuntimeError, OSError, ServeError) as error:
                failed += 1
                console.print(f"{form} FAILED: {error}", highlight=False, markup=False)
    note = f"{options.clients} clients, batches of at most {options.max_batch}, one thread a replica; {facts['cpu']}."
    console.print(table(rows, note).rich())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
