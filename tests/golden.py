"""Replays of golden files through an architecture's definition in float64 NumPy; the files may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopt_fast.architectures.base import Inputs
from lopt_fast.operations import ModelTensors, Reference
from lopt_fast.operations.accumulators import initial_state
from lopt_fast.published import FAMILIES

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def files(*families: str) -> list[Any]:
    """pytest parameters: the trajectory files of these families, or one that skips."""
    found = []
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as archive:
            meta = json.loads(str(archive["meta"])) if "meta" in archive.files else {}
        if meta.get("family") in families and "n_steps" in meta:
            found.append(pytest.param(path, id=path.stem))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no golden files here"))]


def largest_error(path: Path) -> float:
    """Over tensors: the largest error of an update, relative to the largest update of that tensor and step."""
    data, meta = _read(path)
    leaves = {k.removeprefix("theta/"): a for k, a in data.items() if k.startswith("theta/")}
    if meta["theta_ref"]:
        leaves = {k: a for k, a in _read(GOLDEN / meta["theta_ref"])[0].items() if k != "meta"}
    architecture, theta = FAMILIES[meta["family"]](meta["hyperparameters"], leaves)
    architecture.check_theta(theta)
    theta = {name: np.asarray(a, np.float64) for name, a in theta.items()}
    inputs = _read(GOLDEN / meta["inputs"])[0]
    names = sorted(k.removeprefix("params0/") for k in inputs if k.startswith("params0/"))
    params = [inputs[f"params0/{n}"].astype(np.float64) for n in names]
    states = [
        initial_state(architecture.accumulates(n, p.shape), p) for n, p in zip(names, params, strict=True)
    ]
    rows = architecture.init_rows(theta, [p.shape for p in params])
    shared = architecture.init_shared(theta)
    is_valid = meta["is_valid"] or [0] * meta["n_steps"]
    worst, t = 0.0, 0
    previous = dict(zip(names, params, strict=True))
    for step in range(meta["n_steps"]):
        loss = inputs["losses"][step].astype(np.float64)
        if is_valid[step]:
            shared = architecture.observe_validation(theta, shared, loss)
        else:
            tensors = ModelTensors(
                params, [inputs[f"grads/{n}"][step].astype(np.float64) for n in names], states,
                [1.0] * len(names), [0.0] * len(names), names=names, apply=True,
            )  # fmt: skip
            update = architecture.step(
                Reference, theta, tensors, rows, shared, Inputs(np.asarray(t), meta["num_steps"], loss)
            )
            params, states, rows, shared, t = update.outputs, update.states, update.rows, update.shared, t + 1
        for name, p in zip(names, params, strict=True):
            shown = data[f"sub_index/{name}"] if f"sub_index/{name}" in data else slice(None)
            key = f"params64_sub/{name}" if f"sub_index/{name}" in data else f"params64/{name}"
            expected = data[key][step].reshape(-1)
            before = previous[name].reshape(-1)[shown] if step == 0 else data[key][step - 1].reshape(-1)
            moved = np.abs(expected - before).max()
            error = np.abs(p.reshape(-1)[shown] - expected).max()
            relative = error / moved if moved else error
            worst = max(worst, relative) if np.isfinite(relative) else np.inf
    return worst


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path) as archive:
        data = {key: archive[key] for key in archive.files}
    return data, json.loads(str(data["meta"])) if "meta" in data else {}
