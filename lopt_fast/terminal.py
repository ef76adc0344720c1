"""What all commands have in common: where they print, and how they end when something is to be put right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from .errors import UserError, install


def stdout() -> Console:
    """For results."""
    console = Console(highlight=False)
    # A table in a file or a pipe is not cut to 80 columns.
    return console if console.is_terminal else Console(highlight=False, width=160)


def stderr() -> Console:
    """For progress and errors."""
    return Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One line, in red."""
    stderr().print(f"error: {message}", style="red", markup=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End the command with a line and exit status 2."""
    print_error(message)
    raise typer.Exit(2)


@contextmanager
def errors(extra: str | None = None) -> Iterator[None]:
    """What the user can put right is one line and exit status 2. extra: the one that brings what is imported inside."""
    try:
        yield
    except (UserError, OSError) as error:
        fail(str(error))
    except ImportError as error:
        if extra is None:
            raise
        fail(f"{error}: {install(extra)}")


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """The numbers of a command, for its option --json."""
    if path is not None:
        from .training.report import write_json as write

        write(path, value)
