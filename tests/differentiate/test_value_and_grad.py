"""`value_and_grad`: the laws that hold for every program of `programs.py`, against dense JAX."""

import functools
import inspect
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import count_compilations
from programs import PROGRAMS, D, Program, head
from view_programs import PLAIN

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


def assert_same(got, want, ulps=0):
    """Equal to the bit, NaN and the sign of zero included; other things than arrays: equal."""
    got, want = (jax.tree.flatten(x, is_leaf=lambda x: x is None) for x in (got, want))
    assert got[1] == want[1]
    for a, b in zip(got[0], want[0], strict=True):
        if not isinstance(b, jax.Array):
            assert type(a) is type(b) and a == b
            continue
        assert isinstance(a, jax.Array) and (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        if ulps:
            np.testing.assert_array_max_ulp(a, b, ulps)
        else:
            assert a.tobytes() == b.tobytes(), f"{a} is not {b}"


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
    program = outcome.program
    ulps = program.ulps if outcome.mode == "eager" else program.jit_ulps
    assert_same(outcome.result[0], outcome.dense[0], ulps)


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
    assert len(texts) == len(outcome.program.warns), texts
    for leaf, operation in outcome.program.warns.items():
        (text,) = (t for t in texts if f"['{leaf}']" in t.splitlines()[0])
        assert f"`{operation}`" in text
        assert "programs.py:" in text or "flax" in text, "no source line"


def test_row_sparse_gradients_list_each_row_read_once(outcome):
    program = outcome.program
    for path, grad in named_leaves(outcome.result[1]):
        if not is_row_sparse(grad):
            continue
        indices, rows = np.asarray(grad.indices), np.asarray(grad.rows)
        assert indices.dtype == np.int32
        assert np.all(np.diff(indices) > 0) and np.all(indices >= 0)
        assert grad.row_axes == program.axes(path)
        num_rows = grad.num_rows
        assert not np.any(rows[indices >= num_rows])
        expected = program.rows(outcome.batch, path, program.listed, num_rows)
        if expected is not None:
            np.testing.assert_array_equal(indices[indices < num_rows], expected)


def test_no_temporary_array_is_as_large_as_a_table(outcome):
    if outcome.mode == "jit" and outcome.program.sparse and outcome.program.lean:
        table = max(x.nbytes for x in jax.tree.leaves(outcome.params))
        assert outcome.temp < table / 2


@pytest.mark.parametrize("program", PLAIN, ids=lambda program: program.name)
def test_a_step_through_a_view_is_row_sparse(program):
    """All of the table and its moments in place; and the numbers of dense optax where it read."""
    params, batch = program.params(), program.batch()
    tx, dense = se.lazy(optax.adam(0.1)), optax.adam(0.1)
    step = se.train_step(program.loss, tx)
    se.assert_row_sparse(step, params, tx.init(params), batch)
    grads = jax.grad(program.loss)(params, batch)
    want, _ = dense.update(grads, dense.init(params), params)
    want = jax.tree.map(lambda x, u, g: np.where(g != 0, x + u, x), params, want, grads)
    new, _, _ = step(jax.tree.map(jnp.copy, params), tx.init(params), batch)
    for name, x in new.items():
        np.testing.assert_allclose(x, want[name], 1e-4, 1e-5, err_msg=name)


# --- the comparisons compare ----------------------------------------------------------------


def test_a_difference_is_noticed():
    ones = jnp.ones(2)
    assert_same({"a": ones, "b": None}, {"a": ones, "b": None})
    for other in (
        ones.at[1].set(1 + 1e-7),
        -ones,
        ones.astype(jnp.bfloat16),
        jnp.ones((2, 1)),
        1.0,
    ):
        with pytest.raises(AssertionError):
            assert_same({"a": ones, "b": None}, {"a": other, "b": None})
    with pytest.raises(AssertionError):
        assert_same(jnp.zeros(1), -jnp.zeros(1))
    with pytest.raises(AssertionError):
        assert_same({"a": ones}, {"b": ones})
    assert_close(ones, ones * (1 + 1e-6), 1e-5)
    for other in (
        ones.at[1].set(1 + 1e-4),
        ones.at[1].set(jnp.nan),
        ones[:1],
        ones.astype(jnp.int32),
    ):
        with pytest.raises(AssertionError):
            assert_close(ones, other, 1e-5)


# --- sums -----------------------------------------------------------------------------------

SMALL = 50  # rows of a small table


def small(key, dtype=jnp.float32):
    a, b, c = jax.random.split(key, 3)
    return {
        "t": jax.random.normal(a, (SMALL, D), dtype),
        "u": jax.random.normal(b, (SMALL, D), dtype),
        "w": jax.random.normal(c, (D,)),
    }


def small_loss(p, ids):
    rows = p["t"][ids] * jnp.take(p["u"], ids, axis=0)
    return head(rows, p["w"])


LOW = np.array([3, 49, 0, 3, 7, 3], np.int32)  # ids in a small table


def densified(tree):
    """Dense gradients in place of the row-sparse ones."""
    return jax.tree.map(
        lambda g: g.todense() if is_row_sparse(g) else g, tree, is_leaf=is_row_sparse
    )


def assert_grads_close(got, want, rtol=1e-5):
    got = densified(got)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(assert_close, rtol=rtol), got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("where", ["one lookup", "two lookups", "scan", "cast"])
def test_repeats_are_summed_in_float32(dtype, where, maybe_jit):
    # A running sum in bfloat16 stays at 256, where one more is lost in rounding.
    ids = np.full(300, 7)

    def loss(t):
        if where == "one lookup":
            return jnp.sum(t[ids].astype(jnp.float32))
        if where == "two lookups":
            return jnp.sum(t[ids[:150]].astype(jnp.float32)) + jnp.sum(
                t[ids[:150]].astype(jnp.float32)
            )
        if where == "cast":
            return jnp.sum(t.astype(dtype)[ids].astype(jnp.float32))
        add = lambda total, i: (total + jnp.sum(t[i].astype(jnp.float32)), None)  # noqa: E731
        return jax.lax.scan(add, 0.0, ids)[0]

    table = jnp.zeros((SMALL, 2), jnp.float32 if where == "cast" else dtype)
    grad = maybe_jit(se.grad(loss))(table)
    assert grad.dtype == table.dtype
    assert grad.todense()[7].tolist() == [300.0, 300.0]


def test_the_same_bits_each_time(key):
    params, ids = small(key), jax.random.randint(key, (1000,), 0, SMALL)
    compiled = jax.jit(se.value_and_grad(small_loss))
    assert_same(compiled(params, ids), compiled(params, ids))
    eager = se.value_and_grad(small_loss)
    assert_same(eager(params, ids), eager(params, ids))


# --- inside transformations -----------------------------------------------------------------


def descend(module, p, ids):
    loss, grads = module.value_and_grad(small_loss)(p, ids)
    return jax.tree.map(lambda x, g: x + -0.1 * g, p, grads, is_leaf=is_row_sparse), loss


def test_inside_scan(key):
    params, ids = small(key), jax.random.randint(key, (5, 6), 0, SMALL)
    got, losses = jax.lax.scan(functools.partial(descend, se), params, ids)
    want, dense = jax.lax.scan(functools.partial(descend, jax), params, ids)
    assert_grads_close(got, want)
    assert_close(losses, dense, 1e-5)


def test_inside_fori_loop_of_unknown_length(key):
    params, ids = small(key), jax.random.randint(key, (5, 6), 0, SMALL)

    def train(module, n):
        step = lambda k, p: descend(module, p, ids[k])[0]  # noqa: E731
        return jax.lax.fori_loop(0, n, step, params)

    assert_grads_close(jax.jit(train, static_argnums=0)(se, 5), train(jax, 5))


def test_inside_cond(key):
    params = small(key)

    def maybe(module, flag):
        take = lambda p: descend(module, p, LOW)[0]  # noqa: E731
        return jax.lax.cond(flag, take, lambda p: p, params)

    assert_grads_close(maybe(se, True), maybe(jax, True))
    assert_grads_close(maybe(se, False), params)


def test_inside_vmap_over_batches(key, maybe_jit):
    params, ids = small(key), jax.random.randint(key, (5, 6), 0, SMALL)
    ours = jax.vmap(se.value_and_grad(small_loss), in_axes=(None, 0))
    value, grads = maybe_jit(lambda p, i: jax.tree.map(lambda x: x, ours(p, i)))(params, ids)
    want, dense = jax.vmap(jax.value_and_grad(small_loss), in_axes=(None, 0))(params, ids)
    assert_close(value, want, 1e-6)
    for k in range(5):
        one = jax.tree.map(lambda x: x[k] if jnp.ndim(x) else x, grads)  # noqa: B023
        assert_grads_close(one, jax.tree.map(lambda x: x[k], dense))  # noqa: B023


def test_inside_vmap_over_tables(key):
    params = jax.vmap(small)(jax.random.split(key, 3))
    ids = jax.random.randint(key, (3, 6), 0, SMALL)
    got = jax.vmap(lambda p, i: densified(se.grad(small_loss)(p, i)))(params, ids)
    assert_grads_close(got, jax.vmap(jax.grad(small_loss))(params, ids))


def test_inside_shard_map(key):
    params, ids = small(key), jnp.arange(8, dtype=jnp.int32)
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("d",)), jax.sharding.PartitionSpec

    def local(p, ids):
        return densified(se.grad(small_loss)(p, ids))["t"][None]

    specs = {"in_specs": (spec(), spec("d")), "out_specs": spec("d"), "check_vma": False}
    got = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(params, ids).sum(0)
    assert_close(got, jax.grad(small_loss)(params, ids)["t"], 1e-5)


def test_inside_a_checked_shard_map_it_is_refused(key):
    """JAX would sum the gradient of the replicated table over devices; rows cannot be summed so."""
    params, ids = small(key), jnp.arange(8, dtype=jnp.int32)
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("d",)), jax.sharding.PartitionSpec
    local = lambda p, ids: densified(se.grad(small_loss)(p, ids))["t"]  # noqa: E731
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())
    with pytest.raises(ValueError, match=r"(?s)inside shard_map.*got: .*'d'.*write: "):
        jax.jit(mapped)(params, ids)


@pytest.mark.parametrize("name", ["index", "scan", "cond_true", "checkpoint", "custom_vjp_on_rows"])
def test_without_jit(name):
    program = PROGRAMS[name]
    params, batch = program.params(), program.batch()
    with jax.disable_jit():
        value, grads = se.value_and_grad(program.loss)(params, batch)
    want, dense = jax.value_and_grad(program.loss)(params, batch)
    assert is_row_sparse(grads["t"])
    assert_close(value, want, 1e-6)
    assert_grads_close(grads, dense)


SECOND = ["index", "scan", "checkpoint", "cond_true", "two_lookups", "rows_of_norm_1", "lookup"]


@pytest.mark.parametrize("name", SECOND)
def test_hessian_times_vector_forward_over_reverse(name):
    program = PROGRAMS[name]
    params, batch = program.params(), program.batch()
    tangent = jax.tree.map(jnp.cos, params)
    ours, dense = (lambda p, m=m: densified(m.grad(program.loss)(p, batch)) for m in (se, jax))
    got, want = (jax.jit(lambda f=f: jax.jvp(f, (params,), (tangent,)))() for f in (ours, dense))
    assert_grads_close(got, want, 1e-4)


@pytest.mark.parametrize("name", SECOND)
def test_hessian_times_vector_reverse_over_reverse(name):
    program = PROGRAMS[name]
    params, batch = program.params(), program.batch()

    def size(p, module):
        grads = module.grad(program.loss)(p, batch)
        rows = grads["t"].rows if module is se else grads["t"]
        return jnp.sum(jnp.sin(rows)) + jnp.sum(grads["w"] ** 2)

    got, want = (jax.jit(jax.grad(size), static_argnums=1)(params, m) for m in (se, jax))
    assert_grads_close(got, want, 1e-4)


def test_gradient_of_a_gradient_step_is_row_sparse(key):
    params = small(key)

    def after_a_step(p, module):  # as in meta-learning
        grads = densified(module.grad(small_loss)(p, LOW))
        w = p["w"] - 0.1 * grads["w"]
        return head(p["t"][LOW], w)

    got = jax.jit(se.grad(after_a_step), static_argnums=1)(params, se)
    assert is_row_sparse(got["t"])
    assert_grads_close(got, jax.grad(after_a_step)(params, jax), 1e-4)


def test_the_second_call_compiles_nothing(key):
    params = small(key)
    step = jax.jit(se.value_and_grad(small_loss))
    step(params, jnp.asarray(LOW))
    ids = jnp.asarray(LOW[::-1])
    with count_compilations() as compiled:
        step(params, ids)
    assert compiled == []


def test_callbacks_are_called_once(maybe_jit):
    seen = []

    def loss(t, ids):
        rows = t[ids]
        jax.debug.callback(lambda x: seen.append(float(x)), rows[0, 0])
        return jnp.sum(rows)

    maybe_jit(se.value_and_grad(loss))(jnp.ones((SMALL, 2)), jnp.array([3, 3]))
    jax.effects_barrier()
    assert seen == [1.0]


def test_with_64_bits(maybe_jit):
    with jax.enable_x64(True):
        table = jnp.cos(jnp.arange(2.0 * SMALL).reshape(SMALL, 2))
        ids = jnp.array([3, 49, 3, -1])
        assert (table.dtype, ids.dtype) == (jnp.float64, jnp.int64)

        def loss(t, ids):
            h, _ = jax.lax.scan(lambda h, i: (jnp.sin(h + t[i]), None), jnp.zeros(2), ids)
            return jnp.sum(jax.lax.cond(ids[0] > 1, lambda: t[ids] * h, lambda: t[ids]))

        got = maybe_jit(se.grad(loss))(table, ids)
        assert got.indices[:2].tolist() == [3, 49]
        assert_close(got.todense(), jax.grad(loss)(table, ids), 1e-12)


# --- arguments ------------------------------------------------------------------------------


def sides(a, scale, b, *, ids, power=1):
    return jnp.sum(a[ids] * scale) + jnp.sum(b["t"][ids] ** power)


@pytest.mark.parametrize("argnums", [0, 1, 2, -1, -3, (0,), (2, 0), (0, -1), [1, 2]])
def test_argnums(argnums, key, maybe_jit):
    p = small(key)
    args = (p["t"], 2.0, {"t": p["u"]})
    options = {"ids": LOW, "power": 2}
    ours = maybe_jit(lambda *args: se.value_and_grad(sides, argnums)(*args, **options))
    value, grads = ours(*args)
    want, dense = jax.value_and_grad(sides, argnums)(*args, **options)
    assert_close(value, want, 1e-6)
    assert_grads_close(grads, dense)
    sparse = [is_row_sparse(g) for _, g in named_leaves(grads)]
    assert sparse == [x.ndim == 2 for x in jax.tree.leaves(dense)]


def test_an_argument_that_is_not_there():
    with pytest.raises(ValueError, match=re.escape("argnums=2: there is no such positional")):
        se.grad(lambda x, y: x, argnums=2)(1.0, 2.0)


def test_grad_is_the_second_half(key):
    p = small(key)
    assert_same(se.grad(small_loss)(p, LOW), se.value_and_grad(small_loss)(p, LOW)[1])

    def with_aux(p, ids):
        return small_loss(p, ids), {"n": 3}

    (value, aux), grads = se.value_and_grad(with_aux, has_aux=True)(p, LOW)
    assert_same(se.grad(with_aux, has_aux=True)(p, LOW), (grads, {"n": 3}))
    assert aux == {"n": 3}


def test_parameters_of_numpy_and_of_python():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(SMALL, D)), (None, {"s": 2.0, "w": np.float32(3)})]

    def loss(p, ids):
        return jnp.sum(p[0][ids] * p[1][1]["s"] * p[1][1]["w"])

    value, grads = se.value_and_grad(loss)(params, LOW)
    want, dense = jax.value_and_grad(loss)(params, LOW)
    assert_same(value, want)
    assert is_row_sparse(grads[0])
    assert_grads_close(grads, dense)


def test_other_arguments_keep_their_python_values(key):
    def loss(p, ids, how, flags, train=False):
        assert how == "sum" and flags["deep"] is True and isinstance(ids, np.ndarray)
        return jnp.sum(p["t"][ids]) if train else 0.0

    grads = se.grad(loss)(small(key), LOW, "sum", {"deep": True}, train=True)
    assert is_row_sparse(grads["t"])


@pytest.mark.parametrize("value", [2.0, np.float32(2), np.array(2.0)])
def test_a_value_that_is_a_constant(value, key, maybe_jit):
    got, grads = maybe_jit(se.value_and_grad(lambda p: value))(small(key))
    assert got == 2.0
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads))


def both_raise(exception, fun, *args, **options):
    """The text of the error that dense JAX raises; ours is the same, but for printed values."""
    texts = []
    for module in (jax, se):
        with pytest.raises(exception) as caught:
            module.value_and_grad(fun, **options)(*args)
        texts.append(re.split(r"\(?(?:primal=|Array\(|JitTracer)", str(caught.value))[0])
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize(
    "fun, options",
    [
        (lambda p: p["t"][LOW], {}),
        (lambda p: p["t"][LOW].sum().astype(jnp.int32), {}),
        (lambda p: (p["t"][LOW].sum(), 1), {}),
        (lambda p: None, {}),
        (lambda p: p["t"][LOW].sum(), {"has_aux": True}),
        (lambda p: (p["t"][LOW], 1), {"has_aux": True}),
        (lambda p: (1.0, 2.0, 3.0), {"has_aux": True}),
    ],
    ids="rows integer tuple none no-aux rows-aux triple".split(),
)
def test_a_bad_value_raises_the_error_of_jax(fun, options, key):
    both_raise(TypeError, fun, small(key), **options)


def test_integer_leaves_raise_the_error_of_jax():
    params = {"t": jnp.ones((SMALL, 2)), "n": jnp.arange(3)}
    text = both_raise(TypeError, lambda p: jnp.sum(p["t"][LOW]), params)
    assert "int32" in text


def test_a_differentiated_while_loop_raises_the_error_of_jax():
    def loss(t, ids):
        more = lambda c: c[0] < 3  # noqa: E731
        step = lambda c: (c[0] + 1, c[1] + jnp.sum(t[ids[c[0]]]))  # noqa: E731
        return jax.lax.while_loop(more, step, (0, 0.0))[1]

    args = jnp.ones((SMALL, 2)), jnp.asarray(LOW)
    for module in (jax, se):
        with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
            warnings.simplefilter("ignore")
            module.value_and_grad(loss)(*args)
        assert "Reverse-mode differentiation does not work" in str(caught.value)


# --- warnings, and tables= ------------------------------------------------------------------


def line_of(fun, text):
    """`file.py:12` of the first line of a function that contains `text`."""
    lines, start = inspect.getsourcelines(fun)
    number = next(k for k, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(fun)}:{start + number}"


def decayed(p, ids):
    loss = head(p["t"][ids], p["w"])
    return loss + jnp.sum(p["t"] ** 2)  # decay


def expected_text(leaf="p['t']"):
    return (
        f"the gradient of {leaf} is dense: `reduce_sum` needs the whole table.\n"
        f"  got: {leaf} float32[50,8], used at {line_of(decayed, '# decay')}"
    )


def test_the_warning_names_table_operation_and_line(key, maybe_jit):
    with pytest.warns(UserWarning) as warned:
        maybe_jit(se.value_and_grad(decayed))(small(key), LOW)
    (warning,) = warned
    assert str(warning.message).startswith(expected_text())
    assert "tables=" in str(warning.message).splitlines()[2]


def test_the_warning_points_at_the_call(key):
    with pytest.warns(UserWarning) as warned:
        se.value_and_grad(decayed)(small(key), LOW)
        se.grad(decayed)(small(key), LOW)
        jax.jit(se.grad(decayed))(small(key), LOW)
    assert [w.filename for w in warned] == 3 * [__file__]


def by_name(*names):
    return lambda path, leaf: leaf.ndim == 2 and path[-1].key in names


def test_tables_as_a_predicate(key, maybe_jit):
    params = small(key)
    grads = maybe_jit(se.grad(small_loss, tables=by_name("u")))(params, LOW)
    assert [is_row_sparse(grads[k]) for k in "tuw"] == [False, True, False]
    assert_grads_close(grads, jax.grad(small_loss)(params, LOW))


def test_tables_as_a_tree(key, maybe_jit):
    params = small(key)
    tables = {"t": True, "u": False, "w": False}
    grads = maybe_jit(se.grad(small_loss, tables=tables))(params, LOW)
    assert [is_row_sparse(grads[k]) for k in "tuw"] == [True, False, False]
    assert_grads_close(grads, jax.grad(small_loss)(params, LOW))


def test_tables_for_several_arguments(key):
    p = small(key)
    args = (p["t"], 2.0, {"t": p["u"]})
    grads = se.grad(sides, (0, 2), tables=(True, {"t": False}))(*args, ids=LOW)
    assert is_row_sparse(grads[0]) and not is_row_sparse(grads[1]["t"])


def test_tables_like_another_tree(key):
    with pytest.raises(ValueError, match="tables=: the tree of bools must be like"):
        se.grad(small_loss, tables={"t": True})(small(key), LOW)


def test_a_named_table_that_is_used_whole_is_an_error(key, maybe_jit):
    with pytest.raises(ValueError) as caught:
        maybe_jit(se.grad(decayed, tables=by_name("t")))(small(key), LOW)
    assert str(caught.value).startswith(expected_text())


def test_a_table_that_is_not_named_is_dense_without_a_word(key):
    params = small(key)
    grads = se.grad(decayed, tables=by_name("u"))(params, LOW)
    assert not is_row_sparse(grads["t"])
    assert grads["u"].indices.shape == (0,)
    assert_grads_close(grads, jax.grad(decayed)(params, LOW))


@pytest.mark.parametrize("name", [name for name, p in PROGRAMS.items() if p.warns])
def test_every_whole_use_of_a_named_table_is_an_error(name):
    program = PROGRAMS[name]
    params, batch = jax.eval_shape(program.params), program.batch()
    named = lambda path, leaf: program.is_named(path, program.warns)  # noqa: E731
    with pytest.raises(ValueError, match="needs the whole table"):
        jax.eval_shape(se.grad(program.loss, tables=named), params, batch)


SILENT = ["l2_alone", "one_hot", "scan_over_table"]


@pytest.mark.parametrize("name", SILENT)
def test_a_named_leaf_that_is_not_looked_up_is_an_error(name):
    program = PROGRAMS[name]
    params, batch = jax.eval_shape(program.params), program.batch()
    with pytest.raises(ValueError, match="needs the whole table"):
        jax.eval_shape(
            se.grad(program.loss, tables=lambda path, _: "t" in str(path)), params, batch
        )


def test_constant_rows_of_a_named_table_are_lookups(key):
    params = small(key)

    def loss(p):
        return head(p["t"][3], p["w"]) + head(p["t"][2:10:2], p["w"]) + head(p["t"][-1], p["w"])

    grads = se.grad(loss, tables=by_name("t"))(params)
    assert grads["t"].indices[:6].tolist() == [2, 3, 4, 6, 8, 49]
    assert_grads_close(grads, jax.grad(loss)(params))


def test_a_named_table_that_is_never_read_lists_nothing(key, maybe_jit):
    grads = maybe_jit(se.grad(lambda p: jnp.sum(p["w"]), tables=by_name("t")))(small(key))
    assert grads["t"].indices.shape == (0,) and grads["t"].shape == (SMALL, D)


# What rows of the table `t` [5, 2] are mixed with, before they are read.
MIXED = {
    "a number": lambda p: p["t"] * p["s"],
    "a vector": lambda p: p["t"] + p["w"],
    "a column": lambda p: p["t"] * p["c"],
    "a row below": lambda p: jnp.concatenate([p["t"], p["w"][None]]),
    "a row above": lambda p: jnp.concatenate([p["w"][None], p["t"]]),
    "another table below": lambda p: jnp.concatenate([p["t"], p["u"] * p["s"]]),
    "a row set": lambda p: p["t"].at[4].set(p["w"]),
    "rows chosen": lambda p: jnp.where((jnp.arange(5) % 3 == 1)[:, None], p["w"], p["t"]),
    "padding": lambda p: jax.lax.pad(p["t"], p["s"], [(1, 1, 0), (0, 0, 0)]),
    "a transposed table": lambda p: (p["t"].T * p["w"][:, None]).T,
}


@pytest.mark.parametrize("mode", [None, "fill", "clip", "drop"])
@pytest.mark.parametrize("mix", MIXED)
def test_what_rows_are_mixed_with_gets_no_gradient_from_ids_outside(mix, mode):
    """`table[ids]` reads the nearest row at an id outside, and sends no gradient back."""
    rng = np.random.default_rng(0)
    shapes = {"t": (5, 2), "u": (5, 2), "w": (2,), "c": (5, 1), "s": ()}
    params = {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}

    def loss(params, ids):
        view = MIXED[mix](params)
        rows = view[ids] if mode is None else view.at[ids].get(mode=mode)
        return jnp.sum(jnp.where(jnp.isnan(rows), 0.0, jnp.sin(rows) * jnp.arange(1.0, 3.0)))

    ids = jnp.array([0, 5, 4, -7, 6, 19, 2, -1])
    want, got = jax.grad(loss)(params, ids), se.grad(loss)(params, ids)
    assert isinstance(got["t"], se.RowSparse)
    for k in params:
        g = got[k].todense() if isinstance(got[k], se.RowSparse) else got[k]
        np.testing.assert_allclose(g, want[k], 1e-5, 1e-6, err_msg=k)
