"""Checkpoints: meta-parameters with what is needed to use them, in one safetensors file. Never pickle.

Format, version 1: one float32 tensor for each name of `Spec.theta_shapes`, and one entry `lopt_fast` in the header's
metadata, a JSON object of

    format_version    1
    architecture      name of the architecture
    hyperparameters   Spec.to_dict()
    metadata          by convention `licence` (SPDX) and `meta_training` (how the weights were made)
    sha256            of the above and the tensors, see `_digest`
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from . import hub
from .architectures import ARCHITECTURES, Architecture
from .files import write_atomically
from .spec import Spec, SpecError

_KEY = "lopt_fast"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
DEFAULT_NAME = "small_fc_lopt_mix"

_WEIGHTS = Path(__file__).parent / "weights"
_RESAVE = "Save it again with lopt_fast.Checkpoint.save, or take another copy of the file."


class CheckpointError(SpecError):
    """A checkpoint that cannot be read, used or written; names the file, the reason and the remedy."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Meta-parameters of one learned optimizer.

    Raises CheckpointError (a ValueError) unless `theta` has exactly the arrays of `spec.theta_shapes`, real and
    finite in float32.
    """

    spec: Spec | Architecture
    """Hyperparameters of the architecture."""
    theta: dict[str, np.ndarray]
    """Arrays by the names of `spec.theta_shapes`; copied, and stored as float32."""
    name: str = ""
    """Name of the shipped weights, or the file's name without its suffix; empty if made in memory."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values: `licence`, `meta_training`, ..."""

    def __post_init__(self) -> None:
        try:
            theta = {name: _float32(name, value) for name, value in self.theta.items()}
            self.spec.check_theta(theta)
        except CheckpointError:
            raise
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        object.__setattr__(self, "theta", {name: theta[name] for name in self.spec.theta_shapes})

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return self.spec.NAME

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the checkpoint to `path` and return it; readers see the old file or the whole new one.

        Raises CheckpointError if `metadata` is not JSON or the file cannot be written.
        """
        target = Path(path)
        document = {
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture,
            "hyperparameters": self.spec.to_dict(),
            "metadata": self.metadata,
        }
        try:
            document["sha256"] = _digest(document, self.theta)
            header = {_KEY: json.dumps(document, allow_nan=False)}
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{target}: the checkpoint's metadata must be plain JSON values: {error}"
            ) from error
        try:
            write_atomically(target, safetensors_bytes(self.theta, metadata=header))
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot be written ({error.strerror or error}). Give a path in an existing, writable folder."
            ) from error
        return target


def names() -> tuple[str, ...]:
    """Names of the weights shipped in the package."""
    return tuple(sorted(path.stem for path in _WEIGHTS.glob(f"*{SUFFIX}")))


def load(source: str | os.PathLike[str] | Checkpoint | None = None) -> Checkpoint:
    """A checkpoint by name of shipped weights, by path, or as it is; None: the default weights.

    Also from the Hugging Face Hub, as "hf:owner/name@revision/file" (see `hub.py`; needs huggingface_hub).
    An architecture without meta-parameters ("adamw") can be loaded by its name, with its default hyperparameters.

    Raises CheckpointError for a file that is missing, damaged, foreign, of another architecture or version, or
    whose meta-parameters do not fit its hyperparameters or are not finite.
    """
    if isinstance(source, Checkpoint):
        return source
    if source is None:
        source = DEFAULT_NAME
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"cannot load a checkpoint from {type(source).__name__}: give a name, a path or a Checkpoint"
        )
    if isinstance(source, str) and source in names():
        return _read(_WEIGHTS / (source + SUFFIX))
    kind = ARCHITECTURES.get(source) if isinstance(source, str) else None
    if kind is not None and not kind().theta_shapes:
        return Checkpoint(kind(), {}, kind.NAME)
    if isinstance(source, str) and hub.is_reference(source):
        try:
            path = hub.fetch(source)
        except hub.HubError as error:
            raise CheckpointError(str(error)) from error
        return _read(path)
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is neither a file nor the name of shipped weights"
        raise CheckpointError(
            f"{os.fspath(source)!r} {what}. Shipped are: {', '.join(names()) or 'none in this build'}; "
            "or give the path of a checkpoint file."
        )
    return _read(path)


def _read(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="numpy") as file:
            document = _read_document(path, file.metadata() or {})
            spec = _read_spec(path, document)
            theta = _read_tensors(path, file, spec)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file, perhaps truncated or damaged ({error}). Take another copy of it."
        ) from error
    if document.get("sha256") != _digest(document, theta):
        raise CheckpointError(
            f"{path}: the checksum does not fit the contents: the file is damaged. {_RESAVE}"
        )
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: metadata is not a JSON object. {_RESAVE}")
    try:
        return Checkpoint(spec, theta, path.stem, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_document(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in header:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a lopt_fast checkpoint (no {_KEY!r} in its metadata)."
        )
    try:
        document = json.loads(header[_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not JSON, the file is damaged ({error}). {_RESAVE}"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: its metadata is not a JSON object. {_RESAVE}")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format version {version!r}; this version of lopt_fast reads {FORMAT_VERSION}. "
            "Use the version of lopt_fast that wrote it, or a newer one."
        )
    return document


def _read_spec(path: Path, document: Mapping[str, Any]) -> Spec | Architecture:
    architecture = document.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: unknown architecture {architecture!r}; "
            f"this version of lopt_fast has {', '.join(ARCHITECTURES)}."
        )
    values = document.get("hyperparameters")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: hyperparameters are not a JSON object. {_RESAVE}")
    try:
        return ARCHITECTURES[architecture].from_dict(values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: unusable hyperparameters: {error}. {_RESAVE}") from error


def _read_tensors(path: Path, file: Any, spec: Spec | Architecture) -> dict[str, np.ndarray]:
    """The meta-parameters; names, shapes and types are checked before anything large is read."""
    found, expected = set(file.keys()), spec.theta_shapes
    if found != expected.keys():
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        raise CheckpointError(
            f"{path}: its tensors do not fit its hyperparameters: missing {missing}, unknown {extra}. {_RESAVE}"
        )
    for name, shape in expected.items():
        view = file.get_slice(name)
        if view.get_dtype() != "F32" or tuple(view.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: meta-parameter {name!r} is {view.get_dtype()} of shape {tuple(view.get_shape())}, "
                f"expected F32 of shape {shape}. {_RESAVE}"
            )
    return {name: file.get_tensor(name) for name in expected}


def _float32(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise CheckpointError(
            f"meta-parameter {name!r} has dtype {array.dtype}; must be a real floating-point array"
        )
    with np.errstate(over="ignore"):
        array = np.array(array, dtype=np.float32, order="C")
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise CheckpointError(
            f"meta-parameter {name!r} has {bad} values that are not finite in float32; such weights cannot be used"
        )
    return array


def _digest(document: Mapping[str, Any], theta: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the document as JSON with sorted keys and without `sha256`, then of the name, a zero byte and the
    little-endian bytes of each tensor, sorted by name."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(theta):
        digest.update(f"{name}\0".encode() + theta[name].astype("<f4").tobytes())
    return digest.hexdigest()
