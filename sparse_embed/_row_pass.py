"""One pass over the touched rows of a table: read, computed on, written, a block at a time."""

from collections.abc import Collection

import jax
import jax.numpy as jnp

from sparse_embed._block_program import BlockProgram
from sparse_embed._each_block import Block, put
from sparse_embed._filled import Held, as_taken, count_of, rows_of
from sparse_embed._staged import needed
from sparse_embed._sweep import Sweep


def row_pass(
    work: BlockProgram,
    sweep: Sweep,
    k: int,
    held: Held,
    written: Held,
    made: Collection[int] = (),
) -> Held:
    """Writes the touched rows of some arrays, in place.

    Args:
      work: the update.
      sweep: the rows.
      k: the table.
      held: the arrays that the program reads; see `BlockProgram.held`.
      written: the arrays to write: "state" and "counts", the new ones; "added", tables to which the
        update is added; "updates", lists of the update in the order of the sweep.
      made: state leaves that hold their new values already.

    Returns:
      `written`, with the touched rows written.
    """
    jaxpr, first, counts = work.jaxpr, work.first, work.counts.get(k, {})
    wanted = [first + i for i in written["state"]]
    wanted += [first + i for i, name in counts.items() if name in written["counts"]]
    wanted += [k] if written["added"] or written["updates"] else []
    if not wanted:
        return written
    stop = [jaxpr.outvars[first + i] for i in made]
    only = needed(jaxpr, [jaxpr.outvars[j] for j in wanted], stop)

    table = written["added"].get(k)
    in_place = table is not None and table is held["params"].get(k)

    def body(here: Block, written: Held) -> Held:
        # Arrays that are written are read as they are by now, so that they can stay in place.
        now: Held = {part: x | written.get(part, {}) for part, x in held.items()}
        if in_place:
            now["params"] = written["added"]
        block = work.filled(k, here, now | {"added": written["added"]})
        engine, outs = work.run(block, only, made)
        new: Held = {
            "state": {i: rows_of(engine, outs[first + i], block) for i in written["state"]},
            "counts": {n: count_of(outs[first + i]) for i, n in counts.items()},
        }
        if k in wanted:
            update = rows_of(engine, outs[k], block)
            real = engine.real[k].reshape(-1, *(1,) * (update.ndim - 1))
            new["updates"] = {k: jnp.where(real, update, 0)}
            new["added"] = {i: x + new["updates"][i] for i, x in block.held["added"].items()}
        new = {p: {i: new[p][i] for i in arrays} for p, arrays in written.items()}
        # All rows are made before any is written: each of them once, and from the old ones.
        new = jax.lax.optimization_barrier(jax.tree.map(as_taken, new, written))
        at = dict.fromkeys(written, here.indices)
        at["updates"] = jnp.where(engine.real[k], here.position, sweep.length)
        return {
            part: {i: put(x, at[part], new[part][i]) for i, x in arrays.items()}
            for part, arrays in written.items()
        }

    return sweep.each(body, written)
