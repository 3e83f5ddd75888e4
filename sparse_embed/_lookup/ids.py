"""The arguments of every lookup: the table, the ids, and the row that each id reads.

Letters: V the rows of the table.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container import as_integers, gather_rows, widened
from sparse_embed._core import describe, message, whole_number

Mode = Literal["fill", "clip"]
COMBINERS = ("sum", "mean", "sqrtn", "max", "min")


def as_table(table: ArrayLike, call: str) -> Array:
    """`table` as an array `[V, *features]`; `call` is how the user wrote the call."""
    instead = "a float array [num_rows, *features], such as jnp.zeros((1000, 16))"
    is_array = isinstance(table, jax.Array | np.ndarray) or hasattr(table, "__jax_array__")
    if not is_array or not jnp.issubdtype(jnp.asarray(table).dtype, jnp.inexact):
        wrote = f"{call}: table must be an array of floats."
        raise TypeError(message(wrote, f"table {describe(table)}", instead))
    table = jnp.asarray(table)
    if table.ndim == 0:
        wrote = f"{call}: table must have rows."
        raise ValueError(message(wrote, f"table {describe(table)}", instead))
    return table


def row_numbers(ids: ArrayLike, num_rows: int, mode: Mode, call: str) -> Array:
    """The row each id reads, of the shape of `ids`; outside the table it reads none.

    An id that is out of range stays as it is, for `check_ids` to name.
    """
    if mode not in ("fill", "clip"):
        wrote, got = f"{call}: mode={mode!r} is unknown.", f"mode {describe(mode)}"
        other = f"; combiner={mode!r} says what is made of a bag" if mode in COMBINERS else ""
        raise ValueError(message(wrote, got, 'mode="fill" or mode="clip"' + other))
    ids = widened(as_integers(ids, "ids", call))
    return jnp.clip(ids, 0, max(num_rows - 1, 0)) if mode == "clip" else ids


def padding_row(padding_idx: Any, num_rows: int, call: str) -> int:
    """`padding_idx` in `[0, V)`; a negative one counts from the end."""
    pad = whole_number(padding_idx, "padding_idx", call, "padding_idx=0, or padding_idx=None")
    if not -num_rows <= pad < num_rows:
        raise ValueError(
            message(
                f"{call}: padding_idx={pad} is not a row of the table.",
                f"a table of {num_rows} rows",
                f"a padding_idx in [{-num_rows}, {num_rows}), or padding_idx=None",
            )
        )
    return pad % num_rows


def read_rows(table: Array, indices: Array) -> Array:
    """`[*indices.shape, *features]`; an index outside the table reads as NaN."""
    if table.shape[0] == 0:  # XLA has no gather from an array without rows
        return jnp.full((*indices.shape, *table.shape[1:]), jnp.nan, table.dtype)
    return gather_rows(table, indices, fill=jnp.nan)


def over_features(x: Array, ndim: int) -> Array:
    """`x` with trailing axes of length 1, so that it lines up with rows of `ndim` axes."""
    return jnp.expand_dims(x, tuple(range(x.ndim, ndim)))
