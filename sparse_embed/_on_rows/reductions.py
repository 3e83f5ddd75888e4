"""Reductions over the rows of a table, from the touched rows alone, a block at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._core import JaxprEqn, bind


@dataclass(frozen=True)
class Reduction:
    """A reduction in a program, found where the program was run on some rows.

    Args:
      eqn: its equation.
      table: the table whose rows it reduces.
      untouched: the number that every entry of an untouched row has there.
    """

    eqn: JaxprEqn
    table: int
    untouched: Any

    @property
    def _name(self) -> str:
        return self.eqn.primitive.name

    def start(self) -> Array:
        """The result over no rows."""
        out = self.eqn.outvars[0].aval
        return jnp.full(out.shape, _nothing(self._name, out.dtype), out.dtype)

    def of(self, block: Array, real: Array) -> Array:
        """The result over the rows of a block that are `real`."""
        real = real.reshape(-1, *(1,) * (block.ndim - 1))
        nothing = jnp.asarray(_nothing(self._name, block.dtype), block.dtype)
        return bind(self.eqn, [jnp.where(real, block, nothing)])[0]

    def join(self, a: Array, b: Array) -> Array:
        """The result over the rows of both."""
        return _JOIN[self._name](a, b)

    def end(self, result: Array, any_untouched: Array | bool) -> Array:
        """The result over all rows, if `any_untouched` of them."""
        if self._name in ("reduce_sum", "reduce_xor"):  # untouched is 0
            return result
        untouched = jnp.asarray(self.untouched, result.dtype)
        return jnp.where(any_untouched, self.join(result, untouched), result)


_JOIN: dict[str, Callable[[Any, Any], Array]] = {
    "reduce_sum": jnp.add,
    "reduce_xor": jnp.bitwise_xor,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_and": jnp.bitwise_and,
    "reduce_or": jnp.bitwise_or,
}


def _nothing(name: str, dtype: Any) -> Any:
    """What changes nothing when it is joined."""
    if name in ("reduce_sum", "reduce_xor", "reduce_or"):
        return 0
    if jnp.issubdtype(dtype, jnp.bool_):
        return name in ("reduce_and", "reduce_min")
    if name == "reduce_and":
        return -1
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf if name == "reduce_max" else jnp.inf
    info = jnp.iinfo(dtype)
    return info.min if name == "reduce_max" else info.max
