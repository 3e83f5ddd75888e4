"""Seconds to trace and to compile a step of many tables: dense optax, `se.lazy`, `se.exact`.

    python benchmarks/compile.py        # the table of benchmarks/results/compile-cpu-2core.md

Each table is `[V, d]`, read at a column of ids of its own; a small MLP follows; AdamW with a clip
by global norm. "stack" is all of them in one leaf `[tables, V, d]`. Nothing is run. Where V is the
same, XLA compiles what it does to one table once for all of them, of dense optax as well; so there
are tables of V rows each, and tables whose heights go from 100 to 1,000,000.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import machine, markdown
from _results import RESULTS, command_line, heading, write

import sparse_embed as se

CLIP = optax.clip_by_global_norm(1.0)
LAZY = optax.chain(CLIP, optax.adamw(1e-3))


MANY = 50  # tables from which on there is one round, and none of the exact step: minutes each


class Sizes(NamedTuple):
    """What is compiled, and how often."""

    tables: tuple[int, ...]  # of V rows each
    spread: tuple[int, ...]  # of heights from 100 to 1,000,000
    V: int
    d: int
    ids: int
    rounds: int


SIZES = {
    "full": Sizes((1, 8, 26, 100), (26, 100), 100_000, 16, 4096, 1),
    "quick": Sizes((1, 8, 26), (26,), 100_000, 16, 4096, 1),
    "tiny": Sizes((1, 3), (3,), 600, 4, 32, 1),
}


def loss_fn(params: dict, ids: jax.Array) -> jax.Array:
    """`ids` `[batch, tables]`."""
    if "stack" in params:
        rows = jax.vmap(lambda table, own: table[own])(params["stack"], ids.T)
        features = jnp.moveaxis(rows, 0, 1).reshape(ids.shape[0], -1)
    else:
        tables = [params[f"table_{f}"] for f in range(ids.shape[1])]
        features = jnp.concatenate([t[ids[:, f]] for f, t in enumerate(tables)], axis=1)
    return jnp.mean((jax.nn.relu(features @ params["w"]) @ params["v"]) ** 2)


def dense_step(params: dict, state: Any, ids: jax.Array) -> Any:
    """Stock JAX and optax."""
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    updates, state = LAZY.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def ways() -> dict[str, tuple[Any, Callable[[], Any], bool]]:
    """For each way its transformation, what makes a step never traced before, if it stacks."""

    def of(tx: Any) -> Any:
        return lambda: se.train_step(lambda params, ids: loss_fn(params, ids), tx)

    def dense() -> Any:
        step = functools.partial(dense_step)
        return jax.jit(step, donate_argnums=(0, 1))

    lazy, exact = se.lazy(LAZY), se.exact.adamw(1e-3, before=CLIP)
    return {
        "dense": (LAZY, dense, False),
        "lazy": (lazy, of(lazy), False),
        "lazy, stack": (lazy, of(lazy), True),
        "exact": (exact, of(exact), False),
    }


def measure(sizes: Sizes, tables: int, spread: bool) -> list[dict[str, Any]]:
    """One row for each way: medians of its rounds, in turns."""
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    matrices = {"w": struct((sizes.d * tables, 64)), "v": struct((64, 1))}
    heights = np.geomspace(100, 1_000_000, tables) if spread else [sizes.V] * tables
    leaves = {f"table_{f}": struct((int(rows), sizes.d)) for f, rows in enumerate(heights)}
    stack = {"stack": struct((tables, sizes.V, sizes.d))}
    ids = jax.ShapeDtypeStruct((sizes.ids, tables), jnp.int32)
    many = tables > MANY
    names = [name for name, (*_, stacked) in ways().items() if not (spread and stacked)]
    names = [name for name in names if not (many and name == "exact")]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(1 if many else sizes.rounds):
        for name in names:
            tx, make, stacked = ways()[name]
            params = matrices | (stack if stacked else leaves)
            state = jax.eval_shape(tx.init, params)
            step, start = make(), time.perf_counter()
            lowered = step.lower(params, state, ids)
            traced = time.perf_counter()
            lowered.compile()
            seconds[name].append((traced - start, time.perf_counter() - traced))
    dense = [sum(_median(column) for column in zip(*seconds["dense"], strict=True))]
    rows = []
    for name, own in seconds.items():
        trace, compile_ = (_median(column) for column in zip(*own, strict=True))
        kind = "100 to 1,000,000" if spread else f"{sizes.V:,}"
        row = {
            "tables": tables,
            "rows": kind,
            "step": name,
            "trace s": trace,
            "compile s": compile_,
        }
        rows.append(row | {"to dense": round((trace + compile_) / dense[0], 1)})
    return [{k: round(x, 2) if isinstance(x, float) else x for k, x in row.items()} for row in rows]


def _median(column: Sequence[float]) -> float:
    return sorted(column)[len(column) // 2]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    args = command_line(__doc__, "a table of steps.py: nothing is measured here").parse_args(argv)
    if args.only:
        return
    sizes = SIZES[args.size]
    facts = machine() | {"size": args.size}
    rows = [row for tables in sizes.tables for row in measure(sizes, tables, False)]
    rows += [row for tables in sizes.spread for row in measure(sizes, tables, True)]
    text = heading("Tracing and compiling", facts)
    text += [f"Tables `[rows, {sizes.d}]`, {sizes.ids:,} ids each, AdamW and a clip"]
    text += [markdown(rows)]
    print("\n\n".join(text), flush=True)
    out = args.json
    if out is None and args.size == "full":
        out = RESULTS / f"compile-{jax.default_backend()}-{facts['cores']}core.json"
    write(out, facts | {"tables": {"compile": rows}}, text)


if __name__ == "__main__":
    main()
