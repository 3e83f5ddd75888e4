"""Times our step beside torch, FBGEMM, dense optax and a fused C++ program, on CPU.

    make bench                                      # installs the peers in .venv-peers first
    python benchmarks/peers.py                      # about eight minutes, 12 GB of memory
    python benchmarks/peers.py --quick              # about a minute
    python benchmarks/peers.py --only pooled        # memory, pooled, unpooled, rows, ids, width
    python benchmarks/peers.py --json OUT.json      # where to write; OUT.md, OUT-rows.svg beside it
    python benchmarks/peers.py --peers-python PATH  # a Python with torch 2.13 and FBGEMM 1.8

Prints markdown. A full run goes to `benchmarks/results/`, its figures to `docs/figures/`. Steps of
one optimizer and size are measured in turns. What the machine lacks is left out, as a line says.
Letters: V rows of the table, D features, n ids of a step.
"""

import gc
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from _contest import (
    compared,
    compete,
    copy_gb_per_second,
    dense,
    measured,
    ours,
    pooled_loss,
    steps,
    unpooled_loss,
    ways,
)
from _curves import draw
from _inputs import BATCHES, SEED, distinct, hot, zipf
from _measure import MB, machine, markdown, peak_mb, times
from _others import Others
from _results import RESULTS, command_line, heading, write
from steps import compilation

Rows = list[dict[str, Any]]
Tables = dict[str, Rows]  # caption -> rows
HERE = Path(__file__).parent
POWER = 1.1
BYTES = {  # of the update of one row of D float32: what is read and written of row and state
    "sgd": lambda d: 8 * d,
    "momentum": lambda d: 16 * d,
    "adagrad": lambda d: 16 * d,
    "row-wise adagrad": lambda d: 8 * d + 8,
    "adam": lambda d: 24 * d,
    "adamw + clip": lambda d: 24 * d,
}


class Sizes(NamedTuple):
    """Tables `(V, D)`, bags `(b, f)` of ids, and how many rounds to measure."""

    table: tuple[int, int] = (1_000_000, 64)
    bags: tuple[int, int] = (4_096, 26)
    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 8_000_000, 32_000_000)
    rows_d: int = 16
    hot: int = 8_192  # rows that "rows" keeps returning to
    most: int = 8_000_000  # rows of a table of others: dense steps and torch
    ids: tuple[int, ...] = (64, 256, 1_024, 4_096, 16_384, 25_600)  # bags of `per_bag`
    per_bag: int = 16
    ids_table: tuple[int, int] = (1_000_000, 32)
    width: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    width_rows: int = 500_000
    copied: int = 256  # MB
    rounds: int = 6


SIZES = {
    "full": Sizes(),
    "quick": Sizes(
        table=(200_000, 64),
        rows=(10_000, 100_000, 1_000_000),
        ids=(64, 1_024, 16_384),
        ids_table=(200_000, 32),
        width=(8, 32, 128),
        width_rows=100_000,
        rounds=3,
    ),
    "tiny": Sizes((300, 8), (16, 4), (60, 400), 8, 32, 300, (4, 8), 2, (200, 8), (4, 8), 200, 1, 1),
}


def pooled(sizes: Sizes, others: Others) -> Tables:
    """Rows summed over each bag: the fused step of FBGEMM, and what the machine can do.

    `limit.cc` is no library: it makes this one step and no other. Momentum, AdamW and clipping
    have no sparse form in torch.
    """
    shape, batches = sizes.table, zipf(sizes.table[0], sizes.bags, POWER)
    file = others.file("pooled", batches)
    entered = ways(shape, steps(pooled_loss)) | others.peers(shape, sizes.bags, file)
    entered |= others.limit(shape, sizes.bags, file)
    seconds = measured(entered, batches, sizes.rounds)
    copy, (about, touched) = copy_gb_per_second(sizes.copied), _about(sizes, batches)
    counted = []
    for (optimizer, step), mine in seconds.items():
        if step not in ("sparse_embed", "limit.cc"):
            continue
        update = touched * BYTES[optimizer](shape[1])
        forward = sizes.bags[0] * sizes.bags[1] * shape[1] * 4
        reached = (update + forward) / np.median(mine) / 1e9
        row = {"optimizer": optimizer, "step": step, "bytes a row": BYTES[optimizer](shape[1])}
        row |= {"update MB": round(update / MB, 2), "forward MB": round(forward / MB, 2)}
        counted.append(row | {"GB/s": round(reached, 2), "of a copy": f"{reached / copy:.1%}"})
    model = f"Bytes that must move, at the pace reached; a copy reaches {copy:.3g} GB/s here"
    return {about: compared(seconds), f"{model}: {touched:,} rows touched": counted}


def unpooled(sizes: Sizes, others: Others) -> Tables:
    """Rows used one by one, `[b, f, D]`: no FBGEMM, whose CPU step pools."""
    batches = zipf(sizes.table[0], sizes.bags, POWER)
    peers = others.peers(sizes.table, sizes.bags, others.file("unpooled", batches), pooled=False)
    entered = ways(sizes.table, steps(unpooled_loss)) | peers
    return {_about(sizes, batches)[0]: compared(measured(entered, batches, sizes.rounds))}


def rows(sizes: Sizes, others: Others) -> Tables:
    """Is the step time flat in the height of the table? Every table has as many hot rows."""
    cases = []
    for num_rows in sizes.rows:
        batches = hot(num_rows, sizes.bags, sizes.hot)
        cases.append((num_rows, (num_rows, sizes.rows_d), sizes.bags, batches))
    about = f"`[V, {sizes.rows_d}]`, pooled, {sizes.bags[0]:,} x {sizes.bags[1]} ids a step"
    return {about: sweep("V", cases, sizes, others, more=("sgd",))}


def ids(sizes: Sizes, others: Others) -> Tables:
    """Step time against ids of a step."""
    cases = []
    for bags in ((number, sizes.per_bag) for number in sizes.ids):
        batches = zipf(sizes.ids_table[0], bags, POWER)
        cases.append((bags[0] * bags[1], sizes.ids_table, bags, batches))
    about = f"`[{sizes.ids_table[0]:,}, {sizes.ids_table[1]}]`, pooled, Zipf({POWER}) ids"
    return {about: sweep("n", cases, sizes, others)}


def width(sizes: Sizes, others: Others) -> Tables:
    """Step time against features."""
    batches = zipf(sizes.width_rows, sizes.bags, POWER)
    cases = [(d, (sizes.width_rows, d), sizes.bags, batches) for d in sizes.width]
    about = f"`[{sizes.width_rows:,}, D]`, pooled, {sizes.bags[0]:,} x {sizes.bags[1]}"
    return {f"{about} Zipf({POWER}) ids": sweep("D", cases, sizes, others)}


def memory(sizes: Sizes, others: Others) -> Tables:
    """Memory that a step needs beside its arguments, and the seconds to compile it.

    *scratch* is what XLA plans; *peak* is by how much the resident memory of the process rises in
    the first steps of a compiled function, whose arguments are there already.
    """
    del others
    (batch, *_), found = zipf(sizes.table[0], sizes.bags, POWER), []
    made = {kind: parts for kind, parts in steps(pooled_loss).items() if "by hand" not in kind[1]}
    for (optimizer, step), way in ways(sizes.table, made).items():
        size = sum(x.nbytes for x in jax.tree.leaves(way.state()))
        row = compilation(step, way, batch)
        row["scratch, of params and state"] = f"{row['scratch MB'] * MB / size:.2%}"
        row["peak MB"] = peak_mb(lambda way=way: [way.run(batch) for _ in range(3)])
        found.append({"optimizer": optimizer} | row)
    return {_about(sizes, [batch])[0]: found}


def sweep(
    x: str, cases: Sequence[Any], sizes: Sizes, others: Others, more: Sequence[str] = ()
) -> Rows:
    """Adam at several sizes, each size in turns: `cases` of `(size, (V, D), (b, f), batches)`.

    Optimizers in `more` for ours alone.
    """
    rows = []
    for size, shape, bags, batches in cases:
        made = {("adam", "sparse_embed"): ours("adam", pooled_loss)}
        made |= {(name, "sparse_embed"): ours(name, pooled_loss) for name in more}
        peers = {}
        if shape[0] <= sizes.most:
            made["adam", "dense optax"] = dense("adam", pooled_loss)
            peers = others.peers(shape, bags, others.file(f"{x}-{size}", batches))
        both = ways(shape, made) | {k: way for k, way in peers.items() if k[0] == "adam"}
        seconds = compete([(way, batches) for way in both.values()], sizes.rounds)
        for (optimizer, step), mine in zip(both, seconds, strict=True):
            about = {x: size, "rows touched": distinct(batches)}
            rows.append(about | {"optimizer": optimizer, "step": step} | times(mine))
        others.close()  # the next size needs the room
    return sorted(
        rows, key=lambda row: (row["step"] != "sparse_embed", row["step"], row["optimizer"])
    )


def _about(sizes: Sizes, batches: Sequence[jax.Array]) -> tuple[str, int]:
    """A caption, and the distinct rows of a batch."""
    (num_rows, d), (b, f), touched = sizes.table, sizes.bags, distinct(batches)
    return (
        f"`[{num_rows:,}, {d}]`, {b:,} x {f} Zipf({POWER}) ids, {touched:,} rows touched",
        touched,
    )


TABLES: dict[str, Callable[[Sizes, Others], Tables]] = {
    f.__name__: f  # memory first: it shows as long as malloc has nothing left over from others
    for f in (memory, pooled, unpooled, rows, ids, width)
}
FIGURES = {  # table -> its column, what stands at the axis
    "rows": ("V", "rows of the table"),
    "ids": ("n", "ids of a step"),
    "width": ("D", "features"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = command_line(__doc__, "a table; those of other benchmarks are not measured here")
    parser.add_argument("--peers-python", type=Path, default=HERE.parent / ".venv-peers/bin/python")
    args = parser.parse_args(argv)
    if args.only and args.only not in TABLES:
        return
    others = Others(args.peers_python)
    facts = machine() | others.facts | {"size": args.size, "seed": SEED, "batches": BATCHES}
    tables, text = {}, heading("Beside other libraries", facts)
    text += others.left_out
    print("\n\n".join(text), flush=True)
    for name in [args.only] if args.only else TABLES:
        with others:
            tables[name] = TABLES[name](SIZES[args.size], others)
        gc.collect()  # one table's arrays must go before the next one's come
        part = [f"## {name}: {inspect.getdoc(TABLES[name])}"]
        part += [f"{caption}\n\n{markdown(found)}" for caption, found in tables[name].items()]
        text += part
        print("\n" + "\n\n".join(part), flush=True)
    out, figure = args.json, args.json and args.json.with_suffix("")
    if out is None and args.size == "full" and not args.only:
        name = f"peers-{jax.default_backend()}-{facts['cores']}core.json"
        out, figure = RESULTS / name, HERE.parent / "docs/figures/peers"
    write(out, facts | {"tables": tables}, text)
    for name in FIGURES.keys() & tables.keys() if figure else ():
        ((caption, found),) = tables[name].items()
        title = caption.replace("`", "")
        draw(found, *FIGURES[name], title, figure.with_name(f"{figure.name}-{name}.svg"))


if __name__ == "__main__":
    main()
