"""Puts together a dense optax optimizer, its `Rest`, `before`, and weight decay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from sparse_embed._core import check_scalar, describe, is_concrete, message
from sparse_embed.exact._closed_form import ClosedForm
from sparse_embed.exact._ledger import Constant
from sparse_embed.exact._rest import Rest
from sparse_embed.exact._transform import ExactTransformation, transformation

ScalarOrSchedule = ArrayLike | Callable[[Any], Any]


def build(
    name: str,
    core: optax.GradientTransformation,
    rest: Rest,
    learning_rate: ScalarOrSchedule,
    before: optax.GradientTransformation | None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> ExactTransformation:
    """The exact form of `optax.chain(before, core)`.

    Args:
      name: as the user wrote it, for messages.
      core: the dense optimizer without `before`.
      rest: what its rows do without a gradient.
      learning_rate: that of `core`.
      before: what is applied to the gradients first, or `None`.
      weight_decay: the decoupled weight decay that `core` has.
      mask: which leaves decay, as in optax.

    Raises:
      TypeError: `before` is not an optax transformation.
    """
    if before is not None and not callable(getattr(before, "update", None)):
        raise TypeError(
            message(
                f"se.exact.{name}(..., before=...): before must be an optax transformation.",
                describe(before),
                f"se.exact.{name}(..., before=optax.clip_by_global_norm(1.0))",
            )
        )
    for argument, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not callable(value):
            check_scalar(value, argument, f"se.exact.{name}", f"{argument}=1e-3, or a schedule")
    decay = None if is_zero(weight_decay) else _schedule(weight_decay)
    rate = _schedule(learning_rate)
    chosen = partial(_mask, mask)
    return transformation(ClosedForm(name, core, before, rest, rate, decay, chosen))


def decayed(
    core: optax.GradientTransformation,
    moment: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    mask: Any,
) -> optax.GradientTransformation:
    """`core`, which is `moment` and the learning rate, with a decoupled weight decay in between."""
    if is_zero(weight_decay):
        return core
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(moment, decay, optax.scale_by_learning_rate(learning_rate))


def is_zero(weight_decay: ScalarOrSchedule) -> bool:
    """Whether it is the number 0, for which optax leaves the decay out as well."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def number(name: str, value: Any) -> float:
    """A hyperparameter as a float, known before the program runs."""
    instead = f"{name}=0.9; only learning_rate and weight_decay may be schedules"
    if not callable(value):
        check_scalar(value, name, "se.exact", instead)
    if callable(value) or not is_concrete(value):
        raise TypeError(
            message(
                f"se.exact: {name} must be a number known when the optimizer is made.",
                describe(value),
                instead,
            )
        )
    return float(value)


def fading(name: str, value: Any) -> float:
    """A decay below 1, so that what it decays ends."""
    decay = number(name, value)
    if not 0 <= decay < 1:
        raise ValueError(
            message(
                f"se.exact: {name} must be at least 0 and below 1.",
                f"{name}={decay}",
                f"{name}=0.9, or se.exact.replay(...) of the dense optimizer, which takes any",
            )
        )
    return decay


def _schedule(value: ScalarOrSchedule) -> Callable[[Any], Any]:
    return value if callable(value) else Constant(value)


def _mask(mask: Any, params: Any) -> Any:
    """A tree of bools like `params`."""
    chosen = True if mask is None else mask(params) if callable(mask) else mask
    return jax.tree.map(
        lambda flag, below: jax.tree.map(lambda _: bool(flag), below), chosen, params
    )
