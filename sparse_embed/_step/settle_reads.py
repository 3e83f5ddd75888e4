"""Before an exact optimizer's gradient is taken, the rows that the loss reads are settled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_embed._core import as_jaxpr, used_inputs

Settle = Callable[..., tuple[Any, Any]]


def settle_reads(
    settle: Settle, rows_read: Callable[[Any], Any], params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """`params` and `opt_state` with all rows up to date that a function of `params` reads.

    Ids may depend on rows that other lookups read. Those must be settled before the ids are known;
    so rows are listed again after settling until the list stays the same. That takes as many rounds
    as lookups hang on one another, and none where the ids come from the batch alone.

    Args:
      settle: that of the optimizer.
      rows_read: params to the tree of `se.touched`.
      params: the parameters.
      opt_state: the state of the optimizer.

    Returns:
      `params` and `opt_state`.
    """
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    jaxpr, _ = as_jaxpr(lambda *leaves: rows_read(treedef.unflatten(leaves)), *leaves)
    rows = rows_read(params)
    if not any(used_inputs(jaxpr)):
        return settle(params, opt_state, rows, coalesced=True)

    def again(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        params, opt_state, _, rows = carry
        params, opt_state = settle(params, opt_state, rows, coalesced=True)
        return params, opt_state, rows, _together(rows_read(params))

    def changed(carry: tuple[Any, ...]) -> Any:
        _, _, before, after = carry
        differ = jax.tree.map(lambda a, b: jnp.any(a != b), before, after)
        return jnp.any(jnp.asarray(jax.tree.leaves(differ)))

    params, opt_state = jax.tree.map(jnp.asarray, (params, opt_state))
    none = jax.tree.map(lambda x: jnp.full_like(x, -1), rows)
    start = params, opt_state.as_settled(), none, _together(rows)  # as each round returns it
    params, opt_state, *_ = jax.lax.while_loop(changed, again, start)
    return params, opt_state


def _together(rows: Any) -> Any:
    """Makes the rows of each table wait for those of all others, which may be read from it.

    XLA writes a table in place only after every read of it, by data dependence; so each list gets
    a zero made of the others (no number is both above one and below zero).
    """
    listed = [x[0] for x in jax.tree.leaves(rows) if x.size]
    never = jnp.any(jnp.asarray([(x > 1) & (x < 0) for x in listed]))
    return jax.tree.map(lambda x: x + never.astype(x.dtype), rows)
