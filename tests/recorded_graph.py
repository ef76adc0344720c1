"""What a CUDA graph does to a `TritonStep`, on the CPU: what is enqueued while it is captured runs at a replay only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from lopt_fast.torch import device
from lopt_fast.torch.triton import TritonStep


class RecordedGraph:
    """Launches, and writes of PyTorch's operations, with the arguments of their time."""

    def __init__(self) -> None:
        self._work: list[Callable[[], Any]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        launch = TritonStep._launch

        def record(step: Any, kernel: str, layout: Any, *arguments: Any) -> None:
            assert (kernel, layout) in step._instances, (
                f"{kernel} would be compiled and loaded in the capture"
            )
            self._work.append(lambda: launch(step, kernel, layout, *arguments))

        with (
            mock.patch.object(device, "capturing", return_value=True),
            mock.patch.object(TritonStep, "_launch", record),
            _Operations(self._work),
        ):
            yield

    def replay(self) -> None:
        for run in self._work:
            run()


class _Operations(TorchDispatchMode):
    """Records writes; lets the host allocate and take views."""

    def __init__(self, work: list[Callable[[], Any]]) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._work.append(lambda: func(*args, **kwargs))
            return args[0]
        if "empty" in func._schema.name:
            found = func(*args, **kwargs)
            return found.fill_(float("nan")) if found.is_floating_point() else found.fill_(0)
        assert any(a.alias_info for a in func._schema.arguments), f"{func}: a graph would not have its result"
        return func(*args, **kwargs)
