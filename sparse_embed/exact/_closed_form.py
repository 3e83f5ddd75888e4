"""An exact optimizer whose rows catch up in closed form."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._core import describe, message, path_name
from sparse_embed._lazy import moved_without_gradient
from sparse_embed._update import state_layout
from sparse_embed.exact._catch_up import catch_up
from sparse_embed.exact._ledger import Counts, Kernel, Ledger, Schedule
from sparse_embed.exact._optimizer import Exact
from sparse_embed.exact._rest import Rest
from sparse_embed.exact._state import counts, moments, with_moments
from sparse_embed.exact._table import Table


@dataclass(frozen=True)
class ClosedForm(Exact):
    """`optax.chain(before, core)`, exactly.

    Args:
      name: as the user wrote it, for messages.
      core: the dense optimizer without `before`.
      before: what is applied to the gradients first, or `None`.
      rest: what rows do without a gradient.
      rate: the learning rate at a count.
      decay: the decoupled weight decay at a count, or `None`.
      mask: for a tree of parameters, which of its leaves decay.
    """

    name: str
    core: optax.GradientTransformation
    before: optax.GradientTransformation | None
    rest: Rest
    rate: Schedule
    decay: Schedule | None
    mask: Callable[[Any], Any]

    @property
    def inner(self) -> optax.GradientTransformation:
        return self.core if self.before is None else optax.chain(self.before, self.core)

    def tables(self, params: Any, inner_state: Any, step: Array) -> dict[int, Table]:
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        made = counts(self._core_of(inner_state), step, treedef)
        masks = jax.tree.leaves(self.mask(params))
        found, alike = {}, dict[Any, Table]()
        for k, ((path, leaf), mask) in enumerate(zip(with_paths, masks, strict=True)):
            decay = self.decay if mask else None
            floats = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
            if jnp.ndim(leaf) and floats and (self.rest.fields or decay):
                dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
                key = dtype, decay is None
                alike[key] = alike.get(key) or self._table(dtype, decay, step, made)
                found[k] = dataclasses.replace(alike[key], name=path_name(path))
        return found

    def _table(self, dtype: Any, decay: Schedule | None, step: Array, made: Counts) -> Table:
        """What tables of one dtype share: how they catch up, and sums of the steps to come."""
        rest = self.rest.rounded(dtype)
        ledger = Ledger(self.rate, decay, rest.drifts, rest.kernels(), dtype)
        own = partial(catch_up, rest, ledger, made)
        ahead = cache(partial(_ahead, rest, ledger, made))
        return Table("", own, partial(own, every_term=True), ledger, ahead, step, made)

    def held(self, params: Any, inner_state: Any) -> list[dict[str, Array]]:
        leaves, treedef = jax.tree.flatten(params)
        fields = moments(self._core_of(inner_state), self.rest.fields, treedef)
        return [{name: own[k] for name, own in fields.items()} for k in range(len(leaves))]

    def with_held(self, params: Any, inner_state: Any, held: list[dict[str, Array]]) -> Any:
        treedef = jax.tree.structure(params)
        fields = {name: [own[name] for own in held] for name in self.rest.fields}
        core = with_moments(self._core_of(inner_state), fields, treedef)
        return core if self.before is None else (inner_state[0], core)

    def check(self, params: Any) -> None:
        """`before` must leave a gradient of zero at zero, and keep nothing for each row."""
        with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
        for path, leaf in with_paths:
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise TypeError(
                    message(
                        f"se.exact.{self.name}: tables must be real.",
                        f"{path_name(path)} {describe(leaf)}",
                        "its real and imaginary parts as two leaves",
                    )
                )
        if self.before is None:
            return
        before = optax.with_extra_args_support(self.before)
        tables = [k for k, (_, x) in enumerate(with_paths) if jnp.ndim(x) and jnp.size(x)]
        layout = state_layout(before, params, tables)
        moved = set(moved_without_gradient(before, params, layout, tables))
        moved |= {k for k in layout.table if k is not None}  # a state that fades, unseen
        if moved:
            raise ValueError(
                message(
                    f"se.exact.{self.name}(..., before=...): before moves rows that have no "
                    "gradient, or their state, which has no closed form.",
                    ", ".join(path_name(with_paths[k][0]) for k in sorted(moved)),
                    f"weight_decay=... for se.exact.{self.name} in place of "
                    "add_decayed_weights, or se.exact.replay(optax.chain(before, ...))",
                )
            )

    def _core_of(self, inner_state: Any) -> Any:
        return inner_state if self.before is None else inner_state[1]


def _ahead(rest: Rest, ledger: Ledger, made: Counts, steps: int) -> tuple[Array, Array]:
    """Sums of the steps to come, so many steps from now; and these and the optimizer's numbers."""
    longest = rest.longest()
    kernels = rest.kernels()
    if longest is not None:
        kernels = (*kernels, Kernel(min(longest, 0.999), jnp.ones_like))
    watched = dataclasses.replace(ledger, kernels=kernels)
    numbers = jnp.asarray(rest.numbers(), ledger.dtype)
    sums = watched.tails(made.ahead(steps))
    return sums[: len(ledger.kernels)], jnp.concatenate([sums, numbers])
