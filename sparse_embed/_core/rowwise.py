"""Row-wise operations: those whose row r is made of row r of their operands alone.

A row-wise equation over `[V, *features]` can be run on any block of `n` rows instead. Both halves
of the library rest on this one table: `value_and_grad` delays row-wise operations on a table until
its rows are read, and `lazy` runs an optimizer's equations on the touched rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from sparse_embed._core.jaxpr import JaxprEqn, bind

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


def _axes(eqn: JaxprEqn) -> bool:
    return 0 not in eqn.params["axes"]


def _reshape(eqn: JaxprEqn) -> bool:
    height = eqn.invars[0].aval.shape[0]
    return eqn.params["dimensions"] is None and eqn.params["new_sizes"][:1] == (height,)


def _broadcast(eqn: JaxprEqn) -> bool:
    height = eqn.invars[0].aval.shape[0]
    return eqn.params["broadcast_dimensions"][:1] == (0,) and eqn.params["shape"][0] == height


def _slice(eqn: JaxprEqn) -> bool:
    p, height = eqn.params, eqn.invars[0].aval.shape[0]
    step = 1 if p["strides"] is None else p["strides"][0]
    return (p["start_indices"][0], p["limit_indices"][0], step) == (0, height, 1)


# Primitive -> whether these parameters leave axis 0 alone.
_LEAVES_ROWS_ALONE: dict[str, Callable[[JaxprEqn], bool]] = {
    **dict.fromkeys(ELEMENTWISE, lambda eqn: True),
    **dict.fromkeys(REDUCTIONS, _axes),
    **dict.fromkeys(("argmax", "argmin"), _axes),
    **dict.fromkeys(_ALONG_AXIS, lambda eqn: eqn.params["axis"] != 0),
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "transpose": lambda eqn: eqn.params["permutation"][0] == 0,
    "squeeze": lambda eqn: 0 not in eqn.params["dimensions"],
    "rev": lambda eqn: 0 not in eqn.params["dimensions"],
    "concatenate": lambda eqn: eqn.params["dimension"] != 0,
    "split": lambda eqn: eqn.params["axis"] != 0,
    "sort": lambda eqn: eqn.params["dimension"] != 0,
    "pad": lambda eqn: tuple(eqn.params["padding_config"][0]) == (0, 0, 0),
}


def is_row_wise(eqn: JaxprEqn, tagged: Sequence[bool]) -> bool:
    """Whether row r of every output depends only on row r of the tagged operands.

    Args:
      eqn: any equation.
      tagged: for each operand, whether it is a `[V, *features]` value known by rows.

    Returns:
      True where `bind_on_rows` may run it on a block of rows. The other operands are scalars,
      or have one row, or `V` rows of their own.
    """
    heights = {v.aval.shape[0] for v, tag in zip(eqn.invars, tagged, strict=True) if tag}
    if len(heights) != 1 or eqn.primitive.name not in _LEAVES_ROWS_ALONE:
        return False
    (height,) = heights
    others = [v.aval.shape for v, tag in zip(eqn.invars, tagged, strict=True) if not tag]
    return (
        all(shape == () or shape[0] in (1, height) for shape in others)
        and all(v.aval.shape[:1] == (height,) for v in eqn.outvars)
        and _LEAVES_ROWS_ALONE[eqn.primitive.name](eqn)
    )


def bind_on_rows(eqn: JaxprEqn, blocks: Sequence[Any], n: int) -> list[Array]:
    """Runs a row-wise equation on blocks of `n` rows.

    Args:
      eqn: an equation for which `is_row_wise` holds.
      blocks: its operands: `[n, *features]` in place of each `[V, *features]`; scalars and
        one-row operands as they are.
      n: number of rows in a block.

    Returns:
      Its outputs, `[n, *features]` each.
    """
    changes: dict[str, Any] = {k: None for k in ("sharding", "out_sharding") if k in eqn.params}
    for key in ("new_sizes", "shape", "limit_indices"):
        if key in eqn.params:
            changes[key] = (n, *eqn.params[key][1:])
    return bind(eqn, blocks, **changes)
