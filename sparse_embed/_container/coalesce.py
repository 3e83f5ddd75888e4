"""`coalesce`: each row listed once."""

from typing import Literal, overload

import jax.numpy as jnp
from jax import Array

from sparse_embed._container.row_sparse import RowSparse, checked
from sparse_embed._container.segments import nan_where, segment_count, sum_repeats
from sparse_embed._core import describe, is_concrete, message, whole_number


@overload
def coalesce(
    grad: RowSparse, *, size: int | None = None, return_counts: Literal[False] = False
) -> RowSparse: ...
@overload
def coalesce(
    grad: RowSparse, *, size: int | None = None, return_counts: Literal[True]
) -> tuple[RowSparse, Array]: ...
def coalesce(
    grad: RowSparse, *, size: int | None = None, return_counts: bool = False
) -> RowSparse | tuple[RowSparse, Array]:
    """Lists each row once, in ascending order, with its repeats summed.

    `rows_out[j] = sum of rows[i] over i with indices[i] == indices_out[j]`, added in the order
    of the list, in at least float32, and rounded once to the dtype of the rows.

    Args:
      grad: the gradient, `[n]` indices and `[n, *features]` rows.
      size: static length of the result. `None`: `min(n, num_rows)`, which always suffices.
      return_counts: also return how often each row was listed.

    Returns:
      A `RowSparse` of `size` entries, real rows first, then padding (distinct indices
      `>= num_rows`, zero rows); with `return_counts` also `[size]` int32, 0 for padding.

    Raises:
      TypeError: `grad` is not a `RowSparse`, or `size` is no whole number.
      ValueError: `grad` is a stack of several; `size` is below 1 where rows are listed, or smaller
        than the number of distinct rows. Inside a compiled function, where that number is not
        known, all rows come out as NaN instead: nothing is lost silently.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> g = se.RowSparse(jnp.array([7, 2, 7]), jnp.array([[1.0], [2.0], [4.0]]), (9, 1))
      >>> c, counts = se.coalesce(g, return_counts=True)
      >>> c.indices.tolist(), c.rows.tolist(), counts.tolist()
      ([2, 7, 9], [[2.0], [5.0], [0.0]], [1, 2, 0])
    """
    if not isinstance(grad, RowSparse):
        raise TypeError(
            message(
                "se.coalesce(grad): grad must be a RowSparse.",
                describe(grad),
                "se.coalesce(se.RowSparse(indices, rows, table.shape))",
            )
        )
    grad = checked(grad, "se.coalesce(grad)")
    enough = min(grad.indices.size, grad.num_rows)
    call = "se.coalesce(grad, size=...)"
    size = enough if size is None else whole_number(size, "size", call, "size=ids.size")
    if size < min(enough, 1):  # there would be no row to show that others are lost
        raise ValueError(
            message(
                f"{call}: there must be room for one row at least.",
                f"size={size} for {grad.indices.size} rows listed",
                "size=ids.size, or leave size out",
            )
        )
    slots, rows = sum_repeats(grad.indices, grad.rows, grad.num_rows, size)
    rows = _check_size(rows, slots.number, size) if size < enough else rows
    out = RowSparse._make(slots.indices, rows, grad.form, True)
    return (out, segment_count(slots.slot, size)) if return_counts else out


def _check_size(rows: Array, count: Array, size: int) -> Array:
    """Raises where more distinct rows were listed than fit; NaN where that is not known yet."""
    if not is_concrete(count):
        return nan_where(count > size, rows)
    if int(count) > size:
        raise ValueError(
            message(
                f"se.coalesce(grad, size={size}): size is too small, rows would be lost.",
                f"{int(count)} distinct rows",
                f"se.coalesce(grad, size={int(count)}), or leave size out",
            )
        )
    return jnp.asarray(rows)
