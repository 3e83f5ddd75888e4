"""A jitted step whose largest arrays stay allocated from one call to the next, on CPUs.

XLA gets the memory for what a step lays out anew in each call, and the system then clears every
page of it once more, which can take longer than the step. So the largest arrays come out of the
step as results, and go into the next one donated: their memory is used again, their values are not.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_embed._core import ask_for_huge_pages, trace_state, tuning

Signature = tuple[Any, ...]
_OUTSIDE = trace_state()  # of any function that is traced


class ScratchStep:
    """`step(params, opt_state, *args)`, compiled, with its first two arguments donated.

    What is kept stays for as long as this object, and until a call with other shapes.

    Args:
      step: returns `(params, opt_state, value)`, and a list of large arrays made on the way.

    Attributes:
      plain: the jitted step that keeps nothing.
      to_lower: the same, traced anew, so that each of its operations has the line that wrote it.
    """

    def __init__(self, step: Callable[..., tuple[Any, list[Array]]]):
        # Inlined, so that `eval_shape`, `plain` and `keeping` trace it once between them.
        inlined = self._step = jax.jit(step, inline=True)
        self._to_keep: dict[Signature, list[jax.ShapeDtypeStruct]] = {}
        self._kept: deque[tuple[Signature, list[Array]]] = deque(maxlen=1)  # of the last call

        def plain(params: Any, opt_state: Any, *args: Any) -> Any:
            return inlined(params, opt_state, *args)[0]

        def to_lower(params: Any, opt_state: Any, *args: Any) -> Any:
            return step(params, opt_state, *args)[0]

        def keeping(params: Any, opt_state: Any, kept: list[Array], *args: Any) -> Any:
            del kept  # it is there for its memory
            (params, opt_state, value), made = inlined(params, opt_state, *args)
            # Of arrays of one shape jax gives the first donated to the first result: so `made` must
            # stand where `kept` does, and before a value that may look the same.
            return params, opt_state, made, value

        self.plain = jax.jit(plain, donate_argnums=(0, 1))
        self.to_lower = jax.jit(to_lower, donate_argnums=(0, 1))
        self._keeping = jax.jit(keeping, donate_argnums=(0, 1, 2), keep_unused=True)

    def __call__(self, params: Any, opt_state: Any, *args: Any) -> Any:
        if trace_state() != _OUTSIDE:
            return self.plain(params, opt_state, *args)
        signature = _signature((params, opt_state, args))
        if signature not in self._to_keep:
            ask_for_huge_pages((params, opt_state))
            given = jax.tree.leaves((params, opt_state, args))
            devices = {d for x in given if isinstance(x, Array) for d in x.devices()}
            _, made = self._step.eval_shape(params, opt_state, *args)
            self._to_keep[signature] = made if len(devices) <= 1 else []
        if not self._to_keep[signature]:
            return self.plain(params, opt_state, *args)
        kept = self._take(signature)
        params, opt_state, kept, value = self._keeping(params, opt_state, kept, *args)
        self._kept.append((signature, kept))
        return params, opt_state, value

    def _take(self, signature: Signature) -> list[Array]:
        """What the last call kept, where it fits; nobody else gets it."""
        try:
            last, kept = self._kept.pop()
        except IndexError:
            last, kept = (), []
        if last != signature:
            kept.clear()  # before there is anything new
            kept = [
                jnp.zeros(x.shape, x.dtype, device=signature[0]) for x in self._to_keep[signature]
            ]
        return kept


def _signature(tree: Any) -> Signature:
    """What decides which program runs, and where its arrays lie."""
    leaves, treedef = jax.tree.flatten(tree)
    committed = [x.sharding for x in leaves if isinstance(x, Array) and x.committed]
    kinds = [
        (np.shape(x), getattr(x, "dtype", type(x)), getattr(x, "weak_type", None)) for x in leaves
    ]
    return committed[0] if committed else None, tuning.kept_bytes, treedef, *kinds
