"""Table-shaped values that are computed only at the rows that are read."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_embed._container import loosely
from sparse_embed._core import JaxprEqn, bind, bind_on_rows


class Delayed:
    """A table-shaped value, kept as the row-wise operations that make it."""

    def __init__(self, eqn: JaxprEqn, operands: list[Any], out: int):
        self.eqn, self.operands, self.out = eqn, operands, out

    def whole(self) -> Array:
        return bind(self.eqn, whole(self.operands))[self.out]

    def rows(self, ids: Array, taps: dict[int, Array], memo: dict[int, Array]) -> Array:
        """Its rows at in-range `ids` `[n]`, with the taps of its leaves added."""
        if id(self) not in memo:
            height = self.eqn.outvars[self.out].aval.shape[0]
            blocks = [_rows(x, height, ids, taps, memo) for x in self.operands]
            memo[id(self)] = bind_on_rows(self.eqn, blocks, ids.shape[0])[self.out]
        return memo[id(self)]


class Leaf(Delayed):
    """A parameter leaf, where every chain of delayed operations ends."""

    def __init__(self, number: int, table: Array):
        self.number, self.table = number, table

    def whole(self) -> Array:
        return self.table

    def rows(self, ids: Array, taps: dict[int, Array], memo: dict[int, Array]) -> Array:
        if id(self.number) not in memo:
            rows = loosely(self.table.at[ids].get(mode="promise_in_bounds"), ids)
            tap = taps.get(self.number)
            memo[id(self.number)] = rows if tap is None else rows + tap
        return memo[id(self.number)]


def _rows(x: Any, height: int, ids: Array, taps: dict, memo: dict) -> Any:
    if isinstance(x, Delayed):
        return x.rows(ids, taps, memo)
    tall = jnp.ndim(x) and jnp.shape(x)[0] == height and height > 1
    return jnp.asarray(x).at[ids].get(mode="promise_in_bounds") if tall else x


def whole(values: Sequence[Any]) -> list[Any]:
    """`values` with the delayed ones computed."""
    return [v.whole() if isinstance(v, Delayed) else v for v in values]


def taken_apart(
    values: Sequence[Delayed],
) -> tuple[list[Array], Callable[[Sequence[Array]], list[Delayed]]]:
    """The arrays that delayed values are made of, and how to make them of other ones.

    A `shard_map` must be given the arrays it reads: closed over, they would be of another mesh.
    """
    arrays: list[Array] = []
    places: dict[int, int] = {}

    def take(x: Any) -> None:
        if isinstance(x, Leaf):
            x = x.table
        if isinstance(x, Delayed):
            for operand in x.operands:
                take(operand)
        elif isinstance(x, Array) and id(x) not in places:
            places[id(x)] = len(arrays)
            arrays.append(x)

    for value in values:
        take(value)

    def rebuilt(new: Sequence[Array]) -> list[Delayed]:
        made: dict[int, Any] = {}

        def make(x: Any) -> Any:
            if isinstance(x, Leaf):
                return Leaf(x.number, new[places[id(x.table)]])
            if isinstance(x, Delayed):
                if id(x) not in made:
                    made[id(x)] = Delayed(x.eqn, [make(o) for o in x.operands], x.out)
                return made[id(x)]
            return new[places[id(x)]] if id(x) in places else x

        return [make(value) for value in values]

    return arrays, rebuilt
