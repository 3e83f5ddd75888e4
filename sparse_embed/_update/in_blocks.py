"""One optax update of a mixed tree, with the rows of each table gone through in blocks.

A table's rows are read, updated and written a few at a time, so that they stay in a CPU's caches
and no array is as long as the list of ids. A reduction over all rows, such as a global norm, must
be known before the first row is written: each takes a pass of its own over the rows it reduces.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Block, RowSparse
from sparse_embed._core import in_blocks
from sparse_embed._on_rows import Path, Reduction
from sparse_embed._update.at_once import as_array
from sparse_embed._update.block_program import BlockProgram
from sparse_embed._update.deferred import DeferredUpdate, can_wait
from sparse_embed._update.row_pass import Written, row_pass
from sparse_embed._update.sweep import Sweep, sweeps

APPLY, LIST, DEFER = "apply", "list", "defer"  # what is made of updates


def run_in_blocks(
    work: BlockProgram, reductions: dict[Path, Reduction], how: str
) -> tuple[list[Any], list[Any], dict[str, list[Array]]]:
    """Updates and writes all rows.

    Args:
      work: the update.
      reductions: those of `work.reductions()`.
      how: what is made of the updates of tables. APPLY: they are added to the parameters. LIST:
        they are listed. DEFER: either is done when it is asked for, if only the new state and the
        gradient are needed for that; else they are listed.

    Returns:
      For tables the new leaves of the parameters, or updates as `RowSparse`, and for other leaves
      updates; the new leaves of the state; the new row counts.
    """
    tables = work.tables
    long = (k for k, g in tables.items() if how == DEFER and in_blocks(g.indices))
    waiting = {k for k in long if can_wait(work, k, reductions)}
    listed = {k for k in tables if how != APPLY} - waiting
    found = sweeps(tables, listed)
    for path, reduction in reductions.items():
        work.known[path] = _reduced(work, found[reduction.table], path, reduction)
    updates, new_state = _shared(work)
    # Rows of a table are as they were, unless the table's own pass says otherwise.
    for i, old in enumerate(work.state):
        new_state[i] = old if work.job.layout.table[i] in found else new_state[i]
    new_counts = {name: list(rows) for name, rows in work.row_counts.items()}
    for k, sweep in found.items():
        held = work.held(k)
        to_write = Written(
            state={i: held.state[i] for i in work.changed(k)},
            counts=held.counts,
            added=held.params if how == APPLY else {},
            updates={k: sweep.room(work.jaxpr.outvars[k].aval.dtype)} if k in listed else {},
        )
        new = row_pass(work, sweep, k, held, to_write)
        for i, leaf in new.state.items():
            new_state[i] = leaf
        for name, rows in new.counts.items():
            new_counts[name][k] = rows
        if how == APPLY:
            updates[k] = new.added[k]
        elif k in listed:
            updates[k] = RowSparse._make(sweep.listed(), new.updates[k], sweep.shape, True)
        else:
            updates[k] = RowSparse._deferred(DeferredUpdate(work, sweep, k, new_state, new_counts))
    return updates, new_state, new_counts


def _reduced(work: BlockProgram, sweep: Sweep, path: Path, reduction: Reduction) -> Array:
    """One pass over the rows of a table."""
    held = work.held(reduction.table)

    def body(here: Block, total: Array) -> Array:
        block = work.reach(work.read(reduction.table, here, held), path)
        return reduction.join(total, reduction.of(block, here.indices < sweep.num_rows))

    return reduction.end(sweep.each(body, reduction.start()), sweep.count < sweep.num_rows)


def _shared(work: BlockProgram) -> tuple[list[Any], list[Any]]:
    """What is not the rows of a table: dense updates, counts, other state."""
    job = work.job
    owners = [*range(len(job.grads)), *job.layout.table]
    wanted = [j for j, k in enumerate(owners) if k not in work.tables]
    _, outs = work.run(None, wanted)
    shapes = [jnp.shape(x) for x in (*job.grads, *work.state)]
    made: list[Any] = [None] * len(owners)
    for j, x in outs.items():
        made[j] = as_array(x, shapes[j])
    return made[: work.first], made[work.first :]
