"""Error messages in three parts: what was written, what arrived, what to write instead."""

from typing import Any

import jax
import numpy as np


def message(wrote: str, got: str, instead: str) -> str:
    """One error text.

    Args:
      wrote: the call as the user wrote it and what is wrong with it.
      got: what arrived, with shape, dtype and name.
      instead: what to write instead.

    Returns:
      The three parts, one a line.
    """
    return f"{wrote}\n  got: {got}\n  write: {instead}"


def describe(x: Any) -> str:
    """`float32[4,3]` for an array, the type's name and a short value for anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return f"{type(x).__name__} ({x!r})" if np.isscalar(x) else type(x).__name__


def path_name(path: tuple[Any, ...], root: str = "params") -> str:
    """`params['user']['embedding']` for a key path of `jax.tree_util`."""
    return root + jax.tree_util.keystr(path)


def is_concrete(*arrays: Any) -> bool:
    """Whether the values of all `arrays` can be looked at now, outside any trace."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)
