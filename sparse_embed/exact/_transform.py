"""An exact optimizer, from its dense one and its `Rest`: init, settle, update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._errors import describe, message, path_name
from sparse_embed._lazy import LazyState, lazy
from sparse_embed._row_sparse import is_row_sparse
from sparse_embed._segments import distinct, flat_indices
from sparse_embed.exact._ledger import Ledger, Schedule
from sparse_embed.exact._rest import Rest
from sparse_embed.exact._state import ExactState, RowClock, counts, moments, with_moments
from sparse_embed.exact._table import Table


class ExactTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose rows may be behind, and `settle`, which brings them up to date.

    `settle(params, opt_state, ids=None, *, coalesced=False) -> (params, opt_state)`: `ids` is a
    tree like the params of index arrays of any shape, or `None` for a leaf to leave alone, as
    `se.touched` returns it; without `ids` all rows of all tables are settled, a block at a time.
    `coalesced=True` promises ascending distinct indices, as from `se.touched`, and saves a sort.
    `se.train_step` calls it by itself.

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
    from_dense: Callable[[Any, Any], ExactState]
    to_dense: Callable[[Any, ExactState], tuple[Any, Any]]


@dataclass(frozen=True)
class Exact:
    """What an exact optimizer is made of.

    Args:
      inner: the dense optimizer, `before` included.
      core: from the state of `inner` to that of the optimizer without `before`.
      with_core: `(state of inner, core state) -> state of inner`.
      rest: what rows do without a gradient.
      rate: the learning rate at a count.
      decay: the decoupled weight decay at a count, or `None`.
      mask: for a tree of parameters, which of its leaves decay.
    """

    inner: optax.GradientTransformation
    core: Callable[[Any], Any]
    with_core: Callable[[Any, Any], Any]
    rest: Rest
    rate: Schedule
    decay: Schedule | None
    mask: Callable[[Any], Any]

    def transformation(self) -> ExactTransformation:
        tx = ExactTransformation(self.init, self.update)
        tx.settle, tx.from_dense, tx.to_dense = self.settle, self.from_dense, self.to_dense
        return tx

    def init(self, params: Any) -> ExactState:
        return self.from_dense(params, lazy(self.inner).init(params).inner_state)

    def from_dense(self, params: Any, inner_state: Any) -> ExactState:
        step = jnp.zeros((), jnp.int32)
        leaves, treedef = _flat(params)
        clocks: list[Any] = [None] * len(leaves)
        for k, table in self._tables(params, inner_state, step).items():
            now, rows = table.ledger.start(table.counts), jnp.shape(leaves[k])[0]
            clocks[k] = RowClock(jnp.zeros(rows, jnp.int32), jnp.tile(now, (rows, 1)), now)
        return ExactState(inner_state, step, treedef.unflatten(clocks))

    def to_dense(self, params: Any, state: ExactState) -> tuple[Any, Any]:
        params, state = self.settle(params, state)
        return params, state.inner_state

    def settle(
        self, params: Any, state: ExactState, ids: Any = None, *, coalesced: bool = False
    ) -> tuple[Any, ExactState]:
        _check_state("tx.settle(params, opt_state)", state)
        leaves, treedef = _flat(params)
        clocks = treedef.flatten_up_to(state.clocks)
        core = self.core(state.inner_state)
        held = moments(core, self.rest.fields, treedef)
        listed = None if ids is None else _listed(treedef, ids)
        for k, table in self._tables(params, state.inner_state, state.step).items():
            own = leaves[k], {name: x[k] for name, x in held.items()}, clocks[k]
            if listed is None:
                own = table.settled(own)
            elif listed[k] is not None:
                rows = jnp.shape(leaves[k])[0]
                indices = listed[k] if coalesced else _distinct(listed[k], rows)
                own = table.settled_rows(indices, own)
            leaves[k], after, clocks[k] = own
            for name, x in after.items():
                held[name][k] = x
        inner = self.with_core(state.inner_state, with_moments(core, held, treedef))
        return treedef.unflatten(leaves), ExactState(inner, state.step, treedef.unflatten(clocks))

    def update(self, grads: Any, state: ExactState, params: Any = None, **extra: Any) -> Any:
        _check_state("tx.update(grads, opt_state, params)", state)
        old = LazyState(state.inner_state, {})
        updates, new = lazy(self.inner).update(grads, old, params, **extra)
        leaves, treedef = _flat(updates)
        clocks = treedef.flatten_up_to(state.clocks)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(u), jnp.result_type(u)) for u in leaves]
        like = treedef.unflatten(shapes) if params is None else params
        for k, table in self._tables(like, state.inner_state, state.step).items():
            leaves[k], clocks[k] = table.advanced(leaves[k], clocks[k])
        clocked = ExactState(new.inner_state, state.step + 1, treedef.unflatten(clocks))
        return treedef.unflatten(leaves), clocked

    def _tables(self, params: Any, inner_state: Any, step: Array) -> dict[int, Table]:
        """The leaves on which something happens in a gap."""
        made = counts(self.core(inner_state), step)
        with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
        masks = jax.tree.leaves(self.mask(params))
        found = {}
        for k, ((path, leaf), mask) in enumerate(zip(with_paths, masks, strict=True)):
            decay = self.decay if mask else None
            if jnp.ndim(leaf) and (self.rest.fields or decay):
                dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
                rest = self.rest.rounded(dtype)
                ledger = Ledger(self.rate, decay, rest.drifts, rest.kernels(), dtype)
                found[k] = Table(path_name(path), rest, ledger, step, made)
        return found


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_row_sparse)


def _listed(treedef: Any, ids: Any) -> list[Any]:
    """The ids of each leaf, or `None`."""
    try:
        return treedef.flatten_up_to(ids)
    except (TypeError, ValueError):
        raise ValueError(
            message(
                "tx.settle(params, opt_state, ids): ids is no tree like params.",
                f"{jax.tree.structure(ids)} where {treedef} belongs",
                "tx.settle(params, opt_state, se.touched(loss_fn)(params, batch))",
            )
        ) from None


def _distinct(ids: Any, num_rows: int) -> Array:
    ids = flat_indices(ids, num_rows).reshape(-1)
    return distinct(ids, num_rows, min(ids.size, num_rows)).indices


def _check_state(call: str, state: Any) -> None:
    if not isinstance(state, ExactState):
        raise TypeError(
            message(
                f"{call}: opt_state is not a state of se.exact.",
                describe(state),
                "opt_state = tx.init(params), or tx.from_dense(params, dense_state)",
            )
        )
