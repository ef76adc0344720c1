"""`LearnedOptimizer`: what `torch.optim.Optimizer` promises, around a plan that does the work (`plan.py`)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from ..backends import BackendError
from ..checkpoint import Checkpoint, load
from ..spec import Statistics
from .device import Memory
from .plan import Plan, check_parameters, named_parameters
from .scalars import check_norm, hyperparameters, on_host
from .shares import MLP_VARIANTS
from .state import Home, Options, backend_of, check_state_dtype, checked_state, dtype_name

_PICKLED = ("checkpoint", "spec", "max_grad_norm", "num_steps", "backend", "state_dtype", "mlp")


class LearnedOptimizer(Optimizer):
    """A meta-trained optimizer, `small_fc_lopt` of Metz et al. 2022 (arXiv 2203.11860), as a `torch.optim.Optimizer`.

    Each parameter moves by ``-lr * (step + weight_decay * p)``; `step` comes from a small network whose inputs are
    running averages of the gradient. float32 and float64 parameters of any strides, on devices other than the CPU
    bfloat16 and float16 as well, on several devices, mixed as you like; the gradient has the type of its parameter.

    State of a parameter of shape S, created at its first gradient, lying in memory in the parameter's own order of
    axes: ``step`` (int64 scalar, the steps taken), ``momentum`` (3, *S), ``second_moment`` (1, *S),
    ``factored_row`` (3, *S without its largest axis), ``factored_column`` (3, *S without its second-largest axis;
    below rank 2 there is none and `factored_row` is (3, *S)), and for lagged statistics ``mean_squares`` (28,).

    With GPU kernels (backends "cuda" and "triton") ``step`` lies on the device, and the host waits for nothing in a
    step: a learning rate, a weight decay and what `torch.amp.GradScaler` gives are read by the kernels where they are
    tensors on a device (and not checked there, other than numbers). A step can be captured into a CUDA graph once one
    has been run; numbers and tensors on the CPU stay in the graph as they were. If a parameter of the same optimizer
    is updated on the CPU or by the reference, all is read by the host. Parameters and gradients that are not dense, in
    the parameter's order of axes, are copied for the step.

    Args:
        params: parameters, (name, parameter) pairs, or groups with their own `lr` and `weight_decay`.
        optimizer: name of shipped weights, path of a checkpoint, or a `Checkpoint`; None: the default weights.
        lr: multiplies the step; a number or a tensor of one element.
        weight_decay: decoupled, multiplied by `lr` as in `torch.optim.AdamW`.
        statistics: "exact" or "lagged"; None: as the weights were meta-trained.
        max_grad_norm: bound on the norm of all gradients of a step together, None for none. May be changed later.
        backend: "auto", or "cuda", "triton", "cpu" or "reference" to force one; `backends` tells what is used.
        num_steps: length of the training, for optimizers that know their horizon; `small_fc_lopt` does not use it.
        state_dtype: of momentum and second moment; None: float32, or float64 where the parameter is. GPU kernels take
            torch.bfloat16 as well, rounded stochastically and reproducibly: half the state.
        mlp: how GPU kernels compute the network: "automatic" for the width, "elementwise", "matmul" on tensor cores
            within the same error bound, or "matmul_bfloat16" with a larger one.

    Raises:
        CheckpointError: the weights cannot be loaded.
        BackendError: a forced backend cannot be used for these parameters, or none takes `state_dtype`.
        ValueError, TypeError: unusable arguments, named.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()
    _schedule = "automatic"  # of GPU kernels; results do not depend on it

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
        state_dtype: torch.dtype | None = None,
        mlp: str = "automatic",
    ) -> None:
        self.checkpoint = load(optimizer)
        self.spec = self.checkpoint.spec
        if statistics is not None:
            self.spec = replace(self.spec, statistics=statistics)
        self.max_grad_norm = max_grad_norm
        check_norm(max_grad_norm)
        check_state_dtype(state_dtype)
        if mlp not in MLP_VARIANTS:
            raise ValueError(f"mlp={mlp!r}: must be one of {', '.join(MLP_VARIANTS)}")
        self.backend, self.state_dtype, self.mlp = backend, state_dtype, mlp
        self.num_steps = num_steps
        self._plan: Plan | None = None
        self._memory = Memory(self.spec, self.checkpoint.theta)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own `lr` and `weight_decay` if given. Raises as the constructor."""
        super().add_param_group(param_group)
        try:
            hyperparameters(self.param_groups, read_devices=True)
            check_parameters(self._options(), self.param_groups)
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
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and on_host(found_inf) and float(found_inf) > 0.0:
            return
        check_norm(self.max_grad_norm)
        options = self._options()
        for _ in range(2):
            if self._plan is None or self._plan.options != options:
                hyperparameters(self.param_groups, read_devices=False)
                self._plan = Plan(options, self._memory, self.param_groups, self.state)
            if self._plan.step(self.param_groups, self.state, grad_scale, found_inf, self.max_grad_norm):
                return
            self._plan = None
        raise RuntimeError("parameters, gradients or state change while step() looks at them")

    def _options(self) -> Options:
        return Options(self.spec, self.backend, self.state_dtype, self.mlp, self._schedule)

    @property
    def backends(self) -> dict[str, str]:
        """The backend of each kind of parameter: ``{"cuda:0 float32": "cuda"}``. Set `backend` to force another."""
        options = self._options()
        return {
            f"{p.device} {dtype_name(p)}": backend_of(options, p)
            for _, _, p in named_parameters(self.param_groups)
        }

    def __repr__(self) -> str:
        try:
            used = ", ".join(f"{kind}: {backend}" for kind, backend in self.backends.items())
        except BackendError as error:
            used = str(error)
        return f"{super().__repr__()[:-1]}backends: {used}\n)"

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; between devices, and between types of parameters and of state.

        Raises ValueError, naming the parameter, if the state does not fit. Nothing has changed then.
        """
        # PyTorch would cast state to the type of the parameter, here the state of a bfloat16 parameter is float32.
        handle = self.register_load_state_dict_pre_hook(_keep_types)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _PICKLED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over `state`, from `load_state_dict`, pickle or deepcopy: checked first, its tensors copied."""
        merged = {**self.__dict__, **state}
        hyperparameters(merged["param_groups"], read_devices=True)
        spec = merged["spec"]
        options = Options(spec, merged["backend"], merged["state_dtype"], merged["mlp"])
        loaded: defaultdict[Any, Any] = defaultdict(dict)
        for p, entries in merged["state"].items():
            loaded[p] = entries.entries if isinstance(entries, _Kept) else entries
        for _, name, p in named_parameters(merged["param_groups"]):
            if loaded.get(p):
                loaded[p] = checked_state(spec, Home.of(options, name, p), name, p, loaded[p], copy=True)
        super().__setstate__({**state, "state": loaded})
        self._plan = None
        if "_memory" not in self.__dict__:
            self._memory = Memory(self.spec, self.checkpoint.theta)


class _Kept:
    """State of a parameter that `torch.optim.Optimizer.load_state_dict` passes on as it is."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries


def _keep_types(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {key: _Kept(entries) for key, entries in state_dict["state"].items()}}
