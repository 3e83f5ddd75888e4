"""`adamax`, `adamaxw`, `yogi`, `adabelief`: exact forms."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sparse_embed._core import message
from sparse_embed.exact._adaptive import Adam, Adamax, Belief
from sparse_embed.exact._build import ScalarOrSchedule, build, decayed, fading, number
from sparse_embed.exact._transform import ExactTransformation


def adamax(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adamax`, exactly: no weight decay, else as `adamaxw`.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the largest gradient.
      eps: added to the largest gradient.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.exact.adamax(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 1)
    """
    core = optax.adamax(learning_rate, b1, b2, eps)
    return build("adamax", core, _adamax(b1, b2, eps), learning_rate, before)


def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adamaxw`, exactly.

    In a gap: `w <- P_n w - mu / nu sum_j eta_s (b1 / b2)^j / (1 - b1^s) P_n / P_j`, `mu *= b1^n`,
    `nu <- max(b2^n nu, eps)`; where `eps` is reached while `mu` counts, step by step.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the largest gradient.
      eps: added to the largest gradient.
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
      >>> se.exact.adamaxw(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 3)
    """
    core = optax.adamaxw(learning_rate, b1, b2, eps, weight_decay, mask)
    rest = _adamax(b1, b2, eps)
    return build("adamaxw", core, rest, learning_rate, before, weight_decay, mask)


def _adamax(b1: Any, b2: Any, eps: Any) -> Adamax:
    b1, b2 = fading("b1", b1), number("b2", b2)
    if b1 >= b2:
        raise ValueError(
            message(
                f"se.exact.adamax(b1={b1}, b2={b2}): without gradients its steps grow.",
                f"b1 {b1} >= b2 {b2}",
                "b1 below b2, or se.exact.replay(optax.adamax(...))",
            )
        )
    return Adamax(b1, b2, number("eps", eps))


def yogi(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-3,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.yogi`, exactly.

    The second moment stays in a gap; but for that it is Adam. Its `eps` is as large as many roots,
    so in the first few hundred steps most gaps are summed step by step, which is slower. As in
    optax, a row that was never touched moves too: its moments do not start at 0.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the second moment.
      eps: added to the root.
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
      >>> se.exact.yogi(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 3)
    """
    moment = optax.scale_by_yogi(b1, b2, eps)
    core = optax.yogi(learning_rate, b1, b2, eps)
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    rest = Adam(fading("b1", b1), number("b2", b2), number("eps", eps), 0.0, False, frozen=True)
    return build("yogi", core, rest, learning_rate, before, weight_decay, mask)


def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-16,
    eps_root: ArrayLike = 1e-16,
    *,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adabelief`, exactly, and slower than the others.

    Its second moment takes in the square of its own mean at each step of a gap, differently for
    every element. The state has a closed form; the rows are summed step by step, up to the step
    where `b1^j` is below rounding (180 steps with `b1 = 0.9` in float32).

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared surprises.
      eps: added to the root.
      eps_root: added to the second moment at each step.
      nesterov: whether the mean looks ahead.
      weight_decay: decoupled weight decay.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      ValueError: `b2` is the square of `b1`.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.exact.adabelief(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 0)
    """
    numbers = fading("b1", b1), number("b2", b2), number("eps", eps), number("eps_root", eps_root)
    if abs(numbers[1] - numbers[0] ** 2) < 1e-4:
        raise ValueError(
            message(
                f"se.exact.adabelief(b1={b1}, b2={b2}): b2 is b1**2, where the closed form of its "
                "second moment divides by 0.",
                f"b1**2 = {numbers[0] ** 2}",
                "another b2, or se.exact.replay(optax.adabelief(...))",
            )
        )
    moment = optax.scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov)
    core = optax.adabelief(learning_rate, b1, b2, eps, eps_root, nesterov=nesterov)
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    rest = Belief(*numbers, nesterov)
    return build("adabelief", core, rest, learning_rate, before, weight_decay, mask)
