"""Row numbers: put in range, padded, and told apart.

Letters: n listed rows, s the static size of the result, V the rows of the table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sparse_embed._core import describe, message


def as_integers(x: ArrayLike, name: str, call: str) -> Array:
    """`x` as a jax array of integers; `name` is the argument's name."""
    if isinstance(x, np.ndarray | np.generic) and np.issubdtype(x.dtype, np.integer):
        # Of 64 bits jax may keep the low 32, and a huge id would come back as a valid one.
        kept = jnp.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
        x = np.clip(x, kept.min, kept.max)
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        wrote, got = f"{call}: {name} must be integers.", f"{name} {describe(array)}"
        raise TypeError(message(wrote, got, f"{name}.astype(jnp.int32)"))
    return array


def widened(ids: Array) -> Array:
    """`ids` as int32, or int64 if they are of 64 bits; what is too large stays out of range."""
    if ids.dtype == jnp.uint32:
        ids = jnp.minimum(ids, jnp.uint32(2**31 - 1))
    return ids.astype(jnp.int32 if ids.dtype.itemsize <= 4 else jnp.int64)


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


def slots_among(ascending: Array, indices: Array) -> Array:
    """Where rows stand in a list of distinct ones.

    Args:
      ascending: `[s]` distinct rows, ascending, then padding.
      indices: `[n]` row numbers.

    Returns:
      The place of each, `[n]` int32; s for what is not there.
    """
    slot = jnp.searchsorted(ascending, indices).astype(jnp.int32)
    there = ascending.at[slot].get(mode="fill", fill_value=-1) == indices
    return jnp.where(there, slot, ascending.size)


_ROOM = 8  # buckets for each listed row, so that few ids collide


def first_seen(indices: Array, num_rows: int, size: int) -> Slots:
    """Gives every distinct row of `indices` a slot, in no particular order.

    Args:
      indices: `[n]` int32 row numbers as `flat_indices` returns them, n > 0.
      num_rows: rows of the table.
      size: static length of the compact block, n or more.

    Returns:
      `Slots`. What is outside the table has slot `size`.
    """
    (n,) = indices.shape
    position, leader = _leaders(indices, num_rows)
    inside = indices < num_rows
    leads = (leader == position) & inside
    number = jnp.cumsum(leads, dtype=jnp.int32) - 1
    slot = jnp.where(inside, number[leader], size)
    count = number[-1] + 1
    compact = padding(count, size, num_rows, indices.dtype)
    compact = compact.at[jnp.where(leads, number, size)].set(indices, mode="drop")
    return Slots(slot, compact, count)


def first_seen_of_each(indices: Array, heights: Sequence[int]) -> list[Slots]:
    """As `first_seen` for each of several tables, at once: there is less to compile.

    Args:
      indices: `[T, n]` int32 row numbers of T tables, as `flat_indices` returns them, n > 0.
      heights: rows of each table; of all together there are fewer than 2^31.

    Returns:
      For each table its `Slots`, of size n.
    """
    tables, n = indices.shape
    first = np.cumsum([0, *(rows + 1 for rows in heights)])  # tables one above the other
    above = (indices + first[:-1, None].astype(np.int32)).reshape(-1)
    position, leader = _leaders(above, int(first[-1]))
    inside = indices < np.array(heights, np.int32)[:, None]
    leads = (leader == position).reshape(tables, n) & inside
    number = jnp.cumsum(leads, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(inside, number.reshape(-1)[leader].reshape(tables, n), n)
    count = number[:, -1] + 1
    compact = jnp.stack(
        [padding(c, n, rows, indices.dtype) for c, rows in zip(count, heights, strict=True)]
    )
    own = jnp.arange(tables)[:, None]
    compact = compact.at[own, jnp.where(leads, number, n)].set(indices, mode="drop")
    return [Slots(slot[k], compact[k], count[k]) for k in range(tables)]


def _leaders(indices: Array, num_rows: int) -> tuple[Array, Array]:
    """The positions of all entries, and for each that of one entry with its number."""
    (n,) = indices.shape
    position = jnp.arange(n, dtype=jnp.int32)
    room = 1 << (_ROOM * n - 1).bit_length()
    if num_rows >= room:
        return position, _by_hash(indices, position, room)
    scratch = jnp.zeros(num_rows + 1, jnp.int32).at[indices].set(position)
    return position, scratch[indices]


def _by_hash(indices: Array, position: Array, room: int) -> Array:
    """For each entry the position of one entry, the same for all entries with its id."""
    shift = 32 - (room.bit_length() - 1)

    def again(carry: Any) -> Any:
        scratch, leader, open_, turn = carry
        # Another odd factor each turn (Knuth's multiplicative hash): ids that met once part.
        factor = jnp.uint32(2654435769) + turn * jnp.uint32(0x5851F42E)
        bucket = (indices.astype(jnp.uint32) * (factor | 1)) >> shift
        bucket = jnp.where(open_, bucket.astype(jnp.int32), room)
        scratch = scratch.at[bucket].set(position, mode="drop")
        # An entry that is still open reads what was written in this very turn.
        found = scratch.at[bucket].get(mode="fill", fill_value=0)
        won = open_ & (indices[found] == indices)
        return scratch, jnp.where(won, found, leader), open_ & ~won, turn + 1

    scratch = jnp.zeros(room, jnp.int32)
    start = scratch, position, jnp.ones(indices.shape, bool), jnp.uint32(0)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), again, start)[1]
