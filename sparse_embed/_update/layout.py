"""Which leaves of an optimizer's state hold one row for each row of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_embed._core import describe, message, signature

ELSEWHERE = -1  # a leaf that grows with a table in some other way: `optax.flatten`


@dataclass(frozen=True)
class StateLayout:
    """The state of `inner`, leaf by leaf."""

    paths: list[tuple[Any, ...]]
    shapes: list[jax.ShapeDtypeStruct]
    table: list[int | None]  # the table whose rows it holds, `None` for none, or ELSEWHERE
    treedef: Any

    def counts(self, param_paths: Sequence[tuple[Any, ...]]) -> dict[int, list[int]]:
        """Integer scalars that sit beside moments, and the tables whose moments these are.

        `ScaleByAdamState(count, mu, nu)` counts the steps of its `mu` and `nu`; the count of a
        schedule, which has no such neighbour, counts the steps of the training.
        """
        found: dict[int, list[int]] = {}
        for i, (path, leaf) in enumerate(zip(self.paths, self.shapes, strict=True)):
            if leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.integer):
                continue
            node = path[:-1]
            beside = {
                k
                for j, k in enumerate(self.table)
                if k is not None
                and k != ELSEWHERE
                and self.paths[j][: len(node)] == node
                and self.paths[j][len(node) + 1 :] == tuple(param_paths[k])
            }
            if beside:
                found[i] = sorted(beside)
        return found


class Layouts:
    """The layouts of one transformation's state: found once for parameters of the same shapes."""

    def __init__(self, inner: optax.GradientTransformation):
        self._inner = inner
        self._found: dict[Any, StateLayout] = {}

    def of(self, params: Any, tables: Sequence[int]) -> StateLayout:
        """As `state_layout`; the same object for the same shapes."""
        key = signature(params), tuple(tables)
        if key[0] is None:
            return state_layout(self._inner, params, tables)
        if key not in self._found:
            self._found[key] = state_layout(self._inner, params, tables)
        return self._found[key]


def state_layout(
    inner: optax.GradientTransformation, params: Any, tables: Sequence[int]
) -> StateLayout:
    """Finds the row-shaped leaves of `inner`'s state by what makes them grow.

    `inner.init` is evaluated by shape alone, once at the true shapes and once with each table
    taller by a number of rows of its own. A leaf that is taller by that number holds its rows.
    Sizes alone would not do: `mechanize` keeps six numbers, and a table may have six rows.

    Args:
      inner: the optax transformation.
      params: the tree of parameters, or of `ShapeDtypeStruct`s.
      tables: numbers of the leaves that are tables.

    Returns:
      The layout.
    """
    leaves, treedef = jax.tree.flatten(params)
    structs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    taller = list(structs)
    growth = {k: i + 1 for i, k in enumerate(tables)}
    for k, more in growth.items():
        rows, *features = structs[k].shape
        taller[k] = jax.ShapeDtypeStruct((rows + more, *features), structs[k].dtype)
    base = jax.eval_shape(inner.init, jax.tree.unflatten(treedef, structs))
    grown = jax.tree.leaves(jax.eval_shape(inner.init, jax.tree.unflatten(treedef, taller)))
    with_paths, state_treedef = jax.tree_util.tree_flatten_with_path(base)
    table: list[int | None] = []
    for (_, leaf), other in zip(with_paths, grown, strict=True):
        if leaf.shape == other.shape:
            table.append(None)
            continue
        first = other.shape[0] - leaf.shape[0] if leaf.ndim == other.ndim else 0
        rows_of = [
            k
            for k, more in growth.items()
            if more == first and leaf.shape[0] == structs[k].shape[0]
        ]
        same = rows_of and leaf.shape[1:] == other.shape[1:]
        table.append(rows_of[0] if same else ELSEWHERE)
    paths = [path for path, _ in with_paths]
    return StateLayout(paths, [leaf for _, leaf in with_paths], table, state_treedef)


def check_state(layout: StateLayout, state: Any) -> list[Any]:
    """The leaves of `state`, known to be of this layout.

    Raises:
      ValueError: it is the state of other parameters, or of another optimizer.
    """
    leaves, treedef = jax.tree.flatten(state)
    wrong = None
    if treedef != layout.treedef:
        wrong = f"a state of structure {treedef}"
    else:
        for path, leaf, shape in zip(layout.paths, leaves, layout.shapes, strict=True):
            if jnp.shape(leaf) != shape.shape:
                name = jax.tree_util.keystr(path)
                wrong = f"state{name} {describe(leaf)} where {describe(shape)} belongs"
                break
    if wrong is not None:
        raise ValueError(
            message(
                "tx.update(grads, opt_state, params): opt_state belongs to other parameters.",
                wrong,
                "opt_state = tx.init(params) with these params and this tx",
            )
        )
    return leaves
