"""Brings a block of rows up to date: decay, shift, state; term by term where that is needed."""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed.exact._ledger import Between, Counts, Ledger, terms
from sparse_embed.exact._rest import Gap, Moments, Rest
from sparse_embed.exact._table import Block

CHUNK = 256  # rows that are summed term by term at a time


def catch_up(
    rest: Rest, ledger: Ledger, counts: Counts, block: Block, every_term: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Some rows and their state after the steps that they missed.

    Args:
      rest: the optimizer.
      ledger: the sums of their table.
      counts: those of the present.
      block: the rows.
      every_term: whether the terms of all rows are summed one by one, if they are of any: slower,
        and less to compile.

    Returns:
      The rows and their state, in the dtypes that they came in.
    """
    w, moments, missed = block.w, block.moments, block.missed
    column = (-1, *(1,) * (w.ndim - 1))
    wide = {name: x.astype(ledger.dtype) for name, x in moments.items()}
    n = missed.astype(ledger.dtype)
    gap = Gap(n.reshape(column), counts.ahead(-missed).step.reshape(column))
    flat = ledger.between(block.then, block.now, n)
    sums: Between = jax.tree.map(lambda x: x.reshape(column), flat)

    new = w.astype(ledger.dtype)
    if ledger.decay is not None:
        new = new * sums.decay
    longest = rest.longest()
    shift = None if every_term and longest else rest.shift(wide, gap, sums)
    if every_term and longest:
        last = jnp.minimum(jnp.max(missed), terms(longest, ledger.dtype))
        new = new - _sum(rest, ledger, counts, wide, missed, last) * sums.decay
    elif shift is not None:
        inexact = rest.inexact(wide, gap, sums)
        if inexact is not None:
            needy = jnp.any(inexact.reshape(inexact.shape[0], -1), axis=1)
            shift = _by_terms(rest, ledger, counts, wide, missed, flat.decay, needy, shift)
        new = new - shift
    behind = (missed > 0).reshape(column)
    after = dict(moments) | {
        k: x.astype(moments[k].dtype) for k, x in rest.decayed(wide, gap).items()
    }
    after = {name: jnp.where(behind, x, moments[name]) for name, x in after.items()}
    return jnp.where(behind, new.astype(w.dtype), w), after


def _by_terms(
    rest: Rest,
    ledger: Ledger,
    counts: Counts,
    moments: Moments,
    missed: Array,
    decay: Array,
    needy: Array,
    shift: Array,
) -> Array:
    """`shift` with the needy rows replaced by the sum of their terms."""
    u, column = missed.shape[0], (-1, *(1,) * (shift.ndim - 1))
    size = min(CHUNK, u)
    longest = terms(rest.longest() or 0.0, ledger.dtype)

    def some(shift: Array) -> Array:
        # `[u + size]` places of the needy rows, then places outside.
        places = jnp.nonzero(needy, size=u, fill_value=u)[0]
        places = jnp.concatenate([places, jnp.full(size, u, places.dtype)])

        def chunk(number: Array, shift: Array) -> Array:
            at = jax.lax.dynamic_slice(places, (number * size,), (size,))
            mine = {name: x.at[at].get(mode="fill", fill_value=0) for name, x in moments.items()}
            n = missed.at[at].get(mode="fill", fill_value=0)
            total = _sum(rest, ledger, counts, mine, n, jnp.minimum(jnp.max(n), longest))
            total = total * decay.at[at].get(mode="fill", fill_value=0).reshape(column)
            return shift.at[at].set(total, mode="drop")

        return jax.lax.fori_loop(0, (jnp.sum(needy) + size - 1) // size, chunk, shift)

    return jax.lax.cond(jnp.any(needy), some, lambda shift: shift, shift)


def _sum(
    rest: Rest, ledger: Ledger, counts: Counts, moments: Moments, n: Array, last: Array
) -> Array:
    """`sum over j <= n of eta_s / P_j term(j)`, `[u, *features]`, up to position `last`."""
    like = next(iter(moments.values()))
    column = (-1, *(1,) * (like.ndim - 1))

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, log_decay = carry
        before = counts.ahead(j - 1 - n)
        eta, shrunk = ledger.rates(before)
        log_decay = log_decay + jnp.log1p(-shrunk)
        made = before.step.reshape(column)
        term = rest.term(moments, jnp.asarray(j, ledger.dtype), made)
        scale = (eta * jnp.exp(-log_decay)).reshape(column)
        summand = jnp.where((j <= n).reshape(column), scale * term, 0)
        return total + summand.astype(total.dtype), log_decay  # wider where jax has 64 bits

    start = jnp.zeros_like(like), jnp.zeros(n.shape, ledger.dtype)
    return jax.lax.fori_loop(1, last + 1, step, start)[0]
