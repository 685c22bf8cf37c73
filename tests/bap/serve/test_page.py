"""The page in a real browser, in front of a server that answers what a test wants."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = files("bap.serve").joinpath("page.html").read_text(encoding="utf-8")
DOMAINS = [
    {"name": "digits", "classes": ["0", "1"], "size": 32, "accuracy": 81.25, "kept": 0.5},
    {"name": "<b>birds</b>", "classes": ["a"], "size": 64, "accuracy": None, "kept": None},
]
TOP = [{"class": "<i>one</i>", "number": 1, "probability": 0.75}, {"class": "0", "number": 0, "probability": 0.25}]
# What a user does: takes a file.
CHOOSE = '<script>take([new File([new Uint8Array([1, 2])], "a.png", { type: "image/png" })]);</script>'

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")


def test_the_page_asks_no_other_server() -> None:
    assert re.findall(r"https?://|//\w+\.|@import|url\(", PAGE) == []


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """The document of the page after its scripts have run, and an image was chosen."""
    servers = []

    def show(status: int, answer: Any, path: str = "/some/prefix/") -> str:
        asked: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = {"/some/prefix/": PAGE + CHOOSE, "/some/prefix/domains": json.dumps({"domains": DOMAINS})}
                content["/some/prefix"] = content["/some/prefix/"]
                known = self.path in content
                self._send(200 if known else 404, content.get(self.path, ""))

            def do_POST(self) -> None:
                asked.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self._send(status, answer if isinstance(answer, str) else json.dumps(answer))

            def _send(self, status: int, content: str) -> None:
                body = content.encode()
                self.send_response(status)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", f"http://127.0.0.1:{server.server_port}{path}"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
        assert ("/some/prefix/predict/digits", b"\x01\x02") in asked
        return text

    yield show
    for server in servers:
        server.shutdown()
        server.server_close()


def _texts(document: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", document, flags=re.S)
    return [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in found]


@pytest.mark.parametrize("path", ["/some/prefix/", "/some/prefix"])
def test_domains_and_classes_are_shown_as_text(shown: Callable[..., str], path: str) -> None:
    document = shown(200, {"domain": "digits", **TOP[0], "top": TOP}, path)
    assert _texts(document, "option") == ["digits", "<b>birds</b>"]
    assert "2 classes · input 32 × 32 · accuracy 81.3 % · 50 % kept" in document
    assert _texts(document, "li") == ["<i>one</i>75.0 %", "025.0 %"]
    assert "digits, answered in" in document


@pytest.mark.parametrize(
    ("answer", "message"),
    [({"detail": "expected a smaller image"}, "413: expected a smaller image"), ("busy", "413: busy")],
)
def test_refusals_are_shown(shown: Callable[..., str], answer: Any, message: str) -> None:
    document = shown(413, answer)
    assert _texts(document, "li") == []
    assert f'<p id="message" class="bad">{message}</p>' in document
