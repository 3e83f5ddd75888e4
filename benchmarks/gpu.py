"""The step on one GPU, at a shape for which NVIDIA publishes FBGEMM's times.

    python benchmarks/gpu.py                                # on a GPU of 80 GB; else it is skipped
    python benchmarks/gpu.py --torch-python OTHER/python    # PyTorch too, with a Python that has it
    python benchmarks/gpu.py --quick                        # a tenth of the rows and ids
    python benchmarks/gpu.py --tiny                         # anywhere; its times mean nothing
    python benchmarks/gpu.py --json OUT.json                # where to write; OUT.md goes beside it

Prints markdown. A full run writes it, and the numbers, to `benchmarks/results/gpu-<device>.md` and
`.json`. **As long as there is no such file, no GPU result is recorded**: the script was written and
is tested, with `--tiny`, on machines without a GPU.

Ten tables, ids drawn by a power law, forward, backward and update, no pooling. The model after the
lookup costs nothing: the looked-up rows are results of the step, as an embedding layer hands them
on, and their cotangents are arrays that are there already, as the layers above hand them back.
"""

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpu_torch import MOMENTS, SEED, SIZES, Sizes, floors, in_another_python, power_law, timed
from _measure import machine, markdown, times
from _results import RESULTS, command_line, heading, write
from _ways import OPTIMIZERS

import sparse_embed as se

GB = 1e9  # bytes


@jax.custom_vjp
def head(rows: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The model after the lookup: its gradient is `cotangent`, and there is nothing to compute."""
    return rows[0, 0]


head.defvjp(lambda rows, cotangent: (rows[0, 0], cotangent), lambda mine, g: (g * mine, None))


def loss_fn(params: dict, ids: jax.Array, cotangents: list) -> tuple[jax.Array, list]:
    """The loss, and the looked-up rows, `[n, d]` of each table."""
    rows = [params[f"t{i}"][ids[i]] for i in range(len(params))]
    return sum(map(head, rows, cotangents)), rows


def ours(optimizer: str) -> tuple[Callable, Any]:
    """`(init, step)`, as the next function."""
    tx = se.lazy(OPTIMIZERS[optimizer])
    return tx.init, se.train_step(loss_fn, tx, has_aux=True)


def dense(optimizer: str) -> tuple[Callable, Any]:
    """Stock JAX and optax."""
    tx = OPTIMIZERS[optimizer]

    def step(params: dict, opt_state: Any, *batch: Any) -> tuple:
        out, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, out

    return tx.init, jax.jit(step, donate_argnums=(0, 1))


STEPS = {"sparse_embed": ours, "dense optax": dense}


class Arrays:
    """Tables and moments, which all steps train in turn, so that they need the memory of one state.

    They are made when an optimizer that needs them comes along.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.there: dict[tuple[str, int], jax.Array] = {}  # ("table" or moment, number of table)

    def missing(self, optimizer: str) -> list[str]:
        return [kind for kind in ("table", *MOMENTS[optimizer]) if (kind, 0) not in self.there]

    def make(self, optimizer: str) -> None:
        shape = (self.sizes.rows, self.sizes.d)
        draw = jax.jit(lambda key: jax.random.uniform(key, shape, minval=-0.05, maxval=0.05))
        keys = jax.random.split(jax.random.key(SEED), self.sizes.tables)
        for kind, i in itertools.product(self.missing(optimizer), range(self.sizes.tables)):
            self.there[kind, i] = draw(keys[i]) if kind == "table" else jnp.zeros(shape)

    def lend(self, optimizer: str, init: Callable) -> tuple[Any, Callable[[Any], None]]:
        """`(params, opt_state)`, and a function that takes back what steps made of it."""
        one_row = {f"t{i}": jnp.zeros((1, self.sizes.d)) for i in range(self.sizes.tables)}
        leaves, treedef = jax.tree.flatten((one_row, init(one_row)))
        tall = [i for i, x in enumerate(leaves) if x.shape == (1, self.sizes.d)]
        keys = itertools.product(("table", *MOMENTS[optimizer]), range(self.sizes.tables))
        places = dict(zip(tall, keys, strict=True))
        for i, key in places.items():
            leaves[i] = self.there[key]

        def take_back(state: Any) -> None:
            found = jax.tree.leaves(state)
            self.there |= {key: found[i] for i, key in places.items()}

        return treedef.unflatten(leaves), take_back


def room() -> float:
    """Bytes that the device has left, infinite where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)


def bandwidth(sizes: Sizes) -> float:
    """Bytes a second of a copy: `x + 1` in place reads and writes each byte once."""
    add, x = jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(sizes.copied)

    def go(count: int) -> None:
        nonlocal x
        for _ in range(count):
            x = add(x)
        x.block_until_ready()

    return 2 * x.nbytes / float(np.median(timed(go, sizes)["enqueued"]))


def jax_rows(sizes: Sizes, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """Ours and dense optax, the optimizers with less memory first, each only where it has room."""
    batches, arrays = [jnp.asarray(x) for x in ids], Arrays(sizes)
    shape = (sizes.tables, sizes.ids, sizes.d)
    cotangents = list(1e-3 * jax.random.normal(jax.random.key(SEED + 1), shape))
    for optimizer, (name, way) in itertools.product(MOMENTS, STEPS.items()):
        row = {"optimizer": optimizer, "step": name}
        need = 4 * sizes.tables * sizes.rows * sizes.d * len(arrays.missing(optimizer))
        if need > room():
            yield row | {"failed": f"no room for {need / GB:.1f} GB of state"}
            continue
        arrays.make(optimizer)
        init, step = way(optimizer)
        state, take_back = arrays.lend(optimizer, init)
        start = time.perf_counter()
        memory = step.lower(*state, batches[0], cotangents).compile().memory_analysis()
        row["compile s"] = round(time.perf_counter() - start, 2)
        row["scratch GB"] = round(memory.temp_size_in_bytes / GB, 3)
        need = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        if need > room():
            yield row | {"failed": f"no room for {need / GB:.1f} GB in the step"}
            continue
        seconds, state = steps_of(step, state, batches, cotangents, sizes)
        take_back(state)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        yield row | seconds | {"peak": peak}


def steps_of(
    step: Callable, state: Any, batches: list, cotangents: list, sizes: Sizes
) -> tuple[dict[str, list[float]], Any]:
    """The times of a step, and the state after it. The state that is given is gone."""
    endless = itertools.cycle(batches)

    def go(count: int) -> None:
        nonlocal state
        for _ in range(count):
            *state, out = step(*state, next(endless), cotangents)
        loss, _ = jax.block_until_ready((state, out))[1]
        assert np.isfinite(loss)

    return timed(go, sizes), state


def line(row: dict[str, Any], floor_ms: dict[str, float]) -> dict[str, Any]:
    """A line of the table."""
    found = {"optimizer": row["optimizer"], "step": row["step"]}
    if "failed" in row:
        found |= {"ms (median)": row["failed"], "quartiles": "-", "enqueued": "-", "of floor": "-"}
    else:
        enqueued = times(row["enqueued"])["ms (median)"]
        ratio = round(enqueued / floor_ms[row["optimizer"]], 2)
        found |= times(row["waited"]) | {"enqueued": enqueued, "of floor": ratio}
    found |= {key: row.get(key, "-") for key in ("compile s", "scratch GB")}
    return found | {"peak GB": round(row["peak"] / GB, 2) if row.get("peak") else "-"}


def report(sizes: Sizes, of_torch: list[dict[str, Any]]) -> tuple[str, dict[str, list]]:
    """Measures; what the tables say, and the tables."""
    ids, speed = power_law(sizes), bandwidth(sizes)
    distinct = round(np.mean([sum(len(np.unique(x)) for x in batch) for batch in ids]))
    floor_rows, floor_ms = floors(distinct, sizes, speed)
    rows = [line(row, floor_ms) for row in (*jax_rows(sizes, ids), *of_torch)]
    rows.sort(key=lambda row: list(MOMENTS).index(row["optimizer"]))
    about = (
        f"{sizes.tables} tables `[{sizes.rows:,}, {sizes.d}]` float32, {sizes.ids:,} ids of each, "
        f"{distinct:,} distinct rows in all. *ms (median)*: each step is waited for. *enqueued*: a "
        f"step of {sizes.enqueued} before one wait, and its ratio to the floor, the bytes of a "
        f"row-sparse step at the speed of a copy, {speed / GB:,.3g} GB/s. *compile*: with tracing. "
        "*peak*: of jax since its start, of PyTorch in this step."
    )
    return about, {"floor": floor_rows, "steps": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what the command line asks for."""
    parser = command_line(__doc__, "a table of another benchmark: then nothing is measured")
    parser.add_argument("--torch-python", metavar="PYTHON", help="one that has PyTorch with CUDA")
    args = parser.parse_args(argv)
    if args.only:
        return 0
    of_torch = {"torch": "not asked for", "rows": []}
    if args.torch_python:  # before jax takes most of the GPU's memory
        of_torch = in_another_python(args.torch_python, args.size)
    if args.size != "tiny" and jax.default_backend() != "gpu":
        asked = args.json or args.torch_python
        recorded = ", ".join(sorted(x.name for x in RESULTS.glob("gpu-*.md"))) or "none"
        verdict = "refused, only --tiny runs without one" if asked else "skipped"
        print(f"no GPU: {verdict}; GPU results recorded: {recorded}")
        return 2 if asked else 0
    facts = machine() | {"torch": of_torch["torch"], "size": args.size, "seed": SEED}
    about, tables = report(SIZES[args.size], of_torch["rows"])
    text = heading("Steps on one GPU", facts) + [about]
    text += [f"## {name}\n\n{markdown(rows)}" for name, rows in tables.items()]
    print("\n\n".join(text), flush=True)
    out = args.json
    if out is None and args.size == "full":
        kind = re.sub("[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
        out = RESULTS / f"gpu-{kind}.json"
    write(out, facts | {"tables": tables}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
