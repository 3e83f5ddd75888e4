"""Sums of repeated rows, on plain arrays: the arithmetic under `RowSparse`.

Letters: n listed rows, s the static size of the result, V the rows of the table.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sparse_embed._container.indices import Slots, distinct, flat_indices
from sparse_embed._core import platform


def sum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which repeats are summed: `dtype` widened to at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def segment_sum(rows: Array, slot: Array, size: int) -> Array:
    """Sums `rows` `[n, *features]` by slot into `[size, *features]`, in at least float32.

    The additions run in the order in which the rows are listed. The result is rounded once to
    the dtype of `rows`.
    """
    wide = sum_dtype(rows.dtype)
    total = jnp.zeros((size, *rows.shape[1:]), wide)
    return total.at[slot].add(rows.astype(wide), mode="drop").astype(rows.dtype)


def sum_repeats(indices: Array, rows: Array, num_rows: int, size: int) -> tuple[Slots, Array]:
    """Each row listed once, in `size` entries: where its entries went, and their sums."""
    slots = distinct(flat_indices(indices, num_rows), num_rows, size)
    return slots, segment_sum(rows, slots.slot, size)


def segment_count(slot: Array, size: int) -> Array:
    """How often each slot is listed: `[size]` int32."""
    return jnp.zeros(size, jnp.int32).at[slot].add(1, mode="drop")


def gather_rows(table: Array, indices: Array, fill: float | None = 0) -> Array:
    """`[n, *features]` rows of `table`; an index outside the table reads as `fill`."""
    return table.at[indices].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def old_rows(table: Array, indices: Array, mode: str = "fill") -> Array:
    """Rows of a table that is written afterwards, `[n, *features]`.

    XLA turns a gather of one row into a slice, which it reads anew for each use, also where the
    table was written in between: it would copy the table to have the old row still. So one row is
    read like two. An index outside the table reads as 0, or with `"clip"`, which costs less, as its
    last row.
    """
    if indices.shape == (1,):
        return old_rows(table, jnp.concatenate([indices, indices]), mode)[:1]
    return (
        jnp.take(table, indices, 0, mode="clip") if mode == "clip" else gather_rows(table, indices)
    )


def loosely(rows: Array, ids: Array) -> Array:
    """`rows`, read at non-negative `ids`; on CPUs they are read several times faster.

    XLA's CPU compiler makes a slow loop of a gather that no arithmetic is fused with. So there is
    some here: a product with one, of which only we know that it is one. That changes no bit of a
    normal number; a subnormal one reads as 0, as XLA has it in any arithmetic on a CPU.
    """
    if platform() != "cpu" or not rows.size or rows.dtype not in _SINGLE:
        return rows
    first = jax.lax.slice(ids.reshape(-1), (0,), (1,)).reshape(())
    return rows * (first >= 0).astype(rows.dtype)


_SINGLE = (jnp.float32, jnp.float64)


# Outside of any other jit it is one call.
@partial(jax.jit, inline=True, static_argnames="ascending")
def set_rows(table: Array, indices: Array, rows: Array, ascending: bool = True) -> Array:
    """`table` with `rows` at distinct `indices`, ascending as in a coalesced gradient, or not."""
    return table.at[indices].set(
        rows.astype(table.dtype), mode="drop", unique_indices=True, indices_are_sorted=ascending
    )


def nan_where(bad: Array, rows: Array) -> Array:
    """`rows`, or all NaN where the scalar `bad` holds: a fault that no later step can miss."""
    return jax.lax.select(jnp.broadcast_to(bad, rows.shape), jnp.full_like(rows, jnp.nan), rows)
