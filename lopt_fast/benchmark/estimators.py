"""How much the estimators of the meta-gradient vary, per inner step that they spend; with a plot.

All are asked the same: g, the gradient of the mean loss over a whole unroll, at fixed meta-parameters. Many pairs are
unrolled from beginning to end by the code of the outer loop, each by itself, and their estimates e_k of the
truncations k = 1 .. K are kept. A pair's outer steps cost 2 x truncation inner steps each (full ES: 2 x unroll).

Pairs are spread evenly over the unroll, as in the outer loop; so the mean over m outer steps has the variance

    v(m) = mean over first truncations s of  sum_ij cov(e_{s+i}, e_{s+j}) / m^2,   0 <= i, j < m,

summed over meta-parameters, for one pair; n pairs have v(m) / n. Truncations of different unrolls are independent,
those of one unroll are not. v(1) is what one outer step sees. In the long run m v(m) approaches K times the variance of
the mean over one unroll: what a slow outer optimizer sees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import install
from . import BenchmarkError

ESTIMATORS = ("full_es", "truncated_es", "pes", "nres")
_CHUNK = 64  # pairs in one program: their states and batches stay in the cache
_ROUNDS = 4  # the curve ends after this many unrolls


@dataclass(frozen=True)
class Problem:
    """What is unrolled. Raises BenchmarkError for what cannot be measured."""

    unroll: int = 200
    """Inner steps of an unroll."""
    pairs: int = 512
    """Antithetic pairs for each estimator."""
    std: float = 0.01
    checkpoint: str = "small_fc_lopt"
    """Meta-parameters: a name or a path."""
    task: Mapping[str, Any] = field(default_factory=lambda: {"kind": "mlp"})
    """A [[task]] table of a meta-training configuration; "mlp" is the perceptron 64-32-10 on the 8x8 digits."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise BenchmarkError(f"pairs={self.pairs}: a variance needs at least 2")
        if self.unroll < 1:
            raise BenchmarkError(f"unroll={self.unroll}: must be positive")


def run(
    names: Sequence[str], truncations: Sequence[int], problem: Problem, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One result for each estimator and truncation; full ES, to which all are compared, is always there and first."""
    unknown = sorted(set(names) - set(ESTIMATORS))
    if unknown:
        raise BenchmarkError(f"estimators {unknown}: choose from {', '.join(ESTIMATORS)}")
    for steps in truncations:
        if not 1 <= steps <= problem.unroll or problem.unroll % steps:
            raise BenchmarkError(
                f"truncation {steps}: must divide the unroll of {problem.unroll} inner steps"
            )
    samples = {}
    for name in dict.fromkeys(("full_es", *names)):
        for steps in (problem.unroll,) if name == "full_es" else truncations:
            say(f"{name}, truncation {steps}: {problem.pairs} unrolls of {problem.unroll} inner steps")
            samples[name, steps] = measure(name, steps, problem)
    unbiased = np.concatenate([e.mean(1) for (name, _), e in samples.items() if name != "truncated_es"])
    signal = _squared_norm(unbiased)
    full = _variance(samples["full_es", problem.unroll])
    return [
        {
            "estimator": name,
            "truncation": steps,
            "inner_steps": 2 * steps,
            "variances": variances(e).tolist(),
            "outer_step_vs_full_es": _ratio(_variance(e), full, steps / problem.unroll),
            "unroll_vs_full_es": _ratio(_variance(e.mean(1, keepdims=True)), full),
            "bias": _distance(e.mean(1), unbiased) if name == "truncated_es" else None,
            "signal": signal,
        }
        for (name, steps), e in samples.items()
    ]


def measure(name: str, steps: int, problem: Problem) -> np.ndarray:
    """(pairs, truncations, n) float64 estimates of single pairs, each over its whole unroll.

    Raises BenchmarkError without JAX, for a problem that cannot be made, and for estimates that are not finite.
    """
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise BenchmarkError(f"meta-training needs JAX ({error}): {install('jax')}") from error
    from ..checkpoint import CheckpointError
    from ..data import DataError
    from ..meta.config import ConfigError
    from ..meta.tasks import TaskError

    try:
        truncated, theta = _truncated(name, steps, problem)
    except (CheckpointError, ConfigError, DataError, TaskError) as error:
        raise BenchmarkError(str(error)) from error
    data = truncated.task.data
    variant = jnp.zeros(1, jnp.int32)

    @jax.jit
    def unrolled(keys: jax.Array, data: Any) -> jax.Array:
        """(chunk, truncations, n)"""

        def one(key: jax.Array) -> jax.Array:
            first, *rest = jax.random.split(key, 1 + (1 if name == "full_es" else problem.unroll // steps))

            def truncation(unrolls: Any, key: jax.Array) -> tuple[Any, jax.Array]:
                unrolls, estimate, _ = truncated.advance(theta, unrolls, data, key[None], variant)
                return unrolls, estimate.gradient

            start = truncated.fresh(theta, first[None])
            return jax.lax.scan(truncation, start, jnp.stack(rest))[1]

        return jax.vmap(one)(keys)

    key = jax.random.fold_in(
        jax.random.key(problem.seed), ESTIMATORS.index(name)
    )  # samples of their own for each
    keys = jax.random.split(jax.random.fold_in(key, steps), problem.pairs)
    found = [unrolled(keys[i : i + _CHUNK], data) for i in range(0, problem.pairs, _CHUNK)]
    estimates = np.concatenate([np.asarray(x, np.float64) for x in found])
    if not np.isfinite(estimates).all():
        raise BenchmarkError(f"{name}, truncation {steps}: estimates are not finite")
    return estimates


def _truncated(name: str, steps: int, problem: Problem) -> tuple[Any, Any]:
    """(the task as the outer loop unrolls it, meta-parameters as one vector)."""
    from jax.flatten_util import ravel_pytree

    from ..checkpoint import load
    from ..meta import config, outer
    from ..meta.tasks import make

    checkpoint = load(problem.checkpoint)
    settings = {
        "optimizer": {"architecture": checkpoint.architecture, "spec": checkpoint.spec.to_dict()},
        "estimator": {"name": name, "std": problem.std, "pairs": 1},
        "truncation": {"steps": steps, "min_steps": problem.unroll, "max_steps": problem.unroll},
        "task": [dict(problem.task)],
    }
    described = config.from_json(json.dumps(settings), "benchmark")
    (table,) = described.task
    (truncated,) = outer.truncated_tasks(described, [make(table.kind, table.options, {})])
    return truncated, ravel_pytree({k: np.asarray(v, np.float32) for k, v in checkpoint.theta.items()})[0]


def covariances(estimates: np.ndarray) -> np.ndarray:
    """(truncations, truncations) from (pairs, truncations, n): unbiased, summed over meta-parameters."""
    centred = estimates - estimates.mean(0)
    return np.asarray(np.einsum("rkd,rld->kl", centred, centred) / (len(estimates) - 1))


def variances(estimates: np.ndarray, rounds: int = _ROUNDS) -> np.ndarray:
    """v(m) for m = 1 .. rounds x truncations, see above."""
    cov = covariances(estimates)
    count = len(cov)
    out = []
    for m in range(1, rounds * count + 1):
        total = 0.0
        for s in range(count):
            number, place = np.divmod(np.arange(s, s + m), count)
            total += (cov[np.ix_(place, place)] * (number[:, None] == number)).sum()
        out.append(total / count / m**2)
    return np.array(out)


def _variance(estimates: np.ndarray) -> tuple[float, float]:
    """(v(1), its standard error, from how the pairs differ) from (pairs, truncations, n)."""
    count = len(estimates)
    squares = ((estimates - estimates.mean(0)) ** 2).sum(-1).mean(1) * count / (count - 1)
    return float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(count))


def _ratio(of: tuple[float, float], to: tuple[float, float], scale: float = 1.0) -> dict[str, float]:
    """Of two variances; the standard error takes them for independent."""
    value = scale * of[0] / to[0]
    error = 0.0 if of == to else value * math.hypot(of[1] / of[0], to[1] / to[0])
    return {"value": value, "standard_error": error}


def _squared_norm(samples: np.ndarray) -> float:
    """|E x|^2 from (samples, n), without bias; noise can make it negative."""
    count, total = len(samples), samples.sum(0)
    return float((total @ total - (samples**2).sum()) / (count * (count - 1)))


def _distance(samples: np.ndarray, others: np.ndarray) -> float:
    """|E x - E y|^2, likewise."""
    return _squared_norm(samples) + _squared_norm(others) - 2 * float(samples.mean(0) @ others.mean(0))


_COLOURS = {"full_es": "k", "truncated_es": "C3", "pes": "C0", "nres": "C2"}


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Variance over inner steps, relative to one unroll of full ES; a panel for each truncation. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = record["results"]
    (full,) = (r for r in results if r["estimator"] == "full_es")
    lengths = sorted({r["truncation"] for r in results if r is not full}) or [full["truncation"]]
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=(4.2 * len(lengths), 4), squeeze=False, sharey=True
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        for r in [full, *(r for r in results if r is not full and r["truncation"] == length)]:
            steps = r["inner_steps"] * np.arange(1, len(r["variances"]) + 1)
            marker = "o" if r is full else None
            axis.loglog(
                steps, np.array(r["variances"]) / full["variances"][0],
                color=_COLOURS[r["estimator"]], marker=marker, label=r["estimator"],
            )  # fmt: skip
        axis.axvline(full["inner_steps"], color="k", alpha=0.3, linestyle=":")
        axis.set_title(f"truncation {length}")
        axis.set_xlabel("inner steps of a pair")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("variance, in units of one unroll of full ES")
    options = record["options"]
    what = f"{options['task']['kind']}, unroll of {options['unroll']} steps"
    figure.suptitle(f"{what}, {options['checkpoint']}, std {options['std']:g}", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
