"""Files of published meta-parameters: which format one has is seen from its contents, and nothing in it is executed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from ..spec import SpecError
from . import msgpack
from .paths import Arrays

DOCUMENT = "meta"
"""Where a file that was written here says what it holds: an array in .npz, an entry of the header in safetensors."""
_WRAPPER = frozenset(("params", "gen_id", "step"))
"""google/learned_optimization stores meta-parameters within these (`gradient_learner.ParameterCheckpoint`)."""
_REAL = {"F16", "BF16", "F32", "F64"}


class SourceError(SpecError):
    """A file of meta-parameters that cannot be read; names it, the reason and the remedy."""


@dataclass(frozen=True)
class Source:
    """The contents of a file."""

    name: str
    format: str
    """msgpack, npz or safetensors"""
    leaves: Arrays
    """By path: keys of nested dictionaries joined by "/"."""
    sha256: str
    """Of the file."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """What it says about itself."""


def digest(leaves: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays in whatever file: of the path, a zero byte and the little-endian float32 of each, sorted."""
    whole = sha256()
    for path in sorted(leaves):
        whole.update(f"{path}\0".encode() + leaves[path].astype("<f4").tobytes())
    return whole.hexdigest()


def read(path: Path) -> Source:
    """The arrays of a file. Raises SourceError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    document: Any = {}
    if data[:4] == b"PK\x03\x04":
        form = "npz"
        leaves, document = _npz(path, data)
    elif data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        form = "safetensors"
        leaves, document = _safetensors(path)
    elif data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise SourceError(_pickle(path))
    else:
        form = "msgpack"
        leaves = _msgpack(path, data)
    for name, a in leaves.items():
        if a.dtype.kind != "f":
            raise SourceError(
                f"{path}: array {name!r} has dtype {a.dtype}; must be real floating-point numbers"
            )
    if not leaves:
        raise SourceError(f"{path}: holds no arrays")
    if not isinstance(document, dict):
        raise SourceError(f"{path}: what it says about itself ({DOCUMENT!r}) is not a JSON object")
    return Source(path.name, form, leaves, sha256(data).hexdigest(), document)


def npz_bytes(leaves: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> bytes:
    """Arrays by path as a .npz file."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**leaves, DOCUMENT: np.array(json.dumps(document, allow_nan=False))}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def safetensors_file(leaves: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> bytes:
    """Arrays by name as a safetensors file."""
    header = {"format": "pt", DOCUMENT: json.dumps(document, allow_nan=False)}
    return safetensors_bytes(dict(leaves), metadata=header)


def msgpack_bytes(leaves: Mapping[str, np.ndarray], grouped: bool) -> bytes:
    """Arrays by path as Flax writes a pytree of Haiku modules, with groups above them if `grouped`."""
    tree: dict[str, Any] = {}
    for path in sorted(leaves, key=_flax_order):
        *above, name = path.split("/")
        keys = [above[0], "/".join(above[1:])] if grouped and above else ["/".join(above)]
        node = tree
        for key in filter(None, keys):
            node = node.setdefault(key, {})
        node[name] = leaves[path]
    return msgpack.dumps(tree)


def _flax_order(path: str) -> tuple[str, ...]:
    *above, name = path.split("/")
    return (
        *above[:1],
        "/".join(above[1:]),
        {"hidden": "0", "cell": "1"}.get(name, name),
    )  # fields of a tuple


def _npz(path: Path, data: bytes) -> tuple[Arrays, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
        if any(name.endswith(".pkl") for name in names):
            raise SourceError(_pickle(path))
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            leaves = {key: arrays[key] for key in arrays.files}
    except SourceError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many things for a damaged file
        raise SourceError(f"{path}: not a readable .npz file ({error})") from error
    document = leaves.pop(DOCUMENT, None)
    try:
        described = json.loads(str(document)) if document is not None else {}
    except ValueError as error:
        raise SourceError(
            f"{path}: what it says about itself ({DOCUMENT!r}) is not JSON ({error})"
        ) from error
    if isinstance(described, dict) and "n_steps" in described:  # a golden file, which has much beside them
        if elsewhere := described.get("theta_ref"):
            raise SourceError(
                f"{path}: has no meta-parameters itself, they are in {elsewhere}: convert that file"
            )
        leaves = {key.removeprefix("theta/"): a for key, a in leaves.items() if key.startswith("theta/")}
    return leaves, described


def _safetensors(path: Path) -> tuple[Arrays, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _REAL:
                    raise SourceError(
                        f"{path}: array {name!r} is {dtype}; must be real floating-point numbers"
                    )
            leaves = {name: np.asarray(file.get_tensor(name)) for name in names}
        document = json.loads(header.get(DOCUMENT, "{}"))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: not a readable safetensors file ({error})") from error
    return leaves, document


def _msgpack(path: Path, data: bytes) -> Arrays:
    try:
        tree = msgpack.loads(data)
    except msgpack.MessagePackError as error:
        raise SourceError(
            f"{path}: neither .npz nor safetensors, nor arrays as Flax writes them (MessagePack): {error}"
        ) from error
    if not isinstance(tree, dict):
        raise SourceError(f"{path}: MessagePack, but not a tree of arrays")
    if tree.keys() == _WRAPPER and isinstance(tree["params"], dict):
        tree = tree["params"]
    leaves: Arrays = {}
    _flatten(path, tree, "", leaves)
    return leaves


def _flatten(path: Path, tree: Mapping[str, Any], prefix: str, leaves: Arrays) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _flatten(path, value, f"{prefix}{key}/", leaves)
        elif isinstance(value, np.ndarray):
            leaves[prefix + key] = value
        else:
            raise SourceError(f"{path}: {prefix}{key} is {type(value).__name__}, not an array")


def _pickle(path: Path) -> str:
    return (
        f"{path}: a pickle (as torch.save and pickle.dump write it), which is not read: opening one runs whatever code "
        "it holds. Save the arrays where you trust the file: safetensors.torch.save_file(state_dict, ...) or "
        "numpy.savez(..., **arrays by path)"
    )
