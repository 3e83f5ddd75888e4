"""Huge pages under the tables, on Linux.

The rows that a step reads lie all over a table, each in a page of memory of its own. A tall table
has millions of pages of 4 kB, and to look up the address of a page takes about as long as to read a
row there. Of 2 MB pages it has so few that the processor remembers where they are.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import jax

from sparse_embed._core.tuning import tuning

_PAGE = 2 << 20  # bytes
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGEPAGE, _COLLAPSE = 14, 25  # <linux/mman.h>: from now on; at once, since Linux 6.1


def ask_for_huge_pages(tree: Any) -> None:
    """Asks Linux to move each large array of a tree, on a CPU, to huge pages. No value changes.

    An array stays where it is while steps update it in place, so once is enough. Where the system
    allows no huge pages, or has none left, everything works as before.

    Args:
      tree: of arrays; whatever else is in it is left alone.
    """
    if not tuning.huge_pages or not _allowed():
        return
    for x in jax.tree.leaves(tree):
        if _is_large(x) and all(d.platform == "cpu" for d in x.devices()):
            for shard in x.addressable_shards:
                _ask(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)


def _allowed() -> bool:
    return sys.platform == "linux" and _SETTING.exists() and "[never]" not in _SETTING.read_text()


def _is_large(x: Any) -> bool:
    return (
        isinstance(x, jax.Array)
        and not isinstance(x, jax.core.Tracer)
        and not x.is_deleted()
        and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)  # a random key has no buffer
        and x.nbytes >= 2 * _PAGE
    )


def _ask(start: int, size: int) -> None:
    """For the pages that lie wholly inside `size` bytes at `start`."""
    first, end = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
    if first >= end:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for advice in (_HUGEPAGE, _COLLAPSE):  # it is advice: an error means that it was not taken
        madvise(first, end - first, advice)
