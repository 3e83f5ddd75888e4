"""One optax update of a mixed tree, with the rows of each table gone through in blocks.

The program of the update is the same as in `_update`, and so is what runs it. But here a table's
rows are read, updated and written a few at a time, so that they stay in a CPU's caches and no
array is as long as the list of ids. A reduction over all rows, such as a global norm, must be known
before the first row is written: each takes a pass of its own over the rows it reduces.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._blocks import PerRow, Refused, Rows
from sparse_embed._each_block import Block, put
from sparse_embed._filled import (
    Filled,
    Held,
    as_taken,
    changes,
    count_of,
    padding_row,
    rows_of,
)
from sparse_embed._layout import ELSEWHERE
from sparse_embed._reductions import Reduction
from sparse_embed._row_sparse import RowSparse
from sparse_embed._segments import gather_rows
from sparse_embed._staged import Listing, Path, Reached, Stopping, needed
from sparse_embed._sweep import Sweep
from sparse_embed._update import (
    Update,
    as_array,
    own_counts,
    same_trees,
    traced,
)


@dataclass
class InBlocks:
    """An update that is done in blocks.

    Args:
      job: what is updated; its gradients are `Listed` or coalesced `RowSparse` for tables.
      state: leaves of the inner state.
      params: leaves of the parameters, or None.
      row_counts: per-row counts of `clock="row"`.
      extra: extra arguments of `inner.update`.
      write: whether updates are added to the parameters at once, or listed.
    """

    job: Update
    state: list[Any]
    params: list[Any] | None
    row_counts: dict[str, list[Array]]
    extra: dict[str, Any]
    write: bool
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
          For tables the new leaves of the parameters, or with `write` false coalesced updates, and
          for other leaves updates; the new leaves of the state; the new row counts.
        """
        tables = self.job.tables
        self.sweeps = {k: Sweep(g, ascending=not self.write) for k, g in tables.items()}
        for path, reduction in reductions.items():
            self.known[path] = self._reduced(path, reduction)
        updates, new_state = self._shared()
        # Rows of a table are as they were, unless the table's own pass says otherwise.
        tables_of = self.job.layout.table
        for i, old in enumerate(self.state):
            new_state[i] = old if tables_of[i] in self.sweeps else new_state[i]
        new_counts = {name: list(rows) for name, rows in self.row_counts.items()}
        for k in self.sweeps:
            own = self._written(k)
            updates[k] = own["params"][k] if self.write else self._listed(k, own["updates"][k])
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

        def body(here: Block, total: Array) -> Array:
            block = self._filled(k, here, {})
            engine = Stopping(*self._engine(block), known=self.known)
            try:
                engine.run(self.program, self._args(block), only)
            except Reached as met:
                return reduction.join(total, reduction.of(met.block, engine.real[k]))
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

    def _written(self, k: int) -> Held:
        """The arrays that hold rows of table `k`, with its touched rows written, and updates."""
        jaxpr, first = self.program[0], len(self.job.grads)
        held = self._held(k)
        changed = {i for i in held["state"] if changes(jaxpr, first + i)}
        counts = self.counts.get(k, {})
        wanted = k, *(first + i for i in (*changed, *counts))
        only = needed(jaxpr, [jaxpr.outvars[j] for j in wanted])
        length = (self._length(k), *self.job.grads[k].shape[1:])

        def body(here: Block, written: Held) -> Held:
            block = self._filled(k, here, written)
            engine = Stopping(*self._engine(block), known=self.known)
            outs = engine.run(self.program, self._args(block), only)
            update = rows_of(engine, outs[k], block)
            real = engine.real[k].reshape(-1, *(1,) * (update.ndim - 1))
            update = jnp.where(real, update, 0)
            new: Held = {
                "state": {i: rows_of(engine, outs[first + i], block) for i in changed},
                "counts": {name: count_of(outs[first + i]) for i, name in counts.items()},
                "params": {k: old + update for k, old in block.held["params"].items()},
                "updates": {k: update},
            }
            new = {part: {i: new[part][i] for i in arrays} for part, arrays in written.items()}
            # All rows are made before any is written: each of them once, and from the old ones.
            new = jax.lax.optimization_barrier(jax.tree.map(as_taken, new, written))
            at = dict.fromkeys(written, here.indices)
            at["updates"] = jnp.where(engine.real[k], here.position, self._length(k))
            return {
                part: {i: put(x, at[part], new[part][i]) for i, x in arrays.items()}
                for part, arrays in written.items()
            }

        written: Held = {
            "state": {i: x for i, x in held["state"].items() if i in changed},
            "counts": held["counts"],
            "params": held["params"] if self.write else {},
            "updates": {} if self.write else {k: jnp.zeros(length, jaxpr.outvars[k].aval.dtype)},
        }
        return self.sweeps[k].each(body, written)

    def _length(self, k: int) -> int:
        """The most distinct rows that table `k` can have in this step."""
        return min(self.job.grads[k].indices.size, self.sweeps[k].num_rows)

    def _listed(self, k: int, rows: Array) -> RowSparse:
        indices = self.sweeps[k].indices[: self._length(k)]
        return RowSparse._make(indices, rows, self.job.grads[k].shape, True)

    def _held(self, k: int) -> Held:
        """The arrays that hold rows of table `k`."""
        table, counts = self.job.layout.table, self.counts.get(k, {})
        return {
            "params": {} if self.params is None else {k: jnp.asarray(self.params[k])},
            "state": {i: jnp.asarray(x) for i, x in enumerate(self.state) if table[i] == k},
            "counts": {name: self.row_counts[name][k] for name in counts.values()},
        }

    def _filled(self, k: int, here: Block, written: Held) -> Filled:
        """The block, with its rows of every array. Those written to are read as they are by now."""
        now = {part: x | written.get(part, {}) for part, x in self._held(k).items()}
        rows = jax.tree.map(lambda x: gather_rows(x, here.indices), now)
        return Filled(k, here.indices, here.rows, rows)

    def _engine(self, block: Filled | None) -> tuple[Any, ...]:
        """Arguments of an engine for a block; of other tables it has one row, which is padding."""
        grads = self.job.tables
        real = {j: jnp.zeros(1, bool) for j in grads}
        if block is not None:
            real[block.table] = block.indices < grads[block.table].num_rows

        def gather(j: int, x: Any) -> Array:
            if block is None or j != block.table:
                return padding_row(x)
            return gather_rows(jnp.asarray(x), block.indices)

        given = [*self.program[1], *self.state, *(self.params or [])]
        return {j: g.num_rows for j, g in grads.items()}, real, given, gather

    def _args(self, block: Filled | None) -> list[Any]:
        """The program's inputs, with a block of one table."""
        job, tables = self.job, self.job.tables

        def rows(x: Any, table: Any, own: Any, idle: Any = None) -> Any:
            if table == ELSEWHERE:
                reason = "its state mixes the rows of a table with other numbers"
                return Refused(reason, frozenset(tables))
            if table not in tables:
                return x
            here = block is not None and table == block.table
            return Rows(own(block) if here else padding_row(x), table, idle)

        grads = [rows(g, k, lambda b: b.rows, 0) for k, g in enumerate(job.grads)]
        state = [
            rows(x, job.layout.table[i], lambda b, i=i: b.held["state"][i])
            for i, x in enumerate(self.state)
        ]
        if block is not None:
            for i, name in self.counts.get(block.table, {}).items():
                state[i] = PerRow(block.held["counts"][name], block.table)
        params = [
            rows(x, k, lambda b, k=k: b.held["params"][k]) for k, x in enumerate(self.params or [])
        ]
        return [*grads, *state, *params]
