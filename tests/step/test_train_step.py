"""`train_step`: what it computes, and what it says about bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, temp_bytes

import sparse_embed as se

ROWS, WIDTH = 4000, 4


def setup(**options):
    params = {"table": jnp.ones((ROWS, WIDTH)), "w": jnp.arange(2.0, WIDTH + 2) / 10}

    def loss_fn(params, ids, scale=1.0):
        loss = jnp.sum(jnp.tanh(params["table"][ids] @ params["w"])) * scale
        return (loss, {"ids": ids}) if options.get("has_aux") else loss

    tx = se.lazy(optax.adam(0.1))
    return params, loss_fn, tx, se.train_step(loss_fn, tx, **options)


def by_hand(params, opt_state, tx, loss_fn, *args):
    loss, grads = jax.value_and_grad(loss_fn)(params, *args)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), loss


def test_it_is_the_loop_of_the_readme():
    params, loss_fn, tx, step = setup()
    ids = jnp.array([3, 9, 3])
    adam = optax.adam(0.1)
    want, want_loss = by_hand(params, adam.init(params), adam, loss_fn, ids, 0.5)
    got, opt_state, loss = step(jax.tree.map(jnp.copy, params), tx.init(params), ids, 0.5)
    np.testing.assert_allclose(loss, want_loss, 1e-6)
    for key in params:  # on the first step Adam moves nothing that has no gradient
        np.testing.assert_allclose(got[key], want[key], 1e-5)


def test_aux_and_argnums():
    params, loss_fn, tx, step = setup(has_aux=True)
    ids = jnp.array([3, 9, 3])
    _, _, (loss, aux) = step(params, tx.init(params), ids)
    np.testing.assert_array_equal(aux["ids"], ids)

    params, loss_fn, tx, _ = setup()
    last = se.train_step(lambda ids, scale, p: loss_fn(p, ids, scale), tx, argnums=2)
    new, _, _ = last(params, tx.init(params), ids, 1.0)
    assert float(new["table"][3, 0]) < 1 and float(new["table"][4, 0]) == 1

    params, loss_fn, tx, _ = setup()
    both = (params["table"], params["w"])
    two = se.train_step(
        lambda table, ids, w: loss_fn({"table": table, "w": w}, ids), tx, argnums=(0, 2)
    )
    (table, w), _, _ = two(both, tx.init(both), ids)
    assert float(table[3, 0]) < 1 and float(table[4, 0]) == 1


def test_the_loss_is_passed_on_as_value():
    params, loss_fn, _, _ = setup()
    ids, polyak = jnp.array([3, 9, 3]), optax.polyak_sgd()
    loss, grads = jax.value_and_grad(loss_fn)(params, ids)
    updates, _ = polyak.update(grads, polyak.init(params), params, value=loss)
    want = optax.apply_updates(params, updates)
    tx = se.lazy(polyak)
    got, _, _ = se.train_step(loss_fn, tx)(jax.tree.map(jnp.copy, params), tx.init(params), ids)
    np.testing.assert_allclose(got["table"], want["table"], 1e-5)


def test_a_number_among_the_params():
    params = {"table": jnp.ones((ROWS, WIDTH)), "scale": 2.0}
    tx = se.lazy(optax.sgd(0.1))
    step = se.train_step(lambda p, ids: jnp.sum(p["table"][ids]) * p["scale"], tx)
    se.assert_row_sparse(step, params, tx.init(params), jnp.array([3]))
    new, _, _ = step(params, tx.init(params), jnp.array([3]))
    np.testing.assert_allclose(new["table"][3], 0.8, 1e-6)
    np.testing.assert_allclose(new["scale"], 2.0 - 0.1 * WIDTH, 1e-6)


def test_second_step_compiles_nothing_and_all_is_in_place():
    params, _, tx, step = setup()
    opt_state = tx.init(params)
    batches = [jnp.array([3, 9, 3]), jnp.array([1, 1, 0])]
    se.assert_row_sparse(step, params, opt_state, batches[0])
    memory = step.lower(params, opt_state, batches[0]).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 4 * ROWS * WIDTH
    assert memory.temp_size_in_bytes < ROWS
    params, opt_state, _ = step(params, opt_state, batches[0])
    with count_compilations() as compiled:
        step(params, opt_state, batches[1])
    assert compiled == []


def test_donated_twice():
    params, _, tx, step = setup()
    opt_state, ids = tx.init(params), jnp.array([3])
    step(params, opt_state, ids)
    with pytest.raises(ValueError, match=r"(?s)donated to an earlier.*params\['table'\].*write: "):
        step(params, opt_state, ids)


def test_one_array_in_two_places():
    params, _, tx, step = setup()
    opt_state = tx.init(params)
    params["copy"] = params["table"]
    with pytest.raises(
        ValueError, match=r"(?s)there twice.*params\['table'\].*write: jax.tree.map"
    ):
        step(params, opt_state, jnp.array([3]))


@pytest.mark.parametrize("stock", [optax.sgd(0.1), optax.adam(0.1), optax.adamw(0.1)])
def test_a_stock_optimizer_is_told_to_be_wrapped(stock):
    params, loss_fn, _, _ = setup()
    step = se.train_step(loss_fn, stock)
    with pytest.raises((TypeError, ValueError)) as info:
        step(params, stock.init(params), jnp.array([3]))
    said = str(info.value) + "".join(getattr(info.value, "__notes__", []))
    assert "se.lazy(" in said
    np.testing.assert_array_equal(params["table"], jnp.ones((ROWS, WIDTH)))  # nothing changed


def test_not_an_optimizer():
    with pytest.raises(TypeError, match="(?s)optax transformation.*write: se.train_step"):
        se.train_step(lambda p: p, optax.adam)


ONE_ID = {
    "adam": se.lazy(optax.adam(0.1)),
    "adamw and a clip": se.lazy(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))),
    "adagrad": se.lazy(optax.adagrad(0.1)),
    "rowwise_adagrad": se.lazy(se.rowwise_adagrad(0.1)),
    "row clock": se.lazy(optax.adam(0.1), clock="row"),
    "sgd": se.lazy(optax.sgd(0.1)),
    "exact adamw": se.exact.adamw(0.1),
    "exact replay": se.exact.replay(optax.adan(0.1)),
}
READ_AT_ONE_ID = {
    "[1]": (lambda t, i: t[i], (1,)),
    "[]": (lambda t, i: t[i], ()),
    "[1, 1]": (lambda t, i: se.lookup(t, i), (1, 1)),
    "bag": (lambda t, i: se.lookup_bag(t, i), (1, 3)),
    "view": (lambda t, i: jnp.flip(t, 0)[1:][i], (1,)),
    "twice": (lambda t, i: t[i] * t[i + 1], (1,)),
}


@pytest.mark.parametrize("read", READ_AT_ONE_ID)
@pytest.mark.parametrize("optimizer", ONE_ID)
def test_a_step_that_reads_one_row_copies_nothing(optimizer, read):
    """XLA reads a single row anew at each use, and copied what was written in between."""
    tx, (rows_of, shape) = ONE_ID[optimizer], READ_AT_ONE_ID[read]
    params = {"table": jnp.ones((20_000, 8)), "w": jnp.ones(8)}
    loss = lambda p, i: (jnp.sum(jnp.tanh(rows_of(p["table"], i) @ p["w"])), p["table"][i])  # noqa: E731
    step = se.train_step(loss, tx, has_aux=True)
    table_bytes = params["table"].nbytes
    assert temp_bytes(step, params, tx.init(params), jnp.ones(shape, int)) < table_bytes / 10


STOCK = {
    "adam": lambda: optax.adam(0.1),
    "sgd": lambda: optax.sgd(0.1),
    "clip before lazy": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), se.lazy(optax.adam(0.1))
    ),
    "MultiSteps": lambda: optax.MultiSteps(se.lazy(optax.adam(0.1)), 2),
    "one part bare": lambda: optax.multi_transform(
        {"t": optax.adam(0.1), "w": se.lazy(optax.adam(0.1))}, {"table": "t", "w": "w"}
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_transformation_is_told_to_go_inside_lazy(name):
    params, loss_fn, *_ = setup()
    tx = STOCK[name]()
    with pytest.raises(TypeError, match=r"params\['table'\](.|\n)*write: tx = se.lazy\("):
        se.train_step(loss_fn, tx)(params, tx.init(params), jnp.array([3]))


def test_a_table_that_a_loss_does_not_read_stays_if_it_is_named():
    params = {"a": jnp.ones((ROWS, WIDTH)), "b": jnp.ones((ROWS, WIDTH)), "w": jnp.ones(WIDTH)}
    tx, names = se.lazy(optax.adamw(0.1)), {"a": True, "b": True, "w": False}
    read = lambda k: lambda p, ids: jnp.sum((p[k][ids] * p["w"]) ** 2)  # noqa: E731
    steps = {k: se.train_step(read(k), tx, tables=names) for k in "ab"}
    state = tx.init(params)
    params, state, _ = steps["b"](params, state, jnp.array([5]))
    kept = params["b"] + 0
    params, state, _ = steps["a"](params, state, jnp.array([3]))
    np.testing.assert_array_equal(params["b"], kept)
    assert temp_bytes(steps["a"], params, state, jnp.array([3])) < kept.nbytes / 10
    with pytest.raises(ValueError, match="needs the whole table"):
        whole = lambda p, ids: jnp.sum(p["a"][ids]) + jnp.sum(p["a"])  # noqa: E731
        se.train_step(whole, tx, tables=names)(params, state, jnp.array([3]))
