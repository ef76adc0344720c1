"""Data sets by name, read from the files that the user has; each is read once in a process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from ... import data


def load_images(name: str, folders: Mapping[str, Path]) -> data.Images:
    """`digits` needs no files; `cifar10` its batches; every other name is a folder in MNIST's format (IDX).

    Raises DataError for a folder that is missing from `folders` or unreadable.
    """
    if name == "digits":
        return _digits()
    return _cifar10(_path(name, folders)) if name == "cifar10" else _idx(name, _path(name, folders))


def load_text(name: str, files: Mapping[str, Path]) -> np.ndarray:
    """(n,) uint8. `stdlib`, the sources of Python's library, needs no file; every other name is a file.

    Raises DataError for a file that is missing from `files` or unreadable.
    """
    return _stdlib() if name == "stdlib" else _text(_path(name, files))


def _path(name: str, given: Mapping[str, Path]) -> Path:
    where = {data.canonical(known): path for known, path in given.items()}.get(data.canonical(name))
    if where is None:
        raise data.DataError(
            f"data set {name!r}: say where its files are, in the table [data] of the configuration "
            f'({name} = "PATH") or with --data {name}=PATH; without files there are digits (images) and stdlib (text)'
        )
    return Path(where).expanduser().resolve()


@cache
def _digits() -> data.Images:
    return data.load_digits()


@cache
def _cifar10(folder: Path) -> data.Images:
    return data.load_cifar10(folder)


@cache
def _idx(name: str, folder: Path) -> data.Images:
    return data.load_idx(folder, name=name)


@cache
def _stdlib() -> np.ndarray:
    return data.load_stdlib_bytes()


@cache
def _text(path: Path) -> np.ndarray:
    return data.load_text_bytes(path)
