"""Which transformations can be run on rows, tried out by shape alone when a state is made."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_embed._container import RowSparse
from sparse_embed._on_rows import Refused, Rows
from sparse_embed._update import StateLayout, Update, arguments, engine_of, refusal, struct, traced


def check_separable(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    layout: StateLayout,
    tables: Sequence[int],
) -> None:
    """Refuses a transformation that can update no table by its touched rows.

    It is tried out as if every leaf were a table. A transformation may treat some leaves as
    matrices (`muon` beside `adam` in one `partition`); then this waits for the gradients to tell
    which leaves are tables.

    Raises:
      ValueError: every leaf that may be a table is refused. With name and reason.
    """
    refused: dict[int, str] = {}
    for out in _dry_run(inner, params, layout, tables):
        if isinstance(out, Refused):
            refused.update(dict.fromkeys(out.tables, out.reason))
    leaves = jax.tree.leaves(params)
    matrices = [k for k in tables if jnp.ndim(leaves[k]) > 1] or list(tables)
    if refused and all(k in refused for k in matrices):
        raise ValueError(refusal(next(refused[k] for k in matrices)))


def moved_without_gradient(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    layout: StateLayout,
    tables: Sequence[int],
) -> list[int]:
    """The tables of which a row without a gradient may get an update other than zero."""
    updates = _dry_run(inner, params, layout, tables)[: len(jax.tree.leaves(params))]

    def rests(update: Any) -> bool:
        return isinstance(update, Rows) and update.untouched == 0

    return [k for k in tables if updates and not rests(updates[k])]


def _dry_run(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    layout: StateLayout,
    tables: Sequence[int],
) -> list[Any]:
    """What an update makes of every leaf and of the state, as values of a run on two rows.

    Empty where the update asks for arguments that only the loop has.
    """
    leaves, treedef = jax.tree.flatten(params)
    grads = list(leaves)
    for k in tables:
        shape = jnp.shape(leaves[k])
        n = min(2, shape[0])
        rows = jnp.zeros((n, *shape[1:]), leaves[k].dtype)
        grads[k] = RowSparse._make(jnp.arange(n), rows, shape, True)
    job = Update(inner, layout, treedef, grads)
    found: list[Any] = []

    def attempt(state: list[Any], params: list[Any]) -> None:
        for extra in ({}, {"value": np.float32(0)}):
            try:
                program, trees = traced(job, state, params, extra)
            except (TypeError, ValueError):  # it asks for arguments that only the loop has
                continue
            engine = engine_of(job, program, trees, state, params)
            found.extend(engine.run(program, arguments(job, engine, state, params)))
            return

    jax.eval_shape(attempt, layout.shapes, [struct(x) for x in leaves])
    return found
