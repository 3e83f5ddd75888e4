"""Times training steps: against the height of the table, and against other ways to write them.

    python benchmarks/steps.py                    # about two minutes, 8 GB of memory
    python benchmarks/steps.py --quick            # about a minute
    python benchmarks/steps.py --only flat        # flat, pooled, tall or phases
    python benchmarks/steps.py --json OUT.json    # where to write; OUT.md goes beside it

Prints markdown, and writes it with the numbers to `benchmarks/results/` (a quick or partial run
only where `--json` says so). All ways of a table are measured in turns, see `_measure.in_turns`.
"""

import gc
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from _inputs import BATCHES, SEED, arrays, dense_leaf, distinct, hot, rotated, uniform, zipf
from _measure import Way, in_turns, machine, markdown, memory, ratio, times
from _results import RESULTS, command_line, heading, write
from _ways import OPTIMIZERS, by_hand_adam, dense, folded_sgd, loss_fn, ours, ref_sgd, refs_work

from sparse_embed._container.listed import Listed, Part
from sparse_embed._differentiate import trace, value_and_listed
from sparse_embed._update.sweep import Sweep

Tables = dict[str, list[dict[str, Any]]]  # what was measured -> rows
Kind = tuple[str, str]  # optimizer, way


class Sizes(NamedTuple):
    """Tables `(V, d)`, ids of a step, and how many rounds to measure."""

    flat: tuple[int, ...] = (100_000, 1_000_000, 8_000_000)  # V; d is that of `tall`
    pooled: tuple[int, int] = (1_000_000, 64)
    tall: tuple[int, int] = (8_000_000, 32)
    ids: int = 16_384
    hot: int = 8_192  # rows of the table that "flat" keeps returning to
    bags: tuple[int, int] = (4_096, 26)
    room: int = 32_768  # more rows than any batch of `bags` touches
    rounds: int = 20
    dense_rounds: int = 10


SIZES = {
    "full": Sizes(),
    "quick": Sizes(
        (50_000, 200_000, 800_000), (200_000, 64), (800_000, 32), rounds=6, dense_rounds=4
    ),
    "tiny": Sizes((200, 400), (300, 8), (400, 8), 64, 32, (16, 4), 64, 1, 1),  # for the tests
}


def flat(sizes: Sizes) -> Tables:
    """Is the step time flat in the height of the table?

    The step touches the same number of bytes at every height. What the machine does with them is
    not quite the same: of ids drawn from all rows, the more find their row in a cache the shorter
    the table is. Ids from the same few rows in every step find it there at any height, but in a
    tall table each of them lies in a page of its own, and has to be looked up in page tables that
    grow with the table. (Huge pages shrink these; `pages.py` measures by how much.)
    """
    d, kinds = sizes.tall[1], ("all rows", f"{sizes.hot:,} rows")
    ways, batches, tables = [], [], {}
    for num_rows in sizes.flat:
        shared, w = arrays(num_rows, d), dense_leaf(d)
        drawn = uniform(num_rows, sizes.ids), hot(num_rows, sizes.ids, sizes.hot)
        for kind, ids in zip(kinds, drawn, strict=True):
            ways.append(Way(kind, *ours("adamw + clip"), shared, w))
            batches.append(rotated(ids, len(ways)))
    seconds = in_turns(ways, batches, sizes.rounds)
    for i, kind in enumerate(kinds):
        caption = f"`[V, {d}]`, adamw + clip, {sizes.ids:,} ids a step drawn from {kind}"
        tables[caption] = [
            {"V": num_rows, "MB of table and moments": round(12e-6 * num_rows * d, 1)}
            | {"rows touched": distinct(ids), "their MB": round(12e-6 * distinct(ids) * d, 1)}
            | times(mine)
            | {"ratio to the first": ratio(mine, seconds[i])}
            for num_rows, ids, mine in zip(sizes.flat, batches[i::2], seconds[i::2], strict=True)
        ]
    return tables


def pooled(sizes: Sizes) -> Tables:
    """Other ways to write the step: bags of ids, their rows summed."""
    (num_rows, d), batches = sizes.pooled, zipf(sizes.pooled[0], sizes.bags, 1.1)
    caption = f"`[{num_rows:,}, {d}]`, {_bags(sizes)}, {distinct(batches):,} rows touched"
    ways = competitors() | {
        ("adam", f"by hand, room for {sizes.room:,} rows"): by_hand_adam(sizes.room)
    }
    return {caption: against(sizes.pooled, batches, ways, sizes.dense_rounds)}


def tall(sizes: Sizes) -> Tables:
    """Other ways to write the step: single ids, a taller table."""
    (num_rows, d), batches = sizes.tall, uniform(sizes.tall[0], sizes.ids)
    about = f"{sizes.ids:,} uniform ids, {distinct(batches):,} rows touched"
    ways = competitors()
    measured = against(sizes.tall, batches, ways, sizes.dense_rounds)
    return {f"`[{num_rows:,}, {d}]`, {about}": measured}


def phases(sizes: Sizes) -> Tables:
    """Where the time of our step goes, its memory and its compilation.

    Each part is compiled by itself and finds what it needs laid out. The update is what is left.
    """
    optimizer, batches = "adam", zipf(sizes.pooled[0], sizes.bags, 1.1)
    shared, w = arrays(*sizes.pooled), dense_leaf(sizes.pooled[1])
    steps = {"sparse_embed": ours(optimizer), "dense optax": dense(optimizer)}
    ways = {name: Way(name, *step, shared, w) for name, step in steps.items()}
    compiled = [compilation(name, way, batches[0]) for name, way in ways.items()]
    parts = Parts(ways["sparse_embed"])
    turns = [batches, rotated(batches, 1)]
    whole, _ = in_turns([ways["sparse_embed"], parts], turns, sizes.rounds, timed=4, warm=2)
    rest = np.median(whole) - sum(np.median(mine) for mine in parts.seconds.values())
    timed = {"whole step": whole} | parts.seconds
    if rest > 0:  # of a tiny step the parts, called one by one, take longer than the whole
        timed["rows updated"] = [rest]
    about = f"`[{sizes.pooled[0]:,}, {sizes.pooled[1]}]`, {optimizer}, {_bags(sizes)}"
    return {
        f"{about}; parts": [
            {"part": part} | times(mine) | {"of the whole": ratio(mine, whole)}
            for part, mine in timed.items()
        ],
        f"{about}; memory and compilation": compiled,
    }


def _bags(sizes: Sizes) -> str:
    return f"{sizes.bags[0]:,} x {sizes.bags[1]} Zipf(1.1) ids"


def competitors() -> dict[Kind, tuple[Callable, Callable]]:
    """`(init, step)` of every optimizer, ours and others."""
    found = {(name, "sparse_embed"): ours(name) for name in OPTIMIZERS}
    found |= {(name, "dense optax"): dense(name) for name in OPTIMIZERS}
    found["adam", "by hand: unique, gather, scatter"] = by_hand_adam()
    found["sgd", "jax.vjp, rate folded in"] = folded_sgd()
    if refs_work():
        found["sgd", "jax.vjp, with_refs to the table"] = ref_sgd()
    else:
        print(f"Left out: with_refs to the table, which jax {jax.__version__} cannot do.\n")
    return found


def against(
    shape: tuple[int, int],
    batches: list[jax.Array],
    steps: dict[Kind, tuple[Callable, Callable]],
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows of a table: every step, beside ours with the same optimizer."""
    shared, w = arrays(*shape), dense_leaf(shape[1])
    kinds = sorted(steps, key=lambda kind: list(OPTIMIZERS).index(kind[0]))
    ways = [Way(" ".join(kind), *steps[kind], shared, w) for kind in kinds]
    turns = [rotated(batches, i) for i in range(len(ways))]
    seconds = dict(zip(kinds, in_turns(ways, turns, rounds), strict=True))
    return [
        {"optimizer": optimizer, "step": way}
        | times(mine)
        | {"ratio to sparse_embed": ratio(mine, seconds[optimizer, "sparse_embed"])}
        for (optimizer, way), mine in seconds.items()
    ]


class Parts:
    """The parts of our step before the update, on the state of a `Way`."""

    def __init__(self, way: Way):
        self.way = way
        listing = value_and_listed(loss_fn, 0, False)
        table = way.state()[0]["table"]

        def listed(part: Part) -> Listed:
            return Listed([part], table.shape, table.dtype)

        def read(params: dict, ids: jax.Array) -> tuple:
            program = trace(loss_fn, 0, (params, ids), {})
            value, grads, _ = listing(program, params, ids)
            (part,) = grads["table"].parts
            return value, grads["w"], part

        def slots(part: Part) -> tuple:
            sweep = Sweep(listed(part))
            return sweep.slot, sweep.indices, sweep.count

        def sums(part: Part, slot: jax.Array) -> jax.Array:
            return listed(part).sums(slot, 0, Sweep(listed(part)).window)

        self.compiled = {
            "rows read and added up, loss, gradients": jax.jit(read),
            "ids told apart": jax.jit(slots),
            "repeats summed": jax.jit(sums),
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self.compiled}

    def run(self, ids: jax.Array) -> float:
        read, slots, sums = self.compiled
        *_, part = self._timed(read, self.way.state()[0], ids)
        slot, *_ = self._timed(slots, part)
        self._timed(sums, part, slot)
        return sum(mine[-1] for mine in self.seconds.values())

    def _timed(self, name: str, *args: Any) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(self.compiled[name](*args))
        self.seconds[name].append(time.perf_counter() - start)
        return out


def compilation(name: str, way: Way, ids: jax.Array) -> dict[str, Any]:
    """Memory of a compiled step, and the seconds until it is compiled."""
    start = time.perf_counter()
    lowered = way.step.lower(*way.state(), ids)
    middle = time.perf_counter()
    row = {"step": name} | memory(lowered.compile())
    end = time.perf_counter()
    return row | {"trace s": round(middle - start, 2), "compile s": round(end - middle, 2)}


TABLES: dict[str, Callable[[Sizes], Tables]] = {f.__name__: f for f in (flat, pooled, tall, phases)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = command_line(__doc__, "a table; those of other benchmarks are not measured here")
    args = parser.parse_args(argv)
    if args.only and args.only not in TABLES:
        return
    facts = machine() | {"size": args.size, "seed": SEED, "batches": BATCHES}
    tables, text = {}, heading("Step times", facts)
    print("\n\n".join(text), flush=True)
    for name in [args.only] if args.only else TABLES:
        tables[name] = TABLES[name](SIZES[args.size])
        gc.collect()  # one table's arrays must go before the next one's come
        part = [f"## {name}: {inspect.getdoc(TABLES[name])}"]
        part += [f"{caption}\n\n{markdown(rows)}" for caption, rows in tables[name].items()]
        text += part
        print("\n" + "\n\n".join(part), flush=True)
    out = args.json
    if out is None and args.size == "full" and not args.only:
        out = RESULTS / f"{jax.default_backend()}-{facts['cores']}core.json"
    write(out, facts | {"tables": tables}, text)


if __name__ == "__main__":
    main()
