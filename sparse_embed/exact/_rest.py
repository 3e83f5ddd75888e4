"""What a row does while its gradient is zero: the declaration of an optimizer."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_embed.exact._ledger import Between, Kernel, power

Moments = Mapping[str, Array]  # a row's optimizer state by field, [u, *features] each


@dataclass(frozen=True)
class Gap:
    """The gaps of some rows."""

    n: Array  # [u, 1, ...] floats: steps that each row missed
    first: Array  # [u, 1, ...] int32: the number of the first of them, by the optimizer's count

    def power(self, ratio: float) -> Array:
        """`ratio**n`, `[u, 1, ...]`."""
        return power(ratio, self.n)


class Rest:
    """An optimizer on rows whose gradient is zero.

    Over a gap of n steps the row goes to `P w - shift` and its state to `decayed`. Subclasses say
    what `shift` is, in closed form; where that is not accurate enough, `inexact` says so and the
    shift is summed term by term.
    """

    drifts: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Those fields of the optax state that hold rows."""
        raise NotImplementedError

    def kernels(self) -> tuple[Kernel, ...]:
        """The geometric sums that `shift` needs."""
        return ()

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        """The state after the gap; fields left out stay as they are."""
        return {}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array | None:
        """What the gap takes from the rows, `[u, *features]`; `None`: nothing.

        `sums` come in the shape of `gap.n`.
        """
        return None

    def inexact(self, moments: Moments, gap: Gap, sums: Between) -> Array | None:
        """Entries where `shift` is not to be trusted, bools `[u, *features]`; `None`: nowhere."""
        return None

    def longest(self) -> float | None:
        """The ratio at which terms fade, where they are summed one by one; `None`: they are not."""
        return None

    def term(self, moments: Moments, j: Array, step: Array) -> Array:
        """What step tau + j takes from the rows at learning rate one.

        Args:
          moments: the state as of step tau.
          j: `[]`, the position in the gap.
          step: `[u, 1, ...]`, the number of that step.

        Returns:
          `[u, *features]`.
        """
        raise NotImplementedError

    def numbers(self) -> list[float]:
        """The hyperparameters on which a gap depends."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return [float(x) for x in values if isinstance(x, float | bool)]

    def rounded(self, dtype: Any) -> Self:
        """The same with its numbers as dense optax rounds them in an update of this dtype.

        A decay of 0.999 is 0.99900001 in float32, and 1000 steps make that a relative 1e-5.
        """
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        floats = {f.name: x for f in fields if isinstance(x := getattr(self, f.name), float)}
        return dataclasses.replace(  # type: ignore[type-var]
            self, **{name: float(np.asarray(x, dtype)) for name, x in floats.items()}
        )


def nonzero_div(a: Array, b: Array) -> Array:
    """`a / b`, and 0 where `a` is 0: a row that never had a gradient stays where it is."""
    return jnp.where(a == 0, 0, a / jnp.where(a == 0, 1, b))
