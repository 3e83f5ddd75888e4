"""The rerun: runs a planned program, with table values delayed until their rows are read.

At each site the rows are read as `table[ids] + tap`. A tap is an extra input, filled with -0.0:
`x + -0.0` is `x` for every float `x` (+0.0 would turn -0.0 into 0.0), so the program computes what
it always did, and the derivative with respect to a tap is the gradient of the rows read there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from sparse_embed._core import (
    JaxprEqn,
    Literal,
    bind,
    called_jaxpr,
    manual_axes,
    open_jaxpr,
    scan_split,
)
from sparse_embed._differentiate.delayed import Delayed, taken_apart, whole
from sparse_embed._differentiate.plan import Plan, Step, site_axes
from sparse_embed._differentiate.read import LaidOut, ManyTaps, Outs, Values, read_rows


def rerun(
    plan: Plan, jaxpr: Any, consts: Any, args: Any, taps: ManyTaps, laid_out: LaidOut = None
) -> Outs:
    """Runs a planned jaxpr.

    Args:
      plan: its plan.
      jaxpr: the open jaxpr.
      consts: values of its constants.
      args: values of its inputs; `Delayed` where the plan's tags say so.
      taps: one tuple of taps for each site of the plan.
      laid_out: a list that gets the rows of each large read, but for those inside loops and
        branches. Such rows lie in memory once, for all who use them.

    Returns:
      Its outputs (some may be `Delayed`), and the ids `[*site.shape]` of each site.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    left, ids = iter(taps), []

    for number, eqn in enumerate(jaxpr.eqns):
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        step = plan.steps.get(number)
        if step is None:
            outs = bind(eqn, whole(values))
        else:
            inside = [next(left) for _ in step.sites]
            if step.kind == "read":
                outs, found = read_rows(eqn, step, values, inside, laid_out)
            elif step.kind == "call":
                body = called_jaxpr(eqn)
                outs, found = rerun(step.plans[0], *body, values, inside, laid_out)
            else:
                outs, found = _STEPS[step.kind](eqn, step, values, inside)
            ids += found
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars], ids


def _row_op(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    return [Delayed(eqn, values, i, step.visit) for i in range(len(eqn.outvars))], []


def _same_rows(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    plain = [i for i, v in enumerate(values) if not isinstance(v, Delayed)]
    if plain:
        for i, v in zip(plain, bind(eqn, [values[i] for i in plain]), strict=True):
            values[i] = v
    return values, []


def _done(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    return values, []  # the sum was made where its rows were read


def _checkpoint(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    jaxpr, consts = called_jaxpr(eqn)
    merge, plain = _split(values, [isinstance(v, Delayed) for v in values])

    def run(plain, taps):
        outs, ids = rerun(step.plans[0], jaxpr, consts, merge(plain), taps)
        return whole(outs), ids

    options = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    return jax.checkpoint(run, **options)(plain, taps)


def _cond(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    index, *operands = values
    merge, plain = _split(operands, [isinstance(v, Delayed) for v in operands])

    def branch(number: int) -> Callable[..., Any]:
        jaxpr, consts = open_jaxpr(eqn.params["branches"][number])
        before = sum(len(p.sites) for p in step.plans[:number])
        mine = range(before, before + len(step.plans[number].sites))

        def run(plain, taps):
            own = [taps[i] for i in mine]
            outs, ids = rerun(step.plans[number], jaxpr, consts, merge(plain), own)
            listed = iter(ids)
            # A branch that is not taken lists nothing.
            every = [next(listed) if i in mine else s.nothing() for i, s in sites]
            return whole(outs), [jnp.asarray(x, jnp.int32) for x in every]

        return run

    sites = list(enumerate(step.sites))
    branches = [branch(i) for i in range(len(step.plans))]
    return jax.lax.switch(index, branches, plain, list(taps))


def _scan(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    consts, carry = scan_split(eqn) or (0, 0)
    jaxpr, jaxpr_consts = open_jaxpr(eqn.params["jaxpr"])
    values = [v if k else w for v, k, w in zip(values, step.keep, whole(values), strict=True)]
    merge, changing = _split(values[consts : consts + carry], step.keep[consts : consts + carry])

    def body(changing, xs):
        xs, taps = xs
        args = [*values[:consts], *merge(changing), *xs]
        outs, ids = rerun(step.plans[0], jaxpr, jaxpr_consts, args, taps)
        _, changed = _split(outs[:carry], step.keep[consts : consts + carry])
        return changed, (whole(outs[carry:]), ids)

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    xs = (values[consts + carry :], list(taps))
    last, (ys, ids) = jax.lax.scan(body, changing, xs, **options)
    return [*merge(last), *ys], ids


def _while(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    values = [v if k else w for v, k, w in zip(values, step.keep, whole(values), strict=True)]
    first = in_cond + in_body
    merge, changing = _split(values[first:], step.keep[first:])
    (cond, cond_consts), (body, body_consts) = (
        open_jaxpr(eqn.params[k]) for k in ("cond_jaxpr", "body_jaxpr")
    )

    def going(changing):
        args = [*values[:in_cond], *merge(changing)]
        return rerun(step.plans[0], cond, cond_consts, args, [])[0][0]

    def round_(changing):
        args = [*values[in_cond:first], *merge(changing)]
        outs, _ = rerun(step.plans[1], body, body_consts, args, [])
        return _split(outs, step.keep[first:])[1]

    return merge(jax.lax.while_loop(going, round_, changing)), []


def _shard_map(eqn: JaxprEqn, step: Step, values: Values, taps: ManyTaps) -> Outs:
    p, (jaxpr, consts) = eqn.params, called_jaxpr(eqn)
    values = [v if k else w for v, k, w in zip(values, step.keep, whole(values), strict=True)]
    _, plain = _split(values, step.keep)
    axes = [site_axes(eqn, s) for s in step.plans[0].sites]
    by_site = [PartitionSpec(a or None) for a in axes]

    delayed, rebuilt = taken_apart([v for v, k in zip(values, step.keep, strict=True) if k])

    def run(delayed, plain, taps):  # each device sees its own [1, ...] of every tap
        own = [tuple(t[0] for t in tap) for tap in taps]
        left, kept = iter(plain), iter(rebuilt(delayed))
        args = [next(kept) if k else next(left) for k in step.keep]
        outs, ids = rerun(step.plans[0], jaxpr, consts, args, own)
        return whole(outs), [_varying(i, a)[None] for i, a in zip(ids, axes, strict=True)]

    in_specs = [s for s, k in zip(p["in_specs"], step.keep, strict=True) if not k]
    mapped = jax.shard_map(
        run,
        mesh=p["mesh"],
        in_specs=(PartitionSpec(), in_specs, by_site),
        out_specs=(list(p["out_specs"]), by_site),
        axis_names=set(manual_axes(eqn)),
        check_vma=p["check_vma"],
    )
    return mapped(delayed, plain, list(taps))


def _varying(ids: Array, axes: Sequence[str]) -> Array:
    """`ids`, typed as different on each device along `axes`."""
    for axis in axes:
        ids = ids + 0 * jax.lax.axis_index(axis).astype(ids.dtype)
    return ids


def _split(
    values: Sequence[Any], keep: Sequence[bool]
) -> tuple[Callable[[Sequence[Any]], list[Any]], list[Any]]:
    """Splits off the values not to keep: `(merge, rest)`, with `merge(rest)` the whole list."""
    rest = [v for v, k in zip(values, keep, strict=True) if not k]

    def merge(others: Sequence[Any]) -> list[Any]:
        left = iter(others)
        return [v if k else next(left) for v, k in zip(values, keep, strict=True)]

    return merge, rest


_STEPS: dict[str, Callable[..., Outs]] = {
    "row_op": _row_op,
    "same_rows": _same_rows,
    "done": _done,
    "checkpoint": _checkpoint,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}
