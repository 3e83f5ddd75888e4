"""A loop over a list of rows, a block at a time.

Letters: n listed rows, b rows of a block, V the rows of the table.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container.segments import old_rows
from sparse_embed._core import in_blocks, tuning


class Block(NamedTuple):
    """Some rows of a list, and where they stand in it."""

    indices: Array  # [b] distinct; >= V for padding
    rows: Array  # [b, *features]
    position: Array  # [b]


def each_block(
    body: Callable[[Block, Any], Any],
    carry: Any,
    indices: Array,
    rows: Array,
    count: Array,
    num_rows: int,
    first: Array | int = 0,
) -> Any:
    """`carry` after `body(block, carry)` for every block of `count` rows; arrays stay in place.

    Args:
      body: the work on one block.
      carry: what goes from block to block, tables included.
      indices: distinct row numbers, from which `[first : first + n]` are those of `rows`.
      rows: `[n, *features]`.
      count: `[]` int32, how many of the rows are to be gone through.
      num_rows: V.
      first: where the rows begin.

    Returns:
      The last `carry`.
    """
    size = min(tuning.block_rows, rows.shape[0])
    last = rows.shape[0] - size

    def one(number: Array, carry: Any) -> Any:
        start = jnp.minimum(number * size, last)
        own = jax.lax.dynamic_slice_in_dim(indices, first + start, size)
        position = start + jnp.arange(size, dtype=indices.dtype)
        # A block that would reach beyond the end begins earlier; its first rows were there.
        beyond = num_rows + indices.size + position
        own = jnp.where(position < number * size, beyond, own)
        block = Block(own, jax.lax.dynamic_slice_in_dim(rows, start, size), first + position)
        return body(block, carry)

    return jax.lax.fori_loop(0, blocks(count, size), one, carry)


def blocks(count: Array, size: int) -> Array:
    """How many blocks of `size` hold `count` rows."""
    return (count + (size - 1)) // size


def add_rows(table: Array, indices: Array, rows: Array) -> Array:
    """`table` with `rows` added at ascending, distinct `indices`, `>= V` for padding.

    The sum is rounded once to the table's dtype, as in `table + dense`.
    """

    if not in_blocks(indices, table, rows):
        return _added(table, indices, rows)
    num_rows = table.shape[0]
    count = jnp.sum(indices < num_rows, dtype=jnp.int32)
    body = lambda block, table: _added(table, block.indices, block.rows)  # noqa: E731
    return each_block(body, table, indices, rows, count, num_rows)


@partial(jax.jit, inline=True)  # outside of any other jit it is one call
def _added(table: Array, indices: Array, rows: Array) -> Array:
    return put(table, indices, (old_rows(table, indices) + rows).astype(table.dtype))


def put(table: Array, indices: Array, rows: Array) -> Array:
    """`table` with `rows` at distinct `indices`; those outside it write nothing."""
    out = table.at[indices]
    return out.set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)
