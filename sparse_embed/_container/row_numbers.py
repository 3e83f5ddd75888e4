"""Row numbers as an array that no arithmetic takes.

A `RowSparse` is a pytree, and optax maps over the leaves of trees: it would scale row numbers, or
count them in a norm. So row numbers leave the container as an array of an extended dtype, the kind
that random keys have. Whatever moves values takes it: `jit`, `scan`, `where`, indexing, saving.
Whatever computes on values raises while it is traced, and shows the dtype: `key<whole chain inside
se.lazy>`. On a device it is the same integers.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import define_prng_impl


def _no_key(*args: Any) -> NoReturn:
    raise TypeError("row numbers of a RowSparse are no random keys")


def _numbers(words: int) -> Any:
    return define_prng_impl(
        key_shape=(words,),
        seed=_no_key,
        split=_no_key,
        random_bits=_no_key,
        fold_in=_no_key,
        name=f"se_row_numbers_{32 * words}",
        tag="whole chain inside se.lazy",
    )


_IMPLS = {4: _numbers(1), 8: _numbers(2)}  # by the bytes of an integer


@partial(jax.jit, inline=True)
def locked(indices: Array) -> Array:
    """`[...]` int32 or int64 as row numbers `[...]` that no arithmetic takes.

    Bits are flipped, so that what `zeros_like` makes of them is -1: no row, and not row 0.
    """
    words = jax.lax.bitcast_convert_type(~indices, jnp.uint32)
    narrow = indices.dtype.itemsize == 4
    return jax.random.wrap_key_data(
        words[..., None] if narrow else words, impl=_IMPLS[indices.dtype.itemsize]
    )


def unlocked(leaf: Any, num_rows: int) -> Any:
    """The integers `[..., n]` that were locked.

    Negative ones, which are padding, come back as `num_rows`, `num_rows + 1`, ... by their place:
    so distinct and ascending ones, padding last, are still that where all were set to zero.

    Args:
      leaf: what `locked` made; or a `ShapeDtypeStruct` of that; or any other thing that jax puts
        into trees, which is given back.
      num_rows: rows of the table.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, Array):
        return _unlocked(leaf, num_rows)
    integers = jax.eval_shape(partial(_unlocked, num_rows=num_rows), leaf)
    return jax.ShapeDtypeStruct(integers.shape, integers.dtype)


@partial(jax.jit, inline=True, static_argnames="num_rows")
def _unlocked(numbers: Array, num_rows: int) -> Array:
    words = jax.random.key_data(numbers)
    narrow = words.shape[-1] == 1
    integer = jnp.int32 if narrow else jnp.int64
    indices = ~jax.lax.bitcast_convert_type(words[..., 0] if narrow else words, integer)
    if not indices.ndim:
        return indices
    place = jax.lax.broadcasted_iota(integer, indices.shape, indices.ndim - 1)
    return jnp.where(indices < 0, num_rows + place, indices)
