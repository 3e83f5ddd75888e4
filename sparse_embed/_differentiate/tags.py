"""Tags: where a value comes from, and how that passes through equations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparse_embed._core import JaxprEqn, Literal, is_float

_NONE: frozenset[int] = frozenset()

OF_LEAVES, OF_DATA = 1, 2  # what a value depends on; a value of both is an activation

Path = tuple[tuple[int, int], ...]  # the views between a read and a leaf: visit, and operand


@dataclass(frozen=True, eq=False)
class Node:
    """A value whose rows can be had from those of its operands: what is delayed until they are.

    Args:
      eqn: the equation that makes it; `None` for a leaf.
      out: which output of the equation it is.
      operands: its operands; `None` for an ordinary array.
      visit: tells the equation from itself in another call of the same function.
      leaf: number of the leaf that it is, -1 for none.
      live: the leaves that a derivative of it reaches.
      call: the user's line that called the function it is in, if jax wrote that.
    """

    eqn: Any
    out: int
    operands: tuple["Node | None", ...]
    visit: int
    leaf: int
    live: frozenset[int]
    call: str = ""


class Tag(NamedTuple):
    """Where a value comes from, by leaf number."""

    read: frozenset[int] = _NONE  # rows of it may be had from rows of these
    live: frozenset[int] = _NONE  # and a derivative can flow back to these of them
    hidden: frozenset[int] = _NONE  # it came through a whole use of these
    node: Node | None = None  # how it is made of those it is `read` from
    origin: int = 0  # OF_LEAVES, OF_DATA, both or neither

    @property
    def leaf(self) -> bool:
        """Whether it is a leaf itself, with no operation in between."""
        return self.node is not None and self.node.leaf >= 0


def leaf_tag(number: int) -> Tag:
    own = frozenset({number})
    return Tag(own, own, node=Node(None, 0, (), -1, number, own), origin=OF_LEAVES)


def join(tags: Iterable[Tag]) -> Tag:
    """The tag of a value made of values with these tags."""
    read, live, hidden, *_ = zip(*tags, strict=True)
    return Tag(_NONE.union(*read), _NONE.union(*live), _NONE.union(*hidden))


CONTRACTIONS = frozenset("dot_general conv_general_dilated".split())


def tag_of(env: dict[Any, Tag], v: Any) -> Tag:
    return Tag() if isinstance(v, Literal) else env.get(v, Tag(origin=OF_DATA))


def ordinary(eqn: JaxprEqn, tags: Sequence[Tag]) -> list[Any]:
    """The operands that are ordinary values of the program."""
    plain = (v for v, tag in zip(eqn.invars, tags, strict=True) if not tag.read)
    return [v for v in plain if not isinstance(v, Literal)]


def user(jaxpr: Any, use: int, totals: Sequence[JaxprEqn | None]) -> JaxprEqn | None:
    """The equation numbered as by `only_uses`, which may be outside of this jaxpr."""
    if use < 0:
        return totals[-1 - use] if totals else None
    return jaxpr.eqns[use] if use < len(jaxpr.eqns) else None


def through(eqn: JaxprEqn, tags: Sequence[Tag], out: int, visit: int, call: str) -> Tag:
    """The tag of a delayed output; integers and `stop_gradient` stop derivatives."""
    tag = join(tags)
    stops = eqn.primitive.name == "stop_gradient" or not is_float(eqn.outvars[out].aval)
    live = _NONE if stops else tag.live
    node = Node(eqn, out, tuple(t.node for t in tags), visit, -1, live, call)
    return tag._replace(live=live, node=node)


def behind(eqn: JaxprEqn, tags: Sequence[Tag], hidden: frozenset[int], out: Any) -> Tag:
    """The tag behind a whole use: still table-like while its rows keep their width."""
    widths = {v.aval.shape[1:] for v, t in zip(eqn.invars, tags, strict=True) if t.read or t.hidden}
    same = getattr(out.aval, "ndim", 0) and out.aval.shape[1:] in widths
    return Tag(hidden=hidden) if same and eqn.primitive.name not in CONTRACTIONS else Tag()


def constant(body: Any, tags: Sequence[Tag], consts: int, carry: int) -> list[bool]:
    """Operands of a loop that are the same in every round: constants and unchanged carries."""
    same = [body.outvars[i] is body.invars[consts + i] for i in range(carry)]
    return [True] * consts + same + [False] * (len(tags) - consts - carry)
