"""`train_step`: the usual training step, jitted and donated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax import Array

from sparse_embed._container import is_row_sparse
from sparse_embed._core import (
    argument_numbers,
    check_function,
    check_transformation,
    describe,
    made_for,
    message,
    platform,
    platform_of,
)
from sparse_embed._differentiate import Tables, gradients, trace, value_and_listed
from sparse_embed._lazy import LazyState
from sparse_embed._step.scratch import ScratchStep
from sparse_embed._step.settle_reads import settle_reads
from sparse_embed.exact import ExactState, ExactTransformation


class TrainStep:
    """A compiled training step: call it as `step(params, opt_state, *args)`, or audit it."""

    def __init__(self, step: Callable[..., Any]):
        self._step = step
        self._made: dict[str, ScratchStep] = {}  # by platform

    def _for(self, params: Any, args: tuple[Any, ...]) -> ScratchStep:
        """The step for the platform where the arrays are."""
        target = platform_of(params) or platform_of(args) or platform()
        if target not in self._made:
            self._made[target] = ScratchStep(made_for(target, self._step))
        return self._made[target]

    def __call__(self, params: Any, opt_state: Any, *args: Any) -> Any:
        _check_buffers(params, opt_state)
        step = self._for(params, args)
        return step(params, _unsettled(opt_state), *args)

    def lower(self, params: Any, opt_state: Any, *args: Any) -> jax.stages.Lowered:
        """As of `jax.jit(step, donate_argnums=(0, 1))`, without memory that calls keep on CPUs.

        For the platform of the arrays, or of the shardings of the `jax.ShapeDtypeStruct`s.
        """
        step = self._for(params, args)
        return step.to_lower.lower(params, _unsettled(opt_state), *args)


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    tables: Tables = None,
) -> TrainStep:
    """The training step of `loss_fn` under `tx`, jitted, with both trees updated in place.

    `loss, grads = se.value_and_grad(loss_fn)(params, *args)`, `updates = tx.update(grads,
    opt_state, params, value=loss)`, `params = optax.apply_updates(params, updates)`. Both trees
    are donated: use the returned ones, the ones passed in are gone. With an optimizer of
    `se.exact` the rows that the loss reads are settled first, in the same step.

    Args:
      loss_fn: the loss, `loss_fn(params, *args)` for the default `argnums`.
      tx: the optimizer, `se.lazy(...)` or of `se.exact`.
      argnums: where `params` goes among the arguments of `loss_fn`. Several numbers take `params`
        as a tuple.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      tables: as in `value_and_grad`: which leaves must be updated by row. A table among them that a
        loss does not read at all stays as it is; any other leaf has a dense gradient, of zeros.

    Returns:
      `step(params, opt_state, *args) -> (params, opt_state, loss)`, or `(..., (loss, aux))`.

    Raises:
      ValueError: when called, where a buffer was donated before or is there twice.
      TypeError: `loss_fn` is no function, `tx` no optax transformation, or `argnums` no argument
        numbers; when called, an exact optimizer is inside it, or it takes no gradients of tables.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.lazy(optax.sgd(0.5))
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> params, opt_state, loss = step(params, tx.init(params), jnp.array([3, 8]))
      >>> params["table"][3].tolist(), float(loss)
      ([0.5, 0.5], 4.0)
    """
    instead = "se.train_step(loss_fn, se.lazy(optax.adam(1e-3)))"
    check_function(loss_fn, "se.train_step(loss_fn, tx)", instead)
    wrote = "se.train_step(loss_fn, tx): tx must be an optax transformation."
    check_transformation(tx, wrote, instead)
    argnums = argument_numbers(argnums, "se.train_step(loss_fn, tx, argnums=...)")
    several = not isinstance(argnums, int)
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    listing = value_and_listed(loss_fn, argnums, has_aux, tables=tables, lay_out=True)
    apply = getattr(tx, "apply", None)

    def given(params: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _merge(numbers, params if several else (params,), args)

    def step(params: Any, opt_state: Any, *args: Any) -> tuple[Any, list[Array]]:
        program, at_hand = trace(loss_fn, argnums, given(params, args), {}), None
        if isinstance(tx, ExactTransformation):
            params, at_hand = settle_reads(tx, program, params, opt_state)
        elif any(map(_is_exact, jax.tree.leaves(opt_state, is_leaf=_is_exact))):
            raise TypeError(
                message(
                    "se.train_step(loss_fn, tx): an optimizer of se.exact inside another "
                    "transformation, which hides its settle.",
                    describe(tx),
                    "se.exact.adam(1e-3, before=optax.clip_by_global_norm(1.0)) as it is, or "
                    "se.exact.replay(optax.partition(...))",
                )
            )
        value, grads, laid_out = listing(program.at(params), *given(params, args))
        loss = value[0] if has_aux else value
        if at_hand is not None:
            params, opt_state = tx._apply_at_hand(grads, at_hand, params, value=loss)
        elif apply is not None:  # update and application in one, repeats not yet summed
            params, opt_state = apply(grads, opt_state, params, value=loss)
        else:
            updates, opt_state = _update(tx, gradients(grads), opt_state, params, loss)
            params = optax.apply_updates(params, updates)
        return (params, opt_state, value), laid_out

    return TrainStep(step)


def _merge(numbers: Sequence[int], params: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the loss: `params` at `numbers`, `args` in the other places."""
    total = len(params) + len(args)
    own = dict(zip((n % total for n in numbers), params, strict=True))
    left = iter(args)
    return tuple(own[i] if i in own else next(left) for i in range(total))


def _update(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, loss: Any
) -> Any:
    try:
        return optax.with_extra_args_support(tx).update(grads, opt_state, params, value=loss)
    except (NotImplementedError, TypeError, ValueError) as error:
        with_paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)
        tables = [f"params{jax.tree_util.keystr(p)} {g}" for p, g in with_paths if is_row_sparse(g)]
        first = str(error).partition("\n")[0]
        if not tables or isinstance(opt_state, LazyState):
            raise
        raise TypeError(
            message(
                "se.train_step(loss_fn, tx): a stock optax transformation cannot take the "
                "gradients of a table.",
                f"{describe(tx)}, and gradients of {', '.join(tables)}; it raised {first}",
                "tx = se.lazy(optax.chain(...)), all of the transformation inside",
            )
        ) from error


def _check_buffers(params: Any, opt_state: Any) -> None:
    """Both trees are donated, so each buffer must be alive, and there once."""
    seen: dict[int, str] = {}
    for root, tree in (("params", params), ("opt_state", opt_state)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
                continue
            name = root + jax.tree_util.keystr(path)
            if leaf.is_deleted():
                raise ValueError(
                    message(
                        "step(params, opt_state, ...): a buffer was donated to an earlier step.",
                        f"{name} {describe(leaf)}, deleted",
                        "params, opt_state, loss = step(params, opt_state, ...)",
                    )
                )
            if id(leaf) in seen:
                raise ValueError(
                    message(
                        "step(params, opt_state, ...): one array is there twice; it cannot be "
                        "donated twice.",
                        f"{seen[id(leaf)]} is {name} {describe(leaf)}",
                        "jax.tree.map(jnp.copy, ...) of one of the two trees",
                    )
                )
            seen[id(leaf)] = name


def _is_exact(node: Any) -> bool:
    return isinstance(node, ExactState)


def _unsettled(opt_state: Any) -> Any:
    """A state that was settled is of another type: one compiled step takes both."""
    return opt_state.unsettled() if _is_exact(opt_state) else opt_state
