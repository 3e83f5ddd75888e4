"""From a read back to the leaves: through which views its rows come, or what needs them whole."""

from collections import Counter
from typing import Any, NamedTuple

from sparse_embed._core import Axes, JaxprEqn
from sparse_embed._differentiate.tags import Node, Path
from sparse_embed._views import row_read, view_of

MOST_PATHS = 16  # views after views, as of a blur, multiply the ways to one leaf; then it is dense


class Source(NamedTuple):
    """Rows of a leaf, as one read sees them."""

    path: Path  # the views that its ids go through
    axes: Axes  # of the leaf, along which its rows run, in the order of the ids
    leaf: int
    live: bool  # whether a derivative of the rows reaches the leaf


class Need(NamedTuple):
    """An equation that needs a leaf whole."""

    node: Node  # what it makes
    leaf: int
    live: bool
    spread: bool  # every row has all of the leaf: nobody looks a row of it up


class Sources(NamedTuple):
    """Where the rows of one read come from."""

    rows: list[Source]
    whole: list[Need]


def sources(node: Node, axes: Axes) -> Sources:
    """Follows the rows of a value along `axes` back to its leaves."""
    found, seen, arrived = Sources([], []), set(), Counter[int]()

    def follow(node: Node, axes: Axes, path: Path, live: bool) -> None:
        key = id(node), axes, path, live
        if key in seen or max(arrived.values(), default=0) > MOST_PATHS:
            return
        seen.add(key)
        if node.leaf >= 0:
            arrived[node.leaf] += 1
            found.rows.append(Source(path, axes, node.leaf, live))
            return
        view = view_of(node.eqn, node.out, axes)
        if view is None:
            for leaf in sorted(_leaves(node)):
                found.whole.append(Need(node, leaf, live and leaf in node.live, False))
            return
        for i in view.extra:  # indices made of a table, and of all of it
            below = _leaves(operand) if (operand := node.operands[i]) else ()
            found.whole.extend(Need(node, leaf, False, True) for leaf in sorted(below))
        for part in view.parts:
            operand = node.operands[part.operand]
            if operand is None:
                continue
            alive = live and bool(node.live)
            if part.axes:
                step = ((node.visit, part.operand),) if part.move else ()
                follow(operand, part.axes, path + step, alive)
                continue
            for leaf in sorted(_leaves(operand)):
                found.whole.append(Need(node, leaf, alive and leaf in operand.live, True))

    follow(node, axes, (), True)
    if max(arrived.values(), default=0) > MOST_PATHS:
        return Sources([], [Need(node, k, k in node.live, False) for k in sorted(_leaves(node))])
    return found


def _leaves(node: Node) -> set[int]:
    return {n.leaf for n in _below(node, lambda n: False) if n.leaf >= 0}


def _below(node: Node, stop: Any) -> list[Node]:
    """All nodes that a value is made of, itself first, but for what is below a `stop`."""
    seen: dict[int, Node] = {}
    left = [node]
    while left:
        n = left.pop()
        if id(n) not in seen:
            seen[id(n)] = n
            if not stop(n):
                left += [o for o in n.operands if o is not None]
    return list(seen.values())


def blamed(node: Node) -> tuple[set[int], list[JaxprEqn]]:
    """Who is to blame where a value is needed whole.

    Returns:
      The leaves that it needs whole; and the slices of a few constant rows, `table[:10]`, which
      may be read instead.
    """

    def few_rows(n: Node) -> bool:
        if n.leaf >= 0 or n.eqn.primitive.name != "slice":
            return False
        read = row_read(n.eqn)
        return read is not None and 2 * read.lead[0] <= n.eqn.invars[0].aval.shape[0]

    nodes = _below(node, few_rows)
    return {n.leaf for n in nodes if n.leaf >= 0}, [n.eqn for n in nodes if few_rows(n)]
