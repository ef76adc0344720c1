"""Options of tasks, as they come from a configuration file, checked against what a constructor takes."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from .base import Task, TaskError


def at_least_one(**values: int) -> None:
    """Raises TaskError, naming the first value that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise TaskError(f"{name}={value}: must be at least 1")


def name_with(stem: str, task: Task, *options: str) -> str:
    """`stem` with those of the `options` of a dataclass `task` that are not at their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(task)}  # type: ignore[arg-type]
    values = {o: getattr(task, o) for o in options}
    return stem + "".join(f"_{o}{v}" for o, v in values.items() if v != defaults[o])


def check_options(kind: str, task_class: type[Task], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with lists as tuples. Raises TaskError for an unknown or missing one, or one of the wrong type.

    Types are checked where the constructor annotates a number, string, boolean, or a sequence of them.
    """
    parameters = inspect.signature(task_class).parameters
    known = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(task_class)
    for name, value in options.items():
        if name not in known and not takes_any:
            raise TaskError(f"task {kind!r} has no option {name!r}; known are {', '.join(known) or 'none'}")
        if name in hints and not _fits(value, hints[name]):
            raise TaskError(f"task {kind!r}: {name}={value!r} must be {_words(hints[name])}")
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in options]
    if missing:
        raise TaskError(f"task {kind!r} needs {', '.join(missing)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _hints(task_class: type[Task]) -> dict[str, Any]:
    """Types of the constructor's arguments; none where an annotation names what is not imported at run time."""
    try:
        return get_type_hints(task_class if dataclasses.is_dataclass(task_class) else task_class.__init__)
    except NameError:
        return {}


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if hint is int or hint is float:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if _is_sequence(hint):
        return isinstance(value, list | tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    return True


def _is_sequence(hint: Any) -> bool:
    return get_origin(hint) in (Sequence, tuple, list) and bool(get_args(hint))


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(h) for h in get_args(hint) if h is not type(None))
    if _is_sequence(hint):
        return f"a list, each item {_words(get_args(hint)[0])}"
    return _WORDS.get(hint, str(hint))
