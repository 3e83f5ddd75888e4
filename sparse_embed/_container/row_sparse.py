"""`RowSparse`: some rows of a table-shaped array, the rest being zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container.each_block import add_rows
from sparse_embed._container.indices import Slots, distinct, flat_indices
from sparse_embed._container.seal import SEAL, unharmed
from sparse_embed._container.segments import segment_sum
from sparse_embed._core import describe, message


@jax.tree_util.register_pytree_with_keys_class
class RowSparse:
    """Rows of an array of shape `shape`; rows that are not listed are zero.

    The dense value is `zeros(shape).at[indices].add(rows)`. Indices `>= num_rows` are padding and
    change nothing; negative indices never wrap, they are padding too. A row may be listed more
    than once: `coalesce` sums its repeats.

    Arithmetic: `a + b` joins two of the same shape, `a * scalar` and `-a` act on the rows, and
    `table + a` is the dense updated table, so that `optax.apply_updates` works as it is.

    `optax` transforms map over every leaf of a tree and would change the indices as well. Put
    the chain inside `se.lazy`; where that was forgotten, whatever reads the container next raises,
    or, inside a compiled function, turns the rows into NaN.

    Args:
      indices: `[n]` integers, the row numbers.
      rows: `[n, *features]` floats, the rows that belong to `indices`.
      shape: `(num_rows, *features)`, the shape of the table. Static.

    Raises:
      TypeError: `indices` are not integers.
      ValueError: the shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> g = se.RowSparse(jnp.array([2, 0, 2]), jnp.ones((3, 2)), (4, 2))
      >>> g.todense().tolist()
      [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
      >>> (jnp.zeros((4, 2)) + g * 0.5)[2].tolist()
      [1.0, 1.0]
    """

    __slots__ = ("indices", "rows", "shape", "coalesced", "_seal", "_source")
    __array_ufunc__ = None  # numpy must leave `table + row_sparse` to this class

    indices: Array  # [n]
    rows: Array  # [n, *features]
    shape: tuple[int, ...]
    coalesced: bool  # rows ascending and distinct, padding last: as `coalesce` returns them

    def __init__(self, indices: ArrayLike, rows: ArrayLike, shape: tuple[int, ...]):
        indices, rows, shape = jnp.asarray(indices), jnp.asarray(rows), tuple(shape)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(
                message(
                    "RowSparse(indices, rows, shape): indices must be integers.",
                    f"indices {describe(indices)}",
                    "RowSparse(indices.astype(jnp.int32), rows, shape)",
                )
            )
        if indices.ndim != 1 or not shape or rows.shape != indices.shape + shape[1:]:
            raise ValueError(
                message(
                    "RowSparse(indices, rows, shape): expected indices [n], rows [n, *features] "
                    "and shape (num_rows, *features).",
                    f"indices {describe(indices)}, rows {describe(rows)}, shape {shape}",
                    "RowSparse(ids.reshape(-1), rows.reshape(-1, *table.shape[1:]), table.shape)",
                )
            )
        self._fill(indices, rows, shape, False, SEAL)

    def _fill(
        self, indices: Any, rows: Any, shape: tuple[int, ...], coalesced: bool, seal: Any
    ) -> RowSparse:
        self.indices, self.rows, self.shape = indices, rows, shape
        self.coalesced, self._seal, self._source = coalesced, seal, None
        return self

    @classmethod
    def _make(
        cls, indices: Array, rows: Array, shape: tuple[int, ...], coalesced: bool
    ) -> RowSparse:
        """Builds one without the checks, from arrays known to belong together."""
        return cls.__new__(cls)._fill(indices, rows, shape, coalesced, SEAL)

    @classmethod
    def _deferred(cls, source: Any) -> RowSparse:
        """That of a source, made when its indices or rows are asked for.

        Sources are `Listed` and `DeferredUpdate`: `shape`, `dtype`, `coalesced()` makes the
        `RowSparse`, `unsummed()` what has the same sums, `added_to(table)` the table with it.

        Within one compiled step they may never be: gradients are then summed, and updates added to
        their table, a few at a time.
        """
        out = cls.__new__(cls)
        out.shape, out.coalesced, out._seal, out._source = source.shape, True, SEAL, source
        return out

    def __getattr__(self, name: str) -> Any:  # asked for an attribute that is not there
        if name in ("indices", "rows") and self._source is not None:
            return getattr(self._source.coalesced(), name)
        raise AttributeError(f"RowSparse has no attribute {name!r}")

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.GetAttrKey, ("indices", "rows", "seal"))
        made = self if self._source is None else self._source.coalesced()
        leaves = (made.indices, made.rows, self._seal)
        return tuple(zip(keys, leaves, strict=True)), (self.shape, self.coalesced)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> RowSparse:
        # No checks here: jax unflattens with placeholders of every kind.
        indices, rows, seal = children
        return cls.__new__(cls)._fill(indices, rows, aux[0], aux[1], seal)

    num_rows = property(lambda self: self.shape[0], doc="Rows of the table.")
    ndim = property(lambda self: len(self.shape), doc="Dimensions of the table.")
    dtype = property(lambda self: (self._source or self.rows).dtype, doc="dtype of the rows.")

    def todense(self) -> Array:
        """The dense array, `shape`; repeats are summed in at least float32."""
        return jnp.zeros(self.shape, self.dtype) + self

    def __radd__(self, table: ArrayLike) -> Any:
        if isinstance(table, int) and table == 0:  # the start of `sum([a, b])`
            return self
        table = jnp.asarray(table)
        if table.shape != self.shape:
            raise ValueError(
                message(
                    "table + row_sparse: they are of different shapes.",
                    f"table {describe(table)}, RowSparse of shape {self.shape}",
                    "table + row_sparse with the table that the gradient was taken of",
                )
            )
        if self._source is not None:
            return self._source.added_to(table)
        grad = summed(self, "table + row_sparse")
        return add_rows(table, grad.indices, grad.rows)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if other.shape != self.shape:
            raise ValueError(
                message(
                    "a + b: two RowSparse of different shapes.",
                    f"shapes {self.shape} and {other.shape}",
                    "a.todense() + ..., or add gradients of the same table",
                )
            )
        a, b = verified(self, "a + b"), verified(other, "a + b")
        indices = jnp.concatenate([a.indices, b.indices])
        return RowSparse._make(indices, jnp.concatenate([a.rows, b.rows]), a.shape, False)

    def __mul__(self, scalar: ArrayLike) -> RowSparse:
        if jnp.ndim(scalar) != 0:
            raise ValueError(
                message(
                    "row_sparse * x: x must be a scalar.",
                    describe(scalar),
                    "RowSparse(g.indices, g.rows * x[g.indices], g.shape)",
                )
            )
        grad = verified(self, "row_sparse * scalar")
        rows = (grad.rows * scalar).astype(grad.dtype)
        return RowSparse._make(grad.indices, rows, grad.shape, grad.coalesced)

    __rmul__ = __mul__

    def __neg__(self) -> RowSparse:
        return self * -1

    def __truediv__(self, scalar: ArrayLike) -> RowSparse:
        return self * (1 / scalar)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __repr__(self) -> str:
        listed = getattr(self.indices, "shape", "?")
        return f"RowSparse({describe(self.rows)} at indices {listed}, shape={self.shape})"


def is_row_sparse(x: Any) -> bool:
    """`isinstance(x, RowSparse)`, to be given to `jax.tree.map(..., is_leaf=)`."""
    return isinstance(x, RowSparse)


def verified(grad: RowSparse, caller: str) -> RowSparse:
    """`grad` with its indices known to be unharmed.

    Args:
      grad: any RowSparse.
      caller: how the user wrote the call, for the message.

    Returns:
      `grad`; where only run-time values can tell, with rows that are NaN if it was harmed.

    Raises:
      TypeError, ValueError: a stock transform changed the indices.
    """
    if grad._source is not None:  # it has no leaves yet that a transform could change
        return grad
    indices, rows = unharmed(grad.indices, grad.rows, grad._seal, caller)
    if indices is grad.indices:
        return grad
    return RowSparse._make(indices, rows, grad.shape, grad.coalesced)


def summed(grad: RowSparse, caller: str) -> RowSparse:
    """`grad` verified, each row listed once and ascending, its repeats summed, padding last."""
    grad = unsummed(grad, caller)
    if not isinstance(grad, RowSparse):
        return grad.coalesced()
    return grad if grad.coalesced else sum_repeats(grad, min(grad.indices.size, grad.num_rows))[0]


def unsummed(grad: RowSparse, caller: str) -> Any:
    """`grad` verified; or, where its repeats are not summed yet, the `Listed` it is made of."""
    grad = verified(grad, caller)
    return grad if grad._source is None else grad._source.unsummed()


def sum_repeats(grad: RowSparse, size: int) -> tuple[RowSparse, Slots]:
    """`grad` with each row listed once, in `size` entries, and where its entries went."""
    indices = flat_indices(grad.indices, grad.num_rows)
    slots = distinct(indices, grad.num_rows, size)
    rows = segment_sum(grad.rows, slots.slot, size)
    return RowSparse._make(slots.indices, rows, grad.shape, True), slots
