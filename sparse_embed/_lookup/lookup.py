"""`lookup`: the rows of a table that ids name."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container import PADDED, distinct, flat_indices, segment_count, sum_dtype
from sparse_embed._lookup.ids import (
    Mode,
    as_table,
    over_features,
    padding_row,
    read_rows,
    row_numbers,
)


def lookup(
    table: ArrayLike,
    ids: ArrayLike,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    mode: Mode = "fill",
) -> Array:
    """Reads the rows that `ids` name: `table[ids]`, made safe at the edges.

    `out[..., :] = table[ids[...], :]`. It is plain differentiable JAX: `jax.grad` gives the
    dense gradient, `se.value_and_grad` a `RowSparse` of the rows that were read.

    Args:
      table: `[V, *features]` floats.
      ids: integers of any shape and integer dtype.
      padding_idx: this row is read as any other, but it gets no gradient and is not listed
        in one. May be negative: `-1` is the last row. (An id of `-1` is not padding, it is
        out of range.)
      scale_grad_by_freq: divide the gradient of each id by how often the id occurs in this
        call: a row gets the mean of its contributions instead of their sum.
      mode: what an id outside `[0, V)` reads, negative ones included. `"fill"`: NaN, and it
        gets no gradient. `"clip"`: the nearest row, which also gets the gradient.

    Returns:
      `[*ids.shape, *features]` in the table's dtype.

    Raises:
      TypeError: `table` is not an array of floats, or `ids` are not integers.
      ValueError: `table` is a scalar, `padding_idx` is outside `[-V, V)`, or `mode` is
        unknown.

    Example:
      >>> import jax, jax.numpy as jnp, sparse_embed as se
      >>> table = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
      >>> se.lookup(table, jnp.array([2, 0, 3])).tolist()
      [[4.0, 5.0], [0.0, 1.0], [nan, nan]]
      >>> loss = lambda table: se.lookup(table, jnp.array([2, 0, 2]), padding_idx=0).sum()
      >>> jax.grad(loss)(table).tolist()
      [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]

    The options are those of `torch.nn.functional.embedding`.
    """
    call = "se.lookup(table, ids)"
    table = as_table(table, call)
    num_rows = table.shape[0]
    indices = row_numbers(ids, num_rows, mode, call)
    if padding_idx is None:
        rows = read_rows(table, indices)
    else:
        pad = padding_row(padding_idx, num_rows, call)
        is_pad = indices == pad
        # Padding is sent out of range, so that no gradient lists it; its value comes from a
        # read at a constant row.
        indices = jnp.where(is_pad, PADDED, indices)
        rows = read_rows(table, indices)
        value = jax.lax.index_in_dim(jax.lax.stop_gradient(table), pad, keepdims=False)
        is_pad = over_features(is_pad, rows.ndim)
        rows = jnp.where(is_pad, jnp.broadcast_to(value, rows.shape), rows)
    if scale_grad_by_freq:
        count = _frequency(indices, num_rows)
        rows = _divide_gradient(rows, over_features(count, rows.ndim))
    return rows


def _frequency(indices: Array, num_rows: int) -> Array:
    """How often each entry of `indices` occurs there: int32 of its shape, at least 1."""
    flat = flat_indices(indices.reshape(-1), num_rows)
    slots = distinct(flat, num_rows, flat.size + 1)
    counts = segment_count(slots.slot, flat.size + 1)
    return counts.at[slots.slot].get(mode="fill", fill_value=1).reshape(indices.shape)


@jax.custom_jvp
def _divide_gradient(rows: Array, count: Array) -> Array:
    """`rows` to the bit; whatever is differentiated through them is divided by `count`."""
    return rows


@_divide_gradient.defjvp
def _divide_gradient_jvp(primals, tangents):
    rows, count = primals
    wide = sum_dtype(rows.dtype)
    scaled = tangents[0].astype(wide) / count.astype(wide)
    return _divide_gradient(rows, count), scaled.astype(rows.dtype)
