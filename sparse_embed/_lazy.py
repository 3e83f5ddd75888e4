"""`lazy`: any row-separable optax transformation, at the cost of the rows touched."""

import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._errors import describe, message
from sparse_embed._layout import StateLayout, check_state, state_layout
from sparse_embed._row_sparse import is_row_sparse, summed
from sparse_embed._separable import check_separable
from sparse_embed._update import Update, run_update


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


def lazy(
    inner: optax.GradientTransformation, *, clock: Literal["global", "row"] = "global"
) -> optax.GradientTransformationExtraArgs:
    """Lifts an optax transformation, whole chain included, to row-sparse gradients.

    The update of a touched row is the one that `inner` computes for the whole table; rows that are
    not listed, and their state, stay as they are. The update of a table comes back as a
    `RowSparse`, which stock `optax.apply_updates` adds to it. Leaves with a dense gradient are
    updated as by `inner`; which leaves are tables is known from the gradients alone.

    What needs all rows is refused with its reason, but for what the touched rows determine: a sum
    over the gradient's entries, as in `clip_by_global_norm`, is exact.

    Args:
      inner: any optax transformation whose update of a row depends on that row.
      clock: `"global"`: a count such as Adam's advances with every step. `"row"`: the counts beside
        moments count, for each row, the steps that touched it, so that a rare row's bias correction
        is that of its own history. Counts of schedules stay global.

    Returns:
      An optax transformation. Its state is `LazyState(inner.init(params), ...)`.

    Raises:
      ValueError: at `init` or `update`, where `inner` needs the whole matrix; at `update`, where
        gradients, state and params do not belong together.
      TypeError: `inner` is not an optax transformation.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.lazy(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
      >>> state = tx.init(params)
      >>> grads = se.grad(lambda p: p["table"][jnp.array([3])].sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["table"].indices.tolist(), updates["table"].rows.round(3).tolist()
      ([3], [[-0.1, -0.1]])
    """
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TypeError(
            message(
                "se.lazy(inner): inner must be an optax transformation.",
                describe(inner),
                "se.lazy(optax.adam(1e-3))",
            )
        )
    if hasattr(inner, "settle"):
        raise TypeError(
            message(
                "se.lazy(inner): inner is an optimizer of se.exact, which is already row-sparse.",
                describe(inner),
                "tx = se.exact.adam(1e-3, before=chain) as it is, or se.lazy(optax.adam(1e-3))",
            )
        )
    if clock not in ("global", "row"):
        raise ValueError(
            message(f"se.lazy(inner, clock={clock!r})", repr(clock), 'clock="global" or "row"')
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> LazyState:
        leaves = jax.tree.leaves(params)
        tables = [k for k, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0) and leaf.size]
        layout = state_layout(inner, params, tables)
        check_separable(inner, params, layout, tables)
        counts = _new_row_counts(params, layout) if clock == "row" else {}
        inner_state = inner.init(params)
        _warn_of_accumulators(inner_state)
        return LazyState(inner_state, counts)

    def update_fn(
        updates: Any, state: LazyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LazyState]:
        _check_lazy_state(state)
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_row_sparse)
        tables = {
            k: summed(g, "tx.update(grads, opt_state, params)")
            for k, g in enumerate(grads)
            if is_row_sparse(g)
        }
        _check_params(grads, treedef, params)
        dense = [jax.ShapeDtypeStruct(jnp.shape(g), jnp.result_type(g)) for g in grads]
        like = jax.tree.unflatten(treedef, dense) if params is None else params
        layout = state_layout(inner, like, sorted(tables))
        job = Update(inner, layout, treedef, [tables.get(k, g) for k, g in enumerate(grads)])
        leaves = check_state(layout, state.inner_state)
        _check_clock(clock, layout, updates, state.row_counts)
        new_updates, new_leaves, row_counts = run_update(
            job, leaves, params, state.row_counts, extra_args
        )
        inner_state = layout.treedef.unflatten(new_leaves)
        return jax.tree.unflatten(treedef, new_updates), LazyState(inner_state, row_counts)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warn_of_accumulators(inner_state: Any) -> None:
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
            warnings.warn(text, UserWarning, stacklevel=3)
            return


def _new_row_counts(params: Any, layout: StateLayout) -> dict[str, list[Array]]:
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
    counts = layout.counts([path for path, _ in with_paths])
    heights = [jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for _, leaf in with_paths]
    return {
        jax.tree_util.keystr(layout.paths[i]): [
            jnp.zeros(rows if k in beside else 0, jnp.int32) for k, rows in enumerate(heights)
        ]
        for i, beside in counts.items()
    }


def _check_lazy_state(state: Any) -> None:
    if not isinstance(state, LazyState):
        raise TypeError(
            message(
                "tx.update(grads, opt_state, params): opt_state is not a state of se.lazy.",
                describe(state),
                "opt_state = tx.init(params), with the tx that se.lazy returned",
            )
        )


def _check_clock(
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


def _check_params(grads: list[Any], treedef: Any, params: Any) -> None:
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
