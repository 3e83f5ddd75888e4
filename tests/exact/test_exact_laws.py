"""Every exact optimizer against dense optax, over 1000 Zipf steps: parameters, state, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_subjects import (
    FLOAT32,
    FLOAT64,
    REPLAYED,
    SUBJECTS,
    Subject,
    distance,
    new_params,
    rate,
    run,
)

import sparse_embed as se


def assert_law(exact_tx, dense_tx, subject, dtype, bound, *, steps=1000):
    got = run(exact_tx, subject, dtype, steps=steps)
    want = run(dense_tx, subject, dtype, steps=steps)
    start = new_params(dtype, subject.mixed)
    for after, before in zip(got.params, want.params, strict=True):
        for name in start:
            apart = distance(after[name], before[name], start[name])
            assert apart <= bound, f"{name}: {apart:.1e} of the way apart"
    for after, before in zip(got.states, want.states, strict=True):
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=0, atol=50 * bound * (np.abs(y).max() + 1e-9))
    np.testing.assert_allclose(got.losses, want.losses, rtol=10 * bound, atol=bound)


@pytest.mark.parametrize("name", FLOAT32)
def test_float32(name):
    subject = SUBJECTS[name]
    schedule = rate(subject.peak)
    assert_law(subject.exact(schedule), subject.dense(schedule), subject, jnp.float32, 1e-5)


@pytest.mark.parametrize("name", FLOAT64)
def test_float64(name):
    subject = SUBJECTS[name]
    schedule = rate(subject.peak)
    with jax.enable_x64(True):
        txs = subject.exact(schedule), subject.dense(schedule)
        assert_law(*txs, subject, jnp.float64, subject.float64)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", REPLAYED)
def test_replay(name, wide):
    dense = REPLAYED[name](rate(0.005))
    subject = Subject(None, None, mixed=name in ("partition", "clip, adamw"))
    # Rounding of the norm by which novograd divides everything moves all rows.
    bound = 1e-12 if wide else 3e-5 if name == "novograd" else 1e-5
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        assert_law(se.exact.replay(dense), dense, subject, dtype, bound, steps=200)


def test_the_law_tells_lazy_from_exact():
    """The helper fails where it should: lazy Adam is far away, and so is another decay."""
    subject, schedule = SUBJECTS["adam"], rate(0.02)
    other = se.exact.adam(schedule, b2=0.998)
    with pytest.raises(AssertionError, match="of the way apart"):
        assert_law(other, subject.dense(schedule), subject, jnp.float32, 1e-5)
    lazy = run(se.lazy(optax.adam(schedule)), subject, jnp.float32)
    want = run(optax.adam(schedule), subject, jnp.float32)
    start = new_params(jnp.float32)
    assert distance(lazy.params[-1]["a"], want.params[-1]["a"], start["a"]) > 0.1
