"""`adam`, `adamw`, `amsgrad`: exact forms."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sparse_embed.exact._adaptive import Adam, Amsgrad
from sparse_embed.exact._build import ScalarOrSchedule, build, decayed, fading, number
from sparse_embed.exact._transform import ExactTransformation


def adam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adam`, exactly: no weight decay, else as `adamw`.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squares.
      eps: added to the root.
      eps_root: added under the root. Above 0 a gap has no closed form and is summed step by step.
      mu_dtype: dtype of the mean of gradients.
      nesterov: whether the mean looks ahead (Nadam).
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.exact.adam(0.1, before=optax.clip_by_global_norm(1.0))
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([3]))
      >>> params, opt_state, loss = step(params, opt_state, jnp.array([8]))
      >>> params, opt_state = tx.settle(params, opt_state)
      >>> params["table"][3].round(4).tolist()  # the second step moved it, as in dense Adam
      [0.8330, 0.8330]
    """
    core = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return build("adam", core, _rest(b1, b2, eps, eps_root, nesterov), learning_rate, before)


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.adamw`, exactly.

    In a gap, with `a_j = eta_s b1^j / (1 - b1^s)` and `T_j = sqrt((1 - b2^s) / b2^j)`:
    `w <- P_n w - mu sum_j a_j P_n / P_j T_j / (sqrt(nu) + eps T_j)`, `mu *= b1^n`, `nu *= b2^n`,
    where `P_j` is the product of `1 - eta_s weight_decay`. With `eps = 0` that is a geometric sum.
    Else it is had from the mean and variance of T; where that would miss a relative 1e-6 (1e-9 in
    float64), it is summed step by step.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squares.
      eps: added to the root.
      eps_root: added under the root. Above 0 a gap has no closed form and is summed step by step.
      mu_dtype: dtype of the mean of gradients.
      weight_decay: decoupled weight decay, a number or a schedule; `eta_s * weight_decay` below 1.
      mask: which leaves decay. A table that it leaves out does not decay at all.
      nesterov: whether the mean looks ahead (NadamW).
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.exact.adamw(0.1, weight_decay=0.5)
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> params, opt_state, loss = step(params, tx.init(params), jnp.array([3]))
      >>> params, opt_state = tx.settle(params, opt_state)
      >>> params["table"][3:5, 0].tolist()  # no row is spared the decay
      [0.85, 0.95]
    """
    core = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    rest = _rest(b1, b2, eps, eps_root, nesterov)
    return build("adamw", core, rest, learning_rate, before, weight_decay, mask)


def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.amsgrad`, exactly, with any `eps` and `eps_root`.

    The largest root stays in a gap, so `w -= mu / (sqrt(nu_max + eps_root) + eps) R` with
    `R = sum_j eta_s b1^j / (1 - b1^s)`.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squares.
      eps: added to the root.
      eps_root: added under the root.
      mu_dtype: dtype of the mean of gradients.
      bias_correction_mu: whether the mean of gradients is unbiased.
      bias_correction_nu: whether the mean of squares is unbiased.
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
      >>> se.exact.amsgrad(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 1)
    """
    options = b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu
    moment = optax.scale_by_amsgrad(*options)
    core = optax.amsgrad(learning_rate, *options)
    core = decayed(core, moment, learning_rate, weight_decay, mask)
    numbers = fading("b1", b1), number("b2", b2), number("eps", eps), number("eps_root", eps_root)
    rest = Amsgrad(*numbers, bias_correction_mu)
    return build("amsgrad", core, rest, learning_rate, before, weight_decay, mask)


def _rest(b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool) -> Adam:
    numbers = fading("b1", b1), number("b2", b2), number("eps", eps), number("eps_root", eps_root)
    return Adam(*numbers, nesterov)
