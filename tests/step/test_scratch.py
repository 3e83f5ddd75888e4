"""Memory that a `train_step` keeps for its next call: same results, no allocation, nothing lost."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import count_compilations, tuned
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparse_embed as se

NEVER = float("inf")
V, D, B, F = 500, 4, 32, 3


def made(step):
    """The compiled step, of which there is one."""
    (only,) = step._made.values()
    return only


def setup(seed: int = 0):
    draw = np.random.default_rng(seed)
    params = {
        "table": jnp.asarray(draw.normal(size=(V, D)), jnp.float32),
        "other": jnp.asarray(draw.normal(size=(9, D)), jnp.float32),
        "w": jnp.asarray(draw.normal(size=(F * D, 5)), jnp.float32),
    }
    batches = [jnp.asarray(draw.integers(0, 9, (B, F)), jnp.int32) for _ in range(3)]
    return params, batches


def kept_by(step) -> list[jax.Array]:
    ((_, kept),) = made(step)._kept
    return list(kept)


def head(rows: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(rows.reshape(-1, F * D) @ w))


def in_scan(params, ids):
    def body(carry, row):
        return carry + jnp.tanh(params["table"][row]).sum(), None

    return jax.lax.scan(body, jnp.zeros(()), ids)[0] * params["w"].sum()


def cast(params, ids):
    return head(params["table"].astype(jnp.bfloat16)[ids].astype(jnp.float32), params["w"])


def outside(params, ids):
    rows = jnp.take(params["table"], ids - 1, axis=0, fill_value=0.5)
    return head(rows, params["w"])


def flax_model(params, ids):
    rows = nn.Embed(V, D).apply({"params": {"embedding": params["table"]}}, ids)
    return head(rows, params["w"])


LOSSES = {
    "rows": lambda p, ids: head(p["table"][ids], p["w"]),
    "one gradient for two": lambda p, ids: head(p["table"][ids] + p["other"][ids], p["w"]),
    "read twice": lambda p, ids: head(p["table"][ids] * p["table"][ids[::-1]], p["w"]),
    "bags": lambda p, ids: jnp.mean(jnp.tanh(p["table"][ids].sum(1))) * p["w"].sum(),
    "bags and rows": lambda p, ids: (
        head(p["table"][ids], p["w"]) + jnp.sum(jnp.tanh(p["table"][ids].sum(1)))
    ),
    "cast": cast,
    "flax": flax_model,
    "outside": outside,
    "scan": in_scan,
    "checkpoint": jax.checkpoint(lambda p, ids: head(p["table"][ids], p["w"])),
    "jit": jax.jit(lambda p, ids: head(p["table"][ids], p["w"])),
    "cond": lambda p, ids: jax.lax.cond(
        ids[0, 0] > 3, lambda: head(p["table"][ids], p["w"]), lambda: head(p["other"][ids], p["w"])
    ),
    "vmap": lambda p, ids: jnp.mean(jax.vmap(lambda i: jnp.tanh(p["table"][i] @ p["w"][:D]))(ids)),
}
OPTIMIZERS = {
    "lazy": lambda: se.lazy(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1))),
    "exact": lambda: se.exact.adam(0.1),
}


def trained(loss_fn, tx, kept_bytes: float, steps: int = 4, **options):
    params, batches = setup()
    with tuned(kept_bytes=kept_bytes):
        step, opt_state, values = se.train_step(loss_fn, tx, **options), tx.init(params), []
        for number in range(steps):
            params, opt_state, value = step(params, opt_state, batches[number % 3])
            values.append(value)
    return step, (params, opt_state, values)


@pytest.mark.parametrize(
    "name, optimizer", [*((name, "lazy") for name in LOSSES), ("rows", "exact"), ("scan", "exact")]
)
def test_nothing_but_memory_is_kept(name, optimizer):
    tx = OPTIMIZERS[optimizer]()
    _, want = trained(LOSSES[name], tx, NEVER)
    step, got = trained(LOSSES[name], tx, 0)
    assert kept_by(step)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_has_aux_of_the_shape_of_what_is_kept():
    """jax pairs donated arrays with results by shape: aux must not be given the kept memory."""

    def loss_fn(params, ids):
        rows = params["table"][ids.reshape(-1)]
        return head(rows, params["w"]), rows

    tx = se.lazy(optax.sgd(0.1))
    _, want = trained(loss_fn, tx, NEVER, has_aux=True)
    _, got = trained(loss_fn, tx, 0, has_aux=True)  # aux of all steps is alive until the end
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rows_and_gradients_are_laid_out_in_kept_memory():
    rows, ids = 4096, jnp.zeros((8192, F), jnp.int32)
    params = {"table": jnp.ones((rows, 64)), "w": jnp.ones((F * 64, 5))}
    tx = se.lazy(optax.adam(0.1))
    size = 4 * ids.size * 64

    def loss_fn(params, ids):
        return jnp.mean(jnp.tanh(params["table"][ids].reshape(-1, F * 64) @ params["w"]))

    with tuned(kept_bytes=size, window_bytes=1):  # sums of repeats take little memory
        step = se.train_step(loss_fn, tx)
        state = step(params, tx.init(params), ids)[:2]
        kept = kept_by(step)
        assert [x.nbytes for x in kept] == [size, size]  # the rows and their gradients
        memory = made(step)._keeping.lower(*state, kept, ids).compile().memory_analysis()
        plain = step.lower(*state, ids).compile().memory_analysis()
        where = [x.unsafe_buffer_pointer() for x in kept]
        with count_compilations() as compiled:
            step(*state, ids)
        assert compiled == []
        assert [x.unsafe_buffer_pointer() for x in kept_by(step)] == where
    assert memory.alias_size_in_bytes >= plain.alias_size_in_bytes + 2 * size
    assert memory.temp_size_in_bytes <= plain.temp_size_in_bytes - 0.9 * size


def test_rows_that_nothing_depends_on_copy_no_table():
    """They are results of the step, and read before the table is written."""
    params = {"table": jnp.ones((50_000, 64)), "w": jnp.ones((F * 64, 5))}
    tx, ids = se.lazy(optax.adam(0.1)), jnp.zeros((200, F), jnp.int32)

    def loss_fn(params, ids):
        params["table"][ids + 1]
        return jnp.mean(jnp.tanh(params["table"][ids].reshape(-1, F * 64) @ params["w"]))

    with tuned(kept_bytes=4 * ids.size * 64):
        step = se.train_step(loss_fn, tx)
        state = step(params, tx.init(params), ids)[:2]
        kept = kept_by(step)
        assert len(kept) == 3
        compiled = made(step)._keeping.lower(*state, kept, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 50_000 * 64 * 4 / 2


def test_small_arrays_are_not_kept():
    step, _ = trained(LOSSES["rows"], se.lazy(optax.sgd(0.1)), se.tuning.kept_bytes)
    assert not made(step)._kept


def test_another_shape_takes_the_place_of_the_last():
    params, batches = setup()
    tx = se.lazy(optax.adam(0.1))
    with tuned(kept_bytes=0):
        step = se.train_step(LOSSES["rows"], tx)
        state = step(params, tx.init(params), batches[0])[:2]
        long = kept_by(step)
        state = step(*state, batches[1][:5])[:2]
        short = kept_by(step)
        assert [x.shape[0] for x in long + short] == [B * F, B * F, 5 * F, 5 * F]
        with count_compilations() as compiled:
            state = step(*state, batches[2])[:2]
            step(*state, np.asarray(batches[0])[:5])
    assert not [name for name in compiled if "keeping" in name or "plain" in name]


def test_a_step_that_raises_loses_nothing():
    params, batches = setup()
    tx = se.lazy(optax.sgd(0.1))
    with tuned(kept_bytes=0):
        step = se.train_step(LOSSES["rows"], tx)
        state = step(params, tx.init(params), batches[0])[:2]
        with pytest.raises(TypeError):
            step(*state, batches[0].astype(jnp.float32))
        step(*state, batches[1])


def test_sharded_batches_keep_nothing():
    params, batches = setup()
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    tx = se.lazy(optax.sgd(0.1))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = jax.device_put(batches[0], NamedSharding(mesh, PartitionSpec("d")))
    with tuned(kept_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("error")  # "donated buffers were not usable"
        step = se.train_step(LOSSES["rows"], tx)
        state = jax.device_put((params, tx.init(params)), everywhere)
        state = step(*state, split)[:2]
        step(*state, split)
    assert not made(step)._kept


def test_inside_another_jit():
    params, batches = setup()
    tx = se.lazy(optax.sgd(0.1))
    with tuned(kept_bytes=0):
        step = se.train_step(LOSSES["rows"], tx)
        got = jax.jit(step)(params, tx.init(params), batches[0])
        want = step(params, tx.init(params), batches[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "trace",
    [
        lambda f: jax.eval_shape(f),
        lambda f: jax.jit(f)(),
        lambda f: jax.lax.scan(lambda c, _: (c, f()), 0, None, 2),
    ],
    ids=["eval_shape", "jit", "scan"],
)
def test_arguments_from_outside_of_what_is_traced(trace):
    params, batches = setup()
    tx = se.lazy(optax.sgd(0.1))
    with tuned(kept_bytes=0):
        step = se.train_step(LOSSES["rows"], tx)
        state = tx.init(params)
        trace(lambda: step(params, state, batches[0])[2])
        step(params, state, batches[0])


def test_steps_on_several_devices():
    """Each is compiled once, and its results lie where its arguments do."""
    first, second = jax.devices()[:2]
    params, batches = setup()
    tx = se.lazy(optax.sgd(0.1))

    def state(device):
        copied = jax.tree.map(jnp.copy, (params, tx.init(params)))
        return copied if device is None else jax.device_put(copied, device)

    with tuned(kept_bytes=0):
        for device in (first, second, None, first):
            step = se.train_step(LOSSES["rows"], tx)
            step(*state(second), jax.device_put(batches[0], second))
            ids = batches[1] if device is None else jax.device_put(batches[1], device)
            given = state(device)
            with count_compilations() as compiled:
                for _ in range(3):
                    *given, loss = step(*given, ids)
            assert compiled.count("jit(keeping)") <= 1
            where = second if device is second else first
            assert {d for x in jax.tree.leaves(given) for d in x.devices()} == {where}


def test_weak_types_are_told_apart():
    params, batches = setup()
    tx = se.lazy(optax.sgd(0.1))

    def loss_fn(p, ids, scale):
        rows = (p["table"].astype(jnp.bfloat16) * scale)[ids]
        return head(rows.astype(jnp.float32), p["w"])

    with tuned(kept_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("error")  # "donated buffers were not usable"
        step, state = se.train_step(loss_fn, tx), (params, tx.init(params))
        scales = jnp.asarray(2.0), jnp.float32(2), jnp.asarray(2.0)
        with count_compilations() as compiled:
            for scale in scales:
                *state, _ = step(*state, batches[0], scale)
    assert len([name for name in compiled if "keeping" in name]) == 2
