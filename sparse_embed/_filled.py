"""A block of rows with all that an update knows of them, and what an update makes of it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_embed._blocks import PerRow, Refused
from sparse_embed._on_rows import OnRows
from sparse_embed._update import refusal, struct

Held = dict[str, dict[Any, Array]]  # arrays, or rows of them, by what they are and by number


class Filled(NamedTuple):
    """A block of one table.

    `held` has the rows of the arrays of `BlockProgram.held`.
    """

    table: int
    indices: Array  # [b]
    rows: Array  # [b, *features], the gradient
    held: Held


def padding_row(x: Any) -> Array:
    """One row like those of a table or of its gradient."""
    like = struct(x)
    return jnp.zeros((1, *like.shape[1:]), like.dtype)


def rows_of(engine: OnRows, value: Any, block: Filled) -> Array:
    rows = engine.block(value, block.table, block.indices.size)
    if isinstance(rows, Refused):
        raise ValueError(refusal(rows.reason))
    return rows


def count_of(value: Any) -> Array:
    if isinstance(value, Refused):
        raise ValueError(refusal(value.reason))
    return value.block if isinstance(value, PerRow) else value


def as_taken(new: Array, old: Array) -> Array:
    """Rows as the array that they go to takes them."""
    return new.astype(old.dtype)
