"""`lookup_bag`: bags of ids, each reduced to one row."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sparse_embed._container import (
    PADDED,
    as_integers,
    flat_indices,
    gather_rows,
    nan_where,
    sum_dtype,
)
from sparse_embed._core import describe, is_concrete, message, whole_number
from sparse_embed._lookup.bag_reduce import (
    Bags,
    DenseBags,
    RaggedBags,
    bags_of_offsets,
    counted,
    weighted,
)
from sparse_embed._lookup.ids import (
    COMBINERS,
    Mode,
    as_table,
    over_features,
    padding_row,
    read_rows,
    row_numbers,
)

Combiner = Literal["sum", "mean", "sqrtn", "max", "min"]

_CALL = "se.lookup_bag(table, ids)"


def lookup_bag(
    table: ArrayLike,
    ids: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    combiner: Combiner = "sum",
    offsets: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    padding_idx: int | None = None,
    mode: Mode = "fill",
) -> Array:
    """Reads the rows of each bag of ids and reduces them to one row.

    With e the rows of a bag and w its weights (1 if not given):

    - `sum`: `sum(w * e)`
    - `mean`: `sum(w * e) / sum(w)`
    - `sqrtn`: `sum(w * e) / sqrt(sum(w ** 2))`
    - `max`, `min`: feature by feature, without weights. Of equal entries the first one gets
      the whole gradient.

    A bag without entries gives 0, and so does one whose divisor is 0. It is plain
    differentiable JAX, in the weights too: `jax.grad` gives the table a dense gradient,
    `se.value_and_grad` a `RowSparse` of the rows that were read.

    Args:
      table: `[V, *features]` floats.
      ids: `[..., l]` integers, bags of length l; or `[n]` with `offsets` or `segment_ids`.
      weights: floats of the shape of `ids`.
      combiner: one of the five above.
      offsets: `[b]` integers: bag i is `ids[offsets[i]:offsets[i + 1]]`, the last one runs
        to the end. They start at 0 and never decrease. With `num_segments=b` they may also
        be `[b + 1]`; ids from `offsets[b]` on then belong to no bag, which is how flat ids
        are padded to a static length.
      segment_ids: `[n]` integers: the bag of each id, in any order. Needs `num_segments`.
        An id whose bag is outside `[0, num_segments)`, negative included, is in no bag.
      num_segments: b, the static number of ragged bags.
      padding_idx: ids of this row are left out of the bag, of the divisor and of the
        gradient. May be negative: `-1` is the last row.
      mode: what an id outside `[0, V)` reads. `"fill"`: NaN, and it gets no gradient.
        `"clip"`: the nearest row, which also gets the gradient.

    Returns:
      `[..., *features]` for dense ids, `[b, *features]` for ragged ones, in the promoted
      dtype of table and weights. Sums are made in at least float32 and rounded once.

    Raises:
      TypeError: an argument has a dtype of the wrong kind.
      ValueError: shapes or options do not belong together, or `offsets` are not from 0 up
        within `[0, n]`. Inside a compiled function, where offsets have no values yet, bad
        ones make the whole result NaN instead.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> table = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
      >>> se.lookup_bag(table, jnp.array([[1, 2], [0, 0]]), combiner="mean").tolist()
      [[3.0, 4.0], [0.0, 1.0]]
      >>> se.lookup_bag(table, jnp.array([1, 2, 0]), offsets=jnp.array([0, 0, 2])).tolist()
      [[0.0, 0.0], [6.0, 8.0], [0.0, 1.0]]

    Padding, empty bags and ties are those of `torch.nn.functional.embedding_bag`; weighted
    mean and sqrtn are those of TensorFlow's `tf.nn.embedding_lookup_sparse`.
    """
    table = as_table(table, _CALL)
    num_rows = table.shape[0]
    indices = row_numbers(ids, num_rows, mode, _CALL)
    _check_combiner(combiner, weights)
    plain = weights is None
    weights = _as_weights(weights, indices, table)
    bags, bad = _bags(indices, offsets, segment_ids, num_segments)
    absent = bags.outside()
    if padding_idx is not None:
        absent |= indices == padding_row(padding_idx, num_rows, _CALL)
    # Absent entries are sent out of range, so that no gradient lists them.
    asked = jnp.where(absent, PADDED, indices)
    divided = combiner in ("sum", "mean", "sqrtn")
    if plain and divided and isinstance(bags, DenseBags) and num_rows:
        # The sum follows the read right away, so that no array holds a row for each id.
        rows = gather_rows(table, asked, fill=0).astype(sum_dtype(table.dtype))
        wrong = ~absent & ((indices < 0) | (indices >= num_rows))
        out = counted(bags.total(rows), bags.total(~absent), combiner)
        bad = over_features(bags.total(wrong) > 0, out.ndim)
        # Added, not selected: the other rows of the bag keep their gradient.
        return (out + jnp.where(bad, jnp.nan, -0.0)).astype(table.dtype)
    rows = read_rows(table, asked)
    if combiner in ("max", "min"):
        out = bags.pick(rows, absent, combiner == "max")
    else:
        out = weighted(bags, rows, weights, absent, combiner)
    out = out.astype(jnp.promote_types(table.dtype, weights.dtype))
    return out if bad is None else nan_where(bad, out)


def _check_combiner(combiner: Combiner, weights: ArrayLike | None) -> None:
    if combiner not in COMBINERS:
        wrote = f"{_CALL}: combiner={combiner!r} is unknown."
        instead = "combiner= one of 'sum', 'mean', 'sqrtn', 'max', 'min'"
        raise ValueError(message(wrote, f"combiner {describe(combiner)}", instead))
    if combiner in ("max", "min") and weights is not None:
        wrote = f"{_CALL}: combiner={combiner!r} takes no weights."
        instead = "combiner='sum', 'mean' or 'sqrtn', or leave weights out"
        raise ValueError(message(wrote, f"weights {describe(weights)}", instead))


def _as_weights(weights: ArrayLike | None, indices: Array, table: Array) -> Array:
    if weights is None:
        return jnp.ones(indices.shape, table.dtype)
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        wrote = f"{_CALL}: weights must be floats."
        got = f"weights {describe(weights)}"
        raise TypeError(message(wrote, got, f"weights.astype(jnp.{table.dtype})"))
    if weights.shape != indices.shape:
        wrote = f"{_CALL}: weights must have the shape of ids, one weight for each id."
        got = f"weights {describe(weights)} for ids of shape {indices.shape}"
        raise ValueError(message(wrote, got, "jnp.broadcast_to(weights, ids.shape)"))
    return weights


def _bags(
    ids: Array,
    offsets: ArrayLike | None,
    segment_ids: ArrayLike | None,
    num_segments: int | None,
) -> tuple[Bags, Array | None]:
    """How the ids are divided; where only run-time values tell, also whether it is bad."""
    if offsets is not None and segment_ids is not None:
        wrote = f"{_CALL}: both offsets and segment_ids are given."
        got = f"offsets {describe(offsets)}, segment_ids {describe(segment_ids)}"
        raise ValueError(message(wrote, got, "one of them"))
    if (offsets is not None or segment_ids is not None) and ids.ndim != 1:
        wrote = f"{_CALL}: offsets and segment_ids divide flat ids [n]."
        instead = "ids.reshape(-1), or leave them out: each ids[..., :] is a bag of its own"
        raise ValueError(message(wrote, f"ids of shape {ids.shape}", instead))
    if offsets is not None:
        return _bags_by_offsets(ids.size, offsets, num_segments)
    if segment_ids is not None:
        return _bags_by_segment_ids(ids.size, segment_ids, num_segments), None
    _check_dense(ids, num_segments)
    return DenseBags(ids.shape), None


def _check_dense(ids: Array, num_segments: int | None) -> None:
    if ids.ndim < 2:
        wrote = f"{_CALL}: flat ids need offsets or segment_ids to divide them."
        instead = "ids[None] for a single bag, or offsets=..., or segment_ids=..."
        raise ValueError(message(wrote, f"ids of shape {ids.shape}", instead))
    if num_segments is not None:
        wrote = f"{_CALL}: num_segments needs offsets or segment_ids."
        got = f"num_segments={num_segments} and ids of shape {ids.shape}"
        raise ValueError(message(wrote, got, "leave num_segments out"))


def _bags_by_segment_ids(n: int, segment_ids: ArrayLike, num_segments: int | None) -> RaggedBags:
    segment_ids = as_integers(segment_ids, "segment_ids", _CALL)
    if num_segments is None:
        wrote = f"{_CALL}: segment_ids need num_segments, the static number of bags."
        got = f"segment_ids {describe(segment_ids)} and no num_segments"
        raise ValueError(message(wrote, got, "segment_ids=..., num_segments=batch_size"))
    if segment_ids.shape != (n,):
        wrote = f"{_CALL}: segment_ids must name one bag for each id."
        got = f"segment_ids {describe(segment_ids)} for {n} ids"
        raise ValueError(message(wrote, got, "segment_ids of the shape of ids"))
    num_bags = _number_of_bags(num_segments)
    return RaggedBags(flat_indices(segment_ids, num_bags), num_bags)


def _bags_by_offsets(
    n: int, given: ArrayLike, num_segments: int | None
) -> tuple[RaggedBags, Array | None]:
    offsets = as_integers(given, "offsets", _CALL)
    num_bags = offsets.size if num_segments is None else _number_of_bags(num_segments)
    if offsets.ndim != 1 or offsets.size not in (num_bags, num_bags + 1):
        wrote = f"{_CALL}: offsets must hold where each bag starts, one number a bag."
        got = f"offsets {describe(offsets)}, num_segments={num_segments}"
        instead = "offsets [b], or offsets [b + 1] with num_segments=b"
        raise ValueError(message(wrote, got, instead))
    known = is_concrete(*jax.tree.leaves(given))
    if known:
        _check_offsets(np.asarray(given), n)
    bags, bad = bags_of_offsets(offsets, n, num_bags)
    return bags, None if known else bad


def _number_of_bags(num_segments: int) -> int:
    instead = "num_segments=batch_size"
    found = whole_number(num_segments, "num_segments", _CALL, instead)
    if found < 0:
        wrote = f"{_CALL}: num_segments must not be negative."
        raise ValueError(message(wrote, f"num_segments={found}", instead))
    return found


def _check_offsets(offsets: np.ndarray, n: int) -> None:
    walls = np.concatenate([offsets, [n]])
    if np.any(offsets[:1] != 0) or np.any(walls[1:] < walls[:-1]):
        wrote = f"{_CALL}: offsets must start at 0, never decrease and not exceed len(ids)."
        got = f"offsets {offsets.tolist()} for {n} ids"
        raise ValueError(message(wrote, got, "offsets = jnp.cumsum(lengths) - lengths"))
