"""One optax update of a mixed tree, with the rows of each table gone through in blocks.

The program of the update is the same as in `_update`, and so is what runs it. But here a table's
rows are read, updated and written a few at a time, so that they stay in a CPU's caches and no
array is as long as the list of ids. A reduction over all rows, such as a global norm, must be known
before the first row is written: each takes a pass of its own over the rows it reduces.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._blocks import PerRow, Refused, Rows
from sparse_embed._layout import ELSEWHERE
from sparse_embed._on_rows import OnRows
from sparse_embed._reductions import Reduction
from sparse_embed._segments import gather_rows
from sparse_embed._staged import Listing, Path, Reached, Stopping, needed
from sparse_embed._sweep import Sweep
from sparse_embed._update import (
    Update,
    as_array,
    own_counts,
    refusal,
    same_trees,
    struct,
    traced,
)


@dataclass
class InBlocks:
    """An update that is done in blocks.

    Args:
      job: what is updated; its gradients are `Listed` or coalesced `RowSparse` for tables.
      state: leaves of the inner state.
      params: leaves of the parameters.
      row_counts: per-row counts of `clock="row"`.
      extra: extra arguments of `inner.update`.
    """

    job: Update
    state: list[Any]
    params: list[Any]
    row_counts: dict[str, list[Array]]
    extra: dict[str, Any]
    program: Any = field(init=False)
    sweeps: dict[int, Sweep] = field(init=False)
    known: dict[Path, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.program, trees = traced(self.job, self.state, self.params, self.extra)
        same_trees(self.job, trees)
        self.counts = own_counts(self.job, self.row_counts) if self.row_counts else {}

    def reductions(self) -> dict[Path, Reduction] | None:
        """The reductions over rows, in order; `None` if one of them may not happen."""
        engine = Listing(*self._engine(None))
        jax.eval_shape(lambda: engine.run(self.program, self._args(None)) and None)
        return None if engine.maybe else engine.found

    def run(self, reductions: dict[Path, Reduction]) -> tuple[list[Any], list[Any], dict]:
        """Updates and writes all rows.

        Args:
          reductions: those of `reductions()`.

        Returns:
          New leaves of the parameters for tables and updates for the other leaves; the new leaves
          of the state; the new row counts.
        """
        self.sweeps = {k: Sweep(g) for k, g in self.job.tables.items()}
        for path, reduction in reductions.items():
            self.known[path] = self._reduced(path, reduction)
        updates, new_state = self._shared()
        new_counts = {name: list(rows) for name, rows in self.row_counts.items()}
        for k in self.sweeps:
            own = self._written(k)
            updates[k] = own["params"]
            for i, leaf in own["state"].items():
                new_state[i] = leaf
            for name, rows in own["counts"].items():
                new_counts[name][k] = rows
        return updates, new_state, new_counts

    def _reduced(self, path: Path, reduction: Reduction) -> Array:
        """One pass over the rows of a table."""
        k, jaxpr = reduction.table, self.program[0]
        number = next(i for i, eqn in enumerate(jaxpr.eqns) if id(eqn) == path[0])
        only = needed(jaxpr, jaxpr.eqns[number].invars)
        only[number] = True
        held = self._held(k)

        def body(indices: Array, rows: Array, total: Array) -> Array:
            block = Block(k, indices, rows, _gathered(held, indices))
            engine = Stopping(*self._engine(block), known=self.known)
            try:
                engine.run(self.program, self._args(block), only)
            except Reached as here:
                return reduction.join(total, reduction.of(here.block, engine.real[k]))
            raise AssertionError("the reduction was not met again")

        sweep = self.sweeps[k]
        total = sweep.each(body, reduction.start())
        return reduction.end(total, sweep.count < sweep.num_rows)

    def _shared(self) -> tuple[list[Any], list[Any]]:
        """What is not the rows of a table: dense updates, counts, other state."""
        jaxpr, job = self.program[0], self.job
        tables = [k if k in self.sweeps else None for k in range(len(job.grads))]
        tables += [k if k in self.sweeps else None for k in job.layout.table]
        wanted = [v for v, k in zip(jaxpr.outvars, tables, strict=True) if k is None]
        engine = Stopping(*self._engine(None), known=self.known)
        outs = engine.run(self.program, self._args(None), needed(jaxpr, wanted))
        shapes = [jnp.shape(x) for x in (*job.grads, *self.state)]
        made = [
            as_array(x, shape) if k is None else None
            for x, k, shape in zip(outs, tables, shapes, strict=True)
        ]
        return made[: len(job.grads)], made[len(job.grads) :]

    def _written(self, k: int) -> Any:
        """The arrays that hold rows of table `k`, with its touched rows written."""
        jaxpr, first = self.program[0], len(self.job.grads)
        changed = {
            i
            for i, table in enumerate(self.job.layout.table)
            if table == k and jaxpr.outvars[first + i] is not jaxpr.invars[first + i]
        }
        counts = self.counts.get(k, {})
        wanted = k, *(first + i for i in (*changed, *counts))
        only = needed(jaxpr, [jaxpr.outvars[j] for j in wanted])

        def body(indices: Array, rows: Array, held: Any) -> Any:
            old = _gathered(held, indices)
            block = Block(k, indices, rows, old)
            engine = Stopping(*self._engine(block), known=self.known)
            outs = engine.run(self.program, self._args(block), only)
            update = _rows(engine, outs[k], block)
            real = engine.real[k].reshape(-1, *(1,) * (update.ndim - 1))
            new = {
                "params": old["params"] + jnp.where(real, update, 0),
                "state": {i: _rows(engine, outs[first + i], block) for i in changed},
                "counts": {name: _count(outs[first + i]) for i, name in counts.items()},
            }
            new["state"] |= {i: x for i, x in old["state"].items() if i not in changed}
            # All rows are made before any is written: each of them once, and from the old ones.
            new = jax.lax.optimization_barrier(jax.tree.map(_as, new, old))
            return jax.tree.map(lambda x, rows: _put(x, indices, rows), held, new)

        return self.sweeps[k].each(body, self._held(k))

    def _held(self, k: int) -> Any:
        """The arrays that hold rows of table `k`."""
        table = self.job.layout.table
        return {
            "params": jnp.asarray(self.params[k]),
            "state": {i: jnp.asarray(x) for i, x in enumerate(self.state) if table[i] == k},
            "counts": {name: self.row_counts[name][k] for name in self.counts.get(k, {}).values()},
        }

    def _engine(self, block: "Block | None") -> tuple[Any, ...]:
        """Arguments of an engine for a block; of other tables it has one row, which is padding."""
        grads = self.job.tables
        real = {j: jnp.zeros(1, bool) for j in grads}
        if block is not None:
            real[block.table] = block.indices < grads[block.table].num_rows

        def gather(j: int, x: Any) -> Array:
            if block is None or j != block.table:
                return _padding(x)
            return gather_rows(jnp.asarray(x), block.indices)

        given = [*self.program[1], *self.state, *self.params]
        return {j: g.num_rows for j, g in grads.items()}, real, given, gather

    def _args(self, block: "Block | None") -> list[Any]:
        """The program's inputs, with a block of one table."""
        job, tables = self.job, self.job.tables

        def rows(x: Any, table: Any, own: Any, idle: Any = None) -> Any:
            if table == ELSEWHERE:
                reason = "its state mixes the rows of a table with other numbers"
                return Refused(reason, frozenset(tables))
            if table not in tables:
                return x
            here = block is not None and table == block.table
            return Rows(own(block) if here else _padding(x), table, idle)

        grads = [rows(g, k, lambda b: b.rows, 0) for k, g in enumerate(job.grads)]
        state = [
            rows(x, job.layout.table[i], lambda b, i=i: b.held["state"][i])
            for i, x in enumerate(self.state)
        ]
        if block is not None:
            for i, name in self.counts.get(block.table, {}).items():
                state[i] = PerRow(block.held["counts"][name], block.table)
        params = [rows(x, k, lambda b: b.held["params"]) for k, x in enumerate(self.params)]
        return [*grads, *state, *params]


class Block(NamedTuple):
    """Some rows of one table.

    `held` has what the arrays of `InBlocks._held` hold at these rows.
    """

    table: int
    indices: Array  # [b]
    rows: Array  # [b, *features], the gradient
    held: Any


def _padding(x: Any) -> Array:
    """One row like those of a table or of its gradient."""
    like = struct(x)
    return jnp.zeros((1, *like.shape[1:]), like.dtype)


def _gathered(held: Any, indices: Array) -> Any:
    return jax.tree.map(lambda x: gather_rows(x, indices), held)


def _rows(engine: OnRows, value: Any, block: Block) -> Array:
    rows = engine.block(value, block.table, block.indices.size)
    if isinstance(rows, Refused):
        raise ValueError(refusal(rows.reason))
    return rows


def _count(value: Any) -> Array:
    if isinstance(value, Refused):
        raise ValueError(refusal(value.reason))
    return value.block if isinstance(value, PerRow) else value


def _as(new: Array, old: Array) -> Array:
    return jnp.broadcast_to(new, old.shape).astype(old.dtype)


def _put(x: Array, indices: Array, rows: Array) -> Array:
    """`x` with `rows` at distinct `indices` in no order; those outside write nothing."""
    return x.at[indices].set(rows, mode="drop", unique_indices=True)
