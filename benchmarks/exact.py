"""The step of `se.exact` beside that of `se.lazy`: what being exact costs, at several heights.

    python benchmarks/exact.py            # the tables of benchmarks/results/exact-cpu-2core.md

Letters: V rows of the table, d features.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _inputs import SEED, distinct, rotated, uniform
from _measure import in_turns, machine, markdown, ratio, times
from _results import RESULTS, command_line, heading, write

import sparse_embed as se

RATE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 100, 10_000, 1e-4)
CLIP = optax.clip_by_global_norm(1.0)
PAIRS: dict[str, tuple[optax.GradientTransformation, optax.GradientTransformation]] = {
    "adamw + clip": (
        se.lazy(optax.chain(CLIP, optax.adamw(RATE))),
        se.exact.adamw(RATE, before=CLIP),
    ),
    "adam": (se.lazy(optax.adam(RATE)), se.exact.adam(RATE)),
    "sgd, momentum": (se.lazy(optax.sgd(RATE, 0.9)), se.exact.sgd(RATE, 0.9)),
    "rmsprop": (se.lazy(optax.rmsprop(RATE)), se.exact.rmsprop(RATE)),
}


class Sizes(NamedTuple):
    """What is measured, and how often."""

    heights: tuple[int, ...]
    d: int
    ids: int
    rounds: int
    settled: int  # rows of the table of which all rows are settled


SIZES = {
    "full": Sizes((100_000, 1_000_000, 4_000_000), 32, 16_384, 12, 1_000_000),
    "quick": Sizes((100_000, 1_000_000), 32, 16_384, 4, 100_000),
    "tiny": Sizes((300, 600), 4, 32, 1, 300),
}


def loss_fn(params: dict, ids: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(params["table"][ids] @ params["w"]))


def new_params(num_rows: int, d: int) -> dict:
    draw = np.random.default_rng(SEED)
    return {
        "table": jnp.full((num_rows, d), 0.01),
        "w": jnp.asarray(draw.normal(size=d), jnp.float32),
    }


class Trained:
    """A step with params and state of its own."""

    def __init__(self, tx: Any, params: dict):
        self.params, self.state = params, tx.init(params)
        self.step: Callable[..., Any] = se.train_step(loss_fn, tx)

    def run(self, ids: Any) -> float:
        """Makes a step; its seconds."""
        start = time.perf_counter()
        out = jax.block_until_ready(self.step(self.params, self.state, ids))
        seconds = time.perf_counter() - start
        self.params, self.state, loss = out
        assert np.isfinite(loss)
        return seconds


def beside_lazy(num_rows: int, sizes: Sizes, names: Sequence[str]) -> list[dict[str, Any]]:
    """One height: for each optimizer the lazy and the exact step, in turns."""
    batches, rows = uniform(num_rows, sizes.ids), []
    for name in names:
        pair = [Trained(tx, new_params(num_rows, sizes.d)) for tx in PAIRS[name]]
        turns = [rotated(batches, i) for i in range(2)]
        lazy, exact = in_turns(pair, turns, sizes.rounds)
        for way, mine in (("se.lazy", lazy), ("se.exact", exact)):
            row = {"V": num_rows, "optimizer": name, "step": way, "rows touched": distinct(batches)}
            rows.append(row | times(mine) | {"ratio to lazy": ratio(mine, lazy)})
        del pair
        gc.collect()
    return rows


def settling(sizes: Sizes) -> list[dict[str, Any]]:
    """All rows of a table brought up to date, in place."""
    params = new_params(sizes.settled, sizes.d)
    trained = Trained(se.exact.adamw(RATE), params)
    settle = jax.jit(se.exact.adamw(RATE).settle, donate_argnums=(0, 1))
    seconds = []
    for number, ids in enumerate(uniform(sizes.settled, sizes.ids)[:6]):
        trained.run(ids)
        start = time.perf_counter()
        trained.params, trained.state = jax.block_until_ready(settle(trained.params, trained.state))
        seconds += [time.perf_counter() - start] if number else []
    compiled = settle.lower(trained.params, trained.state).compile().memory_analysis()
    scratch = {"scratch MB": round(compiled.temp_size_in_bytes / 1e6, 2)}
    return [{"V": sizes.settled, "d": sizes.d} | times(seconds) | scratch]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = command_line(__doc__, "a table of steps.py: nothing is measured here")
    args = parser.parse_args(argv)
    if args.only:
        return
    sizes = SIZES[args.size]
    facts = machine() | {"size": args.size, "seed": SEED}
    rows = beside_lazy(sizes.heights[0], sizes, list(PAIRS))
    for num_rows in sizes.heights[1:]:
        rows += beside_lazy(num_rows, sizes, list(PAIRS)[:2])
    tables = {"steps": rows, "all rows settled, adamw": settling(sizes)}
    text = heading("Exact steps", facts)
    text += [f"`[V, {sizes.d}]`, {sizes.ids:,} uniform ids a step, warm-up and cosine from step 0"]
    text += [f"## {name}\n\n{markdown(rows)}" for name, rows in tables.items()]
    print("\n\n".join(text), flush=True)
    out = args.json
    if out is None and args.size == "full":
        name = f"exact-{jax.default_backend()}-{facts['cores']}core.json"
        out = RESULTS / name
    write(out, facts | {"tables": tables}, text)


if __name__ == "__main__":
    main()
