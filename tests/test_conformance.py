"""`se.lazy`: the laws that hold for every row of `conformance.py`, against dense optax."""

import functools
import pickle
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    PAGE,
    SHAPES,
    SUBJECTS,
    TABLES,
    Subject,
    exact,
    kinds,
    lazy,
    makes_a_transformation,
    page,
    present,
    public_names,
    tables,
    unclassified,
)
from flax import nnx
from flax.training import train_state
from helpers import count_compilations

import sparse_embed as se

STEPS = 12
LISTED = 5  # indices of a step's gradient, for each table
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}

PRESENT = [s for s in SUBJECTS if present(s)]
ACCEPTED = [s for s in PRESENT if s.accepted]
REFUSED = [s for s in PRESENT if s.verdict == "refused"]
FOREIGN = [s for s in PRESENT if s.verdict == "not applicable"]


def over(subjects):
    return pytest.mark.parametrize("subject", subjects, ids=lambda s: s.label)


# --- the oracle: dense optax, and rows that are not listed put back -------------------------------


def new_params(leaves=tuple(SHAPES), shapes=SHAPES, dtype=jnp.float32) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    drawn = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    return {name: jnp.asarray(x, dtype) for name, x in drawn.items() if name in leaves}


@functools.cache
def batches(steps: int = STEPS) -> list[dict[str, Any]]:
    """For each step `(indices, rows)` for a table and an array for any other leaf.

    Indices repeat; some rows have the gradient zero; some indices are padding; in one step all are.
    Most rows of `users` are never listed.
    """
    draw = np.random.default_rng(1)
    found = []
    for step in range(steps):
        batch: dict[str, Any] = {}
        for name, shape in SHAPES.items():
            if name not in TABLES:
                batch[name] = draw.normal(size=shape).astype(np.float32)
                continue
            height = shape[0]
            choice = [*range(min(height, 8)), height - 1]
            indices = draw.choice(choice, LISTED).astype(np.int32)
            rows = draw.normal(size=(LISTED, *shape[1:])).astype(np.float32)
            indices[1] = indices[0]
            if step % 3 == 1:
                rows[indices == indices[2]] = 0
            if step % 4 == 2:
                indices[3:] = height + 3, -1
            if step == 5:
                indices[:] = height
            batch[name] = indices, rows
        found.append(batch)
    return found


def sparse(batch: dict[str, Any], leaves=tuple(SHAPES)) -> dict[str, Any]:
    """The batch as gradients with `RowSparse` leaves."""
    return {
        name: se.RowSparse(*g, SHAPES[name]) if name in TABLES else jnp.asarray(g)
        for name, g in batch.items()
        if name in leaves
    }


def listed(batch: dict[str, Any], name: str) -> np.ndarray:
    """`[num_rows]` bools: the rows that the batch lists."""
    indices, _ = batch[name]
    found = np.zeros(SHAPES[name][0], bool)
    found[indices[(indices >= 0) & (indices < found.size)]] = True
    return found


def dense(batch: dict[str, Any], leaves=tuple(SHAPES)) -> dict[str, Any]:
    """The batch as dense gradients, made by numpy."""
    out = {}
    for name, g in batch.items():
        if name in TABLES and name in leaves:
            indices, rows = g
            g, real = np.zeros(SHAPES[name], np.float32), (indices >= 0) & (indices < len(listed(batch, name)))
            np.add.at(g, indices[real], rows[real])
        if name in leaves:
            out[name] = g
    return out


def table_of(path: tuple[Any, ...], leaf: Any) -> str | None:
    """The table whose rows a leaf of the params or of the state holds: its name is on the path."""
    for key in path:
        name = getattr(key, "key", None)
        if name in TABLES and np.shape(leaf)[:1] == SHAPES[name][:1]:
            return name
    return None


def put_back(old: Any, new: Any, batch: dict[str, Any]) -> Any:
    """`new`, but for rows that the batch does not list, which are as in `old`."""

    def leaf(path, before, after):
        name = table_of(path, after)
        if name is None:
            return after
        mask = listed(batch, name).reshape(-1, *(1,) * (np.ndim(after) - 1))
        return np.where(mask, np.asarray(after), np.asarray(before))

    return jax.tree_util.tree_map_with_path(leaf, old, new)


def assert_same(got: Any, want: Any, law: str, **tolerance: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want), law
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
    ):
        where = f"{law}: {jax.tree_util.keystr(path)}"
        assert np.shape(a) == np.shape(b), where
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, err_msg=where, **(tolerance or TOLERANCE))


def differ(a: Any, b: Any) -> bool:
    return any(
        not np.allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), **TOLERANCE)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def stepper(tx: Any) -> Any:
    """One compiled step of a transformation, dense or lazy."""

    @jax.jit
    def step(params, state, grads, extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def dense_steps(tx: Any, params: Any, leaves: Any, extra: Any, *, lazily: bool) -> Any:
    """Params and state after all batches, by dense optax."""
    tx = optax.with_extra_args_support(tx)
    step, state = stepper(tx), tx.init(params)
    for batch in batches():
        new = step(params, state, dense(batch, leaves), extra)
        params, state = put_back((params, state), new, batch) if lazily else new
    return params, state


def lazy_steps(tx: Any, params: Any, leaves: Any, extra: Any) -> Any:
    """Params and state after all batches, by `se.lazy`; what one step must do is asserted."""
    step, state = stepper(tx), tx.init(params)
    names: list[str] = []
    for number, batch in enumerate(batches()):
        grads = sparse(batch, leaves)
        with count_compilations() as names:
            new = step(params, state, grads, extra)
        assert number == 0 or names == [], f"step {number} compiles again: {names}"
        before, after = (jax.tree_util.tree_flatten_with_path(x)[0] for x in ((params, state), new))
        for (path, old), (_, leaf) in zip(before, after, strict=True):
            if name := table_of(path, leaf):
                idle = ~listed(batch, name)
                same = np.asarray(old)[idle].tobytes() == np.asarray(leaf)[idle].tobytes()
                assert same, f"step {number}: {jax.tree_util.keystr(path)}: an untouched row moved"
        params, state = new
    return params, state


def assert_follows(subject: Subject) -> Any:
    """All laws on the values of a dozen steps. Returns the lazy params and state."""
    params = new_params(subject.leaves)
    extra = subject.extra(params)
    unknown = {} if subject.strict else {"an_unknown_argument": jnp.zeros(())}
    tx = se.lazy(subject.build())
    new, state = lazy_steps(tx, params, subject.leaves, {**extra, **unknown})
    oracle = functools.partial(dense_steps, subject.build(), params, subject.leaves, extra)
    want = oracle(lazily=subject.verdict == "lazy")
    assert_same((new, state.inner_state), want, subject.label)
    if subject.verdict == "lazy":
        assert differ(oracle(lazily=False), want), f"{subject.label} is exact"
    return new, state


# --- laws over the table --------------------------------------------------------------------------


@over(ACCEPTED)
def test_steps_are_those_of_dense_optax(subject):
    params, state = assert_follows(subject)
    tx = se.lazy(subject.build())
    assert_same(pickle.loads(pickle.dumps(state)), state, "pickled", rtol=0)
    leaves, treedef = jax.tree.flatten(state)
    assert isinstance(treedef.unflatten(leaves), se.LazyState)
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert_same(mapped, state, "optax.tree.map_params", rtol=0)


HEIGHT = 50_000
TALL = {**SHAPES, "users": (HEIGHT, 2, 4)}


@over(ACCEPTED)
def test_step_is_in_place_and_without_scratch_memory(subject):
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in TALL.items()}
    extra = subject.extra(new_params())
    tx = se.lazy(subject.build())
    state = jax.eval_shape(tx.init, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, indices, rows, grads):
        grads = grads | {name: se.RowSparse(indices[name], rows[name], TALL[name]) for name in TABLES}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    indices = {name: jax.ShapeDtypeStruct((LISTED,), jnp.int32) for name in TABLES}
    rows = {
        name: jax.ShapeDtypeStruct((LISTED, *TALL[name][1:]), jnp.float32) for name in TABLES
    }
    rest = {name: x for name, x in params.items() if name not in TABLES}
    memory = step.lower(params, state, indices, rows, rest).compile().memory_analysis()
    table_bytes = 4 * np.prod(TALL["users"])
    tall = [x for x in jax.tree.leaves((params, state)) if x.shape[:1] == (HEIGHT,)]
    assert memory.temp_size_in_bytes < table_bytes / 50, "a table-sized temporary"
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in tall), "a copy"


@over(ACCEPTED)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(subject, dtype):
    params = new_params(subject.leaves, dtype=dtype)
    grads = sparse(batches()[0], subject.leaves)
    grads = {
        name: se.RowSparse(g.indices, g.rows.astype(dtype), g.shape)
        if name in TABLES
        else g.astype(dtype)
        for name, g in grads.items()
    }
    extra = subject.extra(params)
    tx, inner = se.lazy(subject.build()), optax.with_extra_args_support(subject.build())

    def step(tx, grads):
        state = tx.init(params)
        updates, new = tx.update(grads, state, params, **extra)
        return updates, new, state

    updates, new, old = jax.eval_shape(lambda: step(tx, grads))
    stock_updates, stock, _ = jax.eval_shape(lambda: step(inner, params))
    for name, update in updates.items():
        assert update.dtype == stock_updates[name].dtype, name
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(old)[0]]
    for path, x, y, z in zip(*[paths, *map(jax.tree.leaves, (old, new, stock))], strict=True):
        assert y.dtype in (x.dtype, z.dtype), f"{path}: {x.dtype} became {y.dtype}"


def assert_explained(text: str, reason: str) -> None:
    wrote, got, instead = re.fullmatch(r"(.*)\n  got: (.*)\n  write: (.*)", text, re.S).groups()
    assert reason in got
    assert wrote.startswith("se.lazy(inner)") and "se.lazy(" in instead
    if "`" in got:
        assert re.search(r"\(\S+\.py:\d+", got), f"no source line: {got}"


@over(REFUSED)
def test_refusal_names_the_transformation_and_the_reason(subject):
    params = new_params(subject.leaves)
    tx, inner = se.lazy(subject.build()), optax.with_extra_args_support(subject.build())
    if subject.at == "init":
        with pytest.raises(ValueError) as raised:
            tx.init(params)
        assert_explained(str(raised.value), subject.reason)
    else:
        tx.init(params)
    # A state from elsewhere, of a checkpoint for one, does not get it further.
    state, grads = se.LazyState(inner.init(params), {}), sparse(batches()[0], subject.leaves)
    extra = subject.extra(params)
    with pytest.raises(ValueError) as raised:
        tx.update(grads, state, params, **extra)
    assert_explained(str(raised.value), subject.reason)
    with pytest.raises(ValueError, match=re.escape(subject.reason)):
        jax.eval_shape(lambda: tx.update(grads, state, params, **extra))


@over(FOREIGN)
def test_what_is_not_applicable_raises(subject):
    params = new_params(subject.leaves)
    tx = se.lazy(subject.build())
    with pytest.raises((AttributeError, ValueError), match=re.escape(subject.reason)):
        state = tx.init(params)
        assert subject.at == "update"
        tx.update(sparse(batches()[0]), state, params)


# --- the table itself -----------------------------------------------------------------------------


def test_every_public_name_of_optax_is_classified():
    assert unclassified() == [], "add rows to SUBJECTS, or OTHER_NAMES, of tests/conformance.py"


def test_a_new_public_name_is_noticed(monkeypatch):
    def annotated(rate: float) -> optax.GradientTransformation: ...
    def wrapper(inner: optax.GradientTransformationExtraArgs): ...
    def bare(rate): ...

    class Stepper:
        init = update = None

    for name, value in {"new_a": annotated, "new_b": wrapper, "new_c": bare}.items():
        monkeypatch.setattr(optax, name, value, raising=False)
    monkeypatch.setattr(optax.contrib, "new_d", Stepper, raising=False)
    monkeypatch.setattr(optax.contrib, "NewState", type("NewState", (), {}), raising=False)
    monkeypatch.setattr(optax.losses, "new_loss", lambda x: x, raising=False)
    monkeypatch.setattr(optax, "new_loss", optax.losses.new_loss, raising=False)
    monkeypatch.setattr(optax.transforms, "adam", optax.adam, raising=False)
    assert unclassified() == ["new_a", "new_b", "new_c", "contrib.new_d"]


def test_what_makes_a_transformation_is_recognised():
    names = {name for name, value in public_names() if makes_a_transformation(value)}
    assert {"adam", "nadam", "masked", "MultiSteps", "inject_hyperparams"} <= names
    assert not {"l2_loss", "global_norm", "cosine_decay_schedule", "ScaleByAdamState"} & names
    assert not isinstance(optax.losses, type(None)) and isinstance(optax.contrib, types.ModuleType)


def test_rows_are_told_apart_and_say_something():
    labels = [s.label for s in SUBJECTS]
    assert len(set(labels)) == len(labels)
    assert not [s.label for s in SUBJECTS if (s.verdict == "refused") and not (s.reason and s.note)]


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/conformance.py"
