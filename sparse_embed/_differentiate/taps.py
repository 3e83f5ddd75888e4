"""Value and gradient, with what each table's gradient lists left as the sites list it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Listed, Part
from sparse_embed._core import is_concrete, is_float, message, tuning, varying_axes
from sparse_embed._differentiate.delayed import Leaf, whole
from sparse_embed._differentiate.plan import Plan, Site
from sparse_embed._differentiate.program import Program, Tables, find_tables
from sparse_embed._differentiate.read import Taps
from sparse_embed._differentiate.rerun import rerun


def value_and_listed(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    *,
    tables: Tables = None,
    lay_out: bool = False,
) -> Callable[..., tuple[Any, Any, list[Array]]]:
    """As `value_and_grad`, with a `Listed` for each table: repeats are not summed yet.

    The function made takes what `fun` was traced to before its arguments. It also returns the
    largest arrays that it lays out: gradients of rows and, with `lay_out`, the rows themselves.
    """

    def value_and_listed_fun(program: Program, *args: Any, **kwargs: Any) -> Any:
        first = _check_like_jax(fun, argnums, has_aux, program, args, kwargs)
        live = [i == first for i in range(len(program.jaxpr.outvars))]
        found, plan = find_tables(program, tables, live)
        outs, grads, laid_out = _differentiate(program, plan, found, first, lay_out)
        return program.output(outs), program.treedef.unflatten(grads), laid_out

    return value_and_listed_fun


def is_listed(x: Any) -> bool:
    """`isinstance(x, Listed)`, to be given to `jax.tree.map(..., is_leaf=)`."""
    return isinstance(x, Listed)


def _check_like_jax(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    program: Program,
    args: Any,
    kwargs: Any,
) -> int:
    """The number of the output to differentiate; raises what JAX raises where there is none."""
    skeleton = program.output(list(range(len(program.jaxpr.outvars))))
    value = skeleton
    if has_aux and isinstance(skeleton, tuple) and len(skeleton) == 2:
        value = skeleton[0]
    scalar = isinstance(value, int) and program.jaxpr.outvars[value].aval.shape == ()
    good_aux = value is not skeleton or not has_aux
    if not (scalar and good_aux and all(map(_is_float_leaf, program.leaves))):
        numbers = [argnums] if isinstance(argnums, int) else list(argnums)

        def as_jax(*chosen: Any) -> Any:
            full = list(args)
            for n, arg in zip(numbers, chosen, strict=True):
                full[n] = arg
            return jax.value_and_grad(fun, argnums, has_aux)(*full, **kwargs)

        jax.eval_shape(as_jax, *(args[n] for n in numbers))
    return value


def _is_float_leaf(leaf: Any) -> bool:
    return isinstance(leaf, float) or is_float(leaf)


def _differentiate(
    program: Program, plan: Plan, tables: set[int], first: int, lay_out: bool
) -> tuple[list[Array], list[Any], list[Array]]:
    """All outputs of the program, a gradient for each leaf, and large arrays on the way."""
    leaves = program.leaves

    def run(dense: dict[int, Array], taps: list[Taps]) -> tuple[Array, Any]:
        args = [Leaf(k, x) if k in tables else dense[k] for k, x in enumerate(leaves)]
        laid_out: list[Array] | None = [] if lay_out else None
        outs, ids = rerun(plan, program.jaxpr, program.consts, args, taps, laid_out)
        outs = whole(outs)
        return outs[first], (outs, ids, laid_out or [])

    _check_devices(program, plan)
    dense = {k: x for k, x in enumerate(leaves) if k not in tables}
    taps = [tuple(_tap(site, leaves[k]) for k in site.leaves) for site in plan.sites]
    (value, (outs, ids, read)), (grads, tap_grads) = jax.value_and_grad(
        run, argnums=(0, 1), has_aux=True
    )(dense, taps)
    outs[first] = value
    gradients: list[Array] = []
    for k in tables:
        parts = [
            _part(site, listed, tap[site.leaves.index(k)], site.form(leaves[k]).features)
            for site, listed, tap in zip(plan.sites, ids, tap_grads, strict=True)
            if k in site.leaves
        ]
        forms = [site.form(leaves[k]) for site in plan.sites if k in site.leaves]
        grads[k] = Listed(parts, forms[0] if forms else leaves[k].shape, leaves[k].dtype)
        gradients += [part.rows for part in parts]
    if tables and not is_concrete(*outs):
        _tie([*outs, *read], grads)
    large = [x for x in (*read, *gradients) if tuning.keeps(x)]
    return outs, [grads[k] for k in range(len(leaves))], large


def _check_devices(program: Program, plan: Plan) -> None:
    """Inside `shard_map` JAX sums the gradient of a replicated leaf over devices; rows differ."""
    for site in plan.sites:
        for k in site.leaves:
            axes = set(site.axes) - varying_axes(jax.typeof(program.leaves[k]))
            if axes:
                raise ValueError(
                    message(
                        "se.value_and_grad inside shard_map: each device lists rows of its own.",
                        f"{program.names[k]}, replicated over mesh axes {sorted(axes)}, read at "
                        f"{site.line}",
                        "se.value_and_grad(lambda params, batch: jax.shard_map(loss_fn, ...)"
                        "(params, batch)), with the shard_map inside the loss",
                    )
                )


def _tap(site: Site, table: Array) -> Array:
    minus_zero = -0.0 if jnp.issubdtype(table.dtype, jnp.floating) else complex(-0.0, -0.0)
    shape = *site.tap_shape, *site.form(table).features
    return jnp.full(shape, minus_zero, table.dtype)


def _part(site: Site, ids: Array, rows: Array, features: tuple[int, ...]) -> Part:
    """What one site lists, flat."""
    ids = site.lines(ids)
    return Part(ids, rows.reshape(ids.shape[1], *features))


def _tie(outs: list[Array], grads: dict[int, Any]) -> None:
    """Makes the indices of all row-sparse gradients wait for every output.

    XLA updates a table in place only if each read of the old table comes before the write, by data
    dependence. A read that only feeds the value or aux is made to come first by adding, to the
    indices, a zero made of that output: no number is both above one and below zero. (An
    `optimization_barrier` says the same, but jaxlib 0.10.2 drops it too early on CPU.)
    """
    never = jnp.zeros((), bool)
    for x in outs:
        if x.size and not jnp.issubdtype(x.dtype, jax.dtypes.extended):  # no random keys
            number = jnp.real(x.reshape(-1)[0]).astype(jnp.float32)
            never |= (number > 1) & (number < 0)
    for k, g in grads.items():
        if is_listed(g):
            grads[k] = g.after(never)
