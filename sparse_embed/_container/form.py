"""How the rows of a table lie in its array, where they are not simply its first axis."""

from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import Axes, message


class Form(NamedTuple):
    """An array `shape` whose rows run along `row_axes`, and are numbered in their order.

    Of a stack of tables `[F, V, D]` with `row_axes=(0, 1)`, row `v` of table `f` is `f * V + v`.
    """

    shape: tuple[int, ...]
    row_axes: Axes = (0,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.row_axes)

    @property
    def num_rows(self) -> int:
        return prod(self.sizes)

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(size for a, size in enumerate(self.shape) if a not in self.row_axes)

    @property
    def plain(self) -> bool:
        """Whether rows are the first axis, as nearly always."""
        return self.row_axes == (0,)

    @property
    def leading(self) -> bool:
        """Whether rows lie one after the other, so that the array can be seen as a plain table."""
        return self.row_axes == tuple(range(len(self.row_axes)))

    @property
    def flat(self) -> tuple[int, ...]:
        """The shape of the plain table that is the same array: of rows, or else of entries."""
        return (self.num_rows, *self.features) if self.leading else (prod(self.shape),)

    def entries(self, indices: Array) -> Array:
        """`[n, size of a row]`: where each entry of these rows lies in the array, laid flat.

        Entries of rows that there are not get distinct numbers beyond the array.
        """
        last = prod(self.shape) + indices.size * prod(self.features)
        if indices.dtype.itemsize < 8 and last >= 2**31:
            raise ValueError(
                message(
                    "a RowSparse whose rows are not its first axes: too many entries for int32.",
                    f"shape {self.shape}, row_axes {self.row_axes}",
                    "the table with its rows first, transposed in the model; or jax_enable_x64",
                )
            )
        strides = [prod(self.shape[a + 1 :]) for a in range(len(self.shape))]
        start, left = jnp.zeros_like(indices), indices
        for a, size in reversed(list(zip(self.row_axes, self.sizes, strict=True))):
            start += (left % size) * strides[a]
            left //= size
        offsets = jnp.zeros((), indices.dtype)
        for a, size in enumerate(self.shape):
            if a not in self.row_axes:
                own = jnp.arange(size, dtype=indices.dtype) * strides[a]
                offsets = offsets[..., None] + own
        found = start[:, None] + offsets.reshape(-1)
        inside = (indices >= 0) & (indices < self.num_rows)
        beyond = prod(self.shape) + jnp.arange(found.size, dtype=indices.dtype)
        return jnp.where(inside[:, None], found, beyond.reshape(found.shape))

    def row_and_feature(self, entries: Array) -> tuple[Array, Array]:
        """Of entries of the array, laid flat, the row and the place in it; `num_rows` for none."""
        row = feature = jnp.zeros_like(entries)
        for a, size in enumerate(self.shape):
            here = entries // prod(self.shape[a + 1 :]) % size
            row = row * size + here if a in self.row_axes else row
            feature = feature if a in self.row_axes else feature * size + here
        return jnp.where(entries < prod(self.shape), row, self.num_rows), feature


def row_axes_of(axes: Any, ndim: int) -> Axes | None:
    """`axes`, one or several, as they are kept: ascending; `None` if they are no axes."""
    given = axes if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(a, int) and -ndim <= a < ndim for a in given):
        return None
    own = tuple(sorted({a % ndim for a in given}))
    return own if own and len(own) == len(given) else None
