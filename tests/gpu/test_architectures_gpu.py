"""Every architecture on a GPU, through CUDA and through Triton in PyTorch: tests/test_gpu_architectures.py on the
device, all published trajectories, and what needs a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests import test_gpu_architectures as emulated  # noqa: E402
from tests.helpers import repeated  # noqa: E402
from tests.operations_on_devices import (  # noqa: E402
    assert_follow,
    check_golden,
    make_optimizer,
    make_parameters,
    random_checkpoint,
    set_gradients,
    take_steps,
    target,
)
from tests.test_verify import public_files  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_the_device")
globals().update(repeated(emulated, but={"test_golden_files", "test_no_step_is_captured", "test_the_choice"}))


def cases() -> Iterator[Any]:
    """All of them through CUDA; with Triton, which takes seconds to compile each configuration, one of each kind."""
    few = (*emulated.ONE_OF_EACH, "adafac_h4_mini", "adafac_h32", "pylo_adafac_h32")
    for backend, names in (("cuda", ()), ("triton", few)):
        for path in public_files(*names):
            yield pytest.param(backend, *path.values, marks=path.marks, id=f"{backend}-{path.id}")


@pytest.mark.parametrize(("backend", "path"), [*cases()], indirect=["backend"])
def test_golden_files(path: Path) -> None:
    check_golden(path)


@pytest.mark.parametrize("name", ["celo", "nn_adam"])
def test_side_streams(name: str) -> None:
    """A step reads gradients that are still being computed on the stream that it is called on."""
    checkpoint, results = random_checkpoint(name), list[Any]()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            params = make_parameters()
            optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec))
            for t in range(3):
                set_gradients(params, t)
                torch.cuda._sleep(10_000_000)  # what follows on another stream would be too early
                for p in params:
                    p.grad.mul_(2.0)
                optimizer.step(loss=1.0)
        stream.synchronize()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_no_step_is_captured() -> None:
    """Neither the first one nor a later one; what was captured is not disturbed by the attempt."""
    checkpoint, params = random_checkpoint("celo"), make_parameters()
    optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec))
    for t in range(2):
        set_gradients(params, t)
        x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x += 1.0
            with pytest.raises(RuntimeError, match="a step of celo cannot be captured"):
                optimizer.step(loss=1.0)
        graph.replay()
        assert x.tolist() == [2.0] * 3
        optimizer.step(loss=1.0)


@pytest.mark.parametrize("name", ["celo", "rnn_fc_lopt"])
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: this needs two")
    checkpoint = random_checkpoint(name)
    params, expected = make_parameters(device="cuda:1"), make_parameters(torch.float64, "cpu")
    optimizer = make_optimizer(checkpoint, params, backend=target().asked(checkpoint.spec))
    assert optimizer.backends == {"cuda:1 float32": target().backend}
    take_steps(optimizer, params, range(3))
    take_steps(make_optimizer(checkpoint, expected, backend="reference"), expected, range(3))
    assert torch.cuda.current_device() == 0
    assert_follow(params, expected)
    elsewhere = make_parameters(device="cuda:0")
    with pytest.raises(ValueError, match="sees all parameters together"):
        make_optimizer(checkpoint, [*params[:2], *elsewhere[2:]])
