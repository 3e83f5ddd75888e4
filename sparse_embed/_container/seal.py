"""How harm to the indices of a `RowSparse` is noticed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_embed._container.segments import nan_where
from sparse_embed._core import describe, is_concrete, message

# A leaf that travels with the indices. Whatever a tree-mapped transform does to the indices it
# does to this number too, and scaling, clipping, shifting or rounding never leave it as it is.
SEAL = np.int32(0x5EA1ED)


def unharmed(indices: Array, rows: Array, seal: Any, caller: str) -> tuple[Array, Array]:
    """Indices and rows, known to be unharmed.

    Args:
      indices: `[n]` integers.
      rows: `[n, *features]`.
      seal: what has become of `SEAL`.
      caller: how the user wrote the call, for the message.

    Returns:
      Both; where only run-time values can tell, with rows that are NaN if there was harm.

    Raises:
      TypeError, ValueError: a stock transform changed the indices.
    """
    if jnp.ndim(indices) != 1:
        raise ValueError(
            message(
                f"{caller}: a RowSparse that was stacked or batched, as by scan or vmap.",
                f"indices {describe(indices)}, rows {describe(rows)}",
                "jax.vmap of this call; or, for the sum of the batch, RowSparse("
                "g.indices.reshape(-1), g.rows.reshape(-1, *g.shape[1:]), g.shape)",
            )
        )
    advice = (
        "se.lazy(chain) around the whole optax chain: tx = se.lazy(optax.adam(1e-3)); to add two "
        "gradients: a + b for each table, jax.tree.map(..., is_leaf=lambda x: isinstance(x, "
        "se.RowSparse)); for a norm: se.global_norm"
    )
    wrote = f"{caller}: a transform mapped over the leaves of a RowSparse changed its indices."
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in (seal, indices)):
        raise TypeError(message(wrote, f"indices {describe(indices)}", advice))
    if is_concrete(seal):
        if np.all(np.asarray(seal) == SEAL):
            return indices, rows
        raise ValueError(message(wrote, f"indices {describe(indices)} with other values", advice))
    harmed = jnp.any(seal != SEAL)
    # Harmed indices may all point outside the table: the NaN must land in rows that exist.
    first = jnp.arange(indices.size, dtype=indices.dtype)
    return jnp.where(harmed, first, indices), nan_where(harmed, rows)
