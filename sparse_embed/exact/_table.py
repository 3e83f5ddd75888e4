"""One table under an exact optimizer: rows brought up to date, clocks moved on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import RowSparse, gather_rows, nan_where, set_rows
from sparse_embed._core import is_concrete, message
from sparse_embed.exact._ledger import Counts, Ledger
from sparse_embed.exact._state import RowClock, behind, new_clock

BLOCK = 4096  # rows that `settle` of a whole table works on at a time

Held = tuple[Array, dict[str, Array], RowClock]  # the table, its moments by field, its clock


@dataclass(frozen=True)
class Block:
    """Some rows of a table: `[u]`, `[u, *features]`, or by field."""

    indices: Array
    w: Array
    moments: dict[str, Array]
    missed: Array  # int32 steps; where 0 nothing is to change
    then: Array  # [u, k] the sums that the rows keep
    now: Array  # [k] the sums of the present


CatchUp = Callable[[Block], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Table:
    """How one leaf rests, and the time.

    Args:
      name: as the user would write the leaf, for messages.
      catch_up: the rows of a block and their moments after the steps that they missed.
      ledger: its running sums.
      marked: numbers by which another optimizer is told from this one, so many steps ahead.
      step: `[]` int32, steps made.
      counts: the counts of the inner state at this step.
    """

    name: str
    catch_up: CatchUp
    ledger: Ledger
    marked: Callable[[int], Array]
    step: Array
    counts: Counts

    def settled_rows(self, indices: Array, held: Held) -> Held:
        """Brings the rows at ascending, distinct `indices` up to date; others stay as they are."""
        w, moments, clock = held
        if not indices.size:
            return held
        new, after, last, sums = self._listed(indices, held)
        return (
            set_rows(w, indices, new),
            {name: set_rows(x, indices, after[name]) for name, x in moments.items()},
            RowClock(
                set_rows(clock.last_step, indices, last),
                set_rows(clock.sums, indices, sums),
                clock.now,
                clock.mark,
            ),
        )

    def view(self, indices: Array, held: Held) -> Array:
        """The rows at `indices` as if they were settled, `[n, *features]`."""
        return self._listed(indices, held)[0]

    def _listed(self, indices: Array, held: Held) -> tuple[Array, dict[str, Array], Array, Array]:
        """The rows at `indices`, their moments, last steps and sums, as of the present."""
        w, moments, clock = held
        real = indices < w.shape[0]
        last, then = gather_rows(clock.last_step, indices), gather_rows(clock.sums, indices)
        block = Block(
            indices,
            gather_rows(w, indices),
            {name: gather_rows(x, indices) for name, x in moments.items()},
            jnp.where(real, behind(self.step, last), 0),
            then,
            clock.now,
        )
        agrees = self.agrees(clock)
        new, after = self.catch_up(block)
        # What padding writes is dropped. The old values make each write wait for its read; else
        # XLA would copy the whole array first.
        last = jnp.where(real, self.step, last)
        return nan_where(~agrees, new), after, last, jnp.where(real[:, None], clock.now, then)

    def start(self, num_rows: int) -> RowClock:
        """The clock of rows that are all up to date."""
        return new_clock(num_rows, self.step, self.ledger.start(self.counts), self.marked(0))

    def settled(self, held: Held) -> Held:
        """Brings all rows up to date, a block of rows at a time; nothing, if they all are."""
        num_rows = held[0].shape[0]
        size = min(BLOCK, num_rows)
        if not size:
            return held

        def block(number: Array, held: Held) -> Held:
            # Indices beyond the last row are padding.
            return self.settled_rows(number * size + jnp.arange(size), held)

        late = jnp.any(held[2].last_step != self.step)
        return jax.lax.fori_loop(0, jnp.where(late, -(-num_rows // size), 0), block, held)

    def advanced(self, update: Any, clock: RowClock) -> tuple[Any, RowClock]:
        """The update of one step with rows that are behind made NaN, and the clock after it."""
        clock = jax.tree.map(jnp.asarray, clock)
        agrees, step = self.agrees(clock), self.step + 1
        raise_if_other(self.name, agrees)
        now = nan_where(~agrees, self.ledger.advance(clock.now, self.counts))
        if not isinstance(update, RowSparse):
            late = behind(self.step, clock.last_step) != 0
            self._check_late(late)
            late = late.reshape(-1, *(1,) * (update.ndim - 1)) | ~agrees
            sums = jnp.broadcast_to(now, clock.sums.shape)
            clock = RowClock(jnp.full_like(clock.last_step, step), sums, now, self.marked(1))
            return jnp.where(late, jnp.nan, update), clock
        indices = update.indices
        real, last = indices < update.num_rows, gather_rows(clock.last_step, indices)
        late = real & (behind(self.step, last) != 0)
        self._check_late(late)
        late = late.reshape(-1, *(1,) * (update.ndim - 1)) | ~agrees
        rows = jnp.where(late, jnp.nan, update.rows)
        sums = jnp.broadcast_to(now, (*indices.shape, *now.shape))
        clock = RowClock(
            set_rows(clock.last_step, indices, jnp.where(real, step, last)),
            set_rows(clock.sums, indices, sums),
            now,
            self.marked(1),
        )
        return RowSparse._make(indices, rows, update.shape, True), clock

    def agrees(self, clock: RowClock) -> Array:
        """Whether the clock is of this optimizer, its schedules and numbers: `[]` bool."""
        mark = self.marked(0)
        shapes = jnp.shape(clock.mark), jnp.shape(clock.now)
        if shapes != (mark.shape, (self.ledger.size,)):
            raise ValueError(_other(self.name))
        return ~jnp.any(jnp.abs(clock.mark - mark) > 1e-3 * jnp.abs(mark) + 1e-30)

    def _check_late(self, late: Array) -> None:
        if is_concrete(late) and bool(jnp.any(late)):
            raise ValueError(
                message(
                    "tx.update(grads, opt_state, params): rows with a gradient are not up to date.",
                    f"{int(jnp.sum(late))} rows of {self.name} that missed steps",
                    "params, opt_state = tx.settle(params, opt_state, se.touched(loss_fn)(params, "
                    "batch)) before the gradient is taken, or se.train_step, which does so",
                )
            )


def raise_if_other(name: str, agrees: Array) -> None:
    """Raises where it is known that a clock is of another optimizer."""
    if is_concrete(agrees) and not bool(agrees):
        raise ValueError(_other(name))


def _other(name: str) -> str:
    return message(
        f"tx.settle or tx.update: {name} has an opt_state of another optimizer, learning rate, "
        "schedule or decay than tx.",
        "running sums that are not those of this tx",
        "params, inner = old_tx.to_dense(params, opt_state); "
        "opt_state = new_tx.from_dense(params, inner)",
    )
