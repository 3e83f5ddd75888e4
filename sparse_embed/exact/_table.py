"""One table under an exact optimizer: rows brought up to date, clocks moved on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import RowSparse, nan_where, old_rows, set_rows
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
    last: Array  # int32, the step up to which each row was brought
    missed: Array  # int32 steps; where 0 nothing is to change
    then: Array  # [u, k] the sums that the rows keep
    now: Array  # [k] the sums of the present, or [u, k] where rows are of several tables
    ascending: bool = True  # whether `indices` are


CatchUp = Callable[[Block], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Table:
    """How one leaf rests, and the time.

    Args:
      name: as the user would write the leaf, for messages.
      catch_up: the rows of a block and their moments after the steps that they missed. Equal for
        tables whose rows may share a block.
      catch_up_whole: the same for a leaf that a step uses whole: fewer operations to compile.
      ledger: its running sums.
      ahead: so many steps from now, sums of the steps to come, and the numbers by which another
        optimizer is told from this one.
      step: `[]` int32, steps made.
      counts: the counts of the inner state at this step.
    """

    name: str
    catch_up: CatchUp
    catch_up_whole: CatchUp
    ledger: Ledger
    ahead: Callable[[int], tuple[Array, Array]]
    step: Array
    counts: Counts

    def gathered(self, indices: Array, held: Held, ascending: bool) -> Block:
        """The rows at `indices`, as they are; in place of padding the last row, up to date."""
        w, moments, clock = held
        read = partial(old_rows, indices=indices, mode="clip")
        last = read(clock.last_step)
        return Block(
            indices,
            read(w),
            {name: read(x) for name, x in moments.items()},
            last,
            jnp.where(indices < w.shape[0], behind(self.step, last), 0),
            read(clock.sums),
            clock.now,
            ascending,
        )

    def settled_block(
        self, block: Block, caught_up: tuple[Array, dict[str, Array]], num_rows: int, agrees: Array
    ) -> Block:
        """The block as of the present, with what `catch_up` made of it."""
        new, moments = caught_up
        # What padding writes is dropped. The old values make each write wait for its read; else
        # XLA would copy the whole array first.
        real = block.indices < num_rows
        return replace(
            block,
            w=nan_where(~agrees, new),
            moments=moments,
            last=jnp.where(real, self.step, block.last),
            then=jnp.where(real[:, None], block.now, block.then),
        )

    def start(self, num_rows: int) -> RowClock:
        """The clock of rows that are all up to date."""
        tails, mark = self.ahead(0)
        return new_clock(num_rows, self.step, self.ledger.start(tails), _own(mark))

    def settled(self, held: Held) -> Held:
        """Brings all rows up to date, a block of rows at a time; nothing, if they all are."""
        num_rows = held[0].shape[0]
        size = min(BLOCK, num_rows)
        if not size:
            return held
        agrees = self.agrees(held[2])

        def some(number: Array, held: Held) -> Held:
            # Indices beyond the last row are padding.
            block = self.gathered(number * size + jnp.arange(size), held, True)
            return written(self.settled_block(block, self.catch_up(block), num_rows, agrees), held)

        return jax.lax.fori_loop(
            0, jnp.where(self._late(held), -(-num_rows // size), 0), some, held
        )

    def settled_whole(self, held: Held) -> Held:
        """Brings a leaf up to date that a step uses whole; nothing, if all its rows are."""
        num_rows = held[0].shape[0]
        if not num_rows:
            return held
        agrees = self.agrees(held[2])

        def all_rows(_: Array, held: Held) -> Held:
            w, moments, clock = held
            missed = behind(self.step, clock.last_step)
            block = Block(
                jnp.arange(num_rows), w, moments, clock.last_step, missed, clock.sums, clock.now
            )
            block = self.settled_block(block, self.catch_up_whole(block), num_rows, agrees)
            return _put(block, held, lambda x, rows: rows.astype(x.dtype))

        # A branch that is taken or not; but in a loop all arrays are sure to stay in place.
        return jax.lax.fori_loop(0, self._late(held).astype(jnp.int32), all_rows, held)

    def _late(self, held: Held) -> Array:
        return jnp.any(held[2].last_step != self.step)

    def advanced(self, update: Any, clock: RowClock) -> tuple[Any, RowClock]:
        """The update of one step with rows that are behind made NaN, and the clock after it."""
        clock = jax.tree.map(jnp.asarray, clock)
        agrees, step = self.agrees(clock), self.step + 1
        raise_if_other(self.name, agrees)
        now, mark = self.next_sums(clock, agrees)
        if not isinstance(update, RowSparse):
            late = behind(self.step, clock.last_step) != 0
            self._check_late(late)
            late = late.reshape(-1, *(1,) * (update.ndim - 1)) | ~agrees
            sums = jnp.broadcast_to(now, clock.sums.shape)
            clock = RowClock(jnp.full_like(clock.last_step, step), sums, now, mark)
            return jnp.where(late, jnp.nan, update), clock
        indices = update.indices
        real, last = indices < update.num_rows, old_rows(clock.last_step, indices)
        late = real & (behind(self.step, last) != 0)
        self._check_late(late)
        late = late.reshape(-1, *(1,) * (update.ndim - 1)) | ~agrees
        rows = jnp.where(late, jnp.nan, update.rows)
        sums = jnp.broadcast_to(now, (*indices.shape, *now.shape))
        clock = RowClock(
            set_rows(clock.last_step, indices, jnp.where(real, step, last)),
            set_rows(clock.sums, indices, sums),
            now,
            mark,
        )
        return RowSparse._make(indices, rows, update.shape, True), clock

    def advanced_block(self, block: Block, clock: RowClock) -> RowClock:
        """The clock after a step that moved the rows of a settled block."""
        now, mark = self.next_sums(clock, self.agrees(clock))
        real = block.indices < clock.last_step.shape[0]
        last = jnp.where(real, self.step + 1, block.last)
        sums = jnp.where(real[:, None], now, block.then)
        return RowClock(
            set_rows(clock.last_step, block.indices, last, block.ascending),
            set_rows(clock.sums, block.indices, sums, block.ascending),
            now,
            mark,
        )

    def next_sums(self, clock: RowClock, agrees: Array) -> tuple[Array, Array]:
        """The sums and the mark of the table one step later."""
        tails, mark = self.ahead(1)
        return nan_where(~agrees, self.ledger.advance(clock.now, self.counts, tails)), _own(mark)

    def agrees(self, clock: RowClock) -> Array:
        """Whether the clock is of this optimizer, its schedules and numbers: `[]` bool."""
        _, mark = self.ahead(0)
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


def _own(mark: Array) -> Array:
    """An array for this table alone, as each leaf of a state may be donated."""
    return jnp.array(mark) if is_concrete(mark) else mark


def written(block: Block, held: Held) -> Held:
    """The table, its moments and its clock with the rows of a settled block written."""
    return _put(block, held, lambda x, rows: set_rows(x, block.indices, rows, block.ascending))


def _put(block: Block, held: Held, put: Callable[[Array, Array], Array]) -> Held:
    w, moments, clock = held
    return (
        put(w, block.w),
        {name: put(x, block.moments[name]) for name, x in moments.items()},
        RowClock(
            put(clock.last_step, block.last), put(clock.sums, block.then), clock.now, clock.mark
        ),
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
