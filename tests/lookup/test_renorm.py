"""`renorm`: torch's `max_norm`, against loops in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import temp_bytes

import sparse_embed as se

V = 6
IDS_CASES = {
    "no repeats": np.array([3, 0, 5, 2]),
    "all the same": np.array([2, 2, 2, 2]),
    "empty": np.zeros(0, np.int32),
    "2-D": np.array([[1, 2], [5, 1]]),
    "scalar": np.array(5),
    "first and last row": np.array([0, 5, 0, 5]),
    "out of range": np.array([6, -1, 3, 2**31 - 1]),
    "nothing in range": np.array([6, -1, -6, 2**31 - 1]),
    "uint8": np.array([2, 255, 5, 128], np.uint8),
    "int64": np.array([2, 2**32 + 3, -(2**32), 2**63 - 1]),
}
NORM_TYPES = (0.5, 1, 2, 3.5, np.inf)


def table_of(dtype=jnp.float32, features=(3,)):
    """Rows whose norms reach from far below to far above 2."""
    values = np.random.default_rng(0).normal(size=(V, *features))
    scale = np.logspace(-2, 1, V).reshape(-1, *[1] * len(features))
    return jnp.asarray(values * scale, dtype)


def reference(table, ids, max_norm, norm_type=2.0):
    """Loops in float64; also which rows were scaled."""
    table = np.array(table, np.float64)
    scaled = set()
    for i in {int(i) for i in np.ravel(ids)}:
        if 0 <= i < len(table):
            row = np.abs(table[i]).ravel()
            if norm_type == np.inf:
                norm = row.max()
            else:
                norm = np.sum(row**norm_type) ** (1 / norm_type)
            if norm > max_norm:
                table[i] *= max_norm / (norm + 1e-7)
                scaled.add(i)
    return table, sorted(scaled)


@pytest.mark.parametrize("case", IDS_CASES)
def test_rows_are_those_of_the_loop(case):
    table, ids = table_of(), IDS_CASES[case]
    # The ids stay in numpy: as an argument of `jit`, int64 would lose its high bits.
    found = jax.jit(lambda table: {p: se.renorm(table, ids, 2.0, p) for p in NORM_TYPES})(table)
    eager = {2: se.renorm(table, ids, max_norm=2.0)}
    for p, new in [*found.items(), *eager.items()]:
        expected, scaled = reference(table, ids, 2.0, p)
        assert new.dtype == table.dtype
        np.testing.assert_allclose(new, expected, rtol=2e-6)
        same = np.setdiff1d(np.arange(V), scaled)
        np.testing.assert_array_equal(new[same], table[same])


def test_the_cases_scale_some_rows_and_leave_others():
    scaled = reference(table_of(), np.arange(V), 2.0)[1]
    assert 0 < len(scaled) < V


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("features", [(), (3,), (2, 500)])
def test_norms_are_made_in_float32(dtype, features):
    table, ids = table_of(dtype, features), np.array([5, 2, 5, 1, 9])
    new = jax.jit(lambda table: se.renorm(table, ids, 0.5))(table)
    expected, scaled = reference(table, ids, 0.5)
    assert scaled and new.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(new, np.float64), expected, rtol=eps, atol=1e-6)


def test_a_norm_beyond_float16_is_no_infinity():
    table = jnp.full((1, 4), 40_000, jnp.float16)
    np.testing.assert_allclose(se.renorm(table, [0], 1.0), [[0.5] * 4], rtol=1e-3)


def test_a_row_of_norm_max_norm_keeps_its_bits():
    # Small, so that the 1e-7 in the divisor would show.
    table = jnp.array([[3.0, 4.0], [3.0, 4.00001]]) / 64
    new = se.renorm(table, jnp.array([0, 1]), 5.0 / 64)
    assert new[0].tolist() == [3 / 64, 4 / 64]
    assert new[1, 1] < table[1, 1]


def test_options_of_the_pytorch_test():
    # `test_embedding_from_pretrained_options`: norm_type 0.5, (1 + sqrt(2) + sqrt(3)) ** 2.
    table = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    new = se.renorm(table, jnp.array([0, 1]), max_norm=2.0, norm_type=0.5)
    np.testing.assert_allclose(
        np.sum(np.sqrt(np.asarray(new, np.float64)), axis=1) ** 2, [2, 2], rtol=1e-6
    )
    np.testing.assert_allclose(new[0], np.array([1, 2, 3]) * 2 / 17.191508, rtol=1e-6)


def test_zero_rows_and_rows_that_are_not_finite():
    table = jnp.array([[0.0, 0.0], [np.nan, 1.0], [9.0, 0.0]])
    new = se.renorm(table, jnp.arange(3), 1.0)
    np.testing.assert_allclose(new, [[0, 0], [np.nan, 1], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_a_table_of_nothing(shape):
    assert se.renorm(jnp.zeros(shape), jnp.array([1, 0]), 1.0).shape == shape


def test_vmap():
    tables = jnp.stack([table_of(), 2 * table_of()])
    ids = jnp.array([[5, 3], [4, 4]])
    new = jax.vmap(lambda table, ids: se.renorm(table, ids, 1.0))(tables, ids)
    for found, table, i in zip(new, tables, ids, strict=True):
        np.testing.assert_allclose(found, reference(table, i, 1.0)[0], rtol=2e-6)


def test_a_donated_table_is_updated_in_place():
    table = jax.ShapeDtypeStruct((100_003, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)

    def step(table, ids):
        return se.renorm(table, ids, 1.0)

    assert temp_bytes(step, table, ids, donate=(0,)) < 20_000
    compiled = jax.jit(step, donate_argnums=0).lower(table, ids).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 100_003 * 8 * 4


WRONG_CALLS = {
    "float ids": (
        lambda: se.renorm(table_of(), jnp.ones(2), 1.0),
        TypeError,
        "se.renorm(table, ids, max_norm): ids must be integers.",
        "ids float32[2]",
        "ids.astype(jnp.int32)",
    ),
    "an integer table": (
        lambda: se.renorm(jnp.ones((3, 2), jnp.int32), jnp.array([0]), 1.0),
        TypeError,
        "se.renorm(table, ids, max_norm): table must be an array of floats.",
        "table int32[3,2]",
        "a float array [num_rows, *features]",
    ),
    "a scalar as table": (
        lambda: se.renorm(jnp.float32(1), jnp.array([0]), 1.0),
        ValueError,
        "se.renorm(table, ids, max_norm): table must have rows.",
        "table float32[]",
        "a float array [num_rows, *features]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_a_wrong_call_says_what_to_write(wrong):
    call, error, wrote, got, instead = WRONG_CALLS[wrong]
    pattern = ".*\n  got: ".join(map(re.escape, (wrote, got)))
    with pytest.raises(error, match=f"(?s){pattern}.*\n  write: .*{re.escape(instead)}"):
        call()
