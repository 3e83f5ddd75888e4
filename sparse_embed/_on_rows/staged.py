"""Runs of a program on some rows that wait for reductions over all rows.

A reduction is known only after a pass over all rows. So the reductions of a program are listed
first; then each has a pass of its own, which stops there; and then nothing has to stop.
"""

from collections.abc import Sequence
from typing import Any

from jax import Array

from sparse_embed._core import JaxprEqn, Literal
from sparse_embed._on_rows.engine import OnRows
from sparse_embed._on_rows.reductions import Reduction

Path = tuple[int, ...]  # which reduction of a program: ids of the calls it is in, and its own


class Reached(Exception):
    """Ends a run at the first reduction whose result is not known."""

    def __init__(self, block: Array):
        self.block = block


class Stopping(OnRows):
    """An engine that knows the results of some reductions."""

    def __init__(self, *args: Any, known: dict[Path, Array]):
        super().__init__(*args)
        self.known = known

    def reduce(self, path: Path, reduction: Reduction, block: Array) -> Array:
        if path in self.known:
            return self.known[path]
        raise Reached(block)


class Listing(OnRows):
    """An engine that notes the reductions it meets."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.found: dict[Path, Reduction] = {}
        self.maybe = False  # whether one is inside a branch

    def reduce(self, path: Path, reduction: Reduction, block: Array) -> Array:
        self.found[path] = reduction
        return reduction.start()

    def _cond(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        before = len(self.found)
        outs = super()._cond(eqn, values)
        self.maybe |= len(self.found) > before
        return outs


def needed(jaxpr: Any, wanted: Sequence[Any], stop: Sequence[Any] = ()) -> list[bool]:
    """The equations of an open jaxpr on which the wanted values depend, those at `stop` given."""
    found, only = {v for v in wanted if not isinstance(v, Literal)}, [False] * len(jaxpr.eqns)
    given = set(stop)
    for number in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[number]
        if any(v in found and v not in given for v in eqn.outvars):
            only[number] = True
            found.update(v for v in eqn.invars if not isinstance(v, Literal))
    return only
