"""Files from the Hugging Face Hub: `hf:owner/name@revision/file`.

The revision is required. A repository on the Hub can be changed at any time, and with it every training that loads
its weights; a revision is what makes a result reproducible. A commit hash names its contents for ever; a branch or tag
is accepted with a warning.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from .errors import install
from .spec import SpecError

PREFIX = "hf:"
_REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@\s]+))?(/(?P<file>[^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUFFIXES = (".safetensors", ".state", ".npz")


class HubError(SpecError):
    """A file on the Hub that cannot be had; names it, the reason and the remedy."""


class HubWarning(UserWarning):
    """A revision whose contents may change."""


def is_reference(source: str) -> bool:
    """Whether `source` names a file on the Hub."""
    return source.startswith(PREFIX)


def fetch(reference: str) -> Path:
    """The local copy of a file on the Hub, downloaded if it is not in the Hub's cache.

    Without a file name it is the repository's only file of a known kind (.safetensors, .state, .npz).
    Raises HubError.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise HubError(f"{reference!r}: must be hf:owner/name@revision or hf:owner/name@revision/file")
    repo, revision, file = match["repo"], match["revision"], match["file"]
    if revision is None:
        raise HubError(
            f"{reference!r} names no revision, so what it loads could change at any time: give the commit, as "
            f"hf:{repo}@COMMIT (the page of the repository shows it under 'Files', 'History')"
        )
    if _COMMIT.fullmatch(revision) is None:
        warnings.warn(
            f"{reference}: {revision!r} is not a commit hash of 40 digits; branches and tags can be moved",
            HubWarning, stacklevel=2,
        )  # fmt: skip
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"{reference}: huggingface_hub cannot be imported ({error}): {install('hub')}, or download "
            "the file and give its path"
        ) from error
    try:
        if file is None:
            names = huggingface_hub.list_repo_files(repo, revision=revision)
            file = _only(reference, [name for name in names if name.endswith(_SUFFIXES)])
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except HubError:
        raise
    except Exception as error:  # the library and its HTTP client raise many things
        raise HubError(f"{reference}: cannot be downloaded ({type(error).__name__}: {error})") from error


def _only(reference: str, names: list[str]) -> str:
    if len(names) != 1:
        what = f"has {', '.join(names)}" if names else f"has no file of a known kind ({', '.join(_SUFFIXES)})"
        raise HubError(f"{reference}: the repository {what}. Name one: {reference}/FILE")
    return names[0]
