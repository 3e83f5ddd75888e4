"""The distinct rows of several tables, found together: there is less to compile.

Letters: n listed rows, V the rows of a table.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container.indices import Slots, distinct, first_seen, first_seen_of_each
from sparse_embed._core import platform

TOGETHER = 1 << 17  # ids of several tables told apart at once: their scratch stays in the caches


def hashable(indices: Array) -> bool:
    """Whether these row numbers can be told apart without a sort."""
    return indices.size > 0 and indices.dtype == jnp.int32


def slots_of_each(indices: dict[int, Array], heights: dict[int, int]) -> dict[int, Slots]:
    """Gives every distinct row of each table a slot, in any order.

    Args:
      indices: `[n]` row numbers of each table, as `flat_indices` returns them.
      heights: V of each.

    Returns:
      `Slots` of size n for each table. On CPUs nothing is sorted.
    """
    found: dict[int, Slots] = {}
    alike: dict[int, list[int]] = {}
    for k, own in indices.items():
        if hashable(own) and platform() == "cpu":
            alike.setdefault(own.size, []).append(k)
        else:
            found[k] = distinct(own, heights[k], own.size)
    for n, all_of_them in alike.items():
        size = max(TOGETHER // n, 1)
        for ks in (all_of_them[i : i + size] for i in range(0, len(all_of_them), size)):
            rows = [heights[k] for k in ks]
            if len(ks) > 1 and sum(rows) + len(ks) < 2**31:
                each = first_seen_of_each(jnp.stack([indices[k] for k in ks]), rows)
                # Else each use of a list would have its own place in the joint one compiled in,
                # and XLA could not compile the uses of alike tables as one.
                each = jax.lax.optimization_barrier(each)
                found |= dict(zip(ks, each, strict=True))
            else:
                found |= {k: first_seen(indices[k], heights[k], n) for k in ks}
    return found
