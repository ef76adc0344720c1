"""The base of all errors that tell the caller what to put right."""

from __future__ import annotations


class UserError(Exception):
    """Something that the caller can put right. The message names the culprit and the remedy: commands print it."""


def install(extra: str) -> str:
    """The remedy for a missing package, for messages. extra: the one of pyproject.toml that brings it.

    From the folder, as README.md installs: a package index may hold something else under the name lopt-fast.
    """
    return f"pip install '.[{extra}]' in the source folder of lopt_fast"
