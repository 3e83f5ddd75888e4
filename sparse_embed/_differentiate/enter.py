"""Equations that hold programs of their own: what the walk makes of what is inside."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from sparse_embed._core import (
    CHECKPOINTS,
    JaxprEqn,
    called_jaxpr,
    manual_axes,
    open_jaxpr,
    scan_split,
)
from sparse_embed._differentiate.live import live_carry
from sparse_embed._differentiate.plan import Step, site_axes
from sparse_embed._differentiate.tags import Tag, constant

Walk = Any  # a `walk.Walk`, which calls these
Found = tuple[Step | None, Sequence[Tag]]  # the step of an equation, the tags of its outputs


def _checkpoint(walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
    plan = walk.plan(called_jaxpr(eqn)[0], tags, live)
    return _leave(walk, eqn, Step("checkpoint", (plan,), plan.sites), live)


def _cond(walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
    bodies = [open_jaxpr(b)[0] for b in eqn.params["branches"]]
    plans = tuple(walk.plan(body, tags[1:], live) for body in bodies)
    sites = [s for plan in plans for s in plan.sites]
    return _leave(walk, eqn, Step("cond", plans, sites), live)


def _scan(walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
    split = scan_split(eqn)
    if split is None:
        return walk.whole(eqn, tags, live)
    consts, carry = split
    body, _ = open_jaxpr(eqn.params["jaxpr"])
    keep, inner = _keep(walk, eqn, tags, live, constant(body, tags, consts, carry))
    members = tags[consts + carry :]  # a row at a time, of a stack a table at a time
    inner[consts + carry :] = [_shown(t) for t in members]
    plan = walk.plan(body, inner, live_carry(body, consts, carry, live))
    sites = [s.under(eqn.params["length"], s.axes) for s in plan.sites]
    step = Step("scan", (plan,), sites, keep)
    return _leave(walk, eqn, step, live, inner[consts : consts + carry])


def _while(walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = (open_jaxpr(eqn.params[k])[0] for k in ("cond_jaxpr", "body_jaxpr"))
    carry = len(eqn.outvars)
    same = constant(body, tags[in_cond:], in_body, carry)
    keep, inner = _keep(walk, eqn, tags, live, [True] * in_cond + same)
    walk.loops += 1
    plans = (
        walk.plan(cond, inner[:in_cond] + inner[in_cond + in_body :], [False]),
        walk.plan(body, inner[in_cond:], live_carry(body, in_body, carry, live)),
    )
    walk.loops -= 1
    return _leave(walk, eqn, Step("while", plans, [], keep), live, inner[in_cond + in_body :])


def _shard_map(walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool]) -> Found:
    replicated = [all(axis is None for axis in spec) for spec in eqn.params["in_specs"]]
    keep, inner = _keep(walk, eqn, tags, live, replicated)
    plan = walk.plan(called_jaxpr(eqn)[0], inner, live)
    manual, mesh = manual_axes(eqn), eqn.params["mesh"].shape
    sites = []
    for s in plan.sites:
        devices = math.prod(mesh[a] for a in site_axes(eqn, s))
        sites.append(s.under(devices, tuple(a for a in s.axes if a not in manual)))
    return _leave(walk, eqn, Step("shard_map", (plan,), sites, keep), live)


def _shown(tag: Tag) -> Tag:
    """That of a value which is an ordinary array inside."""
    return Tag(hidden=tag.hidden | tag.read, origin=tag.origin)


def _keep(
    walk: Walk, eqn: JaxprEqn, tags: list[Tag], live: list[bool], can: Sequence[bool]
) -> tuple[tuple[bool, ...], list[Tag]]:
    """Which operands stay delayed inside, and the tags there; the others are used whole."""
    keep = tuple(bool(t.read) and c for t, c in zip(tags, can, strict=True))
    inner = [t if k else _shown(t) for t, k in zip(tags, keep, strict=True)]
    if any(live):
        for tag, kept in zip(tags, keep, strict=True):
            if not kept:
                walk.need(eqn.primitive.name, eqn, tag)
    return keep, inner


def _leave(
    walk: Walk, eqn: JaxprEqn, step: Step, live: list[bool], constant: Sequence[Tag] = ()
) -> Found:
    """Outputs of an entered jaxpr are whole arrays, but for a carry that never changes."""
    out_tags = [Tag()] * len(eqn.outvars)
    out_tags[: len(constant)] = constant
    for plan in step.plans[-1:] if step.kind == "while" else step.plans:
        for i, tag in enumerate(plan.out_tags):
            if out_tags[i].read:
                continue
            if live[i]:
                walk.need(eqn.primitive.name, eqn, tag)
            out_tags[i] = Tag(hidden=tag.read | tag.hidden | out_tags[i].hidden)
    return step, out_tags


ENTER: dict[str, Callable[[Walk, JaxprEqn, list[Tag], list[bool]], Found]] = {
    **dict.fromkeys(CHECKPOINTS, _checkpoint),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}
