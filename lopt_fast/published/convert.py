"""Published meta-parameters to checkpoints of ours, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import hub
from ..architectures import ARCHITECTURES
from ..checkpoint import Checkpoint, load
from ..files import write_atomically
from ..spec import SpecError
from . import FILES, sources
from .family import Family
from .known import KNOWN
from .paths import Arrays, Shape

FORMATS = ("checkpoint", "npz", "msgpack", "pylo")
"""What can be written: ours, and arrays by the names of the published implementation in three kinds of files."""


class ConvertError(SpecError):
    """What cannot be converted; names the reason and the option that helps."""


@dataclass(frozen=True)
class Found:
    """What a file turned out to hold."""

    checkpoint: Checkpoint
    family: str
    """Empty for a checkpoint of ours."""
    arguments: Mapping[str, Any]
    """Of the published constructor, as given or read off the arrays."""


def read(
    references: Sequence[str | os.PathLike[str]],
    family: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> Found:
    """Meta-parameters of a file, or of several whose arrays belong together, as a checkpoint.

    references: paths or `hf:owner/name@revision/file`; or one checkpoint of ours, by name or path.
    family: a name of `FILES`; None: the one that the arrays fit. arguments: of the published constructor, where they
    are not its defaults. licence: SPDX; None: as the file says, or nothing.

    Raises ConvertError for what cannot be known from the files, naming the option that tells it, and SourceError,
    CheckpointError, HubError for files that cannot be read.
    """
    if family is not None and family not in FILES:
        raise ConvertError(f"family {family!r}: must be one of {', '.join(FILES)}")
    if len(references) == 1 and _is_ours(references[0]):
        if family or arguments:
            raise ConvertError(
                f"{references[0]} is a checkpoint of lopt_fast: it has its family and arguments"
            )
        ours = load(references[0])
        metadata = ours.metadata if licence is None else {**ours.metadata, "licence": licence}
        return Found(Checkpoint(ours.spec, ours.theta, ours.name, metadata), "", {})
    read_files = [sources.read(_local(reference)) for reference in references]
    where = ", ".join(map(str, references))
    leaves: Arrays = {}
    for source in read_files:
        if double := leaves.keys() & source.leaves.keys():
            raise ConvertError(f"{where}: array {min(double)!r} is in more than one of the files")
        leaves |= source.leaves
    document = read_files[0].document
    known = KNOWN.get(sources.digest(leaves))
    if "architecture" in document:
        found, family, given = _described(where, document, leaves), str(document["family"]), {}
    else:
        said = document.get("hyperparameters")  # of a golden file, which has its family beside it
        family = family or (known.family if known else None) or document.get("family")
        given = {**(known.arguments if known else {}), **(said or {}), **(arguments or {})}
        family = family or _detect(where, leaves, given)
        if family not in FILES:
            raise ConvertError(f"{where}: family {family!r}: must be one of {', '.join(FILES)}")
        given = _complete(where, FILES[family], family, leaves, given, ask=said is None)
        found = Checkpoint(*FILES[family](given, leaves))
    files = [
        {"name": str(r) if hub.is_reference(str(r)) else Path(r).name, "sha256": s.sha256}
        for r, s in zip(references, read_files, strict=True)
    ]
    metadata = {
        "licence": licence or (known.licence if known else document.get("licence")),
        "published": {
            "source": known.source if known else document.get("source"),
            "family": family, "arguments": given, "files": files,
        },
    }  # fmt: skip
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return Found(Checkpoint(found.spec, found.theta, "", metadata), family, given)


def write(
    checkpoint: Checkpoint, path: str | os.PathLike[str], to: str = "checkpoint", family: str | None = None
) -> Path:
    """Write a checkpoint of ours, or its arrays by the names of the published implementation.

    Raises ConvertError if there is no such implementation or `path` cannot be written.
    """
    target = Path(path)
    if to not in FORMATS:
        raise ConvertError(f"format {to!r}: must be one of {', '.join(FORMATS)}")
    if to == "checkpoint":
        return checkpoint.save(target)
    name, chosen = _family_of(checkpoint, to, family)
    table = chosen.table(checkpoint.spec)
    leaves = table.write(checkpoint.theta)
    document = {
        "family": name,
        "architecture": checkpoint.architecture,
        "hyperparameters": checkpoint.spec.to_dict(),
        "absent": {n: np.asarray(checkpoint.theta[n], np.float64).tolist() for n in table.absent},
        "licence": checkpoint.metadata.get("licence"),
        "source": (checkpoint.metadata.get("published") or {}).get("source"),
    }
    if to == "npz":
        data = sources.npz_bytes(leaves, document)
    elif to == "msgpack":
        data = sources.msgpack_bytes(leaves, chosen.grouped)
    else:
        data = sources.safetensors_file(leaves, document)
    try:
        write_atomically(target, data)
    except OSError as error:
        raise ConvertError(
            f"{target}: cannot be written ({error.strerror or error}). Give a path in an existing, writable folder."
        ) from error
    return target


def _is_ours(reference: str | os.PathLike[str]) -> bool:
    """Whether it is a checkpoint of lopt_fast: shipped, or a file with our header."""
    if isinstance(reference, str) and not hub.is_reference(reference) and not Path(reference).exists():
        load(reference)  # a shipped name, or the error that says there is no such file
        return True
    with open(_local(reference), "rb") as file:
        head = file.read(8)
        return b'"lopt_fast"' in file.read(min(int.from_bytes(head, "little"), 1 << 20)) and head[:1] != b"P"


def _local(reference: str | os.PathLike[str]) -> Path:
    if isinstance(reference, str) and hub.is_reference(reference):
        return hub.fetch(reference)
    return Path(reference)


def _detect(where: str, leaves: Arrays, given: Mapping[str, Any]) -> str:
    fitting = [name for name, family in FILES.items() if _misfit(family, leaves, given) is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConvertError(
            f"{where}: these arrays fit several families: give --family {' or --family '.join(fitting)}"
        )
    some = ", ".join(f"{name} {a.shape}" for name, a in list(leaves.items())[:4])
    raise ConvertError(
        f"{where}: the arrays are of no known family (they begin with {some}). Known are {', '.join(FILES)}; "
        "--family NAME tells what does not fit, --set gives hyperparameters that change shapes (initial_*_decays)"
    )


def _misfit(family: Family, leaves: Arrays, given: Mapping[str, Any]) -> str | None:
    """What keeps these arrays from being those of `family`; None: they are."""
    try:
        prepared = family.prepare(leaves)
        arguments = {**family.shown(prepared), **given}
        architecture = family.architecture(arguments)
        expected = family.table(architecture).shapes(architecture.theta_shapes)
    except KeyError as error:
        return f"no array {error}"
    except (SpecError, IndexError, ValueError, TypeError) as error:
        return str(error)
    return _difference(expected, prepared)


def _difference(expected: Mapping[str, Shape], leaves: Mapping[str, np.ndarray]) -> str | None:
    if missing := sorted(expected.keys() - leaves.keys()):
        return f"no array {missing[0]!r}"
    if extra := sorted(leaves.keys() - expected.keys()):
        return f"array {extra[0]!r} is not one of its"
    for path, shape in expected.items():
        if leaves[path].shape != shape:
            return f"array {path!r} has shape {leaves[path].shape}, expected {shape}"
    return None


def _complete(
    where: str, family: Family, name: str, leaves: Arrays, given: Mapping[str, Any], ask: bool
) -> dict[str, Any]:
    """Constructor arguments with those that the arrays show. ask: some of the others have to be given."""
    if problem := _misfit(family, leaves, given):
        raise ConvertError(f"{where}: not weights of {name} with these hyperparameters: {problem}")
    if missing := [argument for argument in family.ask if ask and argument not in given]:
        what = "; ".join(f"--set {argument}=... ({family.ask[argument]})" for argument in missing)
        raise ConvertError(f"{where}: {name} weights do not tell all of their optimizer. Give {what}")
    return {**family.shown(family.prepare(leaves)), **given}


def _described(where: str, document: Mapping[str, Any], leaves: Arrays) -> Checkpoint:
    """From a file that `write` made."""
    try:
        family, kind = FILES[document["family"]], ARCHITECTURES[document["architecture"]]
        spec = kind.from_dict(document["hyperparameters"])
        table = family.table(spec)
        if problem := _difference(table.shapes(spec.theta_shapes), leaves):
            raise ConvertError(f"{where}: does not fit what it says about itself: {problem}")
        absent = {name: np.asarray(a, np.float32) for name, a in document.get("absent", {}).items()}
        return Checkpoint(spec, table.read(leaves, spec.theta_shapes) | absent)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{where}: what it says about itself is not complete ({error!r})") from error


def _family_of(checkpoint: Checkpoint, to: str, family: str | None) -> tuple[str, Family]:
    form = "pylo" if to == "pylo" else "haiku"
    candidates = {
        name: f for name, f in FILES.items() if checkpoint.architecture == f.kind.NAME and f.format == form
    }
    if family is not None:
        candidates = {name: f for name, f in candidates.items() if name == family}
    if to == "pylo" and checkpoint.architecture == "velo":
        raise ConvertError("PyLO keeps the weights of velo in two files; they can be read, not written")
    if not candidates:
        raise ConvertError(
            f"no published implementation of {checkpoint.architecture} "
            f"{f'named {family!r} ' if family else ''}has files of format {to!r}"
        )
    return next(iter(candidates.items()))
