"""Sums of repeated rows, on plain arrays: the arithmetic under `RowSparse`.

Letters: n listed rows, s the static size of the result, V the rows of the table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def sum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which repeats are summed: `dtype` widened to at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def flat_indices(ids: ArrayLike, num_rows: int) -> Array:
    """`ids` as int32, with everything outside `[0, num_rows)` put at `num_rows`.

    Small and unsigned integer dtypes are widened first, so that neither `num_rows` nor a huge
    id wraps around. (int64 is kept where a table is too tall for int32.)

    Args:
      ids: integers of any shape and integer dtype.
      num_rows: rows of the table.

    Returns:
      int32 of the same shape, each in `[0, num_rows]`.
    """
    ids = jnp.asarray(ids)
    wide = jnp.int32 if num_rows + ids.size < 2**31 else jnp.int64
    if jnp.iinfo(ids.dtype).max < num_rows:
        ids = ids.astype(wide)
    outside = (ids < 0) | (ids >= num_rows)
    return jnp.where(outside, num_rows, ids.astype(wide))


def padding(count: Array, size: int, num_rows: int, dtype: DTypeLike) -> Array:
    """`[size]` indices `num_rows, num_rows + 1, ...` counted from slot `count` on.

    Distinct padding keeps "sorted" and "unique" literally true of the whole index array, which
    is what the scatter hints promise XLA.
    """
    return num_rows + jnp.maximum(jnp.arange(size, dtype=dtype) - count.astype(dtype), 0)


# An id that asks for no row and is no mistake; `check_ids` lets it pass. No round number, so that
# it is not some user's own mark, and out of range for every table that fits a machine.
PADDED = 0x7FED_C0DE


class Slots(NamedTuple):
    """Where each listed row goes in the compact block of distinct rows."""

    slot: Array  # [n] int32: the compact position of each listed row; >= count for padding
    indices: Array  # [s] the distinct rows, ascending, then padding
    number: Array  # [] int32: how many distinct rows there are, also where they exceed s


def distinct(indices: Array, num_rows: int, size: int) -> Slots:
    """Gives every distinct row of `indices` a slot, in ascending order.

    Args:
      indices: `[n]` row numbers as `flat_indices` returns them.
      num_rows: rows of the table.
      size: static length of the compact block.

    Returns:
      `Slots`. Rows beyond `size` have a slot `>= size`.
    """
    (n,) = indices.shape
    if n == 0:
        count = jnp.zeros((), jnp.int32)
        return Slots(indices, padding(count, size, num_rows, indices.dtype), count)
    order = jnp.argsort(indices, stable=True)  # [n]
    ascending = indices[order]
    starts = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]]) & (
        ascending < num_rows
    )
    slot_sorted = jnp.where(
        ascending < num_rows, jnp.cumsum(starts, dtype=jnp.int32) - 1, max(n, size)
    )
    slot = jnp.zeros(n, jnp.int32).at[order].set(slot_sorted, unique_indices=True)
    count = jnp.sum(starts, dtype=jnp.int32)
    compact = padding(count, size, num_rows, indices.dtype)
    # Repeats write the same number, so their order does not matter.
    compact = compact.at[slot_sorted].set(ascending, mode="drop", indices_are_sorted=True)
    return Slots(slot, compact, count)


def segment_sum(rows: Array, slot: Array, size: int) -> Array:
    """Sums `rows` `[n, *features]` by slot into `[size, *features]`, in at least float32.

    The additions run in the order in which the rows are listed. The result is rounded once to
    the dtype of `rows`.
    """
    wide = sum_dtype(rows.dtype)
    total = jnp.zeros((size, *rows.shape[1:]), wide)
    return total.at[slot].add(rows.astype(wide), mode="drop").astype(rows.dtype)


def segment_count(slot: Array, size: int) -> Array:
    """How often each slot is listed: `[size]` int32."""
    return jnp.zeros(size, jnp.int32).at[slot].add(1, mode="drop")


def gather_rows(table: Array, indices: Array, fill: float | None = 0) -> Array:
    """`[n, *features]` rows of `table`; an index outside the table reads as `fill`."""
    return table.at[indices].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def loosely(rows: Array, ids: Array) -> Array:
    """`rows`, read at non-negative `ids`; on CPUs they are read several times faster.

    XLA's CPU compiler makes a slow loop of a gather that no arithmetic is fused with. So there is
    some here: a product with one, of which only we know that it is one. That changes no bit of a
    normal number; a subnormal one reads as 0, as XLA has it in any arithmetic on a CPU.
    """
    if jax.default_backend() != "cpu" or not rows.size or rows.dtype not in _SINGLE:
        return rows
    first = jax.lax.slice(ids.reshape(-1), (0,), (1,)).reshape(())
    return rows * (first >= 0).astype(rows.dtype)


_SINGLE = (jnp.float32, jnp.float64)


def set_rows(table: Array, indices: Array, rows: Array) -> Array:
    """`table` with `rows` at the ascending, distinct `indices` of a coalesced gradient."""
    rows = rows.astype(table.dtype)
    return table.at[indices].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)


def nan_where(bad: Array, rows: Array) -> Array:
    """`rows`, or all NaN where the scalar `bad` holds: a fault that no later step can miss."""
    return jax.lax.select(jnp.broadcast_to(bad, rows.shape), jnp.full_like(rows, jnp.nan), rows)
