"""Sums over the steps of the training, from which the sum over any gap is had in O(1).

A row that was last brought up to date at step tau is read at step t = tau + n. What it missed is
made of sums over the gap, j = 1...n, of step sizes eta and decays lambda of steps s = tau + j. A
row keeps a copy of its table's sums of step tau; together with those of step t they give

    P = prod_j (1 - eta_s lambda_s),                 drift = sum_j eta_s P_n / P_j,
    R_i = sum_j r_i^j eta_s a_i(s) P_n / P_j         for each kernel i: ratio r_i, weight a_i.

log P and drift are running sums over the past, each kept as two floats (its head and what rounding
took from it): after 1e5 steps one float32 could not tell neighbouring steps apart. Kernels are kept
as sums over the future, M_i(tau) = sum_{j >= 1} r_i^j eta_s a_i(s) / P_j, which end by themselves:
R_i = P M_i(tau) - r_i^n M_i(t). All hold for any schedule of the step count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Schedule = Callable[[Array], Any]


@dataclass(frozen=True)
class Constant:
    """The schedule that has one value at every count."""

    value: Any

    def __call__(self, count: Array) -> Any:
        return self.value


_LAST = np.iinfo(np.int32).max  # where optax's counts stay


class Counts(NamedTuple):
    """Counts that the inner state holds, each of them as of the same step."""

    moments: Array  # [] int32: steps made
    rate: Array  # [] int32: at which the schedule of the learning rate is evaluated next
    decay: Array  # [] int32: the same for a schedule of the weight decay

    @property
    def step(self) -> Array:
        """The number of the next step. It stays at its end, where all corrections are 1."""
        return jnp.minimum(self.moments, _LAST - 2) + 1

    def ahead(self, steps: Array | np.ndarray | int) -> "Counts":
        """The counts after so many more steps (fewer, if negative)."""
        return Counts(*(jnp.minimum(c, _LAST - jnp.maximum(steps, 0)) + steps for c in self))


class Kernel(NamedTuple):
    """A geometric sum over a gap: `ratio**j * weight(step)`."""

    ratio: float
    weight: Callable[[Array], Array]


class Between(NamedTuple):
    """Sums over the gap of each row, `[u]` each."""

    decay: Array
    drift: Array
    kernels: tuple[Array, ...]


def terms(ratio: float, dtype: Any) -> int:
    """How many terms of a geometric sum are above the rounding of `dtype`."""
    if ratio <= 0:
        return 1
    return math.ceil(math.log(float(jnp.finfo(dtype).eps) / 16) / math.log(ratio))


def power(ratio: float, n: Array) -> Array:
    """`ratio**n` for whole `n >= 0`, with as many right digits as `n * log(ratio)` has."""
    if ratio <= 0:
        return jnp.where(n == 0, 1.0, 0.0).astype(n.dtype)
    return jnp.exp(n * math.log(ratio))


@dataclass(frozen=True)
class Ledger:
    """The sums of one leaf, a vector `[k]` of its dtype (at least float32).

    Args:
      rate: the learning rate at a count.
      decay: the weight decay at a count; `None` for a leaf that does not decay.
      drifts: whether the drift is asked for.
      kernels: the kernels asked for.
      dtype: of the sums.
    """

    rate: Schedule
    decay: Schedule | None
    drifts: bool
    kernels: tuple[Kernel, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """How many sums there are."""
        return 2 * self._running + len(self.kernels)

    @property
    def _running(self) -> int:
        return (self.decay is not None) + self.drifts

    def start(self, tails: Array) -> Array:
        """The sums before the first step, `[k]`."""
        return jnp.concatenate([jnp.zeros(2 * self._running, self.dtype), tails])

    def advance(self, sums: Array, counts: Counts, tails: Array) -> Array:
        """The sums one step later; `counts` are those before the step, `tails` those after it."""
        eta, shrunk = self.rates(counts)
        heads: list[Array] = []
        if self.decay is not None:
            heads += _two_sum(sums[0], sums[1], jnp.log1p(-shrunk))
        if self.drifts:
            i = len(heads)
            heads += _two_sum(sums[i], sums[i + 1], eta - shrunk * sums[i])
        return jnp.concatenate([jnp.asarray(heads, self.dtype), tails])

    def tails(self, counts: Counts) -> Array:
        """`M_i` for each kernel, `[number of kernels]`."""
        found = []
        for ratio, weight in self.kernels:
            j = np.arange(1, terms(ratio, self.dtype) + 1)  # [K]
            made = counts.ahead(j.astype(np.int32) - 1)
            eta, shrunk = self.rates(made)
            powers = jnp.asarray(np.power(ratio, j), self.dtype)
            shares = eta * weight(made.step).astype(self.dtype) * powers
            if self.decay is not None:
                shares = shares * jnp.exp(-jnp.cumsum(jnp.log1p(-shrunk)))
            found.append(jnp.sum(shares, dtype=self.dtype))
        return jnp.asarray(found, self.dtype)

    def between(self, then: Array, now: Array, n: Array) -> Between:
        """Sums over each row's gap.

        Args:
          then: `[u, k]`, the sums that the rows keep.
          now: `[k]`, those of the present, or `[u, k]` of each row's table.
          n: `[u]` floats, lengths of the gaps.
        """
        parts = [now[..., i] - then[:, i] for i in range(2 * self._running)]
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
        log_decay = pairs.pop(0) if self.decay is not None else jnp.zeros_like(n)
        decay = jnp.exp(log_decay)
        drift = jnp.zeros_like(n)
        if self.drifts:
            head = then[:, 2 * self._running - 2]
            drift = pairs.pop(0) - jnp.expm1(log_decay) * head
        first = 2 * self._running
        kernels = tuple(
            decay * then[:, first + i] - power(ratio, n) * now[..., first + i]
            for i, (ratio, _) in enumerate(self.kernels)
        )
        return Between(decay, drift, kernels)

    def rates(self, counts: Counts) -> tuple[Array, Array]:
        """`eta` and `eta * lambda` of the steps that follow `counts`."""
        eta = _at(self.rate, counts.rate, self.dtype)
        if self.decay is None:
            return eta, jnp.zeros_like(eta)
        return eta, eta * _at(self.decay, counts.decay, self.dtype)


def _at(schedule: Schedule, counts: Array, dtype: Any) -> Array:
    """`schedule(count)` for each count; a schedule is written for one."""
    if isinstance(schedule, Constant):
        return jnp.broadcast_to(jnp.asarray(schedule.value, dtype), jnp.shape(counts))
    one = lambda count: jnp.asarray(schedule(count), dtype)  # noqa: E731
    return jax.vmap(one)(counts) if jnp.ndim(counts) else one(counts)


def _two_sum(head: Array, tail: Array, x: Array) -> list[Array]:
    """`head + tail + x` as a rounded head and the rest of it (Knuth's two-sum)."""
    x = x + tail
    total = head + x
    part = total - head
    return [total, (head - (total - part)) + (x - part)]
