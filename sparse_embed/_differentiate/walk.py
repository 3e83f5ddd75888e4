"""The walk: finds where a program reads rows of its tables, without running it.

From each candidate leaf the walk follows row-wise operations forward. Every value on the way is a
row-wise function of some leaves, and carries their numbers in its tag. Such a value may end in row
reads, which become sites; any other differentiated use is a whole use of its leaves, which then
need a dense gradient.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from sparse_embed._core import (
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    JaxprEqn,
    called_jaxpr,
    is_row_wise,
    manual_axes,
    open_jaxpr,
    scan_split,
    source_line,
    varying_axes,
)
from sparse_embed._differentiate.live import live_carry, live_vars, only_uses
from sparse_embed._differentiate.plan import Plan, Site, Step, WholeUse, site_axes
from sparse_embed._differentiate.reads import RowRead, row_read
from sparse_embed._differentiate.tags import Tag, behind, constant, join, tag_of, through, user

Found = tuple[Step | None, Sequence[Tag]]  # the step of an equation, the tags of its outputs

_SAME_ROWS = frozenset("optimization_barrier pvary sharding_constraint".split())


class Walk:
    """A walk, and what it has met so far.

    Args:
      lists: which `Ids` of a read to list. "listed" takes the differentiated reads only, where
        the gradient goes; "read" and "asked" take every read.

    Attributes:
      whole_uses: the whole uses, in program order.
      looked_up: the leaves that are read by row at ids, be it behind a whole use, with the number
        of ids: tables.
      in_while: leaves whose rows are read inside a `while_loop`, which no ids can leave.
    """

    def __init__(self, lists: Literal["listed", "read", "asked"] = "listed"):
        self.lists = lists
        self.list_all = lists != "listed"
        self.whole_uses: list[WholeUse] = []
        self.looked_up: Counter[int] = Counter()
        self.in_while: set[int] = set()
        self._loops = 0
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
        env: dict[Any, Tag] = dict(zip(jaxpr.invars, in_tags, strict=True))
        for number, eqn in enumerate(jaxpr.eqns):
            tags = [tag_of(env, v) for v in eqn.invars]
            if not any(t.read or t.hidden for t in tags):
                continue
            outs_live = [self.list_all or v in live for v in eqn.outvars]
            uses = [only.get(v, len(jaxpr.eqns)) for v in eqn.outvars]
            then = [user(jaxpr, use, totals) for use in uses]
            step, out_tags = self._step(eqn, tags, outs_live, then)
            if step is not None and any(t.read for t in tags):
                plan.steps[number] = step
                for use in (uses[i] for i in step.summed):
                    if use < 0:
                        plan.summed.add(-1 - use)
                    else:
                        plan.steps[use] = Step("done")
                plan.sites += step.sites
            env.update(zip(eqn.outvars, out_tags, strict=True))
        plan.out_tags = [tag_of(env, v) for v in jaxpr.outvars]
        return plan

    def _step(
        self, eqn: JaxprEqn, tags: list[Tag], live: list[bool], then: Sequence[JaxprEqn | None]
    ) -> Found:
        """`then`: for each output the equation that alone uses it, if there is one."""
        name, read = eqn.primitive.name, row_read(eqn)
        if read is not None:
            found = self._read(eqn, read, tags, live[0])
            bag = read.summed_axis(then[0]) if then[0] else None
            if bag is not None and tags[0].leaf and self.lists == "listed" and found.sites:
                found.sites = [replace(found.sites[0], bag=bag)]
            return found, [Tag()]
        if is_row_wise(eqn, [bool(t.read) for t in tags]):
            return Step("row_op"), [through(eqn, tags, v) for v in eqn.outvars]
        if name in _SAME_ROWS:
            return Step("same_rows"), tags
        if name in CALLS:
            self._calls.append(self._line(eqn))
            plan = self.plan(called_jaxpr(eqn)[0], tags, live, then)
            self._calls.pop()
            return Step("call", (plan,), plan.sites), plan.out_tags
        if name in _ENTER:
            return _ENTER[name](self, eqn, tags, live)
        return self._whole(eqn, tags, live)

    def _read(self, eqn: JaxprEqn, read: RowRead, tags: list[Tag], live: bool) -> Step:
        step, tag = Step("read", read=read), tags[0]
        if self.list_all and len(tags) > 1:  # ids made of a whole table
            self._note(eqn.primitive.name, eqn, join(tags[1:]).read)
        if not read.static:
            for k in tag.read | tag.hidden:
                self.looked_up[k] += math.prod(read.lead)
        leaves = tag.read if self.list_all else tag.live if live else frozenset()
        if self._loops and leaves:
            self.in_while |= leaves
            self._note("while", eqn, leaves)
        elif leaves:
            axes = tuple(sorted(varying_axes(eqn.outvars[0].aval)))
            listed = tuple(sorted(leaves))
            step.sites = [Site(read, listed, self.lists, self._line(eqn), read.lead, axes)]
        return step

    def _whole(self, eqn: JaxprEqn, tags: Sequence[Tag], live: Sequence[bool]) -> Found:
        """An equation that needs its tagged operands whole."""
        name, whole = eqn.primitive.name, join(tags)
        leaves = whole.read if self.list_all else whole.live
        if any(live):
            self._note(name, eqn, leaves)
        hidden = whole.hidden | leaves
        if name in CUSTOM_RULES:  # it may look rows up inside
            probe = Walk()
            body = called_jaxpr(eqn)[0]
            probe.plan(body, [Tag(hidden=t.hidden | t.read) for t in tags], live)
            self.looked_up += probe.looked_up
        return None, [behind(eqn, tags, hidden, v) for v in eqn.outvars]

    def _note(self, name: str, eqn: JaxprEqn, leaves: frozenset[int]) -> None:
        self.whole_uses += [WholeUse(k, name, self._line(eqn)) for k in sorted(leaves)]

    def _line(self, eqn: JaxprEqn) -> str:
        """The user's line; for an equation inside a jax function, that of its call."""
        return source_line(eqn) or (self._calls[-1] if self._calls else "an unknown line")

    def _checkpoint(self, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
        plan = self.plan(called_jaxpr(eqn)[0], tags, live)
        return self._leave(eqn, Step("checkpoint", (plan,), plan.sites), live)

    def _cond(self, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
        bodies = [open_jaxpr(b)[0] for b in eqn.params["branches"]]
        plans = tuple(self.plan(body, tags[1:], live) for body in bodies)
        sites = [s for plan in plans for s in plan.sites]
        return self._leave(eqn, Step("cond", plans, sites), live)

    def _scan(self, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
        split = scan_split(eqn)
        if split is None:
            return self._whole(eqn, tags, live)
        consts, carry = split
        body, _ = open_jaxpr(eqn.params["jaxpr"])
        keep, inner = self._keep(eqn, tags, live, constant(body, tags, consts, carry))
        inner[consts + carry :] = [Tag()] * (len(tags) - consts - carry)  # a row at a time
        plan = self.plan(body, inner, live_carry(body, consts, carry, live))
        sites = [s.under(eqn.params["length"], s.axes) for s in plan.sites]
        step = Step("scan", (plan,), sites, keep)
        return self._leave(eqn, step, live, inner[consts : consts + carry])

    def _while(self, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
        in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = (open_jaxpr(eqn.params[k])[0] for k in ("cond_jaxpr", "body_jaxpr"))
        carry = len(eqn.outvars)
        same = constant(body, tags[in_cond:], in_body, carry)
        keep, inner = self._keep(eqn, tags, live, [True] * in_cond + same)
        self._loops += 1
        plans = (
            self.plan(cond, inner[:in_cond] + inner[in_cond + in_body :], [False]),
            self.plan(body, inner[in_cond:], live_carry(body, in_body, carry, live)),
        )
        self._loops -= 1
        return self._leave(eqn, Step("while", plans, [], keep), live, inner[in_cond + in_body :])

    def _shard_map(self, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
        replicated = [all(axis is None for axis in spec) for spec in eqn.params["in_specs"]]
        keep, inner = self._keep(eqn, tags, live, replicated)
        plan = self.plan(called_jaxpr(eqn)[0], inner, live)
        manual, mesh = manual_axes(eqn), eqn.params["mesh"].shape
        sites = []
        for s in plan.sites:
            devices = math.prod(mesh[a] for a in site_axes(eqn, s))
            sites.append(s.under(devices, tuple(a for a in s.axes if a not in manual)))
        return self._leave(eqn, Step("shard_map", (plan,), sites, keep), live)

    def _keep(
        self, eqn: JaxprEqn, tags: list[Tag], live: list[bool], can: Sequence[bool]
    ) -> tuple[tuple[bool, ...], list[Tag]]:
        """Which operands stay delayed inside, and the tags there; the others are used whole."""
        keep = tuple(bool(t.read) and c for t, c in zip(tags, can, strict=True))
        inner = [t if k else Tag(hidden=t.hidden | t.read) for t, k in zip(tags, keep, strict=True)]
        lost = join([Tag(), *(t for t, k in zip(tags, keep, strict=True) if not k)])
        if any(live):
            self._note(eqn.primitive.name, eqn, lost.read if self.list_all else lost.live)
        return keep, inner

    def _leave(
        self, eqn: JaxprEqn, step: Step, live: list[bool], constant: Sequence[Tag] = ()
    ) -> Found:
        """Outputs of an entered jaxpr are whole arrays, but for a carry that never changes."""
        out_tags = [Tag()] * len(eqn.outvars)
        out_tags[: len(constant)] = constant
        for plan in step.plans[-1:] if step.kind == "while" else step.plans:
            for i, tag in enumerate(plan.out_tags):
                if out_tags[i].read:
                    continue
                if live[i]:
                    leaves = tag.read if self.list_all else tag.live
                    self._note(eqn.primitive.name, eqn, leaves)
                out_tags[i] = Tag(hidden=tag.read | tag.hidden | out_tags[i].hidden)
        return step, out_tags


_ENTER: dict[str, Callable[[Walk, JaxprEqn, list[Tag], list[bool]], Found]] = {
    **dict.fromkeys(CHECKPOINTS, Walk._checkpoint),
    "cond": Walk._cond,
    "scan": Walk._scan,
    "while": Walk._while,
    "shard_map": Walk._shard_map,
}
