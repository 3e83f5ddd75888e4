"""`rmsprop` and `adadelta`: exact forms."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sparse_embed._core import message
from sparse_embed.exact._build import ScalarOrSchedule, build, fading, is_zero
from sparse_embed.exact._momentum import Fading, RmsTrace
from sparse_embed.exact._rest import Rest
from sparse_embed.exact._transform import ExactTransformation


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.rmsprop`, all its variants, exactly.

    In a gap the averages fade, `nu *= decay^n`. With momentum b the trace holds updates, learning
    rate included, so `w += trace sum_j b^j` whatever the schedule.

    Args:
      learning_rate: a number or an optax schedule.
      decay: of the average of squares.
      eps: in the denominator.
      initial_scale: start of the average of squares.
      eps_in_sqrt: whether `eps` is under the root.
      centered: whether the variance takes the place of the second moment.
      momentum: decay of the trace of updates, or `None`.
      nesterov: whether the trace looks ahead.
      bias_correction: whether the averages are unbiased.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.rmsprop(0.1, momentum=0.9)
      >>> tx.init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 0)
    """
    core = optax.rmsprop(
        learning_rate,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        momentum,
        nesterov,
        bias_correction,
    )
    averages = ("mu", "nu") if centered else ("nu",)
    rest: Rest = Fading(averages, fading("decay", decay))
    if momentum is not None:
        b = fading("momentum", momentum)
        rest = RmsTrace(averages, fading("decay", decay), b, nesterov)
    return build("rmsprop", core, rest, learning_rate, before)


def adadelta(
    learning_rate: ScalarOrSchedule | None = None,
    rho: ArrayLike = 0.9,
    eps: ArrayLike = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    *,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adadelta`, exactly: both averages fade in a gap, by `rho^n`; rows stay.

    Args:
      learning_rate: a number, an optax schedule, or `None`.
      rho: decay of both averages.
      eps: in both roots.
      weight_decay: must be 0. Adadelta adds it to the gradient, so no row is ever without one.
      weight_decay_mask: as in optax.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      ValueError: there is a weight decay.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.adadelta(0.1)
      >>> tx.init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 0)
    """
    if not is_zero(weight_decay):
        raise ValueError(
            message(
                f"se.exact.adadelta(weight_decay={weight_decay!r}): it goes into the gradient and "
                "from there into the averages, which has no closed form.",
                repr(weight_decay),
                "se.exact.replay(optax.adadelta(..., weight_decay=...)), or weight_decay=0.0",
            )
        )
    core = optax.adadelta(learning_rate, rho, eps, weight_decay, weight_decay_mask)
    rest = Fading(("e_g", "e_x"), fading("rho", rho))
    return build("adadelta", core, rest, 1.0 if learning_rate is None else learning_rate, before)
