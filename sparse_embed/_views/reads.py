"""Row reads: the equations that look rows of a table up."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import GatherScatterMode

from sparse_embed._core import Axes, JaxprEqn
from sparse_embed._views.view import taken

# What happens at an id outside the table, (value, gradient):
FILL = "fill"  # (fill value, dropped): `jnp.take`
DROP = "drop"  # (nearest row, dropped): `table[ids]`, which promises that ids are in bounds
CLIP = "clip"  # (nearest row, goes to the nearest row)

MODES = {
    GatherScatterMode.FILL_OR_DROP: FILL,
    GatherScatterMode.PROMISE_IN_BOUNDS: DROP,
    GatherScatterMode.CLIP: CLIP,
}


LONGEST_BAG = 64  # beyond that many gathers in one loop, compiling takes longer than it saves


class ReadIds(NamedTuple):
    """The ids of one read, all of shape `[*lead]`."""

    asked: Array  # as the program computed them
    safe: tuple[Array, ...]  # for each axis, inside it: where a gather may look
    listed: Array  # row numbers where the gradient goes; V: nowhere
    read: Array  # the row that gives the value; V: none, it is the fill value


class RowRead(NamedTuple):
    """One read of whole rows, `x[ids]` with `x` `[V, *features]`.

    Rows may run along several axes, as those of a stack of tables `x[f, ids]` do, or along another
    one than the first. They are numbered in the order of `axes`, V in all.
    """

    eqn: JaxprEqn
    mode: str  # FILL, DROP or CLIP
    lead: tuple[int, ...]  # shape of the ids; its last axis is a run of consecutive rows if run
    run: int | None  # number of consecutive rows read from each start, where axis 0 is kept
    axes: Axes  # of x, along which rows are numbered
    columns: tuple[int, ...]  # for each axis, which component of a start index is the row number
    batched: dict[int, int]  # axes that `vmap` goes along, with that of the ids
    static: bool  # a constant slice, `x[3]` or `x[2:10]`

    @property
    def drops(self) -> bool:
        """Whether an id outside the table reads a row, to which no gradient goes."""
        return self.mode == DROP

    @property
    def sizes(self) -> tuple[int, ...]:
        shape = self.eqn.invars[0].aval.shape
        return tuple(shape[a] for a in self.axes)

    @property
    def num_rows(self) -> int:
        return prod(self.sizes)

    @property
    def kept(self) -> bool:
        """Whether some of its axes stay in what a gather gives, with one entry."""
        numbers = self.eqn.params.get("dimension_numbers")
        if numbers is None or self.run is not None:
            return False
        return len(numbers.collapsed_slice_dims) + len(self.batched) < len(self.axes)

    def ids(self, starts: Sequence[Array], places: Sequence[Array] | None = None) -> ReadIds:
        """Computes the ids from the equation's operands behind the table.

        Args:
          starts: those operands, or a part of them.
          places: for a part, where it stands along each axis of the ids.
        """
        num_rows, params = self.num_rows, self.eqn.params
        if self.static:
            stride = 1 if params["strides"] is None else params["strides"][0]
            ids = params["start_indices"][0] + stride * jnp.arange(self.run, dtype=jnp.int32)
            return ReadIds(ids, (ids,), ids, ids)
        gather = self.eqn.primitive.name == "gather"
        if len(self.axes) > 1:
            return self._several(starts[0] if gather else jnp.stack(starts, axis=-1), places)
        start = starts[0][..., self.columns[0]] if gather else jnp.asarray(starts[self.axes[0]])
        if jnp.iinfo(start.dtype).max < num_rows:
            start = start.astype(jnp.int32)
        last = num_rows - (self.run or 1)
        safe = jnp.clip(start, 0, last)
        listed = safe if self.mode == CLIP else jnp.where(start == safe, safe, num_rows)
        read = listed if self.mode == FILL else safe
        if self.run is None:
            return ReadIds(start, (safe,), listed, read)
        offset = jnp.arange(self.run, dtype=start.dtype)
        ids = (x[..., None] + offset for x in (start, safe, listed, read))
        asked, safe, listed, read = ids
        return ReadIds(asked, (safe,), jnp.minimum(listed, num_rows), jnp.minimum(read, num_rows))

    def _several(self, starts: Array, places: Sequence[Array] | None) -> ReadIds:
        """The ids of a read along several axes."""
        lead = starts.shape[:-1]
        if places is None:
            places = [jax.lax.broadcasted_iota(jnp.int32, lead, d) for d in range(len(lead))]
        safe, asked, inside = [], jnp.zeros(lead, jnp.int32), jnp.ones(lead, bool)
        for axis, size, column in zip(self.axes, self.sizes, self.columns, strict=True):
            own = places[self.batched[axis]] if axis in self.batched else starts[..., column]
            if jnp.iinfo(own.dtype).max < size:
                own = own.astype(jnp.int32)
            near = jnp.clip(own, 0, size - 1)
            inside &= own == near
            safe.append(near.astype(jnp.int32))
        for size, i in zip(self.sizes, safe, strict=True):
            asked = asked * size + i
        listed = asked if self.mode == CLIP else jnp.where(inside, asked, self.num_rows)
        read = listed if self.mode == FILL else asked
        return ReadIds(jnp.where(inside, asked, -1), tuple(safe), listed, read)

    def summed_axis(self, total: JaxprEqn) -> int | None:
        """The axis of the ids over which `total` adds the rows read up, counted from the last.

        `None` if it does something else, or the sum is better made of the rows laid out.
        """
        eqn, depth = self.eqn, len(self.lead)
        if self.axes != (0,):
            return None
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

    def sum(self, table: Array, ids: ReadIds, axis: int) -> Array:
        """The rows read, added up over `axis` of the ids, in order.

        One gather for each place in the bag: XLA fuses these into one loop, where a gather of all
        rows would be laid out in memory first.
        """
        total = jnp.zeros((), table.dtype)
        safe, listed = (jnp.moveaxis(x, axis, 0) for x in (ids.safe[0], ids.listed))
        fill = self.eqn.params.get("fill_value") if self.mode == FILL else None
        for column, inside in zip(safe, listed < self.num_rows, strict=True):
            if column.size == 1:  # see `old_rows`
                rows = taken(table, (0,), (column.reshape(1),))
                rows = rows.reshape(*column.shape, *table.shape[1:])
            else:
                rows = table.at[column].get(mode="promise_in_bounds")
            if fill == 0:
                rows = jnp.where(self._over_features(inside), rows, 0)
            total = total + rows
        if self.mode == FILL and fill != 0:
            every = self._over_features(jnp.all(listed < self.num_rows, axis=0))
            total = jnp.where(every, total, jnp.nan)
        return total

    def place(self, rows: Array, ids: ReadIds) -> Array:
        """Lays `[*lead, *features]` rows out as the equation's output."""
        if self.mode == FILL:
            outside = self._over_features(ids.listed == self.num_rows)
            rows = jnp.where(outside, self.fill_value, rows)
        if self.eqn.primitive.name != "gather":
            return rows.reshape(self.eqn.outvars[0].aval.shape) if self.run is None else rows
        offset_dims = self.eqn.params["dimension_numbers"].offset_dims
        if self.kept:
            rows = rows.reshape(
                *self.lead, *(self.eqn.outvars[0].aval.shape[a] for a in offset_dims)
            )
        return jnp.moveaxis(rows, range(rows.ndim - len(offset_dims), rows.ndim), offset_dims)

    def _over_features(self, x: Array) -> Array:
        """`x`, of the shape of ids, lined up with rows."""
        features = self.eqn.invars[0].aval.ndim - len(self.axes)
        return x.reshape(*x.shape, *(1,) * features)

    @property
    def fill_value(self) -> Array:
        """What a read outside the table gives."""
        fill, dtype = self.eqn.params["fill_value"], self.eqn.outvars[0].aval.dtype
        if fill is None and jnp.issubdtype(dtype, jnp.inexact):
            fill = jnp.nan
        elif fill is None:
            info = jnp.iinfo(dtype) if not jnp.issubdtype(dtype, jnp.bool_) else None
            fill = True if info is None else info.min if info.min < 0 else info.max
        return jnp.asarray(fill, dtype)
