"""How the rows of a bag become one: for bags of equal length and for ragged ones.

Letters: b bags, l ids a bag, n ids of all ragged bags together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import flat_indices, segment_sum, sum_dtype
from sparse_embed._lookup.ids import over_features


class DenseBags(NamedTuple):
    """Bags of equal length: the last axis of the ids."""

    shape: tuple[int, ...]  # of the ids: (..., l)

    def outside(self) -> Array:
        """Which ids belong to no bag: a mask of the shape of the ids."""
        return jnp.zeros(self.shape, bool)

    def total(self, x: Array) -> Array:
        """Sums `x`, `[*ids.shape, ...]`, over each bag."""
        return jnp.sum(x, axis=len(self.shape) - 1)

    def pick(self, rows: Array, absent: Array, largest: bool) -> Array:
        """The largest, or smallest, present entry of each bag, feature by feature.

        Of equal ones the first wins, and a NaN wins over all. A bag of no present entry
        gives 0.
        """
        axis = len(self.shape) - 1
        if self.shape[-1] == 0:
            return self.total(rows)
        absent = over_features(absent, rows.ndim)
        keys = jnp.where(absent, -jnp.inf, rows if largest else -rows)
        best = jnp.argmax(keys, axis, keepdims=True)
        # Where every present entry is -inf too, argmax may have met an absent one first.
        first = jnp.argmin(absent, axis, keepdims=True)
        present = jnp.take_along_axis(~absent, first, axis)
        is_absent = jnp.take_along_axis(jnp.broadcast_to(absent, rows.shape), best, axis)
        best = jnp.where(is_absent, first, best)
        picked = jnp.where(present, jnp.take_along_axis(rows, best, axis), 0)
        return picked.squeeze(axis)


class RaggedBags(NamedTuple):
    """Bags of any length: each of the flat ids names its own. Methods as in `DenseBags`."""

    slot: Array  # [n] the bag of each id; num_bags for no bag
    num_bags: int

    def outside(self) -> Array:
        return self.slot == self.num_bags

    def total(self, x: Array) -> Array:
        # One more slot for the ids without a bag.
        return segment_sum(x, self.slot, self.num_bags + 1)[: self.num_bags]

    def pick(self, rows: Array, absent: Array, largest: bool) -> Array:
        n, features = rows.shape[0], rows.shape[1:]
        slots = (self.num_bags + 1, *features)
        slot = jnp.where(absent, self.num_bags, self.slot)
        keys = jax.lax.stop_gradient(rows if largest else -rows)
        # NaN apart: whether a scatter-max keeps one is up to the device.
        is_nan = jnp.isnan(keys)
        keys = jnp.where(is_nan, -jnp.inf, keys)
        best = jnp.full(slots, -jnp.inf, keys.dtype).at[slot].max(keys)
        has_nan = jnp.zeros(slots, bool).at[slot].max(is_nan)
        wins = jnp.where(has_nan[slot], is_nan, keys == best[slot])
        position = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        position = jnp.where(wins, position, n)
        first = jnp.full(slots, n, jnp.int32).at[slot].min(position)[: self.num_bags]
        # Row n stands for a bag without entries.
        ended = jnp.concatenate([rows, jnp.zeros((1, *features), rows.dtype)])
        return jnp.take_along_axis(ended, first, axis=0)


Bags = DenseBags | RaggedBags


def bags_of_offsets(offsets: Array, n: int, num_bags: int) -> tuple[RaggedBags, Array]:
    """Bag i is `offsets[i]` up to `offsets[i + 1]`, or up to n where that is not given.

    Args:
      offsets: `[num_bags]` starts, or `[num_bags + 1]` starts and the end.
      n: length of the flat ids.
      num_bags: static.

    Returns:
      The bags, and whether the offsets are bad: not from 0 up, or beyond n.
    """
    offsets = flat_indices(offsets, n + 1)  # n + 1 now stands for negative or beyond n
    decreasing = jnp.any(offsets[1:] < offsets[:-1])
    bad = jnp.any(offsets > n) | jnp.any(offsets[:1] != 0) | decreasing
    position = jnp.arange(n, dtype=offsets.dtype)
    slot = jnp.searchsorted(offsets, position, side="right") - 1
    return RaggedBags(flat_indices(slot, num_bags), num_bags), bad


def weighted(bags: Bags, rows: Array, weights: Array, absent: Array, combiner: str) -> Array:
    """The weighted sum of each bag, divided as `combiner` says.

    Args:
      bags: how the ids are divided.
      rows: `[*ids.shape, *features]`.
      weights: `[*ids.shape]`.
      absent: mask of the shape of the ids; these entries count for nothing.
      combiner: `"sum"`, `"mean"` or `"sqrtn"`.

    Returns:
      `[*bags, *features]` in the promoted dtype, at least float32. Anything over 0 is 0.
    """
    wide = sum_dtype(jnp.promote_types(rows.dtype, weights.dtype))
    # Selected, not multiplied by a mask: an absent row reads as NaN.
    rows = jnp.where(over_features(absent, rows.ndim), 0, rows).astype(wide)
    weights = jnp.where(absent, 0, weights).astype(wide)
    sums = bags.total(rows * over_features(weights, rows.ndim))
    if combiner == "sum":
        return sums
    divisor = bags.total(weights if combiner == "mean" else weights * weights)
    is_zero = divisor == 0
    # Before the root, whose derivative at 0 is infinite.
    divisor = jnp.where(is_zero, 1, divisor)
    divisor = jnp.sqrt(divisor) if combiner == "sqrtn" else divisor
    quotient = sums / over_features(divisor, sums.ndim)
    return jnp.where(over_features(is_zero, sums.ndim), 0, quotient)


def counted(total: Array, count: Array, combiner: str) -> Array:
    """The sum of each bag's rows, divided as `combiner` says if all weights are 1.

    Args:
      total: `[*bags, *features]`, the sums.
      count: `[*bags]`, how many rows were added.
      combiner: `"sum"`, `"mean"` or `"sqrtn"`.

    Returns:
      `[*bags, *features]`. A bag of no rows gives 0.
    """
    if combiner == "sum":
        return total
    divisor = jnp.maximum(count, 1).astype(total.dtype)
    divisor = jnp.sqrt(divisor) if combiner == "sqrtn" else divisor
    return total / over_features(divisor, total.ndim)
