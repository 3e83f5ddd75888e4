"""What must hold on any device: run by `make gpu` on a GPU, and by `make test` on CPU.

Each step runs on the default device in float32, and beside it dense optax on the host in float64.
Rows that a step does not touch are compared bit by bit.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_embed as se

pytestmark = pytest.mark.device

ROWS, WIDTH, BATCH, STEPS = 50_000, 16, 64, 4
READ = 2_000  # ids are below that, and so are the rows that may move

# name: (shape of the table, loss of params and ids [BATCH, 4])
MODELS = {
    "rows": ((ROWS, WIDTH), lambda p, i: jnp.mean(jnp.tanh(p["t"][i] @ p["w"]))),
    "bag": ((ROWS, WIDTH), lambda p, i: jnp.mean(jnp.tanh(se.lookup_bag(p["t"], i) @ p["w"]))),
    "ragged bag": (
        (ROWS, WIDTH),
        lambda p, i: jnp.mean(
            jnp.tanh(
                se.lookup_bag(p["t"], i.reshape(-1), offsets=jnp.arange(0, 4 * BATCH, 8)) @ p["w"]
            )
        ),
    ),
    "scan": (
        (ROWS, WIDTH),
        lambda p, i: jax.lax.scan(
            lambda c, own: (c + jnp.mean(jnp.tanh(p["t"][own] @ p["w"])), None), 0.0, i
        )[0],
    ),
    "view": (
        (ROWS, WIDTH),
        lambda p, i: jnp.mean(jnp.tanh(jnp.pad(p["t"], ((1, 0), (0, 0)))[i + 1] @ p["w"])),
    ),
    "stack": (
        (4, ROWS // 4, WIDTH),
        lambda p, i: jnp.mean(jnp.tanh(jax.vmap(lambda t, i: t[i])(p["t"], i.T) @ p["w"])),
    ),
}
CLIP = optax.clip_by_global_norm(0.1)
# name: (row-sparse, dense). With a small `eps` Adam takes a full step along rounding errors.
OPTIMIZERS = {
    "sgd": (se.lazy(optax.sgd(0.1)), optax.sgd(0.1)),
    "adagrad": (se.lazy(optax.adagrad(0.1)), optax.adagrad(0.1)),
    "rowwise_adagrad": (se.lazy(se.rowwise_adagrad(0.1)), se.rowwise_adagrad(0.1)),
    "exact adam": (se.exact.adam(0.01, eps=1e-3), optax.adam(0.01, eps=1e-3)),
    "exact adamw, clipped": (
        se.exact.adamw(0.01, eps=1e-3, before=CLIP),
        optax.chain(CLIP, optax.adamw(0.01, eps=1e-3)),
    ),
}


def start(shape):
    rng = np.random.default_rng(0)
    return {"t": rng.normal(size=shape), "w": rng.normal(size=(WIDTH, 3))}


def batches():
    rng = np.random.default_rng(1)
    return [rng.integers(0, READ, (BATCH, 4)).astype(np.int32) for _ in range(STEPS)]


@contextlib.contextmanager
def on_host():
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        yield


def reference(loss, tx, params):
    """Losses and parameters of dense optax, float64."""
    with on_host():

        @jax.jit
        def step(params, state, ids):
            value, grads = jax.value_and_grad(loss)(params, ids)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        params = jax.tree.map(jnp.asarray, params)
        state, values = tx.init(params), []
        for ids in batches():
            params, state, value = step(params, state, jnp.asarray(ids))
            values.append(float(value))
        return values, jax.tree.map(np.asarray, params)


def as_float32(params):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def combinations():
    return [
        (model, optimizer)
        for model in MODELS
        for optimizer in OPTIMIZERS
        if model == "rows" or optimizer in ("adagrad", "exact adam")
        if not (model == "stack" and optimizer.startswith("exact"))  # needs rows first
    ]


@pytest.mark.parametrize("model, optimizer", combinations())
def test_a_step_is_that_of_dense_optax_on_the_host(model, optimizer):
    shape, loss = MODELS[model]
    sparse, dense = OPTIMIZERS[optimizer]
    want_losses, want = reference(loss, dense, start(shape))

    step = se.train_step(loss, sparse)
    before = as_float32(start(shape))
    params, state, losses = as_float32(start(shape)), sparse.init(before), []
    for ids in batches():
        params, state, value = step(params, state, jnp.asarray(ids))
        losses.append(float(value))
    if optimizer.startswith("exact"):
        params, state = sparse.settle(params, state)
    else:
        rows = lambda x: np.asarray(x["t"])[..., READ:, :]  # noqa: E731
        np.testing.assert_array_equal(rows(params), rows(before))
    np.testing.assert_allclose(losses, want_losses, 1e-4, 1e-6)
    for k in want:
        np.testing.assert_allclose(params[k], want[k], 1e-4, 2e-5, err_msg=k)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_jax_on_the_host(model):
    shape, loss = MODELS[model]
    ids = batches()[0]
    with on_host():
        want = jax.grad(loss)(jax.tree.map(jnp.asarray, start(shape)), jnp.asarray(ids))
        want = jax.tree.map(np.asarray, want)
    got = jax.jit(se.grad(loss))(as_float32(start(shape)), jnp.asarray(ids))
    assert isinstance(got["t"], se.RowSparse)
    for k in want:
        g = got[k].todense() if isinstance(got[k], se.RowSparse) else got[k]
        np.testing.assert_allclose(g, want[k], 1e-4, 1e-6, err_msg=k)


@pytest.mark.parametrize("model, optimizer", combinations())
def test_every_table_stays_in_place(model, optimizer):
    shape, loss = MODELS[model]
    tx, _ = OPTIMIZERS[optimizer]
    params = as_float32(start(shape))
    step = se.train_step(loss, tx)
    se.assert_row_sparse(step, params, tx.init(params), jnp.asarray(batches()[0]))
    temp = step.lower(params, tx.init(params), jnp.asarray(batches()[0])).compile()
    assert temp.memory_analysis().temp_size_in_bytes < params["t"].nbytes / 2


def test_bfloat16_rows():
    params = {"t": jnp.ones((ROWS, WIDTH), jnp.bfloat16)}
    ids = jnp.zeros(300, jnp.int32)
    got = jax.jit(se.grad(lambda p, i: jnp.sum(p["t"][i].astype(jnp.float32))))(params, ids)
    assert float(se.coalesce(got["t"]).rows[0, 0]) == 300  # summed in float32, rounded once


def test_the_rows_touched_are_listed():
    loss = MODELS["rows"][1]
    ids = jnp.asarray(batches()[0])
    rows = jax.jit(se.touched(loss))(as_float32(start((ROWS, WIDTH))), ids)["t"]
    np.testing.assert_array_equal(rows[rows < ROWS], np.unique(ids))
