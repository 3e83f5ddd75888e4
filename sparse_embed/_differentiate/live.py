"""Which values of a program the derivative of its output can reach."""

from collections.abc import Sequence
from typing import Any

from sparse_embed._core import (
    CALLS,
    CHECKPOINTS,
    JaxprEqn,
    Literal,
    called_jaxpr,
    is_float,
    open_jaxpr,
    scan_split,
)


def live_vars(jaxpr: Any, live_out: Sequence[bool]) -> set[Any]:
    """Variables that a derivative of the live outputs flows back to.

    A derivative stops at integers and at `stop_gradient`.

    Args:
      jaxpr: an open jaxpr.
      live_out: for each of its outputs, whether it is differentiated.

    Returns:
      The live variables of this jaxpr (not of those inside its equations).
    """
    live: set[Any] = set()

    def mark(variables: Sequence[Any], flags: Sequence[bool]) -> None:
        for v, flag in zip(variables, flags, strict=True):
            if flag and not isinstance(v, Literal) and is_float(v.aval):
                live.add(v)

    mark(jaxpr.outvars, live_out)
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs):
            mark(eqn.invars, live_operands(eqn, outs))
    return live


def live_inputs(jaxpr: Any, live_out: Sequence[bool]) -> list[bool]:
    """For each input of a jaxpr, whether a derivative of the live outputs flows back to it."""
    live = live_vars(jaxpr, live_out)
    return [v in live for v in jaxpr.invars]


def live_carry(jaxpr: Any, skip: int, carry: int, live_out: Sequence[bool]) -> list[bool]:
    """Live outputs of a loop body: those of its last round, and what later rounds ask for.

    Args:
      jaxpr: the body, with `skip` constants before its `carry` carried inputs.
      skip: number of constants.
      carry: number of carried values.
      live_out: for each output of the loop, whether it is differentiated.

    Returns:
      For each output of the body, whether it is differentiated in some round.
    """
    flags = list(live_out)
    while True:
        asked = live_inputs(jaxpr, flags)[skip : skip + carry]
        grown = [a or b for a, b in zip(flags[:carry], asked, strict=True)] + flags[carry:]
        if grown == flags:
            return flags
        flags = grown


def live_operands(eqn: JaxprEqn, live_out: Sequence[bool]) -> list[bool]:
    """For each operand of an equation, whether a derivative of the live outputs reaches it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False] * len(eqn.invars)
    if name in CALLS or name in CHECKPOINTS or name == "shard_map":
        return live_inputs(called_jaxpr(eqn)[0], live_out)
    if name == "cond":
        branches = [live_inputs(open_jaxpr(b)[0], live_out) for b in params["branches"]]
        return [False] + [any(flags) for flags in zip(*branches, strict=True)]
    if name == "scan" and (split := scan_split(eqn)):
        body, _ = open_jaxpr(params["jaxpr"])
        return live_inputs(body, live_carry(body, *split, live_out))
    if name == "while":
        body, _ = open_jaxpr(params["body_jaxpr"])
        in_cond, in_body = params["cond_nconsts"], params["body_nconsts"]
        flags = live_carry(body, in_body, len(live_out), live_out)
        inputs = live_inputs(body, flags)
        return [False] * in_cond + inputs[:in_body] + flags
    return [True] * len(eqn.invars)


def only_uses(jaxpr: Any) -> dict[Any, int]:
    """The values that are used once, with the number of the equation that does so.

    For one that is output i and nothing else, the number is `-1 - i`.
    """
    uses: dict[Any, list[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, Literal):
                uses.setdefault(v, []).append(number)
    for i, v in enumerate(jaxpr.outvars):
        if not isinstance(v, Literal):
            uses.setdefault(v, []).append(-1 - i)
    return {v: numbers[0] for v, numbers in uses.items() if len(numbers) == 1}
