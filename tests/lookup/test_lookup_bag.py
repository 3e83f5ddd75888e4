"""`lookup_bag`: every combiner, however the bags are given, against loops in numpy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_embed as se

V, D = 6, 2
PAD = 4
COMBINERS = ("sum", "mean", "sqrtn", "max", "min")
WEIGHTED = ("sum", "mean", "sqrtn")

# Rows 1 and 3 tie in the first feature, rows 0 and 5 in both.
TABLE = np.array([[1, -2], [3, 4], [-5, 0.5], [3, -1], [100, -100], [1, -2]], np.float32)

BAGS_CASES = {
    "regular": [[0, 1, 2], [5, 3, 0], [2, 2, 1]],
    "ties and repeats": [[1, 3, 1], [3, 1], [0, 5, 0], [5, 0]],
    "empty bags and padding": [[], [PAD, 1, PAD], [], [PAD], [0], []],
}
WAYS = ("dense", "starts", "starts and end", "segment ids")


def weights_of(bags):
    """Weights for each entry, zero and negative ones among them; none sum up to 0."""
    values = iter(np.resize([0.5, 2.0, -1.0, 0.0, 0.25, 3.0, 1.5], 99))
    return [[next(values) for _ in bag] for bag in bags]


def given(way, bags, weights):
    """ids, weights and options that give `bags` to `lookup_bag` in one of the ways.

    Returns:
      The arguments, and where in the flat weights each entry of a bag is found.
    """
    lengths = [len(bag) for bag in bags]
    flat = [i for bag in bags for i in bag]
    flat_weights = [w for bag in weights for w in bag]
    places = np.split(np.arange(len(flat)), np.cumsum(lengths)[:-1])
    starts = np.cumsum([0, *lengths])
    if way == "dense":
        longest = max(lengths)
        flat = [i for bag in bags for i in [*bag, *[PAD] * (longest - len(bag))]]
        flat_weights = [x for w in weights for x in [*w, *[np.nan] * (longest - len(w))]]
        places = [b * longest + np.arange(n) for b, n in enumerate(lengths)]
        shape, options = (len(bags), longest), {}
    elif way == "starts":
        shape, options = (len(flat),), {"offsets": starts[:-1]}
    elif way == "starts and end":
        flat, flat_weights = [*flat, 2, 99, -1], [*flat_weights, 7, np.nan, 1]
        shape, options = (len(flat),), {"offsets": starts, "num_segments": len(bags)}
    else:
        # First entries first: bags mixed, the order inside of each kept. Two are in no bag.
        order = sorted((i, b) for b, n in enumerate(lengths) for i in range(n))
        flat = [0, *(bags[b][i] for i, b in order), 99]
        flat_weights = [7, *(weights[b][i] for i, b in order), np.nan]
        places = [[1 + order.index((i, b)) for i in range(n)] for b, n in enumerate(lengths)]
        segment_ids = np.array([-1, *(b for _, b in order), len(bags)])
        shape = (len(flat),)
        options = {"segment_ids": segment_ids, "num_segments": len(bags)}
    ids = np.array(flat, np.int32).reshape(shape)
    return ids, np.array(flat_weights, np.float32).reshape(shape), options, places


def reference(table, bags, weights, cotangent, combiner):
    """Loops in float64: the output, the table's gradient, the gradient of each weight."""
    table = np.asarray(table, np.float64)
    out = np.zeros((len(bags), table.shape[1]))
    table_grad = np.zeros(table.shape)
    weight_grads = [[0.0] * len(bag) for bag in bags]
    for b, (bag, ws) in enumerate(zip(bags, weights, strict=True)):
        kept = [k for k, i in enumerate(bag) if i != PAD]
        if combiner in ("max", "min"):
            for f in range(table.shape[1] if kept else 0):
                best = bag[kept[0]]
                for k in kept:
                    value, sign = table[bag[k], f], 1 if combiner == "max" else -1
                    best = bag[k] if sign * value > sign * table[best, f] else best
                out[b, f] = table[best, f]
                table_grad[best, f] += cotangent[b, f]
            continue
        squares = sum(ws[k] ** 2 for k in kept)
        total = sum(ws[k] for k in kept)
        divisor = {"sum": 1, "mean": total, "sqrtn": math.sqrt(squares)}[combiner]
        if divisor == 0:
            continue
        for k in kept:
            out[b] += ws[k] * table[bag[k]] / divisor
            table_grad[bag[k]] += ws[k] * cotangent[b] / divisor
        for k in kept:
            step = {"sum": 0, "mean": 1, "sqrtn": ws[k] / divisor}[combiner]
            change = (table[bag[k]] - step * out[b]) / divisor
            weight_grads[b][k] = change @ cotangent[b]
    return out, table_grad, weight_grads


def no_jit(fn):
    return fn


@pytest.mark.parametrize(
    "case, way, maybe_jit",
    [
        *((case, way, jax.jit) for case in BAGS_CASES for way in WAYS),
        ("ties and repeats", "dense", no_jit),
        ("ties and repeats", "starts", no_jit),
    ],
)
def test_every_combiner_is_that_of_the_loop(case, way, maybe_jit):
    bags = BAGS_CASES[case]
    weights = weights_of(bags)
    ids, flat_weights, options, places = given(way, bags, weights)
    cotangent = np.random.default_rng(0).integers(-8, 9, (len(bags), D)) / 4

    def run(combiner, weighted, table, weights):
        def bag(table, weights):
            return se.lookup_bag(
                table,
                ids,
                weights=weights if weighted else None,
                combiner=combiner,
                padding_idx=PAD,
                **options,
            )

        out, vjp = jax.vjp(bag, table, weights)
        return out, *vjp(jnp.asarray(cotangent, jnp.float32))

    runs = [(c, False) for c in COMBINERS] + [(c, True) for c in WEIGHTED]
    if maybe_jit is no_jit:
        runs = [("max", False), ("mean", True)]  # eager mode compiles every operation
    found = maybe_jit(lambda *args: [run(*which, *args) for which in runs])(
        jnp.asarray(TABLE), jnp.asarray(flat_weights)
    )
    for (combiner, weighted), (out, table_grad, weight_grad) in zip(runs, found, strict=True):
        ones = [[1.0] * len(bag) for bag in bags]
        used = weights if weighted else ones
        expected = reference(TABLE, bags, used, cotangent, combiner)
        close = {"rtol": 2e-6, "atol": 2e-6, "err_msg": f"{combiner}, {weighted=}"}
        assert out.dtype == table_grad.dtype == weight_grad.dtype == jnp.float32
        np.testing.assert_allclose(out, expected[0], **close)
        np.testing.assert_allclose(table_grad, expected[1], **close)
        expected_weight_grad = np.zeros(weight_grad.size)
        if weighted:
            for place, grads in zip(places, expected[2], strict=True):
                expected_weight_grad[np.asarray(place, int)] = grads
        np.testing.assert_allclose(weight_grad.ravel(), expected_weight_grad, **close)


# --- golden numbers -----------------------------------------------------------------------

# PyTorch's test/nn/test_embedding.py, `_test_EmbeddingBag`: five bags, two of them empty.
GOLDEN_TABLE = np.arange(1.0, 11).reshape(5, 2)
GOLDEN_IDS = [3, 1, 1, 1, 4, 0]
GOLDEN_OFFSETS = [0, 0, 3, 3, 6]
GOLDEN_COTANGENT = [[99, 99], [1, 2], [99, 99], [3, 4], [99, 99]]
GOLDEN = {
    "sum": (
        [[0, 0], [13, 16], [0, 0], [13, 16], [0, 0]],
        [[3, 4], [5, 8], [0, 0], [1, 2], [3, 4]],
    ),
    "mean": (
        np.array([[0, 0], [13, 16], [0, 0], [13, 16], [0, 0]]) / 3,
        np.array([[3, 4], [5, 8], [0, 0], [1, 2], [3, 4]]) / 3,
    ),
    "max": (
        [[0, 0], [7, 8], [0, 0], [9, 10], [0, 0]],
        [[0, 0], [0, 0], [0, 0], [1, 2], [3, 4]],
    ),
}


@pytest.mark.parametrize("combiner", GOLDEN)
def test_the_numbers_of_the_pytorch_tests(combiner, maybe_jit):
    @maybe_jit
    def run(table):
        out, vjp = jax.vjp(
            lambda table: se.lookup_bag(
                table,
                jnp.array(GOLDEN_IDS),
                offsets=np.array(GOLDEN_OFFSETS),
                combiner=combiner,
            ),
            table,
        )
        return out, vjp(jnp.array(GOLDEN_COTANGENT, jnp.float32))[0]

    out, grad = run(jnp.asarray(GOLDEN_TABLE, jnp.float32))
    np.testing.assert_allclose(out, GOLDEN[combiner][0], rtol=1e-6)
    np.testing.assert_allclose(grad, GOLDEN[combiner][1], rtol=1e-6)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_bags_that_are_all_empty(combiner):
    out = se.lookup_bag(
        jnp.asarray(TABLE), jnp.zeros(0, jnp.int32), offsets=[0, 0, 0], combiner=combiner
    )
    assert out.tolist() == [[0, 0]] * 3


def test_weighted_divisors_are_those_of_tensorflow():
    # Worked by hand: weights 3 and 4 on rows (1, -2) and (3, 4).
    def bag(combiner, weights):
        weights = jnp.array([weights])
        ids = jnp.array([[0, 1]])
        return se.lookup_bag(jnp.asarray(TABLE), ids, weights=weights, combiner=combiner)

    assert bag("sum", [3.0, 4.0]).tolist() == [[15, 10]]
    np.testing.assert_allclose(bag("mean", [3.0, 4.0]), [[15 / 7, 10 / 7]], rtol=1e-6)
    np.testing.assert_allclose(bag("sqrtn", [3.0, 4.0]), [[3, 2]], rtol=1e-6)
    # `tf.math.divide_no_nan`
    assert bag("mean", [3.0, -3.0]).tolist() == [[0, 0]]
    assert bag("sqrtn", [0.0, 0.0]).tolist() == [[0, 0]]


@pytest.mark.parametrize("combiner", WEIGHTED)
def test_no_derivative_is_nan_where_the_divisor_is_zero(combiner):
    def loss(table, weights):
        ids = jnp.array([[0, 1], [2, PAD], [PAD, PAD]])
        out = se.lookup_bag(table, ids, weights=weights, combiner=combiner, padding_idx=PAD)
        return jnp.sum(out * out)

    weights = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for grad in jax.grad(loss, argnums=(0, 1))(jnp.asarray(TABLE), weights):
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))


# --- the edges of max and min -------------------------------------------------------------


def both_ways(table, ids, **options):
    """One bag, given dense and ragged: outputs and gradients of its sum, which must agree."""
    found = []
    for given_ids, way in ((ids[None], {}), (ids, {"offsets": [0]})):

        def bag(table, given_ids=given_ids, way=way):
            return se.lookup_bag(table, given_ids, **way, **options)

        table = jnp.asarray(table, jnp.float32)
        out, vjp = jax.jit(lambda table, bag=bag: jax.vjp(bag, table))(table)
        found.append((np.asarray(out[0]), np.asarray(vjp(jnp.ones_like(out))[0])))
    for dense, ragged in zip(*found, strict=True):
        np.testing.assert_array_equal(dense, ragged)
    return found[0]


@pytest.mark.parametrize("combiner, infinity", [("max", -np.inf), ("min", np.inf)])
def test_padding_does_not_win_over_an_infinity(combiner, infinity):
    table = np.array([[7.0], [infinity], [infinity]])
    ids = jnp.array([0, 2, 1])
    out, grad = both_ways(table, ids, combiner=combiner, padding_idx=0)
    assert out.tolist() == [infinity]
    assert grad.tolist() == [[0], [0], [1]]


@pytest.mark.parametrize("combiner", ["max", "min"])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_nan_wins_over_every_number(combiner, order):
    table = np.array([[np.nan, 1.0], [np.inf, 2.0], [-np.inf, 3.0]])
    out, grad = both_ways(table, jnp.array(order), combiner=combiner)
    np.testing.assert_array_equal(out, [np.nan, 3 if combiner == "max" else 1])
    assert grad[0, 0] == 1 and grad[:, 0].sum() == 1


@pytest.mark.parametrize("combiner", ["max", "min"])
def test_one_tie_goes_whole_to_the_first_for_each_feature(combiner):
    table = np.array([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])
    out, grad = both_ways(table, jnp.array([2, 0, 1, 2]), combiner=combiner)
    assert out.tolist() == [1, 5, 2]
    assert grad.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]


# --- ids, padding, dtypes, shapes ---------------------------------------------------------


@pytest.mark.parametrize("combiner", COMBINERS)
def test_an_id_out_of_range_makes_its_own_bag_nan(combiner):
    ids = jnp.array([[0, 1], [2, V], [3, 5], [-1, 2], [2, 2**31 - 1]])
    lengths = {"offsets": jnp.arange(0, 10, 2)}
    for given_ids, way in ((ids, {}), (ids.reshape(-1), lengths)):

        def bag(table, given_ids=given_ids, way=way):
            return se.lookup_bag(table, given_ids, combiner=combiner, **way)

        out, vjp = jax.jit(lambda table, bag=bag: jax.vjp(bag, table))(jnp.asarray(TABLE))
        assert np.isnan(out).all(axis=1).tolist() == [False, True, False, True, True]
        assert np.isnan(out).any(axis=1).tolist() == [False, True, False, True, True]
        (grad,) = vjp(jnp.ones_like(out))
        assert np.isfinite(grad).all()
        assert not np.any(grad[4])


@pytest.mark.parametrize("combiner", COMBINERS)
def test_clip_is_the_call_with_clamped_ids(combiner):
    ids = jnp.array([[0, V], [-3, 2], [99, -1]])

    def run(ids, **options):
        def loss(table):
            out = se.lookup_bag(table, ids, combiner=combiner, padding_idx=0, **options)
            return jnp.sum(out**2)

        return jax.value_and_grad(loss)(jnp.asarray(TABLE))

    clipped, clamped = run(ids, mode="clip"), run(jnp.clip(ids, 0, V - 1))
    jax.tree.map(np.testing.assert_array_equal, clipped, clamped)


def test_padding_may_be_negative():
    table, ids = jnp.asarray(TABLE), jnp.array([[5, 1], [0, 5]])
    out = se.lookup_bag(table, ids, combiner="mean", padding_idx=-1)
    assert out.tolist() == [[3, 4], [1, -2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("combiner", COMBINERS)
def test_a_padding_row_that_is_not_finite_spoils_nothing(combiner, bad):
    table = TABLE.copy()
    table[PAD] = bad
    out, grad = both_ways(table, jnp.array([1, PAD]), combiner=combiner, padding_idx=PAD)
    assert out.tolist() == [3, 4]
    assert grad.tolist() == [[0, 0], [1, 1], *[[0, 0]] * 4]


@pytest.mark.parametrize("combiner", ["sqrtn", "max"])
def test_padding_and_ids_without_a_bag_are_not_listed(combiner):
    def listed(ids, **options):
        def loss(table):
            return se.lookup_bag(table, jnp.array(ids), combiner=combiner, **options).sum()

        grad = jax.jit(se.grad(loss))(jnp.asarray(TABLE))
        assert isinstance(grad, se.RowSparse)
        return grad.indices[grad.indices < V].tolist()

    two = {"num_segments": 2}
    assert listed([[1, PAD], [-1, 0]], padding_idx=PAD) == [0, 1]
    assert listed([[PAD, PAD]], padding_idx=PAD) == []
    assert listed([1, PAD, 3, 0], offsets=[0, 1, 3], padding_idx=PAD, **two) == [1, 3]
    assert listed([1, PAD, 3, 0], segment_ids=[9, 0, 1, -1], **two) == [3, PAD]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("way", ["dense", "ragged"])
def test_sums_are_made_in_float32(dtype, way):
    table, ids = jnp.full((1, 1), 1.0, dtype), jnp.zeros(4000, jnp.int32)
    ids, options = (ids[None], {}) if way == "dense" else (ids, {"offsets": [0]})
    for combiner, expected in (("sum", 4000), ("mean", 1), ("sqrtn", math.sqrt(4000))):
        bag = functools.partial(se.lookup_bag, combiner=combiner, **options)
        out = jax.jit(bag)(table, ids)
        assert out.dtype == dtype
        assert out.tolist() == [[float(jnp.asarray(expected, dtype))]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_tables(dtype):
    ids = jnp.array([[0, 1, 2], [1, 3, PAD]])

    def bag(table, combiner):
        return se.lookup_bag(table, ids, combiner=combiner, padding_idx=PAD)

    @jax.jit
    def run(table):
        outs = [jax.vjp(lambda table, c=c: bag(table, c), table) for c in COMBINERS]
        return [(out, vjp(jnp.ones_like(out))[0]) for out, vjp in outs]

    narrow, wide = run(jnp.asarray(TABLE, dtype)), run(jnp.asarray(TABLE))
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    for x, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype(jnp.float32), expected, rtol=tolerance)


@pytest.mark.parametrize(
    "table_dtype, weight_dtype, expected",
    [
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float16, jnp.float32),
    ],
)
@pytest.mark.parametrize("combiner", WEIGHTED)
def test_the_result_has_the_promoted_dtype(table_dtype, weight_dtype, expected, combiner):
    table, ids = jnp.ones((3, 2), table_dtype), jnp.array([[0, 1]])
    weights = jnp.full((1, 2), 0.5, weight_dtype)
    assert se.lookup_bag(table, ids, weights=weights, combiner=combiner).dtype == expected


@pytest.mark.parametrize("features", [(), (2, 3)])
def test_rows_of_any_shape_and_ids_of_many_axes(features):
    size = V * math.prod(features)
    table = np.sin(np.arange(size)).reshape(V, *features).astype(np.float32)
    ids = np.random.default_rng(0).integers(0, V, (2, 3, 4))
    rows = table.astype(np.float64)[ids]
    expected = {
        "sum": rows.sum(2),
        "mean": rows.mean(2),
        "sqrtn": rows.sum(2) / 2,
        "max": rows.max(2),
        "min": rows.min(2),
    }

    @jax.jit
    def run(table):
        flat, starts = ids.reshape(-1), np.arange(6) * 4
        dense = {c: se.lookup_bag(table, ids, combiner=c) for c in COMBINERS}
        return dense, {
            c: se.lookup_bag(table, flat, offsets=starts, combiner=c).reshape(out.shape)
            for c, out in dense.items()
        }

    for found in run(jnp.asarray(table)):
        assert found.keys() == expected.keys()
        for combiner, out in found.items():
            np.testing.assert_allclose(
                out, expected[combiner], rtol=1e-5, atol=1e-6, err_msg=combiner
            )


@pytest.mark.parametrize("combiner", COMBINERS)
def test_nothing_to_reduce(combiner):
    table, no_ids = jnp.asarray(TABLE), jnp.zeros(0, jnp.int32)

    def bag(ids, **options):
        return se.lookup_bag(table, ids, combiner=combiner, **options)

    assert bag(jnp.zeros((3, 0), jnp.int32)).tolist() == [[0, 0]] * 3
    assert bag(jnp.zeros((0, 3), jnp.int32)).shape == (0, D)
    assert bag(no_ids, offsets=no_ids).shape == (0, D)
    assert bag(no_ids, segment_ids=no_ids, num_segments=2).tolist() == [[0, 0]] * 2
    assert bag(jnp.array([1]), segment_ids=[0], num_segments=0).shape == (0, D)


def test_vmap_and_scan():
    ids = jnp.array([[0, 1, 2, 5], [3, 3, 1, 0]])
    offsets = jnp.array([[0, 0, 3], [0, 2, 4]])

    def loss(table, ids, offsets, combiner):
        ragged = se.lookup_bag(table, ids, offsets=offsets, combiner=combiner)
        dense = se.lookup_bag(table, ids.reshape(2, 2), combiner=combiner)
        return jnp.sum(ragged**2) + jnp.sum(dense**3)

    @jax.jit
    def grads(table, ids, offsets):
        return [jax.grad(loss)(table, ids, offsets, combiner) for combiner in COMBINERS]

    table = jnp.asarray(TABLE)
    one_by_one = [grads(table, *x) for x in zip(ids, offsets, strict=True)]
    expected = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
    batched = jax.vmap(grads, in_axes=(None, 0, 0))(table, ids, offsets)
    np.testing.assert_allclose(batched, expected, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, x: (c, grads(table, *x)), 0, (ids, offsets))
    np.testing.assert_allclose(scanned, expected, rtol=1e-6)


def test_forward_mode_agrees_with_reverse_mode():
    ids, weights = jnp.array([1, PAD, 2, 0]), jnp.array([0.5, 2.0, -1.5, 1.0])

    def bags(table, weights):
        options = {"offsets": [0, 3], "padding_idx": PAD}
        return [
            *(se.lookup_bag(table, ids, combiner=c, **options) for c in COMBINERS),
            *(se.lookup_bag(table, ids, weights=weights, combiner=c, **options) for c in WEIGHTED),
        ]

    for argnum in (0, 1):
        forward = jax.jit(jax.jacfwd(bags, argnum))(jnp.asarray(TABLE), weights)
        reverse = jax.jit(jax.jacrev(bags, argnum))(jnp.asarray(TABLE), weights)
        np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-6)


# --- bags given wrongly -------------------------------------------------------------------

BAD_OFFSETS = {
    "not from 0": [1, 2, 3],
    "negative": [-1, 0, 2],
    "decreasing": [0, 3, 1],
    "beyond the ids": [0, 2, 5],
    "negative inside": [0, -1, 2],
}


@pytest.mark.parametrize("combiner", COMBINERS)
def test_bad_offsets_are_never_quiet(combiner):
    ids = jnp.array([1, 0, 2, 3])

    def bag(offsets):
        return se.lookup_bag(jnp.asarray(TABLE), ids, offsets=offsets, combiner=combiner)

    compiled = jax.jit(bag)
    assert np.isfinite(compiled(jnp.array([0, 2, 4]))).all()
    for what, offsets in BAD_OFFSETS.items():
        assert np.isnan(compiled(jnp.array(offsets))).all(), what


@pytest.mark.parametrize("bad", BAD_OFFSETS)
def test_bad_offsets_raise_where_their_values_are_known(bad):
    ids, offsets = jnp.array([1, 0, 2, 3]), BAD_OFFSETS[bad]

    def bag(offsets):
        return se.lookup_bag(jnp.asarray(TABLE), ids, offsets=offsets)

    with pytest.raises(ValueError, match="must start at 0, never decrease"):
        bag(jnp.array(offsets))
    with pytest.raises(ValueError, match="must start at 0, never decrease"):
        jax.jit(lambda: bag(np.array(offsets)))()


def test_bad_offsets_of_other_dtypes():
    ids = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"got: offsets \[0, 4294967298\] for 4 ids"):
        se.lookup_bag(jnp.asarray(TABLE), ids, offsets=np.array([0, 2**32 + 2]))

    @jax.jit
    def bag(offsets):
        return se.lookup_bag(jnp.asarray(TABLE), ids, offsets=offsets)

    assert np.isnan(bag(jnp.array([0, 2**32 - 1], jnp.uint32))).all()
    assert np.isnan(bag(jnp.array([0, 200, 100], jnp.uint8))).all()
    assert bag(jnp.array([0, 1], jnp.uint8)).tolist() == [[1, -2], [3, -6]]


def test_offsets_of_a_small_dtype_divide_many_ids():
    ids = jnp.zeros(400, jnp.int32)
    out = se.lookup_bag(jnp.asarray(TABLE), ids, offsets=jnp.array([0, 255], jnp.uint8))
    assert out.tolist() == [[255, -510], [145, -290]]


_IDS, _TABLE = jnp.array([0, 1, 2]), jnp.asarray(TABLE)
WRONG_CALLS = {
    "float ids": (
        lambda: se.lookup_bag(_TABLE, jnp.ones((1, 2))),
        TypeError,
        "se.lookup_bag(table, ids): ids must be integers.",
        "ids float32[1,2]",
        "ids.astype(jnp.int32)",
    ),
    "bool ids": (
        lambda: se.lookup_bag(_TABLE, jnp.ones((1, 2), bool)),
        TypeError,
        "se.lookup_bag(table, ids): ids must be integers.",
        "ids bool[1,2]",
        "ids.astype(jnp.int32)",
    ),
    "an integer table": (
        lambda: se.lookup_bag(jnp.ones((3, 2), jnp.int32), _IDS[None]),
        TypeError,
        "se.lookup_bag(table, ids): table must be an array of floats.",
        "table int32[3,2]",
        "a float array [num_rows, *features]",
    ),
    "an unknown combiner": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], combiner="avg"),
        ValueError,
        "combiner='avg' is unknown.",
        "combiner str",
        "'sum', 'mean', 'sqrtn', 'max', 'min'",
    ),
    "an unknown mode": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], mode="drop"),
        ValueError,
        "se.lookup_bag(table, ids): mode='drop' is unknown.",
        "mode str",
        'mode="fill" or mode="clip"',
    ),
    "padding": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], padding_idx=V),
        ValueError,
        "se.lookup_bag(table, ids): padding_idx=6 is not a row of the table.",
        "a table of 6 rows",
        "a padding_idx in [-6, 6)",
    ),
    "weights of max": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], combiner="max", weights=jnp.ones((1, 3))),
        ValueError,
        "combiner='max' takes no weights.",
        "weights float32[1,3]",
        "combiner='sum', 'mean' or 'sqrtn'",
    ),
    "integer weights": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], weights=jnp.ones((1, 3), jnp.int32)),
        TypeError,
        "weights must be floats.",
        "weights int32[1,3]",
        "weights.astype(jnp.float32)",
    ),
    "weights of another shape": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], weights=jnp.ones(3)),
        ValueError,
        "weights must have the shape of ids",
        "weights float32[3] for ids of shape (1, 3)",
        "jnp.broadcast_to(weights, ids.shape)",
    ),
    "flat ids alone": (
        lambda: se.lookup_bag(_TABLE, _IDS),
        ValueError,
        "flat ids need offsets or segment_ids to divide them.",
        "ids of shape (3,)",
        "ids[None] for a single bag, or offsets=..., or segment_ids=...",
    ),
    "both divisions": (
        lambda: se.lookup_bag(
            _TABLE, _IDS, offsets=jnp.array([0]), segment_ids=_IDS, num_segments=3
        ),
        ValueError,
        "both offsets and segment_ids are given.",
        "offsets int32[1], segment_ids int32[3]",
        "one of them",
    ),
    "offsets of dense ids": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], offsets=jnp.array([0])),
        ValueError,
        "offsets and segment_ids divide flat ids [n].",
        "ids of shape (1, 3)",
        "ids.reshape(-1)",
    ),
    "num_segments of dense ids": (
        lambda: se.lookup_bag(_TABLE, _IDS[None], num_segments=1),
        ValueError,
        "num_segments needs offsets or segment_ids.",
        "num_segments=1 and ids of shape (1, 3)",
        "leave num_segments out",
    ),
    "segment_ids without num_segments": (
        lambda: se.lookup_bag(_TABLE, _IDS, segment_ids=_IDS),
        ValueError,
        "segment_ids need num_segments, the static number of bags.",
        "segment_ids int32[3] and no num_segments",
        "num_segments=batch_size",
    ),
    "segment_ids of another length": (
        lambda: se.lookup_bag(_TABLE, _IDS, segment_ids=_IDS[:2], num_segments=3),
        ValueError,
        "segment_ids must name one bag for each id.",
        "segment_ids int32[2] for 3 ids",
        "segment_ids of the shape of ids",
    ),
    "float segment_ids": (
        lambda: se.lookup_bag(_TABLE, _IDS, segment_ids=jnp.ones(3), num_segments=3),
        TypeError,
        "segment_ids must be integers.",
        "segment_ids float32[3]",
        "segment_ids.astype(jnp.int32)",
    ),
    "float offsets": (
        lambda: se.lookup_bag(_TABLE, _IDS, offsets=jnp.zeros(1)),
        TypeError,
        "offsets must be integers.",
        "offsets float32[1]",
        "offsets.astype(jnp.int32)",
    ),
    "offsets of two axes": (
        lambda: se.lookup_bag(_TABLE, _IDS, offsets=jnp.array([[0, 1]])),
        ValueError,
        "offsets must hold where each bag starts, one number a bag.",
        "offsets int32[1,2], num_segments=None",
        "offsets [b + 1] with num_segments=b",
    ),
    "offsets of another length": (
        lambda: se.lookup_bag(_TABLE, _IDS, offsets=jnp.array([0, 1]), num_segments=3),
        ValueError,
        "offsets must hold where each bag starts, one number a bag.",
        "offsets int32[2], num_segments=3",
        "offsets [b + 1] with num_segments=b",
    ),
    "bad offsets": (
        lambda: se.lookup_bag(_TABLE, _IDS, offsets=[0, 4]),
        ValueError,
        "offsets must start at 0, never decrease and not exceed len(ids).",
        "offsets [0, 4] for 3 ids",
        "offsets = jnp.cumsum(lengths) - lengths",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_a_wrong_call_says_what_to_write(wrong):
    call, error, wrote, got, instead = WRONG_CALLS[wrong]
    pattern = ".*\n  got: ".join(map(re.escape, (wrote, got)))
    with pytest.raises(error, match=f"(?s){pattern}.*\n  write: .*{re.escape(instead)}"):
        call()


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_other_rows_of_a_bag_keep_their_gradient(combiner):
    """An id out of range makes its bag NaN; it alone gets no gradient."""
    ids = jnp.array([[0, 3, 25], [1, 1, 2]])

    def total(table, weights=None):
        return se.lookup_bag(table, ids, combiner=combiner, weights=weights).sum()

    got = jax.grad(total)(jnp.ones((5, 2)))
    np.testing.assert_allclose(got, jax.grad(total)(jnp.ones((5, 2)), jnp.ones(ids.shape)))
    assert (np.asarray(got)[[0, 3]] != 0).all()
