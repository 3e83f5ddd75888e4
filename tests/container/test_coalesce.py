"""`coalesce`: each row once, in at least float32, nothing lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_row_sparse import INDICES, SHAPE, dense, example

import sparse_embed as se


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("more", [None, 0, 5])
def test_each_row_once(name, more, maybe_jit):
    grad = example(name)
    real = np.unique([i for i in INDICES[name] if 0 <= i < SHAPE[0]])
    size = None if more is None else len(real) + more
    out, counts = maybe_jit(lambda g: se.coalesce(g, size=size, return_counts=True))(grad)
    assert out.rows.shape[0] == (min(len(INDICES[name]), SHAPE[0]) if size is None else size)
    np.testing.assert_array_equal(out.indices[: len(real)], real)
    pads = np.asarray(out.indices[len(real) :])
    assert (pads >= SHAPE[0]).all() and (np.diff(pads) > 0).all()
    assert not np.asarray(out.rows[len(real) :]).any()
    np.testing.assert_allclose(out.todense(), dense(grad), 1e-6, 1e-6)
    want = [INDICES[name].count(i) for i in real] + [0] * len(pads)
    np.testing.assert_array_equal(counts, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_repeats_are_summed_in_float32(dtype, maybe_jit):
    grad = se.RowSparse(jnp.zeros(1000, jnp.int32), jnp.ones((1000, 1), dtype), (3, 1))
    out = maybe_jit(se.coalesce)(grad)
    assert out.dtype == dtype and float(out.rows[0, 0]) == 1000


def test_float64_stays_float64():
    with jax.enable_x64(True):
        grad = se.RowSparse(jnp.zeros(2, jnp.int64), jnp.full((2, 1), 1e-12) + 1, (3, 1))
        assert float(se.coalesce(grad).rows[0, 0]) == 2 * (1 + 1e-12)


def test_additions_run_in_the_order_of_the_list():
    values = jnp.array([1e8, 1.0, -1e8, 1.0], jnp.float32)  # (1e8 + 1) - 1e8 + 1 in float32 is 1
    grad = se.RowSparse(jnp.array([5, 5, 5, 5]), values[:, None], SHAPE[:1] + (1,))
    assert float(se.coalesce(grad).rows[0, 0]) == 1.0


def test_a_golden_case():
    #                      row 7   row 2   row 7
    rows = jnp.array([[1.0, 0.5], [2.0, 2.0], [4.0, 0.25]])
    out = se.coalesce(se.RowSparse(jnp.array([7, 2, 7]), rows, (9, 2)))
    assert out.indices.tolist() == [2, 7, 9]
    assert out.rows.tolist() == [[2.0, 2.0], [5.0, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32])
def test_small_and_unsigned_indices(dtype):
    shape = (1000, 1)  # taller than a byte counts
    grad = se.RowSparse(jnp.array([3, 120, 3], dtype), jnp.ones((3, 1)), shape)
    out = se.coalesce(grad)
    assert out.indices.tolist() == [3, 120, 1000]
    assert float(grad.todense().sum()) == 3.0


def test_a_size_that_is_too_small_loses_nothing_silently():
    grad = example("no repeats")
    with pytest.raises(ValueError, match=r"(?s)size=2.*got: 3 distinct.*write: .*size=3"):
        se.coalesce(grad, size=2)
    out = jax.jit(lambda g: se.coalesce(g, size=2))(grad)
    assert np.isnan(out.rows).all()
    assert np.isnan(out.todense()).any()


def test_deterministic():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(20_000, 8)), jnp.float32)
    grad = se.RowSparse(jnp.asarray(rng.zipf(1.2, 20_000) % 500), rows, (500, 8))
    runs = [np.asarray(jax.jit(se.coalesce)(grad).rows) for _ in range(5)]
    assert all((run == runs[0]).all() for run in runs)
