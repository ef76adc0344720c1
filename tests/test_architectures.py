"""Architectures in float64 against trajectories of the published implementations."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest


@pytest.mark.parametrize("path", golden.files("celo"))
def test_celo(path: Path) -> None:
    assert golden.largest_error(path) <= 1e-9
