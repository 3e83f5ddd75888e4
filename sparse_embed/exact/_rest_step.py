"""One step of any optimizer on some rows of one table, without a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._container import old_rows
from sparse_embed._core import as_jaxpr
from sparse_embed._on_rows import OnRows, Refused, Rows
from sparse_embed._update import ELSEWHERE, StateLayout, refusal

Own = tuple[Array, dict[str, Array]]  # rows, and the leaves of their state by number


@dataclass(frozen=True)
class Program:
    """The update of an optimizer at the tables' true shapes."""

    jaxpr: Any  # of gradients, state, params and the loss
    consts: Sequence[Any]
    passed: list[bool]  # which leaves of the state it passes through as they are


def program_of(
    inner: optax.GradientTransformationExtraArgs, params: Any, layout: StateLayout
) -> Program:
    """Traces the update of `inner`."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    structs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    def update(
        given: tuple[str, ...], grads: list[Any], state: list[Any], params: list[Any], loss: Array
    ) -> list[Any]:
        updates, new_state = inner.update(
            treedef.unflatten(grads),
            layout.treedef.unflatten(state),
            treedef.unflatten(params),
            **dict.fromkeys(given, loss),
        )
        return [*jax.tree.leaves(updates), *jax.tree.leaves(new_state)]

    args = structs, layout.shapes, structs, jax.ShapeDtypeStruct((), jnp.float32)
    try:
        jaxpr, consts = as_jaxpr(partial(update, ()), *args)
    except (TypeError, ValueError):  # it asks for the loss
        jaxpr, consts = as_jaxpr(partial(update, ("value",)), *args)
    n = len(leaves)
    passed = [jaxpr.outvars[n + i] is jaxpr.invars[n + i] for i in range(len(layout.shapes))]
    return Program(jaxpr, consts, passed)


@dataclass(frozen=True)
class RestStep:
    """`inner.update` at the tables' true shapes, run on rows of leaf `k` whose gradient is zero.

    What is not known of a step in the past (gradients of other rows, the loss, shared numbers of
    the state) is filled with `unknown`; `Replay.check` sees to it that the rows do not depend on
    that. One more row, with that gradient, keeps norms of gradients away from zero.

    Args:
      program: the update of the optimizer.
      leaves: the parameters.
      layout: of the state.
      state: its leaves at present.
      k: the number of the leaf.
      unknown: what stands for everything that is not known.
    """

    program: Program
    leaves: Sequence[Any]
    layout: StateLayout
    state: Sequence[Any]
    k: int
    unknown: float = 1.0

    def __call__(self, indices: Array, w: Array, moments: dict[str, Array], left: Array) -> Own:
        """The step that was made `left` steps before the next one.

        Args:
          indices: `[u]`, which rows they are.
          w: `[u, *features]`.
          moments: rows of the state leaves of this table, by their number.
          left: `[]` int32, at least 1.

        Returns:
          The rows and the leaves of their state.
        """
        u, n = indices.shape[0], len(self.leaves)
        engine, outs = self._run(indices, w, moments, left)

        def taken(value: Any, like: Array) -> Array:
            block = engine.block(value, self.k, u + 1)
            if isinstance(block, Refused):
                raise ValueError(refusal(block.reason))
            return block[:-1].astype(like.dtype)

        new = w + taken(outs[self.k], w)
        return new, {i: taken(outs[n + int(i)], x) for i, x in moments.items()}

    def counts_go_up(self) -> bool:
        """Whether each count of the state is one higher after a step. To be asked outside `jit`."""
        like = self.leaves[self.k]
        w = jnp.ones((1, *jnp.shape(like)[1:]), jnp.result_type(like))
        moments = {
            str(i): jnp.ones((1, *x.shape[1:]), x.dtype)
            for i, x in enumerate(self.layout.shapes)
            if self.layout.table[i] == self.k
        }
        _, outs = self._run(jnp.arange(1), w, moments, jnp.int32(0))
        after = outs[len(self.leaves) :]
        return all(
            not isinstance(new, Rows | Refused) and int(new) == int(old) + 1
            for i, (old, new) in enumerate(zip(self.state, after, strict=True))
            if self._is_count(i)
        )

    def _is_count(self, i: int) -> bool:
        """Whether a leaf of the state is an integer that steps change."""
        shape = self.layout.shapes[i]
        integer = jnp.issubdtype(shape.dtype, jnp.integer) and not shape.shape
        return integer and not self.program.passed[i]

    def _run(
        self, indices: Array, w: Array, moments: dict[str, Array], left: Array
    ) -> tuple[OnRows, list[Any]]:
        """The update, with what is not known filled in."""
        program, leaves = self.program, self.leaves
        heights = {j: jnp.shape(x)[0] for j, x in enumerate(leaves) if jnp.ndim(x)}
        u = indices.shape[0]

        def other(x: Any) -> Array:
            """One row of another leaf."""
            return jnp.full((1, *jnp.shape(x)[1:]), self.unknown, jnp.result_type(x))

        def more(x: Array, row: float) -> Array:
            return jnp.concatenate([x, jnp.full((1, *x.shape[1:]), row, x.dtype)])

        def rows(x: Any, j: int | None, own: Array, row: float = 0) -> Any:
            return Rows(more(own, row) if j == self.k else other(x), j)

        def of_state(i: int, x: Any) -> Any:
            table = self.layout.table[i]
            if table == ELSEWHERE:
                reason = "its state mixes the rows of a table with other numbers"
                return Refused(reason, frozenset(heights))
            if table is not None:
                return rows(x, table, moments.get(str(i), w))
            if self._is_count(i):
                return jnp.asarray(x) - left.astype(jnp.result_type(x))
            if program.passed[i] or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                return x
            return jnp.asarray(x) * self.unknown

        def gather(j: int, x: Any) -> Array:
            x = jnp.asarray(x)
            return more(old_rows(x, indices), 0) if j == self.k else other(x)

        real = {j: jnp.ones(u + 1 if j == self.k else 1, bool) for j in heights}
        engine = OnRows(heights, real, program.consts, gather)
        tall = [j if j in heights else None for j in range(len(leaves))]
        zero = jnp.zeros_like(w)
        grads = [
            jnp.full(jnp.shape(x), self.unknown, jnp.result_type(x))
            if j is None
            else Rows(rows(x, j, zero, self.unknown).block, j, 0)
            for j, x in zip(tall, leaves, strict=True)
        ]
        held = [of_state(i, x) for i, x in enumerate(self.state)]
        values = [x if j is None else rows(x, j, w) for j, x in zip(tall, leaves, strict=True)]
        args = [*grads, *held, *values, jnp.float32(self.unknown)]
        outs = engine.run((program.jaxpr, program.consts), args)
        return engine, outs
