"""State of the exact optimizers, and where optax keeps what belongs to rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_embed.exact._ledger import Counts


class RowClock(NamedTuple):
    """Up to which step each row of a leaf was brought.

    Args:
      last_step: `[num_rows]` int32, the step up to which a row is settled.
      sums: `[num_rows, k]`, the running sums of that step.
      now: `[k]`, those of the present step.
      mark: `[f]`, numbers by which another optimizer is told from the one that made this.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> state = se.exact.sgd(0.1, momentum=0.9).init({"table": jnp.ones((4, 2))})
      >>> state.clocks["table"].last_step.tolist()
      [0, 0, 0, 0]
    """

    last_step: Array
    sums: Array
    now: Array
    mark: Array


def new_clock(num_rows: int, step: Array, now: ArrayLike, mark: ArrayLike) -> RowClock:
    """The clock of rows that are all up to date."""
    now, mark = jnp.asarray(now), jnp.asarray(mark)
    last_step, sums = _of_each_row(num_rows, step, now)
    return RowClock(last_step, sums, now, mark)


@partial(jax.jit, inline=True, static_argnums=0)
def _of_each_row(num_rows: int, step: Array, now: Array) -> tuple[Array, Array]:
    return jnp.broadcast_to(step, (num_rows,)), jnp.broadcast_to(now, (num_rows, *now.shape))


class ExactState(NamedTuple):
    """State of an exact optimizer.

    Args:
      inner_state: that of the dense optax optimizer, in its own layout. Rows of a table may be
        behind in it; after `settle` of all rows it is the dense state.
      step: int32, steps made. It wraps around; only differences count.
      clocks: for each parameter leaf a `RowClock`; `None` where no row can be behind.
      settled: `()` in a state that `settle` returned, `None` in any other. It has no leaves, so it
        is known while a step is traced: `update` refuses a state that was not settled.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> state = se.exact.adam(0.1).init({"table": jnp.ones((4, 2))})
      >>> type(state.inner_state[0]).__name__, int(state.step)
      ('ScaleByAdamState', 0)
    """

    inner_state: Any
    step: Array
    clocks: Any
    settled: tuple[()] | None = None

    def as_settled(self) -> "ExactState":
        """The same state, as `settle` returns it."""
        return self._replace(settled=())

    def unsettled(self) -> "ExactState":
        """The same state, as `init` and `update` return it: what a `scan` carries on."""
        return self._replace(settled=None)


def counts(core_state: Any, step: Array, treedef: Any) -> Counts:
    """The counts of an optax state; `step` where it has none of a kind."""
    return Counts(
        *(
            next((node.count for node in _nodes(core_state, test, treedef)), step)
            for test in (
                lambda node: {"count"} < set(getattr(node, "_fields", ())),
                lambda node: type(node).__name__ == "ScaleByScheduleState",
                lambda node: type(node).__name__ == "WeightDecaySchedule",
            )
        )
    )


def moments(core_state: Any, fields: Sequence[str], treedef: Any) -> dict[str, list[Array]]:
    """For each field its leaves, in the order of the parameters."""
    return {
        field: treedef.flatten_up_to(
            getattr(next(_nodes(core_state, _with(field), treedef)), field)
        )
        for field in fields
    }


def with_moments(core_state: Any, new: dict[str, list[Array]], treedef: Any) -> Any:
    """`core_state` with these fields put in."""
    for field, leaves in new.items():
        test = _outside(treedef, _with(field))

        def put(node: Any, test: Any = test, field: str = field, leaves: Any = leaves) -> Any:
            return node._replace(**{field: treedef.unflatten(leaves)}) if test(node) else node

        core_state = jax.tree.map(put, core_state, is_leaf=test)
    return core_state


def _with(field: str) -> Callable[[Any], bool]:
    return lambda node: field in getattr(node, "_fields", ())


def _outside(treedef: Any, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """`test`, but for trees like the parameters: the user's names may be those of optax."""
    return lambda node: test(node) and jax.tree.structure(node) != treedef


def _nodes(state: Any, test: Callable[[Any], bool], treedef: Any) -> Any:
    """The outermost named tuples of `state` that pass the test, outside trees of moments."""
    wanted = _outside(treedef, test)

    def stop(node: Any) -> bool:
        return wanted(node) or jax.tree.structure(node) == treedef

    return filter(wanted, jax.tree.leaves(state, is_leaf=stop))


def behind(step: Array, last_step: Array) -> Array:
    """Steps that rows missed, `[n]` int32. Right also after the step count wrapped around."""
    return jnp.asarray(step - last_step, jnp.int32)
