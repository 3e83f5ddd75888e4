"""The sizes that decide how the work of a step is cut into pieces, in one place."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.interpreters.partial_eval import DynamicJaxprTracer


@dataclass
class Tuning:
    """How many rows a step works on at a time. The defaults are meant to be left alone.

    On a CPU the distinct rows of a table are gone through in blocks that stay in its caches; other
    devices take all of them at once. What a step computes does not depend on these numbers, up to
    the rounding of sums over all rows (a global norm). They are read when a step is traced, so set
    them before.

    Args:
      block_rows: rows that an update works on at a time; tables of which a step lists no more are
        updated at once.
      window_bytes: room for summed gradients; further rows wait for their turn. Never less than an
        eighth of the rows listed, so that no step takes more than eight turns.

    Example:
      >>> import sparse_embed as se
      >>> se.tuning.block_rows
      2048
      >>> se.tuning.block_rows = 4096  # for a machine with larger caches
      >>> se.tuning.block_rows = 2048
    """

    block_rows: int = 2048
    window_bytes: int = 8_000_000

    def window_rows(self, listed: int, row_bytes: int) -> int:
        """Rows of a window: whole blocks, and no more than can be needed."""
        block = self.block_rows
        rows = max(self.window_bytes // max(row_bytes, 1), -(-listed // 8))
        return -(-max(min(rows, listed), 1) // block) * block


tuning = Tuning()


def in_blocks(indices: Any, *others: Any) -> bool:
    """Whether a table of which a step lists these rows is updated a block at a time.

    Only within a compiled function: a loop outside of one would be compiled at each call. And only
    where neither `vmap` nor a derivative is at work on any of the arrays: neither can do much with
    a loop whose number of turns is not known.

    Args:
      indices: `[n]` as the step lists them.
      others: the arrays that such a loop would read.
    """
    plain = all(
        isinstance(x, DynamicJaxprTracer) for x in (indices, *others) if isinstance(x, Tracer)
    )
    many = isinstance(indices, Tracer) and indices.size > tuning.block_rows
    return many and plain and jax.default_backend() == "cpu"
