"""What all exact optimizers share: init, settle, view, update."""

import abc
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sparse_embed._container import distinct, flat_indices, gather_rows, is_row_sparse
from sparse_embed._core import ask_for_huge_pages, is_concrete, signature
from sparse_embed._lazy import LazyState, LazyTransformation, lazy
from sparse_embed.exact._checks import (
    check_dense_state,
    check_finite,
    check_forms,
    check_rows,
    check_settled,
    check_state,
    clocks_of,
    ids_of,
)
from sparse_embed.exact._state import ExactState, new_clock
from sparse_embed.exact._table import Held, Table, written
from sparse_embed.exact._together import settled_blocks


class Exact(abc.ABC):
    """Init, settle and update of an exact optimizer, but for how rows catch up."""

    @property
    @abc.abstractmethod
    def inner(self) -> optax.GradientTransformation:
        """The dense optimizer."""

    @functools.cached_property
    def on_touched(self) -> LazyTransformation:
        """The dense optimizer on touched rows, which do not catch up by themselves."""
        return lazy(self.inner)

    @abc.abstractmethod
    def tables(self, params: Any, inner_state: Any, step: Array) -> dict[int, Table]:
        """The leaves on which something happens in a gap."""

    @abc.abstractmethod
    def held(self, params: Any, inner_state: Any) -> list[dict[str, Array]]:
        """For each leaf of the parameters the arrays of the state that hold its rows."""

    @abc.abstractmethod
    def with_held(self, params: Any, inner_state: Any, held: list[dict[str, Array]]) -> Any:
        """The state with these arrays put in."""

    @abc.abstractmethod
    def check(self, params: Any) -> None:
        """Raises where the optimizer cannot be exact for these parameters."""

    def init(self, params: Any) -> ExactState:
        key = signature(params)
        known = self._first_sums.get(key)
        if known is None:
            self.check(params)
        inner_state = self.on_touched.init(params).inner_state
        state = self._started(params, inner_state, known or {})
        concrete = is_concrete(*jax.tree.leaves(state.clocks))
        if known is None and key is not None and concrete and jax.tree.leaves(params):
            clocks = _flat(params)[1].flatten_up_to(state.clocks)
            self._first_sums[key] = {
                k: (np.asarray(clock.now), np.asarray(clock.mark))
                for k, clock in enumerate(clocks)
                if clock is not None
            }
        return state

    def from_dense(self, params: Any, inner_state: Any) -> ExactState:
        check_dense_state(self.inner, params, inner_state)
        return self._started(params, inner_state, {})

    @functools.cached_property
    def _first_sums(self) -> dict[Any, dict[int, Any]]:
        """For parameters of known shapes, the sums and the mark of each table at its first step."""
        return {}

    def _started(self, params: Any, inner_state: Any, known: dict[int, Any]) -> ExactState:
        step = jnp.zeros((), jnp.int32)
        leaves, treedef = _flat(params)
        made: list[Any] = [None] * len(leaves)
        if known:
            for k, sums in known.items():
                made[k] = new_clock(jnp.shape(leaves[k])[0], step, *sums)
        else:
            for k, table in self.tables(params, inner_state, step).items():
                made[k] = table.start(jnp.shape(leaves[k])[0])
                check_finite(table.name, made[k].now)
        ask_for_huge_pages(made)
        if (
            not leaves
        ):  # `optax.tree.map_params` asks: one leaf, which is no parameter, for them all
            return ExactState(inner_state, step, jnp.zeros((), jnp.int32))
        return ExactState(inner_state, step, treedef.unflatten(made))

    def settle(
        self, params: Any, state: ExactState, ids: Any = None, *, coalesced: bool = False
    ) -> tuple[Any, ExactState, dict[str, Array]]:
        """Also returns, for each table, whether the state is of this optimizer's schedules."""
        tables, held = self.resting(params, state)
        agreeing = {table.name: table.agrees(held[k][2]) for k, table in tables.items()}
        if ids is None:
            new = {k: table.settled(held[k]) for k, table in tables.items()}
        else:
            listed = self.listed(params, ids, coalesced)
            blocks = settled_blocks(tables, held, listed)
            whole = [k for k in tables if k not in listed]
            new = {k: tables[k].settled_whole(held[k]) for k in whole}
            new |= {k: written(block, held[k]) for k, block in blocks.items()}
        params, state = self.put(params, state, new)
        return params, state.as_settled(), agreeing

    def resting(self, params: Any, state: ExactState) -> tuple[dict[int, Table], dict[int, Held]]:
        """The leaves whose rows can be behind: how they rest, and all that holds their rows."""
        leaves, treedef = _flat(params)
        clocks = clocks_of(treedef, state)
        held = self.held(params, state.inner_state)
        tables = self.tables(params, state.inner_state, state.step)
        for k, table in tables.items():
            check_rows(table.name, leaves[k], clocks[k])
        return tables, {k: (leaves[k], held[k], clocks[k]) for k in tables}

    def listed(self, params: Any, ids: Any, coalesced: bool) -> dict[int, Array]:
        """For each leaf that has any, its ids: distinct, in ascending order."""
        leaves, treedef = _flat(params)
        found = {k: i for k, i in enumerate(ids_of(treedef, ids)) if i is not None}
        if coalesced:
            return found
        return {k: _distinct(i, jnp.shape(leaves[k])[0]) for k, i in found.items()}

    def put(self, params: Any, state: ExactState, new: dict[int, Held]) -> tuple[Any, ExactState]:
        """Parameters and state with these leaves put in."""
        leaves, treedef = _flat(params)
        clocks = clocks_of(treedef, state)
        held = self.held(params, state.inner_state)
        for k, own in new.items():
            leaves[k], held[k], clocks[k] = own
        inner_state = self.with_held(params, state.inner_state, held)
        return treedef.unflatten(leaves), ExactState(
            inner_state, state.step, treedef.unflatten(clocks)
        )

    def view(self, params: Any, state: ExactState, ids: Any) -> Any:
        check_state("tx.view(params, opt_state, ids)", state)
        leaves, treedef = _flat(params)
        tables, held = self.resting(params, state)
        listed = {k: i for k, i in enumerate(ids_of(treedef, ids)) if i is not None}
        flat = {k: flat_indices(i, jnp.shape(leaves[k])[0]).reshape(-1) for k, i in listed.items()}
        blocks = settled_blocks(tables, held, flat)
        found: list[Any] = [None] * len(leaves)
        for k, asked in listed.items():
            num_rows, *features = jnp.shape(leaves[k])
            rows = gather_rows(leaves[k], flat[k], None)
            if k in blocks:
                outside = (flat[k] == num_rows).reshape(-1, *(1,) * len(features))
                rows = jnp.where(outside, rows, blocks[k].w)
            found[k] = rows.reshape(*jnp.shape(asked), *features)
        return treedef.unflatten(found)

    def update(self, grads: Any, state: ExactState, params: Any = None, **extra: Any) -> Any:
        check_state("tx.update(grads, opt_state, params)", state)
        if any(map(is_row_sparse, _flat(grads)[0])):
            check_forms(grads)
            check_settled(state)
        old = LazyState(state.inner_state, {})
        updates, new = self.on_touched.listed_update(grads, old, params, **extra)
        leaves, treedef = _flat(updates)
        clocks = treedef.flatten_up_to(state.clocks)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(u), jnp.result_type(u)) for u in leaves]
        like = treedef.unflatten(shapes) if params is None else params
        for k, table in self.tables(like, state.inner_state, state.step).items():
            leaves[k], clocks[k] = table.advanced(leaves[k], clocks[k])
        clocked = ExactState(new.inner_state, state.step + 1, treedef.unflatten(clocks))
        return treedef.unflatten(leaves), clocked


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_row_sparse)


def _distinct(ids: Any, num_rows: int) -> Array:
    ids = flat_indices(ids, num_rows).reshape(-1)
    return distinct(ids, num_rows, min(ids.size, num_rows)).indices
