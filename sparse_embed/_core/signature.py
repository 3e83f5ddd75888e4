"""What decides how a tree of arrays is treated, as something to remember results by."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp


def signature(tree: Any) -> Hashable | None:
    """Structure, shapes and dtypes of a tree; `None` where its structure cannot be hashed."""
    leaves, treedef = jax.tree.flatten(tree)
    key = treedef, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    try:
        hash(key)
    except TypeError:  # it has static parts such as lists
        return None
    return key
