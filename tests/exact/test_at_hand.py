"""A `train_step` keeps rows at hand between settling and update: the numbers stay dense optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import sparse_embed as se

ROWS, WIDTH, STEPS = 60, 4, 12

# name: (tables, loss of params and ids [6, 3])
CASES = {
    "alike tables": (
        {"a": ROWS, "b": ROWS, "c": ROWS},
        lambda p, i: sum(jnp.sum(jnp.tanh(p[k][i[:, n]])) for n, k in enumerate("abc")),
    ),
    "tables of other heights, one shorter than its list": (
        {"a": ROWS, "b": 3, "c": 200},
        lambda p, i: sum(jnp.sum(jnp.tanh(p[k][i[:, n] % 3])) for n, k in enumerate("abc")),
    ),
    "a read that has no gradient": (
        {"a": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(p["a"][i[:, 0]] * lax.stop_gradient(p["a"][i[:, 1]]))),
    ),
    "read, and no gradient at all": (
        {"a": ROWS, "b": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(p["a"][i] * lax.stop_gradient(p["b"][i]))),
    ),
    "whole, and without a gradient by row": (
        {"a": ROWS, "b": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(p["a"][i] * p["b"][i])) * lax.stop_gradient(p["b"].mean()),
    ),
    "used whole": (
        {"a": ROWS, "b": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(p["a"][i])) + jnp.sum(p["b"] ** 2),
    ),
    "ids outside": (
        {"a": ROWS, "b": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(p["a"][i + 57] + se.lookup(p["b"], i - 2, mode="clip"))),
    ),
    "in a scan and a cond": (
        {"a": ROWS},
        lambda p, i: lax.scan(
            lambda c, own: (
                c + lax.cond(own[0] > 9, lambda: jnp.sum(jnp.sin(p["a"][own])), lambda: 0.0),
                None,
            ),
            0.0,
            i,
        )[0],
    ),
    "a bag": (
        {"a": ROWS},
        lambda p, i: jnp.sum(jnp.tanh(se.lookup_bag(p["a"], i))) + jnp.sum(p["a"][i[:, 0]] ** 2),
    ),
    "ids made of rows": (
        {"a": ROWS, "b": ROWS},
        lambda p, i: jnp.sum(
            jnp.tanh(p["b"][(jnp.abs(p["a"][i[:, 0], 0]) * 1e3).astype(int) % ROWS])
            + p["a"][i[:, 1]]
        ),
    ),
    "none": ({"a": ROWS, "b": ROWS}, lambda p, i: jnp.sum(p["a"][i]) + jnp.sum(p["b"][i[:0]])),
}
OPTIMIZERS = {
    "adamw": (
        lambda: se.exact.adamw(0.02, before=optax.clip_by_global_norm(1.0)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02)),
    ),
    "momentum": (
        lambda: se.exact.sgd(0.02, momentum=0.9),
        lambda: optax.sgd(0.02, momentum=0.9),
    ),
    "replay": (lambda: se.exact.replay(optax.adan(0.02)), lambda: optax.adan(0.02)),
}


def start(tables):
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=(v, WIDTH)), "float32") for k, v in tables.items()}


def batches():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.integers(0, 12 + n, (6, 3))) for n in range(STEPS)]


def densely(tx, loss, params):
    @jax.jit
    def step(params, state, ids):
        updates, state = tx.update(jax.grad(loss)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for ids in batches():
        params, state = step(params, state, ids)
    return params, state


@pytest.mark.filterwarnings("ignore:.*the gradient of params:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_rows_at_hand(case, optimizer):
    tables, loss = CASES[case]
    exact, dense = OPTIMIZERS[optimizer]
    tx, params = exact(), start(tables)
    step = se.train_step(loss, tx)
    got, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for ids in batches():
        got, state, value = step(got, state, ids)
    assert np.isfinite(value)
    got, state = tx.settle(got, state)
    want, want_state = densely(dense(), loss, params)
    found, expected = jax.tree.leaves((got, state.inner_state)), jax.tree.leaves((want, want_state))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, 2e-5, 2e-5)
