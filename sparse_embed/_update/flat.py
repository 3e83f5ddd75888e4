"""Tables whose rows are not their first axis, updated as the plain tables that they also are.

A stack of tables `[F, V, D]` is a table `[F * V, D]`, and `[D, V]`, read along its second axis, a
table of `D * V` entries: both without moving a number. An optimizer must not tell the difference.
So it is traced at both shapes, and refused if it does anything but elementwise operations, and
reductions to one number, with such a table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Form, Listed, Part, RowSparse
from sparse_embed._core import (
    CALLS,
    CUSTOM_RULES,
    ELEMENTWISE,
    REDUCTIONS,
    JaxprEqn,
    Literal,
    called_jaxpr,
    open_jaxpr,
    source_line,
    transform_name,
)
from sparse_embed._update.at_once import Update, refusal, traced

_INSTEAD = "this leaf with its rows first, [F * V, D] for a stack, and in the model a reshape of it"


class Flat:
    """An update of plain tables, and the way back.

    Args:
      job: the update as it was asked for; its gradients are `Listed` or `RowSparse`.
      state: leaves of the inner state.
      params: leaves of the parameters, or None.
      row_counts: per-row counts of `clock="row"`.
      extra: extra arguments of `inner.update`.

    Attributes:
      job: the same update of plain tables.
      state: its leaves of the inner state.
      params: its leaves of the parameters.

    Raises:
      ValueError: the optimizer tells such a table from the plain one.
    """

    def __init__(
        self,
        job: Update,
        state: list[Any],
        params: list[Any] | None,
        row_counts: dict[str, list[Array]],
        extra: dict[str, Any],
    ):
        self.forms = {k: g.form for k, g in job.tables.items() if not g.form.plain}
        self.job, self.state, self.params = job, state, params
        self._own = self._leaves(job)
        if not self.forms:
            return
        if row_counts:
            raise ValueError(refusal('clock="row" counts the steps of rows', _INSTEAD))
        layout = replace(
            job.layout,
            shapes=[
                jax.ShapeDtypeStruct(self.forms[self._own[i]].flat, x.dtype)
                if i in self._own
                else x
                for i, x in enumerate(job.layout.shapes)
            ],
        )
        summed = {k: _summed(job.grads[k]) for k in self.forms}
        self._rows = {k: g.indices for k, g in summed.items()}
        grads = [_flat_gradient(summed.get(k, g)) for k, g in enumerate(job.grads)]
        self.job = replace(job, grads=grads, layout=layout)
        self.state = [self._flat(x, self._own.get(i)) for i, x in enumerate(state)]
        if params is not None:
            self.params = [self._flat(x, k) for k, x in enumerate(params)]
        self._check(job, state, params, extra)

    def updates(self, found: Sequence[Any]) -> list[Any]:
        """Updates, or new parameters, as those of the tables asked for."""
        return [self._back(x, k) for k, x in enumerate(found)]

    def new_state(self, found: Sequence[Any]) -> list[Any]:
        """Leaves of the new state, in the shapes that they had."""
        return [self._back(x, self._own.get(i)) for i, x in enumerate(found)]

    def _leaves(self, job: Update) -> dict[int, int]:
        """The state leaves that hold rows of such tables."""
        own = {i: k for i, k in enumerate(job.layout.table) if k in self.forms}
        for i, k in own.items():
            if job.layout.shapes[i].shape != self.forms[k].shape:
                name = jax.tree_util.keystr(job.layout.paths[i])
                raise ValueError(refusal(f"its state{name} is not of the table's shape", _INSTEAD))
        return own

    def _flat(self, x: Any, k: int | None) -> Any:
        return jnp.reshape(x, self.forms[k].flat) if k in self.forms else x

    def _back(self, x: Any, k: int | None) -> Any:
        if k not in self.forms:
            return x
        if isinstance(x, RowSparse):
            return RowSparse._deferred(_Update(x, self.forms[k], self._rows[k]))
        return jnp.reshape(x, self.forms[k].shape)

    def _check(
        self, job: Update, state: list[Any], params: list[Any] | None, extra: dict[str, Any]
    ) -> None:
        (jaxpr, _), _ = traced(job, state, params, extra)
        (flat, _), _ = traced(self.job, self.state, self.params, extra)
        inputs = [*range(len(job.grads)), *(self._own.get(i) for i in range(len(state)))]
        inputs += list(range(len(params or [])))
        met = {v for v, k in zip(jaxpr.invars, inputs, strict=True) if k in self.forms}
        for eqn in _needs_shape(jaxpr, met):
            where = f"{transform_name(eqn)} tells how its entries lie ({source_line(eqn)})"
            raise ValueError(refusal(f"`{eqn.primitive.name}` in {where}", _INSTEAD))
        if _names(jaxpr) != _names(flat):
            raise ValueError(refusal("it treats a table of another shape otherwise", _INSTEAD))


class _Update:
    """An update of a plain table, as one of the table that it is."""

    def __init__(self, update: RowSparse, form: Form, indices: Array):
        self._update, self.form, self.dtype = update, form, update.dtype
        self._indices = indices  # of its rows

    def coalesced(self) -> RowSparse:
        update, form, listed = self._update, self.form, self._indices
        if form.leading:
            return RowSparse._make(update.indices, update.rows, form, True)
        row, feature = form.row_and_feature(update.indices)
        slot = jnp.searchsorted(
            listed, jnp.where(row < form.num_rows, row, jnp.max(listed, initial=-1) + 1)
        )
        rows = jnp.zeros((listed.size, prod(form.features)), self.dtype)
        rows = rows.at[slot, feature].set(update.rows, mode="drop")
        return RowSparse._make(listed, rows.reshape(-1, *form.features), form, True)

    def unsummed(self) -> RowSparse:
        return self.coalesced()

    def added_to(self, table: Array) -> Array:
        return (table.reshape(self.form.flat) + self._update).reshape(self.form.shape)


def _summed(grad: Listed | RowSparse) -> Listed | RowSparse:
    """Rows whose entries are to be told apart are listed once."""
    return grad.coalesced() if isinstance(grad, Listed) and not grad.form.leading else grad


def _flat_gradient(grad: Any) -> Any:
    """A gradient as that of the plain table: of its rows, or of their entries."""
    if not isinstance(grad, Listed | RowSparse) or grad.form.plain:
        return grad
    if grad.form.leading:
        flat = Form(grad.form.flat)
        if isinstance(grad, Listed):
            return Listed(grad.parts, flat, grad.dtype)
        return RowSparse._make(grad.indices, grad.rows, flat, grad.coalesced)
    assert isinstance(grad, RowSparse), "summed before"
    entries = grad.form.entries(grad.indices).reshape(1, -1)
    return Listed([Part(entries, grad.rows.reshape(-1))], Form(grad.form.flat), grad.dtype)


def _needs_shape(jaxpr: Any, met: set[Any]) -> Iterator[JaxprEqn]:
    """The equations on values of a table, `met`, that are neither elementwise nor reduce it all."""
    met = set(met)
    for eqn in jaxpr.eqns:
        own = [not isinstance(v, Literal) and v in met for v in eqn.invars]
        if not any(own):
            continue
        name = eqn.primitive.name
        if name in CALLS or name in CUSTOM_RULES:
            body = called_jaxpr(eqn)[0]
            inside = {v for v, o in zip(body.invars, own, strict=True) if o}
            yield from _needs_shape(body, inside)
        elif name == "cond":
            for branch in eqn.params["branches"]:
                body = open_jaxpr(branch)[0]
                inside = {v for v, o in zip(body.invars, own[1:], strict=True) if o}
                yield from _needs_shape(body, inside)
        elif name in REDUCTIONS:
            if len(eqn.params["axes"]) == eqn.invars[0].aval.ndim:
                continue  # one number
            yield eqn
        elif name not in ELEMENTWISE:
            yield eqn
        met |= {v for v in eqn.outvars if v.aval.ndim}


def _names(jaxpr: Any) -> list[str]:
    """What a program does, in order, whatever the shapes."""
    found: list[str] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS or eqn.primitive.name in CUSTOM_RULES:
            found += _names(called_jaxpr(eqn)[0])
            continue
        found.append(eqn.primitive.name)
        for branch in eqn.params.get("branches", ()):
            found += _names(open_jaxpr(branch)[0])
    return found
