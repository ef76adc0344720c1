"""What compiled GPU kernels take: registers, spills, shared memory, vector loads, tensor-core instructions.

Read from the binaries, so no GPU is needed, and compared with a committed table, so that a change of the code or
of the compiler that costs speed shows. `lopt-fast bench resources` prints and compares, `--update` accepts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from ..files import write_atomically
from . import BenchmarkError
from .report import table as markdown

Backend = Literal["cuda", "triton"]
BACKENDS: tuple[Backend, ...] = ("cuda", "triton")

REGISTER_TOLERANCE = 16
"""Registers of a thread that a kernel may take more or less than the table says: compilers' versions differ."""


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture, or (CUDA) one function that a kernel calls.

    `registers` of a thread and `shared` bytes of a block (static; Triton: all) count for a kernel with all that it
    calls, and are 0 for the functions. `spills`: instructions that access local memory (Triton: bytes of stack; AMD:
    spilled registers); `spills_in_loops`: those that a loop repeats, the loop over work items not counted.
    `vector_loads`: global loads of 16 bytes a thread. `row_loads`: those of them at an address without an offset, in
    the innermost loop that has any: the streams of a kernel that walks down rows. Loads beside them (places of an axis,
    biases) have an offset or lie in an outer loop. `matrix`: tensor-core (AMD: matrix-core) instructions.
    """

    registers: int
    shared: int
    spills: int
    spills_in_loops: int
    vector_loads: int
    row_loads: int
    matrix: int
    instructions: int


Rows = Mapping[str, Resources]
"""By name: cuda/sm_90/kernel<4>, cuda/sm_90/kernel<4>/function<...>, triton/gfx942/apply, width 4."""


def default_table() -> Path:
    """kernels/small_fc_lopt/resources.json of this checkout or installation."""
    folder = Path(__file__).resolve().parents[1]
    inside = folder / "kernels/small_fc_lopt/resources.json"
    return inside if inside.exists() else folder.parent / "kernels/small_fc_lopt/resources.json"


# ---- tools ----


def find_tool(name: str) -> Path:
    """`cuobjdump` or `nvdisasm`: in PATH, or the ones that the triton package brings along."""
    if found := shutil.which(name):
        return Path(found)
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        tool = Path(folder) / "backends/nvidia/bin" / name
        if os.access(tool, os.X_OK):
            return tool
    raise BenchmarkError(f"{name} is not in PATH: install the CUDA toolkit, or `pip install triton`")


def _run(tool: str, *arguments: str, folder: Path | None = None) -> str:
    command = [str(find_tool(tool)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


# ---- CUDA ----


def cuda_module() -> Path:
    """The shared library of `lopt_fast._cuda`, which is not imported."""
    spec = importlib.util.find_spec("lopt_fast._cuda")
    if spec is None or not spec.origin:
        raise BenchmarkError(
            "lopt_fast._cuda was not built: reinstall with the CUDA compiler nvcc in PATH (LOPT_CUDA=ON makes a "
            "missing one an error)"
        )
    return Path(spec.origin)


def of_binary(binary: Path) -> dict[str, Resources]:
    """All kernels in a shared library, object file or cubin."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if binary.suffix == ".cubin":
            cubins = [binary.resolve()]
        else:
            _run("cuobjdump", "-xelf", "all", str(binary.resolve()), folder=folder)
            cubins = sorted(folder.glob("*.cubin"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(of_cubin, cubins))
    rows: dict[str, Resources] = {}
    for part in parts:
        for row, found in part.items():
            if row in rows:
                raise BenchmarkError(f"{binary}: two kernels are called {row}; give them different names")
            rows[row] = found
    if not rows:
        raise BenchmarkError(f"{binary} holds no CUDA kernels")
    return dict(sorted(rows.items()))


def of_cubin(cubin: Path) -> dict[str, Resources]:
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    if "Function " not in usage:
        return {}  # a file of the linker, without kernels
    return parse(usage, _run("nvdisasm", "-c", str(cubin)))


def parse(usage: str, assembly: str) -> dict[str, Resources]:
    """From what `cuobjdump -res-usage` and `nvdisasm -c` print of one cubin."""
    kernels = {
        m["name"]: (int(m["registers"]), int(m["shared"]))
        for m in re.finditer(
            r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:\d+ SHARED:(?P<shared>\d+)", usage
        )
    }
    target = re.search(r"^\s*\.target\s+(sm_\d+a?)|EF_CUDA_SM(\d+)", assembly, re.MULTILINE)
    if target is None or len(kernels) != usage.count("Function "):
        raise BenchmarkError(
            "the output of cuobjdump or nvdisasm is not as expected: a new version of the tools?"
        )
    architecture = target[1] or f"sm_{target[2]}"
    rows: dict[str, Resources] = {}
    for kernel, function, instructions in _functions(assembly):
        if kernel not in kernels:
            continue
        name = f"cuda/{architecture}/{readable(kernel)}"
        entry = function == kernel
        if not entry:
            if function.startswith("$__internal"):  # arithmetic of the compiler's library
                continue
            name += f"/{readable(function)}"
        if name in rows:
            raise BenchmarkError(f"two functions are called {name}: {function}")
        registers, shared = kernels[kernel] if entry else (0, 0)
        rows[name] = Resources(registers, shared, *_count(instructions, entry))
    missing = {readable(k) for k in kernels} - {n.split("/")[2] for n in rows}
    if missing:
        raise BenchmarkError(f"nvdisasm shows no code of {', '.join(sorted(missing))}")
    return rows


@dataclass(frozen=True)
class _Instruction:
    address: int
    text: str


def _functions(assembly: str) -> Iterator[tuple[str, str, list[_Instruction | str]]]:
    """(kernel, function, instructions and labels between them) of each function in a disassembly."""
    kernel, kernel_of, function = "", "", ""
    body: list[_Instruction | str] = []
    for line in assembly.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^\s,]+)", line):
            kernel = match[1]
        elif match := re.match(r"\s*\.type\s+(\S+),@function", line):
            if body:
                yield kernel_of, function, body
            kernel_of, function, body = kernel, match[1].removeprefix(f"${kernel}$"), []
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            body.append(_Instruction(int(match[1], 16), match[2].strip()))
        elif match := re.match(r"(\.L_x_\d+):", line):
            body.append(match[1])
    if body:
        yield kernel_of, function, body


def _count(body: Sequence[_Instruction | str], entry: bool) -> tuple[int, int, int, int, int, int]:
    instructions, labels = _labelled(body)

    def matching(pattern: str) -> list[_Instruction]:
        found = re.compile(pattern)
        return [i for i in instructions if found.search(i.text)]

    spills = matching(r"\b(LDL|STL)\b")
    loads = matching(r"\bLDG?\.E\.(?:\w+\.)*128\b")
    loops = _loops(instructions, labels) if spills or loads else []
    if entry:  # not the loop over work items, which calls the functions
        calls = {i.address for i in matching(r"\bCALL\b.*`\(\$(?!__internal)")}
        loops = [loop for loop in loops if not loop & calls]

    def depth(instruction: _Instruction) -> int:
        return sum(instruction.address in loop for loop in loops)

    streams = [depth(i) for i in loads if not re.search(r"\+-?0x", i.text)]
    return (
        len(spills),
        sum(depth(i) > 0 for i in spills),
        len(loads),
        streams.count(max(streams)) if any(streams) else 0,
        len(matching(r"\b(HMMA|IMMA|QMMA|HGMMA|UTCHMMA)\b")),
        len(instructions),
    )


def _labelled(body: Sequence[_Instruction | str]) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions without padding, and the place among them that each label stands for."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for item in body:
        if isinstance(item, str):
            labels[item] = len(instructions)
        elif not item.text.startswith("NOP"):
            instructions.append(item)
    return instructions, labels


def _loops(instructions: Sequence[_Instruction], labels: Mapping[str, int]) -> list[set[int]]:
    """Addresses of the instructions of each natural loop (Aho et al., Compilers, section 9.6): a branch to what
    dominates it, and all that leads to the branch. Branches back from code that was moved away are none.
    """
    jumps = {}  # (targets, whether what follows may be next), by place
    for place, instruction in enumerate(instructions):
        targets = [labels[t] for t in re.findall(r"\.L_x_\d+", instruction.text) if t in labels]
        # The next instruction is not reached from a branch without a guard. Labels of BSSY are no targets: threads meet
        # again there.
        ends = re.match(r"BRA(\.\w+)* `|(BRX|JMP|EXIT|RET)\b", instruction.text)
        if ends or (targets and not instruction.text.startswith("BSSY")):
            jumps[place] = targets, ends is None
    begins = sorted({0, *(place + 1 for place in jumps), *labels.values()} & set(range(len(instructions))))
    block_of = {place: block for block, place in enumerate(begins)}
    behind = [*begins[1:], len(instructions)]
    after: list[list[int]] = []  # blocks that may follow each block
    for block, end in enumerate(behind):
        targets, falls = jumps.get(end - 1, ([], True))
        after.append([block_of[t] for t in targets if t in block_of])
        if falls and end in block_of:
            after[block].append(block_of[end])
    before: list[list[int]] = [[] for _ in begins]
    for block, following in enumerate(after):
        for target in following:
            before[target].append(block)

    order = _postorder(after)
    rank = {block: i for i, block in enumerate(order)}
    dominator = {0: 0}  # the nearest one (Cooper, Harvey, Kennedy: A simple, fast dominance algorithm, 2001)

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] < rank[b]:
                a = dominator[a]
            while rank[b] < rank[a]:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [other for other in before[block] if other in dominator]
            nearest = known[0]
            for other in known[1:]:
                nearest = common(nearest, other)
            if dominator.get(block) != nearest:
                dominator[block], changed = nearest, True

    loops: dict[int, set[int]] = {}  # blocks of each, by the first
    for block in order:
        for target in after[block]:
            if common(block, target) == target:
                members, waiting = loops.setdefault(target, {target}), [block]
                while waiting:
                    if (member := waiting.pop()) not in members:
                        members.add(member)
                        waiting += [m for m in before[member] if m in rank]
    return [
        {i.address for block in members for i in instructions[begins[block] : behind[block]]}
        for members in loops.values()
    ]


def _postorder(after: Sequence[Sequence[int]]) -> list[int]:
    """Blocks that can be reached from the first, each behind those that follow it: the first one comes last."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(after[0]))] if after else []
    while stack:
        place, rest = stack[-1]
        for target in rest:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(after[target])))
                break
        else:
            order.append(place)
            stack.pop()
    return order


def readable(symbol: str) -> str:
    """Name and template arguments of a mangled function, without namespaces and types of its arguments:
    `items_kernel<4, false>`. What cannot be read stays as it is.

    With the namespaces goes what the compiler puts in for the file of an anonymous one, which changes with its path.
    """
    try:
        return _name(symbol, 2)[0] if symbol.startswith("_Z") else symbol
    except (IndexError, ValueError):
        return symbol


def _name(s: str, at: int) -> tuple[str, int]:
    """The last part of a name (Itanium C++ ABI, section 5.1) at `at`, and where it ends."""
    nested = s[at] == "N"
    at += nested
    name = ""
    while True:
        if s[at].isdigit():
            digits = re.compile(r"\d+").match(s, at)
            assert digits is not None
            at = digits.end() + int(digits[0])
            if at > len(s):
                raise ValueError(s)
            name = s[digits.end() : at]
        elif s[at] == "S":  # a name that was there before; only namespaces are wanted to be
            at = s.index("_", at) + 1
        elif s[at] == "I":
            arguments, at = _arguments(s, at + 1)
            name += f"<{', '.join(arguments)}>"
        elif nested and s[at] == "E":
            return name, at + 1
        else:
            raise ValueError(s)
        if not nested and (at == len(s) or s[at] != "I"):
            return name, at


def _arguments(s: str, at: int) -> tuple[list[str], int]:
    found = []
    while s[at] != "E":
        if s[at] == "L":
            kind, at = (s[at + 1], at + 2) if s[at + 1].islower() else _name(s, at + 1)
            end = s.index("E", at)
            value, at = s[at:end].replace("n", "-"), end + 1
            found.append(("false", "true")[int(value)] if kind == "b" else value)
        elif s[at].islower():  # a type of the language
            found.append(s[at])
            at += 1
        else:
            name, at = _name(s, at)
            found.append(name)
    return found, at + 1


# ---- Triton ----


def of_triton(only: str | None = None, targets: Sequence[str] = ()) -> dict[str, Resources]:
    """The Triton kernels of small_fc_lopt, compiled ahead of time by triton_resources.py, in a process of its own.

    `only`: "apply", "statistics" (all others) or "main" (a few). `targets`: all that it knows, if none is given.
    """
    return _compiled("triton_resources", [only] if only else [], targets)


def of_triton_operations(only: Sequence[str] = (), targets: Sequence[str] = ()) -> dict[str, Resources]:
    """Those of the other operations, by triton_operations_resources.py; `only`: names of instances."""
    return _compiled("triton_operations_resources", only, targets)


def _compiled(module: str, only: Sequence[str], targets: Sequence[str]) -> dict[str, Resources]:
    if importlib.util.find_spec("triton") is None:
        raise BenchmarkError("triton is not installed: pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "resources.json"
        command = [sys.executable, "-m", f"lopt_fast.benchmark.{module}", "--json", str(out)]
        for name in only:
            command += ["--only", name]
        for target in targets:
            command += ["--target", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        found = json.loads(out.read_text())
    return {
        f"triton/{r['target']}/{', '.join(filter(None, (r['kernel'], r['instance'])))}": Resources(
            registers=r["registers"],
            shared=r["shared"],
            spills=r["spills"],
            spills_in_loops=0,
            vector_loads=r["vector_loads"],
            row_loads=0,
            matrix=r["matrix_instructions"],
            instructions=0,
        )
        for r in found
    }


# ---- the table ----


def read(file: Path) -> dict[str, Resources]:
    try:
        rows = json.loads(file.read_text())["kernels"]
        return {name: Resources(**row) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{file} cannot be read as a table of resources: {error!r}") from error


def write(file: Path, rows: Rows) -> None:
    """One line for each kernel, in order, so that a change shows line by line."""
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(rows[name]))}" for name in sorted(rows)]
    write_atomically(file, ('{"kernels": {\n' + ",\n".join(lines) + "\n}}\n").encode())


def select(rows: Rows, backend: Backend) -> dict[str, Resources]:
    return {name: row for name, row in rows.items() if name.startswith(f"{backend}/")}


def architecture(name: str) -> str:
    """Of a row: cuda/sm_90, triton/gfx942."""
    return "/".join(name.split("/")[:2])


def architectures(rows: Rows) -> set[str]:
    return {architecture(name) for name in rows}


def compare(found: Rows, expected: Rows, *, partial: bool = False) -> list[str]:
    """What is worse than the table, or not in it, one line each; empty: nothing.

    Architectures for which nothing is built are not compared. `partial`: `found` is a part of the kernels, so that
    nothing is missing.
    """
    complaints = []
    for name in sorted(found):
        if name not in expected:
            complaints.append(f"{name}: not in the table")
            continue
        new, old = found[name], expected[name]
        if abs(new.registers - old.registers) > REGISTER_TOLERANCE:
            complaints.append(f"{name}: {new.registers} registers, {old.registers} in the table")
        if new.spills_in_loops > old.spills_in_loops:
            complaints.append(
                f"{name}: {new.spills_in_loops} spills in loops, {old.spills_in_loops} in the table"
            )
        elif new.spills > old.spills:
            complaints.append(f"{name}: {new.spills} spills, {old.spills} in the table")
        if new.shared > old.shared:
            complaints.append(f"{name}: {new.shared} bytes of shared memory, {old.shared} in the table")
        if new.vector_loads < old.vector_loads:
            complaints.append(
                f"{name}: {new.vector_loads} loads of 16 bytes, {old.vector_loads} in the table"
            )
        if new.row_loads < old.row_loads:
            complaints.append(
                f"{name}: {new.row_loads} loads of 16 bytes for each row, {old.row_loads} in the table"
            )
        # Unrolling differs from version to version; half of them gone is a lost fast path.
        if 2 * new.matrix < old.matrix:
            complaints.append(f"{name}: {new.matrix} tensor-core instructions, {old.matrix} in the table")
    if not partial:
        built = architectures(found)
        missing = sorted(name for name in expected if name not in found and architecture(name) in built)
        complaints += [f"{name}: in the table, but not built" for name in missing]
    return complaints


ACCEPT = "To accept what is built now: lopt-fast bench resources --update"


def render(rows: Rows, *, kernels_only: bool = False) -> str:
    """Markdown. `kernels_only` adds what a kernel calls to its own row."""
    names = [f.name for f in fields(Resources)]
    total: dict[str, dict[str, int]] = {}
    for name in sorted(rows):
        key = "/".join(name.split("/")[:3]) if kernels_only else name
        sums = total.setdefault(key, dict.fromkeys(names, 0))
        for field in names:
            sums[field] += getattr(rows[name], field)
    header = ["kernel", *(n.replace("_", " ") for n in names)]
    return markdown(header, [[key, *(str(v) for v in sums.values())] for key, sums in total.items()])


SMALL_FC_KERNELS = ("items_kernel", "matmul_kernel", "other_kernel", "part_kernel")
"""CUDA kernels of small_fc_lopt: what their names begin with."""


def render_operations(rows: Rows) -> str:
    """Markdown: registers of the CUDA kernels of the operations but small_fc_lopt, for each architecture."""
    registers: dict[str, dict[str, str]] = {}
    for name, row in select(rows, "cuda").items():
        _, target, kernel, *function = name.split("/")
        if not function and not kernel.startswith(SMALL_FC_KERNELS):
            registers.setdefault(kernel, {})[target] = str(row.registers)
    targets = sorted({target for found in registers.values() for target in found}, key=lambda t: int(t[3:]))
    body = [
        [f"`{kernel}`", *(found.get(t, "") for t in targets)] for kernel, found in sorted(registers.items())
    ]
    return markdown(["kernel", *targets], body)


def measure(backend: Backend, binary: Path | None = None) -> dict[str, Resources]:
    """Resources of everything that is built for a backend here. Raises `BenchmarkError` with the reason if nothing."""
    if backend == "triton":
        return of_triton() | of_triton_operations()
    return of_binary(binary or cuda_module())
