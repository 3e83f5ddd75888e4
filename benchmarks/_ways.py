"""The steps that are compared: a model with one table and one dense leaf, and ways to train it.

Letters: V rows of the table, d features, n ids of a step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparse_embed as se

RATE = 1e-3

OPTIMIZERS = {
    "adamw + clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    "adam": optax.adam(RATE),
    "adagrad": optax.adagrad(RATE),
    "sgd": optax.sgd(RATE),
}


def head(rows: jax.Array, w: jax.Array) -> jax.Array:
    """The model after the lookup: rows `[n, d]`, or `[b, l, d]` to be summed over each bag."""
    pooled = rows.sum(axis=1) if rows.ndim == 3 else rows
    return jnp.mean(jnp.tanh(pooled @ w))


def loss_fn(params: dict, ids: jax.Array) -> jax.Array:
    return head(params["table"][ids], params["w"])


def ours(optimizer: str) -> tuple[Callable, Callable]:
    """`sparse_embed`: `(init, step)`, as all functions below."""
    tx = se.lazy(OPTIMIZERS[optimizer])
    return tx.init, se.train_step(loss_fn, tx)


def dense(optimizer: str) -> tuple[Callable, Callable]:
    """Stock JAX and optax: gradient, moments and update are all as tall as the table."""
    tx = OPTIMIZERS[optimizer]

    def step(params: dict, opt_state: Any, ids: jax.Array):
        loss, grads = jax.value_and_grad(loss_fn)(params, ids)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx.init, _donated(step)


def folded_sgd() -> tuple[Callable, Callable]:
    """Stock JAX, with the learning rate folded in before the scatter.

    `-RATE` goes in as the cotangent of the loss. The gradient is then added to the table as it is,
    and XLA turns `table + zeros.at[ids].add(g)` into a scatter into the table. It needs no library,
    but the optimizer must be plain SGD.
    """

    def step(params: dict, opt_state: Any, ids: jax.Array):
        loss, vjp = jax.vjp(partial(loss_fn, ids=ids), params)
        (scaled,) = vjp(jnp.full_like(loss, -RATE))
        return jax.tree.map(jnp.add, params, scaled), opt_state, loss

    return lambda params: (), _donated(step)


def ref_sgd() -> tuple[Callable, Callable]:
    """The backward pass adds straight into a reference to the table: again plain SGD only."""

    def step(params: dict, opt_state: Any, ids: jax.Array):
        loss, vjp = jax.vjp(partial(loss_fn, ids=ids), params)
        refs = jax.tree.map(jax.new_ref, params)
        vjp.with_refs(refs)(jnp.full_like(loss, -RATE))
        return jax.tree.map(jax.freeze, refs), opt_state, loss

    return lambda params: (), _donated(step)


def refs_work() -> bool:
    """Whether this jax can make the step of `ref_sgd`."""
    params = {"table": jnp.ones((4, 2)), "w": jnp.ones(2)}
    ids = jnp.array([2, 2])
    try:
        want = folded_sgd()[1](jax.tree.map(jnp.copy, params), (), ids)
        got = ref_sgd()[1](params, (), ids)
    except Exception:  # whichever way a jax without it fails
        return False
    return all(map(jnp.allclose, jax.tree.leaves(got), jax.tree.leaves(want)))


def by_hand_adam(size: int | None = None) -> tuple[Callable, Callable]:
    """Adam on the distinct rows, as an expert writes it for this one model and optimizer.

    Args:
      size: the most distinct rows that a batch can have, `None` for as many as ids. `jnp.unique`
        drops what is beyond it without a word.
    """

    def init(params: dict) -> tuple:
        return jnp.zeros([], jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))

    def adam(g, p, m, v, count):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
        return p - RATE * m_hat / (jnp.sqrt(v_hat) + 1e-8), m, v

    def step(params: dict, opt_state: tuple, ids: jax.Array):
        (table, w), (count, m, v) = (params["table"], params["w"]), opt_state
        num_rows, d = table.shape
        loss, (g_rows, g_w) = jax.value_and_grad(head, (0, 1))(table[ids], w)
        most = min(ids.size, num_rows) if size is None else size
        rows, slot = jnp.unique(ids, return_inverse=True, size=most, fill_value=num_rows)
        g_sum = jax.ops.segment_sum(g_rows.reshape(-1, d), slot.reshape(-1), most)
        old = [x.at[rows].get(mode="fill", fill_value=0) for x in (table, m["table"], v["table"])]
        new = adam(g_sum, *old, count + 1)
        new_w = adam(g_w, w, m["w"], v["w"], count + 1)
        params, m, v = (
            {"table": tree["table"].at[rows].set(x, mode="drop"), "w": y}
            for tree, x, y in zip((params, m, v), new, new_w, strict=True)
        )
        return params, (count + 1, m, v), loss

    return init, _donated(step)


def _donated(step: Callable) -> Callable:
    return jax.jit(step, donate_argnums=(0, 1))
