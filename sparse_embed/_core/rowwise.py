"""Row-wise operations: those whose row r is made of row r of their operands alone.

A row-wise equation over `[V, *features]` can be run on any block of `n` rows instead. Both halves
of the library rest on this one table: `value_and_grad` delays row-wise operations on a table until
its rows are read, and `lazy` runs an optimizer's equations on the touched rows.

Rows may also run along other axes than the first, or along several: those of a stack of tables
`[F, V, *features]` are numbered by axes `(0, 1)`.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._core.jaxpr import JaxprEqn, bind, same_varying

Axes = tuple[int, ...]

# Names of jax.lax primitives, so that a primitive which a jax version lacks is no error.
ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul name ne neg nextafter not or polygamma population_count pow real
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan
    tanh to_edtype xor zeta
    """.split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
)
_ALONG_AXIS = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())


def _without(dropped: Sequence[int], ndim: int, axes: Axes) -> Axes:
    """Axes of an array of which the `dropped` ones are gone, as axes of the whole."""
    kept = [a for a in range(ndim) if a not in dropped]
    return tuple(kept[a] for a in axes)


def _same_unless(axis: str) -> Callable[[JaxprEqn, int, Axes], Axes | None]:
    return lambda eqn, i, axes: None if eqn.params[axis] in axes else axes


def _reduced(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    return _without(eqn.params["axes"], eqn.invars[i].aval.ndim, axes)


def _squeezed(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    return _without(eqn.params["dimensions"], eqn.invars[i].aval.ndim, axes)


def _transposed(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    return tuple(eqn.params["permutation"][a] for a in axes)


def _reversed(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    return None if set(eqn.params["dimensions"]) & set(axes) else axes


def _reshaped(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    if eqn.params["dimensions"] is not None:
        return None
    old, new = eqn.invars[i].aval.shape, eqn.outvars[0].aval.shape
    found = []
    for a in axes:
        before = prod(new[:a])
        same = (b for b, size in enumerate(old) if size == new[a] and prod(old[:b]) == before)
        found.append(next(same, None))
    # Where some axis has one entry, several may fit.
    whole = None not in found and len(set(found)) == len(axes)
    return tuple(b for b in found if b is not None) if whole else None


def _broadcast(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    dims, old = eqn.params["broadcast_dimensions"], eqn.invars[i].aval.shape
    new = eqn.params["shape"]
    found = [b for a in axes for b, d in enumerate(dims) if d == a and old[b] == new[a]]
    return tuple(found) if len(found) == len(axes) else None


def _sliced(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    p, shape = eqn.params, eqn.invars[i].aval.shape
    steps = p["strides"] or (1,) * len(shape)
    whole = all(
        (p["start_indices"][a], p["limit_indices"][a], steps[a]) == (0, shape[a], 1) for a in axes
    )
    return axes if whole else None


def _padded(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    same = all(tuple(eqn.params["padding_config"][a]) == (0, 0, 0) for a in axes)
    return axes if same else None


# Primitive -> for operand i of its equation and the axes along which the rows of its outputs run,
# those along which the rows of the operand do; `None` where it does not leave rows alone.
_OPERAND_AXES: dict[str, Callable[[JaxprEqn, int, Axes], Axes | None]] = {
    **dict.fromkeys(ELEMENTWISE, lambda eqn, i, axes: axes),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(("argmax", "argmin"), _reduced),
    **dict.fromkeys(_ALONG_AXIS, _same_unless("axis")),
    "reshape": _reshaped,
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "transpose": _transposed,
    "squeeze": _squeezed,
    "rev": _reversed,
    "concatenate": _same_unless("dimension"),
    "split": _same_unless("axis"),
    "sort": _same_unless("dimension"),
    "pad": _padded,
}
ROW_WISE = frozenset(_OPERAND_AXES)


def operand_axes(eqn: JaxprEqn, i: int, axes: Axes) -> Axes | None:
    """Where row r of the outputs is made of row r of operand `i`: the axes of its rows.

    Args:
      eqn: any equation.
      i: number of an operand that has rows.
      axes: the axes along which the rows of the outputs run.

    Returns:
      The axes of the operand, in the same order; `None` if the equation is not row-wise there.
    """
    rule = _OPERAND_AXES.get(eqn.primitive.name)
    if rule is None or not eqn.invars[i].aval.ndim:
        return None
    found, shape = rule(eqn, i, axes), eqn.invars[i].aval.shape
    sizes = tuple(eqn.outvars[0].aval.shape[a] for a in axes)
    return found if found is not None and tuple(shape[a] for a in found) == sizes else None


def is_row_wise(eqn: JaxprEqn, tagged: Sequence[bool], axes: Axes = (0,)) -> bool:
    """Whether row r of every output depends only on row r of the tagged operands.

    Args:
      eqn: any equation.
      tagged: for each operand, whether it is a value known by rows.
      axes: the axes along which the rows of operands and outputs run.

    Returns:
      True where `bind_on_rows` may run it on a block of rows. The other operands are scalars,
      or have one row, or as many rows as the tagged ones.
    """
    own = [i for i, tag in enumerate(tagged) if tag]
    if not own or any(v.aval.ndim <= max(axes) for v in eqn.outvars):
        return False
    if any(operand_axes(eqn, i, axes) != axes for i in own):
        return False
    sizes = [tuple(v.aval.shape[a] for a in axes) for v in eqn.outvars]
    others = [v.aval.shape for v, tag in zip(eqn.invars, tagged, strict=True) if not tag]
    return len(set(sizes)) == 1 and all(
        shape == ()
        or len(shape) > max(axes)
        and all(shape[a] in (1, size) for a, size in zip(axes, sizes[0], strict=True))
        for shape in others
    )


def bind_on_rows(
    eqn: JaxprEqn, blocks: Sequence[Any], n: int, axes: Axes = (0,), **changes: Any
) -> list[Array]:
    """Runs a row-wise equation on blocks of `n` rows.

    Args:
      eqn: an equation that is row-wise along `axes`.
      blocks: its operands, those with rows as `as_block` makes them; scalars and one-row operands
        as they are.
      n: number of rows in a block.
      axes: the axes along which the rows of its outputs run.
      **changes: parameters of the equation that are not as it has them.

    Returns:
      Its outputs, blocks of `n` rows.
    """
    new: dict[str, Any] = {k: None for k in ("sharding", "out_sharding") if k in eqn.params}
    for key in ("new_sizes", "shape", "limit_indices"):
        if key in eqn.params:
            sizes = list(changes.get(key, eqn.params[key]))
            for a in axes:
                sizes[a] = 1
            sizes[axes[-1]] = n
            new[key] = tuple(sizes)
    return bind(eqn, same_varying(blocks), **{**changes, **new})


def as_block(rows: Array, ndim: int, axes: Axes) -> Array:
    """`[n, *features]` rows as a block of an array whose rows run along `axes`.

    It has as many dimensions as that array: `n` along the last of `axes`, one along the others.
    """
    if axes == (0,):
        return rows
    features = [a for a in range(ndim) if a not in axes]
    block = rows.reshape(rows.shape[0], *(1,) * (len(axes) - 1), *rows.shape[1:])
    order = [axes[-1], *axes[:-1], *features]  # what each dimension of the block now is
    return jnp.moveaxis(block, range(ndim), order)


def rows_of(block: Array, axes: Axes) -> Array:
    """The `[n, *features]` rows of a block: `as_block` undone."""
    if axes == (0,):
        return block
    moved = jnp.moveaxis(block, axes[-1], 0)
    ones = tuple(a + (a < axes[-1]) for a in axes[:-1])
    return jax.lax.squeeze(moved, ones)
