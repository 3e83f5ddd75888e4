"""The numbers that decide how a step uses the memory of a CPU, in one place."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import DynamicJaxprTracer

from sparse_embed._core.errors import describe, message
from sparse_embed._core.platforms import platform


def _whole(value: Any) -> int | None:
    number = _size(value)
    return int(number) if number and number.is_integer() else None


def _size(value: Any) -> float | None:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    return number if number >= 0 else None


def _flag(value: Any) -> bool | None:
    return bool(value) if isinstance(value, bool | np.bool_) else None


# For each number what it is stored as, `None` where it cannot be that, and what it must be.
_ALLOWED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "block_rows": (_whole, "a whole number above 0"),
    "window_bytes": (_whole, "a whole number above 0"),
    "kept_bytes": (_size, 'a number of at least 0, or float("inf")'),
    "huge_pages": (_flag, "True or False"),
}


@dataclass
class Tuning:
    """How a step uses the memory of a CPU. The defaults are meant to be left alone.

    On a CPU the distinct rows of a table are gone through in blocks that stay in its caches; other
    devices take all of them at once. What a step computes does not depend on these numbers, up to
    the rounding of sums over all rows (a global norm). They are read when a step is traced, so set
    them before.

    Args:
      block_rows: rows that an update works on at a time; tables of which a step lists no more are
        updated at once.
      window_bytes: room for summed gradients; further rows wait for their turn. Never less than an
        eighth of the rows listed, so that no step takes more than eight turns.
      kept_bytes: rows that a step lays out, and their gradients, stay allocated from one step of a
        `train_step` to the next if they take no less than this. To get memory anew costs more than
        to fill it. It is held as long as the step object, for the shapes of its last call.
      huge_pages: whether Linux is asked for huge pages under tables and their optimizer's state, at
        `init` and in the first step of a `train_step`. It is not where the system gives none.

    Raises:
      ValueError: when set, to what such a number cannot be.
      AttributeError: when set, a number that there is not.

    Example:
      >>> import sparse_embed as se
      >>> se.tuning.block_rows
      2048
      >>> se.tuning.block_rows = 4096  # for a machine with larger caches
      >>> se.tuning.block_rows = 2048
    """

    block_rows: int = 2048
    window_bytes: int = 8_000_000
    kept_bytes: float = 8_000_000  # `float("inf")`: nothing
    huge_pages: bool = True

    def __setattr__(self, name: str, value: Any) -> None:
        read, wanted = _ALLOWED.get(name, (None, ""))
        wrote = f"se.tuning.{name} = {value!r}"
        if read is None:
            instead = " or ".join(f"se.tuning.{known} = ..." for known in _ALLOWED)
            raise AttributeError(message(f"{wrote}: there is no such number.", name, instead))
        if (number := read(value)) is None:
            got, instead = (
                f"{name} {describe(value)}",
                f"se.tuning.{name} = {Tuning.__dict__[name]}",
            )
            raise ValueError(message(f"{wrote}: it must be {wanted}.", got, instead))
        super().__setattr__(name, number)

    def keeps(self, x: Any) -> bool:
        """Whether the memory of an array is kept from one step to the next, on CPUs."""
        size = prod(x.shape) * x.dtype.itemsize
        return size >= self.kept_bytes and platform() == "cpu"

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
    return many and plain and platform() == "cpu"
