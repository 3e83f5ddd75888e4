"""`audit` and `assert_row_sparse`: whether a compiled step leaves its tables in place."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from sparse_embed._audit import hlo
from sparse_embed._audit.report import ArrayReport, AuditReport, OperationReport
from sparse_embed._container import Form
from sparse_embed._core import PACKAGE, check_function, describe, message
from sparse_embed._differentiate import Program, Walk, trace

# Instructions that only name a buffer that is there already.
_NAMES = frozenset("parameter bitcast get-tuple-element tuple while conditional call".split())
_OURS = (PACKAGE, *(os.path.dirname(m.__file__) + os.sep for m in (jax, optax) if m.__file__))


def audit(step: Callable[..., Any], *args: Any) -> AuditReport:
    """Compiles a step and reports what it does with its tables.

    A table is a leaf of the first argument that the step reads by row. An array is table-sized if
    it has as many entries as a table, or an axis as long as a table has rows: the table itself, a
    moment of its optimizer, a dense gradient, the norms of all rows.

    Args:
      step: `step(params, opt_state, *args)`, such as `se.train_step` returns, or any function,
        jitted (with its donation) or not.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do.

    Returns:
      An `AuditReport`.

    Raises:
      TypeError: `step` is no function, or its arguments are left out.
      ValueError: the step reads no table by row.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.lazy(optax.adam(0.1))
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> report = se.audit(step, params, tx.init(params), jnp.array([3, 8]))
      >>> report.ok, [a.status for a in report.arrays]
      (True, ['in place', 'in place', 'in place'])
    """
    check_function(step, "se.audit(step, params, ...)", "se.audit(step, params, opt_state, batch)")
    if not args:
        raise TypeError(
            message(
                "se.audit(step, params, ...): the arguments of the step are left out.",
                "a step alone",
                "se.audit(step, params, opt_state, batch)",
            )
        )
    tables, skipped = _tables(trace(step, _array_args(args), args, {}))
    if not tables and not skipped:
        raise ValueError(
            message(
                "se.audit(step, params, ...): step reads no leaf of its first argument by row.",
                ", ".join(describe(x) for x in jax.tree.leaves(args[0])) or "no arrays",
                "se.audit(step, params, opt_state, batch) with the step that looks rows up",
            )
        )
    lowered = step.lower(*args) if hasattr(step, "lower") else jax.jit(step).lower(*args)
    compiled = lowered.compile()
    program = hlo.parse(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    return AuditReport(
        arrays=_arrays(program, tables),
        operations=_operations(program, tables),
        temp_bytes=memory.temp_size_in_bytes if memory is not None else -1,
        skipped=skipped,
    )


def assert_row_sparse(step: Callable[..., Any], *args: Any) -> None:
    """Raises unless a step leaves all of its tables in place.

    Args:
      step: as in `audit`.
      *args: as in `audit`.

    Raises:
      AssertionError: an array is copied, or an operation makes a table-sized one, with the report;
        or every table has no more rows than the step looks up, so that nothing can be told.
      TypeError: as `audit`.
      ValueError: as `audit`.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> tx = se.lazy(optax.adam(0.1))
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> se.assert_row_sparse(step, params, tx.init(params), jnp.array([3, 8]))
    """
    report = audit(step, *args)
    if report.skipped and not report.arrays:
        raise AssertionError(
            message(
                "se.assert_row_sparse(step, ...): nothing can be told of this step, since all of "
                "its tables have no more rows than it looks up.",
                ", ".join(report.skipped),
                "the same with taller tables, or fewer ids",
            )
        )
    if not report.ok:
        raise AssertionError(f"se.assert_row_sparse(step, ...): the step is not.\n{report}")


def _array_args(args: Sequence[Any]) -> tuple[int, ...]:
    """Which arguments are trees of arrays; the others keep their values."""
    return tuple(
        i
        for i, arg in enumerate(args)
        if i == 0 or all(hasattr(x, "dtype") for x in jax.tree.leaves(arg))
    )


def _tables(program: Program) -> tuple[set[Form], list[str]]:
    """The forms of the tables, and the names of those too small to be told from their rows."""
    leaves = program.leaves
    found = {
        k
        for k, path in enumerate(program.paths)
        if path[0].idx == 0 and getattr(leaves[k], "ndim", 0)
    }
    walk = Walk(program.shapes, "asked")
    walk.plan(program.jaxpr, program.tags(found), [True] * len(program.jaxpr.outvars))
    forms, skipped = set(), []
    for k, asked in sorted(walk.looked_up.items()):
        form = Form(leaves[k].shape, walk.row_axes.get(k) or walk.hidden_axes.get(k, (0,)))
        if form.num_rows > asked:
            forms.add(form)
        else:
            skipped.append(f"{program.names[k]} {describe(leaves[k])}")
    return forms, skipped


def _is_table_sized(shape: tuple[int, ...] | None, tables: set[Form]) -> bool:
    if not shape or 0 in shape:
        return False
    return any(
        table.num_rows in shape
        or max(table.sizes) in shape
        or math.prod(shape) == math.prod(table.shape)
        for table in tables
    )


def _arrays(program: hlo.Program, tables: set[Form]) -> list[ArrayReport]:
    entry = program.computations[program.entry]
    reports = []
    for i in entry.instructions.values():
        if i.op != "parameter" or not _is_table_sized(i.shape, tables):
            continue
        copies, users = _users(program, i)
        aliased = i.number in program.aliased
        if copies and not aliased:
            status, reason = "copied", "it is not donated: jax.jit(step, donate_argnums=(0, 1))"
        elif copies:
            lines = ", ".join(sorted({_line(program, u) for u in users} - {""})) or "?"
            status, reason = (
                "copied",
                f"not every read of its old values ({lines}) feeds the update",
            )
        else:
            status, reason = ("in place" if aliased else "read only"), ""
        reports.append(ArrayReport(i.op_name or i.name, _describe(i), status, reason))
    return reports


def _users(
    program: hlo.Program, array: hlo.Instruction
) -> tuple[list[hlo.Instruction], list[hlo.Instruction]]:
    """The copies made of an argument, and whatever else reads it or a copy."""
    entry = program.computations[program.entry]
    names, copies, users = {array.name}, [], []
    for u in entry.instructions.values():
        if names.isdisjoint(u.operands):
            continue
        if u.op.startswith("copy"):
            names.add(u.name)
            copies.append(u)
        elif u.op not in _NAMES and not _in_place(program, entry, u):
            users.append(u)
    return copies, users


def _operations(program: hlo.Program, tables: set[Form]) -> list[OperationReport]:
    arguments = list(program.computations[program.entry].instructions.values())
    found = []
    for computation in program.buffered():
        for i in computation.instructions.values():
            if (
                not _is_table_sized(i.shape, tables)
                or i.op in _NAMES | {"constant"}  # made once, when the step is compiled
                or _in_place(program, computation, i)
            ):
                continue
            source: hlo.Instruction | None = i
            while source is not None and source.op.startswith(("copy", "bitcast")):
                source = computation.instructions.get(source.operands[0])
            if source is not i and source in arguments and source.op == "parameter":
                continue  # told of as the array that is copied
            name = f"{i.op} ({i.op_name})" if i.op_name else i.op
            found.append(OperationReport(name, _describe(i), _line(program, i) or "?"))
    return found


def _in_place(program: hlo.Program, computation: hlo.Computation, i: hlo.Instruction) -> bool:
    """Whether an instruction writes some rows into the buffer of its first operand.

    XLA gives a scatter the buffer of its operand, and puts a copy before it where it may not.
    """
    if i.op == "fusion" and i.called:
        fused = program.computations[i.called[0]]
        inner: hlo.Instruction | None = fused.root
        while inner is not None and inner.op == "bitcast":
            inner = fused.instructions.get(inner.operands[0])
        if inner is None or inner.op not in ("scatter", "dynamic-update-slice"):
            return False
        target = fused.instructions.get(inner.operands[0])
        if target is None or target.number is None:
            return False
        source = computation.instructions.get(i.operands[target.number])
    elif i.op in ("scatter", "dynamic-update-slice"):
        source = computation.instructions.get(i.operands[0])
    else:
        return False
    return source is not None and source.shape == i.shape


def _describe(i: hlo.Instruction) -> str:
    return f"{i.dtype}[{','.join(map(str, i.shape or ()))}]"


def _line(program: hlo.Program, i: hlo.Instruction) -> str:
    frames = [i.frame]
    for name in i.called:  # a fusion may have no line of its own
        frames += [inner.frame for inner in program.computations[name].instructions.values()]
    lines = (program.line(frame, _is_users) for frame in frames if frame is not None)
    return next((line for line in lines if line), "")


def _is_users(file: str) -> bool:
    return not os.path.abspath(file).startswith(_OURS)
