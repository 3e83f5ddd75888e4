"""`nadam`, `nadamw`: exact forms."""

from typing import Any

import optax
from jax.typing import ArrayLike

from sparse_embed.exact._adam import adam, adamw
from sparse_embed.exact._build import ScalarOrSchedule
from sparse_embed.exact._transform import ExactTransformation


def nadam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.nadam`, exactly: `adam` with `nesterov=True`.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squares.
      eps: added to the root.
      eps_root: added under the root.
      mu_dtype: dtype of the mean of gradients.
      nesterov: as in optax.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.exact.nadam(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 3)
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, before=before)


def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = True,
    before: optax.GradientTransformation | None = None,
) -> ExactTransformation:
    """`optax.nadamw`, exactly: `adamw` with `nesterov=True`.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squares.
      eps: added to the root.
      eps_root: added under the root.
      mu_dtype: dtype of the mean of gradients.
      weight_decay: decoupled weight decay.
      mask: which leaves decay.
      nesterov: as in optax.
      before: a chain applied to the gradients first.

    Returns:
      The transformation, with `settle`. Beside optax's state it keeps `[num_rows, k]` sums.

    Raises:
      TypeError: an argument is neither a number nor, where it may be, a schedule.
      ValueError: a decay is not below 1; at `init`, where `before` moves rows without a gradient.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.exact.nadamw(1e-3).init({"table": jnp.ones((4, 2))}).clocks["table"].sums.shape
      (4, 5)
    """
    rest = weight_decay, mask
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, *rest, nesterov=nesterov, before=before
    )
