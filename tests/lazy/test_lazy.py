"""`se.lazy`: clocks, known recurrences, clipping, composition, and what is written wrongly."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import HEIGHT, SHAPES, TABLES, kinds, tables
from dense_oracle import (
    STEPS,
    TOLERANCE,
    assert_same,
    batches,
    dense,
    dense_steps,
    listed,
    new_params,
    sparse,
    stepper,
)
from flax import nnx
from flax.training.train_state import TrainState
from helpers import temp_bytes

import sparse_embed as se

# Expected of MultiSteps and apply_every; one test asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:se.lazy.inner.. inner gathers:UserWarning")

REST = tuple(name for name in SHAPES if name not in TABLES)
FALLING = optax.linear_schedule(0.1, 0.01, 9)


def lazy_steps(
    tx: Any, params: Any, leaves: tuple[str, ...] = tuple(SHAPES), coalesce: bool = False
) -> Any:
    """Steps on raw lists of rows, or on gradients as `se.grad` gives them."""
    step, state = stepper(tx), tx.init(params)
    for batch in batches():
        grads = sparse(batch, leaves)
        if coalesce:
            grads = {n: se.coalesce(g) if n in TABLES else g for n, g in grads.items()}
        params, state = step(params, state, grads, {})
    return params, state


def assert_as_masked_dense(lazy: Any, inner: Any, coalesce: bool = False) -> Any:
    """`lazy` on `RowSparse` gradients takes the steps that `inner` takes on dense ones."""
    params, state = lazy_steps(lazy, new_params(), coalesce=coalesce)
    ((wanted, wanted_state),) = dense_steps(inner, new_params())
    assert_same(params, wanted, "params")
    return state, wanted_state


# --- clocks ---------------------------------------------------------------------------------------


def row_by_row(moments: Any, rate: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A table, and how often each row was touched, when each row has an optimizer of its own.

    Rows are updated by `moments` in the steps that list them; the rate is that of the training.
    """
    table = new_params()[name]
    state = jax.vmap(moments.init)(table)
    update = jax.jit(jax.vmap(moments.update))
    touches = np.zeros(table.shape[0], int)
    for step, batch in enumerate(batches()):
        mask = listed(batch, name)
        updates, new = update(dense(batch)[name], state, table)

        def own(x, old, mask=mask):
            return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, old)

        state = jax.tree.map(own, new, state)
        table = own(table - rate(step) * updates, table)
        touches += mask
    return np.asarray(table), touches


def decayed(moments: Any, decay: float) -> Any:
    return optax.chain(moments, optax.add_decayed_weights(decay))


ROW_CLOCKS = {
    "adam": (optax.adam, optax.scale_by_adam()),
    "adamw": (optax.adamw, decayed(optax.scale_by_adam(), 1e-4)),
    "nadam": (optax.nadam, optax.scale_by_adam(nesterov=True)),
    "radam": (optax.radam, optax.scale_by_radam()),
    "amsgrad": (optax.amsgrad, optax.scale_by_amsgrad()),
    "adabelief": (optax.adabelief, optax.scale_by_belief()),
    "adamax": (optax.adamax, optax.scale_by_adamax()),
    "yogi": (optax.yogi, optax.scale_by_yogi()),
    "lion": (optax.lion, decayed(optax.scale_by_lion(), 1e-3)),
    "adan": (optax.adan, optax.scale_by_adan()),
    "sgd": (optax.sgd, optax.identity()),
    "rmsprop": (optax.rmsprop, optax.scale_by_rms()),
    "adopt": (optax.contrib.adopt, optax.contrib.scale_by_adopt()),
}


@pytest.mark.parametrize("name", ROW_CLOCKS)
def test_row_clock_is_an_optimizer_for_each_row(name):
    alias, moments = ROW_CLOCKS[name]
    params, state = lazy_steps(se.lazy(alias(FALLING), clock="row"), new_params())
    for table in TABLES:
        wanted, touches = row_by_row(moments, FALLING, table)
        np.testing.assert_allclose(params[table], wanted, err_msg=table, **TOLERANCE)
        for counts in state.row_counts.values():
            assert counts[list(params).index(table)].tolist() == touches.tolist()
    rest = {leaf: params[leaf] for leaf in REST}
    ((wanted, wanted_state),) = dense_steps(alias(FALLING), new_params(REST), REST)
    assert_same(rest, wanted, "dense leaves")
    for field in ("count", "t"):
        for path, count in optax.tree.get_all_with_path(state.inner_state, field):
            assert int(count) == STEPS, f"{path}: the state keeps optax's own count as well"


def test_clocks_differ_where_bias_correction_does():
    def tables_after(alias, clock):
        params, _ = lazy_steps(se.lazy(alias(0.1), clock=clock), new_params())
        return np.concatenate([np.ravel(params[name]) for name in TABLES])

    same = [
        np.allclose(tables_after(a, "row"), tables_after(a, "global"))
        for a in (optax.lion, optax.adam)
    ]
    assert same == [True, False]


def test_row_clock_lets_every_row_emit_at_its_own_third_touch():
    params, _ = lazy_steps(se.lazy(optax.apply_every(3), clock="row"), new_params())
    for table in TABLES:
        wanted, touches = row_by_row(optax.apply_every(3), lambda step: -1.0, table)
        assert touches.max() >= 3
        np.testing.assert_allclose(params[table], wanted, **TOLERANCE)


@pytest.mark.parametrize("alias", [optax.adam, optax.adan], ids=["adam", "adan"])
def test_row_clock_is_in_place(alias):
    tx, height = se.lazy(alias(0.1), clock="row"), 50_000
    table = jnp.zeros((height, 8))
    grad = se.RowSparse(jnp.array([7, 1, 7]), jnp.ones((3, 8)), table.shape)
    step = jax.jit(stepper(tx).__wrapped__, donate_argnums=(0, 1))
    assert temp_bytes(step, table, tx.init(table), grad, {}) < height


@pytest.mark.parametrize("clock", ["global", "row"])
def test_map_params_leaves_counts_alone(clock):
    params, tx = new_params(), se.lazy(optax.adam(0.1), clock=clock)
    state = tx.init(params)
    assert_same(optax.tree.map_params(tx, lambda x: x, state), state, "map_params", rtol=0)
    halved = optax.tree.map_params(tx, lambda x: x.astype(jnp.bfloat16), state)
    assert {x.dtype for x in jax.tree.leaves(halved.inner_state[0].mu)} == {jnp.dtype("bfloat16")}
    assert_same(halved.row_counts, state.row_counts, "counts", rtol=0)


BRANCHES = {
    "apply_if_finite": lambda m: optax.apply_if_finite(m, 3),
    "conditionally_transform": lambda m: optax.conditionally_transform(m, lambda step: step > 3),
    "conditionally_mask": lambda m: optax.conditionally_mask(m, lambda step: step % 3 == 0),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_row_clock_inside_a_branch_that_all_rows_take(name):
    """The step of the training decides; within the branch each row counts its own."""
    around = BRANCHES[name]
    params, _ = lazy_steps(se.lazy(around(optax.scale_by_adam()), clock="row"), new_params())
    for table in TABLES:
        wanted = new_params()[table]
        moments = optax.scale_by_adam()
        state = jax.vmap(moments.init)(wanted)
        update = jax.jit(jax.vmap(moments.update))
        for step, batch in enumerate(batches()):
            mask = listed(batch, table)
            taken = {"apply_if_finite": True, "conditionally_transform": step > 3}
            grads = dense(batch)[table]
            updates, new = update(grads, state)
            keep = lambda x, old, m=mask: jnp.where(m.reshape(-1, *(1,) * (x.ndim - 1)), x, old)  # noqa: E731
            if taken.get(name, step % 3 == 0):
                state, wanted = jax.tree.map(keep, new, state), wanted + keep(updates, 0 * updates)
            elif name == "conditionally_transform":
                wanted = wanted + grads
        np.testing.assert_allclose(params[table], wanted, err_msg=table, **TOLERANCE)


def test_row_clock_lets_every_row_take_its_own_branch():
    """MultiSteps emits when a row was touched for the third time, whenever that is."""
    rounds = lambda: optax.MultiSteps(optax.scale_by_adam(), 3)  # noqa: E731
    params, _ = lazy_steps(se.lazy(rounds(), clock="row"), new_params())
    own = optax.GradientTransformation(rounds().init, rounds().update)
    for table in TABLES:
        wanted, touches = row_by_row(own, lambda step: -1.0, table)
        assert touches.max() >= 3
        np.testing.assert_allclose(params[table], wanted, err_msg=table, **TOLERANCE)


def test_row_clock_leaves_norms_and_injected_rates_to_the_whole():
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam())
    tx = se.lazy(
        optax.inject_hyperparams(lambda rate: optax.chain(inner, optax.scale(-rate)))(FALLING),
        clock="row",
    )
    params, state = lazy_steps(tx, new_params())
    clip, clipped = optax.clip_by_global_norm(0.5), new_params()
    wanted, moments = new_params(), optax.scale_by_adam()
    states = {name: jax.vmap(moments.init)(clipped[name]) for name in TABLES}
    for step, batch in enumerate(batches()):
        grads, _ = clip.update(dense(batch), clip.init(None))
        for name in TABLES:
            mask = listed(batch, name)
            updates, new = jax.vmap(moments.update)(grads[name], states[name])
            keep = lambda x, old, m=mask: jnp.where(m.reshape(-1, *(1,) * (x.ndim - 1)), x, old)  # noqa: E731
            states[name] = jax.tree.map(keep, new, states[name])
            wanted[name] = keep(wanted[name] - FALLING(step) * updates, wanted[name])
    for name in TABLES:
        np.testing.assert_allclose(params[name], wanted[name], err_msg=name, **TOLERANCE)
    assert int(state.inner_state.count) == STEPS


def test_row_clock_is_refused_where_rows_in_a_branch_hang_together():
    params, tx = new_params(), se.lazy(optax.novograd(0.1), clock="row")
    reason = "`reduce_sum` in scale_by_novograd reduces rows of which some take another branch"
    with pytest.raises(ValueError, match=reason):
        tx.update(sparse(batches()[0]), tx.init(params), params)


# --- golden numbers and recurrences ---------------------------------------------------------------


def lazy_adam_recurrence(table, batches, rate, b1, b2, eps):
    """TensorFlow Addons' LazyAdam and torch's SparseAdam: float64, the step counted globally.

    `m += (1-b1)(g-m)`, `v += (1-b2)(g^2-v)` and `p -= rate sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v)+eps)`
    for the rows listed in step t.
    """
    table = np.array(table, np.float64)
    m, v = np.zeros_like(table), np.zeros_like(table)
    for t, (indices, rows) in enumerate(batches, start=1):
        real = (indices >= 0) & (indices < len(table))
        g = np.zeros_like(table)
        np.add.at(g, indices[real], rows[real].astype(np.float64))
        r = np.unique(indices[real])
        m[r] += (1 - b1) * (g[r] - m[r])
        v[r] += (1 - b2) * (g[r] ** 2 - v[r])
        table[r] -= rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m[r] / (np.sqrt(v[r]) + eps)
    return table


@pytest.mark.parametrize("name", TABLES)
def test_adam_is_the_recurrence_of_lazy_adam_and_sparse_adam(name):
    """Their eps is not bias-corrected as optax's is: alike where eps is next to nothing."""
    sequence = [batch[name] for batch in batches()]
    rows = [np.where(rows == 0, 1e-3, rows).astype(np.float32) for _, rows in sequence]
    sequence = [(indices, x) for (indices, _), x in zip(sequence, rows, strict=True)]
    table = new_params()[name]
    wanted = lazy_adam_recurrence(table, sequence, 0.1, 0.9, 0.999, 0.0)
    tx = se.lazy(optax.adam(0.1, eps=1e-20))
    step, state = stepper(tx), tx.init(table)
    for indices, x in sequence:
        table, state = step(table, state, se.RowSparse(indices, x, table.shape), {})
    np.testing.assert_allclose(table, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "start, slope, known",
    [
        ([1.0, 1.0, 2.0], 0.1, [0.997, 1.0, 1.997]),
        ([3.0, 3.0, 4.0], 0.01, [2.997, 3.0, 3.997]),
    ],
)
def test_numbers_of_tensorflow_addons(start, slope, known):
    """`lazy_adam_test.py`: rows 0 and 2 have the same gradient for three steps."""
    table, rows = jnp.array(start), jnp.array([slope, slope])
    tx = se.lazy(optax.adam(0.001, eps=1e-7))
    state = tx.init(table)
    for _ in range(3):
        updates, state = tx.update(se.RowSparse(jnp.array([0, 2]), rows, (3,)), state, table)
        table = optax.apply_updates(table, updates)
    indices = np.array([0, 2])
    wanted = lazy_adam_recurrence(start, [(indices, np.array(rows))] * 3, 0.001, 0.9, 0.999, 1e-7)
    np.testing.assert_allclose(table, wanted, rtol=1e-6)
    np.testing.assert_allclose(table, known, atol=2e-6)


def test_repeats_are_one_gradient_as_in_tensorflow_addons():
    """`lazy_adam_test.py`: 0.1 twice for row 1 is 0.2 once."""
    tables_after = []
    for indices, rows in (([1, 1], [[0.1], [0.1]]), ([1], [[0.2]])):
        table, tx = jnp.array([[1.0], [2.0]]), se.lazy(optax.adam(0.001))
        state = tx.init(table)
        for _ in range(3):
            grad = se.RowSparse(jnp.array(indices), jnp.array(rows), (2, 1))
            updates, state = tx.update(grad, state, table)
            table = optax.apply_updates(table, updates)
        tables_after.append(np.asarray(table))
    np.testing.assert_array_equal(*tables_after)


def test_a_touched_row_with_a_zero_gradient_moves_and_an_untouched_one_does_not():
    table, tx = jnp.ones((4, 1)), se.lazy(optax.adam(0.1))
    state = tx.init(table)
    for rows in ([[1.0], [1.0]], [[0.0], [0.0]]):
        before = table
        updates, state = tx.update(se.RowSparse(jnp.array([0, 2]), jnp.array(rows), (4, 1)), state)
        table = optax.apply_updates(table, updates)
    assert (np.asarray(table != before)[:, 0]).tolist() == [True, False, True, False]


def test_the_step_counts_where_nothing_is_listed():
    table, tx = jnp.ones((4, 1)), se.lazy(optax.adam(0.1))
    nothing = se.RowSparse(jnp.zeros(0, jnp.int32), jnp.zeros((0, 1)), (4, 1))
    updates, state = tx.update(nothing, tx.init(table), table)
    assert optax.tree.get(state, "count") == 1
    np.testing.assert_array_equal(optax.apply_updates(table, updates), table)


# --- repeats and padding --------------------------------------------------------------------------

RAW = {
    "adam": lambda: optax.adam(0.1),
    "novograd": lambda: optax.novograd(0.1),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
    "polyak": lambda: optax.normalize_by_update_norm(),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_gradients_with_repeats_and_padding(name):
    state, wanted = assert_as_masked_dense(se.lazy(RAW[name]()), RAW[name]())
    assert_same(state.inner_state, wanted, "state")


@pytest.mark.parametrize(
    "height, some", [(1, [0]), (2, [1, 0]), (6, [5, 0, 3, 2, 1, 4]), (6, [5, 0]), (40, [7])]
)
def test_reductions_count_untouched_rows_where_there_are_any(height, some):
    """All gradients are negative, so the maximum is zero as soon as one row is untouched."""
    table = jnp.linspace(1.0, 2.0, height * 2).reshape(height, 2)
    indices = jnp.array([some[0], height, -1, *some])
    rows = jnp.linspace(-1.0, -0.1, indices.size * 2).reshape(-1, 2)

    def reduced(g):
        parts = g.max(), g.min(), g.sum(), g.mean(), jnp.any(g != 0), jnp.all(g != 0), g.max(0)[1]
        return g * 0 + sum(10.0**k * part for k, part in enumerate(parts))

    inner = optax.stateless_with_tree_map(lambda g, p: reduced(g))
    tx = se.lazy(inner)
    got, _ = tx.update(se.RowSparse(indices, rows, table.shape), tx.init(table), table)
    real = (indices >= 0) & (indices < height)
    whole = jnp.zeros_like(table).at[indices[real]].add(rows[real])
    wanted, _ = inner.update(whole, inner.init(table), table)
    some = jnp.sort(jnp.array(some))
    np.testing.assert_allclose(got.todense()[some], wanted[some], rtol=1e-5)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
def test_global_norm_is_that_of_the_dense_tree(number, maybe_jit):
    batch = batches()[number]
    wanted = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in dense(batch).values()))
    np.testing.assert_allclose(maybe_jit(se.global_norm)(sparse(batch)), wanted, rtol=1e-6)


@pytest.mark.parametrize("largest", [0.5, 1e3])
@pytest.mark.parametrize("within", [False, True], ids=["se.clip", "in lazy"])
def test_clipping_is_that_of_the_dense_tree(largest, within):
    optax_clip = optax.clip_by_global_norm(largest)
    clip = se.lazy(optax_clip) if within else se.clip_by_global_norm(largest)
    params = new_params()
    update = jax.jit(clip.update)
    for batch in batches()[:6]:
        got, _ = update(sparse(batch), clip.init(params))
        wanted, _ = optax_clip.update(dense(batch), optax_clip.init(params))
        got = {name: g.todense() if name in TABLES else g for name, g in got.items()}
        assert_same(got, jax.tree.map(jnp.asarray, wanted), "clipped", rtol=1e-6, atol=1e-7)


# --- composition ----------------------------------------------------------------------------------


def test_hyperparameters_are_found_and_set():
    params = new_params()
    tx = se.lazy(optax.inject_hyperparams(optax.sgd)(0.1))
    state = tx.init(params)
    assert optax.tree.get(state, "learning_rate") == np.float32(0.1)
    slower = optax.tree.set(state, learning_rate=jnp.float32(0.05))
    assert isinstance(slower, se.LazyState)
    grads = sparse(batches()[0])
    for now, rate in ((state, 0.1), (slower, 0.05)):
        updates, _ = tx.update(grads, now, params)
        np.testing.assert_allclose(updates["bias"], -rate * grads["bias"], rtol=1e-6)
        np.testing.assert_allclose(
            updates["users"].todense(), -rate * dense(batches()[0])["users"], rtol=1e-5, atol=1e-7
        )


def test_map_params_sees_the_moments_as_parameters():
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    halved = optax.tree.map_params(tx, lambda x: x.astype(jnp.bfloat16), tx.init(params))
    assert {x.dtype for x in jax.tree.leaves(halved.inner_state[0].mu)} == {jnp.dtype("bfloat16")}
    assert halved.inner_state[0].count.dtype == jnp.int32


def test_a_step_with_nan_is_skipped_whole():
    params, tx = new_params(), se.lazy(optax.apply_if_finite(optax.adam(0.1), 3))
    step = stepper(tx)
    good, bad = sparse(batches()[0]), sparse(batches()[0])
    rows = bad["users"].rows.at[0, 0, 0].set(jnp.nan)
    bad["users"] = se.RowSparse(bad["users"].indices, rows, bad["users"].shape)
    params, state = step(params, tx.init(params), good, {})
    after, skipped = step(params, state, bad, {})
    assert_same(after, params, "params", rtol=0)
    assert_same(skipped.inner_state.inner_state, state.inner_state.inner_state, "moments", rtol=0)
    assert int(skipped.inner_state.total_notfinite) == 1
    again, _ = step(after, skipped, good, {})
    assert not np.array_equal(again["users"], after["users"])


def as_it_is(inner: Any) -> Any:
    return inner


LABELS = {name: "tables" if name in TABLES else "rest" for name in SHAPES}
IS_TABLE = {name: name in TABLES for name in SHAPES}
IS_REST = {name: name not in TABLES for name in SHAPES}
# Each is built twice: with `lazy` and `se.clip_by_global_norm`, and with stock optax alone.
OUTSIDE = {
    "chain": lambda lazy, clip: optax.chain(clip(0.5), lazy(optax.adam(0.1))),
    "named_chain": lambda lazy, clip: optax.named_chain(
        ("clip", clip(0.5)), ("adam", lazy(optax.adam(0.1)))
    ),
    "partition": lambda lazy, clip: optax.partition(
        {"tables": lazy(optax.adam(0.1)), "rest": optax.contrib.muon(0.1)}, LABELS
    ),
    "multi_transform": lambda lazy, clip: optax.multi_transform(
        {"tables": lazy(optax.adagrad(0.1)), "rest": optax.adamw(0.1)}, LABELS
    ),
    "masked": lambda lazy, clip: optax.chain(
        optax.masked(lazy(optax.adam(0.1)), IS_TABLE), optax.masked(optax.sgd(0.1), IS_REST)
    ),
    "inject_hyperparams": lambda lazy, clip: optax.inject_hyperparams(
        lambda rate: lazy(optax.adam(rate))
    )(FALLING),
    "apply_if_finite": lambda lazy, clip: optax.apply_if_finite(lazy(optax.adam(0.1)), 3),
    "conditionally_transform": lambda lazy, clip: optax.chain(
        lazy(optax.scale(-0.1)),
        optax.conditionally_transform(lazy(optax.scale_by_adam()), lambda step: step > 3),
    ),
    "conditionally_mask": lambda lazy, clip: optax.conditionally_mask(
        lazy(optax.adam(0.1)), lambda step: step % 3 == 0
    ),
    "with_extra_args_support": lambda lazy, clip: optax.with_extra_args_support(
        lazy(optax.adam(0.1))
    ),
    "zero_nans before": lambda lazy, clip: optax.chain(
        optax.zero_nans(), clip(0.5), lazy(optax.adam(0.1))
    ),
    "identity around": lambda lazy, clip: optax.chain(
        optax.identity(), lazy(optax.adam(0.1)), optax.identity()
    ),
    "lazy in lazy": lambda lazy, clip: lazy(optax.chain(clip(0.5), optax.adam(0.1))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_lazy_inside_other_transformations(name):
    """Tables lazily, the rest by another optimizer: the dense numbers of the touched rows."""
    ours = OUTSIDE[name](se.lazy, se.clip_by_global_norm)
    assert_as_masked_dense(ours, OUTSIDE[name](as_it_is, optax.clip_by_global_norm), coalesce=True)


def test_a_skip_around_lazy_changes_nothing():
    """`apply_if_finite` zeroes the whole update: of row numbers that makes no rows."""
    params, tx = new_params(), optax.apply_if_finite(se.lazy(optax.adam(0.1)), 3)
    good, bad = (
        {n: se.coalesce(g) if n in TABLES else g for n, g in sparse(batches()[0]).items()}
        for _ in range(2)
    )
    rows = bad["users"].rows.at[0, 0, 0].set(jnp.nan)
    bad["users"] = se.coalesce(se.RowSparse(bad["users"].indices, rows, bad["users"].shape))
    step = stepper(tx)
    params, state = step(params, tx.init(params), good, {})
    after, skipped = step(params, state, bad, {})
    assert_same(after, params, "params", rtol=0)
    assert_same(skipped.inner_state, state.inner_state, "moments", rtol=0)
    again, _ = step(after, skipped, good, {})
    assert not np.array_equal(again["users"], after["users"])


NESTED = {
    "names within names": lambda: optax.named_chain(
        ("clip", optax.clip_by_global_norm(0.5)),
        (
            "both",
            optax.partition(
                {
                    "tables": optax.inject_hyperparams(optax.adam)(FALLING),
                    "rest": optax.sgd(0.1, momentum=0.9),
                },
                kinds,
            ),
        ),
    ),
    "rounds that skip": lambda: optax.MultiSteps(
        optax.chain(optax.clip(0.5), optax.adamw(FALLING)),
        every_k_schedule=2,
        should_skip_update_fn=optax.skip_not_finite,
    ),
    "masks of leaves": lambda: optax.chain(
        optax.adamw(0.1, mask=tables), optax.ema(0.5, debias=True)
    ),
    "callable labels": lambda: optax.multi_transform(
        {"a": optax.rmsprop(0.1), "b": optax.set_to_zero()},
        lambda p: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", p),
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_chains(name):
    state, wanted = assert_as_masked_dense(se.lazy(NESTED[name]()), NESTED[name]())
    assert_same(state.inner_state, wanted, "state")


def test_params_in_other_containers():
    """Gradients may sit anywhere in a tree; a table may be the whole tree."""
    table = new_params()["items"]
    indices, rows = batches()[0]["items"]
    grad, tx = se.RowSparse(indices, rows, table.shape), se.lazy(optax.adamw(0.1))
    results = []
    for wrap in (lambda x: x, lambda x: [x, {"a": (x,)}], lambda x: {"z": None, "b": x}):
        params, grads = wrap(table), wrap(grad)
        updates, _ = tx.update(grads, tx.init(params), params)
        results += jax.tree.leaves(optax.apply_updates(params, updates))
    assert len(results) == 4
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


def test_a_dense_gradient_updates_all_rows_of_a_table():
    params = new_params()
    tx, inner = se.lazy(optax.adam(0.1)), optax.adam(0.1)
    mixed = dense(batches()[0]) | {"items": sparse(batches()[0])["items"]}
    state = tx.init(params)
    first, state = stepper(tx)(params, state, sparse(batches()[1]), {})
    new, _ = stepper(tx)(first, state, mixed, {})
    wanted, _ = stepper(inner)(first, state.inner_state, dense(batches()[0]), {})
    np.testing.assert_allclose(new["users"], wanted["users"], **TOLERANCE)
    idle = ~listed(batches()[0], "items")
    np.testing.assert_array_equal(np.asarray(new["items"])[idle], np.asarray(first["items"])[idle])


def test_restored_numpy_arrays_are_as_good():
    params, tx = new_params(), se.lazy(optax.adamw(0.1))
    state, grads = tx.init(params), sparse(batches()[0])
    wanted = tx.update(grads, state, params)
    got = tx.update(grads, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, params))
    assert_same(got, wanted, "numpy", rtol=0)


def test_complex_tables():
    draw = np.random.default_rng(3)
    table = jnp.asarray(draw.normal(size=(9, 2)) + 1j * draw.normal(size=(9, 2)), jnp.complex64)
    rows = jnp.asarray(draw.normal(size=(3, 2)) + 1j * draw.normal(size=(3, 2)), jnp.complex64)
    grad = se.RowSparse(jnp.array([4, 1, 4]), rows, table.shape)
    whole = jnp.zeros_like(table).at[jnp.array([4, 1, 4])].add(rows)
    for inner in (optax.adam(0.1), optax.contrib.split_real_and_imaginary(optax.adam(0.1))):
        got, _ = se.lazy(inner).update(grad, se.lazy(inner).init(table), table)
        wanted, _ = inner.update(whole, inner.init(table), table)
        np.testing.assert_allclose(got.rows[:2], wanted[jnp.array([1, 4])], rtol=1e-5)


@pytest.mark.parametrize("inner", [optax.MultiSteps(optax.sgd(1.0), 2), optax.apply_every(2)])
def test_gathering_over_steps_is_warned_of(inner):
    tx = se.lazy(optax.chain(optax.clip(1.0), optax.with_extra_args_support(inner)))
    with pytest.warns(UserWarning, match=r"(?s)waits or is lost.*got: .*write: grads = "):
        tx.init(new_params())


def test_accumulated_steps_drop_what_the_page_says():
    """`docs/conformance.md` on MultiSteps: what another row gathered is overwritten, or waits."""
    table = jnp.zeros((3, 1))
    rounds = [[1], [0], [1], [0]]  # rows of the micro-steps: row 1 in the first of each round of 2
    after = {}
    for mean in (True, False):
        tx = se.lazy(optax.MultiSteps(optax.sgd(1.0), 2, use_grad_mean=mean))
        params, state = table, tx.init(table)
        for indices in rounds:
            grad = se.RowSparse(jnp.array(indices), jnp.ones((1, 1)), (3, 1))
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        after[mean] = params[:, 0].tolist(), state.inner_state.acc_grads[:, 0].tolist()
    assert after == {
        True: ([-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
        False: ([-2.0, 0.0, 0.0], [0.0, 2.0, 0.0]),
    }


# --- flax -----------------------------------------------------------------------------------------


def test_linen_train_state():
    params = new_params()
    tx = se.lazy(optax.adamw(0.1))
    flax_state = TrainState.create(apply_fn=None, params=params, tx=tx)

    @jax.jit
    def step(flax_state, grads):
        return flax_state.apply_gradients(grads=grads)

    for batch in batches()[:3]:
        flax_state = step(flax_state, sparse(batch))
    plain, state = new_params(), tx.init(params)
    for batch in batches()[:3]:
        plain, state = stepper(tx)(plain, state, sparse(batch), {})
    assert_same(flax_state.params, plain, "params")
    assert_same(flax_state.opt_state, state, "state")


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(50, 4, rngs=nnx.Rngs(0))
            self.dense = nnx.Linear(4, 1, rngs=nnx.Rngs(1))

        def __call__(self, ids):
            return jnp.sum(self.dense(self.embed(ids)) ** 2)

    def trained(tx, gradient):
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for ids in ([3, 9, 3], [0, 3, 49]):
            graph, params = nnx.split(model, nnx.Param)
            grads = gradient(lambda p, x, graph=graph: nnx.merge(graph, p)(x))(
                params, np.array(ids)
            )
            optimizer.update(model, grads)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), grads

    got, grads = trained(se.lazy(optax.adagrad(0.1)), se.grad)
    assert isinstance(grads["embed"]["embedding"].get_value(), se.RowSparse)
    wanted, _ = trained(optax.adagrad(0.1), jax.grad)
    assert_same(got, wanted, "params")


# --- written wrongly ------------------------------------------------------------------------------


def parts(raised: Any) -> str:
    """The text of an error of ours, which must have three parts."""
    text = str(raised.value).split("\n----")[0]
    assert re.fullmatch(r".+\n  got: .+\n  write: .+", text, re.S), text
    return text


STOCK = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "schedule": optax.sgd(FALLING),
    "scale(-1)": optax.scale(-1),
    "scale(-1.0)": optax.scale(-1.0),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(0.5),
    "adamw": optax.adamw(0.1),
    "set_to_zero": optax.set_to_zero(),
    "sign": optax.scale_by_sign(),
    "integer schedule": optax.scale_by_schedule(lambda count: jnp.where(count > 9, 2, 1)),
}


@pytest.mark.parametrize("name", STOCK)
def test_row_sparse_gradients_in_stock_optax_are_never_wrong(name, maybe_jit):
    """It raises while it is traced, and the dtype says why; or, where it only zeroes, is right."""
    tx, table = STOCK[name], jnp.ones((9, 2))
    grad = se.RowSparse(jnp.array([4, 1, 4]), jnp.ones((3, 2)), table.shape)

    def step(table, grad):
        updates, _ = tx.update(grad, tx.init(table), table)
        return optax.apply_updates(table, updates)

    try:
        new = np.asarray(maybe_jit(step)(table, grad))
    except (TypeError, ValueError, NotImplementedError) as error:
        trees = "Custom node type mismatch" in str(error) or "RowSparse" in str(error)
        assert trees or ADVICE in str(error) or isinstance(error, NotImplementedError)
        return
    dense_grad = jnp.zeros((9, 2)).at[jnp.array([4, 1, 4])].add(1.0)
    updates, _ = tx.update(dense_grad, tx.init(table), table)
    np.testing.assert_allclose(new, optax.apply_updates(table, updates), rtol=1e-6)


ADVICE = "whole chain inside se.lazy"
BESIDE = {
    "scale before": optax.chain(optax.scale(2.0), se.lazy(optax.adam(0.1))),
    "clip before": optax.chain(optax.clip_by_global_norm(1.0), se.lazy(optax.adam(0.1))),
    "rate after": optax.chain(se.lazy(optax.scale_by_rss()), optax.scale_by_learning_rate(FALLING)),
    "integer scale after": optax.chain(se.lazy(optax.adam(0.1)), optax.scale(2)),
    "clip after": optax.chain(se.lazy(optax.adam(0.1)), optax.clip(0.5)),
}


@pytest.mark.parametrize("name", BESIDE)
def test_stock_optax_beside_lazy_raises_while_tracing(name):
    params, tx = new_params(), BESIDE[name]

    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    with pytest.raises((TypeError, ValueError), match=ADVICE):
        jax.eval_shape(step, params, sparse(batches()[0]))


def test_inner_that_is_no_transformation():
    with pytest.raises(TypeError, match="inner must be an optax transformation") as raised:
        se.lazy(optax.adam)
    assert "se.lazy(optax.adam(1e-3))" in parts(raised)


def test_clock_that_is_none():
    with pytest.raises(ValueError, match="clock='table'") as raised:
        se.lazy(optax.adam(0.1), clock="table")
    assert '"global" or "row"' in parts(raised)


def test_state_of_stock_optax():
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    with pytest.raises(TypeError, match="opt_state is not a state of se.lazy") as raised:
        tx.update(sparse(batches()[0]), optax.adam(0.1).init(params), params)
    assert "got: tuple" in parts(raised) and "opt_state = tx.init(params)" in parts(raised)


def test_state_of_another_table():
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    taller = params | {"users": jnp.zeros((HEIGHT + 1, 2, 3))}
    with pytest.raises(ValueError, match="opt_state belongs to other parameters") as raised:
        tx.update(sparse(batches()[0]), tx.init(taller), params)
    taller, own = f"float32[{HEIGHT + 1},2,3]", f"float32[{HEIGHT},2,3]"
    assert f"mu['users'] {taller} where {own} belongs" in parts(raised)


def test_state_of_another_optimizer():
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    with pytest.raises(ValueError, match="opt_state belongs to other parameters") as raised:
        tx.update(sparse(batches()[0]), se.lazy(optax.sgd(0.1)).init(params), params)
    assert "a state of structure" in parts(raised)


def test_state_of_the_other_clock():
    params = new_params()
    by_row, by_step = se.lazy(optax.adam(0.1), clock="row"), se.lazy(optax.adam(0.1))
    for tx, other in ((by_row, by_step), (by_step, by_row)):
        with pytest.raises(ValueError, match="opt_state was made with another clock") as raised:
            tx.update(sparse(batches()[0]), other.init(params), params)
        assert "row_counts of [" in parts(raised)


def test_gradients_of_another_tree():
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    grads = sparse(batches()[0])
    del grads["bias"]
    with pytest.raises(ValueError, match="grads and params are different trees") as raised:
        tx.update(grads, tx.init(params), params)
    assert "_, grads = se.value_and_grad(loss_fn)(params, batch)" in parts(raised)


@pytest.mark.parametrize(
    "name, grad",
    [
        ("items", se.RowSparse(jnp.array([1]), jnp.ones((1, 4)), (7, 4))),
        ("items", se.RowSparse(jnp.array([1]), jnp.ones((1, 3)), (6, 3))),
        ("bias", jnp.ones(7)),
    ],
)
def test_gradients_of_another_shape(name, grad):
    params, tx = new_params(), se.lazy(optax.adam(0.1))
    grads = sparse(batches()[0]) | {name: grad}
    with pytest.raises(ValueError, match="a gradient of another table") as raised:
        tx.update(grads, tx.init(params), params)
    assert f"params['{name}'] float32" in parts(raised)


def test_params_left_out():
    params, grads = new_params(), sparse(batches()[0])
    adam, adamw = se.lazy(optax.adam(0.1)), se.lazy(optax.adamw(0.1))
    updates, _ = adam.update(grads, adam.init(params))
    with_params, _ = adam.update(grads, adam.init(params), params)
    assert_same(updates, with_params, "adam does not need them", rtol=0)
    with pytest.raises(ValueError, match="You are using a transformation that requires"):
        adamw.update(grads, adamw.init(params))


def test_a_table_given_to_the_part_that_wants_matrices():
    """At `init` a leaf might have been dense; its gradient tells."""
    params = new_params()
    tx = se.lazy(
        optax.partition({"tables": optax.adam(0.1), "rest": optax.contrib.muon(0.1)}, kinds)
    )
    state = tx.init(params)
    tx.update(sparse(batches()[0]), state, params)
    grads = sparse(batches()[0])
    grads["kernel"] = se.RowSparse(jnp.array([1]), jnp.ones((1, 6)), (4, 6))
    with pytest.raises(ValueError, match="in scale_by_muon needs all rows at once") as raised:
        tx.update(grads, state, params)
    assert "optax.partition({'tables': optax.adam(1e-3), 'rest': inner}, labels)" in parts(raised)
