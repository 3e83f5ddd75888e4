"""One pass over the touched rows of a table: read, computed on, written, a block at a time."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Block, old_rows, put
from sparse_embed._on_rows import OnRows, PerRow, Refused
from sparse_embed._update.at_once import refusal
from sparse_embed._update.block_program import BlockProgram, Held, HeldBlock
from sparse_embed._update.sweep import Sweep


class Written(NamedTuple):
    """The arrays that a pass writes; for each of its blocks, the rows that go there."""

    added: dict[int, Array] = {}  # the table, to which the update is added
    counts: dict[str, Array] = {}  # the rows' own counts, by name
    state: dict[int, Array] = {}  # new leaves of the state, by number
    updates: dict[int, Array] = {}  # a list of the update, in the order of the sweep


def row_pass(
    work: BlockProgram,
    sweep: Sweep,
    k: int,
    held: Held,
    written: Written,
    made: Collection[int] = (),
) -> Written:
    """Writes the touched rows of some arrays, in place.

    Args:
      work: the update.
      sweep: the rows.
      k: the table.
      held: the arrays that the program reads; see `BlockProgram.held`.
      written: the arrays to write.
      made: state leaves that hold their new values already.

    Returns:
      `written`, with the touched rows written.
    """
    first, counts = work.first, work.counts.get(k, {})
    wanted = [first + i for i in written.state]
    wanted += [first + i for i, name in counts.items() if name in written.counts]
    wanted += [k] if written.added or written.updates else []
    if not wanted:
        return written
    added_in_place = k in written.added and written.added[k] is held.params.get(k)

    def body(here: Block, written: Written) -> Written:
        # Arrays that are written are read as they are by now, so that they can stay in place.
        before = jax.tree.map(lambda x: old_rows(x, here.indices), written.added)
        params = written.added if added_in_place else held.params
        now = Held(held.counts | written.counts, params, held.state | written.state)
        block = work.read(k, here, now)
        engine, outs = work.run(block, wanted, made)
        added, updates = {}, {}
        if k in wanted:
            update = _rows_of(engine, outs[k], block)
            real = engine.real[k].reshape(-1, *(1,) * (update.ndim - 1))
            update = jnp.where(real, update, 0)
            added = {i: x + update for i, x in before.items()}
            updates = dict.fromkeys(written.updates, update)
        new = Written(
            added,
            {n: _count_of(outs[first + i]) for i, n in counts.items() if n in written.counts},
            {i: _rows_of(engine, outs[first + i], block) for i in written.state},
            updates,
        )
        # All rows are made before any is written: each of them once, and from the old ones.
        new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, written)
        new = jax.lax.optimization_barrier(new)
        at = dict.fromkeys(Written._fields, here.indices)
        at["updates"] = jnp.where(engine.real[k], here.position, sweep.length)
        return Written(
            *(
                {i: put(x, at[part], getattr(new, part)[i]) for i, x in arrays.items()}
                for part, arrays in written._asdict().items()
            )
        )

    return sweep.each(body, written)


def _rows_of(engine: OnRows, value: Any, block: HeldBlock) -> Array:
    rows = engine.block(value, block.table, block.indices.size)
    if isinstance(rows, Refused):
        raise ValueError(refusal(rows.reason))
    return rows


def _count_of(value: Any) -> Array:
    if isinstance(value, Refused):
        raise ValueError(refusal(value.reason))
    return value.block if isinstance(value, PerRow) else value
