"""The commands of meta-training and evaluation. What they need is imported when they run."""

from __future__ import annotations

import typer

from .command import meta_train
from .evaluation.command import eval_command


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("meta-train")(meta_train)
    app.command("eval")(eval_command)
