"""Row numbers as an array that no arithmetic takes.

A `RowSparse` is a pytree, and optax maps over the leaves of trees: it would scale row numbers, or
count them in a norm. So row numbers leave the container as an array of an extended dtype, the kind
that random keys have. Whatever moves values takes it: `jit`, `scan`, `where`, indexing, pickle.
Whatever computes on values raises while it is traced, and shows the dtype: `key<whole chain inside
se.lazy>`. On a device it is the same integers.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
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


def unlocked(leaf: Any) -> Any:
    """The integers `[...]` that were locked.

    Args:
      leaf: what `locked` made; a `ShapeDtypeStruct` of that; its words, `[..., 1]` or `[..., 2]`
        uint32, which is what jax gives to callbacks on the host; or any other thing that jax puts
        into trees, which is given back.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return leaf
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = dtype == jnp.uint32 and jnp.shape(leaf)[-1:] in ((1,), (2,))
        return _integers(leaf) if words else leaf
    if isinstance(leaf, Array):
        return _unlocked(leaf)
    integers = jax.eval_shape(_unlocked, leaf)
    return jax.ShapeDtypeStruct(integers.shape, integers.dtype)


@partial(jax.jit, inline=True)
def _unlocked(numbers: Array) -> Array:
    return _integers(jax.random.key_data(numbers))


def _integers(words: Any) -> Any:
    if isinstance(words, np.ndarray):
        wide = np.int32 if words.shape[-1] == 1 else np.int64
        return np.invert(np.ascontiguousarray(words).view(wide)[..., 0])
    if words.shape[-1] == 1:
        return ~jax.lax.bitcast_convert_type(words[..., 0], jnp.int32)
    return ~jax.lax.bitcast_convert_type(words, jnp.int64)
