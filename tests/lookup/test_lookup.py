"""`lookup`: its values and derivatives against loops in numpy, over the edges of every option."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import temp_bytes

import sparse_embed as se

V, D = 7, 3

# Most have six ids, so that the cases share what eager mode compiles.
IDS_CASES = {
    "no repeats": np.array([3, 0, 6, 2, 5, 1]),
    "all the same": np.array([2, 2, 2, 2, 2, 2]),
    "repeats": np.array([5, 2, 5, 6, 2, 5]),
    "empty": np.zeros(0, np.int32),
    "2-D": np.array([[1, 2, 6], [6, 0, 1]]),
    "scalar": np.array(6),
    "first and last row": np.array([0, V - 1, 0, V - 1, V - 1, 0]),
    "out of range": np.array([V, 2, -1, V + 40, -V, 6]),
    "far out of range": np.array([2**31 - 1, 2, -(2**31), 2, 6, V]),
    "uint8": np.array([2, 255, 6, 128, V, 2], np.uint8),
    "int8": np.array([2, -1, 127, -128, 6, 6], np.int8),
    "uint32": np.array([2, 2**32 - 1, 2**31, 6, 6, 0], np.uint32),
    "int64": np.array([2, 2**32 + 2, -(2**32) + 2, 6, 2**63 - 1, -1], np.int64),
}
OPTIONS = {
    "plain": {},
    "clip": {"mode": "clip"},
    "negative padding": {"padding_idx": -1},
    "frequency": {"scale_grad_by_freq": True},
    "padding, frequency": {"padding_idx": -5, "scale_grad_by_freq": True},
    "padding, frequency, clip": {
        "padding_idx": 6,
        "scale_grad_by_freq": True,
        "mode": "clip",
    },
}


def table_of(dtype=jnp.float32, num_rows=V, features=(D,)):
    """Rows that no two features share, exact in every dtype of the tests."""
    size = num_rows * int(np.prod(features))
    return jnp.asarray(np.arange(1, size + 1).reshape(num_rows, *features), dtype)


def cotangent_of(ids, features=(D,)):
    rng = np.random.default_rng(0)
    return rng.integers(-8, 9, (*np.shape(ids), *features)) / 4


def reference(table, ids, cotangent, padding_idx=None, scale_grad_by_freq=False, mode="fill"):
    """Loops in float64 and Python integers: the rows, and the gradient of the table."""
    table = np.asarray(table, np.float64)
    num_rows = len(table)
    flat = [int(i) for i in np.ravel(ids)]
    if mode == "clip":
        flat = [min(max(i, 0), num_rows - 1) for i in flat]
    rows = np.full((len(flat), *table.shape[1:]), np.nan)
    grad = np.zeros(table.shape)
    for place, i in enumerate(flat):
        if 0 <= i < num_rows:
            rows[place] = table[i]
            if padding_idx is None or i != padding_idx % num_rows:
                row = np.reshape(cotangent, rows.shape)[place]
                grad[i] += row / (flat.count(i) if scale_grad_by_freq else 1)
    return rows.reshape(cotangent.shape), grad


def no_jit(fn):
    return fn


@pytest.mark.parametrize(
    "case, maybe_jit",
    [
        # An argument of `jit` loses the high bits of int64 before anyone can look at it.
        *((case, jax.jit) for case in IDS_CASES if case != "int64"),
        *((case, no_jit) for case in ("repeats", "scalar", "out of range", "int64")),
    ],
)
def test_rows_and_gradient_are_those_of_the_loop(case, maybe_jit):
    table, ids = table_of(), IDS_CASES[case]
    cotangent = cotangent_of(ids)

    def run(table, ids, kwargs):
        rows, vjp = jax.vjp(lambda table: se.lookup(table, ids, **kwargs), table)
        return rows, vjp(jnp.asarray(cotangent, jnp.float32))[0]

    found = maybe_jit(lambda *args: {o: run(*args, OPTIONS[o]) for o in OPTIONS})(table, ids)
    for option, (rows, grad) in found.items():
        expected_rows, expected_grad = reference(table, ids, cotangent, **OPTIONS[option])
        assert rows.shape == (*ids.shape, D) and rows.dtype == table.dtype
        np.testing.assert_array_equal(rows, expected_rows, err_msg=option)
        np.testing.assert_allclose(grad, expected_grad, 1e-6, 1e-6, err_msg=option)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("option", ["plain", "padding, frequency, clip"])
def test_narrow_tables(option, dtype):
    table, kwargs = table_of(dtype), OPTIONS[option]
    ids = np.array([3, 5, 3, 6, 2, 9, -1, 6])
    cotangent = cotangent_of(ids)
    rows, vjp = jax.vjp(lambda table: se.lookup(table, ids, **kwargs), table)
    (grad,) = vjp(jnp.asarray(cotangent, dtype))
    expected_rows, expected_grad = reference(table, ids, cotangent, **kwargs)
    assert rows.dtype == grad.dtype == dtype
    np.testing.assert_array_equal(np.asarray(rows, np.float64), expected_rows)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(grad, np.float64), expected_grad, rtol=tolerance)


@pytest.mark.parametrize("features", [(), (2, 4)])
@pytest.mark.parametrize("option", ["plain", "padding, frequency, clip"])
def test_rows_of_any_shape(option, features):
    table, kwargs = table_of(features=features), OPTIONS[option]
    ids = np.array([[3, 5, 3], [6, 2, 9]])
    cotangent = cotangent_of(ids, features)
    rows, vjp = jax.vjp(lambda table: se.lookup(table, ids, **kwargs), table)
    (grad,) = vjp(jnp.asarray(cotangent, jnp.float32))
    expected_rows, expected_grad = reference(table, ids, cotangent, **kwargs)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(grad, expected_grad, 1e-6, 1e-6)


@pytest.mark.parametrize("ids", [[3, 0, 3], [[1], [2]], 4])
def test_inside_the_table_it_is_indexing(ids):
    table, ids = table_of() / 7, jnp.asarray(ids)

    def through(read):
        return jax.value_and_grad(lambda table: jnp.sum(jnp.sin(read(table, ids))))(table)

    for ours, dense in zip(through(se.lookup), through(lambda t, i: t[i]), strict=True):
        np.testing.assert_array_equal(ours, dense)


def test_a_small_dtype_reaches_the_rows_it_can_name_in_a_tall_table():
    table = jnp.arange(300.0)
    ids = jnp.array([0, 200, 255], jnp.uint8)
    assert se.lookup(table, ids).tolist() == [0, 200, 255]
    assert se.lookup(table, ids, mode="clip").tolist() == [0, 200, 255]
    ids = jnp.array([-1, 127], jnp.int8)
    np.testing.assert_array_equal(se.lookup(table, ids), [np.nan, 127])
    assert se.lookup(table, ids, mode="clip").tolist() == [0, 127]


def test_tables_without_rows_or_features():
    none = jnp.zeros((0, D))
    assert se.lookup(none, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, D)
    for mode in ("fill", "clip"):
        rows = se.lookup(none, jnp.array([0, -1]), mode=mode, scale_grad_by_freq=True)
        np.testing.assert_array_equal(rows, np.full((2, D), np.nan))
    assert se.lookup(jnp.zeros((V, 0)), jnp.array([1, 9])).shape == (2, 0)


def test_lists_and_numpy_arrays_are_taken():
    table = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    assert se.lookup(table, [2, 0]).tolist() == [[4, 5], [0, 1]]
    assert se.lookup(table, 1).tolist() == [2, 3]
    assert se.lookup(table, np.int64(1)).tolist() == [2, 3]


# --- derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_padding_row_that_is_not_finite_spoils_nothing(bad, maybe_jit):
    table = table_of().at[2].set(bad)
    ids = jnp.array([2, 4, 2, 1])

    def loss(table):
        return jnp.sum(se.lookup(table, ids, padding_idx=2)[1::2] ** 2)

    grad = maybe_jit(jax.grad(loss))(table)
    expected = np.zeros((V, D))
    expected[[4, 1]] = 2 * np.asarray(table)[[4, 1]]
    np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize("option", ["plain", "padding, frequency, clip"])
def test_forward_mode(option, maybe_jit):
    table, kwargs = table_of(), OPTIONS[option]
    ids = np.array([3, 5, 3, 6, 2, 9])
    tangent = jnp.asarray(np.random.default_rng(1).normal(size=table.shape), jnp.float32)
    rows, row_tangents = maybe_jit(
        lambda table: jax.jvp(lambda t: se.lookup(t, ids, **kwargs), (table,), (tangent,))
    )(table)
    # Row i of the Jacobian is the gradient of output i.
    expected = np.zeros(rows.shape)
    for i in np.ndindex(rows.shape):
        one = np.zeros(rows.shape)
        one[i] = 1
        expected[i] = np.sum(reference(table, ids, one, **kwargs)[1] * tangent)
    np.testing.assert_array_equal(rows, reference(table, ids, one, **kwargs)[0])
    np.testing.assert_allclose(row_tangents, expected, 1e-6, 1e-6)


def test_a_gradient_of_a_gradient():
    table, ids = table_of() / 4, jnp.array([3, 5, 3])

    def penalty(read):
        def loss(table):
            return jnp.sum(read(table) ** 3)

        return jax.grad(lambda table: jnp.sum(jax.grad(loss)(table) ** 2))(table)

    ours, dense = penalty(lambda t: se.lookup(t, ids)), penalty(lambda t: t[ids])
    np.testing.assert_array_equal(ours, dense)


def test_frequency_leaves_every_bit_of_the_value():
    values = jnp.array([[0.1], [-0.0], [jnp.inf], [1e-45]])
    ids = jnp.array([0, 1, 2, 3, 1, 1, 2])
    ours = se.lookup(values, ids, scale_grad_by_freq=True)
    assert np.asarray(ours).tobytes() == np.asarray(values[ids]).tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_frequency_counts_beyond_what_bfloat16_can(dtype):
    table = jnp.ones((2, 1), dtype)
    ids = jnp.zeros(257, jnp.int32)
    _, tangents = jax.jvp(
        lambda table: se.lookup(table, ids, scale_grad_by_freq=True), (table,), (table,)
    )
    assert set(np.ravel(tangents)) == {np.asarray(1 / 257, dtype)[()]}


def test_vmap_over_ids_over_tables_and_in_a_scan():
    ids = jnp.array([[3, 5, 3], [6, 2, 9]])
    tables = jnp.stack([table_of(), -2 * table_of()])
    read = functools.partial(se.lookup, padding_idx=2, scale_grad_by_freq=True)

    @jax.jit
    def grads(table, ids):
        return jax.grad(lambda table: jnp.nansum(read(table, ids) ** 2))(table)

    one_by_one = [grads(t, i) for t, i in zip(tables, ids, strict=True)]
    np.testing.assert_allclose(jax.vmap(grads)(tables, ids), one_by_one)
    _, scanned = jax.lax.scan(lambda c, x: (c, grads(*x)), 0, (tables, ids))
    np.testing.assert_allclose(scanned, one_by_one)
    rows = jax.jit(jax.vmap(read, in_axes=(None, 0)))(tables[0], ids)
    expected = [reference(tables[0], i, cotangent_of(i))[0] for i in ids]
    np.testing.assert_array_equal(rows, expected)


# --- what is read, and at what cost -------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"padding_idx": 2}, [4, 0]),
        ({"padding_idx": 2, "scale_grad_by_freq": True}, [4, 0]),
        ({"padding_idx": 0, "mode": "clip"}, [2, 4, V - 1]),
        ({"padding_idx": -1, "mode": "clip"}, [0, 2, 4]),
    ],
)
def test_padding_and_ids_out_of_range_are_not_listed(options, expected, maybe_jit):
    ids = jnp.array([2, 4, -1, 2, V, 0])
    grad = maybe_jit(se.grad(lambda table: se.lookup(table, ids, **options).sum()))(table_of())
    listed = grad.indices[grad.indices < V]
    assert isinstance(grad, se.RowSparse)
    assert listed.tolist() == sorted(expected)


TALL = 100_003
READS = {
    "plain": functools.partial(se.lookup),
    "padding": functools.partial(se.lookup, padding_idx=-1),
    "frequency": functools.partial(se.lookup, scale_grad_by_freq=True),
    "clip": functools.partial(se.lookup, mode="clip", padding_idx=3),
    "bag": functools.partial(se.lookup_bag, padding_idx=3, combiner="sqrtn"),
    "max bag": functools.partial(se.lookup_bag, padding_idx=-3, combiner="max"),
    "ragged": lambda table, ids: se.lookup_bag(
        table, ids.reshape(-1), offsets=jnp.array([0, 5]), combiner="mean", padding_idx=0
    ),
    "ragged min": lambda table, ids: se.lookup_bag(
        table, ids.reshape(-1), offsets=jnp.array([0, 5]), combiner="min", padding_idx=0
    ),
}


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def tall_operations(fn, *args):
    """Names of the operations that make something as tall as the table."""
    found = set()
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if any(TALL in getattr(v.aval, "shape", ()) for v in eqn.outvars):
            found.add(eqn.primitive.name)
    return found


@pytest.mark.parametrize("read", READS)
def test_nothing_is_made_in_the_size_of_the_table(read):
    table = jax.ShapeDtypeStruct((TALL, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    assert tall_operations(READS[read], table, ids) <= {"stop_gradient"}
    assert temp_bytes(READS[read], table, ids) < 20_000
    tangents = functools.partial(jax.jvp, READS[read])

    def forward(table, ids):
        zeros = np.zeros(ids.shape, jax.dtypes.float0)
        return tangents((table, ids), (table, zeros))

    assert temp_bytes(forward, table, ids) < 20_000


def test_an_operation_on_the_whole_table_would_be_noticed():
    table = jax.ShapeDtypeStruct((TALL, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    assert tall_operations(lambda t, i: jax.jit(jnp.sin)(t)[i], table, ids) >= {"sin"}


# --- messages -----------------------------------------------------------------------------

TABLE, IDS = jnp.ones((4, 2)), jnp.array([0, 1])
WRONG_CALLS = {
    "float ids": (
        lambda: se.lookup(TABLE, jnp.array([0.0, 1.0])),
        TypeError,
        "se.lookup(table, ids): ids must be integers.",
        "ids float32[2]",
        "ids.astype(jnp.int32)",
    ),
    "bool ids": (
        lambda: se.lookup(TABLE, jnp.array([True])),
        TypeError,
        "se.lookup(table, ids): ids must be integers.",
        "ids bool[1]",
        "ids.astype(jnp.int32)",
    ),
    "a list as table": (
        lambda: se.lookup([[1.0]], IDS),
        TypeError,
        "se.lookup(table, ids): table must be an array of floats.",
        "table list",
        "a float array [num_rows, *features]",
    ),
    "an integer table": (
        lambda: se.lookup(jnp.ones((4, 2), jnp.int8), IDS),
        TypeError,
        "table must be an array of floats.",
        "table int8[4,2]",
        "a float array [num_rows, *features]",
    ),
    "a gradient as table": (
        lambda: se.lookup(se.RowSparse(IDS, jnp.ones((2, 2)), (4, 2)), IDS),
        TypeError,
        "table must be an array of floats.",
        "table float32[4,2]",
        "a float array [num_rows, *features]",
    ),
    "a scalar as table": (
        lambda: se.lookup(jnp.float32(1), IDS),
        ValueError,
        "table must have rows.",
        "table float32[]",
        "a float array [num_rows, *features]",
    ),
    "an unknown mode": (
        lambda: se.lookup(TABLE, IDS, mode="wrap"),
        ValueError,
        "se.lookup(table, ids): mode='wrap' is unknown.",
        "mode str",
        'mode="fill" or mode="clip"',
    ),
    "padding beyond the table": (
        lambda: se.lookup(TABLE, IDS, padding_idx=4),
        ValueError,
        "se.lookup(table, ids): padding_idx=4 is not a row of the table.",
        "a table of 4 rows",
        "a padding_idx in [-4, 4)",
    ),
    "padding before the table": (
        lambda: se.lookup(TABLE, IDS, padding_idx=-5),
        ValueError,
        "padding_idx=-5 is not a row of the table.",
        "a table of 4 rows",
        "a padding_idx in [-4, 4)",
    ),
    "padding in an empty table": (
        lambda: se.lookup(TABLE[:0], IDS, padding_idx=0),
        ValueError,
        "padding_idx=0 is not a row of the table.",
        "a table of 0 rows",
        "or padding_idx=None",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_a_wrong_call_says_what_to_write(wrong):
    call, error, wrote, got, instead = WRONG_CALLS[wrong]
    pattern = ".*\n  got: ".join(map(re.escape, (wrote, got)))
    with pytest.raises(error, match=f"(?s){pattern}.*\n  write: .*{re.escape(instead)}"):
        call()


@pytest.mark.parametrize("read", [se.lookup, lambda t, i: t[i]], ids=["lookup", "index"])
def test_one_id_lists_one_row(read):
    table, ids = jnp.ones((10, 2)), jnp.array([3])
    grad = se.grad(lambda t: read(t, ids).sum())(table)
    assert grad.indices.tolist() == [3]
    assert se.touched(lambda t: read(t, ids))(table).tolist() == [3]
