"""`lopt-fast`: help of every command, `info`, the entry point."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import lopt_fast
from lopt_fast import backends, terminal
from lopt_fast.cli import app
from lopt_fast.data import DataError
from lopt_fast.errors import install
from lopt_fast.training.problems import make, task_name


@pytest.mark.parametrize(
    "command", [[], ["info"], ["verify"], ["train"], ["bench"], ["meta-train"], ["eval"], ["bench", "meta"]]
)
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_info(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", "--json", str(tmp_path / "info.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["versions"]["lopt_fast"] == lopt_fast.__version__
    assert found["versions"]["numpy"] == np.__version__
    output = " ".join(result.output.split())
    assert found["instruction_set"][:40] in output
    assert {row["backend"] for row in found["backends"]} == {"cuda", "triton", "cpu", "reference"}
    for row in found["backends"]:
        assert (row["reason"] or "available")[:20] in output
    assert len(found["checkpoints"]) == len(lopt_fast.names())
    for name in lopt_fast.names():
        assert name in output


def test_info_without_the_compiled_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_native", lambda: (None, "it was not built here"))
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert "none: it was not built here" in " ".join(result.output.split())


def test_info_imports_no_framework() -> None:
    code = "import sys, lopt_fast.cli as c; c._info(); print(sorted({'torch', 'jax', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['torch']" if backends._has_gpu_driver() else "[]")


def test_unknown_command() -> None:
    assert CliRunner().invoke(app, ["fly"]).exit_code == 2


def test_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lopt_fast.cli", "verify", "nowhere.npz"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nowhere.npz: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_user_can_put_right_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """And bugs keep their tracebacks."""
    for error, message in (
        (lopt_fast.SpecError("width=1: must be 2"), "error: width=1: must be 2\n"),
        (FileNotFoundError("no such file"), "error: no such file\n"),
        (ImportError("no jax"), f"error: no jax: {install('meta')}\n"),
    ):
        with pytest.raises(typer.Exit) as end, terminal.errors(extra="meta"):
            raise error
        assert end.value.exit_code == 2
        assert capsys.readouterr().err == message
    for bug in (ValueError("a bug"), ImportError("a bug")):
        with pytest.raises(type(bug), match="a bug"), terminal.errors():
            raise bug


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_framework_that_is_missing_is_explained(framework: str) -> None:
    code = f"import sys; sys.modules[{framework!r}] = None; import lopt_fast.{framework}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: lopt_fast.{framework} needs "), done.stderr
    assert last.endswith(install(framework)), done.stderr


def test_messages_install_from_the_source_folder(root: Path) -> None:
    """Not from a package index, where the name may be somebody else's."""
    text = {path: path.read_text(encoding="utf-8") for path in (root / "lopt_fast").rglob("*.py")}
    assert len(text) > 50
    assert not [path for path, code in text.items() if re.search(r"lopt[-_]fast\[|pip install '?lopt", code)]


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion_mnist"])
def test_names_of_tasks_in_both_spellings(tmp_path: Path, name: str) -> None:
    assert task_name(name) == "fashion-mnist"
    with pytest.raises(DataError, match=r"empty"):  # and not: unknown name
        make(name, tmp_path / "empty")


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion_mnist"])
def test_names_of_data_sets_of_meta_training(tmp_path: Path, name: str) -> None:
    pytest.importorskip("jax")
    from lopt_fast.meta.tasks.sources import load_images

    for given in ("fashion-mnist", "fashion_mnist"):
        with pytest.raises(DataError, match=r"empty"):
            load_images(name, {given: tmp_path / "empty"})
    with pytest.raises(DataError, match=r"say where its files are"):
        load_images(name, {"mnist": tmp_path / "empty"})


def test_help_names_every_optimizer() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    for name in (*lopt_fast.names(), "adamw", "sgdm", "nadamw", "adafactor"):
        assert name in result.output


def test_json_that_cannot_be_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "error:" in result.output
