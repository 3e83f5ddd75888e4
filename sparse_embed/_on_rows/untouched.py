"""What an untouched row is known to hold, without looking at it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_embed._core import ELEMENTWISE, REDUCTIONS, JaxprEqn, bind, is_concrete, while_tracing

_SHAPE_ONLY = frozenset(
    "reshape broadcast_in_dim transpose squeeze slice rev sort concatenate split copy".split()
)


def known(x: Any) -> Any:
    """The number that `x` is, where that can be said before the program runs; else `None`."""
    if (
        jnp.ndim(x) == 0
        and is_concrete(x)
        and not jax.dtypes.issubdtype(jnp.result_type(x), jax.dtypes.extended)
    ):
        return np.asarray(x)[()]
    return None


def untouched_value(eqn: JaxprEqn, untouched: Sequence[Any]) -> Any:
    """The number in every entry of an untouched row after a row-wise equation.

    Args:
      eqn: the equation.
      untouched: the same for its operands; `None` where it is not known.

    Returns:
      The number, or `None`. A finite operand is taken for granted in `0 * x` and `0 / x`.
    """
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    zeros = [v is not None and v == 0 for v in untouched]
    if name == "select_n" and _alike(untouched[1:]):
        return untouched[1]
    if (name in ("mul", "and") and any(zeros)) or (name in ("div", "rem") and zeros[0]):
        return np.zeros((), dtype)[()]
    if any(v is None for v in untouched):
        return None
    if name in _SHAPE_ONLY:
        return untouched[0] if _alike(untouched) else None
    if name in REDUCTIONS:
        return untouched[0] if name not in ("reduce_sum", "reduce_prod") or zeros[0] else None
    if name not in ELEMENTWISE:
        return None
    with while_tracing():
        scalars = [jnp.asarray(v, x.aval.dtype) for v, x in zip(untouched, eqn.invars, strict=True)]
        return np.asarray(bind(eqn, scalars)[0])[()]


def _alike(untouched: Sequence[Any]) -> bool:
    return all(v is not None and v == untouched[0] for v in untouched)
