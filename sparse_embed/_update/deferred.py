"""Updates of a table that are computed when they are asked for.

The usual step adds the updates to the table and forgets them. So they need not be listed: by the
time they are added, each row's update is computed from its gradient and its new state, a block at a
time. That is how optax writes nearly all optimizers: first the new state, then the update of it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Form, RowSparse, add_rows
from sparse_embed._core import Literal, in_blocks, trace_state
from sparse_embed._on_rows import Path
from sparse_embed._update.block_program import BlockProgram, Held
from sparse_embed._update.row_pass import Written, row_pass
from sparse_embed._update.sweep import Sweep


def can_wait(work: BlockProgram, k: int, reductions: Iterable[Path]) -> bool:
    """Whether the updates of table `k` follow from its gradient and the new state of its rows."""
    jaxpr, first = work.jaxpr, work.first
    new = {jaxpr.outvars[first + i] for i in _new(work, k)}
    old = {jaxpr.invars[first + i] for i in (*work.changed(k), *work.counts.get(k, {}))}
    known = {v for path in reductions for v in work.result(path)}  # before the rows are updated
    update = [jaxpr.outvars[k]]
    if work.flow.used(update, new | known) & old:
        return False
    if work.params is not None and not work.flow.used(update, new | known) & new:
        # Nothing would make the state's pass, if it reads the table, come before the table's own.
        table = jaxpr.invars[first + len(work.state) + k]
        if table in work.flow.used(list(new), known):
            return False
    # What is known of untouched rows, which reductions ask for, is not known of the new state.
    return not work.before_reductions(reductions) & new


def _new(work: BlockProgram, k: int) -> list[int]:
    """The state leaves from which the updates are computed, as their new values are kept."""
    outs = work.jaxpr.outvars[work.first :]
    changed = [i for i in (*work.changed(k), *work.counts.get(k, {})) if not _literal(outs[i])]
    return [i for i in changed if outs[i].aval.dtype == jnp.result_type(work.state[i])]


def _literal(v: Any) -> bool:
    return isinstance(v, Literal)


class DeferredUpdate:
    """The updates of one table, none of which is computed yet: a source of a `RowSparse`.

    It reads the new state when it is asked. If something else writes to that state before, XLA
    keeps a copy of it.

    Args:
      work: the update.
      sweep: the touched rows of the table.
      k: the table.
      state: leaves of the new state.
      counts: the new per-row counts.

    Attributes:
      form: shape of the table.
      dtype: of the updates.
    """

    def __init__(
        self,
        work: BlockProgram,
        sweep: Sweep,
        k: int,
        state: Sequence[Any],
        counts: dict[str, list[Array]],
    ):
        self._work, self._sweep, self._k = work, sweep, k
        old = work.held(k)
        self._held = Held(
            {name: counts[name][k] for name in old.counts},
            old.params,
            {i: state[i] for i in old.state},
        )
        self._home = trace_state()
        self._list: tuple[Sweep, Array] | None = None  # of which rows, and the updates
        self.form, self.dtype = Form(sweep.shape), work.jaxpr.outvars[k].aval.dtype

    def coalesced(self) -> RowSparse:
        """The updates, listed."""
        if not (self._at_home() and self._list):
            sweep = self._work.sweep(self._k, ascending=True)
            self._keep(sweep, rows := self._pass(sweep, {}).updates[self._k])
        else:
            sweep, rows = self._list
        indices = sweep.listed()
        if not sweep.ascending:
            order = jnp.argsort(indices)
            indices, rows = indices[order], rows[order]
        return RowSparse._make(indices, rows, self.form, True)

    def unsummed(self) -> RowSparse:
        """As `Listed.unsummed`: the updates of a row are one to begin with."""
        return self.coalesced()

    def added_to(self, table: Array) -> Array:
        """`table` with the updates added."""
        arrays = table, *jax.tree.leaves(self._held)
        is_listed = self._at_home() and self._list
        if is_listed or not in_blocks(self._sweep.grad.indices, *arrays):
            listed = self.coalesced()
            return add_rows(table, listed.indices, listed.rows)
        written = self._pass(self._sweep, {self._k: table})
        # Nobody may ever ask for this list: the compiler leaves it out then.
        self._keep(self._sweep, written.updates[self._k])
        return written.added[self._k]

    def _pass(self, sweep: Sweep, added: dict[int, Array]) -> Written:
        k = self._k
        to_write = Written(added=added, updates={k: sweep.room(self.dtype)})
        return row_pass(self._work, sweep, k, self._held, to_write, _new(self._work, k))

    def _keep(self, sweep: Sweep, rows: Array) -> None:
        if self._at_home():
            self._list = sweep, rows

    def _at_home(self) -> bool:
        """Whether the function that is traced now made the update: what others list is theirs."""
        return self._home == trace_state()
