"""Runs of a program on some rows that wait for reductions over all rows.

A reduction is known only after a pass over all rows. So the reductions of a program are listed
first; then each has a pass of its own, which stops there; and then nothing has to stop.
"""

from collections.abc import Container, Iterable, Sequence
from itertools import chain
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


class Flow:
    """Which equations of an open jaxpr make which of its values."""

    def __init__(self, jaxpr: Any):
        self._eqns = jaxpr.eqns
        self._maker = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}

    def needed(self, wanted: Iterable[Any], given: Container[Any] = ()) -> list[int]:
        """The equations on which the wanted values depend, in order, those `given` being known."""
        found: set[int] = set()
        left = list(wanted)
        while left:
            v = left.pop()
            if isinstance(v, Literal) or v in given or v not in self._maker:
                continue
            number = self._maker[v]
            if number not in found:
                found.add(number)
                left += self._eqns[number].invars
        return sorted(found)

    def used(self, wanted: Sequence[Any], given: Container[Any] = ()) -> set[Any]:
        """The wanted values, and all that the equations they need are made of."""
        operands = (self._eqns[number].invars for number in self.needed(wanted, given))
        return {v for v in chain(wanted, *operands) if not isinstance(v, Literal)}
