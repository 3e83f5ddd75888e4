"""Which equations read rows: gathers, dynamic slices, constant slices."""

from sparse_embed._core import JaxprEqn
from sparse_embed._views.reads import CLIP, FILL, MODES, RowRead


def row_read(eqn: JaxprEqn) -> RowRead | None:
    """Describes `eqn` as a read of whole rows of its first operand; `None` if it is not one."""
    reader = {"gather": _gather, "dynamic_slice": _dynamic_slice, "slice": _slice}
    found = reader.get(eqn.primitive.name)
    return found(eqn) if found and eqn.invars[0].aval.ndim else None


def _gather(eqn: JaxprEqn) -> RowRead | None:
    table, starts = (v.aval.shape for v in eqn.invars)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    mode, order = eqn.params["mode"], tuple(numbers.start_index_map)
    batching = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batched = {int(a): int(d) for a, d in batching}
    gone = (*map(int, numbers.collapsed_slice_dims), *batched)
    # Of a vmapped read of single rows, the axis that is read stays, with one entry.
    one = [a for a, size in enumerate(sizes) if size == 1 != table[a] and a not in gone]
    axes = tuple(sorted((*gone, *(one if batched else ()))))
    run = sizes[0] if not axes else None
    axes = axes or (0,)  # whole rows from a start on
    if (
        mode not in MODES
        or any(size != table[a] for a, size in enumerate(sizes) if a not in axes)
        or any(a not in order for a in axes if a not in batched)
        or (batched and len(axes) == 1)
    ):
        return None
    # Starts of full-size axes are clamped to 0 by CLIP and PROMISE, but not by FILL.
    others = len(order) + len(batched) > len(axes)
    if MODES[mode] == FILL and (others or run not in (None, 1)):
        return None
    if run == table[0] and run != 1:
        return None
    lead = starts[:-1] + (() if run is None else (run,))
    columns = tuple(-1 if a in batched else order.index(a) for a in axes)
    return RowRead(eqn, MODES[mode], lead, run, axes, columns, batched, False)


def _dynamic_slice(eqn: JaxprEqn) -> RowRead | None:
    table, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    axes = tuple(a for a, size in enumerate(sizes) if size != table[a]) or (0,)
    if axes == (0,):
        run = sizes[0]
        return (
            RowRead(eqn, CLIP, (run,), run, axes, axes, {}, False)
            if run < table[0] or run == 1
            else None
        )
    if any(sizes[a] != 1 for a in axes):
        return None
    return RowRead(eqn, CLIP, (), None, axes, axes, {}, False)  # one row of a stack


def _slice(eqn: JaxprEqn) -> RowRead | None:
    table, p = eqn.invars[0].aval.shape, eqn.params
    strides = p["strides"] or (1,) * len(table)
    whole = (0,) * (len(table) - 1), table[1:], (1,) * (len(table) - 1)
    if (p["start_indices"][1:], p["limit_indices"][1:], tuple(strides[1:])) != whole:
        return None
    rows = eqn.outvars[0].aval.shape[0]
    if rows == table[0]:
        return None
    return RowRead(eqn, CLIP, (rows,), rows, (0,), (0,), {}, True)
