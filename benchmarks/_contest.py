"""Steps of jax beside those of other programs, in turns."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _inputs import arrays, dense_leaf, rotated
from _measure import Way, in_turns, ratio, times
from _ways import OPTIMIZERS as SHARED
from _ways import head

import sparse_embed as se

RATE, ACCUMULATED = 1e-3, 0.1
OPTIMIZERS = {
    "sgd": SHARED["sgd"],
    "momentum": optax.sgd(RATE, 0.9),
    "adagrad": SHARED["adagrad"],
    "row-wise adagrad": se.rowwise_adagrad(RATE, ACCUMULATED),
    "adam": SHARED["adam"],
    "adamw + clip": SHARED["adamw + clip"],
}
BY_HAND = ("sgd", "adam")
Kind = tuple[str, str]  # optimizer, step
Loss = Callable[[dict, jax.Array], jax.Array]


def pooled_loss(params: dict, ids: jax.Array) -> jax.Array:
    """ids `[b, f]`, the rows of each bag summed."""
    return head(params["table"][ids], params["w"])


def unpooled_loss(params: dict, ids: jax.Array) -> jax.Array:
    """ids `[b, f]`, each row by itself."""
    return jnp.mean(jnp.tanh(params["table"][ids] @ params["w"]))


def ours(optimizer: str, loss_fn: Loss) -> tuple[Callable, Callable]:
    """`sparse_embed`: `(init, step)`, as all functions below."""
    tx = se.lazy(OPTIMIZERS[optimizer])
    return tx.init, se.train_step(loss_fn, tx)


def by_hand(optimizer: str, loss_fn: Loss) -> tuple[Callable, Callable]:
    """`sparse_embed`, the three parts of the step written out."""
    return _written_out(se.lazy(OPTIMIZERS[optimizer]), se.value_and_grad(loss_fn))


def dense(optimizer: str, loss_fn: Loss) -> tuple[Callable, Callable]:
    """Stock JAX and optax."""
    return _written_out(OPTIMIZERS[optimizer], jax.value_and_grad(loss_fn))


def _written_out(tx: Any, gradient: Callable) -> tuple[Callable, Callable]:
    def step(params: dict, opt_state: Any, ids: jax.Array):
        loss, grads = gradient(params, ids)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx.init, jax.jit(step, donate_argnums=(0, 1))


def steps(loss_fn: Loss) -> dict[Kind, tuple[Callable, Callable]]:
    """`(init, step)` of every step of jax."""
    found = {(name, "sparse_embed"): ours(name, loss_fn) for name in OPTIMIZERS}
    found |= {(name, "sparse_embed, by hand"): by_hand(name, loss_fn) for name in BY_HAND}
    dense_ones = (name for name in OPTIMIZERS if name != "row-wise adagrad")
    return found | {(name, "dense optax"): dense(name, loss_fn) for name in dense_ones}


class Tall(Way):
    """A `Way` whose state may have one number for each row, which it keeps for itself."""

    def __init__(self, name: str, init: Callable, step: Callable, shared: dict, w: jax.Array):
        super().__init__(name, init, step, shared, w)
        num_rows = shared["table"].shape[0]
        self.own = [jnp.full(num_rows, ACCUMULATED) if x.shape == (1,) else x for x in self.own]
        if name.startswith("momentum"):  # has signs, where the last moment is a sum of squares
            self.shared = {i: "m0" if x == "m1" else x for i, x in self.shared.items()}


def ways(shape: tuple[int, int], made: dict[Kind, tuple[Callable, Callable]]) -> dict[Kind, Tall]:
    """The steps on arrays that they share."""
    shared, w = arrays(*shape), dense_leaf(shape[1])
    return {kind: Tall(" ".join(kind), *parts, shared, w) for kind, parts in made.items()}


def compete(entered: Sequence[tuple[Any, Sequence[jax.Array]]], rounds: int) -> list[list[float]]:
    """Seconds of each `(way, batches)`: a way of another program gets their numbers.

    A turn has four steps before those that count: a program that has waited for some seconds is
    slow to come back, torch and FBGEMM more than others.
    """
    turns = []
    for i, (way, batches) in enumerate(entered):
        mine = list(batches) if isinstance(way, Way) else list(range(len(batches)))
        turns.append(rotated(mine, i))
    return in_turns([way for way, _ in entered], turns, rounds, timed=4, warm=4)


def measured(entered: dict, batches: Sequence[jax.Array], rounds: int) -> dict:
    """Seconds of every way; those with the same optimizer are measured in turns."""
    seconds = {}
    for optimizer in OPTIMIZERS:
        kinds = [kind for kind in entered if kind[0] == optimizer]
        own = compete([(entered[kind], batches) for kind in kinds], rounds)
        seconds |= dict(zip(kinds, own, strict=True))
    return seconds


def compared(seconds: dict) -> list[dict[str, Any]]:
    """Rows of a table: every step, beside ours with the same optimizer."""
    return [
        {"optimizer": optimizer, "step": step}
        | times(mine)
        | {"ratio to sparse_embed": ratio(mine, seconds[optimizer, "sparse_embed"])}
        for (optimizer, step), mine in seconds.items()
    ]


def copy_gb_per_second(mb: int) -> float:
    """Bytes read and written by a copy of `mb` MB, with all cores."""
    workers = os.cpu_count() or 1
    pairs = [(np.ones(mb * 125_000 // workers), np.ones(mb * 125_000 // workers))]
    pairs += [(np.ones_like(a), np.ones_like(b)) for a, b in pairs * (workers - 1)]
    seconds = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(9):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            seconds.append(time.perf_counter() - start)
    return 2 * sum(a.nbytes for a, _ in pairs) / float(np.median(seconds)) / 1e9
