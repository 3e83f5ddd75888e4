"""Views of rows: a table of primitives. Row-wise ones are the views whose ids stay as they are."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import (
    ELEMENTWISE,
    ROW_WISE,
    Axes,
    JaxprEqn,
    as_block,
    bind_on_rows,
    operand_axes,
    rows_of,
)
from sparse_embed._views.chosen_rows import (
    dynamic_slice_view,
    dynamic_update_slice_view,
    gather_view,
    scatter_view,
)
from sparse_embed._views.moved_rows import (
    concatenate_view,
    pad_view,
    reverse_view,
    slice_view,
    split_view,
    tile_view,
)
from sparse_embed._views.renumbered import broadcast_view, reshape_view, squeeze_view, stack_view
from sparse_embed._views.view import Ids, Part, View, without

# For each, given an equation, which output it is, and the axes along which its rows run: the view,
# or `None` if its rows are not moved, or cannot be had one by one.
_VIEWS: dict[str, Callable[[JaxprEqn, int, Axes], View | None]] = {
    "broadcast_in_dim": broadcast_view,
    "concatenate": concatenate_view,
    "dynamic_slice": dynamic_slice_view,
    "dynamic_update_slice": dynamic_update_slice_view,
    "gather": gather_view,
    "pad": pad_view,
    "reshape": reshape_view,
    "rev": reverse_view,
    "scatter": scatter_view,
    "slice": slice_view,
    "split": split_view,
    "squeeze": squeeze_view,
    "stack": stack_view,
    "tile": tile_view,
}


def view_of(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    """The rows of output `out` of an equation, along `axes`; `None` if they need a whole operand.

    Which operands are tables is not asked: a part of an ordinary array is gathered from it.
    """
    special = _VIEWS.get(eqn.primitive.name)
    if special is not None and (view := special(eqn, out, axes)) is not None:
        return view
    return _row_wise(eqn, out, axes)


def can_be_delayed(eqn: JaxprEqn) -> bool:
    """Whether some rows of its outputs may be had without the others."""
    known = eqn.primitive.name in ROW_WISE or eqn.primitive.name in _VIEWS
    return known and all(v.aval.ndim for v in eqn.outvars)


def _row_wise(eqn: JaxprEqn, out: int, axes: Axes) -> View | None:
    name, parts = eqn.primitive.name, []
    if name not in ROW_WISE:
        return None
    for i, v in enumerate(eqn.invars):
        if not v.aval.ndim:  # a scalar: the same for all rows
            continue
        own = operand_axes(eqn, i, axes)
        if own is not None:
            parts.append(Part(i, own))
            continue
        one = tuple(a for a in axes if v.aval.shape[a : a + 1] == (1,))  # repeated for all rows
        if name not in ELEMENTWISE or not one:
            return None
        parts.append(Part(i, tuple(a for a in axes if a not in one), without(axes, one)))

    def join(rows: list[Any], inside: list[Array | None], ids: Ids) -> Array:
        blocks = list(rows)
        for i, own, _ in parts:
            ndim = eqn.invars[i].aval.ndim
            blocks[i] = as_block(rows[i], ndim, own) if own else rows[i][0]
            if own and name in ELEMENTWISE and own[-1] != axes[-1]:
                blocks[i] = jnp.swapaxes(blocks[i], own[-1], axes[-1])
        return rows_of(bind_on_rows(eqn, blocks, ids[0].shape[0], axes)[out], axes)

    return View(tuple(parts), join)
