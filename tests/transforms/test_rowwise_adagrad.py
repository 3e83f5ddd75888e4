"""`se.rowwise_adagrad` against its recurrence in float64, dense and lazy, and against FBGEMM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_embed as se

STEPS, HEIGHT, WIDTH = 6, 20, 8


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids with repeats, and the gradient of each row read."""
    draw = np.random.default_rng(0)
    return [
        (draw.integers(0, 12, 9).astype(np.int32), draw.normal(size=(9, WIDTH)).astype(np.float32))
        for _ in range(STEPS)
    ]


def start() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(HEIGHT, WIDTH)).astype(np.float32)


def reference(rate: float, initial: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Table and accumulator after all batches, in float64."""
    w, s = start().astype(np.float64), np.full(HEIGHT, initial)
    for ids, rows in batches():
        g = np.zeros_like(w)
        np.add.at(g, ids, rows)
        s += (g**2).mean(1)
        w -= rate * g / (np.sqrt(s)[:, None] + eps)
    return w, s


def loss(params, ids, rows):
    return jnp.vdot(params["table"][ids], rows)


@pytest.mark.parametrize("initial, eps", [(0.1, 1e-7), (0.0, 1e-3), (0.5, 0.0)])
@pytest.mark.parametrize("way", ["dense", "train_step", "update"])
def test_recurrence(way, initial, eps):
    inner = se.rowwise_adagrad(optax.constant_schedule(0.3), initial, eps)
    tx = inner if way == "dense" else se.lazy(inner)
    gradient = jax.grad(loss) if way == "dense" else se.grad(loss)

    def by_hand(params, state, ids, rows):
        updates, state = tx.update(gradient(params, ids, rows), state, params)
        return optax.apply_updates(params, updates), state, None

    step = se.train_step(loss, tx) if way == "train_step" else jax.jit(by_hand)
    params = {"table": jnp.asarray(start())}
    state = tx.init(params)
    for batch in batches():
        params, state, _ = step(params, state, *batch)
    w, s = reference(0.3, initial, eps)
    np.testing.assert_allclose(params["table"], w, rtol=2e-5, atol=1e-6)
    sums = optax.tree.get(state, "sum_of_squares")["table"]
    assert sums.shape == (HEIGHT,)
    np.testing.assert_allclose(sums, s, rtol=1e-5)


def test_vectors_and_scalars_are_those_of_adagrad():
    """A leaf `[n]` has an accumulator for each entry, a scalar one of its own."""
    params = {"bias": jnp.arange(3.0), "scale": jnp.float32(2.0)}
    grads = {"bias": jnp.array([1.0, -2.0, 0.0]), "scale": jnp.float32(4.0)}
    tx = se.rowwise_adagrad(0.1, 0.0, 1e-8)
    updates, state = tx.update(grads, tx.init(params))
    np.testing.assert_allclose(updates["bias"], [-0.1, 0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["scale"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(state[0].sum_of_squares["bias"], [1.0, 4.0, 0.0])


def test_narrow_tables_have_a_wide_accumulator():
    params = {"table": jnp.ones((4, 2), jnp.bfloat16)}
    tx = se.rowwise_adagrad(0.1)
    state = tx.init(params)
    assert state[0].sum_of_squares["table"].dtype == jnp.float32
    updates, state = tx.update(params, state)
    assert updates["table"].dtype == jnp.bfloat16
    assert state[0].sum_of_squares["table"].dtype == jnp.float32


@pytest.mark.parametrize("initial, eps", [(-0.1, 1e-7), (0.1, -1e-7), (0.0, 0.0)])
def test_numbers_that_divide_by_zero_are_refused(initial, eps):
    with pytest.raises(ValueError, match="write: se.rowwise_adagrad"):
        se.rowwise_adagrad(0.1, initial, eps)


# FBGEMM's own, about parts that its build for CPUs leaves out.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_as_fbgemm():
    """FBGEMM's EXACT_ROWWISE_ADAGRAD, where it is installed."""
    torch = pytest.importorskip("torch")
    fbgemm = pytest.importorskip("fbgemm_gpu")
    assert fbgemm
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(HEIGHT, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.3,
        eps=1e-3,
        pooling_mode=PoolingMode.SUM,
    )
    tables.split_embedding_weights()[0].data.copy_(torch.from_numpy(start()))
    for ids, rows in batches():
        offsets = torch.arange(len(ids) + 1)
        out = tables(torch.from_numpy(ids).long(), offsets)
        out.backward(torch.from_numpy(rows))
    got = tables.split_embedding_weights()[0].detach().numpy()
    np.testing.assert_allclose(got, reference(0.3, 0.0, 1e-3)[0], rtol=2e-5, atol=1e-6)
