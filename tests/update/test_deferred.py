"""Updates that are computed when they are asked for: whatever is done with them, and in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import numbers, small_blocks, temp_bytes

import sparse_embed as se
from sparse_embed._update import in_blocks

V, D, N = 40, 3, 24
CHAINS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
    "row-wise": se.rowwise_adagrad(0.1),
    "average": optax.chain(optax.sgd(0.1), se.params_ema(0.9)),  # only the state reads the table
    "lion": optax.lion(0.1),  # needs the old moments: listed at once
    "narrow moments": optax.adam(0.1, mu_dtype=jnp.bfloat16),  # the update is made of wider ones
}


LISTED = ("average", "lion", "narrow moments")


def start():
    draw = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(draw.normal(size=(V, D)), jnp.float32),
        "w": jnp.asarray(draw.normal(size=D), jnp.float32),
    }
    return params, jnp.asarray(draw.integers(0, V, N), jnp.int32)


def loss_fn(params, ids):
    return jnp.sum(jnp.tanh(params["table"][ids] @ params["w"]))


def applied(params, updates):
    return optax.apply_updates(params, updates)


def asked_before(params, updates):
    norm = se.global_norm(updates)
    return optax.apply_updates(params, updates), norm


def asked_after(params, updates):
    new = optax.apply_updates(params, updates)
    return new, se.global_norm(updates), updates["table"].indices, updates["table"].rows


def applied_twice(params, updates):
    other = jax.tree.map(lambda x: x + 1.0, params)
    return optax.apply_updates(params, updates), optax.apply_updates(other, updates)


def in_a_branch(params, updates):
    """What is found in a branch stays there."""
    bad = jnp.isnan(params["w"][0])
    new = jax.lax.cond(bad, lambda: params, lambda: optax.apply_updates(params, updates))
    return new, se.global_norm(updates)


def in_another_jit(params, updates):
    return jax.jit(optax.apply_updates)(params, updates)


def scaled(params, updates):
    half = {"table": updates["table"] * 0.5, "w": updates["w"] * 0.5}
    return optax.apply_updates(params, half)


def joined(params, updates):
    both = {"table": updates["table"] + updates["table"], "w": 2 * updates["w"]}
    return optax.apply_updates(params, both)


def transformed(params, updates):
    tx = se.lazy(optax.trace(0.5))
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


def to_another_dtype(params, updates):
    return params["table"].astype(jnp.bfloat16) + updates["table"]


def dense(params, updates):
    return updates["table"].todense(), updates["w"]


USES = [
    applied,
    asked_before,
    asked_after,
    applied_twice,
    in_a_branch,
    in_another_jit,
    scaled,
    joined,
    transformed,
    to_another_dtype,
    dense,
    lambda params, updates: updates,
]


@pytest.mark.parametrize(
    "name, clock, use",
    [
        *(("adamw", "global", use) for use in USES),
        *((name, "global", asked_after) for name in CHAINS if name != "adamw"),
        ("adamw", "row", asked_after),
    ],
)
def test_whatever_is_done_with_updates(name, clock, use):
    tx = se.lazy(CHAINS[name], clock=clock)
    params, ids = start()

    def step(params, state, ids):
        grads = se.grad(loss_fn)(params, ids)
        updates, state = tx.update(grads, state, params)
        return use(params, updates), state

    state = tx.init(params)
    want = jax.jit(step)(params, state, ids)
    with small_blocks(5):
        got = jax.jit(lambda *args: step(*args))(params, state, ids)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        rtol = 1e-2 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(numbers(a), numbers(b), rtol, atol=1e-6)


def test_steps_in_a_scan():
    params, ids = start()
    tx = se.lazy(CHAINS["adamw"])

    def steps(params, ids):
        def body(carry, ids):
            params, state = carry
            updates, state = tx.update(se.grad(loss_fn)(params, ids), state, params)
            return (optax.apply_updates(params, updates), state), updates["table"].indices

        return jax.lax.scan(body, (params, tx.init(params)), ids)

    want = jax.jit(steps)(params, jnp.stack([ids, ids + 1]))
    with small_blocks(5):
        got = jax.jit(lambda *args: steps(*args))(params, jnp.stack([ids, ids + 1]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_tracer_is_kept():
    tx = se.lazy(CHAINS["adamw"])
    params, ids = start()

    def step(params, state, ids):
        updates, state = tx.update(se.grad(loss_fn)(params, ids), state, params)
        table = jax.lax.fori_loop(0, 3, lambda _, t: t + updates["table"], params["table"])
        return in_a_branch(params, updates), table

    state = tx.init(params)
    with small_blocks(5), jax.checking_leaks():
        jax.jit(step)(params, state, ids)


HEIGHT, IDS = 500_000, 8_000


# Without narrow moments: jax 0.10.2 converts all of them whenever it writes a few.
IN_PLACE = [(name, applied) for name in CHAINS if name != "narrow moments"]


@pytest.mark.parametrize("name, use", [*IN_PLACE, ("adamw", asked_before), ("adamw", asked_after)])
def test_in_place(name, use):
    """No table is copied; and where nobody asks for a list of the updates, none is made."""
    tx = se.lazy(CHAINS[name])
    params = {"table": jax.ShapeDtypeStruct((HEIGHT, 64), jnp.float32), "w": jnp.ones(64)}
    state, ids = jax.eval_shape(tx.init, params), jnp.arange(IDS) * 7 % 6000

    def step(params, state, ids):
        grads = se.grad(lambda p, ids: jnp.sum(jnp.tanh(p["table"][ids].sum(1))))(params, ids)
        updates, state = tx.update(grads, state, params)
        return use(params, updates), state

    bags = ids.reshape(-1, 8)
    temp = temp_bytes(step, params, state, bags, donate=(0, 1))
    assert temp < HEIGHT * 64 * 4 / 2
    listed = ids.size * 64 * 4
    # Besides such a list there is room for sums of repeats, an eighth of it or a few MB.
    sums = min(listed, se.tuning.window_bytes)
    waits = use is applied and name not in LISTED
    assert (temp < sums + 0.9 * listed) == waits


def test_which_updates_can_wait(monkeypatch):
    """Those that follow from the new state."""
    found = {}
    can_wait = in_blocks.can_wait
    params, ids = start()
    for name, chain in CHAINS.items():
        tx = se.lazy(chain)

        def noted(*args, name=name):
            found[name] = can_wait(*args)
            return found[name]

        monkeypatch.setattr(in_blocks, "can_wait", noted)
        with small_blocks(5):
            jax.eval_shape(
                lambda p, s, tx=tx: tx.update(se.grad(loss_fn)(p, ids), s, p),
                params,
                jax.eval_shape(tx.init, params),
            )
    assert found == {name: name not in LISTED for name in CHAINS}
