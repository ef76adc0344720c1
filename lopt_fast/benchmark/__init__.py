"""What `lopt-fast bench` measures. Contenders are built, verified against the reference, then timed in alternation.

`timing` alternates and summarises, `workloads` says on what, `contenders` builds what is timed, `records` says on
which machine and writes the JSON; one module for each subcommand (`update`, `passes`, `width`, `memory`, `peers`,
`estimators`, `gpu`, `architectures`, `scaling`, `tradeoff`) puts them together. `report` prints tables, `plotting` has
what plots share.
"""

from __future__ import annotations

from ..errors import UserError


class BenchmarkError(UserError, RuntimeError):
    """A benchmark that cannot be run, or a contender whose result is wrong; says which one and why."""
