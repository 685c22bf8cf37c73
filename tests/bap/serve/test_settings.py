from __future__ import annotations

from pathlib import Path

import pytest
from bap.serve import ServeSettings


def test_strings_of_a_command_line_are_converted() -> None:
    settings = ServeSettings.of({"checkpoint": "a", "domains": "x,y", "replicas": "2", "max_wait_ms": "0.5"})
    assert (settings.domains, settings.replicas, settings.max_wait_ms) == (("x", "y"), 2, 0.5)
    assert settings.checkpoint == Path.cwd() / "a"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "`checkpoint` to be given, got none"),
        ({"replicas": 0}, "`replicas` to fit .* greater than or equal to 1.*, got 0"),
        ({"max_batch": "many"}, "`max_batch` to fit .*, got 'many'"),
        ({"max_wait_ms": float("nan")}, "`max_wait_ms` to fit"),
        ({"queue": 0}, "`queue` to fit"),
        ({"max_image_pixels": 2**40}, "`max_image_pixels` to fit"),
        ({"timeout": float("inf")}, "`timeout` to fit"),
        ({"backend": "cuda"}, "`backend` to fit .*'native', 'aten' or 'auto'.*, got 'cuda'"),
        ({"replica": 2}, "`replica` to be one of checkpoint, domains, .*, got 2"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    given = {"checkpoint": "a", **values} if values else {}
    with pytest.raises(ValueError, match=rf"serve\(\): expected {message}"):
        ServeSettings.of(given)


def test_a_replica_holds_a_batch_and_the_next() -> None:
    assert ServeSettings.of({"checkpoint": "a", "max_batch": 5}).max_ongoing == 10
