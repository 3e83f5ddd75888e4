"""What it is worth to keep a step's memory, and to have huge pages under a tall table, on CPU.

    make bench                              # all benchmarks, each sets itself up
    python benchmarks/pages.py              # about two minutes, 14 GB of memory
    python benchmarks/pages.py --quick      # half a minute
    python benchmarks/pages.py --only kept  # kept, huge
    python benchmarks/pages.py --json OUT.json

Prints markdown. A full run goes to `benchmarks/results/`. Steps that differ in nothing but a number
of `se.tuning` take turns. *faults* counts the pages that the system had to supply in a step.
Letters: V rows of the table, D features.
"""

import gc
import inspect
import resource
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _contest import OPTIMIZERS, pooled_loss, unpooled_loss
from _inputs import SEED, arrays, dense_leaf, hot, rotated, zipf
from _measure import Way, in_turns, machine, markdown, ratio, times
from _results import RESULTS, command_line, heading, write

import sparse_embed as se

Rows = list[dict[str, Any]]


class Sizes(NamedTuple):
    """Tables `(V, D)`, bags `(b, f)` of ids, and how many rounds to measure."""

    table: tuple[int, int] = (1_000_000, 64)
    bags: tuple[tuple[int, int], ...] = ((4_096, 26), (8_192, 26))
    heights: tuple[int, ...] = (1_000_000, 32_000_000)
    width: int = 16
    hot: int = 8_192
    rounds: int = 8


SIZES = {
    "full": Sizes(),
    "quick": Sizes((200_000, 64), ((4_096, 26),), (1_000_000, 4_000_000), rounds=3),
    "tiny": Sizes((300, 8), ((16, 4),), (60, 400), 8, 32, 1),
}


def perceptron(params: dict, ids: jax.Array) -> jax.Array:
    """The rows of a bag side by side, into a layer of 64."""
    rows = params["table"][ids]
    flat = rows.reshape(ids.shape[0], -1)
    weights = jnp.outer(jnp.sin(jnp.arange(1.0, flat.shape[1] + 1)), jnp.ones(64)) / 50
    return jnp.mean(jnp.tanh(jnp.tanh(flat @ weights) @ jnp.resize(params["w"], 64)))


def factorization_machine(params: dict, ids: jax.Array) -> jax.Array:
    """Products of all pairs of rows of a bag."""
    rows = params["table"][ids]
    pairs = rows.sum(1) ** 2 - (rows**2).sum(1)
    return jnp.mean(jnp.tanh(pairs @ params["w"]))


MODELS = {
    "each row times a vector": unpooled_loss,
    "multi-layer perceptron": perceptron,
    "factorization machine": factorization_machine,
}


class Counted(Way):
    """A `Way` traced with numbers of `se.tuning` of its own, which counts its page faults."""

    def __init__(
        self, tx: optax.GradientTransformation, loss_fn: Callable, shared: dict, w: Any, **numbers
    ):
        tx = se.lazy(tx)
        super().__init__(str(numbers), tx.init, se.train_step(loss_fn, tx), shared, w)
        self.numbers, self.faults = numbers, []

    def run(self, ids: jax.Array) -> float:
        before = {name: getattr(se.tuning, name) for name in self.numbers}
        vars(se.tuning).update(self.numbers)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = super().run(ids)
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        vars(se.tuning).update(before)
        return seconds


def measured(ways: Sequence[Counted], batches: list[jax.Array], rounds: int) -> Rows:
    """One row of a table for each way; ratios are to the last."""
    turns = [rotated(batches, i) for i in range(len(ways))]
    seconds = in_turns(ways, turns, rounds, timed=4, warm=2)
    return [
        times(mine)
        | {"ratio": ratio(mine, seconds[-1]), "faults": round(float(np.median(way.faults)))}
        for way, mine in zip(ways, seconds, strict=True)
    ]


def kept(sizes: Sizes) -> Rows:
    """Rows and their gradients allocated anew in each step, or kept from step to step. Adam."""
    rows = []
    for bags in sizes.bags:
        batches = zipf(sizes.table[0], bags, 1.1)
        for name, loss_fn in MODELS.items():
            shared, w = arrays(*sizes.table), dense_leaf(sizes.table[1])
            ways = [
                Counted(OPTIMIZERS["adam"], loss_fn, shared, w, kept_bytes=number)
                for number in (float("inf"), se.tuning.kept_bytes)
            ]
            for memory, row in zip(
                ("anew", "kept"), measured(ways, batches, sizes.rounds), strict=True
            ):
                rows.append(
                    {"model": name, "ids": f"{bags[0]:,} x {bags[1]}", "memory": memory} | row
                )
    return rows


def huge(sizes: Sizes) -> Rows:
    """A table in pages of 4 kB, or in huge ones. At any height as many rows are touched."""
    rows = []
    for num_rows in sizes.heights:
        batches = hot(num_rows, sizes.bags[0], sizes.hot)
        for optimizer in ("sgd", "adam"):
            ways = []
            for wanted in (False, True):
                shared, w = arrays(num_rows, sizes.width), dense_leaf(sizes.width)
                if optimizer == "sgd":
                    shared = {"table": shared["table"]}
                tx = OPTIMIZERS[optimizer]
                ways.append(Counted(tx, pooled_loss, shared, w, huge_pages=wanted))
            for pages, row in zip(
                ("4 kB", "huge"), measured(ways, batches, sizes.rounds), strict=True
            ):
                rows.append({"V": num_rows, "optimizer": optimizer, "pages": pages} | row)
            del ways, shared
            gc.collect()  # these arrays must go before the next ones come
    return rows


TABLES: dict[str, Callable[[Sizes], Rows]] = {f.__name__: f for f in (kept, huge)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = command_line(__doc__, "a table; those of other benchmarks are not measured here")
    args = parser.parse_args(argv)
    if args.only and args.only not in TABLES:
        return
    facts = machine() | {"size": args.size, "seed": SEED}
    tables, text = {}, heading("Pages of memory", facts)
    for name in [args.only] if args.only else TABLES:
        tables[name] = TABLES[name](SIZES[args.size])
        text.append(f"## {name}: {inspect.getdoc(TABLES[name])}\n\n{markdown(tables[name])}")
    print("\n\n".join(text), flush=True)
    out = args.json
    if out is None and args.size == "full" and not args.only:
        out = RESULTS / f"pages-{jax.default_backend()}-{facts['cores']}core.json"
    write(out, facts | {"tables": tables}, text)


if __name__ == "__main__":
    main()
