"""Runs a program that was written for whole tables on some rows of them.

`lazy` traces an optimizer's update once, at the true shapes of the tables, and runs its equations
here on the touched rows. So the optimizer's own code sees the whole table's shape (a mean divides
by all of its entries), while no operation is larger than the touched rows.

An equation may be row-wise, or it may reduce over the rows something that untouched rows are known
to contribute a fixed number to: squares of the gradient are zero there, so a global norm is exact.
Any other equation makes its outputs `Refused`, with the reason; whoever needs one of them raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_embed._core import (
    CALLS,
    CUSTOM_RULES,
    ELEMENTWISE,
    REDUCTIONS,
    JaxprEqn,
    Literal,
    bind,
    bind_on_rows,
    called_jaxpr,
    is_row_wise,
    source_line,
    transform_name,
    while_tracing,
)
from sparse_embed._on_rows.branches import run_cond
from sparse_embed._on_rows.reductions import Reduction
from sparse_embed._on_rows.untouched import known, untouched_value
from sparse_embed._on_rows.values import (
    PerRow,
    Refused,
    Rows,
    is_tall,
    laid_out,
    spread_over,
    tables_of,
)


class OnRows:
    """Runs jaxprs on the touched rows.

    Args:
      heights: rows of each table.
      real: for each table, `[n]` bools: which entries of its blocks are rows and not padding.
      given: arrays that come from the user, whose rows may be gathered with `gather`.
      gather: `(table number, array [V, *features]) -> [n, *features]`.
    """

    def __init__(
        self,
        heights: dict[int, int],
        real: dict[int, Array],
        given: Sequence[Any],
        gather: Callable[[int, Array], Array],
    ):
        self.heights, self.real, self.gather = heights, real, gather
        self.given = {id(x) for x in given}
        self.apart = 0  # branches around the current equation that not all rows take
        self._calls: list[JaxprEqn] = []  # the calls that the current equation is in

    def run(
        self,
        program: tuple[Any, Sequence[Any]],
        args: Sequence[Any],
        only: Sequence[int] | None = None,
        made: dict[Any, Any] | None = None,
    ) -> list[Any]:
        """Runs `(jaxpr, consts)`; each value is an array, `Rows`, `PerRow` or `Refused`.

        With `only`, the equations of these numbers, and outputs of the others are `None`, but for
        variables whose values are `made` already.
        """
        jaxpr, consts = program
        inputs = zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        env: dict[Any, Any] = dict(inputs) | (made or {})

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env.get(v)

        for eqn in jaxpr.eqns if only is None else [jaxpr.eqns[number] for number in only]:
            outs = self._eqn(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def block(self, value: Any, table: int, n: int) -> Any:
        """`value` as a block of `n` rows of `table`, or `Refused`."""
        if isinstance(value, Rows):
            if value.table == table:
                return value.block
            if value.table is None:
                return jnp.broadcast_to(value.block, (n, *value.block.shape[1:]))
            return Refused("it is a value of another table", frozenset({table}))
        if id(value) in self.given:
            return self.gather(table, value)
        if isinstance(value, Refused | PerRow):
            return value
        return Refused("a value is made for every row of the table", frozenset({table}))

    def _eqn(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        special = [v for v in values if isinstance(v, Rows | PerRow | Refused)]
        if not special:
            return self._plain(eqn, values)
        if name in CALLS or name in CUSTOM_RULES:
            self._calls.append(eqn)
            outs = self.run(called_jaxpr(eqn), values)
            self._calls.pop()
            return outs
        if name == "cond":
            return self._cond(eqn, values)
        refused = [v for v in special if isinstance(v, Refused)]
        if refused:
            tables = frozenset().union(*(r.tables for r in refused), tables_of(special))
            return [Refused(refused[0].reason, tables)] * len(eqn.outvars)
        if any(isinstance(v, PerRow) for v in special):
            return self._per_row(eqn, values)
        if name in REDUCTIONS and 0 in eqn.params["axes"]:
            return self._reduce(eqn, values[0])
        if name == "optimization_barrier":
            return values
        return self._row_wise(eqn, values)

    def _plain(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        p = eqn.params
        spread = eqn.primitive.name == "broadcast_in_dim" and 0 not in p["broadcast_dimensions"]
        if spread and p["shape"] and p["shape"][0] in self.heights.values():
            block = bind(eqn, values, shape=(1, *p["shape"][1:]))[0]
            return [Rows(block, None, known(values[0]))]
        if eqn.primitive.name in ELEMENTWISE and all(known(v) is not None for v in values):
            with while_tracing():  # a number stays a known one
                return [np.asarray(x)[()] for x in bind(eqn, values)]
        return bind(eqn, values)

    def _row_wise(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        tagged = [isinstance(v, Rows) for v in values]
        tables = tables_of(values)
        if not tables and (any(map(is_tall, values)) or not is_row_wise(eqn, tagged)):
            # The same row all over, in the company of an ordinary array.
            return bind(eqn, [laid_out(v, x) for v, x in zip(values, eqn.invars, strict=True)])
        if len(tables) > 1 or not is_row_wise(eqn, tagged):
            return self.refuse(eqn, tables, "needs all rows at once")
        known_values = [v.untouched if isinstance(v, Rows) else known(v) for v in values]
        untouched = untouched_value(eqn, known_values)
        if not tables:
            one_row = [v.block if isinstance(v, Rows) else v for v in values]
            return [Rows(b, None, untouched) for b in bind_on_rows(eqn, one_row, 1)]
        (table,) = tables
        n, height, blocks = self.real[table].shape[0], self.heights[table], []
        for v, x in zip(values, eqn.invars, strict=True):
            tall = x.aval.shape[:1] == (height,) != (1,)
            block = self.block(v, table, n) if tall or isinstance(v, Rows) else v
            if isinstance(block, Refused):
                return self.refuse(eqn, tables, "takes an array made for every row")
            blocks.append(block)
        return [Rows(b, table, untouched) for b in bind_on_rows(eqn, blocks, n)]

    def _reduce(self, eqn: JaxprEqn, x: Rows) -> list[Any]:
        name, tables = eqn.primitive.name, tables_of([x])
        summing = name in ("reduce_sum", "reduce_xor")
        if x.table is None:
            return bind(eqn, [laid_out(x, eqn.invars[0])])
        if x.untouched is None or (summing and x.untouched != 0) or name == "reduce_prod":
            why = "adds up" if summing else "compares"
            return self.refuse(eqn, tables, f"{why} all rows, the untouched ones too")
        if self.apart:
            return self.refuse(eqn, tables, "reduces rows of which some take another branch")
        path = (*map(id, self._calls), id(eqn))
        return [self.reduce(path, Reduction(eqn, x.table, x.untouched), x.block)]

    def reduce(self, path: tuple[int, ...], reduction: Reduction, block: Array) -> Array:
        """The result of a reduction over all rows. `path` tells it from all others."""
        real, height = self.real[reduction.table], self.heights[reduction.table]
        # Where there is padding, some row is untouched.
        any_untouched = True if real.shape[0] < height else ~jnp.all(real)
        return reduction.end(reduction.of(block, real), any_untouched)

    def _per_row(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        """Equations on per-row scalars: each is spread over the features it meets."""
        tables = tables_of(values)
        name, ndim = eqn.primitive.name, len(eqn.outvars[0].aval.shape)
        table = min(tables)
        n = self.real[table].shape[0]
        spread = [spread_over(v, ndim) if isinstance(v, PerRow) else v for v in values]
        if name == "broadcast_in_dim" and eqn.params["shape"][0] == self.heights[table]:
            block = jnp.broadcast_to(spread[0], (n, *eqn.params["shape"][1:]))
            return [Rows(block, table)]
        if len(tables) > 1 or name not in ELEMENTWISE:
            return self.refuse(eqn, tables, "needs one count for all rows")
        if ndim == 0:
            spread = [jnp.broadcast_to(v, (n,)) for v in spread]
            return [PerRow(b, table) for b in bind(eqn, spread)]
        if eqn.outvars[0].aval.shape[0] != self.heights[table]:
            return self.refuse(eqn, tables, "needs one count for all rows")
        shape = (n, *eqn.outvars[0].aval.shape[1:])
        own = [
            isinstance(v, PerRow) or not x.aval.shape
            for v, x in zip(values, eqn.invars, strict=True)
        ]
        blocks = [v if o else self.block(v, table, n) for v, o in zip(spread, own, strict=True)]
        if any(isinstance(b, Refused) for b in blocks):  # a leaf that is as long as the table
            return self.refuse(eqn, tables, "needs one count for all rows")
        blocks = [b if jnp.ndim(b) == 0 else jnp.broadcast_to(b, shape) for b in blocks]
        return [Rows(b, table) for b in bind_on_rows(eqn, blocks, n)]

    def _cond(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        return run_cond(self, eqn, values)

    def refuse(self, eqn: JaxprEqn, tables: frozenset[int], why: str) -> list[Any]:
        """`Refused` for each output, with the transform and the user's line in the reason."""
        # An equation inside a jax function has no line of its own; its call has one.
        written = next((e for e in (eqn, *reversed(self._calls)) if source_line(e)), eqn)
        where = f"{transform_name(written)} {why}"
        reason = f"`{eqn.primitive.name}` in {where} ({source_line(written)})"
        return [Refused(reason, tables)] * len(eqn.outvars)
