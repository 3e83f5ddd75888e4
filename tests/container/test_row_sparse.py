"""The container: its arithmetic against dense arrays, and what stock transforms make of it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_blocks

import sparse_embed as se

SHAPE = (7, 3)
INDICES = {
    "no repeats": [4, 0, 6],
    "all the same": [2, 2, 2, 2],
    "first and last": [0, 6, 0],
    "padding": [7, 3, 100, 8, 3],
    "negative": [-1, 3, -7],
    "empty": [],
    "more than rows": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
}


def example(name, dtype=jnp.float32):
    indices = np.array(INDICES[name], np.int32)
    rows = np.random.default_rng(0).normal(size=(len(indices), SHAPE[1]))
    return se.RowSparse(indices, jnp.asarray(rows, dtype), SHAPE)


def dense(grad):
    """float64 reference: a loop over the list."""
    out = np.zeros(grad.shape, np.float64)
    for i, row in zip(np.asarray(grad.indices), np.asarray(grad.rows, np.float64), strict=True):
        if 0 <= i < grad.shape[0]:
            out[i] += row
    return out


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_todense(name, dtype, maybe_jit):
    grad = example(name, dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    out = maybe_jit(lambda g: g.todense())(grad)
    assert out.shape == SHAPE and out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(grad), tolerance, tolerance)


@pytest.mark.parametrize("name", INDICES)
def test_arithmetic(name, maybe_jit):
    grad = example(name)
    table = jnp.arange(21.0).reshape(SHAPE)
    close = lambda got, want: np.testing.assert_allclose(got, want, 1e-5, 1e-6)  # noqa: E731
    close(maybe_jit(lambda g: (g + g).todense())(grad), 2 * dense(grad))
    close(maybe_jit(lambda g: (-g).todense())(grad), -dense(grad))
    close(maybe_jit(lambda g: (g * 0.5).todense())(grad), 0.5 * dense(grad))
    close(maybe_jit(lambda g: (3 * g).todense())(grad), 3 * dense(grad))
    close(maybe_jit(lambda t, g: t + g)(table, grad), table + dense(grad))
    close(maybe_jit(lambda t, g: g + t)(table, grad), table + dense(grad))
    close(np.asarray(table) + grad, table + dense(grad))
    updated = maybe_jit(lambda t, g: optax.apply_updates({"t": t}, {"t": g}))(table, grad)
    close(updated["t"], table + dense(grad))


def test_a_bfloat16_table_is_rounded_once_as_in_dense_arithmetic():
    table = jnp.full((2, 1), 256.0, jnp.bfloat16)
    grad = se.RowSparse(jnp.array([1]), jnp.array([[1.0078125]], jnp.float32), (2, 1))
    np.testing.assert_array_equal(
        optax.apply_updates(table, grad), optax.apply_updates(table, grad.todense())
    )


def test_properties_and_pytree():
    grad = example("padding")
    assert (grad.num_rows, grad.ndim, grad.dtype, grad.shape) == (7, 2, jnp.float32, SHAPE)
    leaves, treedef = jax.tree.flatten(grad)
    again = treedef.unflatten(leaves)
    np.testing.assert_array_equal(again.todense(), grad.todense())
    assert jax.jit(lambda g: g)(grad).shape == SHAPE  # static
    stacked = jax.lax.map(lambda s: grad * s, jnp.arange(3.0))
    one = jax.tree.map(lambda x: x[2], stacked)
    np.testing.assert_allclose(one.todense(), 2 * grad.todense(), 1e-6)


def test_gradients_of_several_batches_add_up():
    a, b = example("no repeats"), example("all the same")
    want = (dense(a) + dense(b)) / 2
    np.testing.assert_allclose((sum([a, b]) / 2).todense(), want, 1e-5, 1e-6)
    np.testing.assert_allclose((a - b).todense(), dense(a) - dense(b), 1e-5, 1e-6)


def test_stacked_containers_are_not_taken_for_one():
    """Found in review: repeats between the entries of a stack were lost under the scatter hints."""
    table = jnp.ones(SHAPE)
    ids = jnp.array([[1, 2], [2, 3]])
    stack = jax.vmap(lambda i: se.grad(lambda t: jnp.sum(jnp.sin(t[i])))(table))(ids)
    for use in (lambda g: g.todense(), lambda g: table + g, se.global_norm, se.coalesce):
        with pytest.raises(ValueError, match=r"(?s)stacked or batched.*got: .*write: .*reshape"):
            use(stack)
    flat = se.RowSparse(stack.indices.reshape(-1), stack.rows.reshape(-1, SHAPE[1]), SHAPE)
    want = jax.grad(lambda t: jnp.sum(jnp.sin(t[ids])))(table)
    np.testing.assert_allclose(flat.todense(), want, 1e-6)


# --- a tree-mapped transform cannot take row numbers for numbers ---------------------------------

ADVICE = "whole chain inside se.lazy"
HARM = {
    "scale by a float": lambda g: optax.tree.scale(0.5, g),
    "scale(-1)": lambda g: optax.tree.scale(-1, g),
    "negate": lambda g: jax.tree.map(jnp.negative, g),
    "a constant schedule of 2": lambda g: optax.scale_by_schedule(lambda count: 2).update(
        g, optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    )[0],
    "sgd": lambda g: optax.sgd(0.1).update(g, optax.sgd(0.1).init(g))[0],
    "momentum": lambda g: optax.trace(0.9).update(g, optax.trace(0.9).init(g))[0],
    "scale_by_rss": lambda g: optax.scale_by_rss().update(g, optax.scale_by_rss().init(g))[0],
    "scale_by_sign": lambda g: optax.scale_by_sign().update(g, optax.EmptyState())[0],
    "clip": lambda g: optax.clip(1).update(g, optax.EmptyState())[0],
    "clip by a float": lambda g: optax.clip(0.5).update(g, optax.EmptyState())[0],
    "clip_by_global_norm": lambda g: optax.clip_by_global_norm(1.0).update(g, None)[0],
    "clip_by_block_rms": lambda g: optax.clip_by_block_rms(1.0).update(g, None)[0],
    "normalize": lambda g: optax.normalize_by_update_norm().update(g, optax.EmptyState())[0],
    "noise": lambda g: optax.add_noise(1.0, 0.5, 0).update(g, optax.add_noise(1.0, 0.5, 0).init(g)),
    "twice": lambda g: optax.tree.add(g, g),
    "mean of two": lambda g: jax.tree.map(lambda a, b: (a + b) / 2, g, g),
    "cast": lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g),
    "round": lambda g: jax.tree.map(jnp.round, g),
    "norm": optax.tree.norm,
    "l1 norm": lambda g: optax.tree.norm(g, ord=1),
    "max norm": lambda g: optax.tree.norm(g, ord=jnp.inf),
    "sum": optax.tree.sum,
    "inner product": lambda g: optax.tree.vdot(g, g),
    "mean of squares": lambda g: sum(jnp.mean(x**2) for x in jax.tree.leaves(g)),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_would_change_or_count_row_numbers_raises_while_tracing(harm):
    with pytest.raises((TypeError, ValueError, AssertionError), match=ADVICE):
        jax.eval_shape(HARM[harm], example("no repeats"))
    # Outside jit it raises as well, though jax does not always come to speak of the dtype.
    with pytest.raises((TypeError, ValueError, AssertionError, NotImplementedError)):
        HARM[harm](example("no repeats"))


def _same(g):
    return g


PASSES = {
    "identity": _same,
    "jit": lambda g: jax.jit(_same)(g),
    "scan": lambda g: jax.lax.scan(lambda c, _: (c, None), g, jnp.arange(2))[0],
    "stacked by scan": lambda g: jax.tree.map(
        lambda x: x[1], jax.lax.scan(lambda c, _: (c, g), 0, jnp.arange(2))[1]
    ),
    "cond": lambda g: jax.lax.cond(jnp.array(True), _same, _same, g),
    "while": lambda g: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1]), (0, g))[
        1
    ],
    "vmap": lambda g: jax.tree.map(
        lambda x: x[0], jax.vmap(lambda s: jax.tree.map(_same, g), axis_size=2, in_axes=None)(0)
    ),
    "checkpoint": lambda g: jax.checkpoint(_same)(g),
    "where": lambda g: jax.tree.map(lambda x: jnp.where(True, x, x), g),
    "zero_nans": lambda g: optax.zero_nans().update(g, optax.zero_nans().init(g))[0],
    "stop_gradient": jax.lax.stop_gradient,
    "barrier": jax.lax.optimization_barrier,
    "joined": lambda g: jax.tree.map(lambda x: jnp.concatenate([x[:1], x[1:]]), g),
    "cut and joined": lambda g: jax.tree.map(lambda a, b: jnp.concatenate([a[:2], b[2:]]), g, g),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_leaves_row_numbers_alone_passes(name, maybe_jit):
    grad = se.coalesce(example("more than rows"))
    out = maybe_jit(PASSES[name])(grad)
    np.testing.assert_array_equal(out.indices, grad.indices)
    np.testing.assert_array_equal(out.todense(), grad.todense())
    assert out.indices.dtype == grad.indices.dtype and out.shape == grad.shape


@pytest.mark.parametrize("name", ["pickle", "deepcopy", "device_put", "to another device"])
def test_it_is_saved_and_moved(name):
    grad = example("padding")
    out = {
        "pickle": lambda: pickle.loads(pickle.dumps(grad)),
        "deepcopy": lambda: copy.deepcopy(grad),
        "device_put": lambda: jax.device_put(grad),
        "to another device": lambda: jax.device_put(grad, jax.devices()[1]),
    }[name]()
    np.testing.assert_array_equal(out.indices, grad.indices)
    np.testing.assert_array_equal(out.todense(), grad.todense())


MIXED = {
    "reversed": lambda x: x[::-1],
    "one entry again and again": lambda x: x[jnp.array([1, 1, 2, 0])],
    "joined": lambda x: jnp.concatenate([x, x]),
    "cut and joined": lambda x: jnp.concatenate([x[:2], x[:2]]),
    "chosen": lambda x: jnp.where(
        jnp.array([True, False, True, False]).reshape(-1, *(1,) * (x.ndim - 1)), x, x[::-1]
    ),
}


@pytest.mark.parametrize("rows", [2, 2048])
@pytest.mark.parametrize("name", MIXED)
def test_what_a_map_makes_of_a_coalesced_list_may_repeat_rows(name, rows, maybe_jit):
    """Found in review: such lists were taken for coalesced, and rows were lost."""
    grad = se.coalesce(se.RowSparse([0, 1, 1, 3], jnp.arange(12.0).reshape(4, 3), SHAPE))
    tx = se.lazy(optax.sgd(1.0))

    def use(grad, table):
        mixed = jax.tree.map(MIXED[name], grad)
        updates, _ = tx.update(mixed, tx.init(table), table)
        new = optax.apply_updates(table, updates)
        return mixed.indices, mixed.rows, mixed.todense(), new, se.global_norm(mixed)

    with small_blocks(rows):
        indices, listed, got, new, norm = maybe_jit(use)(grad, jnp.ones(SHAPE))
    want = dense(se.RowSparse(indices, listed, SHAPE))
    np.testing.assert_allclose(got, want, 1e-6)
    np.testing.assert_allclose(new, 1 - want, 1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(want), 1e-6)


def test_a_callback_on_the_host_sees_row_numbers():
    """jax gives a callback the words of an extended dtype."""
    grad, seen = example("no repeats"), []

    def look(g):
        seen.append((np.asarray(g.indices).tolist(), np.asarray(g.rows).tolist()))
        return np.float32(0)

    jax.jit(lambda g: jax.pure_callback(look, jax.ShapeDtypeStruct((), jnp.float32), g))(grad)
    assert seen == [(grad.indices.tolist(), grad.rows.tolist())]


def test_row_numbers_that_are_sharded_under_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        indices = jax.device_put(jnp.arange(4), spec("d"))
        grad = se.RowSparse(indices, jax.device_put(jnp.ones((4, 3)), spec("d", None)), SHAPE)
        assert jax.jit(lambda g: g.indices)(grad).tolist() == [0, 1, 2, 3]


def test_a_table_taller_than_its_row_numbers_reach():
    grad = se.RowSparse(jnp.array([1, 2]), jnp.ones((2, 1)), (3_000_000_000, 1))
    assert jax.jit(lambda g: g * 2)(grad).rows.tolist() == [[2.0], [2.0]]


def test_set_to_zero_lists_nothing(maybe_jit):
    grad = se.coalesce(example("no repeats"))
    out = maybe_jit(lambda g: optax.set_to_zero().update(g, optax.EmptyState())[0])(grad)
    assert out.indices.tolist() == [-1, -1, -1]  # padding
    table = jnp.ones(SHAPE)
    np.testing.assert_array_equal(maybe_jit(lambda t, g: t + g)(table, out), table)
    tx = se.lazy(optax.adam(0.1))
    _, state = tx.update(grad, tx.init(table), table)
    updates, state = maybe_jit(tx.update)(out, state, table)
    np.testing.assert_array_equal(optax.apply_updates(table, updates), table)


def test_row_numbers_of_64_bits():
    with jax.enable_x64(True):
        tall = (2**40, 1)
        indices = jnp.array([2**39, 3, 2**40], jnp.int64)
        grad = se.RowSparse(indices, jnp.ones((3, 1)), tall)
        again = jax.jit(lambda g: g)(grad)
        assert again.indices.dtype == jnp.int64
        assert again.indices.tolist() == indices.tolist()


@pytest.mark.parametrize(
    "dtype, given, kept",
    [
        (np.int8, [-1, 3], [-1, 3]),
        (np.uint8, [255, 3], [255, 3]),
        (np.uint32, [2**32 - 1, 3], [2**31 - 1, 3]),
        (np.int64, [2**32 + 3, 3], [2**31 - 1, 3]),
        (np.int64, [-(2**32) + 3, 3], [-(2**31), 3]),
        (np.uint64, [2**64 - 1, 3], [2**31 - 1, 3]),
    ],
)
def test_indices_of_any_integer_dtype_never_wrap(dtype, given, kept):
    grad = se.RowSparse(np.array(given, dtype), jnp.ones((2, 3)), SHAPE)
    assert grad.indices.dtype == jnp.int32 and grad.indices.tolist() == kept
    assert np.flatnonzero(grad.todense()[:, 0]).tolist() == [3]


def test_placeholders_go_in_and_out():
    """jax unflattens with whatever it likes; shapes alone are there while a step is lowered."""
    grad = example("no repeats")
    treedef = jax.tree.structure(grad)
    for leaf in (None, 0, object(), "x", jax.sharding.PartitionSpec()):
        assert jax.tree.leaves(treedef.unflatten([leaf, leaf]), is_leaf=lambda x: x is None) == [
            leaf,
            leaf,
        ]
    shapes = jax.eval_shape(_same, grad)
    assert (shapes.indices.shape, shapes.indices.dtype) == ((3,), jnp.int32)
    assert shapes.rows.shape == (3, 3)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_row_numbers_are_plain_integers_on_every_platform(platform):
    def step(grad, flag):
        grad = jax.lax.cond(flag, _same, lambda g: jax.tree.map(jnp.zeros_like, g), grad)
        return jax.lax.scan(lambda c, _: (c, None), grad, jnp.arange(2))[0]

    traced = jax.jit(step).trace(example("no repeats"), True)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "tensor<3x1xui32>" in text and "custom_call" not in text


def test_no_tracer_is_kept():
    grad = example("no repeats")
    jax.jit(lambda: grad.indices + len(jax.tree.leaves(grad)))()
    crossed = jax.jit(_same)(grad)
    jax.jit(lambda: crossed.indices + 1)()
    assert crossed.indices.tolist() == grad.indices.tolist()
    assert jax.tree.leaves(crossed)[0].shape == (3,)


@pytest.mark.parametrize(
    "build, error, text",
    [
        (lambda: se.RowSparse(jnp.ones(2), jnp.ones((2, 3)), SHAPE), TypeError, "integers"),
        (lambda: se.RowSparse(jnp.zeros(2, int), jnp.ones((3, 3)), SHAPE), ValueError, r"\[n\]"),
        (lambda: se.RowSparse(jnp.zeros((2, 1), int), jnp.ones((2, 1, 3)), SHAPE), ValueError, ""),
        (lambda: jnp.ones((7, 4)) + example("empty"), ValueError, "different shapes"),
        (
            lambda: example("empty") + se.RowSparse(jnp.zeros(0, int), jnp.zeros((0, 3)), (8, 3)),
            ValueError,
            "different shapes",
        ),
        (lambda: example("empty") * jnp.ones(3), ValueError, "must be a scalar"),
        (lambda: se.coalesce(jnp.ones(3)), TypeError, "must be a RowSparse"),
    ],
)
def test_bad_input(build, error, text):
    with pytest.raises(error, match=f"(?s){text}.*got: .*write: "):
        build()
