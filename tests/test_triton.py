"""The Triton kernels without a GPU: in the interpreter against the reference, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")

from lopt_fast.benchmark import resources, triton_resources

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels/small_fc_lopt"
OTHERS = ("sm_80", "sm_100", "gfx942")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


FIRST_PART = "hard_shapes or tiles or strides or orders or lagged or clipping"


@pytest.mark.parametrize("chosen", [FIRST_PART, f"not ({FIRST_PART})"], ids=["first", "second"])
def test_in_the_interpreter(chosen: str) -> None:
    """tests/triton_interpreter.py, in a process where TRITON_INTERPRET is set before triton is imported."""
    done = run(
        *("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen),
        TESTS / "triton_interpreter.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert not re.search(r"\d+ skipped", done.stdout), done.stdout


def compiled(*arguments: str) -> resources.Rows:
    """The kernels of lopt_fast.benchmark.triton_resources, compiled and compared with the committed table."""
    rows = resources.of_triton(*arguments)
    table = resources.select(resources.read(KERNELS / "resources.json"), "triton")
    worse = resources.compare(rows, table, partial=True)
    assert not worse, "\n".join([*worse, f"{resources.ACCEPT} --backend triton"])
    return rows


def check(rows: resources.Rows) -> None:
    assert rows
    for name, row in rows.items():
        _, target, instance = name.split("/", 2)
        nvidia, kernel = target.startswith("sm_"), instance.partition(",")[0]
        assert row.spills == 0, f"{name} spills {row.spills}"
        assert 0 < row.registers <= (255 if nvidia else 256), name
        assert row.shared <= 48 * 1024, f"{name} takes {row.shared} bytes of shared memory"
        wide = kernel in ("square_sums", "factor_statistics", "feature_statistics", "apply")
        narrow_block = "gathered" in instance or re.search(r"width (8|16|32|64)|up to 32", instance)
        if wide and not narrow_block and nvidia and "bfloat16" not in instance:
            least = {"apply": 6, "feature_statistics": 6}.get(kernel, 1)
            assert row.vector_loads >= least, f"{name}: {row.vector_loads} vector loads"
        assert ("matmul" in instance) == (row.matrix > 0), name


@pytest.mark.parametrize("part", ["statistics", "apply"])
def test_every_kernel_compiles_without_spills(part: str) -> None:
    rows = compiled(part, ["sm_90"])
    check(rows)
    assert len(rows) >= 10


def test_main_kernels_compile_for_other_targets() -> None:
    """`lopt-fast bench resources --backend triton` compares all."""
    rows = compiled("main", OTHERS)
    check(rows)
    main = {", ".join(filter(None, instance)) for instance in triton_resources.MAIN}
    assert rows.keys() == {f"triton/{target}/{instance}" for target in OTHERS for instance in main}


def test_captured_steps_compile_nothing() -> None:
    """The driver forbids to load a kernel while a graph is captured: making a step loads all variants."""
    done = run(TESTS / "triton_launches.py", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = json.loads(done.stdout)
    names = run(
        "-c", "import json, lopt_fast.kernels.small_fc_lopt.triton as k; print(json.dumps([*k.KERNELS]))"
    )
    assert set(found["made"]) == set(json.loads(names.stdout))
    assert found["captured"] == []


def test_the_fields_of_records_count_for_the_cache() -> None:
    """Kernels that Triton has on disk from a version with another order of fields are compiled again."""
    code = """
import triton.language as tl, lopt_fast.kernels.common.triton as c, lopt_fast.kernels.small_fc_lopt.triton as k
for module in (c, k) if {change} else ():
    module._PLACES = tl.constexpr({{**module._PLACES.value, "x": 3, "batch1": 2}})
print(c.add_tiles.cache_key, k.apply.cache_key)
"""
    before, again, after = (run("-c", code.format(change=change)).stdout.split() for change in (0, 0, 1))
    assert len(before) == 2
    assert before == again
    assert not set(before) & set(after)


def test_kernels_import_neither_torch_nor_jax() -> None:
    code = (
        "import sys, lopt_fast.kernels.small_fc_lopt.triton;"
        "print([m for m in ('torch', 'jax') if m in sys.modules])"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_columns_are_those_of_the_other_kernels(root: Path) -> None:
    """The order of the features, and the columns that they show, in kernels/common/constants.h."""
    header = (root / "kernels/common/constants.h").read_text()
    code = (
        "import json, lopt_fast.kernels.small_fc_lopt.triton as k;"
        "print(json.dumps({n: getattr(k, n).value for n in dir(k) if n[:2] in ('F_', 'C_') or n in"
        " ('FEATURES', 'INPUTS', 'NORMALISED', 'TIMES')}))"
    )
    found = json.loads(run("-c", code).stdout)
    enumerators = {name: int(value) for name, value in re.findall(r"\b([fk]\w+) = (\d+)", header)}
    expected = {
        "F_P": "fP", "F_RSQRT_V": "fRsqrtV", "F_FAC_M": "fFacM", "F_DIAGONAL": "fDiagonal",
        "F_RSQRT_DIAGONAL": "fRsqrtDiagonal", "FEATURES": "kFeatures", "C_ROW": "kRow", "C_COLUMN": "kCol",
        "C_RSQRT_ROW": "kRsqrtRow", "C_RSQRT_COLUMN": "kRsqrtCol", "C_FAC_M": "kFacM", "NORMALISED": "kNormalised",
        "TIMES": "kTimeColumns",
    }  # fmt: skip
    enumerators |= {n: int(v) for n, v in re.findall(r"constexpr int (k\w+) = (\d+);", header)}
    assert {name: found[name] for name in expected} == {name: enumerators[e] for name, e in expected.items()}
    assert found["INPUTS"] == enumerators["kNormalised"] + enumerators["kTimeColumns"]


def test_it_says_why_it_cannot_be_used() -> None:
    import torch

    from lopt_fast.spec import Spec
    from lopt_fast.torch.triton import available, supports

    if not torch.cuda.is_available():
        assert "PyTorch finds no GPU" in (available() or "")
    assert supports(Spec(), "bfloat16", "float32", "bfloat16") is None
    assert "float64" in (supports(Spec(), "float64") or "")
    assert "hidden_size" in (supports(Spec(hidden_size=65), "float32") or "")
    assert "feature_set" in (supports(Spec(feature_set="m"), "float32") or "")
    assert "float16" in (supports(Spec(), "float32", state="float16") or "")
    assert "decays" in (supports(Spec(rms_decays=(0.9, 0.99, 0.999)), "float32") or "")


def test_importing_the_driver_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from lopt_fast.torch.triton import available; print(available())"
    done = run("-c", code)
    assert "triton cannot be imported" in done.stdout, done.stdout + done.stderr


def test_the_kernels_lie_in_the_package() -> None:
    assert importlib.util.find_spec("lopt_fast.kernels.small_fc_lopt.triton") is not None
