"""Views whose rows are numbered by other axes than those of their operands."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import Axes, JaxprEqn, operand_axes
from sparse_embed._views.view import Ids, Moved, Part, View, select, without


def broadcast_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """One that repeats rows: an axis that the operand lacks, or has one entry of."""
    dims, old = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
    new = eqn.params["shape"]
    own = [(d, b) for b, d in enumerate(dims) if d in axes and old[b] == new[d]]
    if not old or len(own) == len(axes):
        return None
    of_axis = dict(own)
    kept = tuple(of_axis[a] for a in axes if a in of_axis)
    dropped = tuple(a for a in axes if a not in of_axis)
    features = [a for a in range(len(new)) if a not in axes]
    left = [b for b in range(len(old)) if b not in kept]

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        x, n = rows[0], ids[0].shape[0]
        ones = [1 + j for j, b in enumerate(left) if dims[b] in axes]  # repeated along rows
        x = jnp.squeeze(x, ones) if ones else x
        to = [1 + features.index(dims[b]) for b in left if dims[b] not in axes]
        shape = (x.shape[0], *(new[a] for a in features))
        spread = jnp.broadcast_to(jnp.expand_dims(x, _missing(to, len(shape))), shape)
        return jnp.broadcast_to(spread, (n, *shape[1:]))

    return View((Part(0, kept, without(axes, dropped)),), join)


def _missing(to: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, ndim) if d not in to)


def squeeze_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """One member of a stack: the axis in front of its rows numbers them too."""
    dims, ndim = eqn.params["dimensions"], eqn.invars[0].aval.ndim
    own = operand_axes(eqn, 0, axes)
    dims = [d % ndim for d in dims]
    if own is None or not (front := tuple(d for d in dims if d < max(own))):
        return None

    def move(ids: Ids) -> Moved:
        return (*(jnp.zeros_like(ids[0]) for _ in front), *ids), None

    left = tuple(d for d in dims if d not in front)
    features = [a for a in range(ndim) if a not in (*front, *own)]
    ones = [1 + features.index(d) for d in left]

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        return jnp.squeeze(rows[0], ones) if ones else rows[0]

    return View((Part(0, (*front, *own), move),), join)


def reshape_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """Rows numbered by other axes, or several of them on one line of the operand."""
    if eqn.params["dimensions"] is not None or operand_axes(eqn, 0, axes) is not None:
        return None
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in old:
        return None
    # Rows run along the leading axes of both, be it after axes that do not change.
    rows, own, lines = prod(new[a] for a in axes), 0, 1
    if axes != tuple(range(len(axes))):
        return None
    while lines < rows and own < len(old) and rows % (lines * old[own]) == 0:
        lines, own = lines * old[own], own + 1
    if not own or (rows != lines and prod(old[own:]) % (rows // lines)):
        return None
    per_line, row_axes = rows // lines, tuple(range(own))
    top, sizes = [new[a] for a in axes], old[:own]

    def flat(ids: Ids) -> Array:
        number = ids[0]
        for size, i in zip(top[1:], ids[1:], strict=True):
            number = number * size + i
        return number

    def move(ids: Ids) -> Moved:
        number, found = flat(ids) // per_line if per_line > 1 else flat(ids), []
        for size in reversed(sizes[1:]):
            found.append(number % size)
            number = number // size
        return (number, *reversed(found)), None

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        n, features = ids[0].shape[0], new[len(axes) :]
        if per_line == 1:
            return rows[0].reshape(n, *features)
        several = rows[0].reshape(n, per_line, *features)
        which = (flat(ids) % per_line).reshape(n, 1, *(1,) * len(features))
        return jnp.take_along_axis(several, which, axis=1, mode="promise_in_bounds")[:, 0]

    return View((Part(0, row_axes, move),), join)


def stack_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """Arrays one above the other: which of them is an axis of its own."""
    axis, ndim = eqn.params["axis"], eqn.outvars[0].aval.ndim
    left = tuple(a for a in axes if a != axis)
    own = tuple(a - (a > axis) for a in left)
    if axis not in axes:
        place = 1 + [a for a in range(ndim) if a not in axes].index(axis)
        parts = tuple(Part(i, own) for i in range(len(eqn.invars)))
        return View(parts, lambda rows, inside, ids: jnp.stack(rows, axis=place))
    number = axes.index(axis)

    def move(which: int) -> Callable[[Ids], Moved]:
        return lambda ids: ((*ids[:number], *ids[number + 1 :]), ids[number] == which)

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        tall = [jnp.broadcast_to(x, (ids[0].shape[0], *x.shape[1:])) for x in rows]
        return select(tall, inside)

    return View(tuple(Part(i, own, move(i)) for i in range(len(eqn.invars))), join)
