"""The program of an update, to be run on a block of rows of one table.

It is the program of `_update`, and what runs it is the same. But rows of the table and of the
optimizer's state are read a few at a time.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Block, old_rows
from sparse_embed._core import CALLS, called_jaxpr, without_calls
from sparse_embed._on_rows import (
    Flow,
    Listing,
    Path,
    PerRow,
    Reached,
    Reduction,
    Refused,
    Rows,
    Stopping,
)
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
      tables: the gradients of the tables, by number.
      flow: which equations make which values.
      known: results of reductions over rows, as far as they have been found.
    """

    job: Update
    state: list[Any]
    params: list[Any] | None
    row_counts: dict[str, list[Array]]
    extra: dict[str, Any]
    known: dict[Path, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        program, trees = traced(self.job, self.state, self.params, self.extra)
        same_trees(self.job, trees)
        # A function called with several tables would be run whole for each of them.
        like = [struct(g) for g in self.job.grads], self.state, self.params
        calls = any(eqn.primitive.name in CALLS for eqn in program[0].eqns)
        self.program = without_calls(program, *like) if calls else program
        self.jaxpr, self.first = self.program[0], len(self.job.grads)
        self.tables, self.flow = self.job.tables, Flow(self.jaxpr)
        self._before: set[Any] | None = None
        self._by_id = {id(eqn): eqn for eqn in self.jaxpr.eqns}
        self._inputs = [*self.job.grads, *self.state, *(self.params or [])]
        self.counts = own_counts(self.job, self.row_counts) if self.row_counts else {}

    def reductions(self) -> dict[Path, Reduction] | None:
        """The reductions over rows, in order; `None` if one of them may not happen."""
        engine = Listing(*self._engine(None, self.tables))
        inputs = range(len(self._inputs))
        run = lambda: engine.run(self.program, [self._input(n, None) for n in inputs]) and None  # noqa: E731
        jax.eval_shape(run)
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
        rows = jax.tree.map(lambda x: old_rows(x, here.indices), held)
        return HeldBlock(k, here.indices, here.rows, rows)

    def run(
        self, block: HeldBlock | None, wanted: Sequence[int], made: Collection[int] = ()
    ) -> tuple[Stopping, dict[int, Any]]:
        """Runs on a block, or on what is no table's rows, as much as is needed of the program.

        Args:
          block: the rows of one table; of other tables there is one row, which is padding.
          wanted: numbers of the outputs that are needed.
          made: state leaves whose new values the block holds; they are not to be computed.

        Returns:
          What ran it, and the wanted outputs.
        """
        outvars = self.jaxpr.outvars
        new = {outvars[self.first + i]: self._input(self.first + i, block) for i in made}
        engine, outs = self._run(block, [outvars[j] for j in wanted], new)
        return engine, {j: outs[j] for j in wanted}

    def reach(self, block: HeldBlock, path: Path) -> Array:
        """Runs on a block up to a reduction: what is reduced there."""
        try:
            self._run(block, self._at(path).outvars, {})
        except Reached as met:
            return met.block
        raise AssertionError("the reduction was not met again")

    def _run(
        self, block: HeldBlock | None, wanted: Sequence[Any], given: dict[Any, Any]
    ) -> tuple[Stopping, list[Any]]:
        given = given | {v: x for path, x in self.known.items() for v in self.result(path)}
        only, used = self.flow.needed(wanted, given), self.flow.used(wanted, given)
        inputs = [n for n, v in enumerate(self.jaxpr.invars) if v in used]
        args = dict.fromkeys(range(len(self.jaxpr.invars)))
        args |= {n: self._input(n, block) for n in inputs}
        met = self.tables.keys() & {self._owner(n) for n in inputs}
        engine = Stopping(*self._engine(block, met), known=self.known)
        return engine, engine.run(self.program, list(args.values()), only, given)

    def result(self, path: Path) -> list[Any]:
        """The value of the program that a reduction gives.

        None, if it is inside a call that does more; that of a call that only reduces, as `jnp.sum`.
        """
        eqn = top = self._at(path)
        for inner in path[1:]:
            body = called_jaxpr(eqn)[0]
            eqn = next(e for e in body.eqns if id(e) == inner)
            if list(body.outvars) != list(eqn.outvars):
                return []
        return top.outvars

    def before_reductions(self, paths: Iterable[Path]) -> set[Any]:
        """The values of the program that reductions depend on."""
        if self._before is None:
            operands = [v for path in paths for v in self._at(path).invars]
            self._before = self.flow.used(operands)
        return self._before

    def _at(self, path: Path) -> Any:
        """The equation of the program that a path to a reduction begins with."""
        return self._by_id[path[0]]

    def _engine(self, block: HeldBlock | None, tables: Iterable[int]) -> tuple[Any, ...]:
        """Arguments of an engine for a block."""
        real = {j: jnp.zeros(1, bool) for j in tables}
        if block is not None:
            real[block.table] = block.indices < self.tables[block.table].num_rows

        def gather(j: int, x: Any) -> Array:
            if block is None or j != block.table:
                return _padding_row(x)
            return old_rows(jnp.asarray(x), block.indices)

        given = [*self.program[1], *self.state, *(self.params or [])]
        return {j: g.num_rows for j, g in self.tables.items()}, real, given, gather

    def _owner(self, number: int) -> int | None:
        """The leaf that an input of the program belongs to."""
        state = number - self.first
        if 0 <= state < len(self.state):
            return self.job.layout.table[state]
        return number if state < 0 else state - len(self.state)

    def _input(self, number: int, block: HeldBlock | None) -> Any:
        """An input of the program: rows of the block's table, one padding row of any other."""
        state, table, whole = number - self.first, self._owner(number), self._inputs[number]
        if block is not None and state in self.counts.get(block.table, {}):
            return PerRow(block.held.counts[self.counts[block.table][state]], block.table)
        if table == ELSEWHERE:
            reason = "its state mixes the rows of a table with other numbers"
            return Refused(reason, frozenset(self.tables))
        if table not in self.tables:
            return whole
        if block is None or block.table != table:
            own = _padding_row(whole)
        elif state < 0:
            own = block.grad
        else:
            own = block.held.state[state] if state < len(self.state) else block.held.params[table]
        return Rows(own, table, 0 if state < 0 else None)


def _padding_row(x: Any) -> Array:
    """One row like those of a table or of its gradient."""
    like = struct(x)
    return jnp.zeros((1, *like.shape[1:]), like.dtype)
