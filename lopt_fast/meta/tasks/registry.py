"""Tasks by name: the built-in kinds, and classes of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .autoencoder import Autoencoder
from .base import Reparametrisation, Task, TaskError
from .conv import Conv
from .images import ImageTask
from .lstm import LSTM
from .mlp import MLP
from .options import check_options
from .quadratic import Quadratic
from .text import TextTask
from .transformer import Transformer

KINDS: dict[str, type[Task]] = {
    "mlp": MLP,
    "conv": Conv,
    "autoencoder": Autoencoder,
    "lstm": LSTM,
    "transformer": Transformer,
    "quadratic": Quadratic,
}


def make(
    kind: str,
    options: Mapping[str, Any],
    sources: Mapping[str, Path],
    reparametrisation: Reparametrisation | None = None,
) -> Task:
    """The task that a [[task]] table describes.

    kind: a name in `KINDS`, or a class of the user's own: "package.module:Class" or "path/to/file.py:Class".
    options: the constructor's arguments; `datasets` of tasks on images and text are names.
    sources: where the files of data sets are, by name.

    Raises TaskError for an unknown kind or option or one of the wrong type, DataError for missing files.
    """
    task_class = KINDS[kind] if kind in KINDS else _find_class(kind)
    options = dict(options)
    if issubclass(task_class, ImageTask | TextTask):
        names = options.setdefault("datasets", task_class.default_datasets)
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise TaskError(f"task {kind!r}: datasets={names!r} must be a list of names")
        options = check_options(kind, task_class, options)
        options["datasets"] = [task_class.load(name, sources) for name in names]
    else:
        options = check_options(kind, task_class, options)
    try:
        task = task_class(**options)
    except TaskError as error:
        raise TaskError(f"task {kind!r}: {error}") from error
    for name in ("name", "variants", "initial_loss"):
        if not hasattr(task, name):
            raise TaskError(f"task {kind!r}: the constructor must set self.{name}")
    if reparametrisation is not None:
        task.reparametrisation = reparametrisation
    return task


def _find_class(kind: str) -> type[Task]:
    where, colon, name = kind.rpartition(":")
    if not colon or not where or not name:
        raise TaskError(
            f"task kind {kind!r}: must be one of {', '.join(KINDS)}, or a class of yours as "
            "package.module:Class or path/to/file.py:Class"
        )
    module = _run_file(kind, Path(where)) if where.endswith(".py") else _import(kind, where)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TaskError(
            f"task kind {kind!r}: {where} has no class {name} that derives from lopt_fast.meta.tasks.Task"
        )
    return found


def _import(kind: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TaskError(f"task kind {kind!r}: cannot import {module}: {error}") from error


def _run_file(kind: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise TaskError(f"task kind {kind!r}: no file {path}")
    name = f"lopt_fast_task_{path}"  # one module for each file, however often it is asked for
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
