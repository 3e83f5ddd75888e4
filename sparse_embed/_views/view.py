"""A view: one equation, seen by the rows of its output.

A row of a sliced, padded, joined, reversed, transposed or reshaped table is a row of the table, a
row of another array, or a constant. So none of these is computed; when rows are read, the ids are
followed back to the table instead.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import Axes, JaxprEqn, as_block, bind_on_rows, rows_of

Ids = tuple[Array, ...]  # `[n]` for each of the axes along which rows run
# Ids in an operand, and which of them are there (`None`: all); perhaps also, to which of those that
# are the gradient goes.
Moved = tuple[Ids, Array | None] | tuple[Ids, Array | None, Array | None]


class Part(NamedTuple):
    """Rows of one operand that a view shows.

    Args:
      operand: its number.
      axes: the axes along which its rows run; none, where each row of the view has all of it.
      move: `ids of the view -> Moved`; `None` where they stay as they are.
    """

    operand: int
    axes: Axes
    move: Callable[..., Moved] | None = None


class View(NamedTuple):
    """An equation, seen by rows.

    Args:
      parts: what it shows.
      join: `(rows of each part, which are there, ids of the view) -> [n, *features]`.
      extra: operands that `move` is given besides the ids: those that hold indices.
    """

    parts: tuple[Part, ...]
    join: Callable[[list[Any], list[Array | None], Ids], Array]
    extra: tuple[int, ...] = ()

    @property
    def moves(self) -> bool:
        return any(part.move for part in self.parts)


def taken(x: Array, axes: Axes, ids: Ids) -> Array:
    """`[n, *features]`: the rows of an array at in-range ids along `axes`."""
    if not axes:
        return jnp.asarray(x)[None]
    if ids[0].shape == (1,):  # see `old_rows`
        return taken(x, axes, tuple(jnp.concatenate([i, i]) for i in ids))[:1]
    where: list[Any] = [slice(None)] * x.ndim
    for a, i in zip(axes, ids, strict=True):
        where[a] = i
    rows = jnp.asarray(x).at[tuple(where)].get(mode="promise_in_bounds")
    first, last = min(axes), max(axes)
    return jnp.moveaxis(rows, first, 0) if first and last - first == len(axes) - 1 else rows


def along(axes: Axes, axis: int, move: Callable[[Array], tuple[Array, Array | None]]) -> Callable:
    """Moves the ids along one axis."""

    def moved(ids: Ids) -> Moved:
        j = axes.index(axis)
        own, inside = move(ids[j])
        return (*ids[:j], own, *ids[j + 1 :]), inside

    return moved


def without(axes: Axes, dropped: Axes) -> Callable[[Ids], Moved]:
    """Leaves out the ids along some axes."""
    kept = [j for j, a in enumerate(axes) if a not in dropped]
    return lambda ids: (tuple(ids[j] for j in kept), None)


def select(rows: Sequence[Any], inside: Sequence[Array | None]) -> Array:
    """Of each row what the first part has that shows it; the last part shows all others."""

    def choose(below: Array, part: tuple[Array, Array]) -> Array:
        own, there = part
        return jnp.where(there.reshape(-1, *(1,) * (own.ndim - 1)), own, below)

    pairs = [(x, there) for x, there in zip(rows[:-1], inside[:-1], strict=True)]
    return reduce(choose, reversed(pairs), rows[-1])  # type: ignore[arg-type]


def on_features(eqn: JaxprEqn, axes: Axes, **neutral: Any) -> Callable[..., Array]:
    """What an equation does to features, once its rows are taken."""

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        ndim = eqn.outvars[0].aval.ndim
        blocks = [as_block(rows[0], ndim, axes), *rows[1:]]
        return rows_of(bind_on_rows(eqn, blocks, ids[0].shape[0], axes, **neutral)[0], axes)

    return join


def except_at(values: Sequence[Any], axes: Axes, neutral: Any) -> tuple[Any, ...]:
    """`values`, one for each axis, with a neutral one along `axes`."""
    return tuple(neutral if a in axes else x for a, x in enumerate(values))
