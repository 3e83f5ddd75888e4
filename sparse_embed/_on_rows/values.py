"""The values of a program that runs on touched rows only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Rows:
    """A `[V, *features]` value of which the touched rows are known.

    `untouched` is the number that every entry of an untouched row is known to have, or `None`. With
    `table` `None` all rows are alike, and `block` is the one row.
    """

    block: Array  # [n, *features]
    table: int | None
    untouched: Any = None


@dataclass(frozen=True)
class PerRow:
    """A scalar of the program that has a value of its own for each touched row."""

    block: Array  # [n]
    table: int


@dataclass(frozen=True)
class Refused:
    """A value that cannot be had from the touched rows."""

    reason: str
    tables: frozenset[int]


def tables_of(values: Sequence[Any]) -> frozenset[int]:
    tagged = [v.table for v in values if isinstance(v, Rows | PerRow) and v.table is not None]
    return frozenset(tagged)


def is_tall(value: Any) -> bool:
    return not isinstance(value, Rows) and jnp.ndim(value) > 0 and jnp.shape(value)[0] > 1


def laid_out(value: Any, var: Any) -> Any:
    return jnp.broadcast_to(value.block, var.aval.shape) if isinstance(value, Rows) else value


def spread_over(value: PerRow, ndim: int) -> Array:
    return value.block.reshape(-1, *(1,) * max(ndim - 1, 0))
