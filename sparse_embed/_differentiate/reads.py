"""Row reads: the equations that look whole rows of a table up."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import GatherScatterMode

from sparse_embed._core import JaxprEqn

# What happens at an id outside the table, (value, gradient):
FILL = "fill"  # (fill value, dropped): `jnp.take`
DROP = "drop"  # (nearest row, dropped): `table[ids]`, which promises that ids are in bounds
CLIP = "clip"  # (nearest row, goes to the nearest row)

_MODES = {
    GatherScatterMode.FILL_OR_DROP: FILL,
    GatherScatterMode.PROMISE_IN_BOUNDS: DROP,
    GatherScatterMode.CLIP: CLIP,
}


LONGEST_BAG = 64  # beyond that many gathers in one loop, compiling takes longer than it saves


class Ids(NamedTuple):
    """The ids of one read, all of shape `[*lead]`."""

    asked: Array  # as the program computed them
    safe: Array  # inside [0, V): where a gather may look
    listed: Array  # where the gradient goes; V: nowhere
    read: Array  # the row that gives the value; V: none, it is the fill value


class RowRead(NamedTuple):
    """One read of whole rows, `x[ids]` with `x` `[V, *features]`."""

    eqn: JaxprEqn
    mode: str  # FILL, DROP or CLIP
    lead: tuple[int, ...]  # shape of the ids; its last axis is a run of consecutive rows if run
    run: int | None  # number of consecutive rows read from each start, where axis 0 is kept
    column: int  # which component of a start index is the row number
    static: bool  # a constant slice, `x[3]` or `x[2:10]`

    @property
    def num_rows(self) -> int:
        return self.eqn.invars[0].aval.shape[0]

    def ids(self, starts: Sequence[Array]) -> Ids:
        """Computes the ids from the equation's operands behind the table."""
        num_rows, params = self.num_rows, self.eqn.params
        if self.static:
            stride = 1 if params["strides"] is None else params["strides"][0]
            ids = params["start_indices"][0] + stride * jnp.arange(self.run, dtype=jnp.int32)
            return Ids(ids, ids, ids, ids)
        gather = self.eqn.primitive.name == "gather"
        start = starts[0][..., self.column] if gather else jnp.asarray(starts[0])
        if jnp.iinfo(start.dtype).max < num_rows:
            start = start.astype(jnp.int32)
        last = num_rows - (self.run or 1)
        safe = jnp.clip(start, 0, last)
        listed = safe if self.mode == CLIP else jnp.where(start == safe, safe, num_rows)
        read = listed if self.mode == FILL else safe
        if self.run is None:
            return Ids(start, safe, listed, read)
        offset = jnp.arange(self.run, dtype=start.dtype)
        ids = (x[..., None] + offset for x in (start, safe, listed, read))
        asked, safe, listed, read = ids
        return Ids(asked, safe, jnp.minimum(listed, num_rows), jnp.minimum(read, num_rows))

    def summed_axis(self, total: JaxprEqn) -> int | None:
        """The axis of the ids over which `total` adds the rows read up, counted from the last.

        `None` if it does something else, or the sum is better made of the rows laid out.
        """
        eqn, depth = self.eqn, len(self.lead)
        if total.primitive.name != "reduce_sum" or eqn.primitive.name != "gather" or self.run:
            return None
        axes, rows = total.params["axes"], eqn.outvars[0].aval
        in_order = eqn.params["dimension_numbers"].offset_dims == tuple(range(depth, rows.ndim))
        if len(axes) != 1 or axes[0] >= depth or not in_order:
            return None
        # Narrow floats are summed in a wider type, of which this equation knows nothing.
        wide = rows.dtype in (jnp.float32, jnp.float64)
        fill = self.eqn.params.get("fill_value")
        simple = self.mode != FILL or fill is None or fill != fill or fill == 0
        short = 0 < self.lead[axes[0]] <= LONGEST_BAG
        return int(axes[0] - depth) if wide and simple and short else None

    def sum(self, table: Array, ids: Ids, axis: int) -> Array:
        """The rows read, added up over `axis` of the ids, in order.

        One gather for each place in the bag: XLA fuses these into one loop, where a gather of all
        rows would be laid out in memory first.
        """
        total = jnp.zeros((), table.dtype)
        safe, listed = (jnp.moveaxis(x, axis, 0) for x in (ids.safe, ids.listed))
        fill = self.eqn.params.get("fill_value") if self.mode == FILL else None
        for column, inside in zip(safe, listed < self.num_rows, strict=True):
            rows = table.at[column].get(mode="promise_in_bounds")
            if fill == 0:
                rows = jnp.where(self._over_features(inside), rows, 0)
            total = total + rows
        if self.mode == FILL and fill != 0:
            every = self._over_features(jnp.all(listed < self.num_rows, axis=0))
            total = jnp.where(every, total, jnp.nan)
        return total

    def place(self, rows: Array, ids: Ids) -> Array:
        """Lays `[*lead, *features]` rows out as the equation's output."""
        if self.mode == FILL:
            outside = self._over_features(ids.listed == self.num_rows)
            rows = jnp.where(outside, self._fill_value(rows), rows)
        if self.eqn.primitive.name != "gather":
            return rows
        offset_dims = self.eqn.params["dimension_numbers"].offset_dims
        return jnp.moveaxis(rows, range(rows.ndim - len(offset_dims), rows.ndim), offset_dims)

    def _over_features(self, x: Array) -> Array:
        """`x`, of the shape of ids, lined up with rows."""
        return x.reshape(*x.shape, *(1,) * (self.eqn.invars[0].aval.ndim - 1))

    def _fill_value(self, rows: Array) -> Array:
        fill = self.eqn.params["fill_value"]
        if fill is None and jnp.issubdtype(rows.dtype, jnp.inexact):
            fill = jnp.nan
        elif fill is None:
            info = jnp.iinfo(rows.dtype) if rows.dtype != bool else None
            fill = True if info is None else info.min if info.min < 0 else info.max
        return jnp.asarray(fill, rows.dtype)


def row_read(eqn: JaxprEqn) -> RowRead | None:
    """Describes `eqn` as a read of whole rows of its first operand; `None` if it is not one."""
    reader = {"gather": _gather, "dynamic_slice": _dynamic_slice, "slice": _slice}
    found = reader.get(eqn.primitive.name)
    return found(eqn) if found and eqn.invars[0].aval.ndim else None


def _gather(eqn: JaxprEqn) -> RowRead | None:
    table, starts = (v.aval.shape for v in eqn.invars)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    collapsed, mode = tuple(numbers.collapsed_slice_dims), eqn.params["mode"]
    if (
        sizes[1:] != table[1:]
        or collapsed not in ((), (0,))
        or numbers.operand_batching_dims
        or 0 not in numbers.start_index_map
        or mode not in _MODES
    ):
        return None
    run = None if collapsed else sizes[0]
    # Starts of full-size axes are clamped to 0 by CLIP and PROMISE, but not by FILL.
    if _MODES[mode] == FILL and (len(numbers.start_index_map) > 1 or run not in (None, 1)):
        return None
    if run == table[0] and run != 1:
        return None
    lead = starts[:-1] + (() if run is None else (run,))
    return RowRead(eqn, _MODES[mode], lead, run, numbers.start_index_map.index(0), False)


def _dynamic_slice(eqn: JaxprEqn) -> RowRead | None:
    table, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    if sizes[1:] != table[1:] or (sizes[0] == table[0] and table[0] != 1):
        return None
    return RowRead(eqn, CLIP, (sizes[0],), sizes[0], 0, False)


def _slice(eqn: JaxprEqn) -> RowRead | None:
    table, p = eqn.invars[0].aval.shape, eqn.params
    strides = p["strides"] or (1,) * len(table)
    whole = (0,) * (len(table) - 1), table[1:], (1,) * (len(table) - 1)
    if (p["start_indices"][1:], p["limit_indices"][1:], tuple(strides[1:])) != whole:
        return None
    rows = eqn.outvars[0].aval.shape[0]
    return None if rows == table[0] else RowRead(eqn, CLIP, (rows,), rows, 0, True)
