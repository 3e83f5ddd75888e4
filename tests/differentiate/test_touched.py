"""`touched` and `check_ids`: which rows a function reads, and whether they exist."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import view_programs  # noqa: F401, adds to PROGRAMS
from jax.experimental import checkify
from programs import GRID, IDS, OTHER, PROGRAMS, D, V, head

import sparse_embed as se

NAMES = [name for name, program in PROGRAMS.items() if program.sparse or program.warns]
NAMES.remove("while_that_makes_ids")  # an error, see below
SMALL = 50  # rows of a small table


def leaves_with_rows(params, rows):
    """`(path, leaf, rows or None)` for each leaf of the parameters."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    found = jax.tree.flatten(rows, is_leaf=lambda x: x is None)
    assert found[1] == treedef
    return [(path, leaf, r) for (path, leaf), r in zip(leaves, found[0], strict=True)]


# --- every program --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    program = PROGRAMS[request.param]
    params, batch = program.params(), program.batch()
    return program, params, batch, jax.jit(se.touched(program.loss))(params, batch)


def test_touched_lists_the_rows_that_are_read(case):
    program, params, batch, rows = case
    of = program.listed if program.touched is None else program.touched
    for path, leaf, indices in leaves_with_rows(params, rows):
        if program.is_named(path, program.warns):
            assert indices is None
        elif program.is_named(path, program.sparse):
            num_rows = math.prod(leaf.shape[a] for a in program.axes(path))
            expected = program.rows(batch, path, of, num_rows)
            if expected is None:
                continue
            indices = np.asarray(indices)
            assert indices.dtype == np.int32 and indices.ndim == 1
            assert np.all(np.diff(indices) > 0) and np.all(indices >= 0)
            np.testing.assert_array_equal(indices[indices < num_rows], expected)


def test_no_other_row_makes_a_difference(case):
    """With NaN in all rows that are not listed, the function returns the same bits."""
    program, params, batch, rows = case

    def poisoned(path, leaf, indices):
        if indices is None:
            return leaf
        axes = program.axes(path)
        sizes = [leaf.shape[a] for a in axes]
        listed = np.asarray(indices)[np.asarray(indices) < math.prod(sizes)]
        where = [slice(None)] * leaf.ndim
        for a, ids in zip(axes, np.unravel_index(listed, sizes), strict=True):
            where[a] = ids
        return jnp.full_like(leaf, jnp.nan).at[*where].set(leaf[*where])

    leaves = [poisoned(*x) for x in leaves_with_rows(params, rows)]
    other = jax.tree.unflatten(jax.tree.structure(params), leaves)
    value = jax.jit(lambda p: jax.tree.leaves(program.loss(p, batch))[0])
    assert np.asarray(value(params)).tobytes() == np.asarray(value(other)).tobytes()


# --- what is not listed ---------------------------------------------------------------------


def small():
    return {"t": jnp.ones((SMALL, D)), "u": jnp.ones((SMALL, D)), "w": jnp.ones(D)}


def test_leaves_used_whole_are_none(maybe_jit):
    def loss(p, ids):
        return head(p["t"][ids] + p["u"][ids], p["w"]) + jnp.sum(p["u"] ** 2)

    rows = maybe_jit(se.touched(loss))(small(), jnp.array([7, 3, 7]))
    assert rows["t"].tolist() == [3, 7, SMALL]
    assert rows["u"] is None and rows["w"] is None


def test_leaves_never_read_are_none():
    rows = se.touched(lambda p: head(1, p["w"]))(small())
    assert rows == {"t": None, "u": None, "w": None}


def test_whole_use_without_a_derivative_counts():
    def loss(p, ids):
        return head(p["t"][ids], p["w"]) * jax.lax.stop_gradient(jnp.max(p["t"]))

    assert se.touched(loss)(small(), jnp.array([3]))["t"] is None


def test_a_table_that_is_returned_is_used_whole():
    def loss(p, ids):
        return head(p["t"][ids], p["w"]), 2 * p["t"]

    assert se.touched(loss)(small(), jnp.array([3]))["t"] is None


def test_rows_under_stop_gradient_are_listed(maybe_jit):
    def loss(p, ids, other):
        return head(p["t"][ids], p["w"]) + head(jax.lax.stop_gradient(p["t"])[other], p["w"])

    args = (small(), jnp.array([7, 3]), jnp.array([9, 3]))
    assert maybe_jit(se.touched(loss))(*args)["t"].tolist() == [3, 7, 9, SMALL]
    assert maybe_jit(se.grad(loss))(*args)["t"].indices.tolist() == [3, 7]


def test_rows_read_only_for_ids_are_listed(maybe_jit):
    def loss(p, ids):
        links = jnp.sum(p["u"][ids], axis=-1).astype(jnp.int32)
        return head(p["t"][links], p["w"])

    rows = maybe_jit(se.touched(loss))(small(), jnp.array([7, 3]))
    assert rows["u"].tolist() == [3, 7]
    assert rows["t"].tolist() == [D, SMALL]


def test_rows_that_only_aux_uses_are_listed():
    def loss(p, ids):
        return jnp.sum(p["w"]), p["t"][ids]

    assert se.touched(loss)(small(), jnp.array([7, 3]))["t"].tolist() == [3, 7]


def test_ids_outside_the_table_are_not_listed(maybe_jit):
    ids = jnp.array([SMALL, 3, -SMALL - 1])
    rows = maybe_jit(se.touched(lambda t: jnp.take(t, ids, axis=0)))(jnp.ones((SMALL, 2)))
    assert rows[0] == 3 and np.all(rows[1:] >= SMALL)
    # Here the nearest row is read, though it gets no gradient.
    rows = maybe_jit(se.touched(lambda t: t[ids]))(jnp.ones((SMALL, 2)))
    assert rows.tolist() == [0, 3, SMALL - 1]


def test_rows_in_a_while_loop_cannot_be_listed():
    def loss(p, n):
        step = lambda c: (c[0] + 1, c[1] + jnp.sum(p["t"][c[0]]))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < n, step, (0, 0.0))[1]

    with pytest.raises(ValueError) as caught:
        se.touched(loss)(small(), 3)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("se.touched(fun): rows are read inside a while_loop")
    assert second == "  got: p['t']"
    assert "jax.lax.scan" in third


def test_argnums():
    def both(a, ids, b):
        return jnp.sum(a[ids]) + jnp.sum(b[ids])

    tables = jnp.ones((SMALL, 2)), jnp.array([7, 3]), jnp.ones((9, 2))
    assert [r.tolist() for r in se.touched(both, (0, -1))(*tables)] == [[3, 7], [3, 7]]
    assert se.touched(both, 2)(*tables).tolist() == [3, 7]


def test_integer_tables_are_listed_too():
    rows = se.touched(lambda t, ids: t[ids])(jnp.ones((SMALL, 2), jnp.int32), jnp.array([4, 1]))
    assert rows.tolist() == [1, 4]


def test_what_is_not_a_loss():
    rows = se.touched(lambda t, ids: {"rows": t[ids], "n": 3})(
        jnp.ones((SMALL, 2)), GRID[:, :1] % 8
    )
    assert rows.tolist() == [3, 5, 6, 7]


# --- check_ids ------------------------------------------------------------------------------


def looks_up(p, ids, other):
    rows = p["user"][ids]  # first
    items = jax.lax.map(lambda i: jnp.take(p["item"], i, axis=0), other)  # second
    return jnp.sum(rows) + jnp.sum(items)


def line_of(text):
    lines, start = inspect.getsourcelines(looks_up)
    return f"test_touched.py:{start + next(k for k, line in enumerate(lines) if text in line)}"


TABLES = {"user": jnp.ones((6, 2)), "item": jnp.ones((9, 2))}
GOOD = np.array([0, 5, 3], np.int32)


@pytest.mark.parametrize(
    "ids, other, expected",
    [
        (GOOD, GOOD, None),
        (GOOD[:0], GOOD[:0], None),
        ([0, 6, 3], GOOD, ("id 6 ", "p['user'] float32[6,2]", "# first")),
        (GOOD, [0, 99, 8], ("id 99 ", "p['item'] float32[9,2]", "# second")),
        (GOOD, [0, -10, 8], ("id -1 ", "p['item'] float32[9,2]", "# second")),
    ],
    ids="good nothing user item negative".split(),
)
def test_check_ids(ids, other, expected, maybe_jit):
    check = maybe_jit(checkify.checkify(se.check_ids(looks_up)))
    error, _ = check(TABLES, jnp.asarray(ids), jnp.asarray(other))
    text = error.get()
    if expected is None:
        assert text is None
        return
    number, table, line = expected
    assert text.startswith(f"{number}is out of range for {table}")
    assert line_of(line) in text


def test_check_ids_raises_at_once():
    se.check_ids(looks_up)(TABLES, jnp.asarray(GOOD), jnp.asarray(GOOD))
    with pytest.raises(Exception, match=r"id 6 is out of range for p\['user'\]"):
        se.check_ids(looks_up)(TABLES, jnp.array([6]), jnp.asarray(GOOD))


@pytest.mark.parametrize(
    "name", ["index", "nested_scan", "switch", "lookup_padding", "lookup_bag_sum_padding"]
)
def test_check_ids_lets_good_programs_pass(name):
    program = PROGRAMS[name]
    check = jax.jit(checkify.checkify(se.check_ids(program.loss)))
    error, _ = check(program.params(), program.batch())
    assert error.get() is None


@pytest.mark.parametrize(
    "name, bad",
    [("outside_take_clip", V), ("outside_promise_no_wrap", V), ("lookup_outside", V)],
)
def test_check_ids_finds_the_bad_ones(name, bad):
    program = PROGRAMS[name]
    error, _ = checkify.checkify(se.check_ids(program.loss))(program.params(), program.batch())
    assert f"id {bad} is out of range for p['t']" in error.get()


@pytest.mark.parametrize("bag", [False, True], ids=["lookup", "lookup_bag"])
@pytest.mark.parametrize("bad", [99, -1])
def test_check_ids_names_the_id_and_the_line_of_our_own_lookups(bag, bad):
    def loss(t, ids):
        return se.lookup_bag(t, ids[None]) if bag else se.lookup(t, ids)

    check = checkify.checkify(se.check_ids(loss))
    text = check(jnp.ones((SMALL, 2)), jnp.array([3, bad]))[0].get()
    assert text.startswith(f"id {bad} is out of range for t float32[50,2]")
    assert "test_touched.py" in text


def test_ids_of_an_untaken_branch_are_not_checked():
    def loss(t, flag):
        bad = jnp.array([99])
        return jax.lax.cond(flag, lambda: jnp.sum(t[bad]), lambda: jnp.sum(t[IDS[:1]] + len(OTHER)))

    check = checkify.checkify(se.check_ids(loss))
    assert check(jnp.ones((SMALL, 2)), False)[0].get() is None
    assert "id 99 " in check(jnp.ones((SMALL, 2)), True)[0].get()


@pytest.mark.parametrize("read", [se.lookup, lambda t, i: jnp.take(t, i, axis=0)])
def test_check_ids_finds_the_largest_integer(read):
    check = se.check_ids(lambda table, ids: read(table, ids).sum())
    with pytest.raises(Exception, match="id 2147483647 is out of range"):
        check(jnp.ones((6, 2)), np.array([1, 2**31 - 1], np.int32))
