"""Tags: where a value comes from, and how that passes through equations."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sparse_embed._core import JaxprEqn, Literal, is_float

_NONE: frozenset[int] = frozenset()


class Tag(NamedTuple):
    """Where a value comes from, by leaf number."""

    read: frozenset[int] = _NONE  # it is a row-wise function of these
    live: frozenset[int] = _NONE  # and a derivative can flow back to these of them
    hidden: frozenset[int] = _NONE  # it came through a whole use of these
    leaf: bool = False  # it is one of these leaves, with no operation in between


def join(tags: Iterable[Tag]) -> Tag:
    """The tag of a value made of values with these tags."""
    read, live, hidden, _ = zip(*tags, strict=True)
    return Tag(_NONE.union(*read), _NONE.union(*live), _NONE.union(*hidden))


CONTRACTIONS = frozenset("dot_general conv_general_dilated".split())


def tag_of(env: dict[Any, Tag], v: Any) -> Tag:
    return Tag() if isinstance(v, Literal) else env.get(v, Tag())


def user(jaxpr: Any, use: int, totals: Sequence[JaxprEqn | None]) -> JaxprEqn | None:
    """The equation numbered as by `only_uses`, which may be outside of this jaxpr."""
    if use < 0:
        return totals[-1 - use] if totals else None
    return jaxpr.eqns[use] if use < len(jaxpr.eqns) else None


def through(eqn: JaxprEqn, tags: Sequence[Tag], out: Any) -> Tag:
    """The tag behind a row-wise operation; integers and `stop_gradient` stop derivatives."""
    tag = join(tags)
    stops = eqn.primitive.name == "stop_gradient" or not is_float(out.aval)
    return tag._replace(live=frozenset()) if stops else tag


def behind(eqn: JaxprEqn, tags: Sequence[Tag], hidden: frozenset[int], out: Any) -> Tag:
    """The tag behind a whole use: still table-like while its rows keep their width."""
    widths = {v.aval.shape[1:] for v, t in zip(eqn.invars, tags, strict=True) if t.read or t.hidden}
    same = getattr(out.aval, "ndim", 0) and out.aval.shape[1:] in widths
    return Tag(hidden=hidden) if same and eqn.primitive.name not in CONTRACTIONS else Tag()


def constant(body: Any, tags: Sequence[Tag], consts: int, carry: int) -> list[bool]:
    """Operands of a loop that are the same in every round: constants and unchanged carries."""
    same = [body.outvars[i] is body.invars[consts + i] for i in range(carry)]
    return [True] * consts + same + [False] * (len(tags) - consts - carry)
