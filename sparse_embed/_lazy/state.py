"""The state of `lazy`, and what must hold of the trees that `lazy` is given."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._container import is_row_sparse
from sparse_embed._core import describe, message
from sparse_embed._update import StateLayout


class LazyState(NamedTuple):
    """State of `lazy`.

    Args:
      inner_state: the inner transformation's own state, in its own layout.
      row_counts: with `clock="row"`, for each count of the inner state that sits beside moments:
        its path, and `[num_rows]` int32 steps for each parameter leaf; else empty.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> state = se.lazy(optax.adam(0.1), clock="row").init({"table": jnp.ones((4, 2))})
      >>> type(state.inner_state[0]).__name__, [c[0].tolist() for c in state.row_counts.values()]
      ('ScaleByAdamState', [[0, 0, 0, 0]])
    """

    inner_state: Any
    row_counts: dict[str, list[Array]]


def warn_of_accumulators(inner_state: Any) -> None:
    """Gradients gathered over several steps reach only the rows of the step that emits them."""
    kinds = (optax.MultiStepsState, optax.ApplyEvery)
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, kinds):
            text = message(
                "se.lazy(inner): inner gathers gradients over several steps, but only rows that "
                "the emitting step touches will move; what other rows gathered waits or is lost.",
                f"a state of type {type(node).__name__}",
                "grads = grads_1 + grads_2 for a table's RowSparse gradients, then one tx.update",
            )
            warnings.warn(text, UserWarning, stacklevel=3)  # the call of `init`
            return


def new_row_counts(params: Any, layout: StateLayout) -> Any:
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
    if (
        not with_paths
    ):  # `optax.tree.map_params` asks: one leaf, which is no parameter, for them all
        return jnp.zeros((), jnp.int32)
    counts = layout.counts([path for path, _ in with_paths])
    heights = [jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for _, leaf in with_paths]
    return {
        jax.tree_util.keystr(layout.paths[i]): [
            jnp.zeros(rows if k in beside else 0, jnp.int32) for k, rows in enumerate(heights)
        ]
        for i, beside in counts.items()
    }


def check_lazy_state(state: Any) -> None:
    if not isinstance(state, LazyState):
        raise TypeError(
            message(
                "tx.update(grads, opt_state, params): opt_state is not a state of se.lazy.",
                describe(state),
                "opt_state = tx.init(params), with the tx that se.lazy returned",
            )
        )


def check_clock(
    clock: str, layout: StateLayout, grads: Any, row_counts: dict[str, list[Array]]
) -> None:
    """The state must count the rows' steps where this transformation does, and only there."""
    paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)
    counts = layout.counts([path for path, _ in paths]) if clock == "row" else {}
    missing = {jax.tree_util.keystr(layout.paths[i]) for i in counts} - row_counts.keys()
    if missing or (clock == "global" and row_counts):
        raise ValueError(
            message(
                "tx.update(grads, opt_state, params): opt_state was made with another clock.",
                f"row_counts of {sorted(row_counts)}, where clock={clock!r}",
                "opt_state = tx.init(params) with this tx",
            )
        )


def check_params(grads: list[Any], treedef: Any, params: Any) -> None:
    """Gradients and params must be trees of the same shapes."""
    if params is None:
        return
    with_paths, param_treedef = jax.tree_util.tree_flatten_with_path(params)
    call = "tx.update(grads, opt_state, params)"
    if treedef != param_treedef:
        raise ValueError(
            message(
                f"{call}: grads and params are different trees.",
                f"grads {treedef}, params {param_treedef}",
                "_, grads = se.value_and_grad(loss_fn)(params, batch)",
            )
        )
    for (path, leaf), grad in zip(with_paths, grads, strict=True):
        if jnp.shape(leaf) != jnp.shape(grad):
            name = "params" + jax.tree_util.keystr(path)
            got = f"{name} {describe(leaf)}, its gradient of shape {jnp.shape(grad)}"
            instead = "the gradient of these params"
            raise ValueError(message(f"{call}: a gradient of another table.", got, instead))
