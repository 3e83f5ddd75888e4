"""One update of an optax transformation over a tree that mixes dense leaves and tables."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._container import Listed, RowSparse, old_rows, set_rows
from sparse_embed._core import as_jaxpr, message
from sparse_embed._on_rows import OnRows, PerRow, Refused, Rows
from sparse_embed._update.layout import ELSEWHERE, StateLayout


@dataclass(frozen=True)
class Update:
    """What is updated.

    Where leaf k is a table, `grads[k]` is a coalesced `RowSparse`, or `Listed` for `_in_blocks`.
    `known` has, for arrays with these ids, the rows that the gradient lists: read already, and
    perhaps not those that the array holds. `ascending`: whether gradients list rows in that order.
    """

    inner: optax.GradientTransformationExtraArgs
    layout: StateLayout
    treedef: Any
    grads: list[Any]
    known: dict[int, Array] = field(default_factory=dict)
    ascending: bool = True

    @property
    def tables(self) -> dict[int, Any]:
        return {k: g for k, g in enumerate(self.grads) if isinstance(g, RowSparse | Listed)}

    def arrays(self) -> list[Any]:
        """Those that the gradients hold."""
        listed = [part for g in self.grads if isinstance(g, Listed) for part in g.parts]
        return jax.tree.leaves((listed, [g for g in self.grads if not isinstance(g, Listed)]))

    def coalesced(self) -> "Update":
        """The same, with each gradient of a table a coalesced `RowSparse`."""
        grads = [g.coalesced() if isinstance(g, Listed) else g for g in self.grads]
        return replace(self, grads=grads)


def run_update(
    job: Update,
    state: list[Any],
    params: list[Any] | None,
    row_counts: dict[str, list[Array]],
    extra: dict,
) -> tuple[list[Any], list[Any], dict[str, list[Array]]]:
    """Traces `inner.update` at the tables' true shapes and runs it on the touched rows.

    Args:
      job: the gradients and the layout of the state.
      state: leaves of the inner state.
      params: leaves of the parameters, or None.
      row_counts: per-row counts of `clock="row"`.
      extra: extra arguments of `inner.update`.

    Returns:
      The updates, `RowSparse` for tables; the new leaves of the state; the new row counts.

    Raises:
      ValueError: `inner` needs what the touched rows do not determine.
    """
    program, trees = traced(job, state, params, extra)
    engine = engine_of(job, program, trees, state, params)
    args = arguments(job, engine, state, params)
    outs = engine.run(program, args)
    updates, new_state = outs[: len(job.grads)], outs[len(job.grads) :]
    held = args[len(job.grads) :][: len(state)]

    new_counts = {name: list(rows) for name, rows in row_counts.items()}
    if row_counts:
        own = own_counts(job, row_counts)
        for k, grad in job.tables.items():
            mine = list(args)
            for i, name in own[k].items():
                clock = old_rows(row_counts[name][k], grad.indices)
                mine[len(job.grads) + i] = PerRow(clock, k)
            outs = engine.run(program, mine)
            updates[k] = outs[k]
            for i, table in enumerate(job.layout.table):
                if table == k:
                    new_state[i] = outs[len(job.grads) + i]
            for i, name in own[k].items():
                count = outs[len(job.grads) + i]
                if isinstance(count, Refused):
                    raise ValueError(refusal(count.reason))
                rows = count.block if isinstance(count, PerRow) else count
                new_counts[name][k] = set_rows(row_counts[name][k], grad.indices, rows)
    return (
        [_as_update(job, engine, k, u) for k, u in enumerate(updates)],
        [
            _as_state(job, engine, i, old, rows, new)
            for i, (old, rows, new) in enumerate(zip(state, held, new_state, strict=True))
        ],
        new_counts,
    )


_APART = (
    "se.lazy(optax.partition({'tables': optax.adam(1e-3), 'rest': inner}, labels)), or dense "
    "gradients for this leaf"
)


def refusal(reason: str, instead: str = _APART) -> str:
    """The message for an `inner` that cannot be run on rows."""
    wrote = "se.lazy(inner): inner cannot update a table by its touched rows alone."
    return message(wrote, reason, instead)


def traced(job: Update, state: list[Any], params: list[Any] | None, extra: dict) -> Any:
    """The program of one update, `(jaxpr, consts)`, and the trees of what it returns."""
    trees: list[Any] = []
    structs = [struct(g) for g in job.grads]

    def update(grads: list[Any], state: list[Any], params: list[Any] | None) -> list[Any]:
        updates, new_state = job.inner.update(
            job.treedef.unflatten(grads),
            job.layout.treedef.unflatten(state),
            None if params is None else job.treedef.unflatten(params),
            **extra,
        )
        trees[:] = jax.tree.structure(updates), jax.tree.structure(new_state)
        return [*jax.tree.leaves(updates), *jax.tree.leaves(new_state)]

    return as_jaxpr(update, structs, state, params), trees


def struct(x: Any) -> jax.ShapeDtypeStruct:
    known = isinstance(x, RowSparse | Listed)
    dtype = x.dtype if known else jnp.result_type(x)
    return jax.ShapeDtypeStruct(x.shape if known else jnp.shape(x), dtype)


def same_trees(job: Update, trees: list[Any]) -> None:
    """Raises unless the results of an update are the trees that went in."""
    for name, tree, same in [
        ("updates", trees[0], job.treedef),
        ("state", trees[1], job.layout.treedef),
    ]:
        if tree != same:
            raise ValueError(refusal(f"its update turns the {name} into another tree, {tree}"))


def engine_of(
    job: Update, program: Any, trees: list[Any], state: list[Any], params: list[Any] | None
) -> OnRows:
    """What runs the program on the touched rows."""
    same_trees(job, trees)
    tables = job.tables

    def gather(k: int, x: Any) -> Array:
        known = job.known.get(id(x))
        return _gathered(jnp.asarray(x), tables[k].indices) if known is None else known

    return OnRows(
        {k: g.num_rows for k, g in tables.items()},
        {k: g.indices < g.num_rows for k, g in tables.items()},
        [*program[1], *state, *(params or [])],
        gather,
    )


# Outside of any other jit it is one call. Not where users read rows: whoever reads them next would
# be told the line of the first.
_gathered = jax.jit(old_rows, inline=True)


def arguments(job: Update, engine: OnRows, state: list[Any], params: list[Any] | None) -> list[Any]:
    """The program's inputs, with the touched rows in place of each table."""
    tables = job.tables

    def rows(x: Any, table: int | None) -> Any:
        if table == ELSEWHERE:
            reason = "its state mixes the rows of a table with other numbers"
            return Refused(reason, frozenset(tables))
        return x if table not in tables else Rows(engine.gather(table, x), table)

    grads = [Rows(g.rows, k, 0) if k in tables else g for k, g in enumerate(job.grads)]
    held = [rows(x, table) for x, table in zip(state, job.layout.table, strict=True)]
    values = [rows(x, k) for k, x in enumerate(params or [])]
    return [*grads, *held, *values]


def _as_update(job: Update, engine: OnRows, k: int, value: Any) -> Any:
    grad = job.grads[k]
    if not isinstance(grad, RowSparse):
        return as_array(value, jnp.shape(grad))
    rows = engine.block(value, k, grad.rows.shape[0])
    if isinstance(rows, Refused):
        raise ValueError(refusal(rows.reason))
    if not job.known:  # else nobody looks at padding
        real = engine.real[k].reshape(-1, *(1,) * (grad.ndim - 1))
        rows = jnp.where(real, rows, 0)
    return RowSparse._make(grad.indices, rows, grad.shape, True)


def _as_state(job: Update, engine: OnRows, i: int, old: Any, held: Any, new: Any) -> Any:
    table = job.layout.table[i]
    if table not in job.tables:
        return as_array(new, job.layout.shapes[i].shape)
    if (new is old or new is held) and id(old) not in job.known:
        return old
    grad = job.tables[table]
    rows = engine.block(new, table, grad.rows.shape[0])
    if isinstance(rows, Refused):
        raise ValueError(refusal(rows.reason))
    # Padding writes nothing. Giving it the old rows makes the write wait for the read of them, also
    # where the new rows are not made of the old ones; else XLA would copy the whole leaf first.
    real = engine.real[table].reshape(-1, *(1,) * (rows.ndim - 1))
    rows = jnp.where(real, rows.astype(old.dtype), held.block)
    return set_rows(jnp.asarray(old), grad.indices, rows, job.ascending)


def as_array(value: Any, shape: tuple[int, ...]) -> Any:
    """A result that is not rows of one table, as an ordinary array."""
    if isinstance(value, Refused):
        raise ValueError(refusal(value.reason))
    if isinstance(value, Rows) and value.table is None:
        return jnp.broadcast_to(value.block, shape)
    if isinstance(value, Rows | PerRow):
        raise ValueError(refusal("a shared value of its state is made of the rows of one table"))
    return value


def own_counts(job: Update, row_counts: dict[str, list[Array]]) -> dict[int, dict[int, str]]:
    """For each table, the state leaves that count its rows' steps, with their names."""
    names = {jax.tree_util.keystr(path): i for i, path in enumerate(job.layout.paths)}
    return {
        k: {names[name]: name for name, rows in row_counts.items() if rows[k].size}
        for k in job.tables
    }
