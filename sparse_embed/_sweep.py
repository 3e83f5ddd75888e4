"""Goes through the distinct rows of a gradient, a block at a time.

Letters: n listed rows, b rows of a block, V the rows of the table.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._first_seen import first_seen
from sparse_embed._listed import Listed
from sparse_embed._row_sparse import RowSparse
from sparse_embed._tuning import tuning

Body = Callable[[Array, Array, Any], Any]  # indices [b], rows [b, *features], carry -> carry


class Sweep:
    """The distinct rows of one gradient, with their summed gradients, in blocks.

    Whatever is carried from block to block is updated in place, tables included. Blocks hold as
    many rows as `tuning` says; the last one is filled up with padding, indices `>= V`.

    Args:
      grad: what the step lists of a table, or a coalesced `RowSparse`.

    Attributes:
      count: `[]` int32, how many distinct rows there are.
      num_rows: rows of the table.
    """

    def __init__(self, grad: Listed | RowSparse):
        self.grad, self.num_rows = grad, grad.num_rows
        n = grad.indices.size
        self.block = min(tuning.block_rows, n)
        if isinstance(grad, RowSparse):
            self.indices, self.window = grad.indices, n
            self.count = jnp.sum(grad.indices < self.num_rows, dtype=jnp.int32)
        else:
            self.slot, indices, self.count = first_seen(grad.indices, self.num_rows)
            row_bytes = 4 * prod(grad.shape[1:])
            self.window = tuning.window_rows(n, row_bytes)
            beyond = self.num_rows + n + jnp.arange(self.window, dtype=indices.dtype)
            self.indices = jnp.concatenate([indices, beyond])

    def each(self, body: Body, carry: Any) -> Any:
        """`carry` after `body(indices, rows, carry)` for every block."""
        if isinstance(self.grad, RowSparse):
            return self._blocks(self.grad.rows, 0, self.count, body, carry)
        grad = self.grad

        def window(number: Array, carry: Any) -> Any:
            first = number * self.window
            rows = grad.sums(self.slot, first, self.window)
            here = jnp.minimum(self.count - first, self.window)
            return self._blocks(rows, first, here, body, carry)

        if self.window >= grad.indices.size:
            return window(jnp.int32(0), carry)
        return jax.lax.fori_loop(0, _blocks(self.count, self.window), window, carry)

    def _blocks(self, rows: Array, first: Any, count: Array, body: Body, carry: Any) -> Any:
        """`body` on the first `count` of `rows`, whose indices begin at `first`."""
        size = self.block
        last = rows.shape[0] - size

        def one(number: Array, carry: Any) -> Any:
            start = jnp.minimum(number * size, last)
            indices = jax.lax.dynamic_slice_in_dim(self.indices, first + start, size)
            own = jax.lax.dynamic_slice_in_dim(rows, start, size)
            # A block that would reach beyond the end begins earlier; its first rows were there.
            position = start + jnp.arange(size, dtype=indices.dtype)
            again = position < number * size
            beyond = self.num_rows + self.indices.size + position
            return body(jnp.where(again, beyond, indices), own, carry)

        return jax.lax.fori_loop(0, _blocks(count, size), one, carry)


def _blocks(count: Array, size: int) -> Array:
    return (count + (size - 1)) // size
