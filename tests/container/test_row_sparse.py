"""The container: its arithmetic against dense arrays, and the harm that stock transforms do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_embed as se

SHAPE = (7, 3)
INDICES = {
    "no repeats": [4, 0, 6],
    "all the same": [2, 2, 2, 2],
    "first and last": [0, 6, 0],
    "padding": [7, 3, 100, 8, 3],
    "negative": [-1, 3, -7],
    "empty": [],
    "more than rows": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
}


def example(name, dtype=jnp.float32):
    indices = np.array(INDICES[name], np.int32)
    rows = np.random.default_rng(0).normal(size=(len(indices), SHAPE[1]))
    return se.RowSparse(indices, jnp.asarray(rows, dtype), SHAPE)


def dense(grad):
    """float64 reference: a loop over the list."""
    out = np.zeros(grad.shape, np.float64)
    for i, row in zip(np.asarray(grad.indices), np.asarray(grad.rows, np.float64), strict=True):
        if 0 <= i < grad.shape[0]:
            out[i] += row
    return out


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_todense(name, dtype, maybe_jit):
    grad = example(name, dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    out = maybe_jit(lambda g: g.todense())(grad)
    assert out.shape == SHAPE and out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(grad), tolerance, tolerance)


@pytest.mark.parametrize("name", INDICES)
def test_arithmetic(name, maybe_jit):
    grad = example(name)
    table = jnp.arange(21.0).reshape(SHAPE)
    close = lambda got, want: np.testing.assert_allclose(got, want, 1e-5, 1e-6)  # noqa: E731
    close(maybe_jit(lambda g: (g + g).todense())(grad), 2 * dense(grad))
    close(maybe_jit(lambda g: (-g).todense())(grad), -dense(grad))
    close(maybe_jit(lambda g: (g * 0.5).todense())(grad), 0.5 * dense(grad))
    close(maybe_jit(lambda g: (3 * g).todense())(grad), 3 * dense(grad))
    close(maybe_jit(lambda t, g: t + g)(table, grad), table + dense(grad))
    close(maybe_jit(lambda t, g: g + t)(table, grad), table + dense(grad))
    close(np.asarray(table) + grad, table + dense(grad))
    updated = maybe_jit(lambda t, g: optax.apply_updates({"t": t}, {"t": g}))(table, grad)
    close(updated["t"], table + dense(grad))


def test_a_bfloat16_table_is_rounded_once_as_in_dense_arithmetic():
    table = jnp.full((2, 1), 256.0, jnp.bfloat16)
    grad = se.RowSparse(jnp.array([1]), jnp.array([[1.0078125]], jnp.float32), (2, 1))
    np.testing.assert_array_equal(
        optax.apply_updates(table, grad), optax.apply_updates(table, grad.todense())
    )


def test_properties_and_pytree():
    grad = example("padding")
    assert (grad.num_rows, grad.ndim, grad.dtype, grad.shape) == (7, 2, jnp.float32, SHAPE)
    leaves, treedef = jax.tree.flatten(grad)
    again = treedef.unflatten(leaves)
    np.testing.assert_array_equal(again.todense(), grad.todense())
    assert jax.jit(lambda g: g)(grad).shape == SHAPE  # static
    stacked = jax.lax.map(lambda s: grad * s, jnp.arange(3.0))
    one = jax.tree.map(lambda x: x[2], stacked)
    np.testing.assert_allclose(one.todense(), 2 * grad.todense(), 1e-6)


def test_gradients_of_several_batches_add_up():
    a, b = example("no repeats"), example("all the same")
    want = (dense(a) + dense(b)) / 2
    np.testing.assert_allclose((sum([a, b]) / 2).todense(), want, 1e-5, 1e-6)
    np.testing.assert_allclose((a - b).todense(), dense(a) - dense(b), 1e-5, 1e-6)


def test_stacked_containers_are_not_taken_for_one():
    """Found in review: repeats between the entries of a stack were lost under the scatter hints."""
    table = jnp.ones(SHAPE)
    ids = jnp.array([[1, 2], [2, 3]])
    stack = jax.vmap(lambda i: se.grad(lambda t: jnp.sum(jnp.sin(t[i])))(table))(ids)
    for use in (lambda g: g.todense(), lambda g: table + g, se.global_norm, se.coalesce):
        with pytest.raises(ValueError, match=r"(?s)stacked or batched.*got: .*write: .*reshape"):
            use(stack)
    flat = se.RowSparse(stack.indices.reshape(-1), stack.rows.reshape(-1, SHAPE[1]), SHAPE)
    want = jax.grad(lambda t: jnp.sum(jnp.sin(t[ids])))(table)
    np.testing.assert_allclose(flat.todense(), want, 1e-6)


HARM = {
    "scale by a float": lambda g: optax.tree.scale(0.5, g),
    "scale(-1)": lambda g: optax.tree.scale(-1, g),
    "a constant schedule of 2": lambda g: optax.scale_by_schedule(lambda count: 2).update(
        g, optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    )[0],
    "sgd": lambda g: optax.sgd(0.1).update(g, optax.sgd(0.1).init(g))[0],
    "clip": lambda g: optax.clip(1).update(g, optax.EmptyState())[0],
    "set_to_zero": lambda g: optax.set_to_zero().update(g, optax.EmptyState())[0],
    "twice": lambda g: optax.tree.add(g, g),
}
SGD = se.lazy(optax.sgd(1.0))
ENTRY_POINTS = {
    "todense": lambda g: g.todense(),
    "table + g": lambda g: jnp.ones(SHAPE) + g,
    "apply_updates": lambda g: optax.apply_updates(jnp.ones(SHAPE), g),
    "g + g": lambda g: (g + g).rows,
    "g * 2": lambda g: (g * 2).rows,
    "coalesce": lambda g: se.coalesce(g).rows,
    "global_norm": se.global_norm,
    "lazy": lambda g: SGD.update(g, SGD.init(jnp.ones(SHAPE)))[0].rows,
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("harm", HARM)
def test_harmed_indices_never_pass(harm, entry):
    grad, use = example("no repeats"), ENTRY_POINTS[entry]
    assert np.isfinite(use(grad)).all()
    with pytest.raises((TypeError, ValueError), match="(?s)changed its indices.*write: se.lazy"):
        use(HARM[harm](grad))
    # Inside jit values are not known: the dtype may tell, else the result is NaN.
    try:
        out = jax.jit(lambda g: use(HARM[harm](g)))(grad)
    except TypeError as error:
        assert "changed its indices" in str(error)
    else:
        assert np.isnan(out).any()


def test_harm_that_sends_all_indices_out_of_range_is_seen():
    grad = se.RowSparse(jnp.array([5, 6]), jnp.ones((2, 3)), SHAPE)
    assert np.isnan(jax.jit(lambda g: jnp.ones(SHAPE) + optax.tree.scale(2, g))(grad)).any()


@pytest.mark.parametrize(
    "build, error, text",
    [
        (lambda: se.RowSparse(jnp.ones(2), jnp.ones((2, 3)), SHAPE), TypeError, "integers"),
        (lambda: se.RowSparse(jnp.zeros(2, int), jnp.ones((3, 3)), SHAPE), ValueError, r"\[n\]"),
        (lambda: se.RowSparse(jnp.zeros((2, 1), int), jnp.ones((2, 1, 3)), SHAPE), ValueError, ""),
        (lambda: jnp.ones((7, 4)) + example("empty"), ValueError, "different shapes"),
        (
            lambda: example("empty") + se.RowSparse(jnp.zeros(0, int), jnp.zeros((0, 3)), (8, 3)),
            ValueError,
            "different shapes",
        ),
        (lambda: example("empty") * jnp.ones(3), ValueError, "must be a scalar"),
        (lambda: se.coalesce(jnp.ones(3)), TypeError, "must be a RowSparse"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=f"(?s){text}.*got: .*write: "):
        build()
