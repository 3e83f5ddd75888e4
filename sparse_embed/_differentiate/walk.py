"""The walk: finds where a program reads rows of its tables, without running it.

From each candidate leaf the walk follows row-wise operations forward. Every value on the way is a
row-wise function of some leaves, and carries their numbers in its tag. Such a value may end in row
reads, which become sites; any other differentiated use is a whole use of its leaves, which then
need a dense gradient.
"""

import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, Literal

from sparse_embed._core import (
    CALLS,
    CUSTOM_RULES,
    ELEMENTWISE,
    Axes,
    JaxprEqn,
    called_jaxpr,
    source_line,
    varying_axes,
)
from sparse_embed._differentiate.enter import ENTER, Found
from sparse_embed._differentiate.live import live_vars, only_uses
from sparse_embed._differentiate.plan import Plan, Site, Step, WholeUse
from sparse_embed._differentiate.reread import is_read_again, repeats_entries
from sparse_embed._differentiate.sources import Sources, blamed, sources
from sparse_embed._differentiate.tags import (
    OF_DATA,
    OF_LEAVES,
    Tag,
    behind,
    join,
    ordinary,
    tag_of,
    through,
    user,
)
from sparse_embed._views import RowRead, can_be_delayed, row_read

READS = frozenset("gather dynamic_slice".split())
_SAME_ROWS = frozenset("optimization_barrier pvary sharding_constraint".split())


class Walk:
    """A walk, and what it has met so far.

    Args:
      shapes: of the leaves.
      lists: which `Ids` of a read to list. "listed" takes the differentiated reads only, where
        the gradient goes; "read" and "asked" take every read.

    Attributes:
      whole_uses: the whole uses, in program order.
      looked_up: the leaves that are read by row at ids, be it behind a whole use, with the number
        of ids: tables.
      row_axes: for each leaf that is read by row, the axes along which its rows run.
      hidden_axes: the same for leaves that are read behind a whole use.
      cut: constant slices that are reads of rows, by identity of their equations. All others are
        views, of which rows may be read.
      to_cut: those that would better be cut: they are used whole.
      in_while: leaves whose rows are read inside a `while_loop`, which no ids can leave.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        lists: Literal["listed", "read", "asked"] = "listed",
        cut: Set[int] = frozenset(),
    ):
        self.shapes, self.lists, self.cut = shapes, lists, cut
        self.list_all = lists != "listed"
        self.whole_uses: list[WholeUse] = []
        self.looked_up: Counter[int] = Counter()
        self.row_axes: dict[int, Axes] = {}
        self.hidden_axes: dict[int, Axes] = {}
        self.to_cut: set[int] = set()
        self.in_while: set[int] = set()
        self._visits = 0
        self.loops = 0
        self._calls: list[str] = []

    def plan(
        self,
        jaxpr: Any,
        in_tags: Sequence[Tag],
        live_out: Sequence[bool],
        totals: Sequence[JaxprEqn | None] = (),
    ) -> Plan:
        """Plans one jaxpr.

        Args:
          jaxpr: an open jaxpr.
          in_tags: a tag for each input; an empty one where it is an ordinary value.
          live_out: for each output, whether it is differentiated.
          totals: for each output, the only equation outside that uses it, where it may be made
            one step with a read inside.

        Returns:
          The plan.
        """
        plan = Plan()
        live = live_vars(jaxpr, live_out)
        only = only_uses(jaxpr)
        repeats = {e.outvars[0]: n for n, e in enumerate(jaxpr.eqns) if repeats_entries(e)}
        env: dict[Any, Tag] = dict(zip(jaxpr.invars, in_tags, strict=True))
        for number, eqn in enumerate(jaxpr.eqns):
            tags = [tag_of(env, v) for v in eqn.invars]
            origin = reduce(or_, (t.origin for t in tags), 0)
            if not any(t.read or t.hidden for t in tags):
                if origin & OF_LEAVES:
                    env.update(dict.fromkeys(eqn.outvars, Tag(origin=origin)))
                continue
            outs_live = [self.list_all or v in live for v in eqn.outvars]
            uses = [only.get(v, len(jaxpr.eqns)) for v in eqn.outvars]
            then = [user(jaxpr, use, totals) for use in uses]
            step, out_tags = self._step(eqn, tags, outs_live, then)
            if step is not None and any(t.read for t in tags):
                plan.steps[number] = step
                for v in ordinary(eqn, tags) if step.kind == "row_op" else []:
                    if v in repeats and only.get(v) == number:
                        self._visits += 1  # a mask of rows, say, is not laid out for all features
                        plan.steps[repeats[v]] = Step("row_op", visit=self._visits)
                for use in (uses[i] for i in step.summed):
                    if use < 0:
                        plan.summed.add(-1 - use)
                    else:
                        plan.steps[use] = Step("done")
                plan.sites += step.sites
            env.update(
                (v, t._replace(origin=origin)) for v, t in zip(eqn.outvars, out_tags, strict=True)
            )
        plan.out_tags = [tag_of(env, v) for v in jaxpr.outvars]
        return plan

    def _step(
        self, eqn: JaxprEqn, tags: list[Tag], live: list[bool], then: Sequence[JaxprEqn | None]
    ) -> Found:
        """`then`: for each output the equation that alone uses it, if there is one."""
        name, read = eqn.primitive.name, row_read(eqn)
        is_view = name == "slice" and id(eqn) not in self.cut
        if read is not None and not is_view and not is_read_again(eqn, read, tags, then):
            found = self._read(eqn, read, tags, live[0])
            bag = read.summed_axis(then[0]) if then[0] else None
            if bag is not None and tags[0].leaf and self.lists != "asked" and found.sites:
                found.sites = [replace(found.sites[0], bag=bag)]
            return found, [Tag()]
        known = can_be_delayed(eqn) and (read is not None or name not in READS)
        if known and any(t.node for t in tags) and not self._spreads(eqn, tags):
            self._visits += 1
            step = Step("row_op", visit=self._visits)
            call, outs = self._calls[-1] if self._calls else "", range(len(eqn.outvars))
            return step, [through(eqn, tags, i, step.visit, call) for i in outs]
        if name in _SAME_ROWS:
            return Step("same_rows"), tags
        if name in CALLS:
            self._calls.append(self._line(eqn))
            plan = self.plan(called_jaxpr(eqn)[0], tags, live, then)
            self._calls.pop()
            return Step("call", (plan,), plan.sites), plan.out_tags
        if name in ENTER:
            return ENTER[name](self, eqn, tags, live)
        return self.whole(eqn, tags, live)

    def _spreads(self, eqn: JaxprEqn, tags: Sequence[Tag]) -> bool:
        """Whether a leaf meets what is no table: a bias the activations, or the data of a batch."""
        own = [v.aval for v, t in zip(eqn.invars, tags, strict=True) if t.read]
        largest, out = max(x.size for x in own), eqn.outvars[0].aval
        for v, t in zip(eqn.invars, tags, strict=True):
            if not t.read and t.origin == OF_LEAVES | OF_DATA and v.aval.size >= largest > 1:
                return True
        if eqn.primitive.name not in ELEMENTWISE or out.size == largest:
            return False
        return not any(x.shape[0] == out.shape[0] for x in own)  # then its rows get wider

    def _read(self, eqn: JaxprEqn, read: RowRead, tags: list[Tag], live: bool) -> Step:
        step, tag = Step("read", read=read), tags[0]
        if self.list_all and len(tags) > 1:  # ids made of a whole table
            for t in tags[1:]:
                self.need(eqn.primitive.name, eqn, t)
        found = sources(tag.node, read.axes) if tag.node else Sources([], [])
        if not read.static:
            rows = {s.leaf for s in found.rows} | {n.leaf for n in found.whole if not n.spread}
            for k in rows | tag.hidden:
                self.looked_up[k] += math.prod(read.lead)
            for k in tag.hidden:  # in a carry, say, that a step inside changes
                if eqn.invars[0].aval.shape == self.shapes[k]:
                    self.hidden_axes.setdefault(k, tuple(sorted(read.axes)))
        for need in found.whole:
            if self.list_all or (live and need.live):
                self._note(need.node.eqn.primitive.name, need.node.eqn, {need.leaf}, need.node.call)
        listed = [s for s in found.rows if self.list_all or (live and s.live)]
        if self.loops and listed:
            leaves = {s.leaf for s in listed}
            self.in_while |= leaves
            self._note("while", eqn, leaves)
            return step
        mesh = tuple(sorted(varying_axes(eqn.outvars[0].aval)))
        line = self._line(eqn)
        for path, axes in dict.fromkeys((s.path, s.axes) for s in listed):
            own = sorted({s.leaf for s in listed if (s.path, s.axes) == (path, axes)})
            for k in own:
                if self.row_axes.setdefault(k, tuple(sorted(axes))) != tuple(sorted(axes)):
                    self._note(eqn.primitive.name, eqn, {k})
            sizes = tuple(self.shapes[own[0]][a] for a in axes)
            if len(axes) > 1 and math.prod(sizes) >= 2**31:  # more rows than int32 can number
                self._note(eqn.primitive.name, eqn, set(own))
            site = Site(read, tuple(own), self.lists, line, read.lead, mesh, path, axes, sizes)
            step.sites.append(site)
        return step

    def whole(self, eqn: JaxprEqn, tags: Sequence[Tag], live: Sequence[bool]) -> Found:
        """An equation that needs its tagged operands whole."""
        name, whole = eqn.primitive.name, join(tags)
        leaves = whole.read if self.list_all else whole.live
        if any(live):
            for tag in tags:
                self.need(name, eqn, tag)
        if can_be_delayed(eqn):  # an array repeated: nobody looks its rows up
            leaves = frozenset()
        hidden = whole.hidden | leaves
        if name in READS:  # of parts of rows, say: a lookup all the same
            self.looked_up.update(tags[0].read | tags[0].hidden)
        if name in CUSTOM_RULES:  # it may look rows up inside
            probe = Walk(self.shapes)
            body = called_jaxpr(eqn)[0]
            probe.plan(body, [Tag(hidden=t.hidden | t.read) for t in tags], live)
            self.looked_up += probe.looked_up
        return None, [behind(eqn, tags, hidden, v) for v in eqn.outvars]

    def need(self, name: str, eqn: JaxprEqn, tag: Tag) -> None:
        """A value is needed whole; of constant slices in it, just their rows."""
        if tag.node is None:
            return
        leaves, slices = blamed(tag.node)
        self._note(name, eqn, leaves & (tag.read if self.list_all else tag.live))
        self.to_cut |= {id(e) for e in slices}

    def _note(self, name: str, eqn: JaxprEqn, leaves: Set[int], call: str = "") -> None:
        line = self._line(eqn, call)
        self.whole_uses += [WholeUse(k, name, line) for k in sorted(leaves)]

    def _line(self, eqn: JaxprEqn, call: str = "") -> str:
        """The user's line; for an equation inside a jax function, that of its call."""
        calls = [call] if call else self._calls
        return source_line(eqn) or (calls[-1] if calls else "an unknown line")
