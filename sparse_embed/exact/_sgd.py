"""`sgd`, `ema`, `adagrad`, `lion`: exact forms."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sparse_embed.exact._build import ScalarOrSchedule, build, decayed, fading, number
from sparse_embed.exact._momentum import Ema, Lion, Still, Trace
from sparse_embed.exact._rest import Rest
from sparse_embed.exact._transform import ExactTransformation


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.sgd`, exactly.

    In a gap, with momentum b: `w -= trace sum_j eta_s b^j`, `trace *= b^n`.

    Args:
      learning_rate: a number or an optax schedule.
      momentum: decay of the trace; `None` for none, and then rows rest by themselves.
      nesterov: whether the step looks ahead.
      accumulator_dtype: dtype of the trace.
      weight_decay: decoupled weight decay, `w -= eta weight_decay w` each step. Without momentum
        this is the L2 penalty `weight_decay / 2 |w|^2`.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      before: a chain applied to the gradients first, such as clipping.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> tx = se.exact.sgd(0.1, momentum=0.9, before=optax.clip_by_global_norm(1.0))
      >>> type(tx.init({"table": jnp.ones((4, 2))}).inner_state[1][0]).__name__
      'TraceState'
    """
    core = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    rest: Rest = Still()
    moment = optax.identity()
    if momentum is not None:
        rest = Trace(fading("momentum", momentum), nesterov)
        moment = optax.trace(momentum, nesterov, accumulator_dtype)
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    return build("sgd", core, rest, learning_rate, before, weight_decay, mask)


def ema(
    learning_rate: ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    debias: bool = True,
    accumulator_dtype: Any = None,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.chain(optax.ema(decay), optax.scale_by_learning_rate(learning_rate))`, exactly.

    In a gap: `w -= ema sum_j eta_s b^j / (1 - b^s)`, `ema *= b^n`.

    Args:
      learning_rate: a number or an optax schedule.
      decay: b, of the average of gradients.
      debias: whether the average is divided by `1 - b^s`.
      accumulator_dtype: dtype of the average.
      weight_decay: decoupled weight decay.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.ema(0.1, decay=0.9)
      >>> type(tx.init({"table": jnp.ones((4, 2))}).inner_state[0]).__name__
      'EmaState'
    """
    moment = optax.ema(decay, debias, accumulator_dtype)
    core = optax.chain(moment, optax.scale_by_learning_rate(learning_rate))
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    rest = Ema(fading("decay", decay), debias)
    return build("ema", core, rest, learning_rate, before, weight_decay, mask)


def adagrad(
    learning_rate: ScalarOrSchedule,
    initial_accumulator_value: ArrayLike = 0.1,
    eps: ArrayLike = 1e-7,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adagrad`, whose rows rest by themselves; with weight decay they shrink in a gap.

    Args:
      learning_rate: a number or an optax schedule.
      initial_accumulator_value: start of the sum of squares.
      eps: added to the sum.
      weight_decay: decoupled weight decay.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.adagrad(0.1, weight_decay=1e-3)
      >>> tx.init({"table": jnp.ones((4, 2))}).clocks["table"].last_step.shape
      (4,)
    """
    core = optax.adagrad(learning_rate, initial_accumulator_value, eps)
    moment = optax.scale_by_rss(initial_accumulator_value, eps)
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    return build("adagrad", core, Still(), learning_rate, before, weight_decay, mask)


def lion(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.lion`, exactly: a row that was touched once drifts by `eta` a step from then on.

    In a gap: `w <- P w - sign(mu) sum_j eta_s P_n / P_j`, `mu *= b2^n`. That is what dense Lion
    does to rare rows; `se.lazy(optax.lion(...))` leaves them where they are.

    Args:
      learning_rate: a number or an optax schedule.
      b1: weight of the momentum in the sign.
      b2: decay of the momentum.
      mu_dtype: dtype of the momentum.
      weight_decay: decoupled weight decay.
      mask: which leaves decay.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> tx = se.exact.lion(1e-4)
      >>> tx.init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 4)
    """
    core = optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
    rest = Lion(number("b2", b2))
    return build("lion", core, rest, learning_rate, before, weight_decay, mask)
