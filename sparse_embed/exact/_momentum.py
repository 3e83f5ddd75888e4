"""Rest of the optimizers whose step is linear in one momentum, and of those without any."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from sparse_embed.exact._ledger import Between, Kernel
from sparse_embed.exact._rest import Gap, Moments, Rest


@dataclass(frozen=True)
class Still(Rest):
    """SGD, Adagrad: without a gradient nothing changes."""

    fields = ()


@dataclass(frozen=True)
class Trace(Rest):
    """`optax.trace`: each step takes `eta b^j trace`, with Nesterov `eta b^(j+1) trace`."""

    fields = ("trace",)
    b: float
    nesterov: bool

    def kernels(self) -> tuple[Kernel, ...]:
        return (Kernel(self.b, lambda step: jnp.full(step.shape, self.b if self.nesterov else 1)),)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        return {"trace": moments["trace"] * gap.power(self.b)}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return moments["trace"] * sums.kernels[0]


@dataclass(frozen=True)
class Ema(Rest):
    """`optax.ema`: each step takes `eta b^j ema / (1 - b^s)`, without `debias` `eta b^j ema`."""

    fields = ("ema",)
    b: float
    debias: bool

    def kernels(self) -> tuple[Kernel, ...]:
        def weight(step: Array) -> Array:
            return 1 / (1 - self.b**step) if self.debias else jnp.ones(step.shape)

        return (Kernel(self.b, weight),)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        return {"ema": moments["ema"] * gap.power(self.b)}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return moments["ema"] * sums.kernels[0]


@dataclass(frozen=True)
class Fading(Rest):
    """RMSProp, Adadelta: averages of squares fade, rows stay."""

    averages: tuple[str, ...]
    b: float

    @property
    def fields(self) -> tuple[str, ...]:
        return self.averages

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        factor = gap.power(self.b)
        return {name: moments[name] * factor for name in self.averages}


@dataclass(frozen=True)
class RmsTrace(Rest):
    """RMSProp with momentum: the rate is inside the trace, and each step adds `b^j trace`."""

    averages: tuple[str, ...]
    b: float
    momentum: float
    nesterov: bool

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.averages, "trace")

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        factor = gap.power(self.b)
        averages = {name: moments[name] * factor for name in self.averages}
        return averages | {"trace": moments["trace"] * gap.power(self.momentum)}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        # sum of b^j over the gap; the trace holds updates, which are added
        b = self.momentum
        total = gap.n if b == 1 else b * (1 - gap.power(b)) / (1 - b)
        return -moments["trace"] * total * (b if self.nesterov else 1)


@dataclass(frozen=True)
class Lion(Rest):
    """Lion: each step takes `eta sign(mu)`. A row that was touched once drifts for ever."""

    fields = ("mu",)
    drifts: ClassVar[bool] = True
    b: float

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        # Dense optax multiplies step by step, until its smallest number is reached and lost.
        mu = moments["mu"]
        faded = mu * gap.power(self.b)
        tiny = jnp.finfo(mu.dtype).tiny
        return {"mu": jnp.where(jnp.abs(faded) < tiny, 0, faded)}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return jnp.sign(moments["mu"]) * sums.drift
