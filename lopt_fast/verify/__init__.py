"""Replays golden files through the public interface of NumPy, PyTorch or JAX and compares every step.

A golden file holds start values, gradients, meta-parameters and the parameters after each step, as another
implementation computed them (`golden.py` reads it). A trajectory is replayed by the optimizer that
lopt_fast/published/ reads from its constructor arguments and meta-parameters (`replay.py`), and compared with what the
file expects (`compare.py`). Two more kinds of files: the MLP's input columns (`kind: features`), which are read out
through a network that passes one column on, and estimates of meta-gradients (`kind: pes`), replayed by
lopt_fast/meta/verify_pes.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends import BackendError, BackendWarning
from ..errors import install
from .compare import Report, Row, compare
from .golden import (
    Arrays,
    Case,
    GoldenError,
    Replay,
    Target,
    group,
    load,
    load_contents,
    read_file,
    read_meta,
)
from .replay import DTYPES, FRAMEWORKS, runner, x64

__all__ = [
    "DTYPES", "FRAMEWORKS", "Arrays", "BackendError", "Case", "GoldenError", "Replay", "Report", "Row", "Target",
    "group", "load", "verify", "x64",
]  # fmt: skip


def verify(
    path: str | Path,
    framework: str = "numpy",
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
) -> Report:
    """Replay one golden file.

    `device` is PyTorch's name of one, as "cuda:1"; None: the first that the backend runs on, the CPU for "auto" and
    "reference".

    Meta-gradients (`kind: pes`) are replayed in JAX whatever the framework; the report says so.

    `dtype` is float64 for NumPy's reference, else float32 by default. Let p be the expected parameters of a tensor
    after a step and d their change in it: the error may be ``4 eps max|p| + r max|d|``, with the eps of float32 and
    r = 1e-4, or with the eps of float64, r = 1e-9 and the largest d so far where both runs are in float64. float32
    may be off by more where the file says that the other implementation's float32 run was too (then again within
    r times the largest d so far), and for the optimizers that `compare.ILL_CONDITIONED` names, with the reason.

    Raises GoldenError for a file that cannot be read or replayed and for a missing framework, BackendError for a
    backend that cannot be used.
    """
    asked = dtype
    run, dtype = runner(framework, backend, dtype)
    if device is not None and framework != "torch":
        raise GoldenError(f"device {device!r}: can be chosen for torch alone, not for {framework}")
    if device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise GoldenError(f"device {device!r}: must be as cpu, cuda or cuda:1")
    device = device or ("cuda" if backend in ("cuda", "triton") else "cpu")
    path = Path(path)
    data = read_file(path)
    meta = read_meta(path, data)
    if meta.get("kind") == "pes":
        return _pes(path, data, meta, framework, backend, asked)
    case = load_contents(path, data, meta)
    worst: dict[str, tuple[float, Row]] = {}
    used: set[str] = set()
    for item in case.replays:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendWarning)  # the report names the backend
            found, chosen = run(item, case.inputs, backend, dtype, device)
        used.add(chosen)
        for name, target in item.targets.items():
            ratio, row = compare(name, case.inputs.params0[name], found[name], target, item, dtype, case.unit)
            if name not in worst or not ratio <= worst[name][0]:
                worst[name] = ratio, row
    rows = tuple(row for _, row in worst.values())
    return Report(str(path), framework, ", ".join(sorted(used)), dtype, rows, dict(case.skipped))


def _pes(
    path: Path, data: Arrays, meta: Mapping[str, Any], framework: str, backend: str, dtype: str | None
) -> Report:
    try:
        from ..meta import verify_pes
    except ImportError as error:
        raise GoldenError(
            f"{path}: meta-gradients are replayed in JAX, which cannot be imported ({error}): "
            f"{install('jax')}"
        ) from error
    return verify_pes.verify(path, data, meta, framework, backend, dtype)
