"""The program of an update, to be run on a block of rows of one table.

It is the program of `_update`, and what runs it is the same. But rows of the table and of the
optimizer's state are read a few at a time.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Block, gather_rows
from sparse_embed._on_rows import Listing, Path, PerRow, Reduction, Refused, Rows, Stopping
from sparse_embed._update.at_once import Update, own_counts, same_trees, struct, traced
from sparse_embed._update.layout import ELSEWHERE
from sparse_embed._update.sweep import Sweep


class Held(NamedTuple):
    """Arrays that hold rows of one table, or some rows of them."""

    counts: dict[str, Array]  # its rows' own counts, by name
    params: dict[int, Array]  # the table, by its number
    state: dict[int, Array]  # leaves of the state, by number


class HeldBlock(NamedTuple):
    """A block of one table with all that an update reads of its rows."""

    table: int
    indices: Array  # [b]
    grad: Array  # [b, *features]
    held: Held  # [b, ...]


@dataclass
class BlockProgram:
    """An update whose tables are gone through in blocks.

    Args:
      job: what is updated; its gradients are `Listed` or coalesced `RowSparse` for tables.
      state: leaves of the inner state.
      params: leaves of the parameters, or None.
      row_counts: per-row counts of `clock="row"`.
      extra: extra arguments of `inner.update`.

    Attributes:
      jaxpr: inputs are the gradients, the state, the parameters; outputs the updates, the state.
      first: number of its first input, and output, that belongs to the state.
      counts: for each table, the state leaves that count its rows' steps, with their names.
      known: results of reductions over rows, as far as they have been found.
    """

    job: Update
    state: list[Any]
    params: list[Any] | None
    row_counts: dict[str, list[Array]]
    extra: dict[str, Any]
    known: dict[Path, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.program, trees = traced(self.job, self.state, self.params, self.extra)
        same_trees(self.job, trees)
        self.jaxpr, self.first = self.program[0], len(self.job.grads)
        self.counts = own_counts(self.job, self.row_counts) if self.row_counts else {}

    def reductions(self) -> dict[Path, Reduction] | None:
        """The reductions over rows, in order; `None` if one of them may not happen."""
        engine = Listing(*self._engine(None))
        jax.eval_shape(lambda: engine.run(self.program, self._args(None)) and None)
        return None if engine.maybe else engine.found

    def sweep(self, k: int, ascending: bool = False) -> Sweep:
        """The touched rows of table `k`, in blocks."""
        return Sweep(self.job.grads[k], ascending)

    def changed(self, k: int) -> set[int]:
        """The state leaves that hold rows of table `k` and are not what they were."""
        own = (i for i, table in enumerate(self.job.layout.table) if table == k)
        ins, outs = self.jaxpr.invars[self.first :], self.jaxpr.outvars[self.first :]
        return {i for i in own if outs[i] is not ins[i]}

    def held(self, k: int) -> Held:
        """The arrays that hold rows of table `k`."""
        table, counts = self.job.layout.table, self.counts.get(k, {})
        return Held(
            {name: self.row_counts[name][k] for name in counts.values()},
            {} if self.params is None else {k: jnp.asarray(self.params[k])},
            {i: jnp.asarray(x) for i, x in enumerate(self.state) if table[i] == k},
        )

    def read(self, k: int, here: Block, held: Held) -> HeldBlock:
        """The block, with its rows of these arrays."""
        rows = jax.tree.map(lambda x: gather_rows(x, here.indices), held)
        return HeldBlock(k, here.indices, here.rows, rows)

    def run(
        self, block: HeldBlock | None, only: Sequence[bool], made: Collection[int] = ()
    ) -> tuple[Stopping, list[Any]]:
        """Runs the program on a block, or on what is no table's rows.

        Args:
          block: the rows of one table; of other tables there is one row, which is padding.
          only: the equations to run.
          made: state leaves whose new values the block holds; they are not to be computed.

        Returns:
          What ran it, and the program's outputs, as far as `only` leads to them.
        """
        engine = Stopping(*self._engine(block), known=self.known)
        args, own = self._args(block), {}
        for i in made:
            own[self.jaxpr.outvars[self.first + i]] = args[self.first + i]
        return engine, engine.run(self.program, args, only, own)

    def _engine(self, block: HeldBlock | None) -> tuple[Any, ...]:
        """Arguments of an engine for a block."""
        grads = self.job.tables
        real = {j: jnp.zeros(1, bool) for j in grads}
        if block is not None:
            real[block.table] = block.indices < grads[block.table].num_rows

        def gather(j: int, x: Any) -> Array:
            if block is None or j != block.table:
                return _padding_row(x)
            return gather_rows(jnp.asarray(x), block.indices)

        given = [*self.program[1], *self.state, *(self.params or [])]
        return {j: g.num_rows for j, g in grads.items()}, real, given, gather

    def _args(self, block: HeldBlock | None) -> list[Any]:
        """The program's inputs, with a block of one table."""
        job, tables = self.job, self.job.tables

        def rows(x: Any, table: Any, own: Any, untouched: Any = None) -> Any:
            if table == ELSEWHERE:
                reason = "its state mixes the rows of a table with other numbers"
                return Refused(reason, frozenset(tables))
            if table not in tables:
                return x
            here = block is not None and table == block.table
            return Rows(own(block) if here else _padding_row(x), table, untouched)

        grads = [rows(g, k, lambda b: b.grad, 0) for k, g in enumerate(job.grads)]
        state = [
            rows(x, job.layout.table[i], lambda b, i=i: b.held.state[i])
            for i, x in enumerate(self.state)
        ]
        if block is not None:
            for i, name in self.counts.get(block.table, {}).items():
                state[i] = PerRow(block.held.counts[name], block.table)
        params = [
            rows(x, k, lambda b, k=k: b.held.params[k]) for k, x in enumerate(self.params or [])
        ]
        return [*grads, *state, *params]


def _padding_row(x: Any) -> Array:
    """One row like those of a table or of its gradient."""
    like = struct(x)
    return jnp.zeros((1, *like.shape[1:]), like.dtype)
