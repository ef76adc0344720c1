"""Constructor arguments of published implementations as fields of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..spec import Hyperparameters, SpecError

A = TypeVar("A", bound=Hyperparameters)


def configured(kind: type[A], given: Mapping[str, Any], names: Mapping[str, str | None], **more: Any) -> A:
    """An architecture from constructor arguments `given`.

    names: argument -> field; None for one that has no influence on the result. more: fields found in another way.
    Raises SpecError, naming them, for arguments that are not in `names`.
    """
    if unknown := sorted(given.keys() - names.keys()):
        raise SpecError(
            f"{kind.NAME}: unknown hyperparameters {', '.join(unknown)}; known are {', '.join(names)}"
        )
    fields = {new: given[old] for old, new in names.items() if new is not None and old in given}
    return kind.from_dict({**fields, **more})
