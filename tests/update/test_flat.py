"""Tables whose rows run along other axes than the first: stacks, transposed tables."""

import functools
import pickle
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, small_blocks

import sparse_embed as se

FORMS = {  # shape, row axes
    "stack": ((3, 40, 2), (0, 1)),
    "stack of stacks": ((2, 3, 20, 2), (0, 1, 2)),
    "second axis": ((4, 50), (1,)),
    "middle axis": ((2, 50, 3), (1,)),
    "two axes apart": ((3, 2, 20), (0, 2)),
    "entries": ((30, 4), (0, 1)),
}
CLIP = optax.clip_by_global_norm(0.3)
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 5)),
    "adamw, clipped": lambda: optax.chain(CLIP, optax.adamw(0.1)),
    "block rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.rmsprop(0.1)),
    "novograd": lambda: optax.novograd(0.1),
    "lion": lambda: optax.lion(0.1),  # its update needs the old state
}
CASES = [(form, "adamw, clipped") for form in FORMS]
CASES += [("stack", name) for name in OPTIMIZERS if name != "adamw, clipped"]
CASES += [("second axis", name) for name in ("momentum", "lion")]
REFUSED = {
    "centralize": (optax.centralize, "tells how its entries lie"),
    "row-wise adagrad": (
        lambda: se.transforms.rowwise_adagrad(0.1),
        "is not of the table's shape",
    ),
}


def new_params(shape):
    draw = np.random.default_rng(0)
    return {
        "t": jnp.asarray(draw.normal(size=shape), jnp.float32),
        "w": jnp.asarray(draw.normal(size=3), jnp.float32),
    }


def gradient(shape, axes, seed=1):
    """As a `RowSparse` with repeats and padding, and dense; and which entries are listed."""
    draw = np.random.default_rng(seed)
    sizes = [shape[a] for a in axes]
    features = [s for a, s in enumerate(shape) if a not in axes]
    indices = draw.integers(0, prod(sizes), 9)
    indices[3:6] = indices[0], prod(sizes), prod(sizes) + 7
    rows = draw.normal(size=(9, *features)).astype(np.float32)
    dense, listed = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for i, row in zip(indices, rows, strict=True):
        if i < prod(sizes):
            where = [slice(None)] * len(shape)
            for a, number in zip(axes, np.unravel_index(i, sizes), strict=True):
                where[a] = number
            dense[tuple(where)] += row
            listed[tuple(where)] = True
    return se.RowSparse(indices, rows, shape, row_axes=axes), dense, listed


def dense_step(tx, params, state, grads, listed):
    """Dense optax, with what is not listed put back."""
    updates, new = tx.update(grads, state, params)
    stepped = optax.apply_updates(params, updates)

    def masked(old, new):
        return np.where(listed, new, old) if np.shape(old) == listed.shape else new

    return tuple(jax.tree.map(masked, *pair) for pair in ((params, stepped), (state, new)))


quick = functools.partial(jax.jit, compiler_options=QUICKLY)
WAYS = {
    "eager": lambda tx: functools.partial(by_hand, tx.update),
    "jit": lambda tx: quick(functools.partial(by_hand, tx.update)),
    "listed": lambda tx: quick(functools.partial(by_hand, tx.listed_update)),
    "apply": lambda tx: quick(lambda g, s, p: tx.apply(g, s, p)),
    "looked at": lambda tx: quick(functools.partial(looked_at, tx.update)),
}


def by_hand(update, grads, state, params):
    updates, state = update(grads, state, params)
    return optax.apply_updates(params, updates), state


def looked_at(update, grads, state, params):
    updates, state = update(grads, state, params)
    own = updates["t"]
    assert own.row_axes == grads["t"].row_axes and own.shape == params["t"].shape
    again = se.RowSparse(own.indices, own.rows, own.shape, row_axes=own.row_axes)
    return optax.apply_updates(params, updates | {"t": again}), state


@pytest.mark.parametrize("blocks", [False, True], ids=["at once", "in blocks"])
@pytest.mark.parametrize("form, optimizer", CASES)
def test_a_step_is_that_of_dense_optax(form, optimizer, blocks):
    shape, axes = FORMS[form]
    inner = OPTIMIZERS[optimizer]()
    tx, start = se.lazy(inner), new_params(shape)
    ways = ("eager", "jit", "apply") if not blocks else ("jit", "listed", "apply", "looked at")
    for way in ways:
        step, params, state = WAYS[way](tx), start, tx.init(start)
        want, dense = start, inner.init(start)
        for seed in (1, 2, 3):
            rows, full, listed = gradient(shape, axes, seed)
            w = jnp.cos(want["w"])
            with small_blocks(2 if blocks else 2048):
                params, state = step({"t": rows, "w": w}, state, params)
            want, dense = dense_step(inner, want, dense, {"t": jnp.asarray(full), "w": w}, listed)
        got = (params, state.inner_state)
        assert jax.tree.structure(got) == jax.tree.structure((want, dense))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((want, dense)), strict=True):
            np.testing.assert_allclose(a, b, 2e-5, 2e-6, err_msg=way)


@pytest.mark.parametrize("name", REFUSED)
def test_what_sees_how_a_table_lies_is_refused(name):
    make, reason = REFUSED[name]
    shape, axes = FORMS["stack"]
    params, tx = new_params(shape), se.lazy(make())
    grads = {"t": gradient(shape, axes)[0], "w": params["w"]}
    with pytest.raises(ValueError, match=f"(?s)got: .*{reason}.*write: .*rows first.*reshape"):
        tx.update(grads, tx.init(params), params)


def test_a_clock_for_each_row_is_refused():
    shape, axes = FORMS["stack"]
    params, tx = new_params(shape), se.lazy(optax.adam(0.1), clock="row")
    grads = {"t": gradient(shape, axes)[0], "w": params["w"]}
    with pytest.raises(ValueError, match='(?s)got: clock="row".*write: .*rows first.*reshape'):
        tx.update(grads, tx.init(params), params)


def test_exact_takes_tables_whose_rows_come_first():
    shape, axes = FORMS["stack"]
    params, tx = new_params(shape), se.exact.adam(0.1)
    grads = {"t": gradient(shape, axes)[0], "w": params["w"]}
    with pytest.raises(ValueError, match=r"(?s)rows are their first axis.*\['t'\].*reshape"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("form", FORMS)
def test_the_container(form):
    shape, axes = FORMS[form]
    rows, dense, _ = gradient(shape, axes)
    table = new_params(shape)["t"]
    for g in (
        rows,
        se.coalesce(rows),
        jax.jit(lambda g: g)(rows),
        pickle.loads(pickle.dumps(rows)),
    ):
        assert g.row_axes == axes and g.shape == shape and g.ndim == len(shape)
        assert g.num_rows == prod(shape[a] for a in axes)
        np.testing.assert_allclose(g.todense(), dense, 1e-6, 1e-6)
        np.testing.assert_allclose(table + g, table + dense, 1e-6, 1e-6)
        np.testing.assert_allclose((g + g * 2 - g).todense(), 2 * dense, 1e-5, 1e-5)
        assert f"row_axes={axes}" in repr(g)
    norm = se.global_norm({"t": rows})
    np.testing.assert_allclose(norm, np.linalg.norm(dense), 1e-6)


def test_row_axes_are_checked():
    rows, _, _ = gradient(*FORMS["stack"])
    same = se.RowSparse(rows.indices, rows.rows, rows.shape, row_axes=[1, -3])
    assert same.row_axes == (0, 1)
    for bad in ((0, 0), (), 7, "0", (0, 1, 2)):
        with pytest.raises(ValueError, match="(?s)expected indices.*got: .*row_axes=.*write: "):
            se.RowSparse(rows.indices, rows.rows, rows.shape, row_axes=bad)
    other = se.RowSparse(jnp.arange(3), jnp.zeros((3, 40, 2)), rows.shape)
    with pytest.raises(ValueError, match="(?s)of different shapes.*row_axes"):
        rows + other


def test_more_rows_than_int32_can_number_are_not_numbered():
    """By shape alone: the arrays would take 13 GB."""
    struct, ids = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((4,), jnp.int32)
    entries = se.grad(lambda p, i, j: p[i, j].sum())
    with pytest.warns(UserWarning, match="is dense: `gather`"):
        grad = jax.eval_shape(entries, struct((100_000_000, 32), jnp.float32), ids, ids)
    assert not isinstance(grad, se.RowSparse)
    columns = se.grad(lambda p, i: p[:, i].sum())
    with pytest.raises(ValueError, match="(?s)too many entries.*got: .*write: .*rows first"):
        table = struct((64, 50_000_000), jnp.float32)
        jax.eval_shape(lambda p, i: p + columns(p, i), table, ids)
