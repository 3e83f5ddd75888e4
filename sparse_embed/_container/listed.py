"""What a step lists of one table, before repeats are summed.

Letters: n listed rows, V the rows of the table, s slots.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container.form import Form
from sparse_embed._container.indices import distinct, flat_indices
from sparse_embed._container.row_sparse import RowSparse
from sparse_embed._container.segments import sum_dtype


class Part(NamedTuple):
    """The rows that one site lists: ids `[b]` with rows of their own, or bags that share one.

    `ids` is `[l, b]`, one line for each place in a bag, and `rows` `[b, *features]` the gradient
    of a bag's sum, which is that of each of its rows.
    """

    ids: Array  # [l, b]
    rows: Array  # [b, *features]


class Listed:
    """The gradient of one table as its sites list it.

    Attributes:
      indices: `[n]` as of `flat_indices`, part after part.
      form: shape and row axes of the table.
      dtype: of the rows.
    """

    def __init__(self, parts: Sequence[Part], form: Form | tuple[int, ...], dtype: jnp.dtype):
        self.form = form if isinstance(form, Form) else Form(form)
        self.parts, self.dtype = list(parts), jnp.dtype(dtype)
        ids = [flat_indices(p.ids.reshape(-1), self.num_rows) for p in self.parts]
        self.indices = jnp.concatenate(ids) if ids else jnp.zeros(0, jnp.int32)

    shape = property(lambda self: self.form.shape)
    num_rows = property(lambda self: self.form.num_rows)
    ndim = property(lambda self: len(self.shape))

    def after(self, zero: Array) -> "Listed":
        """The same, whose indices wait for a `zero` to be known."""
        out = Listed((), self.form, self.dtype)
        out.parts, out.indices = self.parts, self.indices + zero.astype(self.indices.dtype)
        return out

    def sums(self, slot: Array, first: Array | int, size: int) -> Array:
        """`[size, *features]`: the rows that go to slots `first`, ..., `first + size - 1`, summed.

        Args:
          slot: `[n]` where each listed row goes.
          first: the first slot.
          size: how many.

        Returns:
          The sums, made in at least float32 and rounded once.
        """
        return _sums(self.parts, slot, first, size, self.form.features, self.dtype)

    def coalesced(self) -> RowSparse:
        """The `RowSparse` with each row listed once, ascending, padding last."""
        size = min(self.indices.size, self.num_rows)
        indices, rows = _coalesced(self.parts, self.indices, size, self.form, self.dtype)
        return RowSparse._make(indices, rows, self.form, True)

    def unsummed(self) -> "Listed":
        """What lists the same and may repeat rows."""
        return self

    def added_to(self, table: Array) -> Array:
        """`table` with the gradient added."""
        return table + self.coalesced()


def as_listed(grad: RowSparse) -> Listed:
    """A gradient whose rows may repeat."""
    return Listed([Part(grad.indices[None], grad.rows)], grad.form, grad.dtype)


def _sums(
    parts: Sequence[Part],
    slot: Array,
    first: Array | int,
    size: int,
    features: tuple[int, ...],
    dtype: jnp.dtype,
) -> Array:
    total = jnp.zeros((size, *features), sum_dtype(dtype))
    start = 0
    for part in parts:
        places, bags = part.ids.shape
        own = slot[start : start + places * bags] - first
        # Scatters count negative numbers from the end.
        own = jnp.where(own < 0, size, own).reshape(places, bags)
        total = _add(total, own, part.rows.astype(total.dtype))
        start += places * bags
    return total.astype(dtype)


@partial(jax.jit, inline=True, static_argnums=(2, 3, 4))  # outside of any other jit it is one call
def _coalesced(
    parts: Sequence[Part], indices: Array, size: int, form: Form, dtype: jnp.dtype
) -> tuple[Array, Array]:
    slots = distinct(indices, form.num_rows, size)
    return slots.indices, _sums(parts, slots.slot, 0, size, form.features, dtype)


def _add(total: Array, slot: Array, rows: Array) -> Array:
    """Adds `rows` `[b, *features]` to the slots of every place `[l, b]`, place after place."""
    total = total.at[slot[0]].add(rows, mode="drop")

    # One scatter for each place: a single one would first lay each bag's row out l times.
    def place(number: Array, total: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(slot, number, keepdims=False)
        return total.at[own].add(rows, mode="drop")

    return jax.lax.fori_loop(1, slot.shape[0], place, total) if slot.shape[0] > 1 else total
