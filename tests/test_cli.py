"""`lopt-fast`: help of every command, `info`, the entry point."""

from __future__ import annotations

import json
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
        (ImportError("no jax"), "error: pip install 'lopt_fast[meta]' is needed: no jax\n"),
    ):
        with pytest.raises(typer.Exit) as end, terminal.errors(extra="meta"):
            raise error
        assert end.value.exit_code == 2
        assert capsys.readouterr().err == message
    for bug in (ValueError("a bug"), ImportError("a bug")):
        with pytest.raises(type(bug), match="a bug"), terminal.errors():
            raise bug


def test_json_that_cannot_be_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "error:" in result.output
