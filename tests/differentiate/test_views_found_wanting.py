"""Views that were once wrong, crashed, went dense without a word or took forever, by kind."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparse_embed as se

T = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), "float32")
IDS = jnp.array([1, 3])


def as_dense(tree):
    sparse = lambda x: isinstance(x, se.RowSparse)  # noqa: E731
    return jax.tree.map(lambda g: g.todense() if sparse(g) else g, tree, is_leaf=sparse)


def check(loss, params, *args, sparse=("t",)):
    """The gradient is that of `jax.grad`, and these leaves are row-sparse."""
    want, got = jax.grad(loss)(params, *args), se.grad(loss)(params, *args)
    assert {k for k, g in got.items() if isinstance(g, se.RowSparse)} == set(sparse)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), as_dense(got), want)


# --- rows that need all of a table, where no derivative goes --------------------------------------

LAID_OUT = {
    "median": lambda t: jnp.median(t),
    "median of columns": lambda t: jnp.median(t, axis=0),
    "quantile": lambda t: jnp.quantile(t, 0.9),
    "percentile of norms": lambda t: jnp.percentile(jnp.linalg.norm(t, axis=1), 90),
    "cumsum, read": lambda t: jnp.cumsum(t, 0)[IDS],
    "argsort, read": lambda t: jnp.argsort(t[:, 0])[IDS],
    "searchsorted": lambda t: jnp.searchsorted(jnp.sort(t[:, 0]), 0.3),
}


@pytest.mark.parametrize("metric", LAID_OUT)
def test_a_metric_may_need_the_whole_table(metric):
    def loss(p):
        return jnp.sin(p["t"][IDS]).sum(), LAID_OUT[metric](p["t"])

    (_, aux), grads = se.value_and_grad(loss, has_aux=True)({"t": T})
    assert isinstance(grads["t"], se.RowSparse)
    np.testing.assert_allclose(aux, LAID_OUT[metric](T), 1e-6)


def test_a_straight_through_estimate():
    loss = lambda p: jnp.sin(  # noqa: E731
        (p["t"] + lax.stop_gradient(jnp.cumsum(p["t"], 0) - p["t"]))[IDS]
    ).sum()
    check(loss, {"t": T})


# --- indices of a view that are made of the table -------------------------------------------------

MADE_OF_ALL = {
    "an order of rows": lambda t: t[jnp.argsort(t[:, 0])],
    "rows set": lambda t: t.at[jnp.argsort(t[:, 0])[:2]].set(0.0),
    "rows by the largest column": lambda t: t[jnp.argmax(t, 1)],
    "a slice from some row on": lambda t: lax.dynamic_slice_in_dim(t, jnp.argmax(t[:, 0]), 4),
}


@pytest.mark.parametrize("view", MADE_OF_ALL)
def test_rows_that_choose_rows_are_touched(view):
    """Else `se.exact` would choose by rows that are not up to date."""
    loss = lambda p, ids: jnp.sum(jnp.sin(MADE_OF_ALL[view](p["t"])[ids]))  # noqa: E731
    assert se.touched(loss)({"t": T}, IDS)["t"] is None
    exact, dense = se.exact.sgd(0.5, momentum=0.9), optax.sgd(0.5, momentum=0.9)
    params, other = {"t": T + 0}, {"t": T}
    state, other_state, step = exact.init(params), dense.init(other), se.train_step(loss, exact)
    rng = np.random.default_rng(1)
    for _ in range(8):
        ids = jnp.asarray(rng.integers(0, 4, 2))
        params, state, got = step(params, state, ids)
        want, grads = jax.value_and_grad(loss)(other, ids)
        updates, other_state = dense.update(grads, other_state, other)
        other = optax.apply_updates(other, updates)
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_a_read_of_a_read_outside_the_table():
    params = {"t": T, "s": jnp.float32(2.0)}
    order = jnp.array([1, 20, 2])
    check(lambda p: jnp.sum((p["t"] * p["s"])[order][jnp.array([1, 1, 0])]), params)


# --- what goes dense says so ----------------------------------------------------------------------

DENSE = {
    "cumsum": lambda t: jnp.cumsum(t, 0)[:2],
    "sort": lambda t: jnp.sort(t, 0)[:2],
    "softmax over rows": lambda t: jax.nn.softmax(t, 0)[:2],
    "less the mean row": lambda t: (t - t.mean(0))[0],
    "a slice along the other axis": lambda t: t.T[:1],
}


@pytest.mark.parametrize("use", DENSE)
def test_a_constant_slice_of_what_needs_all_rows(use):
    loss = lambda p: jnp.sin(DENSE[use](p["t"])).sum() + jnp.sin(p["t"][IDS]).sum()  # noqa: E731
    with pytest.warns(UserWarning, match=r"gradient of p\['t'\] is dense"):
        grads = se.grad(loss)({"t": T})
    np.testing.assert_allclose(grads["t"], jax.grad(loss)({"t": T})["t"], 1e-5, 1e-6)
    with pytest.raises(ValueError, match=r"gradient of p\['t'\] is dense"):
        se.grad(loss, tables={"t": True})({"t": T})


def test_members_of_a_stack_at_constant_places():
    stack = {"t": jnp.ones((3, 12, 2))}
    loss = lambda p: jnp.sum(p["t"][0] ** 2) + p["t"][IDS % 3, IDS].sum()  # noqa: E731
    with pytest.warns(UserWarning, match="is dense"):
        se.grad(loss)(stack)


# --- as many paths as views multiply --------------------------------------------------------------


def test_many_ways_to_one_table_are_dense_with_a_word():
    def loss(p):
        t = p["t"]
        for _ in range(8):
            t = (t + jnp.roll(t, 1, 0) + jnp.roll(t, -1, 0)) / 3
        return jnp.sin(t[IDS]).sum()

    with pytest.warns(UserWarning, match="is dense"):
        grads = se.grad(loss)({"t": T})
    np.testing.assert_allclose(grads["t"], jax.grad(loss)({"t": T})["t"], 1e-5, 1e-6)


def test_a_table_laid_out_is_laid_out_once():
    def loss(p):
        u = p["t"]
        for _ in range(12):
            u = u * (1 - u)
        return jnp.sum(p["t"][IDS]), lax.stop_gradient(u).sum()

    jaxpr = jax.make_jaxpr(se.value_and_grad(loss, has_aux=True))({"t": T})
    assert str(jaxpr).count("mul") < 100


# --- programs that jax takes ----------------------------------------------------------------------


def test_columns_chosen_before_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = se.grad(lambda t: t[:, jnp.array([1, 3, 0])][jnp.array([0, 1])].sum())(
            jnp.ones((4, 12))
        )
    assert isinstance(grads, se.RowSparse) and grads.row_axes == (1,)


ALIKE = {
    "scaled": lambda t: t * 2.0,
    "by a vector": lambda t: t * jnp.arange(2.0),
    "padded": lambda t: jnp.pad(t, ((1, 1), (0, 0))),
    "clipped": lambda t: jnp.clip(t, -1, 1),
    "softmax": lambda t: jax.nn.softmax(t, axis=1),
    "wider": lambda t: jnp.concatenate([t, jnp.ones((12, 1))], axis=1),
    "masked": lambda t: jnp.where((jnp.arange(12) % 3 == 0)[:, None], t, 0.0),
    "normal": lambda t: t / jnp.linalg.norm(t, axis=1, keepdims=True),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("view", ALIKE)
def test_views_in_a_shard_map(view, inside):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def loss(p, ids):
        of = ALIKE[view] if inside else lambda t: t
        part = lambda t, ids: lax.psum(jnp.sum(jnp.sin(of(t)[ids])), "x")  # noqa: E731
        table = p["t"] if inside else ALIKE[view](p["t"])
        return jax.shard_map(part, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())(table, ids)

    ids = jnp.array([1, 3, 7, 3])
    want = jax.jit(jax.grad(loss))({"t": T}, ids)["t"]
    got = jax.jit(se.grad(loss))({"t": T}, ids)["t"]
    np.testing.assert_allclose(as_dense(got), want, 1e-5, 1e-6)
    assert isinstance(got, se.RowSparse)


def test_no_rows_set():
    check(lambda p: jnp.sum(p["t"].at[jnp.zeros(0, int)].set(jnp.ones((0, 2)))[IDS]), {"t": T})


def test_an_empty_reshape():
    loss = lambda t, i: jnp.sum(t[:0].reshape(9, 0)[i]) + jnp.sum(t[i])  # noqa: E731
    jax.eval_shape(se.grad(loss), T, IDS)


def test_unsigned_starts():
    with jax.enable_x64(True):
        t = jnp.ones((12, 2))
        loss = lambda t, i: jnp.sum(lax.dynamic_slice_in_dim(t, jnp.uint64(3), 6)[i])  # noqa: E731
        for ids in (IDS, IDS.astype(jnp.uint64)):
            got = se.grad(loss)(t, ids)
            np.testing.assert_allclose(got.todense(), jax.grad(loss)(t, ids))
