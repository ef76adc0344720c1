"""Tables in Markdown from records, for the terminal and the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

FRAMEWORK_CODE = {"matmul", "elementwise"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """First column left, the others right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Three digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-9)} ns"


def digits(value: float) -> str:
    """At least three significant digits, no exponent."""
    magnitude = abs(value)
    return f"{value:.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def ratio(value: Mapping[str, float] | None) -> str:
    """Median and spread: `2.71 (2.65 to 2.80)`."""
    if value is None:
        return ""
    return f"{digits(value['median'])} ({digits(value['p10'])} to {digits(value['p90'])})"


def origin(record: Record) -> str:
    """One line: machine, versions, date, command."""
    machine = record["machine"]
    versions = [f"{name} {v}" for name, v in record["versions"].items() if v]
    instructions = f", {machine['instruction_set']}" if machine["instruction_set"] else ""
    commit = f", commit {record['commit'][:12]}" if record["commit"] else ""
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{instructions}; "
        f"{', '.join(versions)}; {record['date'][:10]}{commit}; `{record['command']}`"
    )


def comparisons(record: Record) -> str:
    """Times of update, width and peers records: a row for each contender of each comparison. The last column is the
    ratio to lopt_fast in the same framework."""
    header = ["tensors", "width", "statistics", "contender", "time", "ns/param.", "GB/s"]
    header += ["vs torch AdamW fused", "vs optax AdamW", "vs lopt_fast"]
    rows, skipped = [], []
    for result in record["results"]:
        # The others of such a comparison are there for the ratios, and have rows of their own.
        names = {c["name"] for c in result["contenders"]}
        code = {n for n in names if n.partition("/")[2] in FRAMEWORK_CODE and record["benchmark"] == "update"}
        for c in result["contenders"]:
            if code and c["name"] not in code:
                continue
            learned = not c["name"].partition("/")[2].startswith(("adamw", "dispatch"))
            rows.append(
                [
                    result["workload"],
                    str(result["width"]) if learned else "",
                    result["statistics"] if learned else "",
                    c["name"],
                    seconds(c["seconds"]["median"]),
                    digits(c["ns_per_parameter"]),
                    "" if c["gb_per_second"] is None else digits(c["gb_per_second"]),
                    ratio(c["ratios"].get("torch/adamw_fused")),
                    ratio(c["ratios"].get("jax/adamw")),
                    ratio(c["ratios"].get(c["name"].partition("/")[0] + "/lopt_fast")) if learned else "",
                ]
            )
        skipped += [
            f"- {name}, {result['workload']}, width {result['width']}: {reason}"
            for name, reason in result["skipped"].items()
        ]
    parts = [table(header, rows)] if rows else []
    return "\n\n".join(parts + (["Not measured:\n\n" + "\n".join(skipped)] if skipped else []))


def summary(record: Record) -> str:
    """One row for each workload, width and statistics of an update record: the ratios that matter."""
    header = ["tensors", "width", "statistics", "PyTorch", "vs AdamW fused", "vs AdamW foreach"]
    header += [
        "JAX update",
        "vs optax AdamW",
        "vs PyTorch",
        "JAX step",
        "vs PyTorch",
        "JAX steps in one call",
        "vs PyTorch",
        "JAX dispatch",
        "vs PyTorch",
    ]
    columns = {
        "torch/lopt_fast": ("torch/adamw_fused", "torch/adamw_foreach"),
        "jax/lopt_fast": ("jax/adamw", "torch/lopt_fast"),
        "jax/lopt_fast_step": ("torch/lopt_fast",),
        "jax/lopt_fast_loop": ("torch/lopt_fast",),
        "jax/dispatch": ("torch/lopt_fast",),
    }
    rows = []
    for result in record["results"]:
        found = {c["name"]: c for c in result["contenders"]}
        if not found or {name.partition("/")[2] for name in found} & FRAMEWORK_CODE:
            continue
        row = [result["workload"], str(result["width"]), result["statistics"]]
        for name, others in columns.items():
            row.append(seconds(found[name]["seconds"]["median"]) if name in found else "")
            row += [ratio(found[name]["ratios"].get(other)) if name in found else "" for other in others]
        rows.append(row)
    return table(header, rows)


def passes(record: Record) -> str:
    header = [
        "tensors",
        "width",
        "statistics",
        "pass",
        "time",
        "ns/param.",
        "bytes/param.",
        "GB/s",
        "of copy",
    ]
    rows = []
    for result in record["results"]:
        for p in result["passes"]:
            rate = p["gb_per_second"]
            rows.append(
                [
                    result["workload"],
                    str(result["width"]),
                    result["statistics"],
                    p["name"].replace("_", " "),
                    seconds(p["seconds"]["median"]),
                    digits(p["ns_per_parameter"]),
                    "" if rate is None else digits(p["bytes_per_parameter"]),
                    "" if rate is None else digits(rate),
                    "" if rate is None else f"{100 * p['share_of_copy']:.0f}%",
                ]
            )
    rates = [r["copy_gb_per_second"] for r in record["results"]] or [0.0]
    copy = f"Measured copy, by comparison: {digits(min(rates))} to {digits(max(rates))} GB/s."
    return f"{table(header, rows)}\n\n{copy}"


def memory(record: Record) -> str:
    """Increase of the resident set during a step, at each size, and its slope."""
    sizes = list(dict.fromkeys(label for r in record["results"] for label in r["increase_bytes"]))
    header = ["contender", "width", "statistics", *sizes, "bytes per parameter"]
    rows = [
        [
            r["name"],
            str(r["width"]),
            r["statistics"],
            *(f"{r['increase_bytes'][s] / 1e6:.1f} MB" if s in r["increase_bytes"] else "" for s in sizes),
            f"{r['temporary_bytes_per_parameter']:.2f}",
        ]
        for r in record["results"]
    ]
    return table(header, rows)


def gpu(record: Record) -> str:
    """One table for all sections of a GPU run, then what was asked for and what is missing."""
    header = [
        "section",
        "tensors",
        "width",
        "statistics",
        "contender",
        "time",
        "ns/param.",
        "GB/s",
        "of copy",
    ]
    header += ["vs AdamW fused", "vs", "error/tol."]
    rows = []
    (result,) = record["results"]
    for r in result["rows"]:
        others = [
            f"{name.removesuffix(' graph')}: {digits(value['median'])}"
            for name, value in r["ratios"].items()
            if not name.startswith("adamw_fused")
        ]
        others += [f"{digits(value)} {unit}" for unit, value in (r["per_second"] or {}).items()]
        adamw = next((v for name, v in r["ratios"].items() if name.startswith("adamw_fused")), None)
        share, error = r["share_of_copy"], r["error_over_tolerance"]
        rows.append(
            [
                r["section"],
                r["workload"],
                "" if r["width"] is None else str(r["width"]),
                r["statistics"] or "",
                r["contender"],
                seconds(r["seconds"]["median"]),
                digits(r["ns_per_parameter"])
                if r["ns_per_parameter"] >= 0.1
                else f"{r['ns_per_parameter']:.4f}",
                "" if r["gb_per_second"] is None else digits(r["gb_per_second"]),
                "" if share is None else f"{100 * share['median']:.0f}%",
                "" if adamw is None else digits(adamw["median"]),
                ", ".join(others),
                "" if error is None else f"{error:.2g}",
            ]
        )
    asked = [
        [
            f["name"],
            "not measured" if f["value"] is None else digits(f["value"]),
            f["limit"],
            {None: "", True: "met", False: "missed"}[f["met"]],
        ]
        for f in result["findings"]
    ]
    parts = [table(header, rows), table(["asked for", "measured", "limit", ""], asked)]
    missing = [f"- {s['section']}, {s['what']}: {s['reason']}" for s in result["skipped"]]
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    described = ", ".join(f"{key} {value}" for key, value in record["device"].items() if value is not None)
    return "\n\n".join([*parts, described])


def estimators(record: Record) -> str:
    """Variances of the meta-gradient at equal inner steps, relative to full ES; the bias relative to the gradient."""
    header = ["estimator", "truncation", "variance, one outer step", "variance, outer steps of an unroll"]
    header += ["bias", "noise to signal, one pair"]
    rows = []
    for r in record["results"]:
        signal, bias = r["signal"], r["bias"]
        known = signal > 0  # both are estimates, which noise can make negative
        shown = (
            ""
            if bias is None
            else f"{100 * (bias / signal) ** 0.5:.0f}%"
            if known and bias > 0
            else "not seen"
        )
        rows.append(
            [
                r["estimator"],
                str(r["truncation"]),
                *(
                    f"{digits(v['value'])} ± {digits(v['standard_error'])}"
                    for v in (r["outer_step_vs_full_es"], r["unroll_vs_full_es"])
                ),
                shown,
                digits(r["variances"][0] / signal) if known else "",
            ]
        )
    note = (
        "Variances at equal inner steps, relative to full ES, with standard errors. Bias: its norm relative to that of "
        "the gradient. Noise to signal: variance of one outer step over the squared norm of the gradient."
    )
    return f"{table(header, rows)}\n\n{note}"


def meta(record: Record) -> str:
    """Throughput of the meta-training loop by population and number of devices."""
    header = ["antithetic pairs", "devices", "inner steps/s", "outer step", "compilation"]
    rows = [
        [
            str(r["pairs"]), str(r["devices"]), f"{r['inner_steps_per_second']:,.0f}",
            seconds(r["outer_step"]["median"]), f"{r['compile_seconds']:.1f} s",
        ]
        for r in record["results"]
    ]  # fmt: skip
    note = (
        "MLP 64-32-10, batch 128, `small_fc_lopt` of width 4, PES. Both networks of a pair count. Compilation: from "
        "nothing to the end of the first outer step."
    )
    return f"{table(header, rows)}\n\n{note}"


def architectures(record: Record) -> str:
    """Times of steps, a row for each workload and architecture."""
    header = [
        "tensors",
        "architecture",
        "backend",
        "step",
        "ns/param.",
        "vs AdamW fused",
        "operations",
        "step / operations",
    ]
    rows = [
        [
            r["workload"],
            r["architecture"],
            r["backend"],
            seconds(r["step"]["median"]),
            digits(r["ns_per_parameter"]),
            ratio(r["vs_adamw"]),
            seconds(r["operations"]["median"]) if r["operations"] else "",
            ratio(r["vs_operations"]),
        ]
        for r in record["results"]
    ]
    return table(header, rows)


def scaling(record: Record) -> str:
    """Seconds of a step, and its share outside of operations; a table for each series, a row for each optimizer."""
    from .scaling import ADAMW, Model, adamw, panels, short

    rows = record["results"]
    found = {(row["architecture"], Model(row["width"], row["layers"])): row for row in rows}
    rival = adamw(rows)
    parts = []
    for title, unit, models in panels(record):
        header = ["optimizer"]
        header += [f"{m.width if unit == 'parameters' else m.layers} ({short(m.parameters)})" for m in models]
        lines = []
        for name in dict.fromkeys(row["architecture"] for row in rows):
            cells = []
            for model in models:
                row = found.get((name, model), {"skipped": ""})
                share = row.get("share_outside_operations")
                percent = "" if share is None else f" ({100 * share:.0f}%)"
                cells.append("" if "skipped" in row else seconds(row["step"]["median"]) + percent)
            lines.append([name, *cells])
        lines.append([ADAMW, *(seconds(rival[m]) if m in rival else "" for m in models)])
        parts.append(f"{title}:\n\n{table(header, lines)}")
    missing = [
        f"- {row['architecture']}, {Model(row['width'], row['layers']).label}: {row['skipped']}"
        for row in rows
        if "skipped" in row
    ]
    parts += ["Not measured:\n\n" + "\n".join(missing)] if missing else []
    parts.append(
        "In brackets: what is not spent in operations, but in the network over tensors, Python and PyTorch."
    )
    return "\n\n".join(parts)


def tradeoff(record: Record) -> str:
    """Loss, time and memory, a row for each optimizer, the smallest loss first."""
    header = [
        "optimizer",
        "mean loss / initial",
        "step",
        "ns/param.",
        "vs AdamW fused",
        "state",
        "temporary",
        "by",
    ]
    rows = [
        [
            r["optimizer"],
            f"{r['meta_loss']:.4f}",
            seconds(r["step"]["median"]),
            digits(r["ns_per_parameter"]),
            ratio(r["vs_adamw"]),
            f"{r['state_bytes_per_parameter']:.1f} B",
            f"{r['temporary_bytes_per_parameter']:.1f} B",
            r["backend"],
        ]
        for r in sorted(measured(record), key=lambda r: r["meta_loss"])
    ]
    missing = [f"- {r['optimizer']}: {r['skipped']}" for r in record["results"] if "skipped" in r]
    options = record["options"]
    note = (
        f"Mean training loss over initial loss, geometric mean over the tasks, {options['steps']} steps. Step on "
        f"{options['size']}; bytes per parameter of the state, and the most that a step allocates beside it."
    )
    parts = [table(header, rows), note]
    return "\n\n".join(parts + (["Not measured:\n\n" + "\n".join(missing)] if missing else []))


def measured(record: Record) -> list[Record]:
    """The results that are not there as skipped."""
    return [r for r in record["results"] if "skipped" not in r]


def render(record: Record) -> str:
    """The record's tables, then where they come from."""
    kind = record["benchmark"]
    if kind == "passes":
        body = passes(record)
    elif kind == "memory":
        body = memory(record)
    elif kind == "gpu":
        body = gpu(record)
    elif kind == "estimators":
        body = estimators(record)
    elif kind == "meta":
        body = meta(record)
    elif kind == "architectures":
        body = architectures(record)
    elif kind == "scaling":
        body = scaling(record)
    elif kind == "tradeoff":
        body = tradeoff(record)
    else:
        body = comparisons(record)
        if kind == "update":
            body = f"{summary(record)}\n\n{body}"
    return f"{body}\n\n{origin(record)}"
