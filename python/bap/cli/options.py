"""Options that several commands of ``bap`` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Checkpoint", "Config", "Domains", "Out", "Progress", "Resume", "Root", "Set"]

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings; see configs/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="A setting, name=value; may be given several times.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a trained network (RUN/checkpoint).")]
Domains = Annotated[list[str] | None, typer.Option("--domain", "-d", help="Only these domains; others are not read.")]
Progress = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Lines on the error stream while training, terminal or not.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last whole epoch in the folder.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the data, in place of the one in the settings.")]
