"""Steps that go through the rows of a table in blocks: the pieces, the whole, the compiled form.

That every optimizer steps in blocks as it does at once is a law of `test_conformance.py`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations, small_blocks, temp_bytes

import sparse_embed as se
from sparse_embed._container import indices as row_numbers
from sparse_embed._container.indices import first_seen, first_seen_of_each
from sparse_embed._container.listed import Listed, Part
from sparse_embed._lazy import lift
from sparse_embed._update.sweep import Sweep

# --- distinct ids ---------------------------------------------------------------------------------

LISTS = {
    "repeats": (lambda draw: draw.integers(0, 30, 100), 1000),
    "no repeats": (lambda draw: draw.permutation(100), 100),
    "one id": (lambda draw: np.full(17, 3), 8),
    "one entry": (lambda draw: np.array([4]), 5),
    "all outside": (lambda draw: np.full(9, 50), 50),
    "some outside": (lambda draw: draw.integers(0, 9, 40), 7),
    "a tall table": (lambda draw: draw.integers(0, 2**31 - 200, 90), 2**31 - 200),
    "neighbours": (lambda draw: 10**6 + np.arange(64) // 2, 10**7),
    "steps of a power of two": (lambda draw: 2**16 * draw.integers(0, 99, 64), 10**7),
}


@pytest.mark.parametrize("room", [8, 1], ids=["roomy", "crowded"])
@pytest.mark.parametrize("name", LISTS)
def test_first_seen(name, room, monkeypatch):
    monkeypatch.setattr(row_numbers, "_ROOM", room)
    make, height = LISTS[name]
    ids = np.minimum(make(np.random.default_rng(0)), height).astype(np.int32)
    slots = jax.jit(first_seen, static_argnums=(1, 2))(jnp.asarray(ids), height, ids.size)
    assert_told_apart(slots, ids, height)


def assert_told_apart(slots, ids, height):
    """Each distinct id inside the table has a slot; padding is distinct and outside."""
    slot, indices, inside = np.asarray(slots.slot), np.asarray(slots.indices), ids < height
    count = len(np.unique(ids[inside]))
    assert int(slots.number) == count and slot.shape == indices.shape == ids.shape
    assert sorted(indices[:count]) == sorted(np.unique(ids[inside]))
    assert (indices[slot[inside]] == ids[inside]).all()
    assert (slot[~inside] == ids.size).all()
    padding = indices[count:].astype(np.int64) % 2**32  # beyond 2**31 it wraps to negative ids
    assert (padding >= height).all() and len(np.unique(padding)) == len(padding)


@pytest.mark.parametrize("room", [8, 1], ids=["roomy", "crowded"])
@pytest.mark.parametrize("heights", [(40, 40, 40), (7, 10**6, 50), (10**9, 1, 10**9)], ids=str)
def test_ids_of_several_tables_are_told_apart_together(heights, room, monkeypatch):
    monkeypatch.setattr(row_numbers, "_ROOM", room)
    draw = np.random.default_rng(2)
    ids = np.stack([np.minimum(draw.integers(0, 60, 50), h) for h in heights]).astype(np.int32)
    each = jax.jit(first_seen_of_each, static_argnums=1)(jnp.asarray(ids), heights)
    for slots, own, height in zip(each, ids, heights, strict=True):
        assert_told_apart(slots, own, height)


# --- blocks of rows -------------------------------------------------------------------------------


def listed(height: int = 40) -> tuple[Listed, np.ndarray]:
    """A gradient of ids with rows of their own and of bags that share one, and it dense."""
    draw = np.random.default_rng(1)
    single, bags = draw.integers(-1, height + 2, 30), draw.integers(0, height, (3, 5))
    rows, shared = draw.normal(size=(30, 2)), draw.normal(size=(5, 2))
    dense = np.zeros((height, 2))
    inside = (single >= 0) & (single < height)
    np.add.at(dense, single[inside], rows[inside])
    for place in bags:
        np.add.at(dense, place, shared)
    parts = [(single[None], rows), (bags, shared)]
    parts = [Part(jnp.asarray(i, jnp.int32), jnp.asarray(r, jnp.float32)) for i, r in parts]
    return Listed(parts, (height, 2), jnp.float32), dense


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("rows, window", [(1, 1), (4, 1), (7, 8_000), (100, 1)])
def test_sweep_meets_every_row_once(rows, window, coalesced):
    grad, dense = listed()

    @jax.jit
    def swept():
        sweep = Sweep(grad.coalesced() if coalesced else grad)

        def body(block, carry):
            (indices, rows, position), (total, times) = block, carry
            times = times.at[indices].add(1, mode="drop")
            real = indices < grad.num_rows
            assert position.shape == indices.shape
            return total.at[indices].add(jnp.where(real[:, None], rows, 0), mode="drop"), times

        return sweep.each(body, (jnp.zeros(grad.shape), jnp.zeros(grad.num_rows, int)))

    with small_blocks(rows):
        se.tuning.window_bytes = window
        total, times = swept()
    np.testing.assert_allclose(total, dense, rtol=1e-6, atol=1e-6)
    ids = np.asarray(grad.indices)
    assert (np.asarray(times) == np.isin(np.arange(grad.num_rows), ids)).all()
    np.testing.assert_allclose(grad.coalesced().todense(), dense, rtol=1e-6, atol=1e-6)


def test_sums_are_made_in_float32():
    """300 repeats of one row: in bfloat16 the sum would stick at 256."""
    part = Part(jnp.zeros((1, 300), jnp.int32), jnp.ones((300, 1), jnp.bfloat16))
    grad = Listed([part], (4, 1), jnp.bfloat16)
    assert grad.coalesced().rows[0, 0] == 300


# --- whole updates --------------------------------------------------------------------------------


def by_largest(pick) -> optax.GradientTransformation:
    """Divides by a reduction over all entries of all leaves, other than a sum."""

    def update(grads, state, params=None):
        values = [pick(g) for g in jax.tree.leaves(grads)]
        total = functools.reduce(jnp.maximum, values)
        return jax.tree.map(lambda g: g / (1 + total), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


CHAINS = {
    "two norms, one of the other's result": optax.chain(
        optax.clip_by_global_norm(0.5), optax.normalize_by_update_norm(), optax.adam(0.1)
    ),
    "largest": optax.chain(by_largest(lambda g: jnp.max(jnp.abs(g))), optax.sgd(0.1)),
    "smallest": optax.chain(by_largest(lambda g: -jnp.min(-jnp.abs(g))), optax.sgd(0.1)),
    "smallest, with signs": optax.chain(by_largest(lambda g: 9 - jnp.min(g)), optax.sgd(0.1)),
    "any": optax.chain(by_largest(lambda g: 1.0 * jnp.any(g > 0)), optax.sgd(0.1)),
    "counts of integers": optax.chain(by_largest(lambda g: jnp.sum(g > 0)), optax.sgd(0.1)),
    "row-wise": se.rowwise_adagrad(0.1),
    "one table": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"t": "a", "u": "b", "w": "a"}
    ),
}


def trees(every: bool) -> tuple[dict, dict]:
    """Params with two tables, and their gradients as `Listed`; `every`: all rows are listed."""
    grad, _ = listed()
    ids = jnp.asarray([[3, 1, 0, 2, 1]] if every else [[3, 1, 3, 9, 1]])
    rows = -jnp.arange(1.0, 6.0)[:, None]  # all negative, so that 0 is not the largest
    small = Listed([Part(ids, rows)], (4, 1), jnp.float32)
    params = {"t": jnp.ones((40, 2)), "u": jnp.ones((4, 1)), "w": jnp.ones(3)}
    return params, {"t": grad, "u": small, "w": jnp.arange(3.0)}


@pytest.mark.parametrize("every", [False, True], ids=["some rows", "every row"])
@pytest.mark.parametrize(
    "name, clock", [*((name, "global") for name in CHAINS), ("one table", "row")]
)
def test_apply_in_blocks(name, every, clock):
    """`apply` of raw lists, and of `RowSparse`, is `update` and `apply_updates`."""
    tx = se.lazy(CHAINS[name], clock=clock)
    params, grads = trees(every)
    coalesced = {k: g.coalesced() if isinstance(g, Listed) else g for k, g in grads.items()}

    @jax.jit
    def at_once(params, state):
        updates, state = tx.update(coalesced, state, params)
        return optax.apply_updates(params, updates), state

    start = params, tx.init(params)
    want = at_once(*at_once(*start))
    for given in (grads, coalesced):
        with small_blocks(3):
            got = start
            step = jax.jit(lambda params, state, given=given: tx.apply(given, state, params))
            for _ in range(2):
                got = step(*got)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pick, idle", [(jnp.min, 1.0), (jnp.max, -1.0)])
def test_untouched_rows_count_in_a_reduction(pick, idle):
    """Repeats leave room in a list as long as the table: untouched rows are there still."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: g * (2 + pick(g)), grads), state

    tx = se.lazy(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    table, ids = jnp.ones((6, 1)), jnp.array([0, 0, 0, 1, 1, 2])
    grads = se.RowSparse(ids, idle * jnp.ones((6, 1)), (6, 1))
    want = [6.0, 4.0, 2.0, 0.0, 0.0, 0.0]
    for rows in (2048, 2):
        with small_blocks(rows):
            new, _ = jax.jit(lambda g: tx.apply(g, tx.init(table), table))(grads)
        np.testing.assert_allclose(idle * (new - table)[:, 0], want)


def test_reduction_in_a_branch_is_done_at_once(monkeypatch):
    """A sum that may not happen cannot be had in advance: such an update is not cut into blocks."""

    def update(grads, state, params=None):
        norm = jax.lax.cond(state > 0, lambda: optax.tree.norm(grads), lambda: jnp.ones(()))
        return jax.tree.map(lambda g: g / norm, grads), state + 1

    tx = se.lazy(optax.GradientTransformation(lambda params: jnp.zeros(()), update))
    params, grads = trees(False)
    monkeypatch.setattr(lift, "run_in_blocks", None)
    with small_blocks(3):
        new, state = jax.jit(lambda p, s: tx.apply(grads, s, p))(params, tx.init(params))
    np.testing.assert_allclose(new["t"] - 1, listed()[1], rtol=1e-5, atol=1e-6)


def test_refusals_are_those_of_update():
    tx = se.lazy(optax.scale_by_trust_ratio())
    params, grads = trees(False)
    with small_blocks(3), pytest.raises(ValueError, match="cannot update a table by its touched"):
        jax.jit(lambda: tx.apply(grads, tx.init({"w": params["w"]}), params))()
    with pytest.raises(ValueError, match="different trees"):
        se.lazy(optax.sgd(1.0)).apply(
            {"t": grads["t"]}, se.lazy(optax.sgd(1.0)).init(params), params
        )


# --- whole steps ----------------------------------------------------------------------------------

HEIGHT, BATCH = 50_000, (600, 10)


def pooled(params, ids):
    return jnp.sum(jnp.tanh(params["table"][ids].sum(1) @ params["w"]))


def model(height: int = HEIGHT) -> dict:
    draw = np.random.default_rng(2)
    return {
        "table": jnp.asarray(0.1 * draw.normal(size=(height, 8)), jnp.float32),
        "w": jnp.asarray(draw.normal(size=8), jnp.float32),
    }


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))]
)
def test_step_in_blocks(tx):
    """More ids than a block has rows: as dense optax, in place, without room for a row each."""
    step, dense = se.train_step(pooled, se.lazy(tx)), jax.jit(tx.update)
    params, ids = model(), jnp.asarray(np.random.default_rng(3).integers(0, HEIGHT, BATCH))
    assert ids.size > se.tuning.block_rows
    state = se.lazy(tx).init(params)
    with jax.transfer_guard("disallow"):
        compiled = step.lower(params, state, ids).compile()
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= held
    rows = ids.size * 8 * 4  # bytes of one row for each id
    assert memory.temp_size_in_bytes < 3 * rows, "room for more than summed gradients"

    loss, grads = jax.value_and_grad(pooled)(params, ids)
    updates, _ = dense(grads, tx.init(params), params)
    want = optax.apply_updates(params, updates)
    touched = np.isin(np.arange(HEIGHT), np.asarray(ids))[:, None]
    want["table"] = np.where(touched, want["table"], params["table"])
    params, state, value = step(params, state, ids)
    copies = jax.tree.map(jnp.copy, (params, state))
    others = (ids * 7) % HEIGHT
    with count_compilations() as names:
        step(*copies, others)
    assert names == []
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    for name, leaf in want.items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-5, atol=1e-6)


def test_table_of_which_nothing_is_listed():
    """Rows read under `stop_gradient` only: its gradient lists nothing, another is in blocks."""
    params = {"a": jnp.ones((5000, 3)), "b": jnp.ones((9, 2))}
    ids = jnp.arange(3000)

    def loss(p, ids):
        return (p["a"][ids] ** 2).sum() + jax.lax.stop_gradient(p["b"][ids % 9]).sum()

    tx = se.lazy(optax.sgd(0.1))
    new, _, _ = se.train_step(loss, tx)(jax.tree.map(jnp.copy, params), tx.init(params), ids)
    np.testing.assert_allclose(new["a"][:, 0], np.where(np.arange(5000) < 3000, 0.8, 1.0))
    np.testing.assert_array_equal(new["b"], params["b"])


def cubes(t, ids):
    return (t[ids] ** 3).sum()


DIFFERENTIABLE = {
    "a step within a loss": lambda t, ids: cubes(t + se.grad(cubes)(t, ids) * -0.1, ids),
    "a penalty on the gradient": lambda t, ids: (se.grad(cubes)(t, ids).todense() ** 2).sum(),
    "an optimizer within a loss": lambda t, ids: cubes(
        se.lazy(optax.sgd(0.1)).apply(se.grad(cubes)(t, ids), se.lazy(optax.sgd(0.1)).init(t), t)[
            0
        ],
        ids,
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_through_a_step(name):
    """No loop of unknown length where a derivative has to come back."""
    f = DIFFERENTIABLE[name]
    table, ids = jnp.linspace(0.0, 1.0, 5000)[:, None], jnp.arange(3000) // 2
    got = jax.jit(jax.grad(f))(table, ids)
    with small_blocks(10**6):
        want = jax.jit(jax.grad(lambda t, ids: f(t, ids)))(table, ids)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_vmap_of_a_step_copies_no_table():
    tx = se.lazy(optax.adam(0.1))

    def step(params, state, ids):
        grads = se.grad(cubes)(params, ids)
        return tx.apply(grads, state, params)

    tables, ids = jnp.ones((2, HEIGHT, 8)), jnp.zeros((2, 3000), jnp.int32)
    state = jax.vmap(tx.init)(tables)
    assert temp_bytes(jax.vmap(step), tables, state, ids, donate=(0, 1)) < tables.nbytes / 2


def test_loss_with_a_shard_map_steps_twice():
    """From the second step on the arrays carry the mesh."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(params, ids):
        def local(t, ids):
            return jax.lax.psum((t[ids] ** 2).sum() + (t * t)[ids].sum(1).sum(), "d")

        specs = {"in_specs": (spec(), spec("d")), "out_specs": spec()}
        return jax.shard_map(local, mesh=mesh, **specs)(params["t"], ids)

    params, ids = {"t": jnp.ones((40, 2))}, jnp.array([[3, 4], [3, 5]])
    dense = jax.tree.map(jnp.copy, params)
    tx = se.lazy(optax.sgd(0.1))
    state, step = tx.init(params), se.train_step(loss, tx)
    for _ in range(3):
        params, state, _ = step(params, state, ids)
        grads = jax.grad(loss)(dense, ids)
        dense = jax.tree.map(lambda x, g: x - 0.1 * g, dense, grads)
    np.testing.assert_allclose(params["t"], dense["t"], rtol=1e-5)


# --- bags tapped at their sums --------------------------------------------------------------------

IDS = jnp.arange(6 * 200).reshape(200, 6) * 7 % 900
BAGS = {
    "table[ids].sum(1)": lambda t: t[IDS].sum(1),
    "the bags along axis 0": lambda t: t[IDS.T].sum(0),
    "mean": lambda t: t[IDS].mean(-2),
    "jnp.take": lambda t: jnp.take(t, IDS, axis=0).sum(1),
    "se.lookup": lambda t: se.lookup(t, IDS).sum(1),
    "se.lookup, clip": lambda t: se.lookup(t, IDS, mode="clip").sum(1),
    "se.lookup_bag": lambda t: se.lookup_bag(t, IDS),
    "padding_idx": lambda t: se.lookup_bag(t, IDS, padding_idx=7, combiner="mean"),
    "sqrtn": lambda t: se.lookup_bag(t, IDS, combiner="sqrtn"),
    "ids outside": lambda t: jnp.nan_to_num(se.lookup_bag(t, IDS - 3)),
    "a function of its own": lambda t: jax.jit(lambda t: t[IDS])(t).sum(1),
    "vmap": lambda t: jax.vmap(lambda ids: t[ids].sum(0))(IDS),
    "checkpoint": lambda t: jax.checkpoint(lambda t: jnp.sin(t[IDS].sum(1)))(t),
    "scan": lambda t: jax.lax.scan(lambda c, ids: (c, t[ids].sum(1)), 0, IDS[None])[1],
}
LAID_OUT = {
    "rows used twice": lambda t: (lambda rows: rows.sum(1) + rows[:, 0])(t[IDS]),
    "largest": lambda t: t[IDS].max(1),
    "weights": lambda t: se.lookup_bag(t, IDS, weights=jnp.ones(IDS.shape)),
    "a scaled table": lambda t: (2 * t)[IDS].sum(1),
}


@pytest.mark.parametrize("name", [*BAGS, *LAID_OUT])
def test_bags(name):
    """The gradient is that of dense JAX; where rows are summed at once, none are laid out."""
    f = {**BAGS, **LAID_OUT}[name]
    table = jnp.asarray(np.random.default_rng(4).normal(size=(900, 64)), jnp.float32)

    def loss(t):
        return jnp.sum(jnp.sin(f(t)))

    got, want = jax.jit(se.value_and_grad(loss))(table), jax.jit(jax.value_and_grad(loss))(table)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1].todense(), want[1], rtol=1e-5, atol=1e-6)
    assert got[1].indices.size == 900 and (np.diff(np.asarray(got[1].indices)) > 0).all()
    text = jax.jit(se.value_and_grad(loss)).lower(table).compile().as_text()
    laid_out = re.findall(r"f32\[(?:200,6|6,200|1200|1,200,6)(?:,1)?,64\]", text)
    assert bool(laid_out) == (name in LAID_OUT)
