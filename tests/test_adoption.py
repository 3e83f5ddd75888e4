"""The three changed lines of the README, on each kind of model, against the loop they came from."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparse_embed as se

ROWS, WIDTH = 5000, 8


def raw_arrays():
    params = {
        "table": jax.random.normal(jax.random.key(0), (ROWS, WIDTH)),
        "w": jax.random.normal(jax.random.key(1), (WIDTH, 1)),
    }
    return params, lambda params, ids: jnp.tanh(params["table"][ids]) @ params["w"]


def linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(1)(jnp.tanh(nn.Embed(ROWS, WIDTH)(ids)))

    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    return params, model.apply


def nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(ROWS, WIDTH, rngs=rngs)
            self.dense = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, ids):
            return self.dense(jnp.tanh(self.embed(ids)))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return params, lambda params, ids: nnx.merge(graph, params)(ids)


def equinox_model():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        dense: eqx.nn.Linear

        def __call__(self, token):
            return self.dense(jnp.tanh(self.embed(token)))

    one, two = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Embedding(ROWS, WIDTH, key=one), eqx.nn.Linear(WIDTH, 1, key=two))
    params, static = eqx.partition(model, eqx.is_array)
    return params, lambda params, ids: jax.vmap(eqx.combine(params, static))(ids)


@pytest.mark.parametrize("build", [raw_arrays, linen_model, nnx_model, equinox_model])
def test_three_lines(build):
    params, apply = build()

    def loss_fn(params, batch):
        ids, target = batch
        return jnp.mean((apply(params, ids)[:, 0] - target) ** 2)

    def dense_loop(params, batches):
        tx = optax.adagrad(0.1)  # without memory: lazy and dense are the same

        @jax.jit
        def step(params, opt_state, batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        return run(step, params, tx, batches)

    def sparse_loop(params, batches):
        tx = se.lazy(optax.adagrad(0.1))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, batch):
            loss, grads = se.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        se.assert_row_sparse(step, params, tx.init(params), batches[0])
        return run(step, params, tx, batches)

    def run(step, params, tx, batches):
        params, losses = jax.tree.map(jnp.copy, params), []
        opt_state = tx.init(params)
        for batch in batches:
            params, opt_state, loss = step(params, opt_state, batch)
            losses.append(float(loss))
        return params, losses

    keys = jax.random.split(jax.random.key(2), 5)
    batches = [(jax.random.randint(k, (16,), 0, 20), jax.random.normal(k, (16,))) for k in keys]
    dense, dense_losses = dense_loop(params, batches)
    sparse, sparse_losses = sparse_loop(params, batches)
    np.testing.assert_allclose(sparse_losses, dense_losses, rtol=1e-5)
    assert sparse_losses[-1] != sparse_losses[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sparse, dense)
