"""A step that keeps the rows it reads at hand: read once, settled, updated, and written once.

`settle` and `update` by themselves would write all that holds a row and read it again. Within one
compiled step nobody looks at moments and clocks in between; only the table itself is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._container import (
    Listed,
    RowSparse,
    Slots,
    flat_indices,
    is_row_sparse,
    set_rows,
    slots_among,
    slots_of_each,
)
from sparse_embed._lazy import LazyState
from sparse_embed.exact._checks import check_forms, ids_of
from sparse_embed.exact._optimizer import Exact
from sparse_embed.exact._state import ExactState
from sparse_embed.exact._table import Block, written
from sparse_embed.exact._together import settled_blocks


class Settled(NamedTuple):
    """The rows of one leaf that a step reads, settled."""

    ids: Sequence[Array]  # of each place where it is read, as in `Part.ids`
    slot: Array  # [n] where each of them went in the block
    block: Block


class AtHand(NamedTuple):
    """A state some of whose rows are not written yet: those read, by leaf."""

    state: ExactState
    reads: dict[int, Settled]


def settle_at_hand(exact: Exact, params: Any, state: ExactState, ids: Any) -> tuple[Any, AtHand]:
    """Settles the rows at some ids; of the arrays that hold them only the tables are written.

    Args:
      exact: the optimizer.
      params: the parameters.
      state: its state.
      ids: a tree like `params`: for a leaf that is read by row a list of ids, as in `Part.ids`, for
        each place where it is; `None` for any other, of which all rows are settled.

    Returns:
      The parameters, in which these rows are settled, and the state with the rows.
    """
    tables, held = exact.resting(params, state)
    leaves, treedef = jax.tree.flatten(params)
    listed = {k: own for k, own in enumerate(ids_of(treedef, ids)) if own is not None}
    heights = {k: jnp.shape(leaves[k])[0] for k in listed}
    rows = {k: _flat(own, heights[k]) for k, own in listed.items() if k in tables}
    slots = {k: _short(s, heights[k]) for k, s in slots_of_each(rows, heights).items()}
    blocks = settled_blocks(tables, held, {k: s.indices for k, s in slots.items()}, False)
    new = {k: tables[k].settled_whole(held[k]) for k in tables if k not in listed}
    for k, block in blocks.items():
        w, moments, clock = held[k]
        new[k] = set_rows(w, block.indices, block.w, block.ascending), moments, clock
    params, state = exact.put(params, state, new)
    return params, AtHand(
        state.as_settled(), {k: Settled(listed[k], slots[k].slot, b) for k, b in blocks.items()}
    )


def apply_at_hand(
    exact: Exact, grads: Any, at_hand: AtHand, params: Any, **extra: Any
) -> tuple[Any, ExactState]:
    """One update of the parameters, and the state with all rows written.

    Args:
      exact: the optimizer.
      grads: `Listed` for tables. What they list is among the rows at hand.
      at_hand: of `settle_at_hand`.
      params: as it returned them.
      **extra: what the optimizer's update takes besides.

    Returns:
      The new parameters, and the new state.
    """
    treedef: Any
    listed, treedef = jax.tree.flatten(grads, is_leaf=lambda g: isinstance(g, Listed))
    odd = [g.coalesced() if isinstance(g, Listed) and not g.form.plain else None for g in listed]
    check_forms(treedef.unflatten(odd))
    old = LazyState(at_hand.state.inner_state, {})
    if not jax.tree.leaves(at_hand.state.clocks):  # nothing moves without a gradient
        params, new = exact.on_touched.apply(grads, old, params, **extra)
        state = at_hand.state._replace(inner_state=new.inner_state, step=at_hand.state.step + 1)
        return params, state.unsettled()
    reads = {k: r for k, r in at_hand.reads.items() if isinstance(listed[k], Listed)}
    tables, held = exact.resting(params, at_hand.state)
    others = {k: written(r.block, held[k]) for k, r in at_hand.reads.items() if k not in reads}
    _, state = exact.put(params, at_hand.state, others)

    known: dict[int, Array] = {}  # of these arrays the rows are at hand
    for k, read in reads.items():
        w, moments, _ = held[k]
        known[id(w)] = read.block.w
        known |= {id(x): read.block.moments[name] for name, x in moments.items()}
        listed[k] = _on_block(listed[k], read)
    coalesced = [g.coalesced() if isinstance(g, Listed) else g for g in listed]
    updates, new = exact.on_touched._update_known(
        treedef.unflatten(coalesced), LazyState(state.inner_state, {}), params, known, **extra
    )

    leaves = jax.tree.leaves(params)
    clocks = treedef.flatten_up_to(state.clocks)
    moved = jax.tree.leaves(updates, is_leaf=is_row_sparse)
    for k, leaf in enumerate(leaves):
        if k in reads:
            block = reads[k].block
            sums = (block.w + moved[k].rows).astype(leaf.dtype)
            leaves[k] = set_rows(leaf, block.indices, sums, block.ascending)
            clocks[k] = tables[k].advanced_block(block, held[k][2])
        else:
            if k in tables:
                moved[k], clocks[k] = tables[k].advanced(moved[k], clocks[k])
            leaves[k] = optax.apply_updates(leaf, moved[k])
    clocked = ExactState(new.inner_state, state.step + 1, treedef.unflatten(clocks))
    return treedef.unflatten(leaves), clocked


def _flat(ids: Sequence[Array], num_rows: int) -> Array:
    return flat_indices(jnp.concatenate([x.reshape(-1) for x in ids]), num_rows)


def _short(slots: Slots, num_rows: int) -> Slots:
    """No more slots than there are rows."""
    return slots._replace(indices=slots.indices[: min(slots.indices.size, num_rows)])


def _on_block(grad: Listed, read: Settled) -> RowSparse:
    """The gradient of the rows of a block."""
    block, slot = read.block, read.slot
    size = block.indices.size
    if [p.ids.shape for p in grad.parts] != [i.shape for i in read.ids]:
        # Some of the rows read have no gradient, so these are found by their numbers.
        order = jnp.argsort(block.indices)
        place = slots_among(block.indices[order], grad.indices)
        slot = order.at[place].get(mode="fill", fill_value=size)
    # An id outside the table may be read, clipped, and have no gradient.
    slot = jnp.where(grad.indices < grad.num_rows, slot, size)
    return RowSparse._make(block.indices, grad.sums(slot, 0, size), grad.form, True)
