"""Table-shaped values that are computed only at the rows that are read."""

from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from sparse_embed._container import loosely
from sparse_embed._core import Axes, JaxprEqn, bind, is_float, trace_state
from sparse_embed._differentiate.tags import Path
from sparse_embed._views import Ids, Part, View, taken, view_of


class Place(NamedTuple):
    """Which rows of a value are asked for."""

    axes: Axes  # along which they run
    ids: Ids  # in range, `[n]` along each of these
    inside: Array | None = None  # which of them the read shows at all; `None`: all
    counted: Array | None = None  # which of these the gradient goes to; `None`: all
    path: Path = ()  # the views that were gone through


class Reading:
    """One read, on its way back to the leaves.

    Args:
      taps: by path and leaf.

    Attributes:
      found: where it arrived, by path and axes of the leaves.
    """

    def __init__(self, taps: dict[Any, Array]):
        self.taps = taps
        self.found: dict[tuple[Path, Axes], Place] = {}
        self.memo: dict[Any, Array] = {}


class Delayed:
    """A table-shaped value, kept as the operations that make it.

    Args:
      eqn: the last of them.
      operands: of which, and of ordinary arrays, it is made.
      out: which output of the equation it is.
      visit: tells the equation from itself in another call of the same function.
    """

    def __init__(self, eqn: JaxprEqn, operands: list[Any], out: int, visit: int):
        self.eqn, self.operands, self.out, self.visit = eqn, operands, out, visit
        self._made: tuple[Any, Array] | None = None  # the whole of it, and in which trace

    @cached_property
    def mixes(self) -> bool:
        """Whether it is made of ordinary arrays too, to which a derivative may go."""
        return any(map(mixes, self.operands))

    def whole(self) -> Array:
        if self._made is None or self._made[0] != trace_state():
            self._made = trace_state(), bind(self.eqn, whole(self.operands))[self.out]
        return self._made[1]

    def rows(self, place: Place, reading: Reading) -> Array:
        """Its rows `[n, *features]`, with the taps of its leaves added."""
        key = id(self), place.path, place.axes
        if key not in reading.memo:
            view = view_of(self.eqn, self.out, place.axes)
            if view is None:  # no derivative is asked for here, so it may be laid out
                reading.memo[key] = taken(self.whole(), place.axes, place.ids)
                return reading.memo[key]
            values = list(self.operands)
            inside: list[Array | None] = [None] * len(values)
            for part in view.parts:
                i = part.operand
                values[i], inside[i] = self._part(part, view, place, reading)
            reading.memo[key] = view.join(values, inside, place.ids)
        return reading.memo[key]

    def _part(
        self, part: Part, view: View, place: Place, reading: Reading
    ) -> tuple[Array, Array | None]:
        x, ids, there, path = self.operands[part.operand], place.ids, None, place.path
        counted, kept = place.counted, None
        if part.move is not None:
            extra = whole([self.operands[i] for i in view.extra])
            ids = tuple(map(_signed, ids))
            ids, there, *more = part.move(ids, *extra)
            kept = _both(*more)
            counted = _both(counted, kept)
            path = (*path, (self.visit, part.operand))
        if not isinstance(x, Delayed) or not part.axes:
            rows = taken(whole([x])[0], part.axes, ids)
        else:
            inside = _both(place.inside, there)
            rows = x.rows(Place(part.axes, ids, inside, counted, path), reading)
        if kept is not None and mixes(x):
            rows = without_gradient(rows, kept)
        return rows, there


def mixes(x: Any) -> bool:
    """Whether a derivative may go to an ordinary array from rows of it."""
    return x.mixes if isinstance(x, Delayed) else isinstance(x, Tracer) and is_float(x)


def without_gradient(rows: Array, kept: Array) -> Array:
    """`rows`, of which a gradient goes back only from those that are `kept`, `[n]`."""
    mask = kept.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(mask, rows, jax.lax.stop_gradient(rows))


def _signed(ids: Array) -> Array:
    """In-range ids, of a type with which they may be subtracted from."""
    wide = jnp.int64 if ids.dtype.itemsize == 8 else jnp.int32
    return (
        ids
        if jnp.issubdtype(ids.dtype, jnp.signedinteger) and ids.dtype.itemsize >= 4
        else ids.astype(wide)
    )


def _both(*masks: Array | None) -> Array | None:
    """Where all of them hold."""
    known = [mask for mask in masks if mask is not None]
    return reduce(jnp.logical_and, known) if known else None


class Leaf(Delayed):
    """A parameter leaf, where every chain of delayed operations ends."""

    def __init__(self, number: int, table: Array):
        self.number, self.table = number, table

    mixes = False

    def whole(self) -> Array:
        return self.table

    def rows(self, place: Place, reading: Reading) -> Array:
        key = self.number, place.path, place.axes
        if key not in reading.memo:
            reading.found[place.path, place.axes] = place
            rows = taken(self.table, place.axes, place.ids)
            if place.axes == (0,):
                rows = loosely(rows, place.ids[0])
            tap = reading.taps.get(key)
            reading.memo[key] = rows if tap is None else rows + tap
        return reading.memo[key]


def whole(values: Sequence[Any]) -> list[Any]:
    """`values` with the delayed ones computed."""
    return [v.whole() if isinstance(v, Delayed) else v for v in values]


def taken_apart(
    values: Sequence[Delayed],
) -> tuple[list[Array], Callable[[Sequence[Array]], list[Delayed]]]:
    """The arrays that delayed values are made of, and how to make them of other ones.

    A `shard_map` must be given the arrays it reads: closed over, they would be of another mesh.
    """
    arrays: list[Array] = []
    places: dict[int, int] = {}
    seen: set[int] = set()

    def take(x: Any) -> None:
        if isinstance(x, Leaf):
            x = x.table
        if isinstance(x, Delayed) and id(x) not in seen:
            seen.add(id(x))
            for operand in x.operands:
                take(operand)
        elif isinstance(x, Array) and id(x) not in places:
            places[id(x)] = len(arrays)
            arrays.append(x)

    for value in values:
        take(value)

    def rebuilt(new: Sequence[Array]) -> list[Delayed]:
        made: dict[int, Any] = {}

        def make(x: Any) -> Any:
            if isinstance(x, Leaf):
                return Leaf(x.number, new[places[id(x.table)]])
            if isinstance(x, Delayed):
                if id(x) not in made:
                    operands = [make(o) for o in x.operands]
                    made[id(x)] = Delayed(x.eqn, operands, x.out, x.visit)
                return made[id(x)]
            return new[places[id(x)]] if id(x) in places else x

        return [make(value) for value in values]

    return arrays, rebuilt
