"""`value_and_grad` and `grad`: as in JAX, with row-sparse gradients for tables."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparse_embed._container import RowSparse
from sparse_embed._core import argument_numbers, check_function, in_blocks
from sparse_embed._differentiate.program import Tables, trace
from sparse_embed._differentiate.taps import is_listed, value_and_listed


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: Tables = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad`, with a `RowSparse` for each leaf that `fun` reads only by row.

    The value is exactly that of `fun`. For a table `T` read as `T[ids]`, the gradient lists the
    distinct `ids` with `sum over i with ids[i] == r of dL/d(T[ids])[i]` as row `r`; no array of the
    table's size is made. Lookups may be written in any way that reads whole rows: `se.lookup`,
    `jnp.take(table, ids, axis=0)`, `table[ids]`, flax and equinox embeddings; inside `jit`, `vmap`,
    `scan`, `cond`, `checkpoint` and `shard_map`; after row-wise operations such as a cast; and
    through views of rows: slices, flips, padding, concatenations, masks, transposes, reshapes.
    Of a stack of tables read as `T[f, ids]`, or of `T[:, ids]`, the gradient says which axes number
    its rows (`RowSparse.row_axes`).

    A table that is also used whole gets a dense gradient, and one warning that names the operation
    and its line; so does one that is read along several axes (`T[f, ids]` and `T[f]`). A
    leaf read only at constant places (`p[0]`, `p[:10]`) is dense.

    Args:
      fun: function with a scalar value, or `(value, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate.
      has_aux: whether `fun` returns `(value, aux)`.
      tables: which leaves must come back as `RowSparse`: a predicate on `(path, leaf)`, or a tree
        of bools like the argument. For these a whole use is an error; other leaves are dense.

    Returns:
      A function of the same arguments that returns `(value, grads)`, or `((value, aux), grads)`.
      Gradients have the structure and dtypes of the arguments; each `RowSparse` is coalesced.

    Raises:
      ValueError: when called, where `tables` names a leaf that is used whole.
      TypeError: `fun` is no function, or `argnums` no argument numbers; when called, JAX's own, for
        integer arguments or a value that is not a scalar.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2)), "w": jnp.ones(2)}
      >>> loss = lambda p, ids: jnp.sum(p["table"][ids] @ p["w"])
      >>> value, grads = se.value_and_grad(loss)(params, jnp.array([7, 3, 7]))
      >>> grads["table"].indices.tolist(), grads["table"].rows.tolist()
      ([3, 7, 1000], [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
      >>> grads["w"].tolist()
      [3.0, 3.0]
    """
    check_function(fun, "se.value_and_grad(fun)", "se.value_and_grad(loss_fn)(params, batch)")
    argnums = argument_numbers(argnums, "se.value_and_grad(fun, argnums)")
    listing = value_and_listed(fun, argnums, has_aux, tables=tables)

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        program = trace(fun, argnums, args, kwargs)
        value, grads, _ = listing(program, *args, **kwargs)
        return value, gradients(grads)

    return value_and_grad_fun


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: Tables = None,
) -> Callable[..., Any]:
    """`jax.grad`, with a `RowSparse` for each leaf that `fun` reads only by row.

    Args:
      fun: as in `value_and_grad`.
      argnums: as in `value_and_grad`.
      has_aux: as in `value_and_grad`.
      tables: as in `value_and_grad`.

    Returns:
      A function of the same arguments that returns `grads`, or `(grads, aux)` with `has_aux`. Of a
      table `[V, *features]` it is a `RowSparse` with rows `[n, *features]`.

    Raises:
      ValueError: as `value_and_grad`.
      TypeError: as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.grad(lambda t: jnp.sum(t[jnp.array([2])]))(jnp.ones((4, 1))).indices.tolist()
      [2]
    """
    check_function(fun, "se.grad(fun)", "se.grad(loss_fn)(params, batch)")
    argnums = argument_numbers(argnums, "se.grad(fun, argnums)")
    both = value_and_grad(fun, argnums, has_aux, tables=tables)

    def grad_fun(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fun


def gradients(listed: Any) -> Any:
    """A tree as of `value_and_listed`, with a `RowSparse` for each table."""
    return jax.tree.map(_coalesced, listed, is_leaf=is_listed)


def _coalesced(grad: Any) -> Any:
    if not is_listed(grad):
        return grad
    return RowSparse._deferred(grad) if in_blocks(grad.indices) else grad.coalesced()
