"""Tolerances, golden files and random inputs that several test modules share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest

from lopt_fast import backends, reference
from lopt_fast.architectures import small_fc_lopt
from lopt_fast.spec import Spec

RELATIVE = {"float64": 1e-9, "float32": 1e-4}
"""Bound on the error of an update relative to the largest update of the tensor in the same step."""


def assert_update_close(actual: Any, expected: Any, p: Any, dtype: str, what: str = "") -> None:
    """`actual` within 4 eps max|p| + RELATIVE[dtype] max|expected| of `expected`; fails on NaN, Inf and shapes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if not expected.size:
        return
    eps = float(np.finfo(dtype).eps)
    bound = 4 * eps * float(np.abs(p).max()) + RELATIVE[dtype] * float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max())
    assert error <= bound, f"{what}: update off by {error:.3e}, allowed {bound:.3e} ({dtype})"


HALF = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}
"""Largest errors of rounding to the nearest: relative to a normal number, and of a subnormal one."""


def assert_parameter_close(p: Any, before: Any, delta: Any, what: str = "") -> None:
    """`p` within the bound of `assert_update_close`, and the rounding of its type if that is a half one, of
    before + delta; fails on NaN, Inf and shapes."""
    dtype = p.dtype.name
    p, before, delta = (np.array(x, np.float64) for x in (p, before, delta))
    if dtype not in HALF:
        return assert_update_close(p - before, delta, before, dtype, what)
    assert p.shape == before.shape == delta.shape, f"{what}: shapes {p.shape}, {before.shape}, {delta.shape}"
    if p.size:
        computed = 4 * np.finfo(np.float32).eps * np.abs(before).max() + 1e-4 * np.abs(delta).max()
        relative, least = HALF[dtype]
        excess = np.abs(p - (before + delta)) - (relative * np.abs(before + delta) + least + 1.01 * computed)
        assert excess.max() <= 0, f"{what}: off by {excess.max():.3e} more than allowed ({dtype})"
    return None


def assert_states_close(actual: Any, expected: Any, dtype: str, what: str = "") -> None:
    """Each accumulator within RELATIVE[dtype] of its largest entry; fails on NaN and shapes."""
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, f"{what} {name}: shape {a.shape}, expected {e.shape}"
        if e.size:
            error, bound = float(np.abs(a - e).max()), RELATIVE[dtype] * float(np.abs(e).max())
            assert error <= bound, f"{what} {name}: off by {error:.3e}, allowed {bound:.3e} ({dtype})"


def random_theta(spec: Spec, seed: int = 0, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Meta-parameters with non-zero biases and decay offsets, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    theta = small_fc_lopt.init_theta(spec, seed)
    for name in theta:
        if name.startswith("b"):
            theta[name] = 0.3 * rng.standard_normal(theta[name].shape)
        elif name.endswith("_decays"):
            theta[name] = 0.05 * rng.standard_normal(theta[name].shape)
    return {name: value.astype(dtype) for name, value in theta.items()}


def random_problem(
    shape: tuple[int, ...], steps: int, seed: int = 0, dtype: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """Start value and (steps, *shape) gradients of mixed scales, exactly representable in float32."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(shape).astype(np.float32)
    scales = np.exp(rng.standard_normal((steps,) + (1,) * len(shape)))
    g = (rng.standard_normal((steps, *shape)) * scales).astype(np.float32)
    return p.astype(dtype), g.astype(dtype)


def run_reference(
    spec: Spec, theta: Any, p: Any, grads: Any, update: Any = reference.update, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Updates and states after each step of `reference.update`, in the array library and dtype of `p`."""
    state, updates, states = reference.init_state(spec, p), [], []
    for t in range(grads.shape[0]):
        delta, state = update(spec, theta, p, grads[t], state, t, **options)
        p = p + delta
        updates.append(delta)
        states.append(state)
    return updates, states


@contextmanager
def gpu_on_cpu(name: str) -> Iterator[None]:
    """PyTorch's CPU tensors as if they lay on a device that the host cannot read without waiting.

    `name` is "emulator", GPU kernels run by csrc/gpu_emulator.cc, or "triton", run by Triton's interpreter. They become
    the first choice of backend="auto"; what they do not take goes to the CPU kernels as before.
    """
    from lopt_fast.torch import device, scalars

    kernels = backends.Backend(name, ("cpu",), lambda ordinal: None, backends._gpu_supports)
    others = (b for b in backends.OPERATIONS["small_fc_lopt"] if b.name != name)
    with (
        mock.patch.dict(backends.OPERATIONS, {"small_fc_lopt": (kernels, *others)}),
        mock.patch.dict(device.KERNELS, {"emulator": lambda: backends.native().gpu_emulator()}),
        mock.patch.object(scalars, "HOST", frozenset()),
    ):
        yield


needs_emulator = pytest.mark.skipif(
    not hasattr(backends._import_native()[0], "gpu_emulator"), reason="no compiled kernels, or no emulator"
)


def repeated(module: ModuleType, but: Collection[str] = ()) -> dict[str, Any]:
    """The tests of a module but for some, to be run again elsewhere: ``globals().update(repeated(module))``."""
    found = {name: test for name, test in vars(module).items() if name.startswith("test_") and callable(test)}
    assert found.keys() >= set(but), f"not in {module.__name__}: {set(but) - found.keys()}"
    return {name: test for name, test in found.items() if name not in but}


class Golden:
    """A trajectory of the `adafac` family with its shared inputs: see the folder's FORMAT.md."""

    def __init__(self, path: Path) -> None:
        self.arrays = _read(path)
        self.meta = json.loads(str(self.arrays["meta"]))
        inputs = _read(path.parent / self.meta["inputs"])
        self.params0 = _under(inputs, "params0")
        self.grads = _under(inputs, "grads")

    def spec(self) -> Spec:
        values = dict(self.meta["hyperparameters"])
        values.pop("concat_weights", None)
        return Spec.from_dict(values)

    def theta(self, dtype: str = "float64") -> dict[str, np.ndarray]:
        return {k.rsplit("/", 1)[-1]: v.astype(dtype) for k, v in _under(self.arrays, "theta").items()}

    def expected64(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(steps, n) float64 parameters after each step, and the flat indices that they show (None: all)."""
        if (key := f"params64/{name}") in self.arrays:
            values = self.arrays[key]
            return values.reshape(values.shape[0], -1), None
        return self.arrays[f"params64_sub/{name}"], self.arrays[f"sub_index/{name}"]


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _under(arrays: dict[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(group + "/")}
