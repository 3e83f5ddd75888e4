"""`renorm`: a bound on the norm of the rows that are about to be looked up."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container import as_integers, flat_indices, gather_rows, sum_dtype
from sparse_embed._core import check_scalar
from sparse_embed._lookup.ids import as_table


def renorm(table: ArrayLike, ids: ArrayLike, max_norm: float, norm_type: float = 2.0) -> Array:
    """The table with the rows that `ids` name scaled down to norm `max_norm`.

    `row * max_norm / (norm(row) + 1e-7)` where `norm(row) > max_norm`, once however often
    the row is named. Every other row keeps its bits. With the table donated, the rows are
    written in place.

    It changes the parameters and is no part of the loss: nothing is to be differentiated
    through it. Call it on the table before `se.value_and_grad`, not inside the loss.

    Args:
      table: `[V, *features]` floats. The norm of a row is taken over all its features.
      ids: integers of any shape and integer dtype. Those outside `[0, V)` are ignored.
      max_norm: the largest norm a named row may keep.
      norm_type: the p of the p-norm; `jnp.inf` for the largest absolute value.

    Returns:
      `[V, *features]` in the table's dtype; norms are computed in at least float32.

    Raises:
      TypeError: `table` is not an array of floats, `ids` are not integers, or `max_norm` or
        `norm_type` is not a number.
      ValueError: `table` is a scalar.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> table = jnp.array([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]])
      >>> se.renorm(table, jnp.array([0, 2, 0]), max_norm=2.5).tolist()
      [[1.50, 2.00], [30.0, 40.0], [0.300, 0.400]]

    This is `max_norm` of `torch.nn.functional.embedding`.
    """
    call = "se.renorm(table, ids, max_norm)"
    check_scalar(max_norm, "max_norm", call, "se.renorm(table, ids, max_norm=1.0)")
    check_scalar(norm_type, "norm_type", call, "norm_type=2.0, or jnp.inf")
    table = as_table(table, call)
    indices = flat_indices(as_integers(ids, "ids", call).reshape(-1), table.shape[0])
    if table.size == 0 or indices.size == 0:
        return table
    rows = gather_rows(table, indices)  # [n, *features]
    wide = rows.astype(sum_dtype(rows.dtype)).reshape(indices.size, -1)
    norm = jnp.linalg.norm(wide, ord=norm_type, axis=1, keepdims=True)  # [n, 1]
    scaled = (wide * (max_norm / (norm + 1e-7))).astype(rows.dtype)
    kept = jnp.where(norm > max_norm, scaled, rows.reshape(indices.size, -1))
    # Repeats write the same bits, so their order does not matter.
    return table.at[indices].set(kept.reshape(rows.shape), mode="drop")
