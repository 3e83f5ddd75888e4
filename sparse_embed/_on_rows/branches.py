"""`cond` on touched rows: what kind of value each output is, and rows that go ways of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._core import JaxprEqn, open_jaxpr
from sparse_embed._on_rows.values import PerRow, Refused, Rows, tables_of

Program = tuple[Any, Sequence[Any]]  # a jaxpr and its constants
Engine = Any  # an `OnRows`, which calls this


def run_cond(engine: Engine, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """The outputs of a `cond`, some operands of which are rows.

    Args:
      engine: what runs the branches.
      eqn: the equation.
      values: the index of the branch, and the operands.

    Returns:
      Arrays, `Rows`, `PerRow` or `Refused`. Where each row has an index of its own, all branches
      are run, and each row takes what its own gives.
    """
    index, *operands = values
    bodies = [open_jaxpr(body) for body in eqn.params["branches"]]
    if isinstance(index, Rows | Refused):
        return engine.refuse(eqn, tables_of([index]), "branches on a value of some rows")
    if not isinstance(index, PerRow):
        return _one_way(engine, eqn, bodies, index, operands)
    engine.apart += 1
    outs = [engine.run(body, operands) for body in bodies]
    engine.apart -= 1
    return [
        _chosen(engine, index, found, v.aval.shape)
        for found, v in zip(zip(*outs, strict=True), eqn.outvars, strict=True)
    ]


def _one_way(
    engine: Engine, eqn: JaxprEqn, bodies: Sequence[Program], index: Any, operands: list[Any]
) -> list[Any]:
    """All rows take the same branch."""
    kinds: list[list[Any]] = []
    for body in bodies:  # a dry run, to see what kind of value each output is
        outs: list[Any] = []
        jax.eval_shape(lambda: outs.extend(engine.run(body, operands)))  # noqa: B023
        kinds.append(outs)
    merged = [_merged(*outs) for outs in zip(*kinds, strict=True)]
    arrays = [i for i, m in enumerate(merged) if not isinstance(m, Refused)]
    shapes = [v.aval.shape for v in eqn.outvars]

    def branch(body: Program) -> Callable[[], list[Array]]:
        def run() -> list[Array]:
            outs = engine.run(body, operands)
            return [_as_kind(engine, outs[i], merged[i], shapes[i]) for i in arrays]

        return run

    found = jax.lax.switch(index, [branch(body) for body in bodies])
    for i, x in zip(arrays, found, strict=True):
        m = merged[i]
        if isinstance(m, Rows):
            merged[i] = Rows(x, m.table, m.untouched)
        else:
            merged[i] = PerRow(x, m.table) if isinstance(m, PerRow) else x
    return merged


def _merged(*outs: Any) -> Any:
    """What an output is, when the branches give these; `None`: an ordinary array."""
    refused = [v for v in outs if isinstance(v, Refused)]
    if refused:
        return Refused(refused[0].reason, frozenset().union(*(r.tables for r in refused)))
    tables = tables_of(outs)
    counts = [v for v in outs if isinstance(v, PerRow)]
    rows = [v for v in outs if isinstance(v, Rows)]
    if len(tables) > 1 or (counts and rows):
        return Refused("a cond gives values of several kinds", tables)
    if counts:
        return counts[0]
    if not rows or (not tables and len(rows) < len(outs)):
        return None
    table = next((v.table for v in rows if v.table is not None), None)
    return Rows(rows[0].block, table, _alike(outs))


def _as_kind(engine: Engine, value: Any, kind: Any, shape: tuple[int, ...]) -> Array:
    if isinstance(kind, PerRow):
        block = value.block if isinstance(value, PerRow) else value
        return jnp.broadcast_to(block, engine.real[kind.table].shape)
    if not isinstance(kind, Rows):
        return jnp.broadcast_to(value.block if isinstance(value, Rows) else value, shape)
    if kind.table is None:
        return value.block
    return engine.block(value, kind.table, engine.real[kind.table].shape[0])


def _chosen(engine: Engine, index: PerRow, outs: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Of each row what its own branch gives."""
    refused = [v for v in outs if isinstance(v, Refused)]
    if refused:
        return refused[0]
    if all(v is outs[0] for v in outs):
        return outs[0]
    table, (n,) = index.table, index.block.shape
    which = jnp.clip(index.block, 0, len(outs) - 1)
    if not shape:
        blocks = [jnp.broadcast_to(getattr(v, "block", v), (n,)) for v in outs]
        return PerRow(jnp.choose(which, blocks, mode="clip"), table)
    if shape[0] != engine.heights[table] or tables_of(outs) - {table}:
        return Refused("a cond gives each row an array of its own", frozenset({table}))
    blocks = [engine.block(v, table, n) for v in outs]
    unknown = [b for b in blocks if isinstance(b, Refused)]
    if unknown:
        return unknown[0]
    which = which.reshape(-1, *(1,) * (len(shape) - 1))
    block = blocks[0]
    for number, other in enumerate(blocks[1:], start=1):
        block = jnp.where(which == number, other, block)
    return Rows(block, table, _alike(outs))


def _alike(outs: Sequence[Any]) -> Any:
    """What untouched rows hold, if it is the same in all."""
    if not all(isinstance(v, Rows) and v.untouched is not None for v in outs):
        return None
    first = outs[0].untouched
    return first if all(v.untouched == first for v in outs) else None
