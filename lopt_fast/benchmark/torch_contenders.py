"""Contenders in PyTorch: gradients are written in place before every sample, steps are eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from .. import reference
from ..spec import Spec
from .contenders import (
    BETA1,
    BETA2,
    EPSILON,
    LR,
    WEIGHT_DECAY,
    Arrays,
    Config,
    Contender,
    Kind,
    checkpoint,
    meta_parameters,
)


def build(kind: Kind, config: Config, parameters: Arrays, gradients: Arrays) -> Contender:
    torch.set_num_threads(config.threads)
    params = [torch.nn.Parameter(torch.tensor(p)) for p in parameters]
    return wrap(kind, params, gradients, _step(kind, config, params))


def wrap(
    kind: str,
    params: list[torch.nn.Parameter],
    gradients: Arrays,
    make_step: Callable[[], Callable[[], object]],
) -> Contender:
    """Contender around `make_step()()`, which is called once the gradients are there."""
    fresh = [torch.tensor(g) for g in gradients]
    grads = [g.clone() for g in fresh]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    step = make_step()

    def prepare(steps: int) -> None:
        for g, source in zip(grads, fresh, strict=True):
            g.copy_(source)

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    def values() -> list[np.ndarray]:
        return [p.detach().numpy() for p in params]

    return Contender("torch", kind, prepare, run, values)


def _step(kind: Kind, config: Config, params: list[torch.nn.Parameter]) -> Callable[[], Callable[[], object]]:
    if kind in ("adamw_fused", "adamw_foreach"):
        chosen = {kind.removeprefix("adamw_"): True}
        return lambda: (
            torch.optim.AdamW(
                params, lr=LR, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=WEIGHT_DECAY, **chosen
            ).step
        )
    if kind == "lopt_fast":
        from ..torch import LearnedOptimizer

        return lambda: LearnedOptimizer(params, checkpoint(config), backend=config.backend).step
    return lambda: _framework_step(kind, config, params)


def _framework_step(kind: Kind, config: Config, params: list[torch.nn.Parameter]) -> Callable[[], None]:
    spec = config.spec
    method: Literal["matmul", "elementwise"] = "matmul" if kind == "matmul" else "elementwise"
    theta = {name: torch.from_numpy(a) for name, a in meta_parameters(spec).items()}
    states = [reference.init_state(spec, p.detach()) for p in params]
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        for i, p in enumerate(params):
            delta, states[i] = reference.update(spec, theta, p.detach(), p.grad, states[i], t, method=method)
            p.add_(delta)
        t += 1

    return step


def copy_contender(parameters: int, threads: int) -> Contender:
    """A copy of that many float32 values: the memory bandwidth that a pass is compared with."""
    torch.set_num_threads(threads)
    source = torch.ones(parameters, dtype=torch.float32)
    target = torch.zeros_like(source)

    def run(steps: int) -> None:
        for _ in range(steps):
            target.copy_(source)

    return Contender("torch", "copy", lambda steps: None, run, lambda: [target.numpy()])


def pylo_optimizer(optimizer: Any, params: Any, spec: Spec, **more: Any) -> Any:
    """PyLO's `optimizer` of small_fc_lopt with our meta-parameters; its constructor would download weights."""
    from pylo.models.Meta_MLP import MetaMLP

    theta = {n: torch.from_numpy(a) for n, a in meta_parameters(spec).items()}
    # Its count of hidden layers leaves the first one out; weights are (outputs, inputs).
    network = MetaMLP(spec.input_size, spec.hidden_size, spec.hidden_layers - 1)
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for i, layer in enumerate(linear):
            layer.weight.copy_(theta[f"w{i}"].T)
            layer.bias.copy_(theta[f"b{i}"])
    download = MetaMLP.from_pretrained
    MetaMLP.from_pretrained = classmethod(lambda cls, *args, **kwargs: network)
    try:
        decays = {n: a.tolist() for n, a in theta.items() if n.endswith("_decays")}
        return optimizer(params, exp_mult=spec.exp_mult, step_mult=spec.step_mult, **decays, **more)
    finally:
        MetaMLP.from_pretrained = download
