"""`se.exact` in use: settling, what happens when it is forgotten, checkpoints, conversion."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_subjects import REPLAYED, SUBJECTS, rate
from flax.training.train_state import TrainState
from helpers import count_compilations, temp_bytes

import sparse_embed as se

ROWS, WIDTH = 5000, 4
W = np.linspace(-1, 1, WIDTH, dtype=np.float32)
RATE = optax.linear_schedule(0.05, 0.001, 60)


def loss_fn(params, ids):
    rows = params["table"][ids]
    return jnp.mean(jnp.tanh(rows @ W - 0.3) ** 2 + jnp.sin(params["user"][ids // 7]))


def new_params():
    draw = np.random.default_rng(0)
    shapes = {"table": (ROWS, WIDTH), "user": (ROWS // 7 + 1,)}
    return {k: jnp.asarray(draw.normal(size=x), jnp.float32) for k, x in shapes.items()}


def batches(steps, seed=3):
    """Few rows, so that most of them have gaps of several lengths."""
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.integers(0, 40, 6) * 101, jnp.int32) for _ in range(steps)]


def train(step, params, state, ids):
    losses = []
    for batch in ids:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return params, state, losses


def dense_train(tx, params, state, ids):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train(jax.jit(step), params, state, ids)


def assert_close(got, want, rtol=2e-5, atol=3e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=jax.tree_util.keystr(path))


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


# --- structure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw, clipped", "adabelief"])
def test_a_step_is_row_sparse_and_compiles_once(name):
    tx = SUBJECTS[name].exact(rate(0.01))
    step, params = se.train_step(loss_fn, tx), new_params()
    state, (first, *rest) = tx.init(params), batches(3)
    with jax.transfer_guard("disallow"):  # it moves no number of its own to the device
        se.assert_row_sparse(step, params, state, first)
    params, state, _ = step(params, state, first)
    with count_compilations() as compiled:
        for ids in rest:
            params, state, _ = step(params, state, ids)
    assert compiled == []


def test_a_replayed_step_is_row_sparse():
    tx = se.exact.replay(REPLAYED["clip, adamw"](rate(0.01)))
    params = new_params()
    se.assert_row_sparse(se.train_step(loss_fn, tx), params, tx.init(params), batches(1)[0])


@pytest.mark.parametrize("name", ["adamw", "replay"])
def test_settling_all_rows_needs_no_table_sized_scratch(name):
    def scratch(rows):
        tx = se.exact.adamw(RATE) if name == "adamw" else se.exact.replay(optax.adan(RATE))
        params = {"table": jnp.ones((rows, 8))}
        return temp_bytes(tx.settle, params, tx.init(params), donate=(0, 1))

    assert scratch(200_000) <= scratch(20_000) + 1000 < 20_000 * 8 * 4 * 4


def test_settling_rows_needs_no_table_sized_scratch():
    tx, params = se.exact.adamw(RATE), new_params()
    rows = {"table": jnp.arange(8), "user": jnp.arange(2)}
    settle = jax.jit(lambda p, s: tx.settle(p, s, rows), donate_argnums=(0, 1))
    assert temp_bytes(settle, params, tx.init(params)) < ROWS * WIDTH * 4 / 2


# --- settle ---------------------------------------------------------------------------------------


def test_settle_by_hand_is_train_step():
    tx, ids = se.exact.amsgrad(RATE, weight_decay=0.1), batches(30)

    @jax.jit
    def step(params, state, batch):
        params, state = tx.settle(params, state, se.touched(loss_fn)(params, batch))
        loss, grads = se.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = new_params()
    got = train(step, params, tx.init(params), ids)
    want = train(se.train_step(loss_fn, tx), params, tx.init(params), ids)
    assert_close(got, want, 1e-6, 1e-7)


def settled_and_behind():
    tx = se.exact.sgd(RATE, momentum=0.9)
    params = new_params()
    params, state, _ = train(se.train_step(loss_fn, tx), params, tx.init(params), batches(20))
    return tx, params, state


def test_settle_takes_ids_as_they_come():
    tx, params, state = settled_and_behind()
    full, full_state = tx.settle(params, state)
    ids, none = jnp.array([[101, 101, -1], [0, ROWS + 5, 202]]), jnp.zeros(0, jnp.int32)
    some, some_state = tx.settle(params, state, {"table": ids, "user": none})
    listed = np.array([0, 101, 202])
    others = np.delete(np.arange(ROWS), listed)
    np.testing.assert_array_equal(some["table"][listed], full["table"][listed])
    np.testing.assert_array_equal(some["table"][others], params["table"][others])
    np.testing.assert_array_equal(some["user"], params["user"])
    whole, _ = tx.settle(params, state, {"table": none, "user": None})
    np.testing.assert_array_equal(whole["user"], full["user"])
    np.testing.assert_array_equal(whole["table"], params["table"])
    traces = [x.inner_state[0].trace["table"] for x in (some_state, state, full_state)]
    np.testing.assert_array_equal(traces[0][others], traces[1][others])
    np.testing.assert_array_equal(traces[0][listed], traces[2][listed])
    assert not np.array_equal(full["table"], params["table"])
    # What is settled stays as it is.
    assert_equal(tx.settle(some, some_state), (full, full_state))
    assert_equal(tx.settle(full, full_state), (full, full_state))


def test_view_reads_without_settling():
    tx, params, state = settled_and_behind()
    full, _ = tx.settle(params, state)
    ids = jnp.array([[101, 5, 101], [ROWS, -1, 202]])
    rows = tx.view(params, state, {"table": ids, "user": jnp.array([3])})
    np.testing.assert_array_equal(rows["table"][0], full["table"][ids[0]])
    np.testing.assert_array_equal(rows["table"][1, 2], full["table"][202])
    assert np.isnan(rows["table"][1, :2]).all()
    np.testing.assert_array_equal(rows["user"], full["user"][3:4])
    assert tx.view(params, state, {"table": None, "user": ids[0]})["table"] is None


def test_ids_that_depend_on_rows_that_were_behind():
    def loss_fn(params, ids):
        a = params["a"][ids]
        b = params["b"][jnp.clip(jnp.round(jnp.abs(a[:, 0]) * 40), 0, 49).astype(jnp.int32)]
        c = params["b"][jnp.clip(jnp.round(jnp.abs(b[:, 0]) * 40), 0, 49).astype(jnp.int32)]
        return jnp.sum(jnp.sin(a) + jnp.sin(b * 2) + jnp.cos(c * 3))

    draw = np.random.default_rng(0)
    params = {k: jnp.asarray(draw.normal(size=(50, 2)), jnp.float32) for k in "ab"}
    ids = [jnp.asarray(draw.integers(0, 50, 4)) for _ in range(150)]
    tx, dense = se.exact.adam(1e-2), optax.adam(1e-2)
    step = se.train_step(loss_fn, tx)
    report = se.audit(step, params, tx.init(params), ids[0])
    assert report.ok, report

    @jax.jit
    def stock(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = dense.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    want, _, want_losses = train(stock, params, dense.init(params), ids)
    got, state, losses = train(step, params, tx.init(params), ids)
    np.testing.assert_allclose(losses, want_losses, 1e-4, 1e-4)
    assert_close(tx.settle(got, state)[0], want, 1e-5, 1e-5)


def test_rows_that_only_the_value_needs_are_settled():
    def loss_fn(params, ids):
        fixed = jax.lax.stop_gradient(params["table"][ids + 1])
        return jnp.sum((params["table"][ids] - fixed) ** 2)

    params = {"table": new_params()["table"]}
    ids, tx, dense = batches(60), se.exact.adam(RATE), optax.adam(RATE)

    @jax.jit
    def stock(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = dense.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    _, _, want = train(stock, params, dense.init(params), ids)
    _, _, got = train(se.train_step(loss_fn, tx), params, tx.init(params), ids)
    np.testing.assert_allclose(got, want, 1e-5)


# --- what goes wrong ------------------------------------------------------------------------------


NOT_SETTLED = r"(?s)were not settled.*got: opt_state as .*write: .*tx.settle\(.*before=chain"


def by_hand(tx, settle=None):
    def step(params, state, batch):
        if settle is not None:
            params, state = settle(params, state, batch)
        grads = se.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


FORGETFUL = {
    "alone": lambda: se.exact.adam(RATE),
    "momentum": lambda: se.exact.sgd(RATE, momentum=0.9),
    "decay alone": lambda: se.exact.sgd(RATE, weight_decay=0.1),
    "replay": lambda: se.exact.replay(optax.adam(RATE)),
    "in a chain": lambda: optax.chain(se.clip_by_global_norm(0.5), se.exact.adam(RATE)),
    "in a partition": lambda: optax.partition(
        {"tables": se.exact.adam(RATE)}, {"table": "tables", "user": "tables"}
    ),
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_forgetting_to_settle_is_an_error_while_tracing(name):
    params = {name: x for name, x in new_params().items() if name in ("table", "user")}
    tx = FORGETFUL[name]()
    state = tx.init(params)
    with pytest.raises(ValueError, match=NOT_SETTLED):
        jax.eval_shape(by_hand(tx), params, state, jnp.array([3, 7]))
    with pytest.raises(ValueError, match=NOT_SETTLED):
        tx.update(se.grad(loss_fn)(params, jnp.array([3, 7])), state, params)


def test_what_rests_by_itself_need_not_be_settled():
    tx, params = se.exact.adagrad(0.1), new_params()
    got, _ = jax.jit(by_hand(tx))(params, tx.init(params), jnp.array([3, 7]))
    dense = optax.adagrad(0.1)
    grads = jax.grad(loss_fn)(params, jnp.array([3, 7]))
    want, _ = dense.update(grads, dense.init(params), params)
    assert_close(got, optax.apply_updates(params, want), 1e-6)


def test_dense_gradients_alone_need_no_settling():
    """They update all rows in every step, so none is ever behind."""
    tx, dense, params = se.exact.adam(RATE), optax.adam(RATE), {"w": jnp.ones((3, 2))}
    (got, state), (want, inner) = (params, tx.init(params)), (params, dense.init(params))
    for _ in range(3):
        grads = jax.tree.map(jnp.sin, want)
        updates, state = tx.update(grads, state, got)
        got = optax.apply_updates(got, updates)
        updates, inner = dense.update(grads, inner, want)
        want = optax.apply_updates(want, updates)
    assert_close(got, want, 1e-6)


MAPPED = {
    "adam": (se.exact.adam, optax.adam),
    "momentum": (lambda r: se.exact.sgd(r, momentum=0.9), lambda r: optax.sgd(r, momentum=0.9)),
    "replay": (lambda r: se.exact.replay(optax.adam(r)), optax.adam),
}


@pytest.mark.parametrize("name", MAPPED)
def test_map_params_sees_the_moments_and_leaves_clocks_alone(name):
    exact, dense = (make(0.1) for make in MAPPED[name])
    params = new_params()
    state = exact.init(params)
    raised = optax.tree.map_params(exact, lambda x: x + 1, state)
    want = optax.tree.map_params(dense, lambda x: x + 1, dense.init(params))
    assert_equal(raised.inner_state, want)
    assert_equal((raised.step, raised.clocks), (state.step, state.clocks))
    assert max(float(x.max()) for x in jax.tree.leaves(raised.inner_state)) == 1


def test_what_update_returns_must_be_settled_again():
    """In a `scan` the carry keeps its type: what `init` and `update` return."""
    tx, params = se.exact.adam(RATE), new_params()
    rows = se.touched(loss_fn)
    step = by_hand(tx, lambda p, s, batch: tx.settle(p, s, rows(p, batch)))
    ids = jnp.stack(batches(6))
    scanned, _ = jax.lax.scan(lambda c, b: (step(*c, b), None), (params, tx.init(params)), ids)
    want = train(se.train_step(loss_fn, tx), params, tx.init(params), ids)
    assert_close(scanned, want[:2], 1e-6, 1e-7)
    settled = tx.settle(*scanned)
    with pytest.raises(TypeError, match="carry"):
        jax.lax.scan(lambda c, b: (step(*c, b), None), settled, ids)
    again = settled[0], settled[1].unsettled()
    jax.eval_shape(lambda c: jax.lax.scan(lambda c, b: (step(*c, b), None), c, ids), again)


def test_train_step_takes_settled_states_without_compiling_again():
    tx, params = se.exact.sgd(RATE, momentum=0.9), new_params()
    step, state = se.train_step(loss_fn, tx), tx.init(params)
    params, state, _ = step(params, state, jnp.array([3, 7]))
    settled = tx.settle(params, state)
    with count_compilations() as compiled:
        step(*settled, jnp.array([3, 7]))
    assert compiled == []


def test_rows_that_were_not_among_the_settled_ones_are_noticed():
    tx, params = se.exact.adam(RATE), new_params()
    state = tx.init(params)
    none = {name: jnp.zeros(0, jnp.int32) for name in params}
    update = by_hand(tx, lambda p, s, batch: tx.settle(p, s, none))

    params, state = update(params, state, jnp.array([3, 7]))  # nothing is behind yet
    with pytest.raises(ValueError, match="rows with a gradient are not up to date") as error:
        update(params, state, jnp.array([3, 9]))
    assert "1 rows of params['table']" in str(error.value) and "tx.settle" in str(error.value)

    after, _ = jax.jit(update)(params, state, jnp.array([3, 9]))
    assert np.isnan(after["table"][9]).all()
    assert np.isfinite(np.delete(after["table"], 9, axis=0)).all()


def test_a_dense_gradient_on_rows_that_are_behind_is_noticed():
    tx, params = se.exact.sgd(0.1, momentum=0.9), new_params()
    state = tx.init(params)
    params, state, _ = se.train_step(loss_fn, tx)(params, state, jnp.array([3]))
    params, state, _ = se.train_step(loss_fn, tx)(params, state, jnp.array([4]))
    grads = jax.grad(loss_fn)(params, jnp.array([4]))
    some = {name: jnp.array([4]) for name in params}
    with pytest.raises(ValueError, match="not up to date"):
        tx.update(grads, tx.settle(params, state, some)[1], params)
    params, state = tx.settle(params, state)
    updates, state = tx.update(grads, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


CHANGES = {
    "adam, eps_root": (lambda r: se.exact.adam(r, eps_root=1e-8), 0.5),
    "adam, eps": (lambda r: se.exact.adam(RATE, eps=1e-8 if r is RATE else 1.0), None),
    "adabelief": (se.exact.adabelief, 0.5),
    "rmsprop, decay": (lambda r: se.exact.rmsprop(RATE, 0.9 if r is RATE else 0.8), None),
    "replay": (lambda r: se.exact.replay(optax.adam(r)), lambda c: RATE(c) * 2),
    "replay, eps": (lambda r: se.exact.replay(optax.adam(RATE, eps=1 if r is RATE else 2)), None),
    "mask": (lambda r: se.exact.adamw(RATE, mask={k: r is RATE for k in new_params()}), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_optimizer_is_noticed(name):
    make, other = CHANGES[name]
    params = new_params()
    old = make(RATE)
    new = make((lambda c: other) if isinstance(other, float) else other)
    state = old.init(params)
    params, state, _ = train(se.train_step(loss_fn, old), params, state, batches(4))
    with pytest.raises(ValueError, match="another optimizer"):
        new.settle(params, state)


@pytest.mark.parametrize("change", ["rate", "decay"])
def test_another_schedule_is_noticed(change):
    old = se.exact.adamw(RATE, weight_decay=0.1)
    new = {
        "rate": lambda: se.exact.adamw(0.01, weight_decay=0.1),
        "decay": lambda: se.exact.adamw(RATE, weight_decay=0.9),
    }[change]()
    params = new_params()
    params, state, _ = train(se.train_step(loss_fn, old), params, old.init(params), batches(10))
    with pytest.raises(ValueError, match="another optimizer, learning rate"):
        new.settle(params, state)
    step = se.train_step(loss_fn, new)
    if change == "rate":  # a constant rate has no count in the state
        with pytest.raises(ValueError, match="opt_state belongs to other parameters"):
            step(copy(params), copy(state), batches(1)[0])
    else:
        _, _, loss = step(copy(params), copy(state), batches(1)[0])
        assert np.isnan(loss)


@pytest.mark.parametrize("factor", [0.01])
def test_a_schedule_is_changed_at_a_checkpoint(factor):
    """As the message says: the run goes on as the dense one does."""

    def other(count):
        return RATE(count) * factor

    old, dense = se.exact.amsgrad(RATE), optax.amsgrad(RATE)
    new, dense_new = se.exact.amsgrad(other), optax.amsgrad(other)
    params, ids = new_params(), batches(40, seed=5)
    want = dense_train(dense, params, dense.init(params), ids[:15])
    want = dense_train(dense_new, *want[:2], ids[15:])
    params, state, _ = train(se.train_step(loss_fn, old), params, old.init(params), ids[:15])
    params, inner = old.to_dense(params, state)
    step = se.train_step(loss_fn, new)
    params, state, _ = train(step, params, new.from_dense(params, inner), ids[15:])
    assert_close(new.to_dense(params, state), want[:2])


@pytest.mark.parametrize(
    "before",
    [optax.add_decayed_weights(0.1), optax.ema(0.9), optax.trace(0.9), optax.scale_by_rms()],
    ids=["decay", "ema", "trace", "rms"],
)
def test_what_moves_rows_without_a_gradient_is_refused_before(before):
    with pytest.raises(ValueError, match="before moves rows that have no gradient, or"):
        se.exact.adam(0.1, before=before).init(new_params())


@pytest.mark.parametrize(
    "before",
    [
        optax.clip(0.1),
        optax.clip_by_block_rms(0.1),
        optax.zero_nans(),
        optax.centralize(),
        optax.masked(optax.clip(0.1), {"table": True, "user": False}),
    ],
    ids=["clip", "block", "nans", "centralize", "masked"],
)
def test_what_keeps_zero_gradients_may_come_before(before):
    se.exact.rmsprop(RATE, before=before).init(new_params())


def test_a_chain_comes_before():
    before = optax.chain(optax.zero_nans(), optax.clip_by_global_norm(0.1), optax.clip(0.03))
    tx, dense = se.exact.amsgrad(RATE, before=before), optax.chain(before, optax.amsgrad(RATE))
    params = new_params()
    want, want_state, _ = dense_train(dense, params, dense.init(params), batches(25))
    got, state, _ = train(se.train_step(loss_fn, tx), params, tx.init(params), batches(25))
    assert_close(tx.to_dense(got, state), (want, want_state))


@pytest.mark.parametrize(
    "inner, reason",
    [
        (optax.MultiSteps(optax.adam(0.1), 3), "gathers gradients over several steps"),
        (optax.apply_every(3), "gathers gradients over several steps"),
        (
            optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
            "moved by more than itself and the step count",
        ),
        (optax.contrib.schedule_free_adamw(0.1), "moved by more than itself and the step count"),
        (optax.lamb(0.1), "adds up all rows"),
        (optax.apply_if_finite(optax.adam(0.1), 5), "does not go up by one each step"),
        (
            optax.conditionally_transform(optax.adam(0.1), lambda step: step % 2 == 0),
            "does not go up by one each step",
        ),
    ],
    ids=["multisteps", "apply_every", "plateau", "schedule_free", "lamb", "finite", "even"],
)
def test_what_cannot_be_replayed_is_refused(inner, reason):
    with pytest.raises(ValueError, match=reason):
        se.exact.replay(inner).init(new_params())


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: se.exact.adam(0.1, b1=jnp.ones(3)), TypeError, "b1 must be a number"),
        (lambda: se.exact.adam(0.1, before=3), TypeError, "before must be an optax"),
        (lambda: se.exact.replay(3), TypeError, "inner must be an optax"),
        (lambda: se.exact.adadelta(0.1, weight_decay=0.1), ValueError, "no closed form"),
        (lambda: se.exact.adamax(0.1, b1=0.9, b2=0.5), ValueError, "its steps grow"),
        (lambda: se.exact.adabelief(0.1, b1=0.9, b2=0.81), ValueError, "divides by 0"),
        (lambda: se.lazy(se.exact.adam(0.1)), TypeError, "already row-sparse"),
        (lambda: se.exact.replay(se.exact.adam(0.1)), TypeError, "inner must be an optax"),
        (lambda: se.exact.sgd(0.1, 1.0), ValueError, "momentum must be at least 0 and below 1"),
        (lambda: se.exact.adamw(0.1, weight_decay=11.0).init(new_params()), ValueError, "finite"),
        (lambda: se.exact.adam(0.1).init({"z": jnp.ones((3, 2), complex)}), TypeError, "be real"),
    ],
    ids="b1 before replay adadelta adamax adabelief lazy twice momentum decay complex".split(),
)
def test_errors_say_what_to_write(make, error, text):
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n  got: " in str(caught.value) and "\n  write: " in str(caught.value)


def test_a_state_of_something_else_is_refused():
    tx, params = se.exact.adam(0.1), new_params()
    with pytest.raises(TypeError, match="not a state of se.exact"):
        tx.settle(params, optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="no tree like params"):
        tx.settle(params, tx.init(params), {"table": jnp.arange(3)})


def test_an_exact_optimizer_inside_another_is_refused():
    tx, params = optax.chain(optax.identity(), se.exact.adam(0.1)), new_params()
    with pytest.raises(TypeError, match="which hides its settle"):
        se.train_step(loss_fn, tx)(params, tx.init(params), batches(1)[0])


def test_a_state_of_other_params_is_refused():
    tx, params = se.exact.adam(0.1), new_params()
    state = tx.init(params)
    taller = params | {"table": jnp.ones((ROWS + 1, WIDTH))}
    for other in (taller, {"table": params["table"]}):
        with pytest.raises(ValueError, match="opt_state belongs to other parameters"):
            tx.settle(other, state)
    for wrong in (optax.lion(0.1).init(params), se.lazy(optax.adam(0.1)).init(params)):
        with pytest.raises(ValueError, match="not a state of the dense optimizer"):
            tx.from_dense(params, wrong)


def test_hyperparameters_changed_by_hand_are_noticed():
    tx, params = se.exact.replay(optax.inject_hyperparams(optax.adam)(0.1)), new_params()
    params, state, _ = train(se.train_step(loss_fn, tx), params, tx.init(params), batches(4))
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    with pytest.raises(ValueError, match="another optimizer, learning rate"):
        tx.settle(params, state)


def test_a_table_used_by_row_whole_and_not_at_all():
    """Steps of three kinds on one state, as with a regulariser or several tasks."""
    tx, dense = se.exact.amsgrad(0.01), optax.amsgrad(0.01)
    params = {"table": jnp.ones((50, 2)), "other": jnp.ones((50, 2))}
    losses = [
        lambda p, ids: jnp.sum(jnp.sin(p["table"][ids])),
        lambda p, ids: jnp.sum(jnp.cos(p["table"])),
        lambda p, ids: jnp.sum(jnp.sin(p["other"][ids])),
    ]
    stock = [jax.jit(lambda p, s, b, f=f: _stock(dense, f, p, s, b)) for f in losses]
    ours = [se.train_step(f, tx) for f in losses]
    got, want = (copy(params), tx.init(params)), (params, dense.init(params))
    for i, ids in enumerate(b // 101 for b in batches(24)):
        kind = (0, 0, 1, 2, 2, 0)[i % 6]
        want = stock[kind](*want, ids)[:2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the table that is used whole
            got = ours[kind](*got, ids)[:2]
    assert_close(tx.to_dense(*got), want)


# --- checkpoints, conversion, clocks --------------------------------------------------------------


def test_a_restored_run_goes_on_bit_for_bit():
    tx, ids = se.exact.adamw(RATE), batches(40)
    step, params = se.train_step(loss_fn, tx), new_params()
    middle = train(step, params, tx.init(params), ids[:20])
    leaves, treedef = jax.tree.flatten(middle[:2])
    saved = [np.array(x) for x in leaves]
    straight = train(step, *middle[:2], ids[20:])
    # An older state than the one the process is at, as after a crash or to try again.
    restored = treedef.unflatten([jnp.asarray(x) for x in saved])
    assert_equal(train(step, *restored, ids[20:]), straight)


@pytest.mark.parametrize("name", ["adamw, clipped", "lion"])
def test_a_run_changes_mode_at_a_checkpoint(name):
    """Dense, then exact, then dense again: all along the dense run."""
    subject = SUBJECTS[name]
    tx, dense = subject.exact(RATE), subject.dense(RATE)
    params = new_params()
    ids = batches(60)
    want, want_state, _ = dense_train(dense, params, dense.init(params), ids)
    params, inner, _ = dense_train(dense, params, dense.init(params), ids[:20])
    params, state, _ = train(
        se.train_step(loss_fn, tx), copy(params), tx.from_dense(params, copy(inner)), ids[20:40]
    )
    params, inner = tx.to_dense(params, state)
    params, inner, _ = dense_train(dense, params, inner, ids[40:])
    assert_close((params, inner), (want, want_state))


def test_the_state_of_lazy_is_taken_over():
    lazy, tx, ids = se.lazy(optax.amsgrad(RATE)), se.exact.amsgrad(RATE), batches(30)
    params = new_params()
    params, state, _ = train(se.train_step(loss_fn, lazy), params, lazy.init(params), ids[:10])
    dense = optax.amsgrad(RATE)
    want, _, _ = dense_train(dense, params, state.inner_state, ids[10:])
    state = tx.from_dense(params, copy(state.inner_state))
    got, state, _ = train(se.train_step(loss_fn, tx), copy(params), state, ids[10:])
    assert_close(tx.settle(got, state)[0], want)


def test_clocks_wrap_around():
    """After 2^31 steps differences are still right, and optax's counts stay at their end."""
    tx, ids, last = se.exact.adam(0.01), batches(30), 2**31 - 1
    dense, params = optax.adam(0.01), new_params()
    inner = dense.init(params)
    inner = (inner[0]._replace(count=jnp.int32(last - 10)), *inner[1:])
    state = tx.from_dense(params, copy(inner))
    near = jnp.int32(last - 10)
    clocks = jax.tree.map(
        lambda c: c._replace(last_step=c.last_step + near),
        state.clocks,
        is_leaf=lambda c: isinstance(c, se.exact.RowClock),
    )
    state = state._replace(step=near, clocks=clocks)
    want, want_state, _ = dense_train(dense, params, inner, ids)
    got, state, _ = train(se.train_step(loss_fn, tx), copy(params), state, ids)
    assert int(state.step) < 0
    assert_close(tx.to_dense(got, state), (want, want_state))


# --- trees ----------------------------------------------------------------------------------------


def test_keys_that_are_names_of_fields():
    """The moments are found in optax's state, not in the user's names."""
    params = {"mu": {"count": jnp.ones((50, 2)), "nu": jnp.ones(2)}, "trace": jnp.ones(())}

    def loss_fn(p, ids):
        return jnp.sum(jnp.sin(p["mu"]["count"][ids] @ p["mu"]["nu"])) * p["trace"]

    tx, dense = se.exact.adamw(0.01), optax.adamw(0.01)
    ids = [b // 101 for b in batches(20)]
    step = jax.jit(lambda p, s, b: _stock(dense, loss_fn, p, s, b))
    want, want_state, _ = train(step, params, dense.init(params), ids)
    got, state, _ = train(se.train_step(loss_fn, tx), copy(params), tx.init(params), ids)
    assert_close(tx.to_dense(got, state), (want, want_state))


def _stock(tx, loss_fn, params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_params_that_are_a_named_tuple_with_names_of_optax():
    class Pair(NamedTuple):
        count: jax.Array
        trace: jax.Array

    params = Pair(jnp.ones(3), jnp.ones((50, 3)))

    def loss_fn(p, ids):
        return jnp.sum(jnp.sin(p.trace[ids] @ p.count))

    ids = [b // 101 for b in batches(15)]
    for make in (lambda x: x.sgd(RATE, momentum=0.9), lambda x: x.rmsprop(RATE, momentum=0.9)):
        tx, dense = make(se.exact), make(optax)
        step = jax.jit(lambda p, s, b, tx=dense: _stock(tx, loss_fn, p, s, b))
        want, want_state, _ = train(step, params, dense.init(params), ids)
        got, state, _ = train(se.train_step(loss_fn, tx), copy(params), tx.init(params), ids)
        assert_close(tx.to_dense(got, state), (want, want_state))


def test_a_bare_table_a_cube_and_a_low_precision_table():
    for params in (jnp.ones((50, 2)), jnp.ones((50, 2, 3)), jnp.ones((50, 2), jnp.bfloat16)):
        tx, dense = se.exact.amsgrad(0.01), optax.amsgrad(0.01)

        def loss_fn(p, ids):
            return jnp.sum(jnp.sin(p[ids].astype(jnp.float32)))

        ids = [b // 101 for b in batches(20)]
        step = jax.jit(lambda p, s, b, f=loss_fn, tx=dense: _stock(tx, f, p, s, b))
        want, _, _ = train(step, params, dense.init(params), ids)
        got, state, _ = train(se.train_step(loss_fn, tx), copy(params), tx.init(params), ids)
        loose = 2e-2 if params.dtype == jnp.bfloat16 else 2e-5
        got = tx.settle(got, state)[0]
        assert got.dtype == params.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(want), loose)


def test_in_a_train_state_of_flax():
    tx, params, ids = se.exact.adam(RATE), new_params(), batches(20)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = se.train_step(loss_fn, tx)
    for batch in ids:
        own, opt_state, _ = step(copy(state.params), copy(state.opt_state), batch)
        state = state.replace(params=own, opt_state=opt_state)
    dense = optax.adam(RATE)
    want, _, _ = dense_train(dense, params, dense.init(params), ids)
    assert_close(tx.settle(state.params, state.opt_state)[0], want)


def test_init_under_jit_and_by_shape():
    for tx in (se.exact.adamw(RATE), se.exact.replay(optax.adan(RATE))):
        params = new_params()
        state = tx.init(params)
        assert_close(jax.jit(tx.init)(params), state, 1e-6)
        shapes = jax.eval_shape(tx.init, params)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)


def test_an_average_of_the_parameters():
    alpha = 0.9
    tx = se.lazy(optax.chain(optax.sgd(0.1), se.params_ema(alpha)))
    params = {"table": jnp.ones((9, 2)), "w": jnp.ones(2)}
    state, averages = tx.init(params), np.ones((9, 2))
    grad = se.grad(lambda p, ids: jnp.sum(p["table"][ids] @ p["w"]))
    for ids in (jnp.array([1, 2]), jnp.array([2, 3])):
        updates, state = tx.update(grad(params, ids), state, params)
        params = optax.apply_updates(params, updates)
        averages[ids] = alpha * averages[ids] + (1 - alpha) * np.asarray(params["table"])[ids]
    np.testing.assert_allclose(optax.tree.get(state, "ema")["table"], averages, 1e-6)
    with pytest.raises(ValueError, match="needs the parameters"):
        se.params_ema(alpha).update(params, se.params_ema(alpha).init(params))


def test_sums_of_a_long_run_stay_accurate():
    """After 2e5 steps a gap of three steps is still known to six digits; one float would not do."""
    from sparse_embed.exact._ledger import Counts, Ledger

    steps, eta, decay = 200_000, 1e-3, 0.5
    ledger = Ledger(lambda c: eta, lambda c: decay, True, (), jnp.float32)

    def one(sums, step):
        counts = Counts(*(jnp.int32(step),) * 3)
        return ledger.advance(sums, counts, ledger.tails(counts.ahead(1))), sums

    start = ledger.start(ledger.tails(Counts(*(jnp.int32(0),) * 3)))
    now, kept = jax.lax.scan(one, start, jnp.arange(steps))
    then, n = kept[-3:-2], jnp.array([3.0])
    found = ledger.between(then, now, n)
    shrunk = np.float64(np.float32(eta) * np.float32(decay))
    np.testing.assert_allclose(found.decay, (1 - shrunk) ** 3, 3e-7)
    drift = np.float64(np.float32(eta)) * (1 + (1 - shrunk) + (1 - shrunk) ** 2)
    np.testing.assert_allclose(found.drift, drift, 1e-5)
    heads = (now[0] - then[0, 0], now[2] - then[0, 2])  # without the second floats
    assert abs(np.expm1(heads[0]) / ((1 - shrunk) ** 3 - 1) - 1) > 1e-3


@pytest.mark.parametrize("make", [se.exact.adam, se.exact.adamw, se.exact.adamax, se.exact.yogi])
def test_a_float32_table_where_jax_has_64_bits(make):
    """Terms are summed in the table's dtype; steps 2 and 3 make up what row 1 missed."""
    with jax.enable_x64(True):
        params, tx = {"table": jnp.ones((30, 2), jnp.float32)}, make(1e-2)
        step = se.train_step(lambda p, ids: (p["table"][ids] ** 2).mean(), tx)
        state = tx.init(params)
        for ids in ([1, 5], [2, 5], [1, 2]):
            params, state, _ = step(params, state, jnp.array(ids))
        assert params["table"].dtype == jnp.float32 and not jnp.isnan(params["table"]).any()
