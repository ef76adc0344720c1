"""`lopt-fast bench peers`: public implementations of small_fc_lopt, with the same meta-parameters, where they can be
imported: google/learned_optimization (JAX, both of its compute paths) and PyLO (PyTorch, its CPU path).

Each is checked against the float64 reference like every other contender before it is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import BenchmarkError, contenders, timing
from .contenders import Arrays, Config, Contender, Framework, Kind, meta_parameters
from .update import JAX_ELEMENTWISE_WIDTH, Budget, comparison, describe
from .workloads import Workload


@dataclass(frozen=True)
class Peer:
    """`load()` imports it (any exception: it is not there) and gives what builds a contender."""

    name: str
    framework: Framework
    source: str
    load: Callable[[Config], contenders.Builder]


def _pylo(config: Config) -> contenders.Builder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at import that its CUDA kernels are missing
        import torch
        from pylo.optim.AdafacLO_naive import AdafacLO_naive
    from . import torch_contenders

    spec = config.spec
    sizes = {"hidden_size": spec.hidden_size, "hidden_layers": spec.hidden_layers - 1}

    def build(parameters: Arrays, gradients: Arrays) -> Contender:
        torch.set_num_threads(config.threads)
        params = [torch.nn.Parameter(torch.tensor(p)) for p in parameters]
        return torch_contenders.wrap(
            "pylo",
            params,
            gradients,
            lambda: torch_contenders.pylo_optimizer(AdafacLO_naive, params, spec, **sizes).step,
        )

    return build


def _google(concat_weights: bool) -> Callable[[Config], contenders.Builder]:
    def load(config: Config) -> contenders.Builder:
        if not concat_weights and config.width > JAX_ELEMENTWISE_WIDTH:
            raise BenchmarkError(f"XLA runs out of memory compiling more than {JAX_ELEMENTWISE_WIDTH} units")
        import jax.numpy as jnp
        from learned_optimization.learned_optimizers.adafac_mlp_lopt import AdafacMLPLOpt

        from . import jax_contenders

        spec = config.spec
        ours = {n: jnp.asarray(a) for n, a in meta_parameters(spec).items()}
        learned = AdafacMLPLOpt(
            exp_mult=spec.exp_mult,
            step_mult=spec.step_mult,
            hidden_size=spec.hidden_size,
            hidden_layers=spec.hidden_layers,
            concat_weights=concat_weights,
        )
        theirs = {n: a for n, a in ours.items() if n.endswith("_decays")}
        theirs["nn"] = {"~": {n: a for n, a in ours.items() if not n.endswith("_decays")}}
        optimizer = learned.opt_fn(theirs)
        kind = "learned_optimization_" + ("matmul" if concat_weights else "elementwise")

        def start(params: Any) -> tuple[Any, Any]:
            return (), optimizer.init(params, num_steps=1000)  # its state holds the parameters

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            return params, optimizer.update(state, grads, jnp.zeros(()))

        def read(params: Any, state: Any) -> Any:
            return optimizer.get_params(state)

        def build(parameters: Arrays, gradients: Arrays) -> Contender:
            return jax_contenders.wrap(kind, config, parameters, gradients, start, step, read)

        return build

    return load


_PYLO = "https://github.com/Belilovsky-Lab/pylo"
_LEARNED_OPTIMIZATION = "https://github.com/google/learned_optimization"

PEERS: tuple[Peer, ...] = (
    Peer("pylo", "torch", _PYLO, _pylo),
    Peer("learned_optimization_matmul", "jax", _LEARNED_OPTIMIZATION, _google(concat_weights=True)),
    Peer("learned_optimization_elementwise", "jax", _LEARNED_OPTIMIZATION, _google(concat_weights=False)),
)


def run(
    workloads: Sequence[Workload],
    widths: Sequence[int],
    config: Config,
    *,
    budget: Budget | None = None,
    peers: Sequence[Peer] = PEERS,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One comparison for each peer, workload and width: AdamW, lopt_fast, the peer. A peer that is not there is an
    entry of `skipped` with the reason."""
    results = []
    for peer in peers:
        for width in widths:
            chosen = replace(config, width=width, statistics="exact")
            for workload in workloads:
                name = f"{peer.framework}/{peer.name}"
                try:
                    build = peer.load(chosen)
                except BenchmarkError as error:
                    results.append(comparison(chosen, workload, [], {name: str(error)}))
                    continue
                except Exception as error:  # an import of someone else's package may fail in any way
                    reason = (
                        f"cannot be imported: {type(error).__name__}: {error} (get it from {peer.source})"
                    )
                    say(f"{name}: {reason}")
                    results.append(comparison(chosen, workload, [], {name: reason}))
                    continue
                results.append(_compare(peer, build, workload, chosen, budget or Budget(), say))
    return results


def _compare(
    peer: Peer,
    build: contenders.Builder,
    workload: Workload,
    config: Config,
    budget: Budget,
    say: Callable[[str], None],
) -> dict[str, Any]:
    adamw: Kind = "adamw_fused" if peer.framework == "torch" else "adamw"
    kinds: tuple[Kind, ...] = (adamw, "lopt_fast")
    builders = {k: contenders.builder(peer.framework, k, config) for k in kinds}
    errors = {
        f"{peer.framework}/{k}": contenders.verify(b, contenders.oracle(k, config))
        for k, b in builders.items()
    }
    name = f"{peer.framework}/{peer.name}"
    try:
        errors[name] = contenders.verify(build, contenders.learned_oracle(config))
    except BenchmarkError as error:
        return comparison(config, workload, [], {name: str(error)})
    say(f"time {workload.label}, width {config.width}: {', '.join(errors)}")
    built = [b(*workload.values) for b in [*builders.values(), build]]
    steps = {c.name: timing.warm_up(c) for c in built}
    schedule = timing.plan(
        steps, seconds=budget.seconds, min_rounds=budget.min_rounds, rounds=budget.rounds, burst=budget.burst
    )
    samples = timing.alternate(built, schedule)
    described = [
        describe(c.name, samples, schedule, workload.parameters, None, errors[c.name]) for c in built
    ]
    return comparison(config, workload, described, {})
