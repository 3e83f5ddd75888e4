"""Rest of Adam and its relatives: a momentum over a root that changes as well.

Step j of a gap takes, with `a = eta / (1 - b1^s)` and s = tau + j,

    a b1^j m / (sqrt(v) / T_j + eps),        T_j = sqrt((1 - b2^s) / b2^j),

for one element `a b1^j m h(T_j)` with h(T) = T / (sqrt(v) + eps T). T_j differs little over the
steps in which b1^j counts, so h is expanded around the mean of T to second order; mean and variance
of T, weighted with a b1^j, are three geometric sums, the same for all elements of a row. With
eps = 0, h is linear and this is exact. Else its relative error is q^2 (1 - q) times the third
central moment of T / E[T], with q = eps T / (sqrt(v) + eps T); where that is too much, steps are
summed one by one.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array

from sparse_embed.exact._ledger import Between, Kernel, terms
from sparse_embed.exact._rest import Gap, Moments, Rest, nonzero_div


@dataclass(frozen=True)
class Adam(Rest):
    """`optax.scale_by_adam`, and with `frozen` `optax.scale_by_yogi`, whose root stays."""

    fields = ("mu", "nu")
    b1: float
    b2: float
    eps: float
    eps_root: float
    nesterov: bool
    frozen: bool = False

    @property
    def _by_terms(self) -> bool:
        # `eps_root` gives every element a T of its own; with b1 >= b2 the sums do not end.
        return self.eps_root != 0 or self.b1 >= 0.999 * self.b2

    def kernels(self) -> tuple[Kernel, ...]:
        if self._by_terms:
            return ()
        growth = 1.0 if self.frozen else self.b2**-0.5
        powers = (1,) if self.eps == 0 else (0, 1, 2)
        return tuple(Kernel(self.b1 * growth**k, partial(self._weight, k)) for k in powers)

    def _weight(self, k: int, step: Array) -> Array:
        return self._unbiased(step) * (1 - self.b2**step) ** (k / 2)

    def _unbiased(self, step: Array) -> Array:
        if self.nesterov:
            return self.b1 / (1 - self.b1 ** (step + 1))
        return 1 / (1 - self.b1**step)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        mu = moments["mu"] * gap.power(self.b1)
        return {"mu": mu} if self.frozen else {"mu": mu, "nu": moments["nu"] * gap.power(self.b2)}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        mu, root = moments["mu"], jnp.sqrt(moments["nu"])
        if self._by_terms:
            return jnp.zeros_like(root)
        if self.eps == 0:
            return nonzero_div(mu * sums.kernels[0], root)
        weight, mean, spread = self._statistics(gap, sums)
        d = root + self.eps * mean
        q = self.eps * mean / d
        return nonzero_div(mu * weight * mean * (1 - q * (1 - q) * spread), d)

    def inexact(self, moments: Moments, gap: Gap, sums: Between) -> Array | None:
        mu = moments["mu"]
        if self._by_terms:
            return (mu != 0) & (gap.n > 0)
        if self.eps == 0:
            return None
        _, mean, spread = self._statistics(gap, sums)
        q = self.eps * mean / (jnp.sqrt(moments["nu"]) + self.eps * mean)
        # Weights that fade geometrically have skewness 2; a falling rate makes it larger.
        bad = 12 * spread**1.5 * q * q * (1 - q) > _tolerance(mu.dtype)
        return bad & (mu != 0) & (gap.n > 1)

    def _statistics(self, gap: Gap, sums: Between) -> tuple[Array, Array, Array]:
        """Total weight, mean of T, and variance of T over mean squared.

        Where the learning rate is next to nothing the sums are rounding errors: mean and variance
        are kept within what T can be.
        """
        zeroth, first, second = sums.kernels
        n = jnp.clip(gap.n, 1, terms(self.b1, gap.n.dtype))
        low, high = self._t(gap, jnp.ones_like(n)), self._t(gap, n)
        total = jnp.where(zeroth == 0, 1, zeroth)
        mean = jnp.clip(first / total, low, high)
        variance = jnp.clip(second / total - mean * mean, 0, (high - low) ** 2 / 4)
        return zeroth, mean, variance / (mean * mean)

    def _t(self, gap: Gap, j: Array) -> Array:
        fading = 1.0 if self.frozen else self.b2**-j
        return jnp.sqrt((1 - self.b2 ** (gap.first + j - 1)) * fading)

    def longest(self) -> float:
        return self.b1

    def term(self, moments: Moments, j: Array, step: Array) -> Array:
        mu, nu = moments["mu"] * self.b1**j, moments["nu"]
        if not self.frozen:
            nu = nu * self.b2**j
        root = jnp.sqrt(nu / (1 - self.b2**step) + self.eps_root)
        return nonzero_div(mu * self._unbiased(step), root + self.eps)


def _tolerance(dtype: jnp.dtype) -> float:
    return 1e-6 if jnp.finfo(dtype).bits <= 32 else 1e-9


@dataclass(frozen=True)
class Amsgrad(Rest):
    """`optax.scale_by_amsgrad`: in a gap the largest root stays, so only the momentum fades."""

    fields = ("mu", "nu", "nu_max")
    b1: float
    b2: float
    eps: float
    eps_root: float
    unbias_mu: bool

    def kernels(self) -> tuple[Kernel, ...]:
        def weight(step: Array) -> Array:
            return 1 / (1 - self.b1**step) if self.unbias_mu else jnp.ones(step.shape)

        return (Kernel(self.b1, weight),)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        mu, nu = moments["mu"] * gap.power(self.b1), moments["nu"] * gap.power(self.b2)
        return {"mu": mu, "nu": nu}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        root = jnp.sqrt(moments["nu_max"] + self.eps_root) + self.eps
        return nonzero_div(moments["mu"] * sums.kernels[0], root)


@dataclass(frozen=True)
class Adamax(Rest):
    """`optax.scale_by_adamax`: the largest gradient fades to `eps`, after a very long time."""

    fields = ("mu", "nu")
    b1: float
    b2: float
    eps: float

    def kernels(self) -> tuple[Kernel, ...]:
        return (Kernel(self.b1 / self.b2, lambda step: 1 / (1 - self.b1**step)),)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        faded = jnp.maximum(moments["nu"] * gap.power(self.b2), self.eps)
        nu = jnp.where(gap.n > 0, faded, moments["nu"])
        return {"mu": moments["mu"] * gap.power(self.b1), "nu": nu}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return nonzero_div(moments["mu"] * sums.kernels[0], moments["nu"])

    def inexact(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        # `eps` is reached while the momentum still counts.
        faded = moments["nu"] * jnp.maximum(gap.power(self.b2), self._end())
        return (faded < self.eps) & (moments["mu"] != 0) & (gap.n > 0)

    def _end(self) -> float:
        return self.b2 ** (40 / max(1 - self.b1, 1e-6))

    def longest(self) -> float:
        return self.b1

    def term(self, moments: Moments, j: Array, step: Array) -> Array:
        nu = jnp.maximum(moments["nu"] * self.b2**j, self.eps)
        return nonzero_div(moments["mu"] * self.b1**j / (1 - self.b1**step), nu)


@dataclass(frozen=True)
class Belief(Rest):
    """`optax.scale_by_belief`: the root follows `(0 - mu)^2`, so every step is summed by itself."""

    fields = ("mu", "nu")
    b1: float
    b2: float
    eps: float
    eps_root: float
    nesterov: bool

    def _nu(self, moments: Moments, b1j2: Array, b2j: Array) -> Array:
        """The second moment after j steps, from `b1^(2j)` and `b2^j`."""
        mu, b11 = moments["mu"], self.b1 * self.b1
        learnt = (1 - self.b2) * b11 * (b2j - b1j2) / (self.b2 - b11) * mu * mu
        return b2j * moments["nu"] + learnt + self.eps_root * (1 - b2j) / (1 - self.b2)

    def decayed(self, moments: Moments, gap: Gap) -> Moments:
        b1n = gap.power(self.b1)
        nu = self._nu(moments, b1n * b1n, gap.power(self.b2))
        return {"mu": moments["mu"] * b1n, "nu": nu}

    def shift(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return jnp.zeros_like(moments["mu"])

    def inexact(self, moments: Moments, gap: Gap, sums: Between) -> Array:
        return (moments["mu"] != 0) & (gap.n > 0)

    def longest(self) -> float:
        return self.b1

    def term(self, moments: Moments, j: Array, step: Array) -> Array:
        b1j = self.b1**j
        mu = moments["mu"] * b1j
        if self.nesterov:
            mu = mu * self.b1 / (1 - self.b1 ** (step + 1))
        else:
            mu = mu / (1 - self.b1**step)
        nu = self._nu(moments, b1j * b1j, self.b2**j) / (1 - self.b2**step)
        return nonzero_div(mu, jnp.sqrt(nu) + self.eps)
