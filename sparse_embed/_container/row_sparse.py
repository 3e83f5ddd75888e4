"""`RowSparse`: some rows of a table-shaped array, the rest being zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container.added import add_to
from sparse_embed._container.form import Form, row_axes_of
from sparse_embed._container.indices import as_integers, widened
from sparse_embed._container.row_numbers import locked, unlocked
from sparse_embed._container.segments import sum_repeats
from sparse_embed._core import describe, is_concrete, message


@jax.tree_util.register_pytree_with_keys_class
class RowSparse:
    """Rows of an array of shape `shape`; rows that are not listed are zero.

    The dense value is `zeros(shape).at[indices].add(rows)`. Indices `>= num_rows` are padding and
    change nothing; negative indices never wrap, they are padding too. A row may be listed more
    than once: `coalesce` sums its repeats.

    Arithmetic: `a + b` joins two of the same shape, `a * scalar` and `-a` act on the rows, and
    `table + a` is the dense updated table, so that `optax.apply_updates` works as it is.

    It is a pytree of row numbers and rows. The row numbers leave it as an array of a dtype of their
    own, `key<whole chain inside se.lazy>`: a stock optax transform that would change them, or count
    them, raises while it is traced. Put the whole chain inside `se.lazy`, or take `se.global_norm`.

    Rows are the first axis of a table. Those of a stack `[F, V, D]`, read as `tables[f, ids]`, are
    numbered by two, `row_axes=(0, 1)`: row `v` of table `f` is `f * V + v`. Those of a table that
    is read as `table[:, ids]` run along the second, `row_axes=(1,)`.

    Args:
      indices: `[n]` integers, the row numbers.
      rows: `[n, *features]` floats, the rows that belong to `indices`.
      shape: `(num_rows, *features)`, the shape of the table. Static.
      row_axes: the axes of the table that number its rows; `features` are all others. Static.

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

    __slots__ = ("_indices", "_locked", "_rows", "_source", "coalesced", "form")
    __array_ufunc__ = None  # numpy must leave `table + row_sparse` to this class

    form: Form  # its shape and row axes
    coalesced: bool  # rows ascending and distinct, padding last: as `coalesce` returns them

    def __init__(
        self, indices: ArrayLike, rows: ArrayLike, shape: tuple[int, ...], *, row_axes: Any = (0,)
    ):
        indices = widened(as_integers(indices, "indices", "RowSparse(indices, rows, shape)"))
        rows, shape = jnp.asarray(rows), tuple(shape)
        axes = row_axes_of(row_axes, len(shape))
        form = Form(shape, axes or ())
        if indices.ndim != 1 or not axes or rows.shape != indices.shape + form.features:
            raise ValueError(
                message(
                    "RowSparse(indices, rows, shape): expected indices [n], rows [n, *features] "
                    "and shape (num_rows, *features).",
                    f"indices {describe(indices)}, rows {describe(rows)}, shape {shape}, "
                    f"row_axes={row_axes}",
                    "RowSparse(ids.reshape(-1), rows.reshape(-1, *table.shape[1:]), table.shape)",
                )
            )
        self._fill(indices, _NONE, rows, form, False)

    def _fill(self, *parts: Any) -> RowSparse:
        self._indices, self._locked, self._rows, self.form, self.coalesced = parts
        self._source = None
        return self

    @classmethod
    def _make(
        cls, indices: Array, rows: Array, form: Form | tuple[int, ...], coalesced: bool
    ) -> RowSparse:
        """Builds one without the checks, from arrays known to belong together."""
        form = form if isinstance(form, Form) else Form(form)
        return cls.__new__(cls)._fill(indices, _NONE, rows, form, coalesced)

    @classmethod
    def _deferred(cls, source: Any) -> RowSparse:
        """That of a source, made when its indices or rows are asked for.

        Sources are `Listed` and `DeferredUpdate`: `form`, `dtype`, `coalesced()` makes the
        `RowSparse`, `unsummed()` what has the same sums, `added_to(table)` the table with it, a few
        rows at a time.
        """
        out = cls.__new__(cls)._fill(_NONE, _NONE, _NONE, source.form, True)
        out._source = source
        return out

    @property
    def indices(self) -> Array:
        """`[n]` integers: the row to which each of `rows` belongs; `>= num_rows` for none."""
        if self._source is not None:
            return self._source.coalesced().indices
        if self._indices is not _NONE:
            return self._indices
        indices = unlocked(self._locked)
        if isinstance(indices, Array) and is_concrete(indices):  # a tracer ends with its trace
            self._indices = indices
        return indices

    @property
    def rows(self) -> Array:
        """`[n, *features]`."""
        return self._rows if self._source is None else self._source.coalesced().rows

    def tree_flatten_with_keys(self):
        made = self if self._source is None else self._source.coalesced()
        numbers = made._locked
        if numbers is _NONE:
            numbers = locked(made._indices)
            if is_concrete(numbers):
                made._locked = numbers
        return ((_INDICES, numbers), (_ROWS, made._rows)), made.form

    @classmethod
    def tree_unflatten(cls, form: Form, children: tuple[Any, ...]) -> RowSparse:
        # No checks here: jax unflattens with placeholders of every kind. Nor is it known what was
        # mapped over the leaves: lists may have been joined, cut or mixed, so repeats are possible.
        return cls.__new__(cls)._fill(_NONE, *children, form, False)

    def __reduce__(self) -> Any:
        return RowSparse._make, (self.indices, self.rows, self.form, self.coalesced)

    shape = property(lambda self: self.form.shape, doc="Shape of the table.")
    row_axes = property(lambda self: self.form.row_axes, doc="Its axes that number its rows.")
    num_rows = property(lambda self: self.form.num_rows, doc="Rows of the table.")
    ndim = property(lambda self: len(self.shape), doc="Dimensions of the table.")
    dtype = property(lambda self: (self._source or self._rows).dtype, doc="dtype of the rows.")

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
        return add_to(table, grad.form, grad.indices, grad.rows)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if other.form != self.form:
            raise ValueError(
                message(
                    "a + b: two RowSparse of different shapes.",
                    f"{self!r} and {other!r}",
                    "a.todense() + ..., or add gradients of the same table",
                )
            )
        a, b = checked(self, "a + b"), checked(other, "a + b")
        indices = jnp.concatenate([a.indices, b.indices])
        return RowSparse._make(indices, jnp.concatenate([a.rows, b.rows]), a.form, False)

    def __mul__(self, scalar: ArrayLike) -> RowSparse:
        if jnp.ndim(scalar) != 0:
            wrote, instead = "row_sparse * x: x must be a scalar.", "g.rows * x[g.indices]"
            instead = f"RowSparse(g.indices, {instead}, g.shape)"
            raise ValueError(message(wrote, describe(scalar), instead))
        grad = checked(self, "row_sparse * scalar")
        rows = (grad.rows * scalar).astype(grad.dtype)
        return RowSparse._make(grad.indices, rows, grad.form, grad.coalesced)

    __rmul__ = __mul__

    def __neg__(self) -> RowSparse:
        return self * -1

    def __truediv__(self, scalar: ArrayLike) -> RowSparse:
        return self * (1 / scalar)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __repr__(self) -> str:
        listed = getattr(self.indices, "shape", "?")
        axes = "" if self.form.plain else f", row_axes={self.row_axes}"
        return f"RowSparse({describe(self.rows)} at indices {listed}, shape={self.shape}{axes})"


_NONE: Any = object()  # not there yet
_INDICES, _ROWS = map(jax.tree_util.GetAttrKey, ("indices", "rows"))


def is_row_sparse(x: Any) -> bool:
    """`isinstance(x, RowSparse)`, to be given to `jax.tree.map(..., is_leaf=)`."""
    return isinstance(x, RowSparse)


def checked(grad: RowSparse, caller: str) -> RowSparse:
    """`grad`; raises if it is a stack of several. `caller` is how the user wrote the call."""
    if grad._source is None and jnp.ndim(grad._rows) != 1 + len(grad.form.features):
        raise ValueError(
            message(
                f"{caller}: a RowSparse that was stacked or batched, as by scan or vmap.",
                f"indices {describe(grad.indices)}, rows {describe(grad.rows)}",
                "jax.vmap of this call; or, for the sum of the batch, RowSparse("
                "g.indices.reshape(-1), g.rows.reshape(-1, *g.shape[1:]), g.shape)",
            )
        )
    return grad


def summed(grad: RowSparse, caller: str) -> RowSparse:
    """`grad` checked, each row listed once and ascending, its repeats summed, padding last."""
    grad = unsummed(grad, caller)
    if not isinstance(grad, RowSparse):
        return grad.coalesced()
    if grad.coalesced:
        return grad
    size = min(grad.indices.size, grad.num_rows)
    slots, rows = sum_repeats(grad.indices, grad.rows, grad.num_rows, size)
    return RowSparse._make(slots.indices, rows, grad.form, True)


def unsummed(grad: RowSparse, caller: str) -> Any:
    """`grad` checked; or, where its repeats are not summed yet, the `Listed` it is made of."""
    grad = checked(grad, caller)
    return grad if grad._source is None else grad._source.unsummed()
