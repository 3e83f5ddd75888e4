"""Arguments that many verbs take: functions, their argument numbers, numbers, optimizers."""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from sparse_embed._core.errors import describe, message


def check_function(fun: Any, wrote: str, instead: str) -> None:
    """Raises unless `fun` can be called. `wrote` is the call as the user wrote it."""
    if not callable(fun):
        raise TypeError(message(f"{wrote}: that is no function.", describe(fun), instead))


def argument_numbers(argnums: Any, wrote: str) -> int | tuple[int, ...]:
    """`argnums` as an `int`, or several."""
    several = argnums if isinstance(argnums, Sequence) else [argnums]
    if isinstance(argnums, str) or not several or not all(map(_is_whole, several)):
        raise TypeError(
            message(
                f"{wrote}: argnums must be the number of a positional argument, or several.",
                f"argnums={argnums!r}",
                "argnums=0, or argnums=(0, 2)",
            )
        )
    numbers = tuple(map(operator.index, several))
    return numbers if isinstance(argnums, Sequence) else numbers[0]


def whole_number(value: Any, name: str, wrote: str, instead: str) -> int:
    """`value` as an `int`."""
    if not _is_whole(value):
        text = f"{wrote}: {name} must be a whole number, known before the function runs."
        raise TypeError(message(text, f"{name} {describe(value)}", instead))
    return operator.index(value)


def check_scalar(value: Any, name: str, wrote: str, instead: str) -> None:
    """Raises unless `value` is one real number, which may be traced."""
    is_array = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.number)
    if not (isinstance(value, int | float) or (is_array and jnp.shape(value) == ())):
        text = f"{wrote}: {name} must be a number."
        raise TypeError(message(text, f"{name} {describe(value)}", instead))


def check_transformation(tx: Any, wrote: str, instead: str) -> None:
    """Raises unless `tx` is an optax transformation."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(message(wrote, describe(tx), instead))


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
