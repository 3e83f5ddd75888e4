"""Before an exact optimizer's gradient is taken, the rows that the loss reads are settled."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_embed._core import as_jaxpr, used_inputs
from sparse_embed._differentiate import Program, distinct_rows, is_reads, reads_of
from sparse_embed.exact import ExactTransformation


def settle_reads(
    tx: ExactTransformation, program: Program, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """`params` with all rows up to date that a program reads, and these rows at hand.

    Ids may depend on rows that other lookups read. Those must be settled before the ids are known;
    so rows are listed again after settling until the list stays the same. That takes as many rounds
    as lookups hang on one another, and none where the ids come from the batch alone.

    Args:
      tx: the optimizer.
      program: the loss, a function of the parameters.
      params: the parameters.
      opt_state: the state of the optimizer.

    Returns:
      `params`, and the state as of `tx._settle_at_hand`.
    """

    def ids(params: Any) -> Any:
        found = reads_of(program.at(params))
        return jax.tree.map(lambda read: read.ids, found, is_leaf=is_reads)

    jaxpr, _ = as_jaxpr(lambda *leaves: ids(leaves), *program.leaves)
    if not any(used_inputs(jaxpr)):
        return tx._settle_at_hand(params, opt_state, ids(params))

    def again(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        params, opt_state, _, rows = carry
        params, opt_state = tx.settle(params, opt_state, rows, coalesced=True)
        return params, opt_state, rows, _together(distinct_rows(reads_of(program.at(params))))

    def changed(carry: tuple[Any, ...]) -> Any:
        _, _, before, after = carry
        differ = jax.tree.map(lambda a, b: jnp.any(a != b), before, after)
        return jnp.any(jnp.asarray(jax.tree.leaves(differ)))

    params, opt_state = jax.tree.map(jnp.asarray, (params, opt_state))
    rows = distinct_rows(reads_of(program.at(params)))
    none = jax.tree.map(lambda x: jnp.full_like(x, -1), rows)
    start = params, opt_state.as_settled(), none, _together(rows)  # as each round returns it
    params, opt_state, *_ = jax.lax.while_loop(changed, again, start)
    return tx._settle_at_hand(params, opt_state, _together(ids(params)))


def _together(rows: Any) -> Any:
    """Makes the rows of each table wait for those of all others, which may be read from it.

    XLA writes a table in place only after every read of it, by data dependence; so each list gets
    a zero made of the others (no number is both above one and below zero).
    """
    listed = [x.reshape(-1)[0] for x in jax.tree.leaves(rows) if x.size]
    never = jnp.any(jnp.asarray([(x > 1) & (x < 0) for x in listed]))
    return jax.tree.map(lambda x: x + never.astype(x.dtype), rows)
