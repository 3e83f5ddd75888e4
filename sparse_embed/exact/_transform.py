"""What all exact optimizers share: init, settle, update, conversion."""

import abc
import functools
from collections.abc import Callable
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
from sparse_embed.exact._table import Table, raise_if_other


class ExactTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose rows may be behind, and `settle`, which brings them up to date.

    `settle(params, opt_state, ids=None, *, coalesced=False) -> (params, opt_state)`: `ids` is a
    tree like the params, as `se.touched` returns it: index arrays of any shape for what is read by
    row, `None` for a leaf that is used whole (or not at all), of which all rows are settled.
    Without `ids` all rows of all leaves are, a block at a time. `coalesced=True` promises ascending
    distinct indices, as from `se.touched`, and saves a sort. `se.train_step` calls it by itself.
    Params and state belong together: settled params beside the state from before are moved twice.

    `view(params, opt_state, ids) -> rows` reads rows as if they were settled and changes nothing:
    `ids` of any shape for some leaves and `None` for the others give `[*ids.shape, *features]`; an
    id outside the table reads as NaN.

    `from_dense(params, inner_state) -> opt_state` takes over the state of the dense optimizer;
    `to_dense(params, opt_state) -> (params, inner_state)` settles all rows and gives it back.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.sgd(1.0, momentum=0.5)
      >>> params = {"table": jnp.zeros((4, 1))}
      >>> step = se.train_step(lambda p, ids: -p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([2]))
      >>> params, opt_state, _ = step(params, opt_state, jnp.array([0]))
      >>> params["table"][2].item()  # the momentum of the second step is still owed
      1.0
      >>> tx.settle(params, opt_state)[0]["table"][2].item()
      1.5
    """

    settle: Callable[..., tuple[Any, ExactState]]
    view: Callable[[Any, ExactState, Any], Any]
    from_dense: Callable[[Any, Any], ExactState]
    to_dense: Callable[[Any, ExactState], tuple[Any, Any]]


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

    def transformation(self) -> ExactTransformation:
        tx = ExactTransformation(self.init, self.update)
        settle = jax.jit(self.settle, static_argnames="coalesced")

        def checked(
            params: Any, opt_state: ExactState, ids: Any = None, *, coalesced: bool = False
        ) -> tuple[Any, ExactState]:
            check_state("tx.settle(params, opt_state)", opt_state)
            params, opt_state, agreeing = settle(params, opt_state, ids, coalesced=coalesced)
            for name, agrees in agreeing.items():
                raise_if_other(name, agrees)
            return params, opt_state

        def to_dense(params: Any, opt_state: ExactState) -> tuple[Any, Any]:
            params, opt_state = checked(params, opt_state)
            return params, opt_state.inner_state

        tx.settle, tx.view = checked, self.view
        tx.from_dense = self.from_dense
        tx.to_dense = to_dense
        return tx

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
        leaves, treedef = _flat(params)
        clocks = clocks_of(treedef, state)
        held = self.held(params, state.inner_state)
        listed = None if ids is None else ids_of(treedef, ids)
        agreeing = {}
        for k, table in self.tables(params, state.inner_state, state.step).items():
            check_rows(table.name, leaves[k], clocks[k])
            agreeing[table.name] = table.agrees(clocks[k])
            own = leaves[k], held[k], clocks[k]
            if listed is None or listed[k] is None:
                own = table.settled(own)
            else:
                rows = jnp.shape(leaves[k])[0]
                indices = listed[k] if coalesced else _distinct(listed[k], rows)
                own = table.settled_rows(indices, own)
            leaves[k], held[k], clocks[k] = own
        inner_state = self.with_held(params, state.inner_state, held)
        settled = ExactState(inner_state, state.step, treedef.unflatten(clocks)).as_settled()
        return treedef.unflatten(leaves), settled, agreeing

    def view(self, params: Any, state: ExactState, ids: Any) -> Any:
        check_state("tx.view(params, opt_state, ids)", state)
        leaves, treedef = _flat(params)
        clocks = clocks_of(treedef, state)
        held = self.held(params, state.inner_state)
        tables = self.tables(params, state.inner_state, state.step)
        found: list[Any] = [None] * len(leaves)
        for k, listed in enumerate(ids_of(treedef, ids)):
            if listed is None:
                continue
            num_rows, *features = jnp.shape(leaves[k])
            flat = flat_indices(listed, num_rows).reshape(-1)
            rows = gather_rows(leaves[k], flat, None)
            if k in tables:
                settled = tables[k].view(flat, (leaves[k], held[k], clocks[k]))
                outside = (flat == num_rows).reshape(-1, *(1,) * len(features))
                rows = jnp.where(outside, rows, settled)
            found[k] = rows.reshape(*jnp.shape(listed), *features)
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
