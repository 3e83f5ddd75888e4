"""Distinct ids without sorting them, for CPUs: a few passes over the list, whatever it holds.

Every entry writes its position into a bucket and reads back who is there. The entry found is the
one that stands for all entries with its id. Where a table is too tall for a bucket per row, ids
share buckets by their hash, and those that lost theirs to another id try again elsewhere.

Letters: n listed rows, V the rows of the table.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._segments import Slots, padding

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
    position = jnp.arange(n, dtype=jnp.int32)
    room = 1 << (_ROOM * n - 1).bit_length()
    if num_rows < room:
        scratch = jnp.zeros(num_rows + 1, jnp.int32).at[indices].set(position)
        leader = scratch[indices]
    else:
        leader = _by_hash(indices, position, room)
    inside = indices < num_rows
    leads = (leader == position) & inside
    number = jnp.cumsum(leads, dtype=jnp.int32) - 1
    slot = jnp.where(inside, number[leader], size)
    count = number[-1] + 1
    compact = padding(count, size, num_rows, indices.dtype)
    compact = compact.at[jnp.where(leads, number, size)].set(indices, mode="drop")
    return Slots(slot, compact, count)


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
