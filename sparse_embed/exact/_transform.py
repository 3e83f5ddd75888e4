"""The transformation that users hold: init, update, settle, view, conversion."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from sparse_embed._core import made_for, platform, platform_of
from sparse_embed.exact._at_hand import AtHand, apply_at_hand, settle_at_hand
from sparse_embed.exact._checks import check_state
from sparse_embed.exact._optimizer import Exact
from sparse_embed.exact._state import ExactState
from sparse_embed.exact._table import raise_if_other


class ExactTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose rows may be behind, and `settle`, which brings them up to date.

    `settle(params, opt_state, ids=None, *, coalesced=False) -> (params, opt_state)`: `ids` is a
    tree like the params, as `se.touched` returns it: index arrays of any shape for what is read by
    row, `None` for a leaf that is used whole (or not at all), of which all rows are settled.
    Without `ids` all rows of all leaves are, a block at a time. `coalesced=True` promises ascending
    distinct indices, as from `se.touched`, and saves a sort. `se.train_step` calls it by itself.
    Params and state belong together: settled params beside the state from before are moved twice.

    `view(params, opt_state, ids) -> rows` reads rows as if they were settled and changes nothing:
    `ids` of any shape for some leaves and `None` for the others give `[*ids.shape, *features]`; an
    id outside the table reads as NaN.

    `from_dense(params, inner_state) -> opt_state` takes over the state of the dense optimizer;
    `to_dense(params, opt_state) -> (params, inner_state)` settles all rows and gives it back.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.sgd(1.0, momentum=0.5)
      >>> params = {"table": jnp.zeros((4, 1))}
      >>> step = se.train_step(lambda p, ids: -p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([2]))
      >>> params, opt_state, _ = step(params, opt_state, jnp.array([0]))
      >>> params["table"][2].item()  # the momentum of the second step is still owed
      1.0
      >>> tx.settle(params, opt_state)[0]["table"][2].item()
      1.5
    """

    settle: Callable[..., tuple[Any, ExactState]]
    view: Callable[[Any, ExactState, Any], Any]
    from_dense: Callable[[Any, Any], ExactState]
    to_dense: Callable[[Any, ExactState], tuple[Any, Any]]
    _settle_at_hand: Callable[..., tuple[Any, AtHand]]  # these two are how a `train_step` goes
    _apply_at_hand: Callable[..., tuple[Any, ExactState]]


def transformation(exact: Exact) -> ExactTransformation:
    """What users call, of an exact optimizer."""
    tx = ExactTransformation(exact.init, exact.update)

    @partial(jax.jit, static_argnames=("coalesced", "target"))
    def settle(params: Any, opt_state: ExactState, ids: Any, coalesced: bool, target: str) -> Any:
        return made_for(target, exact.settle)(params, opt_state, ids, coalesced=coalesced)

    def checked(
        params: Any, opt_state: ExactState, ids: Any = None, *, coalesced: bool = False
    ) -> tuple[Any, ExactState]:
        check_state("tx.settle(params, opt_state)", opt_state)
        target = platform_of(params) or platform()
        params, opt_state, agreeing = settle(params, opt_state, ids, coalesced, target)
        for name, agrees in agreeing.items():
            raise_if_other(name, agrees)
        return params, opt_state

    def to_dense(params: Any, opt_state: ExactState) -> tuple[Any, Any]:
        params, opt_state = checked(params, opt_state)
        return params, opt_state.inner_state

    tx.settle, tx.view = checked, exact.view
    tx.from_dense = exact.from_dense
    tx.to_dense = to_dense
    tx._settle_at_hand = partial(settle_at_hand, exact)
    tx._apply_at_hand = partial(apply_at_hand, exact)
    return tx
