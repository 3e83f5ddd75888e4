"""`se.lazy`: the laws that hold for every row of `conformance.py`, against dense optax."""

import functools
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    HEIGHT,
    PAGE,
    SHAPES,
    SUBJECTS,
    TABLES,
    makes_a_transformation,
    page,
    present,
    public_names,
    unclassified,
)
from dense_oracle import (
    assert_same,
    batches,
    dense_steps,
    differ,
    listed,
    new_params,
    sparse,
    stepper,
    table_of,
)
from helpers import QUICKLY, small_blocks, temp_bytes

import sparse_embed as se
from sparse_embed._container import Listed, Part

# Expected of MultiSteps and apply_every; one test asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:se.lazy.inner.. inner gathers:UserWarning")

PRESENT = [s for s in SUBJECTS if present(s)]
ACCEPTED = [s for s in PRESENT if s.accepted]
REFUSED = [s for s in PRESENT if s.verdict == "refused"]
FOREIGN = [s for s in PRESENT if s.verdict == "not applicable"]


def over(subjects):
    return pytest.mark.parametrize("subject", subjects, ids=lambda s: s.label)


# --- laws over the table --------------------------------------------------------------------------

_coalesce = jax.jit(se.coalesce)


@functools.cache
def coalesced(number: int) -> dict[str, Any]:
    """The gradients of a batch as `se.grad` gives them: it compiles faster than a raw list."""
    grads = sparse(batches()[number])
    return {name: _coalesce(g) if name in TABLES else g for name, g in grads.items()}


def lazy_steps(tx: Any, params: Any, leaves: tuple[str, ...], extra: Any) -> Any:
    """Params and state after all batches, by `se.lazy`, and what the compiled step is asserted.

    The step is compiled once, for donated arrays. So it takes what it returns (else it raises), and
    its memory can be looked at. Rows that a batch does not list keep their bits.
    """
    # Both are donated: no array may be there twice, as some transformations have it.
    params, state = jax.tree.map(jnp.copy, (params, tx.init(params)))

    def grads(number: int) -> dict[str, Any]:
        return {name: coalesced(number)[name] for name in leaves}

    first = params, state, grads(0), extra
    with jax.transfer_guard("disallow"):  # it moves no number of its own to the device
        step = stepper(tx, donate=(0, 1)).lower(*first).compile()
    assert_in_place(step.memory_analysis(), (params, state))
    for number, batch in enumerate(batches()):
        before = jax.tree.map(np.array, (params, state))
        params, state = step(params, state, grads(number), extra)
        old = jax.tree_util.tree_flatten_with_path(before)[0]
        for (path, x), y in zip(old, jax.tree.leaves((params, state)), strict=True):
            if name := table_of(path, y):
                untouched = ~listed(batch, name)
                same = x[untouched].tobytes() == np.asarray(y)[untouched].tobytes()
                assert same, f"step {number}: {jax.tree_util.keystr(path)}: an untouched row moved"
    return params, state


@functools.cache
def xla_writes_in_place(dtype: Any) -> bool:
    """Whether a plain `table.at[indices].set(rows)` is; jaxlib 0.10.2 widens bfloat16 on CPU."""
    table, rows = jnp.zeros((HEIGHT, 8), dtype), jnp.zeros((2, 8), dtype)
    write = lambda table, rows: table.at[jnp.array([1, 7])].set(rows)  # noqa: E731
    return temp_bytes(write, table, rows, donate=(0,)) < HEIGHT


def assert_in_place(memory: Any, donated: Any) -> None:
    """A step has no table-sized temporary, and writes all that is as tall as `users` in place."""
    tall = [x for x in jax.tree.leaves(donated) if np.shape(x)[:1] == (HEIGHT,)]
    if all(xla_writes_in_place(x.dtype) for x in tall):
        assert memory.temp_size_in_bytes < HEIGHT / 2, "a table-sized temporary"
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in tall), "a copy"


# Reductions over rows add up in another order.
IN_BLOCKS = {"rtol": 2e-5, "atol": 2e-6}


def in_blocks(tx: Any, subject: Any, extra: Any, apply: bool) -> Any:
    """Params and state after all batches, two rows at a time, repeats not summed.

    By `tx.apply`, or by `tx.update` and `optax.apply_updates`.
    """

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(params, state, batch, extra):
        grads = {
            name: Listed([Part(g[0][None], g[1])], SHAPES[name], g[1].dtype)
            if name in TABLES
            else g
            for name, g in batch.items()
        }
        if apply:
            return tx.apply(grads, state, params, **extra)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = new_params(subject.leaves)
    state = tx.init(params)
    with small_blocks(2):
        for batch in batches():
            params, state = step(
                params, state, {name: batch[name] for name in subject.leaves}, extra
            )
    return params, state


@over(ACCEPTED)
def test_steps_are_those_of_dense_optax(subject):
    params = new_params(subject.leaves)
    extra = subject.extra(params)
    unknown = {} if subject.strict else {"an_unknown_argument": jnp.zeros(())}
    tx = se.lazy(subject.build())
    new, state = lazy_steps(tx, params, subject.leaves, {**extra, **unknown})
    masked, whole = dense_steps(
        subject.build(), params, subject.leaves, extra, lazily=(True, False)
    )
    wanted = whole if subject.verdict == "exact" else masked
    assert_same((new, state.inner_state), wanted, subject.label)
    assert differ(whole, masked) == (subject.verdict == "lazy"), "lazy, or exact?"

    for apply in (True, False):
        found = in_blocks(tx, subject, extra, apply)
        assert_same(found, (new, state), "in blocks", **IN_BLOCKS)

    assert_same(pickle.loads(pickle.dumps(state)), state, "pickled", rtol=0)
    leaves, treedef = jax.tree.flatten(state)
    assert isinstance(treedef.unflatten(leaves), se.LazyState)
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert_same(mapped, state, "optax.tree.map_params", rtol=0)


def test_a_table_sized_array_in_a_step_is_noticed():
    table = jnp.zeros((HEIGHT, 2))
    flip = jax.jit(lambda x: x[::-1], donate_argnums=0).lower(table).compile()
    with pytest.raises(AssertionError, match="table-sized|a copy"):
        assert_in_place(flip.memory_analysis(), table)
    kept = jax.jit(lambda x: x.at[3].set(1.0)).lower(table).compile()
    with pytest.raises(AssertionError, match="a copy"):
        assert_in_place(kept.memory_analysis(), table)


@over(ACCEPTED)
def test_dtypes_are_kept(subject):
    dtype = jnp.bfloat16
    params = new_params(subject.leaves, dtype=dtype)
    grads = sparse(batches()[0], subject.leaves)
    grads = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, grads)
    extra = subject.extra(params)

    def step(tx, grads):
        state = tx.init(params)
        return (*tx.update(grads, state, params, **extra), state)

    inner = optax.with_extra_args_support(subject.build())
    updates, new, old = jax.eval_shape(lambda: step(se.lazy(inner), grads))
    dense_updates, dense_new, _ = jax.eval_shape(lambda: step(inner, params))
    for name, update in updates.items():
        assert update.dtype == dense_updates[name].dtype, name
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(old)[0]]
    for path, x, y, z in zip(*[paths, *map(jax.tree.leaves, (old, new, dense_new))], strict=True):
        assert y.dtype in (x.dtype, z.dtype), f"{path}: {x.dtype} became {y.dtype}"


def assert_explained(text: str, reason: str) -> None:
    """A text in three parts that says what is refused, why, and in which line."""
    wrote, got, instead = re.fullmatch(r"(.*)\n  got: (.*)\n  write: (.*)", text, re.S).groups()
    assert reason in got
    assert wrote.startswith("se.lazy(inner)") and "se.lazy(" in instead
    assert "`" not in got or re.search(r"\(\S+\.py:\d+", got), f"no source line: {got}"


@over(REFUSED)
def test_refusal_names_the_transformation_and_the_reason(subject):
    params, grads = new_params(subject.leaves), sparse(batches()[0], subject.leaves)
    tx, inner = se.lazy(subject.build()), optax.with_extra_args_support(subject.build())

    def update(params, grads, state):
        return tx.update(grads, se.LazyState(state, {}), params, **subject.extra(params))

    if subject.at == "init":
        with pytest.raises(ValueError) as raised:
            tx.init(params)
        assert_explained(str(raised.value), subject.reason)
    else:
        jax.eval_shape(tx.init, params)
    # A state from elsewhere, of a checkpoint for one, does not get it further.
    state = jax.eval_shape(inner.init, params)
    with pytest.raises(ValueError) as raised:
        jax.eval_shape(update, params, grads, state)
    assert_explained(str(raised.value), subject.reason if subject.at == "update" else "")


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
    monkeypatch.setattr(optax.losses, "new_loss", bare, raising=False)
    monkeypatch.setattr(optax, "new_loss", bare, raising=False)
    monkeypatch.setattr(optax.transforms, "adam", optax.adam, raising=False)
    assert unclassified() == ["new_a", "new_b", "contrib.new_d"]  # `bare` is a loss by now
    monkeypatch.delattr(optax.losses, "new_loss")
    assert unclassified() == ["new_a", "new_b", "new_c", "new_loss", "contrib.new_d"]


def test_what_makes_a_transformation_is_recognised():
    names = {name for name, value in public_names() if makes_a_transformation(value)}
    assert {"adam", "nadam", "masked", "MultiSteps", "inject_hyperparams"} <= names
    assert not {"l2_loss", "global_norm", "cosine_decay_schedule", "ScaleByAdamState"} & names


def test_rows_are_told_apart_and_say_something():
    labels = [s.label for s in SUBJECTS]
    assert len(set(labels)) == len(labels)
    unexplained = [s.label for s in SUBJECTS if not s.accepted and not (s.reason and s.note)]
    assert not unexplained


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/conformance.py"
