"""Everything this library knows about jaxprs that may change between versions of jax.

Nothing here carries a stability promise from jax, so it is kept in one place and each program of
`tests/differentiate/programs.py` is run on both ends of the supported range.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import get_opaque_trace_state as trace_state  # noqa: F401, for others
from jax.interpreters import partial_eval

# A message names the user's line, not one of this package.
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
source_info_util.register_exclusion(PACKAGE)

# Primitives, by name, that only call a jaxpr and can be inlined.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_lin"})
CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, consts)` of a closed or open jaxpr (from jax 0.11 on they are one class)."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def called_jaxpr(eqn: JaxprEqn) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that a call, checkpoint or custom rule runs forward."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return open_jaxpr(eqn.params[key])
    raise KeyError(f"{eqn.primitive.name} carries no jaxpr")


def scan_split(eqn: JaxprEqn) -> tuple[int, int] | None:
    """`(number of consts, number of carries)` of a scan; `None` where its layout is unknown."""
    params = eqn.params
    if "num_consts" in params and "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    try:
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def varying_axes(aval: Any) -> frozenset[str]:
    """The mesh axes over which a value inside `shard_map` differs between devices."""
    return frozenset(getattr(getattr(aval, "mat", None), "varying", ()) or ())


def same_varying(values: Sequence[Any]) -> list[Any]:
    """`values` typed alike inside `shard_map`: rows may differ between devices, a scale may not."""
    own = [varying_axes(jax.typeof(v)) if hasattr(v, "dtype") else frozenset() for v in values]
    every: frozenset[str] = frozenset().union(*own)
    return [
        jax.lax.pcast(v, tuple(sorted(every - axes)), to="varying") if every - axes else v
        for v, axes in zip(values, own, strict=True)
    ]


def manual_axes(eqn: JaxprEqn) -> tuple[str, ...]:
    """The mesh axes that a `shard_map` makes manual, in the order of the mesh."""
    names = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
    mesh_names = eqn.params["mesh"].axis_names
    return tuple(a for a in mesh_names if names is None or a in names)


def source_line(eqn: JaxprEqn) -> str:
    """`file.py:12 (function)`: the user's line that wrote an equation."""
    return source_info_util.summarize(eqn.source_info)


def transform_name(eqn: JaxprEqn) -> str:
    """The optax transform whose `update` wrote an equation: `scale_by_trust_ratio`."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    for frame in frames:  # innermost first
        outer, _, inner = getattr(frame, "function_name", "").partition(".<locals>.")
        if inner.startswith("update") and "optax" in frame.file_name:
            return outer
    return "the transform"


def bind(eqn: JaxprEqn, values: Sequence[Any], **changes: Any) -> list[Array]:
    """Runs one equation again, under the source line, name scope and context it was made in."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    info = eqn.source_info
    # An equation from outside of a `shard_map` that is run inside it is of the mesh there.
    moved_in = any(varying_axes(jax.typeof(v)) for v in values if hasattr(v, "dtype"))
    with (
        source_info_util.user_context(info.traceback, name_stack=info.name_stack),
        contextlib.nullcontext() if moved_in else eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def while_tracing() -> Iterator[None]:
    """Within it, operations on known numbers run at once, also where a function is traced.

    Such numbers are no data of the user's, whose transfers `jax.transfer_guard` may forbid.
    """
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def is_float(aval: Any) -> bool:
    """Whether a value of this type can carry a derivative."""
    return jnp.issubdtype(aval.dtype, jnp.inexact) if hasattr(aval, "dtype") else False


def as_jaxpr(fun: Any, *args: Any) -> tuple[Any, Sequence[Any]]:
    """Traces `fun` at `args` (arrays or ShapeDtypeStructs): `(jaxpr, consts)`."""
    return open_jaxpr(jax.make_jaxpr(fun)(*args))


def without_calls(program: tuple[Any, Sequence[Any]], *args: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, consts)` with the equations of functions that it only calls in their place.

    Args:
      program: `(jaxpr, consts)`.
      *args: a tree of its inputs.
    """

    def run(program: tuple[Any, Sequence[Any]], inputs: Sequence[Any]) -> list[Any]:
        jaxpr, consts = program
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            called = eqn.primitive.name in CALLS
            outs = run(called_jaxpr(eqn), values) if called else bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return as_jaxpr(lambda *args: run(program, jax.tree.leaves(args)), *args)


def used_inputs(jaxpr: Any) -> list[bool]:
    """For each input of an open jaxpr, whether some output depends on its value."""
    return list(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])
