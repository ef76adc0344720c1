"""The sections of `lopt-fast bench gpu`: what is built, verified and timed in each.

A section emits one {"row": ...} for each contender of each comparison and one {"skipped": ...} for what could not be
timed, as soon as it knows: nothing of it is lost where a later one takes the process along.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..spec import Spec
from . import BenchmarkError, contenders, models, timing
from .contenders import Config, Contender, Oracle
from .models import Shapes
from .workloads import ADAMW_BYTES, MEMORY_BYTES, READ_BYTES, STATE_BYTES

if TYPE_CHECKING:
    from .gpu_contenders import Place

Say = Callable[[str], None]
Emit = Callable[[Mapping[str, Any]], None]

BASELINES = ("adamw_fused", "adamw", "adamw_compiled", "pylo", "framework_matmul")
"""Contenders that the others of their comparison are divided by."""

WIDTHS = (2, 4, 8, 16, 32, 64)
POPULATIONS = (128, 8, 2048, 32, 512)
"""Antithetic pairs of the PES loop; each is compiled anew, so the ones that say most come first."""

BFLOAT16_LIMIT = 3000.0
"""Of the plain bfloat16 products, in units of the float32 tolerance: checked against nonsense alone here."""


@dataclass(frozen=True)
class Entry:
    """A contender of a comparison, before it is built."""

    name: str
    build: Callable[[Any, Any], Contender]
    oracle: Oracle | None
    """What verifies it; None: nothing does."""
    config: Config | None = None
    """Of a learned optimizer."""
    bytes: float | None = None
    """Per parameter, by the byte model."""
    memory: float = 24.0
    """Bytes per parameter that it allocates."""
    limit: float = 1.0
    """Of the error, in units of the float32 tolerance; 0: recorded, whatever it is."""


@dataclass
class Run:
    """What the sections need."""

    place: Place
    emit: Emit
    say: Say
    deadline: float
    """Of `time.monotonic`, for starting something new."""
    section: str = ""
    verified: dict[tuple[str, Config | None], float] = field(default_factory=dict)

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def skip(self, what: str, reason: str) -> None:
        self.say(f"{self.section}: {what}: {reason}")
        self.emit({"skipped": {"section": self.section, "what": what, "reason": reason}})

    def scaled(self, full: Any, rehearsal: Any) -> Any:
        return rehearsal if self.place.rehearsal else full

    def models(self) -> dict[str, models.Model]:
        return {n: models.tiny(m) if self.place.rehearsal else m for n, m in models.MODELS.items()}

    def compare(
        self,
        workload: str,
        entries: Sequence[Entry],
        shapes: Shapes,
        *,
        graphs: bool = False,
        seconds: float = 1.5,
    ) -> dict[str, Any]:
        """Build, verify and alternate; a row for each contender, by name. What cannot be timed is a note."""
        from .gpu_contenders import GpuContender, graphed

        parameters = sum(math.prod(s) for s in shapes)
        if self.over():
            self.skip(workload, "out of time")
            return {}
        self.say(f"{self.section}: {workload}: {', '.join(e.name for e in entries)}")
        values = self.place.draw(shapes)
        built: list[Contender] = []
        steps: dict[str, float] = {}
        described: dict[str, Entry] = {}
        for entry in entries:
            try:
                if self.over():
                    raise BenchmarkError("out of time")
                self._verify(entry)
                needed, free = entry.memory * parameters, self.place.free_bytes()
                if needed > 0.9 * free:
                    raise BenchmarkError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
                contender = entry.build(*values)
                steps[contender.name] = timing.warm_up(contender)
                built.append(contender)
                described[contender.name] = entry
                if graphs and isinstance(contender, GpuContender) and contender.capturable:
                    captured = graphed(self.place, contender)
                    steps[captured.name] = timing.warm_up(captured)
                    built.append(captured)
                    described[captured.name] = replace(entry, name=f"{entry.name} graph")
            except Exception as error:  # whatever one of them does, the others are timed
                first_line = (str(error).strip() or "no message").splitlines()[0]
                self.skip(f"{workload}, {entry.name}", f"{type(error).__name__}: {first_line}")
        rows: dict[str, Any] = {}
        if built:
            samples, schedule = self._alternate(built, steps, seconds)
            rows = {
                described[c.name].name: self._row(
                    workload, described[c.name], c, built, samples, schedule, parameters
                )
                for c in built
            }
        del values
        built.clear()
        gc.collect()
        return rows

    def _verify(self, entry: Entry) -> None:
        key = entry.name, entry.config
        if entry.oracle is not None and key not in self.verified:
            limit = entry.limit or math.inf
            self.verified[key] = contenders.verify(entry.build, entry.oracle, limit=limit)

    def _alternate(
        self, built: Sequence[Contender], steps: Mapping[str, float], seconds: float
    ) -> tuple[dict[str, list[float]], timing.Plan]:
        bursts = {
            name: self.scaled(min(64, max(1, math.ceil(5e-3 / max(step, 1e-9)))), 1)
            for name, step in steps.items()
        }
        round_seconds = sum(steps[name] * bursts[name] for name in steps)
        rounds = self.scaled(min(60, max(5, int(seconds * len(built) / round_seconds))), 2)
        plan = timing.Plan(bursts, dict.fromkeys(steps, rounds))
        return timing.alternate(built, plan, settle=0.0), plan

    def _row(
        self,
        workload: str,
        entry: Entry,
        contender: Contender,
        built: Sequence[Contender],
        samples: Mapping[str, Sequence[float]],
        plan: timing.Plan,
        parameters: int,
    ) -> dict[str, Any]:
        if entry.oracle is not None:
            contenders.check_finite(contender)
        own = samples[contender.name]
        seconds = timing.summarise(own)
        moved = entry.bytes * parameters if entry.bytes else None
        ratios = {
            c.kind: timing.paired_ratio(own, samples[c.name]).to_dict()
            for c in built
            if c.kind.removesuffix(" graph") in BASELINES and c is not contender
            if c.kind.endswith(" graph") == contender.kind.endswith(" graph")
        }
        row = {
            "section": self.section,
            "workload": workload,
            "parameters": parameters,
            "contender": entry.name,
            "width": entry.config.width if entry.config else None,
            "statistics": entry.config.statistics if entry.config else None,
            "seconds": seconds.to_dict(),
            "burst": plan.bursts[contender.name],
            "ns_per_parameter": seconds.median / parameters * 1e9,
            "bytes_per_parameter": entry.bytes,
            "gb_per_second": moved / seconds.median / 1e9 if moved else None,
            "share_of_copy": None,
            "ratios": ratios,
            "error_over_tolerance": self.verified.get((entry.name.removesuffix(" graph"), entry.config)),
            "per_second": None,
        }
        copy = next((c for c in built if c.kind == "copy"), None)
        if copy is not None and moved and copy is not contender:
            copied = COPY_BYTES * self.copy_elements()
            share = [moved / a / (copied / b) for a, b in zip(own, samples[copy.name], strict=True)]
            row["share_of_copy"] = timing.summarise(share).to_dict()
        self.emit({"row": row})
        return row

    def copy_elements(self) -> int:
        return int(self.scaled(1 << 28, 1 << 10))


COPY_BYTES = 8.0
"""Per element of the copy that passes are compared with: read and written."""


def _exact_and_lagged(width: int) -> list[Config]:
    return [Config(width=width), Config(width=width, statistics="lagged")]


def _adamw(run: Run, kind: str) -> Entry:
    from . import gpu_contenders

    build = gpu_contenders.adamw(run.place, kind)
    return Entry(f"adamw_{kind}", build, contenders.adamw_oracle, bytes=ADAMW_BYTES, memory=12.0)


def _learned(run: Run, backend: str, config: Config) -> Entry:
    from . import gpu_contenders

    moved = STATE_BYTES if config.statistics == "lagged" else MEMORY_BYTES
    build = gpu_contenders.learned(run.place, backend, config)
    return Entry(f"{backend}_{config.statistics}", build, contenders.learned_oracle(config), config, moved)


def _kernel(run: Run, variant: str, config: Config) -> Entry:
    from . import gpu_contenders

    build = gpu_contenders.raw(run.place, config, variant=variant)
    limit = BFLOAT16_LIMIT if variant == "matmul_bfloat16" else 1.0
    return Entry(
        f"kernel_{variant}", build, contenders.learned_oracle(config), config, MEMORY_BYTES, limit=limit
    )


def _framework(run: Run, method: str, config: Config) -> Entry:
    from . import gpu_contenders

    build = gpu_contenders.framework_code(run.place, method, config)
    kind = "matmul" if method == "matmul" else "elementwise"
    # Temporaries of one tensor at a time; the largest is half of the parameters in the models here.
    memory = 24.0 + contenders.temporary_bytes(kind, config, 1)
    return Entry(f"framework_{method}", build, contenders.learned_oracle(config), config, memory=memory)


# --- sections -------------------------------------------------------------------------------------------------


def update(run: Run) -> None:
    """One step for the tensors of whole models against AdamW, eager and as a CUDA graph."""
    for width, names in ((4, list(models.MODELS)), (32, list(models.MODELS)[:1])):
        for name in names:
            entries = [_adamw(run, "fused"), _adamw(run, "foreach")]
            for config in _exact_and_lagged(width):
                entries += [_learned(run, backend, config) for backend in run.place.backends]
            run.compare(name, entries, models.shapes(run.models()[name]), graphs=True)


def passes(run: Run) -> None:
    """Each pass alone, and the whole step in both schedules, beside a copy in the same rounds."""
    from . import gpu_contenders

    if run.place.launcher is None:
        run.skip("all", "the CUDA kernels are missing")
        return
    moved = {"factor_statistics": ADAMW_BYTES / 7, "feature_statistics": READ_BYTES, "apply": STATE_BYTES}
    for width in run.scaled((4, 32), (4,)):
        config = Config(width=width)
        entries = [Entry("copy", lambda p, g: gpu_contenders.copy(run.place, run.copy_elements()), None)]
        for name, phases in gpu_contenders.PASSES.items():
            build = gpu_contenders.raw(run.place, config, schedule="phased", phases=phases, kind=name)
            entries.append(Entry(name, build, None, config, moved[name]))
        for schedule in ("phased", "single_launch"):
            build = gpu_contenders.raw(run.place, config, schedule=schedule, kind=schedule)
            entries.append(Entry(schedule, build, contenders.learned_oracle(config), config, MEMORY_BYTES))
        run.compare("GPT-2 124M", entries, models.shapes(run.models()["GPT-2 124M"]))


def widths(run: Run) -> None:
    """Figure 3b of Metz et al. 2022 on a GPU: each variant of the MLP over its width, and framework code."""
    shapes: Shapes = [run.scaled((4096, 4096), (24, 20))]
    label = "x".join(str(n) for n in shapes[0])
    for width in run.scaled(WIDTHS, (2, 8)):
        config = Config(width=width)
        entries = [_adamw(run, "fused")]
        if run.place.launcher is not None:
            entries += [_kernel(run, v, config) for v in ("elementwise", "matmul", "matmul_bfloat16")]
        entries += [_learned(run, b, config) for b in run.place.backends if b != "cuda"]
        entries.append(_framework(run, "matmul", config))
        if width <= 8:
            entries.append(_framework(run, "elementwise", config))
        run.compare(label, entries, shapes, seconds=0.5)


def framework(run: Run) -> None:
    """Naive versions for a whole model: the reference in eager PyTorch."""
    config = Config(width=4)
    entries = [_adamw(run, "fused"), *(_learned(run, b, config) for b in run.place.backends[:1])]
    entries += [_framework(run, "matmul", config), _framework(run, "elementwise", config)]
    run.compare("GPT-2 124M", entries, models.shapes(run.models()["GPT-2 124M"]))


def peers(run: Run) -> None:
    """PyLO's CUDA kernel with the same meta-parameters on the same tensors."""
    from . import gpu_contenders

    config = Config(width=32)
    entries = [_adamw(run, "fused"), *(_learned(run, b, config) for b in run.place.backends)]
    try:
        theirs = gpu_contenders.pylo(run.place, config)
        oracle = contenders.learned_oracle(config)
        # Its error is recorded, not judged: how fast it is can be said either way.
        entries.append(Entry("pylo", theirs, oracle, config, memory=60.0, limit=0.0))
    except Exception as error:  # an import of someone else's package may fail in any way
        run.skip("pylo", f"cannot be imported: {error} (https://github.com/Belilovsky-Lab/pylo)")
    run.compare("GPT-2 124M", entries, models.shapes(run.models()["GPT-2 124M"]))


def compiled(run: Run) -> None:
    """Ours beside AdamW under torch.compile, which takes long to compile: the models that matter most come first."""
    for name in models.MODELS:
        entries = [_adamw(run, "fused"), _adamw(run, "compiled")]
        entries += [
            _learned(run, b, config) for config in _exact_and_lagged(4) for b in run.place.backends[:1]
        ]
        run.compare(name, entries, models.shapes(run.models()[name]), seconds=0.5)


def training(run: Run) -> None:
    """Whole training steps: forward, backward and the optimizer, as in Table 1 of Metz et al. 2022."""
    chosen: dict[str, tuple[models.Model, int]] = {
        "ResNet-18": (models.RESNET18, 64),
        "ResNet-50": (models.RESNET50, 64),
        "GPT-2 124M": (models.GPT2_124M, 8),
        "ViT-B/16": (models.VIT_B16, 64),
    }
    for name, (model, batch) in chosen.items():
        if run.place.rehearsal:
            model, batch = models.tiny(model), 2
        entries = [Entry("adamw_fused", _trainer(run, model, batch, None, "fused"), None)]
        for backend in run.place.backends:
            for config in _exact_and_lagged(4):
                name_ = f"{backend}_{config.statistics}"
                entries.append(Entry(name_, _trainer(run, model, batch, config, backend), None, config))
        run.compare(f"training {name}, batch {batch}", entries, models.shapes(model), seconds=1.2)


def _trainer(
    run: Run, model: models.Model, batch: int, config: Config | None, optimizer: str
) -> Callable[[Any, Any], Contender]:
    """`config` None: AdamW, `optimizer` its implementation; else LearnedOptimizer with that backend."""

    def build(parameters: Any, gradients: Any) -> Contender:
        import torch

        from ..torch import LearnedOptimizer
        from . import gpu_contenders

        device = run.place.device
        torch.manual_seed(0)
        network = models.build(model).to(device)
        if isinstance(model, models.GPT2):
            x = torch.randint(model.vocabulary, (batch, model.context), device=device)
            y = torch.roll(x, -1, 1).reshape(-1)
        else:
            x = torch.randn(batch, 3, model.image, model.image, device=device)
            y = torch.randint(model.classes, (batch,), device=device)
        params = list(network.parameters())
        opt: Any
        if config is None:
            opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
        else:
            opt = LearnedOptimizer(params, contenders.checkpoint(config), backend=optimizer)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=not run.place.rehearsal):
                out = network(x)
                loss = torch.nn.functional.cross_entropy(out.reshape(len(y), -1).float(), y)
            opt.zero_grad()
            loss.backward()
            opt.step()

        kind = "adamw_fused" if config is None else f"{optimizer}_{config.statistics}"
        return gpu_contenders.wrap(run.place, kind, params, step)

    return build


def jax_update(run: Run) -> None:
    """The custom call in JAX: `tx.step` of a whole tree against optax AdamW."""
    from . import jax_contenders

    platform = _jax_platform(run)
    if platform is None:
        return
    shapes = models.shapes(run.models()["GPT-2 124M"])
    config = Config(width=4, device=platform)
    entries = []
    kinds: list[tuple[str, contenders.Kind, Config]] = [
        ("jax adamw", "adamw", config),
        ("jax step_exact", "lopt_fast_step", config),
        ("jax step_lagged", "lopt_fast_step", replace(config, statistics="lagged")),
    ]
    for name, kind, chosen in kinds:

        def build(
            parameters: Any, gradients: Any, kind: contenders.Kind = kind, chosen: Config = chosen
        ) -> Contender:
            arrays = [
                [np.asarray(a.cpu() if hasattr(a, "cpu") else a) for a in b] for b in (parameters, gradients)
            ]
            made = jax_contenders.build(kind, chosen, *arrays)
            return made if kind == "adamw" else contenders.renamed(made, f"{kind}_{chosen.statistics}")

        oracle = contenders.oracle(kind, chosen)
        learned = kind != "adamw"
        moved = ADAMW_BYTES if not learned else STATE_BYTES if chosen.statistics == "lagged" else MEMORY_BYTES
        entries.append(Entry(name, build, oracle, chosen if learned else None, moved, memory=40.0))
    run.compare("GPT-2 124M", entries, shapes)


def _jax_platform(run: Run) -> str | None:
    """JAX's name of the device; None, with a note, where JAX cannot use it."""
    try:
        import jax

        platform = "cpu" if run.place.rehearsal else "gpu"
        jax.devices(platform)
    except (ImportError, RuntimeError) as error:
        run.skip("all", f"JAX has no GPU: {str(error).splitlines()[0]}")
        return None
    return platform


def pes(run: Run) -> None:
    """Throughput of the meta-training loop by population: MLP 64-32-10, batch 128."""
    platform = _jax_platform(run)
    if platform is None:
        return
    import jax

    from ..meta.throughput import noise_loop

    for pairs in run.scaled(POPULATIONS, (2,)):
        workload = f"PES, {pairs} pairs"
        if run.over():
            run.skip(workload, "out of time")
            continue
        run.say(f"pes: {workload}")
        try:
            loop, state = noise_loop(pairs, run.scaled(50, 2), jax.devices(platform)[:1])
            start = time.perf_counter()
            state, _ = jax.block_until_ready(loop.step(state, loop.data))
            compile_seconds = time.perf_counter() - start
            samples: list[float] = []
            until = time.perf_counter() + run.scaled(2.0, 0.0)
            while len(samples) < 3 or (time.perf_counter() < until and len(samples) < 50):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(loop.step(state, loop.data))
                samples.append(time.perf_counter() - start)
        except Exception as error:
            run.skip(workload, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        seconds = timing.summarise(samples)
        inner, spec = loop.inner_steps, loop.config.spec
        assert isinstance(spec, Spec)
        parameters = 64 * 32 + 32 + 32 * 10 + 10
        run.emit(
            {
                "row": {
                    "section": "pes",
                    "workload": workload,
                    "parameters": inner * parameters,
                    "contender": f"outer step, {inner // (2 * pairs)} inner steps",
                    "width": spec.hidden_size,
                    "statistics": spec.statistics,
                    "seconds": seconds.to_dict(),
                    "burst": 1,
                    "ns_per_parameter": seconds.median / (inner * parameters) * 1e9,
                    "bytes_per_parameter": None,
                    "gb_per_second": None,
                    "share_of_copy": None,
                    "ratios": {},
                    "error_over_tolerance": None,
                    "per_second": {"inner steps": inner / seconds.median, "compile seconds": compile_seconds},
                }
            }
        )


SECTIONS: dict[str, Callable[[Run], None]] = {
    "update": update, "passes": passes, "widths": widths, "framework": framework, "peers": peers,
    "jax": jax_update, "pes": pes, "training": training, "compiled": compiled,
}  # fmt: skip


def run_section(name: str, place: Place, seconds: float, emit: Emit, say: Say) -> None:
    """One section in this process."""
    SECTIONS[name](Run(place, emit, say, time.monotonic() + seconds, section=name))
