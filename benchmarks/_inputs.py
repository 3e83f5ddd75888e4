"""What goes into a step: the table with its moments, and batches of ids."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SEED = 0
BATCHES = 64  # then they come again

Shape = int | tuple[int, ...]


def arrays(num_rows: int, d: int) -> dict[str, jax.Array]:
    """A table `[num_rows, d]` of small random entries, and two moments of zeros."""
    table = jax.random.uniform(jax.random.key(SEED), (num_rows, d), minval=-0.05, maxval=0.05)
    return {"table": table, **{m: jnp.zeros((num_rows, d)) for m in ("m0", "m1")}}


def dense_leaf(d: int) -> jax.Array:
    """`[d]` random entries."""
    return jax.random.normal(jax.random.key(SEED + 1), (d,)) / d**0.5


def uniform(num_rows: int, shape: Shape) -> list[jax.Array]:
    """Ids drawn from the whole table."""
    rng = np.random.default_rng(SEED)
    return [jnp.asarray(rng.integers(num_rows, size=shape, dtype=np.int32)) for _ in range(BATCHES)]


def hot(num_rows: int, shape: Shape, rows: int) -> list[jax.Array]:
    """Ids drawn from the same `rows` rows in every batch, which lie all over the table."""
    rng = np.random.default_rng(SEED)
    few = rng.choice(num_rows, rows, replace=False).astype(np.int32)
    return [jnp.asarray(rng.choice(few, shape)) for _ in range(BATCHES)]


def zipf(num_rows: int, shape: Shape, power: float) -> list[jax.Array]:
    """Ids with weights `rank ** -power`; the ranks lie in random order in the table."""
    rng = np.random.default_rng(SEED)
    rows = rng.permutation(num_rows).astype(np.int32)
    below = np.cumsum(np.arange(1, num_rows + 1) ** -power)
    draws = (rng.random(shape) * below[-1] for _ in range(BATCHES))
    return [jnp.asarray(rows[np.searchsorted(below[:-1], x, side="right")]) for x in draws]


def distinct(batches: Sequence[jax.Array]) -> int:
    """Distinct rows of a batch, on average."""
    return round(np.mean([len(np.unique(ids)) for ids in batches]))


def rotated(batches: list[jax.Array], way: int) -> list[jax.Array]:
    """The same batches begun elsewhere, so that no way finds the rows of the last one in cache."""
    first = 11 * way % len(batches)
    return batches[first:] + batches[:first]
