"""`lazy`: any row-separable optax transformation, at the cost of the rows touched."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import optax
from jax import Array

from sparse_embed._container import Listed, RowSparse, as_listed, is_row_sparse, unsummed
from sparse_embed._core import (
    ask_for_huge_pages,
    check_transformation,
    describe,
    in_blocks,
    message,
    signature,
)
from sparse_embed._lazy.separable import check_separable
from sparse_embed._lazy.state import (
    LazyState,
    check_clock,
    check_lazy_state,
    check_params,
    new_row_counts,
    warn_of_accumulators,
)
from sparse_embed._update import (
    APPLY,
    DEFER,
    LIST,
    BlockProgram,
    Flat,
    Layouts,
    Update,
    check_state,
    run_in_blocks,
    run_update,
    struct,
)


class LazyTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that can also apply what it computes.

    `apply(grads, opt_state, params, **extra) -> (params, opt_state)` does what `update` and
    `optax.apply_updates` do, a few rows at a time, so that the updates of a table are never laid
    out. `se.train_step` calls it.

    On CPUs, inside `jit`, `update` computes the updates of a table when they are added to it, or
    looked at, from the new state. So do either before anything else changes that state in the same
    function (resetting moments, a second update), or XLA copies it; or call
    `listed_update(grads, opt_state, params)`, which computes them at once.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.lazy(optax.sgd(0.5))
      >>> grads = se.grad(lambda p: p["table"][jnp.array([3])].sum())(params)
      >>> params, state = tx.apply(grads, tx.init(params), params)
      >>> params["table"][3].tolist()
      [0.5, 0.5]
    """

    apply: Callable[..., tuple[Any, LazyState]]
    listed_update: Callable[..., tuple[Any, LazyState]]
    _update_known: Callable[..., tuple[Any, LazyState]]  # of rows that were read before


def lazy(
    inner: optax.GradientTransformation, *, clock: Literal["global", "row"] = "global"
) -> LazyTransformation:
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
    wrote = "se.lazy(inner): inner must be an optax transformation."
    check_transformation(inner, wrote, "se.lazy(optax.adam(1e-3))")
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
    layouts = Layouts(inner)
    separable: set[Any] = set()  # signatures of parameters for which that has been checked

    def init_fn(params: Any) -> LazyState:
        leaves = jax.tree.leaves(params)
        tables = [k for k, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0) and leaf.size]
        layout = layouts.of(params, tables)
        key = signature(params)
        if key is None or key not in separable:
            check_separable(inner, params, layout, tables)
            separable.add(key)
        counts = new_row_counts(params, layout) if clock == "row" else {}
        inner_state = inner.init(params)
        warn_of_accumulators(inner_state)
        ask_for_huge_pages((params, inner_state, counts))
        return LazyState(inner_state, counts)

    def prepared(updates: Any, state: LazyState, params: Any) -> tuple[Update, Any]:
        check_lazy_state(state)
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_row_sparse)
        call = "tx.update(grads, opt_state, params)"
        grads = [unsummed(g, call) if is_row_sparse(g) else g for g in grads]
        grads = [as_listed(g) if is_row_sparse(g) and not g.coalesced else g for g in grads]
        check_params(grads, treedef, params)
        dense = [struct(g) for g in grads]
        like = jax.tree.unflatten(treedef, dense) if params is None else params
        tables = [k for k, g in enumerate(grads) if isinstance(g, RowSparse | Listed)]
        layout = layouts.of(like, tables)
        leaves = check_state(layout, state.inner_state)
        check_clock(clock, layout, updates, state.row_counts)
        return Update(inner, layout, treedef, grads), leaves

    def run(
        updates: Any, state: LazyState, params: Any, extra: dict[str, Any], how: str
    ) -> tuple[Any, LazyState]:
        job, leaves = prepared(updates, state, params)
        given = None if params is None else jax.tree.leaves(params)
        flat = Flat(job, leaves, given, state.row_counts, extra)
        job, leaves, given = flat.job, flat.state, flat.params
        found, reductions = None, None
        arrays = [
            *job.arrays(),
            *leaves,
            *(given or []),
            *jax.tree.leaves((state.row_counts, extra)),
        ]
        if any(in_blocks(g.indices, *arrays) for g in job.tables.values()):
            work = BlockProgram(job, leaves, given, state.row_counts, extra)
            reductions = work.reductions()
        if reductions is not None:
            found, leaves, row_counts = run_in_blocks(work, reductions, how)
        else:
            job = job.coalesced()
            found, leaves, row_counts = run_update(job, leaves, given, state.row_counts, extra)
        if how == APPLY and given is not None:
            found = [
                x if reductions is not None and k in job.tables else optax.apply_updates(p, x)
                for k, (p, x) in enumerate(zip(given, found, strict=True))
            ]
        inner_state = job.layout.treedef.unflatten(flat.new_state(leaves))
        found = flat.updates(found)
        return jax.tree.unflatten(job.treedef, found), LazyState(inner_state, row_counts)

    def update_fn(
        updates: Any, state: LazyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LazyState]:
        return run(updates, state, params, extra_args, DEFER)

    def listed_update_fn(
        updates: Any, state: LazyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LazyState]:
        return run(updates, state, params, extra_args, LIST)

    def apply_fn(
        updates: Any, state: LazyState, params: Any, **extra_args: Any
    ) -> tuple[Any, LazyState]:
        return run(updates, state, params, extra_args, APPLY)

    def update_known_fn(
        updates: Any, state: LazyState, params: Any, known: dict[int, Array], **extra_args: Any
    ) -> tuple[Any, LazyState]:
        job, leaves = prepared(updates, state, params)
        job = replace(job, known=known, ascending=False)
        given = jax.tree.leaves(params)
        found, leaves, row_counts = run_update(job, leaves, given, state.row_counts, extra_args)
        inner_state = job.layout.treedef.unflatten(leaves)
        return jax.tree.unflatten(job.treedef, found), LazyState(inner_state, row_counts)

    tx = LazyTransformation(init_fn, update_fn)
    tx.apply, tx.listed_update = apply_fn, listed_update_fn
    tx._update_known = update_known_fn
    return tx
