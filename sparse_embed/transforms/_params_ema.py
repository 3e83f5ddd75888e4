"""`params_ema`: an average of the parameters, kept by the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_embed._core import check_scalar, is_concrete, message


class ParamsEmaState(NamedTuple):
    """State of `params_ema`.

    Args:
      ema: a tree like the parameters.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> se.params_ema(0.9).init({"table": jnp.ones((2, 1))}).ema["table"].tolist()
      [[1.0], [1.0]]
    """

    ema: Any


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps `ema <- decay ema + (1 - decay) new_params`; updates pass through as they are.

    Put it last in a chain. Inside `se.lazy` the average of a row moves when the row is touched;
    inside `se.exact.replay` it is the dense average. Read it with `optax.tree.get(state, "ema")`.

    Args:
      decay: `[]`, of the average, between 0 and 1.

    Returns:
      An optax transformation.

    Raises:
      TypeError: `decay` is not a number.
      ValueError: `decay` is not between 0 and 1; at `update`, where `params` is left out.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> tx = se.exact.replay(optax.chain(optax.adam(0.1), se.params_ema(0.5)))
      >>> params = {"table": jnp.zeros((4, 1))}
      >>> step = se.train_step(lambda p, ids: -p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([2]))
      >>> optax.tree.get(opt_state, "ema")["table"][2].round(3).tolist()
      [0.05]
    """

    call = "se.params_ema(decay)"
    check_scalar(decay, "decay", call, "se.params_ema(0.999)")
    if is_concrete(decay) and not 0 <= decay <= 1:
        wrote = f"{call}: decay must be between 0 and 1."
        raise ValueError(message(wrote, f"decay={decay}", "se.params_ema(0.999)"))

    def init(params: Any) -> ParamsEmaState:
        return ParamsEmaState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: ParamsEmaState, params: Any = None) -> Any:
        if params is None:
            raise ValueError(
                message(
                    "se.params_ema(decay): its update needs the parameters.",
                    "params=None",
                    "tx.update(grads, opt_state, params)",
                )
            )
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, new)
        return updates, ParamsEmaState(ema)

    return optax.GradientTransformation(init, update)
