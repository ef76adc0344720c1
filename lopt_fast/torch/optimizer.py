"""`LearnedOptimizer`: what `torch.optim.Optimizer` promises, around a plan that does the work (`plan.py`)."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from ..checkpoint import Checkpoint, load
from ..spec import Statistics
from .plan import Plan, check_parameters, checked_state, named_parameters

_PICKLED = ("checkpoint", "spec", "max_grad_norm", "num_steps", "backend")


class LearnedOptimizer(Optimizer):
    """A meta-trained optimizer, `small_fc_lopt` of Metz et al. 2022 (arXiv 2203.11860), as a `torch.optim.Optimizer`.

    Each parameter moves by ``-lr * (step + weight_decay * p)``; `step` comes from a small network whose inputs are
    running averages of the gradient. float32 and float64 parameters of any strides, mixed as you like.

    State of a parameter of shape S, created at its first gradient, lying in memory in the parameter's own order of
    axes: ``step`` (int64 scalar on the CPU, the steps taken), ``momentum`` (3, *S), ``second_moment`` (1, *S),
    ``factored_row`` (3, *S without its largest axis), ``factored_column`` (3, *S without its second-largest axis;
    below rank 2 there is none and `factored_row` is (3, *S)), and for lagged statistics ``mean_squares`` (28,).

    Args:
        params: parameters, (name, parameter) pairs, or groups with their own `lr` and `weight_decay`.
        optimizer: name of shipped weights, path of a checkpoint, or a `Checkpoint`; None: the default weights.
        lr: multiplies the step; a number or a tensor of one element.
        weight_decay: decoupled, multiplied by `lr` as in `torch.optim.AdamW`.
        statistics: "exact" or "lagged"; None: as the weights were meta-trained.
        max_grad_norm: bound on the norm of all gradients of a step together, None for none. May be changed later.
        backend: "auto", or "cpu" or "reference" to force one.
        num_steps: length of the training, for optimizers that know their horizon; `small_fc_lopt` does not use it.

    Raises:
        CheckpointError: the weights cannot be loaded.
        BackendError: a forced backend cannot be used for these parameters.
        ValueError, TypeError: unusable arguments, named.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: str | os.PathLike[str] | Checkpoint | None = None,
        lr: float | torch.Tensor = 1.0,
        weight_decay: float | torch.Tensor = 0.0,
        *,
        statistics: Statistics | None = None,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        num_steps: int | None = None,
    ) -> None:
        self.checkpoint = load(optimizer)
        self.spec = self.checkpoint.spec
        if statistics is not None:
            self.spec = replace(self.spec, statistics=statistics)
        self.max_grad_norm = max_grad_norm
        _check_norm(max_grad_norm)
        self.backend = backend
        self.num_steps = num_steps
        self._plan: Plan | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own `lr` and `weight_decay` if given. Raises as the constructor."""
        super().add_param_group(param_group)
        try:
            _hyperparameters(self.param_groups)
            check_parameters(self.spec, self.backend, self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise
        self._plan = None

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """One step on every parameter that has a gradient; returns the loss of `closure`, or `loss`.

        `loss` is for optimizers that look at it; `small_fc_lopt` does not.
        Raises ValueError, naming the parameter, for a gradient that cannot be used. Nothing has been written then.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError("step() takes a closure or a loss, not both")
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # the plan works on addresses, which a traced tensor does not have
    def _update(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0.0:
            return
        scale = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        _check_norm(self.max_grad_norm)
        lrs, weight_decays = _hyperparameters(self.param_groups)
        for _ in range(2):
            if self._plan is None:
                self._plan = Plan(
                    self.spec, self.checkpoint.theta, self.backend, self.param_groups, self.state
                )
            if self._plan.step(
                self.param_groups, self.state, lrs, weight_decays, grad_scale, self.max_grad_norm
            ):
                return
            self._plan = None
        raise RuntimeError("parameters, gradients or state change while step() looks at them")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _PICKLED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over `state`, from `load_state_dict`, pickle or deepcopy: checked first, its tensors copied."""
        merged = {**self.__dict__, **state}
        _hyperparameters(merged["param_groups"])
        loaded: defaultdict[Any, Any] = defaultdict(dict, merged["state"])
        for _, name, p in named_parameters(merged["param_groups"]):
            if loaded.get(p):
                loaded[p] = checked_state(merged["spec"], name, p, loaded[p], copy=True)
        super().__setstate__({**state, "state": loaded})
        self._plan = None


def _hyperparameters(groups: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """lr and weight_decay of every group. Raises ValueError unless each is a number, finite and not negative."""
    lrs = [_number(group, i, "lr") for i, group in enumerate(groups)]
    return lrs, [_number(group, i, "weight_decay") for i, group in enumerate(groups)]


def _number(group: dict[str, Any], index: int, key: str) -> float:
    if key not in group:
        raise ValueError(f"parameter group {index} has no {key!r}: was it saved by another optimizer?")
    try:
        value = float(group[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key}={group[key]!r} of parameter group {index}: must be one number") from error
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{key}={value} of parameter group {index}: must be finite and not negative")
    return value


def _check_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm={max_grad_norm}: must be positive and finite, or None")
