"""The command ``bap``: runs a command of :mod:`bap.cli.commands`, and reports a user's mistake in one line.

It imports nothing that the extras bring, so that a missing package is named, too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["main"]

# Import names of the packages of `pip install bap_kernels[method]`, and of the other extras.
_EXTRAS = {
    "method": (
        "matplotlib",
        "PIL",
        "pydantic",
        "pydantic_core",
        "rich",
        "sklearn",
        "tensorboard",
        "torchvision",
        "typer",
        "yaml",
    ),
    "serve": ("fastapi", "ray", "starlette", "uvicorn"),
}


def __getattr__(name: str) -> Any:
    if name == "app":
        from bap.cli.commands import app

        return app
    raise AttributeError(name)


def _message(error: BaseException) -> str | None:
    """The message of a user's mistake; None for a defect, which shows its traceback."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        for extra, packages in _EXTRAS.items():
            if package in packages:
                return f"expected the package {package!r}, got none. Hint: pip install 'bap_kernels[{extra}]'"
        return None
    # Importing torch takes seconds; an error of torch's implies that it is imported.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"{error} Hint: a smaller `batch`, or a larger `accumulate`, needs less memory."
    if isinstance(error, OSError) and error.filename is not None:
        return f"expected to read or write {os.fspath(error.filename)}, got: {error.strerror}."
    if isinstance(error, (ValueError, OSError, ImportError, NotImplementedError)):
        return f"{error}"
    try:
        from bap.files import FileError
        from bap.prune import PruneError
        from bap.serve.settings import ServeError
        from bap.train import TrainError
    except ImportError:
        return None
    return f"{error}" if isinstance(error, (FileError, PruneError, ServeError, TrainError)) else None


def main() -> None:
    """Runs the command; the exit status is 2 for a user's mistake, 130 after Ctrl-C."""
    rank = os.environ.get("RANK", "0")
    try:
        from bap.cli.commands import app

        app()
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"bap: {message}" if rank == "0" else f"bap (process {rank}): {message}", file=sys.stderr)
        sys.exit(2)
