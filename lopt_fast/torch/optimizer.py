"""`LearnedOptimizer`: what `torch.optim.Optimizer` promises, around a plan that does the work (`plan.py`)."""

from __future__ import annotations

import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..architectures import Architecture
from ..backends import BackendError
from ..checkpoint import Checkpoint, load
from ..spec import Spec, Statistics
from . import architecture_plan
from .architecture_plan import SHARED, ArchitecturePlan
from .device import Memory
from .dtensors import agreed
from .plan import Plan, named_parameters
from .scalars import check_norm, hyperparameters, on_host
from .shares import MLP_VARIANTS
from .state import Options, backend_of, check_state_dtype, dtype_name

_PICKLED = ("checkpoint", "spec", "max_grad_norm", "num_steps", "backend", "state_dtype", "mlp")


class LearnedOptimizer(Optimizer):
    """A meta-trained optimizer as a `torch.optim.Optimizer`: any of `lopt_fast.architectures`.

    Each parameter moves by ``-lr * (step + weight_decay * p)``; `step` comes from a small network whose inputs are
    running averages of the gradient, and in most architectures from a network that sees the tensors of the model, how
    the loss goes and how far the training is: these need ``step(loss=loss)``, `num_steps`, or both. Parameters
    are float32, float64, bfloat16 or float16, of any strides, mixed as you like; the gradient has the type of its
    parameter. For bfloat16 and float16 arithmetic and state are float32, and the new parameter is rounded to the
    nearest: as with any optimizer, a step smaller than half of the last bit of a parameter is lost. Where that matters,
    keep the parameters in float32 and use autocast.

    State of a parameter of shape S for `small_fc_lopt` (Metz et al. 2022, arXiv 2203.11860), the default, created at
    its first gradient, lying in memory in the parameter's own order of axes: ``step`` (int64 scalar, the steps taken),
    ``momentum`` (3, *S), ``second_moment`` (1, *S), ``factored_row`` (3, *S without its largest axis),
    ``factored_column`` (3, *S without its second-largest axis; below rank 2 there is none and `factored_row` is
    (3, *S)), and for lagged statistics ``mean_squares`` (28,). Parameters may lie on several devices.

    Its parameters may be DTensors on the CPU, as `torch.distributed.fsdp.fully_shard` and tensor parallelism make them:
    the step is that of whole parameters, all processes of a mesh take it together, and the state are DTensors on that
    mesh (docs/sharding.md).

    Of other architectures: those of these averages that it has, and the parameter's row of the tensor-level state.
    Empty parameters have none. The state of the whole model is the dict ``param_groups[0]["shared"]``, with ``step``,
    the steps in which any parameter had a gradient. All parameters must be on one device, as the network sees them
    together. A step waits for no device other than the CPU; it cannot be captured into a CUDA graph. Kernels get
    parameters and gradients of bfloat16 and float16 as copies in float32, made for the step.

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
            The state may be loaded with another one, to train longer: with a UserWarning, as the schedule stretches.
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
            self.spec = self.spec.with_statistics(statistics)
        if isinstance(self.spec, Architecture):
            architecture_plan.check_num_steps(self.spec, num_steps)
        self.max_grad_norm = max_grad_norm
        check_norm(max_grad_norm)
        check_state_dtype(state_dtype)
        if mlp not in MLP_VARIANTS:
            raise ValueError(f"mlp={mlp!r}: must be one of {', '.join(MLP_VARIANTS)}")
        self.backend, self.state_dtype, self.mlp = backend, state_dtype, mlp
        self.num_steps = num_steps
        self._guard = _OneThread()
        self._plan: Plan | ArchitecturePlan | None = None
        self._memory = Memory(self.spec, self.checkpoint.theta)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if isinstance(self.spec, Architecture):
            architecture_plan.create_shared(self._options(), self._memory, self.param_groups, num_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own `lr` and `weight_decay` if given. Raises as the constructor."""
        super().add_param_group(param_group)
        try:
            hyperparameters(self.param_groups, read_devices=True)
            _plan_type(self.spec).check(self._options(), self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise
        self._plan = None

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """One step on every parameter that has a gradient; returns the loss of `closure`, or `loss`.

        `loss` is for architectures that look at the training loss; `small_fc_lopt` does not. It is the one of these
        gradients, not scaled by a `torch.amp.GradScaler`; a tensor on a device is read there.
        Raises ValueError, naming the parameter, for a gradient that cannot be used, and if there is no loss where it is
        needed; RuntimeError if another thread is in a step of this optimizer. Nothing has been written then.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError("step() takes a closure or a loss, not both")
            with torch.enable_grad():
                loss = closure()
        self._guarded_update(loss)
        return loss

    @torch.no_grad()
    @torch._disable_dynamo
    def observe_validation(self, loss: torch.Tensor | float) -> None:
        """Tell the optimizer a loss on validation data, whenever there is one; most architectures do not look at it.

        Raises ValueError unless it is one real number.
        """
        if isinstance(self.spec, Architecture):
            architecture_plan.check_number(loss)
            with self._guard:
                architecture_plan.observe_validation(self._options(), self._memory, self.param_groups, loss)

    @torch._disable_dynamo  # the plan works on addresses, which a traced tensor does not have
    def _guarded_update(self, loss: Any) -> None:
        with self._guard:
            self._update(loss)

    def _update(self, loss: Any) -> None:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            found_inf = agreed(self.param_groups, found_inf)
            if on_host(found_inf) and float(found_inf) > 0.0:
                return
        check_norm(self.max_grad_norm)
        steps = True
        if isinstance(self.spec, Architecture):
            architecture_plan.check_num_steps(self.spec, self.num_steps)
            steps = architecture_plan.check_loss(self.spec, loss, self.param_groups)
        options = self._options()
        for _ in range(2):
            if self._plan is None or self._plan.options != options:
                hyperparameters(self.param_groups, read_devices=False)
                self._plan = _plan_type(self.spec)(options, self._memory, self.param_groups, self.state)
            if not steps or self._plan.step(
                self.param_groups, self.state, grad_scale, found_inf, self.max_grad_norm, loss, self.num_steps
            ):
                return
            self._plan = None
        raise RuntimeError("parameters, gradients or state change while step() looks at them")

    def _options(self) -> Options[Any]:
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
        first = self.param_groups[0]
        shared = {SHARED: first.pop(SHARED)} if SHARED in first else {}  # arrays, not to be shown
        try:
            return f"{super().__repr__()[:-1]}backends: {used}\n)"
        finally:
            first.update(shared)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; between devices, and between types of parameters and of state.

        Raises ValueError, naming the parameter, if the state does not fit, and RuntimeError if another thread is in a
        step of this optimizer. Nothing has changed then.
        """
        # PyTorch would cast state to the type of the parameter, here the state of a bfloat16 parameter is float32.
        handle = self.register_load_state_dict_pre_hook(_keep_types)
        try:
            with self._guard:
                super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if isinstance(self.spec, Architecture):
            self._take_over_num_steps(self.spec)

    def _take_over_num_steps(self, architecture: Architecture) -> None:
        """What counts from now on is the num_steps of this optimizer, not that of the loaded state."""
        shared = self.param_groups[0][SHARED]
        saved, shared["num_steps"] = shared["num_steps"], self.num_steps
        if saved != self.num_steps and architecture.needs_num_steps:
            warnings.warn(
                f"num_steps={self.num_steps}, but the loaded state was saved with num_steps={saved}: the schedule "
                "stretches. From the next step on, the fraction of the training that is left is computed from the new "
                f"num_steps. Pass num_steps={saved} to go on as before.",
                UserWarning,
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _PICKLED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over `state`, from `load_state_dict`, pickle or deepcopy: checked first, its tensors copied."""
        merged = {**self.__dict__, **state}
        hyperparameters(merged["param_groups"], read_devices=True)
        spec = merged["spec"]
        options: Options[Any] = Options(spec, merged["backend"], merged["state_dtype"], merged["mlp"])
        memory = merged.get("_memory") or Memory(spec, merged["checkpoint"].theta)
        given = {
            p: entries.entries if isinstance(entries, _Kept) else entries
            for p, entries in merged["state"].items()
        }
        groups, loaded = _plan_type(spec).loaded(options, memory, merged["param_groups"], given)
        super().__setstate__({**state, "state": defaultdict(dict, loaded), "param_groups": groups})
        self._plan, self._memory = None, memory
        self._guard = merged.get("_guard") or _OneThread()


def _plan_type(spec: Spec | Architecture) -> type[Plan] | type[ArchitecturePlan]:
    return Plan if isinstance(spec, Spec) else ArchitecturePlan


class _OneThread:
    """What one thread enters at a time. Another one gets a RuntimeError: waiting would hide that steps interleave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is in step() of this optimizer: give each thread its own optimizer"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Kept:
    """State of a parameter that `torch.optim.Optimizer.load_state_dict` passes on as it is."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries


def _keep_types(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    _check_structure(state_dict)
    return {**state_dict, "state": {key: _Kept(entries) for key, entries in state_dict["state"].items()}}


def _check_structure(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the entry, unless it is built as `state_dict()` builds it."""
    remedy = "load what state_dict() of such an optimizer returned"
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise ValueError(f"state_dict needs a dict 'state' and a list 'param_groups': {remedy}")
    known: list[Any] = []
    for i, group in enumerate(groups):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, (list, tuple)) or not all(isinstance(n, (int, str)) for n in numbers):
            raise ValueError(
                f"state_dict['param_groups'][{i}] needs a list 'params' of parameters' numbers: {remedy}"
            )
        known += numbers
    if len(set(known)) < len(known):
        raise ValueError(f"state_dict['param_groups'] has the same parameter twice, of {known}: {remedy}")
    if unknown := sorted(map(str, state.keys() - set(known))):
        raise ValueError(
            f"state_dict['state'] has entries {unknown}, which no group in 'param_groups' lists: {remedy}"
        )
    for number, entries in state.items():
        if not isinstance(entries, Mapping):
            raise ValueError(
                f"state_dict['state'][{number!r}] is a {type(entries).__name__}, not a dict: {remedy}"
            )
