"""Bad input of every public argument: an error in three parts, before anything changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_embed as se

TABLE = jnp.ones((6, 2))
IDS = jnp.array([1, 3, 1])
GRAD = se.RowSparse(IDS, jnp.ones((3, 2)), (6, 2))
TX = se.lazy(optax.sgd(0.1))


def loss(params, ids=IDS):
    return jnp.sum(params["t"][ids])


def tune(**numbers):
    """Sets numbers of `se.tuning`; a good one among them would stay."""
    for name, value in numbers.items():
        setattr(se.tuning, name, value)


def bags(**options):
    return se.lookup_bag(TABLE, IDS, **options)


T, V = TypeError, ValueError
BAD = {
    # containers
    "indices of floats": (T, lambda: se.RowSparse(jnp.ones(3), jnp.ones((3, 2)), (6, 2))),
    "rows of another length": (V, lambda: se.RowSparse(IDS, jnp.ones((2, 2)), (6, 2))),
    "coalesce(array)": (T, lambda: se.coalesce(TABLE)),
    "size=0": (V, lambda: se.coalesce(GRAD, size=0)),
    "size=0, traced": (V, lambda: jax.jit(lambda g: se.coalesce(g, size=0))(GRAD)),
    "size=-1": (V, lambda: se.coalesce(GRAD, size=-1)),
    "size=1.5": (T, lambda: se.coalesce(GRAD, size=1.5)),
    "size=True": (T, lambda: se.coalesce(GRAD, size=True)),
    "size too small": (V, lambda: se.coalesce(GRAD, size=1)),
    "table of another shape": (V, lambda: jnp.ones((7, 2)) + GRAD),
    "times a vector": (V, lambda: GRAD * jnp.ones(2)),
    # lookups
    "lookup(list)": (T, lambda: se.lookup([[1.0]], IDS)),
    "lookup(scalar)": (V, lambda: se.lookup(jnp.ones(()), IDS)),
    "ids of floats": (T, lambda: se.lookup(TABLE, jnp.ones(3))),
    "padding_idx=1.5": (T, lambda: se.lookup(TABLE, IDS, padding_idx=1.5)),
    "padding_idx='a'": (T, lambda: se.lookup(TABLE, IDS, padding_idx="a")),
    "padding_idx, traced": (T, lambda: jax.jit(lambda p: se.lookup(TABLE, IDS, padding_idx=p))(1)),
    "padding_idx=6": (V, lambda: se.lookup(TABLE, IDS, padding_idx=6)),
    "mode='wrap'": (V, lambda: se.lookup(TABLE, IDS, mode="wrap")),
    "combiner='avg'": (V, lambda: se.lookup_bag(TABLE, IDS[None], combiner="avg")),
    "flat bags": (V, bags),
    "bag padding_idx=1.5": (T, lambda: se.lookup_bag(TABLE, IDS[None], padding_idx=1.5)),
    "num_segments=2.0": (T, lambda: bags(segment_ids=IDS, num_segments=2.0)),
    "num_segments=-1": (V, lambda: bags(segment_ids=IDS, num_segments=-1)),
    "offsets and segment_ids": (V, lambda: bags(offsets=IDS, segment_ids=IDS)),
    "max_norm='a'": (T, lambda: se.renorm(TABLE, IDS, "a")),
    "max_norm of many": (T, lambda: se.renorm(TABLE, IDS, jnp.ones(3))),
    "norm_type=None": (T, lambda: se.renorm(TABLE, IDS, 1.0, None)),
    # gradients
    "value_and_grad(3)": (T, lambda: se.value_and_grad(3)),
    "grad(None)": (T, lambda: se.grad(None)),
    "touched('f')": (T, lambda: se.touched("f")),
    "check_ids(3)": (T, lambda: se.check_ids(3)),
    "argnums=1.5": (T, lambda: se.value_and_grad(loss, argnums=1.5)),
    "argnums='params'": (T, lambda: se.grad(loss, "params")),
    "argnums=()": (T, lambda: se.touched(loss, ())),
    "argnums=True": (T, lambda: se.check_ids(loss, True)),
    "argnums=3": (V, lambda: se.grad(loss, 3)({"t": TABLE})),
    "tables= of another tree": (V, lambda: se.grad(loss, tables=[True])({"t": TABLE})),
    # optimizers
    "lazy(function)": (T, lambda: se.lazy(optax.adam)),
    "lazy(None)": (T, lambda: se.lazy(None)),
    "clock='table'": (V, lambda: se.lazy(optax.adam(0.1), clock="table")),
    "lazy(exact)": (T, lambda: se.lazy(se.exact.adam(0.1))),
    "exact.adam('a')": (T, lambda: se.exact.adam("a")),
    "b1='a'": (T, lambda: se.exact.adam(0.1, b1="a")),
    "b1=1": (V, lambda: se.exact.adam(0.1, b1=1.0)),
    "weight_decay='a'": (T, lambda: se.exact.adamw(0.1, weight_decay="a")),
    "before=3": (T, lambda: se.exact.adam(0.1, before=3)),
    "replay(None)": (T, lambda: se.exact.replay(None)),
    "global_norm('a')": (T, lambda: se.global_norm({"t": "a"})),
    "clip('a')": (T, lambda: se.clip_by_global_norm("a")),
    "clip(None)": (T, lambda: se.clip_by_global_norm(None)),
    "params_ema('a')": (T, lambda: se.params_ema("a")),
    "params_ema(2)": (V, lambda: se.params_ema(2.0)),
    "rowwise_adagrad('a')": (T, lambda: se.rowwise_adagrad("a")),
    "rowwise_adagrad(eps='a')": (T, lambda: se.rowwise_adagrad(0.1, eps="a")),
    "rowwise_adagrad(eps=-1)": (V, lambda: se.rowwise_adagrad(0.1, eps=-1.0)),
    # steps
    "train_step(3)": (T, lambda: se.train_step(3, TX)),
    "train_step(tx=None)": (T, lambda: se.train_step(loss, None)),
    "train_step(argnums='p')": (T, lambda: se.train_step(loss, TX, argnums="p")),
    "audit(3)": (T, lambda: se.audit(3, {"t": TABLE})),
    "audit()": (T, lambda: se.audit(loss)),
    "audit of no table": (V, lambda: se.audit(lambda p: p["t"].sum(), {"t": TABLE})),
    "assert of what cannot be told": (
        AssertionError,
        lambda: se.assert_row_sparse(loss, {"t": TABLE}, jnp.arange(6)),
    ),
    # tuning
    "block_rows=0": (V, lambda: tune(block_rows=0)),
    "block_rows=1.5": (V, lambda: tune(block_rows=1.5)),
    "window_bytes=-1": (V, lambda: tune(window_bytes=-1)),
    "kept_bytes='a'": (V, lambda: tune(kept_bytes="a")),
    "kept_bytes=nan": (V, lambda: tune(kept_bytes=float("nan"))),
    "huge_pages=1": (V, lambda: tune(huge_pages=1)),
    "block_row": (AttributeError, lambda: tune(block_row=4096)),
}


@pytest.mark.parametrize("name", BAD)
def test_error_has_three_parts(name):
    error, call = BAD[name]
    tuning = vars(se.tuning).copy()
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value).split("\n----")[0]
    assert re.fullmatch(r"[^\n]+\n  got: [^\n]+\n  write: [^\n]+", text), text
    assert vars(se.tuning) == tuning


def test_a_foreign_error_is_noticed():
    with pytest.raises(TypeError) as raised:
        jnp.ones(2) + "a"
    assert not re.fullmatch(r".+\n  got: .+\n  write: .+", str(raised.value))


def test_numbers_of_numpy_are_numbers():
    before = vars(se.tuning).copy()
    tune(block_rows=np.int64(2048), window_bytes=8e6, kept_bytes=np.float32(8e6), huge_pages=True)
    assert vars(se.tuning) == before
    assert se.lookup(TABLE, IDS, padding_idx=np.int64(1)).shape == (3, 2)
    assert se.coalesce(GRAD, size=np.int32(3)).indices.size == 3
    assert se.renorm(TABLE, IDS, np.float32(1.0)).shape == (6, 2)
    se.clip_by_global_norm(jnp.float32(1.0))
    se.grad(loss, np.int64(0))({"t": TABLE})
