"""A jitted step whose largest arrays stay allocated from one call to the next, on CPUs.

XLA gets the memory for what a step lays out anew in each call, and the system then clears every
page of it once more, which can take longer than the step. So the largest arrays come out of the
step as results, and go into the next one donated: their memory is used again, their values are not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._pages import ask_for_huge_pages

Signature = tuple[Any, ...]


class ScratchStep:
    """`step(params, opt_state, *args)`, compiled, with its first two arguments donated.

    Args:
      step: returns `(params, opt_state, value)`, and a list of large arrays made on the way.

    Attributes:
      plain: the jitted step that keeps nothing.
    """

    def __init__(self, step: Callable[..., tuple[Any, list[Array]]]):
        self._step = step = jax.jit(step, inline=True)  # so that it is traced once for all three
        self._to_keep: dict[Signature, list[jax.ShapeDtypeStruct]] = {}
        self._kept: tuple[Signature, list[Array]] | None = None  # of the last call

        def plain(params: Any, opt_state: Any, *args: Any) -> Any:
            return step(params, opt_state, *args)[0]

        def keeping(params: Any, opt_state: Any, kept: list[Array], *args: Any) -> Any:
            del kept  # it is there for its memory
            (params, opt_state, value), made = step(params, opt_state, *args)
            return params, opt_state, made, value  # jax pairs what is donated in this order

        self.plain = jax.jit(plain, donate_argnums=(0, 1))
        self._keeping = jax.jit(keeping, donate_argnums=(0, 1, 2), keep_unused=True)

    def __call__(self, params: Any, opt_state: Any, *args: Any) -> Any:
        given = jax.tree.leaves((params, opt_state, args))
        if any(isinstance(x, jax.core.Tracer) for x in given):
            return self.plain(params, opt_state, *args)
        signature = _signature((params, opt_state, args))
        if signature not in self._to_keep:
            ask_for_huge_pages((params, opt_state))
            devices = {d for x in given if isinstance(x, Array) for d in x.devices()}
            _, made = self._step.eval_shape(params, opt_state, *args)
            self._to_keep[signature] = made if len(devices) <= 1 else []
        if not self._to_keep[signature]:
            return self.plain(params, opt_state, *args)
        kept = self._take(signature)
        params, opt_state, kept, value = self._keeping(params, opt_state, kept, *args)
        self._kept = signature, kept
        return params, opt_state, value

    def _take(self, signature: Signature) -> list[Array]:
        """What the last call kept, where it fits; nobody else gets it."""
        (last, kept), self._kept = self._kept or (None, []), None
        if last == signature:
            return kept
        return [jnp.zeros(x.shape, x.dtype) for x in self._to_keep[signature]]


def _signature(tree: Any) -> Signature:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, *((jnp.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
