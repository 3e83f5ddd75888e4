"""Views whose rows are those of their operands, moved along an axis: ids move with them."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import Axes, JaxprEqn, operand_axes
from sparse_embed._views.view import (
    Ids,
    Moved,
    Part,
    View,
    along,
    except_at,
    on_features,
    select,
)


def slice_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    p, shape = eqn.params, eqn.invars[0].aval.shape
    strides = p["strides"] or (1,) * len(shape)
    if operand_axes(eqn, 0, axes) is not None:
        return None  # it is row-wise

    def move(ids: Ids) -> Moved:
        steps = zip(axes, ids, strict=True)
        return tuple(p["start_indices"][a] + strides[a] * i for a, i in steps), None

    features = [a for a in range(len(shape)) if a not in axes]
    if all(eqn.outvars[0].aval.shape[a] == shape[a] for a in features):
        return View((Part(0, axes, move),), lambda rows, inside, ids: rows[0])
    rest = on_features(
        eqn,
        axes,
        start_indices=except_at(p["start_indices"], axes, 0),
        limit_indices=p["limit_indices"],
        strides=except_at(strides, axes, 1),
    )
    return View((Part(0, axes, move),), rest)


def reverse_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    dims, shape = eqn.params["dimensions"], eqn.invars[0].aval.shape

    def move(ids: Ids) -> Moved:
        pairs = zip(axes, ids, strict=True)
        return tuple(shape[a] - 1 - i if a in dims else i for a, i in pairs), None

    left = tuple(a for a in dims if a not in axes)
    if len(left) == len(dims):
        return None  # it is row-wise
    rest = on_features(eqn, axes, dimensions=left)
    return View((Part(0, axes, move),), rest if left else lambda rows, inside, ids: rows[0])


def pad_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    config, shape = eqn.params["padding_config"], eqn.invars[0].aval.shape
    if all(tuple(config[a]) == (0, 0, 0) for a in axes):
        return None

    def move(ids: Ids) -> Moved:
        own, inside = [], None
        for a, i in zip(axes, ids, strict=True):
            low, _, between = config[a]
            here, apart = i - low, between + 1
            there = (here >= 0) & (here <= (shape[a] - 1) * apart) & (here % apart == 0)
            inside = there if inside is None else inside & there
            own.append(jnp.where(there, here // apart, 0))
        return tuple(own), inside

    rest = on_features(eqn, axes, padding_config=except_at(config, axes, (0, 0, 0)))

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        padded = rest(rows, inside, ids)
        return select([padded, jnp.broadcast_to(rows[1], padded.shape)], [inside[0], None])

    return View((Part(0, axes, move),), join)


def concatenate_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    axis = eqn.params["dimension"]
    if axis not in axes:
        return None
    parts, first = [], 0
    for number, v in enumerate(eqn.invars):
        height = v.aval.shape[axis]

        def move(i: Array, first: int = first, height: int = height) -> Any:
            return jnp.clip(i - first, 0, height - 1), (i >= first) & (i < first + height)

        parts.append(Part(number, axes, along(axes, axis, move)))
        first += height
    filled = [part for part in parts if eqn.invars[part.operand].aval.size]
    order = [part.operand for part in filled]

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        return select([rows[i] for i in order], [inside[i] for i in order])

    return View(tuple(filled), join) if filled else None


def split_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    axis, first = eqn.params["axis"], sum(map(int, eqn.params["sizes"][:out]))
    if axis not in axes:
        return None
    part = Part(0, axes, along(axes, axis, lambda i: (i + first, None)))
    return View((part,), lambda rows, inside, ids: rows[0])


def tile_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    shape, reps = eqn.invars[0].aval.shape, eqn.params["reps"]
    if len(reps) != len(shape):
        return None

    def move(ids: Ids) -> Moved:
        return tuple(i % shape[a] for a, i in zip(axes, ids, strict=True)), None

    features = tuple(reps[a] for a in range(len(shape)) if a not in axes)
    moves = any(reps[a] != 1 for a in axes)
    part = Part(0, axes, move if moves else None)
    return View((part,), lambda rows, inside, ids: jnp.tile(rows[0], (1, *features)))
