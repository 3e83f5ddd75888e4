"""Goes through the distinct rows of a gradient, a block at a time.

Letters: n listed rows, b rows of a block, V the rows of the table.
"""

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sparse_embed._container import (
    Block,
    Listed,
    RowSparse,
    Slots,
    blocks,
    distinct,
    each_block,
    hashable,
    slots_of_each,
)
from sparse_embed._core import tuning


def sweeps(grads: dict[int, Listed | RowSparse], ascending: Collection[int]) -> dict[int, "Sweep"]:
    """A sweep for each table. Tables of which as many rows are listed are prepared together."""
    own = {
        k: g.indices
        for k, g in grads.items()
        if isinstance(g, Listed) and k not in ascending and hashable(g.indices)
    }
    found = slots_of_each(own, {k: grads[k].num_rows for k in own})
    return {k: Sweep(g, k in ascending, found.get(k)) for k, g in grads.items()}


class Sweep:
    """The distinct rows of one gradient, with their summed gradients, in blocks.

    Whatever is carried from block to block is updated in place, tables included. Blocks hold as
    many rows as `tuning` says; the last one is filled up with padding, indices `>= V`.

    Args:
      grad: what the step lists of a table, or a coalesced `RowSparse`.
      ascending: whether rows are gone through in ascending order, as `coalesce` lists them. Any
        order is cheaper to find.
      slots: the distinct rows, where they were found before.

    Attributes:
      count: `[]` int32, how many distinct rows there are.
      num_rows: rows of the table.
      shape: of the table.
      ascending: whether the rows are gone through in ascending order.
      length: the most distinct rows that there can be.
      indices: the distinct rows in the order of the sweep, then padding.
    """

    def __init__(
        self, grad: Listed | RowSparse, ascending: bool = False, slots: Slots | None = None
    ):
        self.grad, self.num_rows, self.shape = grad, grad.num_rows, grad.shape
        self.ascending = True
        self.length = min(grad.indices.size, grad.num_rows)
        if isinstance(grad, RowSparse):
            self.indices = grad.indices
            self.count = jnp.sum(grad.indices < self.num_rows, dtype=jnp.int32)
            return
        n = grad.indices.size
        self.ascending = ascending or not hashable(grad.indices)
        if slots is None and self.ascending:
            slots = distinct(grad.indices, self.num_rows, n)
        elif slots is None:
            slots = slots_of_each({0: grad.indices}, {0: self.num_rows})[0]
        self.slot, indices, self.count = slots
        row_bytes = grad.dtype.itemsize * prod(grad.shape[1:])
        self.window = tuning.window_rows(n, row_bytes)
        beyond = self.num_rows + n + jnp.arange(self.window, dtype=indices.dtype)
        self.indices = jnp.concatenate([indices, beyond])

    def listed(self) -> Array:
        """`[length]`: the distinct rows in the order of the sweep, then padding."""
        return self.indices[: self.length]

    def room(self, dtype: DTypeLike) -> Array:
        """`[length, *features]` zeros."""
        return jnp.zeros((self.length, *self.shape[1:]), dtype)

    def each(self, body: Callable[[Block, Any], Any], carry: Any) -> Any:
        """`carry` after `body(block, carry)` for every block."""
        grad = self.grad
        if isinstance(grad, RowSparse):
            return each_block(body, carry, self.indices, grad.rows, self.count, self.num_rows)

        def window(number: Array, carry: Any) -> Any:
            first = number * self.window
            rows = grad.sums(self.slot, first, self.window)
            here = jnp.minimum(self.count - first, self.window)
            return each_block(body, carry, self.indices, rows, here, self.num_rows, first)

        if self.window >= grad.indices.size:
            return window(jnp.int32(0), carry)
        return jax.lax.fori_loop(0, blocks(self.count, self.window), window, carry)
