"""Values that the program lays out although only some rows of them are used."""

import math
from collections.abc import Sequence
from typing import Any

from sparse_embed._core import CALLS, JaxprEqn, called_jaxpr
from sparse_embed._differentiate.live import only_uses
from sparse_embed._differentiate.tags import Tag
from sparse_embed._views import RowRead, row_read


def repeats_entries(eqn: JaxprEqn) -> bool:
    """Whether it makes an array larger by repeating entries."""
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    return eqn.invars[0].aval.size < eqn.outvars[0].aval.size


def is_read_again(
    eqn: JaxprEqn, read: RowRead, tags: Sequence[Tag], then: Sequence[JaxprEqn | None]
) -> bool:
    """Whether rows read are for a second read, of fewer: `table[order][ids]`. It is a view then."""
    gather = eqn.primitive.name == "gather"
    first = 0 not in eqn.params["dimension_numbers"].offset_dims if gather else read.axes == (0,)
    again = _next_read(eqn.outvars[0].aval, then[0]) if first else None
    if again is None or again.axes != (0,) or tags[0].node is None or len(read.lead) != 1:
        return False
    alone = read.run is None or eqn.primitive.name == "dynamic_slice"
    return alone and math.prod(again.lead) <= math.prod(read.lead)


def _next_read(aval: Any, user: JaxprEqn | None) -> RowRead | None:
    """What reads rows of a value of this type, where `user` alone uses it, inside a call or not."""
    if user is None or user.primitive.name not in CALLS:
        return row_read(user) if user is not None and user.primitive.name != "slice" else None
    body = called_jaxpr(user)[0]
    alike = [v for v in body.invars if (v.aval.shape, v.aval.dtype) == (aval.shape, aval.dtype)]
    use = only_uses(body).get(alike[0], -1) if len(alike) == 1 else -1
    return _next_read(aval, body.eqns[use]) if use >= 0 else None
