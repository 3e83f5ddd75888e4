"""`value_and_grad`: the laws that hold for every program of `programs.py`, against dense JAX."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS, Program, V

import sparse_embed as se

# --- the table of programs ------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a program gave in one mode, and what dense JAX gives for it."""

    program: Program
    mode: str
    params: Any
    batch: Any
    result: tuple[Any, Any]  # (value, gradients), of `se.value_and_grad`
    dense: tuple[Any, Any]  # the same of `jax.value_and_grad`
    warned: list[warnings.WarningMessage]
    temp: int  # bytes of scratch memory; 0 where it was not compiled


@pytest.fixture(
    scope="module",
    params=[(program, mode) for program in PROGRAMS.values() for mode in program.modes],
    ids=lambda case: f"{case[0].name}-{case[1]}",
)
def outcome(request) -> Outcome:
    program, mode = request.param
    params, batch = program.params(), program.batch()
    ours = se.value_and_grad(program.loss, has_aux=program.has_aux)
    dense, temp = jax.value_and_grad(program.loss, has_aux=program.has_aux), 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if mode == "jit":
            ours, dense = (jax.jit(f).lower(params, batch).compile() for f in (ours, dense))
            temp = ours.memory_analysis().temp_size_in_bytes
        result = ours(params, batch)
    return Outcome(program, mode, params, batch, result, dense(params, batch), warned, temp)


def is_row_sparse(x):
    return isinstance(x, se.RowSparse)


def named_leaves(tree) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_row_sparse)


def assert_same(got, want):
    """Equal to the bit, NaN and the sign of zero included; other things than arrays: equal."""
    got, want = (jax.tree.flatten(x, is_leaf=lambda x: x is None) for x in (got, want))
    assert got[1] == want[1]
    for a, b in zip(got[0], want[0], strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = np.asarray(a), np.asarray(b)
            assert a.tobytes() == b.tobytes(), f"{a} is not {b}"
        else:
            assert a == b


def assert_close(got, want, rtol):
    """Equal gradients, up to rounding at the scale of the largest entry."""
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = np.asarray(got), np.asarray(want)
    wide = np.complex128 if np.iscomplexobj(got) else np.float64
    got, want = got.astype(wide), want.astype(wide)
    finite = np.abs(want[np.isfinite(want)])
    atol = rtol * finite.max() if finite.size else 0
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def test_value_and_aux_are_the_same_to_the_bit(outcome):
    assert_same(outcome.result[0], outcome.dense[0])


def test_gradients_are_those_of_dense_jax(outcome):
    got, want = outcome.result[1], outcome.dense[1]
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(outcome.params)):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), outcome.params)
        wide = jax.grad(outcome.program.loss)(params, outcome.batch)
        want = jax.tree.map(lambda x, g: x.astype(g.dtype), wide, want)
    assert jax.tree.structure(got, is_leaf=is_row_sparse) == jax.tree.structure(want)
    for (_, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
        if is_row_sparse(a):
            assert a.shape == b.shape
            a = a.todense()
        assert_close(a, b, outcome.program.rtol)


def test_tables_are_row_sparse_and_nothing_else_is(outcome):
    for path, grad in named_leaves(outcome.result[1]):
        expected = outcome.program.is_named(path, outcome.program.sparse)
        assert is_row_sparse(grad) == expected, jax.tree_util.keystr(path)


def test_each_table_used_whole_has_one_warning(outcome):
    texts = [str(w.message) for w in outcome.warned]
    assert len(texts) == len(outcome.program.warns)
    for leaf, operation in outcome.program.warns.items():
        mine = [t for t in texts if f"['{leaf}']" in t.splitlines()[0]]
        assert len(mine) == 1, texts
        assert f"`{operation}`" in mine[0]
        assert "programs.py:" in mine[0] or "flax" in mine[0], "no source line"


def test_row_sparse_gradients_list_each_row_read_once(outcome):
    program = outcome.program
    for path, grad in named_leaves(outcome.result[1]):
        if not is_row_sparse(grad):
            continue
        indices, rows = np.asarray(grad.indices), np.asarray(grad.rows)
        assert grad.coalesced and indices.dtype == np.int32
        assert np.all(np.diff(indices) > 0) and np.all(indices >= 0)
        assert not np.any(rows[indices >= V])
        leaf = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        expected = program.listed
        if isinstance(expected, dict):
            expected = expected[leaf]
        if expected is not None:
            np.testing.assert_array_equal(
                indices[indices < V], program.rows(outcome.batch, leaf, expected)
            )


def test_no_temporary_array_is_as_large_as_a_table(outcome):
    if outcome.mode == "jit" and outcome.program.sparse and outcome.program.lean:
        table = min(x.nbytes for x in jax.tree.leaves(outcome.params) if V in x.shape)
        assert outcome.temp < table / 2
