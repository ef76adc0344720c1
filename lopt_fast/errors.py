"""The base of all errors that tell the caller what to put right."""

from __future__ import annotations


class UserError(Exception):
    """Something that the caller can put right. The message names the culprit and the remedy: commands print it."""
