"""What the functions of an exact optimizer may be called with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import is_row_sparse
from sparse_embed._core import describe, is_concrete, message
from sparse_embed.exact._state import ExactState


def clocks_of(treedef: Any, state: ExactState) -> list[Any]:
    """The clock of each leaf, or `None`."""
    try:
        return treedef.flatten_up_to(state.clocks)
    except (TypeError, ValueError):
        raise ValueError(_of_other_params("another tree of parameters")) from None


def check_rows(name: str, leaf: Any, clock: Any) -> None:
    """A leaf and its clock must be of the same height."""
    rows = None if clock is None else jnp.shape(clock.last_step)
    if rows != jnp.shape(leaf)[:1]:
        raise ValueError(_of_other_params(f"{name} {describe(leaf)}, a clock of {rows} rows"))


def _of_other_params(got: str) -> str:
    return message(
        "tx.settle(params, opt_state): opt_state belongs to other parameters.",
        got,
        "opt_state = tx.init(params) with these params",
    )


def check_dense_state(inner: Any, params: Any, inner_state: Any) -> None:
    """What `from_dense` takes over must be the state of `inner`."""
    wanted = jax.eval_shape(inner.init, params)
    trees: list[Any] = [jax.tree.structure(wanted), jax.tree.structure(inner_state)]
    same = trees[0] == trees[1]
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inner_state)]
    if not same or shapes != [x.shape for x in jax.tree.leaves(wanted)]:
        raise ValueError(
            message(
                "tx.from_dense(params, inner_state): not a state of the dense optimizer for "
                "these params.",
                f"a tree {trees[1]}",
                "the state of the optax optimizer; for one of se.lazy its inner_state",
            )
        )


def check_finite(name: str, now: Array) -> None:
    """The sums over steps to come must end."""
    if is_concrete(now) and not bool(jnp.all(jnp.isfinite(now))):
        raise ValueError(
            message(
                f"tx.init(params): the sums over steps to come are not finite for {name}.",
                "a learning rate or decay that is not finite, or learning_rate * weight_decay "
                "of 1 or more",
                "se.exact.replay(...) of the dense optimizer, which takes any",
            )
        )


def ids_of(treedef: Any, ids: Any) -> list[Any]:
    """The ids of each leaf, or `None`."""
    try:
        return treedef.flatten_up_to(ids)
    except (TypeError, ValueError):
        raise ValueError(
            message(
                "tx.settle or tx.view(params, opt_state, ids): ids is no tree like params.",
                f"{jax.tree.structure(ids)} where {treedef} belongs",
                "tx.settle(params, opt_state, se.touched(loss_fn)(params, batch)), or a tree of "
                'ids with None for all other leaves: {"table": jnp.array([3]), "w": None}',
            )
        ) from None


def check_state(call: str, state: Any) -> None:
    if not isinstance(state, ExactState):
        raise TypeError(
            message(
                f"{call}: opt_state is not a state of se.exact.",
                describe(state),
                "opt_state = tx.init(params), or tx.from_dense(params, dense_state)",
            )
        )


def check_forms(grads: Any) -> None:
    """Rows have clocks, which `init` lays out along the first axis: nothing else is known then."""
    for path, g in jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_row_sparse):
        if is_row_sparse(g) and not g.form.plain:
            raise ValueError(
                message(
                    "tx.update(grads, opt_state, params): an optimizer of se.exact needs tables "
                    "whose rows are their first axis.",
                    f"a gradient of grads{jax.tree_util.keystr(path)} {g}",
                    "params with its rows first, [F * V, D] for a stack [F, V, D], and in the "
                    "model table.reshape(F, V, D); or se.lazy",
                )
            )


def check_settled(state: ExactState) -> None:
    """Before an update, the rows that have a gradient must have been brought up to date."""
    if state.settled is None and jax.tree.leaves(state.clocks):
        raise ValueError(
            message(
                "tx.update(grads, opt_state, params): the rows that the loss reads were not "
                "settled before the gradient was taken.",
                "opt_state as tx.init or tx.update returned it",
                "params, opt_state = tx.settle(params, opt_state, se.touched(loss_fn)(params, "
                "batch)), and then the gradient; or se.train_step, which does so. Inside another "
                "transformation nothing can: se.exact.adam(1e-3, before=chain) in place of "
                "optax.chain(chain, se.exact.adam(1e-3))",
            )
        )
