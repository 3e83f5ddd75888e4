"""Norms of gradients that mix dense leaves and `RowSparse`."""

from numbers import Number
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from sparse_embed._container import is_row_sparse, summed
from sparse_embed._core import check_scalar, describe, message
from sparse_embed._lazy.lift import lazy


def global_norm(updates: Any) -> Array:
    """The Euclidean norm of all entries of a tree.

    `sqrt(sum over leaves of sum(|x|^2))`; repeats of a row are summed first, so the result is that
    of the dense tree.

    Args:
      updates: tree of arrays of any shape and `RowSparse`.

    Returns:
      `[]`, a scalar in the widest dtype of the leaves.

    Raises:
      TypeError: a leaf is neither an array nor a `RowSparse`.
      ValueError: a `RowSparse` is a stack of several, as by `vmap`.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> g = se.RowSparse(jnp.array([3, 3]), jnp.array([[1.0], [2.0]]), (9, 1))
      >>> float(se.global_norm({"table": g, "w": jnp.array([4.0])}))
      5.0
    """
    leaves = jax.tree.leaves(updates, is_leaf=is_row_sparse)
    for x in leaves:
        if not is_row_sparse(x) and not isinstance(x, Number | np.ndarray | np.generic | Array):
            wrote = "se.global_norm(grads): a leaf is no array."
            raise TypeError(
                message(wrote, describe(x), "se.global_norm(grads) of a tree of arrays")
            )
    # Padding rows of a coalesced gradient are zero, so its rows have the norm of the whole.
    rows = [summed(x, "se.global_norm(grads)").rows if is_row_sparse(x) else x for x in leaves]
    return optax.tree.norm(rows)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for trees that mix dense leaves and `RowSparse`.

    `g * min(1, max_norm / global_norm(g))`. Inside `se.lazy(optax.chain(...))` optax's own does the
    same; this one stands outside.

    Args:
      max_norm: `[]`, the largest norm to let through.

    Returns:
      An optax transformation. It keeps no state; updates keep their shapes and dtypes.

    Raises:
      TypeError: `max_norm` is not a number.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> g = {"table": se.RowSparse(jnp.array([3, 3]), jnp.array([[1.0], [3.0]]), (9, 1))}
      >>> clip = se.clip_by_global_norm(1.0)
      >>> clipped, _ = clip.update(g, clip.init({"table": jnp.ones((9, 1))}))
      >>> clipped["table"].rows.tolist()
      [[1.0], [0.0]]
    """
    call = "se.clip_by_global_norm(max_norm)"
    check_scalar(max_norm, "max_norm", call, "se.clip_by_global_norm(1.0)")
    return lazy(optax.clip_by_global_norm(max_norm))
