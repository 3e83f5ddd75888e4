"""Views of rows that other indices choose: rows that were read before, rows that were set."""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import GatherScatterMode

from sparse_embed._core import Axes, JaxprEqn
from sparse_embed._views.reads import DROP, FILL
from sparse_embed._views.row_reads import row_read
from sparse_embed._views.view import Ids, Moved, Part, View, select

LONGEST_SET = 64  # rows that `table.at[indices].set` may replace: each id is compared with all


def gather_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """Rows that were read before, of which some are read: `table[order][ids]`."""
    read = row_read(eqn)
    if read is None or read.run is not None or read.kept:
        return None
    offset = eqn.params["dimension_numbers"].offset_dims
    lead = tuple(a for a in range(eqn.outvars[0].aval.ndim) if a not in offset)
    if set(axes) != set(lead):
        return None

    def move(ids: Ids, starts: Array) -> Moved:
        order = [ids[axes.index(a)] for a in lead]
        own = read.ids([starts[tuple(order)]], tuple(order))
        inside = own.listed < read.num_rows
        if read.mode == FILL:
            return own.safe, inside
        return own.safe, None, inside if read.mode == DROP else None

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        if inside[0] is None:
            return rows[0]
        return select([rows[0], jnp.full_like(rows[0], read.fill_value)], [inside[0], None])

    return View((Part(0, read.axes, move),), join, (1,))


def scatter_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """`table.at[indices].set(rows)`, of a few rows."""
    table, indices, new = (v.aval for v in eqn.invars)
    numbers, features = eqn.params["dimension_numbers"], table.ndim - len(axes)
    set_axes = tuple(numbers.scatter_dims_to_operand_dims)
    lead = new.ndim - len(numbers.update_window_dims)
    number = prod(indices.shape[:-1])
    if (
        set_axes != axes
        or tuple(numbers.inserted_window_dims) != axes
        or numbers.operand_batching_dims
        or tuple(numbers.update_window_dims) != tuple(range(lead, lead + features))
        or new.shape[lead:] != tuple(x for a, x in enumerate(table.shape) if a not in axes)
        or number > LONGEST_SET
        or indices.dtype.itemsize < 4  # of which JAX itself makes other rows
    ):
        return None
    if not number:
        return View((Part(0, axes),), lambda rows, inside, ids: rows[0])
    clips = eqn.params["mode"] == GatherScatterMode.CLIP
    last = np.array([table.shape[a] - 1 for a in axes])

    def found(ids: Ids, indices: Array) -> tuple[Array, Array]:
        flat = indices.reshape(number, len(axes))
        flat = jnp.clip(flat, 0, last.astype(flat.dtype)) if clips else flat
        pairs = (i[:, None] == flat[:, j] for j, i in enumerate(ids))
        same = reduce(jnp.logical_and, pairs)  # [n, number]
        which = number - 1 - jnp.argmax(same[:, ::-1], axis=1)  # the last one stays
        return which, jnp.any(same, axis=1)

    def kept(ids: Ids, indices: Array) -> Moved:
        return ids, ~found(ids, indices)[1]

    def written(ids: Ids, indices: Array) -> Moved:
        which, there = found(ids, indices)
        return tuple(jnp.unravel_index(which, new.shape[:lead])) if lead else (), there

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        return select([rows[0], jnp.broadcast_to(rows[2], rows[0].shape)], [inside[0], None])

    return View((Part(0, axes, kept), Part(2, tuple(range(lead)), written)), join, (1,))


def dynamic_slice_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """Rows from some place on, that only the program knows, of which some are read."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    if any(size != shape[a] for a, size in enumerate(sizes) if a not in axes):
        return None

    def move(ids: Ids, *starts: Array) -> Moved:
        firsts = (jnp.clip(starts[a], 0, shape[a] - sizes[a]) for a in axes)
        return tuple(i + f.astype(i.dtype) for i, f in zip(ids, firsts, strict=True)), None

    extra = tuple(range(1, 1 + len(shape)))
    return View((Part(0, axes, move),), lambda rows, inside, ids: rows[0], extra)


def dynamic_update_slice_view(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """A table of which some rows that follow each other were replaced."""
    shape, new = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    if any(size != shape[a] for a, size in enumerate(new) if a not in axes):
        return None

    def places(ids: Ids, starts: Sequence[Array]) -> tuple[Ids, Array]:
        own, there = [], jnp.ones(ids[0].shape, bool)
        for a, i in zip(axes, ids, strict=True):
            here = i - jnp.clip(starts[a], 0, shape[a] - new[a]).astype(i.dtype)
            own.append(jnp.clip(here, 0, new[a] - 1))
            there &= here == own[-1]
        return tuple(own), there

    def kept(ids: Ids, *starts: Array) -> Moved:
        return ids, ~places(ids, starts)[1]

    def written(ids: Ids, *starts: Array) -> Moved:
        return places(ids, starts)

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        return select([rows[0], rows[1]], [inside[0], None])

    extra = tuple(range(2, 2 + len(shape)))
    return View((Part(0, axes, kept), Part(1, axes, written)), join, extra)
