"""The configuration of a meta-training run: every setting, with its meaning, default and check.

Read from TOML. `lopt-fast meta-train --explain` prints this file's contents as a commented configuration.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import optax
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..architectures import ARCHITECTURES, Architecture
from ..checkpoint import Checkpoint, load
from ..errors import UserError
from ..spec import Spec
from .estimators import Estimator
from .estimators import make as make_estimator
from .tasks.base import Reparametrisation

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Schedule = Literal["constant", "linear", "cosine"]


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; names the file, the setting and the remedy."""


class _Table(BaseModel):
    """Unknown keys are refused; the docstring of a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OptimizerTable(_Table):
    """The learned optimizer."""

    architecture: str = Spec.NAME
    """Name of the architecture: any in `lopt_fast.architectures` that has meta-parameters. Those that know the length
    of the training are told that of each unroll."""
    spec: dict[str, Any] = {}
    """Hyperparameters of the architecture that differ from their defaults, for example { scale = "parameter_rms" }."""
    initial: str = "warm"
    """Meta-parameters to start from: "random"; "warm" (near m / sqrt(v), which saves the steps in which a random
    network learns to follow the gradient at all; small_fc_lopt only, for others the default is "random"); or the name
    or path of a checkpoint."""
    warm_scale: Annotated[float, Field(gt=0)] = 4.0
    """For "warm": the direction is this many times the normalised m / sqrt(v)."""
    train: list[str] = ["*"]
    """Which meta-parameters are trained: names, or patterns such as "lstm_*". The others stay as they began."""

    @model_validator(mode="before")
    @classmethod
    def _default_initial(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("architecture", Spec.NAME) != Spec.NAME:
            return {"initial": "random", **values}
        return values

    @field_validator("architecture")
    @classmethod
    def _architecture(cls, value: str) -> str:
        trained = [name for name, kind in ARCHITECTURES.items() if kind().theta_shapes]
        if value not in trained:
            what = "has no meta-parameters" if value in ARCHITECTURES else "is unknown"
            raise ValueError(f"{value!r} {what}; must be one of {', '.join(trained)}")
        return value

    @field_validator("spec")
    @classmethod
    def _spec(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "architecture" in info.data:  # else it is refused itself
            ARCHITECTURES[info.data["architecture"]].from_dict(value)
        return value

    @field_validator("initial")
    @classmethod
    def _initial(cls, value: str, info: ValidationInfo) -> str:
        name = info.data.get("architecture", Spec.NAME)
        if value == "warm" and name != Spec.NAME:
            raise ValueError(f"'warm' is for {Spec.NAME} only, not {name}: give \"random\" or a checkpoint")
        return value

    @field_validator("train")
    @classmethod
    def _train(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if "spec" not in info.data or "architecture" not in info.data:
            return value  # refused itself
        names = ARCHITECTURES[info.data["architecture"]].from_dict(info.data["spec"]).theta_shapes
        for pattern in value:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"{pattern!r} is none of the meta-parameters {', '.join(names)}")
        if not value:
            raise ValueError("nothing would be trained: name some meta-parameters, or leave it out")
        return value

    def is_trained(self, name: str) -> bool:
        """Whether the meta-parameter of this name is trained."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.train)

    def make(self) -> Spec | Architecture:
        """What the optimizer computes."""
        return ARCHITECTURES[self.architecture].from_dict(self.spec)


class EstimatorTable(_Table):
    """The estimator of the meta-gradient."""

    name: str = "pes"
    """full_es, truncated_es, pes or nres."""
    pairs: Positive = 16
    """Antithetic pairs for each task; a multiple of the number of devices. The data sets of a task take turns."""
    std: Annotated[float, Field(gt=0)] = 0.01
    """Standard deviation of the perturbations."""
    sign: Annotated[float, Field(gt=0)] | None = None
    """Replace the loss differences of a pair by their sign times this."""
    options: dict[str, Any] = {}
    """Further settings of the estimator, if it has any."""

    @model_validator(mode="after")
    def _known(self) -> EstimatorTable:
        self.make()
        return self

    def make(self) -> Estimator:
        return make_estimator(self.name, self.std, self.sign, **self.options)


class Unroll(_Table):
    """Lengths of unrolls: constant where both bounds are equal, else log-uniform in between."""

    min_steps: Positive = 100
    """Shortest unroll, in inner steps."""
    max_steps: Positive = 2000
    """Longest unroll, in inner steps."""

    @model_validator(mode="after")
    def _ordered(self) -> Unroll:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than max_steps={self.max_steps}")
        return self


class TruncationTable(Unroll):
    """How unrolls are cut."""

    steps: Positive = 50
    """Inner steps between two outer steps."""
    staggered: bool = True
    """Let the first unrolls end early, one after the other, so that a batch is spread over the horizon."""
    resets: Literal["between", "inside"] = "between"
    """Where unrolls end: between truncations (their lengths are rounded up), or inside, at their exact lengths
    (pes and truncated_es only; a reset takes the place of an inner step)."""


class OuterTable(_Table):
    """The outer loop."""

    steps: Positive = 10_000
    """Outer steps of the run."""
    optimizer: str = "adam"
    """Name of an optimizer in optax."""
    options: dict[str, Any] = {"b2": 0.99}
    """Its further arguments."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate."""
    schedule: Schedule = "cosine"
    """How it falls to `final_learning_rate` at the last step."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at the end, unless the schedule is constant."""
    warmup: Count = 100
    """Steps in which the learning rate rises from a tenth to its highest value."""
    clip: Literal["value", "norm", "none"] = "value"
    """How the meta-gradient is clipped: each element, or its norm."""
    clip_at: Annotated[float, Field(gt=0)] = 3.0
    """Bound for `clip`."""
    balance: bool = True
    """Divide each task's gradient by the running root mean square of its norm: no task drowns the others."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Decay of the exponential moving average of the meta-parameters, which is what is evaluated and kept."""

    @model_validator(mode="after")
    def _usable(self) -> OuterTable:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be less than steps={self.steps}")
        self.make()
        return self

    def make(self) -> optax.GradientTransformation:
        """Clipping and the optimizer with its schedule."""
        factory = getattr(optax, self.optimizer, None)
        if not callable(factory):
            raise ValueError(f"optimizer={self.optimizer!r} is not an optimizer of optax")
        try:
            optimizer = factory(self._schedule(), **self.options)
        except TypeError as error:
            raise ValueError(f"options={self.options!r} do not fit optax.{self.optimizer}: {error}") from None
        clips = {"value": optax.clip, "norm": optax.clip_by_global_norm}
        return optax.chain(clips[self.clip](self.clip_at), optimizer) if self.clip != "none" else optimizer

    def _schedule(self) -> optax.Schedule:
        rate, last = self.learning_rate, self.final_learning_rate
        after = max(1, self.steps - self.warmup)
        falls = {
            "constant": lambda: optax.constant_schedule(rate),
            "linear": lambda: optax.linear_schedule(rate, last, after),
            "cosine": lambda: optax.cosine_decay_schedule(rate, after, last / rate),
        }
        rise = optax.linear_schedule(rate / 10, rate, self.warmup)
        return optax.join_schedules([rise, falls[self.schedule]()], [self.warmup])


class ReparametriseTable(_Table):
    """Random re-parametrisation of a task's scale."""

    level: Literal["global", "tensor", "parameter"] = "tensor"
    """One factor for the network, for each tensor, or for each parameter."""
    low: Annotated[float, Field(gt=0)] = 1e-3
    """Smallest factor."""
    high: Annotated[float, Field(gt=0)] = 1e3
    """Largest factor."""

    def make(self) -> Reparametrisation:
        return Reparametrisation(self.level, self.low, self.high)


class TaskTable(BaseModel):
    """A task. Keys that are not listed here are the task's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    kind: str
    """A built-in kind, or "package.module:Class" or "file.py:Class" of a task of your own."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the task's gradient."""
    data_weights: dict[str, float] = {}
    """Weights of the losses on its data sets, 1 where none is given: an easy data set has small loss differences."""
    pairs: Positive | None = None
    """Antithetic pairs, if not `estimator.pairs`."""
    unroll: Unroll | None = None
    """Lengths of unrolls, if not those of `truncation`."""
    loss_clip: Annotated[float, Field(gt=0)] = 1.5
    """Bound on an inner loss in units of the task's initial loss: divergence is not infinitely bad."""
    reparametrise: ReparametriseTable | None = None
    """Random re-parametrisation; left out: none."""

    @property
    def options(self) -> dict[str, Any]:
        """The task's own options."""
        return dict(self.model_extra or {})

    def beside(self, file: Path) -> TaskTable:
        """The same with the path of a class of the user's own relative to the folder of `file`."""
        where, colon, name = self.kind.rpartition(":")
        if not where.endswith(".py"):
            return self
        return self.model_copy(update={"kind": beside(file, where) + colon + name})


class EvaluationTable(_Table):
    """Evaluation during the run; the best checkpoint by the held-out score is kept."""

    every: Count = 1000
    """Outer steps between two evaluations; 0: none."""
    steps: Positive = 1000
    """Inner steps of an evaluation."""
    seeds: Positive = 4
    """Seeds of an evaluation."""


class CheckpointTable(_Table):
    """What is written during the run."""

    every: Positive = 500
    """Outer steps between two checkpoints; a resumed run continues from the last one."""


class MetaTrainConfig(_Table):
    """A meta-training run."""

    name: str = "meta-trained"
    """Name of the run, recorded in its checkpoints."""
    seed: Count = 0
    """Of everything random."""
    optimizer: OptimizerTable = OptimizerTable()
    estimator: EstimatorTable = EstimatorTable()
    truncation: TruncationTable = TruncationTable()
    outer: OuterTable = OuterTable()
    task: Annotated[tuple[TaskTable, ...], Field(min_length=1)] = (TaskTable(kind="mlp"),)
    """The training tasks."""
    held_out: tuple[TaskTable, ...] = ()
    """Tasks that decide which checkpoint is the best; left out: the training tasks do."""
    evaluation: EvaluationTable = EvaluationTable()
    checkpoint: CheckpointTable = CheckpointTable()
    data: dict[str, str] = {}
    """Where data sets lie: name = folder or file, relative to the configuration file."""

    @model_validator(mode="after")
    def _fits(self) -> MetaTrainConfig:
        estimator = self.estimator.make()
        if self.truncation.resets == "inside":
            if not estimator.resets_inside:
                raise ValueError(f'truncation.resets = "inside" is not for the estimator {estimator.name!r}')
            for unroll in (self.truncation, *(t.unroll for t in self.task if t.unroll)):
                if unroll.min_steps < self.truncation.steps:
                    raise ValueError(
                        f'truncation.resets = "inside" needs min_steps={unroll.min_steps} of at least '
                        f"truncation.steps={self.truncation.steps}"
                    )
        return self

    @property
    def spec(self) -> Spec | Architecture:
        """What the optimizer computes."""
        return self.optimizer.make()

    def initial_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to start from, if it is one. Raises CheckpointError if it does not fit."""
        if self.optimizer.initial in ("random", "warm"):
            return None
        return load(self.optimizer.initial)

    def to_json(self) -> str:
        """All settings, defaults included; `from_json` reads it."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def parse(text: str, where: str = "configuration") -> MetaTrainConfig:
    """From TOML. Raises ConfigError that names the setting."""
    try:
        return _validated(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None


def from_json(text: str, where: str = "configuration") -> MetaTrainConfig:
    """Inverse of `MetaTrainConfig.to_json`."""
    return _validated(json.loads(text), where)


def read(path: Path) -> MetaTrainConfig:
    """From a TOML file; paths in it (data, files of task classes) are relative to it. Raises ConfigError, OSError."""
    try:
        config = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from None
    absolute = {
        "data": {name: beside(path, where) for name, where in config.data.items()},
        "task": tuple(table.beside(path) for table in config.task),
        "held_out": tuple(table.beside(path) for table in config.held_out),
    }
    given = config.model_fields_set  # which the copy has too: the evaluation does not want the default task
    return config.model_copy(update={name: value for name, value in absolute.items() if name in given})


def beside(file: Path, where: str) -> str:
    """A path in `file`, which is relative to its folder, made absolute."""
    return str((file.parent / Path(where).expanduser()).resolve())


def read_sources(pairs: Sequence[str]) -> dict[str, str]:
    """Where data sets lie, from NAME=PATH each. Raises ConfigError."""
    out = {}
    for item in pairs:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--data {item}: give NAME=PATH")
        out[name] = path
    return out


def explain() -> str:
    """A TOML configuration with all settings, their defaults and meanings."""
    lines = [f"# {MetaTrainConfig.__doc__}", ""]
    lines += _explained(MetaTrainConfig, "")
    return "\n".join(lines) + "\n"


def _validated(values: dict[str, Any], where: str) -> MetaTrainConfig:
    try:
        return MetaTrainConfig.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "the whole"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = f"unknown setting; known here are {', '.join(_known(item['loc']))}"
            problems.append(f"{name}: {message}")
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """The settings of the table in which `loc` lies."""
    model: type[BaseModel] = MetaTrainConfig
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _model(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model(annotation: Any) -> type[BaseModel] | None:
    """The table type in an annotation such as `Unroll | None` or `tuple[TaskTable, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model(part))), None)


def _explained(model: type[BaseModel], prefix: str) -> list[str]:
    """Plain settings of a table first, then its tables; what is left out by default is commented out."""
    lines, tables = [], []
    for name, field in model.model_fields.items():
        table = _model(field.annotation)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if table is None:
            lines += [f"# {line}" for line in _lines(field.description)]
            value = _toml("mlp" if name == "kind" else default)
            lines.append(f"# {name} = ..." if value == "null" else f"{name} = {value}")
            continue
        path = f"{prefix}{name}"
        header = f"[[{path}]]" if "tuple" in str(field.annotation) else f"[{path}]"
        body = [header, *_explained(table, f"{path}.")]
        if not default:
            body = [line if line.startswith("#") or not line else f"# {line}" for line in body]
        tables += ["", *(f"# {line}" for line in _lines(table.__doc__, field.description)), *body]
    return lines + tables


def _lines(*texts: str | None) -> list[str]:
    return [line.strip() for text in texts if text for line in text.strip().splitlines()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(value)
