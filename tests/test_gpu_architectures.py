"""Whole optimizers with GPU kernels in PyTorch, by the emulator on CPU tensors: against the definitions in float64, and
their state on its way between devices.

tests/gpu/test_architectures_gpu.py repeats these tests on a GPU, tests/triton_operations_interpreter.py some of them
with Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from lopt_fast import backends  # noqa: E402
from lopt_fast.architectures.celo import Celo  # noqa: E402
from lopt_fast.architectures.sgdm import SgdM  # noqa: E402
from lopt_fast.backends import BackendError  # noqa: E402
from lopt_fast.torch import device, operations  # noqa: E402
from tests.helpers import needs_emulator  # noqa: E402
from tests.operations_on_devices import (  # noqa: E402
    EMULATOR,
    NAMES,
    check_golden,
    check_learned_optimizer,
    check_no_waiting,
    check_state_moves,
    make_optimizer,
    make_parameters,
    random_checkpoint,
    set_gradients,
    target,
)
from tests.test_verify import public_files  # noqa: E402

plain_ones_say_so = pytest.mark.filterwarnings("ignore:.*plain array code")

ONE_OF_EACH = (
    "celo2_full_routing", "celo_adam_real_short", "celo_real_short", "mlp_h8_l1", "nadamw_wd", "nnadam_decay",
    "rnn_valid", "velo_short",
)  # fmt: skip


@pytest.fixture
def on_the_device() -> Iterator[None]:
    with EMULATOR.in_use():
        yield


@needs_emulator
@pytest.mark.usefixtures("on_the_device")
def test_no_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first one nor a later one."""
    checkpoint, params = random_checkpoint("celo"), make_parameters()
    optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec))
    for t in range(2):
        set_gradients(params, t)
        before = [p.detach().clone() for p in params]
        with monkeypatch.context() as patch:
            patch.setattr(device, "capturing", lambda _: True)
            with pytest.raises(RuntimeError, match="a step of celo cannot be captured"):
                optimizer.step(loss=1.0)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        optimizer.step(loss=1.0)


@needs_emulator
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("name", NAMES)
@plain_ones_say_so
def test_learned_optimizer(name: str) -> None:
    check_learned_optimizer(name)


@needs_emulator
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("name", NAMES)
@plain_ones_say_so
def test_a_step_does_not_wait(name: str) -> None:
    check_no_waiting(name)


@needs_emulator
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt"])
def test_state_moves_between_devices(name: str) -> None:
    check_state_moves(name)


@needs_emulator
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("path", public_files(*ONE_OF_EACH))
def test_golden_files(path: Path) -> None:
    check_golden(path)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    celo = Celo()
    with pytest.raises(
        BackendError, match="'cuda' of celo cannot be used: it runs on cuda, these arrays are on cpu"
    ):
        operations.operations_backend(celo, "cpu", "float32", "cuda")
    with pytest.raises(BackendError, match="plain array code"):
        operations.operations_backend(SgdM(), "cuda", "float32", "cuda")
    there = {  # as on a machine with a GPU
        name: tuple(replace(b, missing=lambda ordinal: None) if b.name == "cuda" else b for b in found)
        for name, found in backends.OPERATIONS.items()
    }
    monkeypatch.setattr(backends, "OPERATIONS", there)
    assert operations.operations_backend(celo, "cuda", "bfloat16") == "cuda"
    for other, dtype, reason in [
        (celo, "float64", "not float64"),
        (replace(celo, hidden_size=33), "float32", "hidden_size 1 to 32"),
    ]:
        with pytest.raises(BackendError, match=reason):
            operations.operations_backend(other, "cuda", dtype, "cuda")
