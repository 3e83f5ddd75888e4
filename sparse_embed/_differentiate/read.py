"""One read of the rerun: ids followed back to the leaves, taps added to the rows found there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._core import JaxprEqn, bind, tuning
from sparse_embed._differentiate.delayed import Delayed, Place, Reading, whole, without_gradient
from sparse_embed._differentiate.plan import Site, Step
from sparse_embed._views import ReadIds

Values = list[Any]
Outs = tuple[Values, list[Array]]  # outputs, and the ids of the sites
Taps = tuple[Array, ...]  # one tap `[*site.tap_shape, *features]` for each leaf of a site
ManyTaps = Sequence[Taps]
LaidOut = list[Array] | None


def read_rows(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps, laid: LaidOut) -> Outs:
    table, *starts = values
    if not isinstance(table, Delayed):  # an ordinary array, read at ids made of a table
        return bind(eqn, whole(values)), []
    assert step.read is not None
    ids = step.read.ids(whole(starts))
    if step.bag is not None:
        total = step.read.sum(table.whole(), ids, step.bag)
        own = [getattr(ids, step.sites[0].lists)]
        return [total + taps[0][0] if taps[0] else total], own
    named = {
        (k, site.path, site.row_axes): t.reshape(-1, *t.shape[len(site.shape) :])
        for site, tap in zip(step.sites, taps, strict=True)
        for k, t in zip(site.leaves, tap, strict=False)  # none, where rows are only listed
    }
    reading = Reading(named)
    flat = tuple(i.reshape(-1) for i in ids.safe)
    rows = table.rows(Place(step.read.axes, flat), reading)
    if step.read.drops and table.mixes:  # nor does a gradient go to what the rows are mixed with
        rows = without_gradient(rows, ids.listed.reshape(-1) < step.read.num_rows)
    if laid is not None and tuning.keeps(rows):
        rows = jax.lax.optimization_barrier(rows)
        laid.append(rows)
    out = step.read.place(rows.reshape(*ids.asked.shape, *rows.shape[1:]), ids)
    return [out], [_listed(site, ids, reading) for site in step.sites]


def _listed(site: Site, ids: ReadIds, reading: Reading) -> Array:
    """The rows of the leaves that a site lists: those asked for, followed through the views."""
    own = getattr(ids, site.lists)
    if site.lists == "asked" or (not site.path and len(site.row_axes) == 1):
        return own
    place = reading.found[site.path, site.row_axes]
    there = own.reshape(-1) < site.read.num_rows
    for mask in (place.inside, place.counted if site.lists == "listed" else None):
        there = there if mask is None else there & mask
    return jnp.where(there, site.flat(place.ids), site.num_rows).reshape(own.shape)
