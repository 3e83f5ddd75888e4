"""Click prediction on MovieLens-100K: a DeepFM with crosses hashed into 2^20 rows.

    python examples/ctr.py            # train with sparse_embed, then time it against optax
    python examples/ctr.py --help     # every option

A rating of 4 or 5 is a click. User, item and their attributes are ids of one small table;
crosses of them (user x decade, user x genre, item x occupation, ...) are hashed into tables
of 2^20 rows, of which a batch touches about one in a hundred. The model (`deepfm.py`) is
plain flax nnx and the optimizer plain optax: AdamW, warm-up, clipping by the global norm.

TODO figures
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from click_features import Columns, build, split, take
from click_metrics import baselines, score
from deepfm import DeepFM
from flax import nnx
from movielens import CACHE, MovieLens, load, synthetic
from tqdm import tqdm

import sparse_embed as se

matplotlib.use("Agg")  # figures go to a file: no display is needed
from matplotlib import pyplot as plt  # noqa: E402


def make_model(num_fields: int, num_rows: int, args: argparse.Namespace):
    """Parameters, and the loss and the logits as pure functions of them."""
    model = DeepFM(num_fields, num_rows, args.dim, nnx.Rngs(args.seed))
    graphdef, params = nnx.split(model)

    def loss_fn(params, batch, key):
        logits = nnx.merge(graphdef, params)(batch, key)
        return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()

    predict = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))
    return params, loss_fn, predict


def make_optimizer(args: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipping by the global norm.

    Under `se.lazy` the weight decay, like everything else, reaches a row only in the steps
    that touch it: rare crosses are decayed as often as they are seen, no oftener.
    """
    warm_up = min(100, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, warm_up, steps, args.lr / 20)
    adamw = optax.adamw(schedule, eps=1e-4, weight_decay=args.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def sparse_step(loss_fn: Callable, tx: optax.GradientTransformation):
    """All there is to adopting sparse_embed: `lazy` and `train_step`."""
    tx = se.lazy(tx)
    return tx.init, se.train_step(loss_fn, tx)


def dense_step(loss_fn: Callable, tx: optax.GradientTransformation):
    """The same step in plain JAX and optax."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, *args):
        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx.init, step


STEPS = {"sparse": sparse_step, "dense": dense_step}


def batches(columns: Columns, rows: np.ndarray, size: int, seed: int) -> Iterator[Columns]:
    """Full batches of the given ratings, shuffled anew for each pass, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        for start in range(0, len(order) - size + 1, size):
            yield take(columns, order[start : start + size])


def train(columns: Columns, num_fields: int, mode: str, args: argparse.Namespace) -> dict:
    """Trains with one kind of step; scores validation and test after every epoch."""
    train_rows, valid_rows, test_rows = split(len(columns["label"]))
    per_epoch = len(train_rows) // args.batch_size
    steps = min(args.steps or per_epoch * args.epochs, per_epoch * args.epochs)
    params, loss_fn, predict = make_model(num_fields, args.rows, args)
    init, step = STEPS[mode](loss_fn, make_optimizer(args, steps))
    opt_state = init(params)
    stream = batches(columns, train_rows, args.batch_size, args.seed)
    key = jax.random.key(args.seed)
    losses, epochs = [], []

    print(f"\n{mode:<9} train loss   valid AUC  log-loss    test AUC  log-loss")
    for number in tqdm(range(1, steps + 1), unit="step", leave=False):
        key, key_now = jax.random.split(key)
        params, opt_state, loss = step(params, opt_state, next(stream), key_now)
        losses.append(float(loss))
        if number % per_epoch and number < steps:
            continue
        held_out = {"valid": take(columns, valid_rows), "test": take(columns, test_rows)}
        scores = {
            name: score(part["label"], np.asarray(predict(params, part)))
            for name, part in held_out.items()
        }
        epochs.append({"loss": float(np.mean(losses[-per_epoch:])), **scores})
        line = "".join(f"{s['auc']:12.4f}{s['log_loss']:10.4f}" for s in scores.values())
        tqdm.write(f"epoch {len(epochs):<3}{epochs[-1]['loss']:11.4f}{line}")

    best = max(range(len(epochs)), key=lambda e: epochs[e]["valid"]["auc"])
    print(f"chosen by validation AUC: epoch {best + 1}, {in_words(epochs[best]['test'])}")
    return {"losses": losses, "epochs": epochs, "best": epochs[best]}


def in_words(scores: dict[str, float]) -> str:
    return f"test AUC {scores['auc']:.4f}, log-loss {scores['log_loss']:.4f}"


def time_steps(data: MovieLens, num_rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds per step; the modes take turns on the same batches."""
    columns, num_fields = build(data, num_rows, args.drop_threes)
    params, loss_fn, _ = make_model(num_fields, num_rows, args)
    runs = {}
    for mode in args.timed:
        init, step = STEPS[mode](loss_fn, make_optimizer(args, steps=1000))
        runs[mode] = step, jax.tree.map(jnp.copy, params), init(params)
    del params
    seconds = {mode: [] for mode in runs}
    stream = batches(columns, split(len(columns["label"]))[0], args.batch_size, args.seed)
    for _ in range(args.timed_steps + 2):  # the first two compile and warm up
        batch, key = jax.device_put(next(stream)), jax.random.key(args.seed)
        for mode, (step, now, opt_state) in runs.items():
            start = time.perf_counter()
            *state, _ = jax.block_until_ready(step(now, opt_state, batch, key))
            seconds[mode].append(time.perf_counter() - start)
            runs[mode] = step, *state
    return {mode: 1e3 * statistics.median(taken[2:]) for mode, taken in seconds.items()}


def sweep(data: MovieLens, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """`time_steps` for every table size, printed as a table."""
    print("\n" + f"{'rows':>10}" + "".join(f"{mode + ' ms/step':>16}" for mode in args.timed))
    timings = {}
    for num_rows in tqdm(args.sweep, unit="size", leave=False):
        timings[num_rows] = time_steps(data, num_rows, args)
        taken = "".join(f"{ms:16.2f}" for ms in timings[num_rows].values())
        tqdm.write(f"{num_rows:10,}{taken}")
    return timings


def plot(epochs: list[dict], reference: dict, timings: dict, path: Path) -> None:
    """Learning curves on the left, step time against rows on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    number = range(1, len(epochs) + 1)
    for part in ("valid", "test"):
        left.plot(number, [epoch[part]["auc"] for epoch in epochs], "o-", label=part)
    for name, scores in reference.items():
        left.axhline(scores["auc"], color="grey", linestyle="--", linewidth=0.8)
        left.text(1, scores["auc"], f"{name} (test)", va="bottom", fontsize=8)
    left.set(xlabel="epoch", ylabel="AUC", title="click prediction, MovieLens-100K")
    left.legend()
    for mode in next(iter(timings.values()), {}):
        taken = [by_mode[mode] for by_mode in timings.values()]
        right.loglog(list(timings), taken, "o-", label=mode)
    right.set(xlabel="rows of the hashed tables", ylabel="ms per step", title="step time")
    right.set_xscale("log", base=2)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--mode", choices=["sparse", "dense", "both"], default="both",
        help="the step to train with and to time; both: train sparse, time both")
    add("--rows", type=int, default=2**20, help="rows of the hashed tables")
    add("--dim", type=int, default=16, help="features of an embedding")
    add("--epochs", type=int, default=8, help="passes over the training ratings")
    add("--steps", type=int, default=0, help="stop training after so many steps; 0: no limit")
    add("--batch-size", type=int, default=1024, help="ratings in a batch")
    add("--lr", type=float, default=0.02, help="peak learning rate")
    add("--weight-decay", type=float, default=0.3, help="AdamW's weight decay")
    add("--seed", type=int, default=0, help="of weights, dropout and order, not of the split")
    add("--drop-threes", action="store_true", help="leave ratings of 3 out, not as no click")
    add("--sweep", type=int, nargs="*", metavar="ROWS", default=[2**16, 2**18, 2**20, 2**22],
        help="table sizes to time a step at")
    add("--timed-steps", type=int, default=10, help="timed steps for each size and mode")
    add("--data-dir", type=Path, default=CACHE, help="where the data is, or will be put")
    add("--synthetic", action="store_true", help="small made-up data, which needs no network")
    add("--quick", action="store_true", help="one epoch, one small table: a smoke test")
    add("--figure", type=Path, default=Path("ctr.png"), help="where to save the figure")
    # fmt: on
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.rows, args.sweep, args.timed_steps = 1, 2**16, [2**16], 5
    args.timed = ["sparse", "dense"] if args.mode == "both" else [args.mode]
    return args


def main(argv: list[str] | None = None) -> dict:
    """Runs the example; returns what it measured."""
    args = parse(argv)
    data = synthetic() if args.synthetic else load(args.data_dir)
    columns, num_fields = build(data, args.rows, args.drop_threes)

    reference = baselines(columns, split(len(columns["label"])))
    for name, scores in reference.items():
        print(f"baseline {name:<24} {in_words(scores)}")
    run = train(columns, num_fields, args.timed[0], args)
    timings = sweep(data, args)
    plot(run["epochs"], reference, timings, args.figure)
    print(f"\nfigure: {args.figure}")
    return {**run, "baselines": reference, "ms_per_step": timings}


if __name__ == "__main__":
    main()
