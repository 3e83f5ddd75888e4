"""Dense optax as the oracle of the lazy laws: steps on whole tables, unlisted rows put back.

Nothing here uses `sparse_embed` but to build its gradients; dense ones are made by numpy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import SHAPES, TABLES
from helpers import QUICKLY, numbers

import sparse_embed as se

STEPS = 12
LISTED = 5  # indices of a step's gradient, for each table
ALL = tuple(SHAPES)
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}


def new_params(leaves: tuple[str, ...] = ALL, dtype: Any = jnp.float32) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    drawn = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
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


def sparse(batch: dict[str, Any], leaves: tuple[str, ...] = ALL) -> dict[str, Any]:
    """The batch as gradients with `RowSparse` leaves, its indices as they are."""
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


def dense(batch: dict[str, Any], leaves: tuple[str, ...] = ALL) -> dict[str, Any]:
    """The batch as dense gradients."""
    out = {}
    for name in leaves:
        out[name] = batch[name]
        if name in TABLES:
            indices, rows = batch[name]
            real = (indices >= 0) & (indices < SHAPES[name][0])
            out[name] = np.zeros(SHAPES[name], np.float32)
            np.add.at(out[name], indices[real], rows[real])
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


def stepper(tx: Any, donate: tuple[int, ...] = ()) -> Any:
    """One compiled step of a transformation, dense or lazy."""

    @functools.partial(jax.jit, compiler_options=QUICKLY, donate_argnums=donate)
    def step(params, state, grads, extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def dense_steps(
    tx: Any,
    params: Any,
    leaves: tuple[str, ...] = ALL,
    extra: Any = None,
    *,
    lazily: tuple[bool, ...] = (True,),
) -> list[Any]:
    """`(params, state)` after all batches by dense optax, compiled once.

    For each element of `lazily` one result: where it is true, after each step the rows that the
    batch does not list, and their state, are put back.
    """
    tx = optax.with_extra_args_support(tx)
    step = stepper(tx)
    found = []
    for masked in lazily:
        now = params, tx.init(params)
        for batch in batches():
            new = step(*now, dense(batch, leaves), extra or {})
            now = put_back(now, new, batch) if masked else new
        found.append(now)
    return found


def assert_same(got: Any, want: Any, law: str, **tolerance: Any) -> None:
    """Two trees of the same structure, shapes and dtypes, and of close numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want), law
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
    ):
        where = f"{law}: {jax.tree_util.keystr(path)}"
        assert np.shape(a) == np.shape(b), where
        assert jnp.result_type(a) == jnp.result_type(b), where
        a, b = numbers(a), numbers(b)
        np.testing.assert_allclose(a, b, err_msg=where, **(tolerance or TOLERANCE))


def differ(a: Any, b: Any) -> bool:
    return any(
        not np.allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), **TOLERANCE)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
