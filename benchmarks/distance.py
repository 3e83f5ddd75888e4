"""How far sparse forms of Adam end from dense Adam, on a table whose rows are read unevenly.

    python benchmarks/distance.py                    # about half a minute
    python benchmarks/distance.py --quick            # fewer steps
    python benchmarks/distance.py --json OUT.json    # where to write; OUT.md, OUT.svg beside it

Prints markdown. A full run goes to `benchmarks/results/`, its figure to `docs/figures/`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _inputs import BATCHES, SEED, distinct, zipf
from _measure import machine, markdown
from _results import RESULTS, command_line, heading, write
from matplotlib.figure import Figure

import sparse_embed as se

ABOUT = """`distance`: |w - w_dense| / |w_dense - w_0| of the whole table at the end, `w_dense`
that of dense Adam. `loss`: the table's mean squared error to targets without noise, its rows
weighted as they were read, or all alike. One learning rate for all rules, tuned for none."""
HERE = Path(__file__).parent
RATE, B1, B2, EPS, NOISE = 1e-2, 0.9, 0.999, 1e-8, 0.1
LOOKS = {  # colours of Okabe and Ito; markers and dashes tell the lines apart without them
    "`se.lazy`": ("#D55E00", "o", "-", "lazy: rows that are not read stand still"),
    '`se.lazy`, `clock="row"`': ("#0072B2", "s", "--", "lazy, each row counts its own steps"),
    "moments shrunk": ("#CC79A7", "^", "-.", "lazy, moments shrunk for the steps missed"),
    "`se.exact`, settled": ("#009E73", "D", "-", "exact: rows caught up before they are read"),
}
SIZES = {  # rows of the table, features, ids of a step, steps, steps between two looks
    "full": (2000, 4, 64, 3000, 100),
    "quick": (2000, 4, 64, 600, 50),
    "tiny": (40, 2, 8, 20, 10),
}


class Rule(NamedTuple):
    """`init(params)`, `step(params, state, ids, targets)`, and how the params are to be read."""

    init: Callable
    step: Callable
    read: Callable = lambda params, state: params


def loss_fn(params: dict, ids: Any, targets: Any) -> jax.Array:
    return jnp.mean((params["table"][ids] - targets) ** 2)


def rules(rate: Callable) -> dict[str, Rule]:
    """Every rule, dense Adam first."""
    tx, exact = optax.adam(rate, B1, B2, EPS), se.exact.adam(rate, B1, B2, EPS)

    def dense_step(params: dict, state: Any, ids: Any, targets: Any):
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, targets)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    sparse = [se.lazy(tx), se.lazy(tx, clock="row"), exact]
    lazy, row, caught_up = (Rule(x.init, se.train_step(loss_fn, x)) for x in sparse)
    # Not donated: what is settled is a copy, and the run goes on with the rows as they were.
    settled = jax.jit(lambda params, state: exact.settle(params, state)[0])
    made = lazy, row, shrunk(rate), caught_up._replace(read=settled)
    return {"dense": Rule(tx.init, jax.jit(dense_step))} | dict(zip(LOOKS, made, strict=True))


def shrunk(rate: Callable) -> Rule:
    """In between: a row's moments take in the steps that it missed, the row itself does not."""

    def init(params: dict) -> tuple:
        w = params["table"]
        return jnp.zeros_like(w), jnp.zeros_like(w), jnp.zeros((w.shape[0], 1), int), 0

    def step(params: dict, state: tuple, ids: Any, targets: Any):
        (mu, nu, last, made), w = state, params["table"]
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, targets)
        g, now = grads["table"], made + 1
        new_mu = B1 ** (now - last) * mu + (1 - B1) * g  # the steps missed, and this one
        new_nu = B2 ** (now - last) * nu + (1 - B2) * g**2
        direction = new_mu / (1 - B1**now) / (jnp.sqrt(new_nu / (1 - B2**now)) + EPS)
        old, new = (w, mu, nu, last), (w - rate(made) * direction, new_mu, new_nu, now)
        was_read = jnp.zeros_like(last, bool).at[ids].set(True)
        w, mu, nu, last = (jnp.where(was_read, y, x) for x, y in zip(old, new, strict=True))
        return {"table": w}, (mu, nu, last, now), loss

    return Rule(init, jax.jit(step))


def experiment(size: Sequence[int], power: float, made: dict[str, Rule]) -> dict[str, Any]:
    """All rules on the same batches: distances on the way, losses at the end."""
    num_rows, d, n, steps, every = size
    rng = np.random.default_rng(SEED + 1)
    hidden, start = rng.normal(size=(num_rows, d)), rng.normal(scale=0.01, size=(num_rows, d))
    ids = np.concatenate(zipf(num_rows, (-(-steps // BATCHES), n), power))[:steps]
    targets = (hidden[ids] + NOISE * rng.normal(size=(*ids.shape, d))).astype(np.float32)
    found: dict[str, Any] = {}
    twins: list[np.ndarray] = []  # the tables of dense Adam
    for name, rule in made.items():
        params = {"table": jnp.asarray(start, jnp.float32)}
        state, tables = rule.init(params), []
        for number, batch in enumerate(zip(ids, targets, strict=True), 1):
            params, state, _ = rule.step(params, state, *batch)
            if number % every == 0:
                tables.append(np.asarray(rule.read(params, state)["table"], np.float64))
        twins = twins or tables
        pairs, norm = zip(tables, twins, strict=True), np.linalg.norm
        error = np.mean((tables[-1] - hidden) ** 2, axis=1)
        losses = {"loss by reads": np.mean(error[ids]), "loss by rows": np.mean(error)}
        mine = {"distance": [norm(w - twin) / norm(twin - start) for w, twin in pairs]} | losses
        found[name] = jax.tree.map(lambda x: float(f"{x:.3g}"), mine)
    about = f"Zipf exponent {power}: a step reads {distinct(ids)} of {num_rows:,} rows"
    return {"about": about, "steps": list(range(every, steps + 1, every)), "rules": found}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each exponent. The same file for the same numbers."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for panel, run in zip(figure.subplots(1, len(runs), sharey=True), runs, strict=True):
        for i, (name, (color, marker, dashes, label)) in enumerate(LOOKS.items()):
            look = dict(color=color, marker=marker, linestyle=dashes, label=label)
            # Lines that lie on one another have their markers side by side.
            panel.plot(run["steps"], run["rules"][name]["distance"], markevery=(i, 5), **look)
        panel.set(yscale="log", xlabel="training step", title=run["about"])
        panel.title.set_fontsize(10)
    figure.axes[0].set_ylabel("distance from the table of dense Adam\n(1 = as far as that went)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with matplotlib.rc_context({"svg.hashsalt": "distance"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints, and writes what the command line asks for."""
    parser = command_line(__doc__, "a table of another benchmark: then nothing is done here")
    args = parser.parse_args(argv)
    if args.only:
        return
    facts = {k: v for k, v in machine().items() if k in ("device", "python", "jax", "optax")}
    size, steps = SIZES[args.size], SIZES[args.size][3]
    facts |= {"size": args.size, "ids of a step": size[2], "steps": steps, "peak rate": RATE}
    made = rules(optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps))
    runs = [experiment(size, power, made) for power in (1.1, 0.8)]
    text = heading("Distance from dense Adam", facts) + [ABOUT]
    for run in runs:
        kinds = run["rules"].items()
        rows = [{"rule": name} | mine | {"distance": mine["distance"][-1]} for name, mine in kinds]
        text += [run["about"], markdown(rows)]
    print("\n\n".join(text), flush=True)
    out, figure = args.json, args.json and args.json.with_suffix(".svg")
    if out is None and args.size == "full":
        out, figure = RESULTS / "distance.json", HERE.parent / "docs/figures/distance.svg"
    write(out, facts | {"runs": runs}, text)
    if figure:
        draw(runs, figure)


if __name__ == "__main__":
    main()
