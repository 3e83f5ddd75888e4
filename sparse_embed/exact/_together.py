"""Rows of several tables brought up to date together: less to compile, and fewer operations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_embed._core import is_concrete, platform
from sparse_embed.exact._table import Block, CatchUp, Held, Table


def settled_blocks(
    tables: dict[int, Table],
    held: dict[int, Held],
    indices: dict[int, Array],
    ascending: bool = True,
) -> dict[int, Block]:
    """The rows at some indices of the tables that rest, as of the present.

    Args:
      tables: how each table rests.
      held: its rows, their moments and clocks.
      indices: `[u]` for each leaf whose rows are asked for.
      ascending: whether these are in ascending order.

    Returns:
      For each of these that rests, and of which there are any, a block.
    """
    asked = {k: own for k, own in indices.items() if k in tables and own.size}
    blocks = {k: tables[k].gathered(own, held[k], ascending) for k, own in asked.items()}
    alike: dict[Any, list[int]] = {}
    for k, block in blocks.items():
        rows = [block.w, *block.moments.values()]
        kind = tuple((x.shape[1:], x.dtype) for x in rows)
        alike.setdefault((tables[k].catch_up, *block.moments, kind), []).append(k)
    caught_up: dict[int, tuple[Array, dict[str, Array]]] = {}
    for ks in alike.values():
        new, moments = _caught_up(tables[ks[0]].catch_up, [blocks[k] for k in ks])
        ends = np.cumsum([blocks[k].indices.size for k in ks]).tolist()
        for k, end in zip(ks, ends, strict=True):
            own = slice(end - blocks[k].indices.size, end)
            caught_up[k] = new[own], {name: x[own] for name, x in moments.items()}
    # Else what is made of the rows of each table would have their place in the joint list compiled
    # in, and XLA could not compile it once for tables that are alike.
    caught_up = jax.lax.optimization_barrier(caught_up)
    return {
        k: tables[k].settled_block(
            block, caught_up[k], held[k][0].shape[0], tables[k].agrees(held[k][2])
        )
        for k, block in sorted(blocks.items())
    }


def _caught_up(catch_up: CatchUp, blocks: list[Block]) -> tuple[Array, dict[str, Array]]:
    """The rows of some blocks, one block after the other, after the steps that they missed."""
    block = _joined(blocks) if len(blocks) > 1 else blocks[0]
    # Others than CPUs would wait for the host, and outside of `jit` a branch is compiled each time.
    if platform() != "cpu" or is_concrete(block.missed):
        return catch_up(block)
    # A branch is compiled by itself: else XLA would compile its operations once more for each table
    # whose rows come out.
    late = jnp.any(block.missed > 0)
    return jax.lax.cond(late, lambda: catch_up(block), lambda: (block.w, block.moments))


def _joined(blocks: list[Block]) -> Block:
    """The rows of some tables, one after the other."""

    def joined(of: Callable[[Block], Any]) -> Any:
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *map(of, blocks))

    return Block(
        joined(lambda b: b.indices),
        joined(lambda b: b.w),
        joined(lambda b: b.moments),
        joined(lambda b: b.last),
        joined(lambda b: b.missed),
        joined(lambda b: b.then),
        joined(lambda b: jnp.broadcast_to(b.now, b.then.shape)),
    )
