"""`rowwise_adagrad`: Adagrad with one accumulator for each row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._core import check_scalar, message


class RowwiseAdagradState(NamedTuple):
    """State of `rowwise_adagrad`.

    Args:
      sum_of_squares: a tree like the parameters, with `[num_rows]` in place of
        `[num_rows, *features]`, in at least float32.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> state = se.rowwise_adagrad(0.1).init({"table": jnp.ones((4, 2))})
      >>> state[0].sum_of_squares["table"].shape
      (4,)
    """

    sum_of_squares: Any


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
) -> optax.GradientTransformation:
    """Adagrad whose accumulator is the mean over a row's features.

    For each row `r` with gradient `g`: `s_r <- s_r + mean(g^2)`, then
    `w_r <- w_r - learning_rate g / (sqrt(s_r) + eps)`. The state is one number a row in place of
    one a feature. For a leaf `[n]` this is Adagrad; a scalar is a row of its own. It is exactly
    sparse: a row without a gradient stays as it is, so `se.lazy` gives the dense result.

    Args:
      learning_rate: a number or a schedule.
      initial_accumulator_value: of `s`, at least 0.
      eps: above 0 if `initial_accumulator_value` is 0.

    Returns:
      An optax transformation, to be used inside `se.lazy`, or alone with dense gradients.

    Raises:
      TypeError: an argument is neither a number nor, for the rate, a schedule.
      ValueError: `initial_accumulator_value` or `eps` is negative, or both are 0.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> params = {"table": jnp.zeros((4, 2))}
      >>> tx = se.lazy(se.rowwise_adagrad(0.1, initial_accumulator_value=0.0))
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([2]))
      >>> params["table"][2].round(3).tolist()
      [-0.1, -0.1]

    The rule is that of "EXACT_ROWWISE_ADAGRAD" in FBGEMM, without weight decay.
    """
    call = "se.rowwise_adagrad(learning_rate, initial_accumulator_value, eps)"
    if not callable(learning_rate):
        check_scalar(learning_rate, "learning_rate", call, "se.rowwise_adagrad(0.1)")
    for name, value in (("initial_accumulator_value", initial_accumulator_value), ("eps", eps)):
        check_scalar(value, name, call, "se.rowwise_adagrad(0.1, 0.1, eps=1e-7)")
    if min(initial_accumulator_value, eps) < 0 or max(initial_accumulator_value, eps) == 0:
        raise ValueError(
            message(
                f"{call}: neither may be negative, nor both 0.",
                f"initial_accumulator_value={initial_accumulator_value}, eps={eps}",
                "se.rowwise_adagrad(learning_rate, initial_accumulator_value=0.0, eps=1e-8)",
            )
        )

    def init(params: Any) -> RowwiseAdagradState:
        return RowwiseAdagradState(
            jax.tree.map(
                lambda p: jnp.full(jnp.shape(p)[:1], initial_accumulator_value, _wide(p)), params
            )
        )

    def update(updates: Any, state: RowwiseAdagradState, params: Any = None) -> Any:
        total = jax.tree.map(lambda g, s: s + _mean_square(g), updates, state.sum_of_squares)

        def scaled(g: Array, s: Array) -> Array:
            divisor = jnp.sqrt(s) + eps
            return (g / divisor.reshape(*s.shape, *(1,) * (g.ndim - s.ndim))).astype(g.dtype)

        return jax.tree.map(scaled, updates, total), RowwiseAdagradState(total)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


def _wide(x: Any) -> jnp.dtype:
    """The dtype of sums of squares: real, at least float32."""
    return jnp.promote_types(jnp.finfo(jnp.result_type(x)).dtype, jnp.float32)


def _mean_square(g: Array) -> Array:
    """`[num_rows]` mean of the squares of each row."""
    wide = jnp.abs(g).astype(_wide(g))
    return jnp.mean(wide * wide, axis=tuple(range(1, g.ndim)))
