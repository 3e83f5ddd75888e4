"""`touched` and `check_ids`: the rows a function reads, and whether they exist."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify

from sparse_embed._container import PADDED, distinct, flat_indices
from sparse_embed._core import argument_numbers, check_function, describe, message
from sparse_embed._differentiate.delayed import Leaf
from sparse_embed._differentiate.plan import Plan, Site
from sparse_embed._differentiate.program import Program, trace
from sparse_embed._differentiate.rerun import rerun
from sparse_embed._differentiate.walk import Walk


def touched(fun: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """Every row that `fun` reads, those under `stop_gradient` included.

    Args:
      fun: any function of arrays; what it returns is not looked at.
      argnums: which positional arguments to follow.

    Returns:
      A function of the same arguments that returns a tree like the argument, with the ascending
      distinct `[n]` int32 indices of the rows read (padded with values `>= num_rows`) for each leaf
      that is read only by row, and `None` for every other leaf.

    Raises:
      TypeError: `fun` is no function, or `argnums` no argument numbers.
      ValueError: when called, where rows are read inside a `while_loop`.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> f = lambda p, ids: p["a"][ids].sum() + p["b"].sum()
      >>> rows = se.touched(f)({"a": jnp.ones((9, 2)), "b": jnp.ones(3)}, jnp.array([4, 1, 4]))
      >>> rows["a"].tolist(), rows["b"]
      ([1, 4, 9], None)
    """

    check_function(fun, "se.touched(fun)", "se.touched(loss_fn)(params, batch)")
    argnums = argument_numbers(argnums, "se.touched(fun, argnums)")

    def touched_fun(*args: Any, **kwargs: Any) -> Any:
        return distinct_rows(reads_of(trace(fun, argnums, args, kwargs)))

    return touched_fun


class Reads(NamedTuple):
    """All ids at which a function reads rows of one leaf."""

    ids: list[Array]  # of each site, as in `Part.ids`
    num_rows: int

    @property
    def indices(self) -> Array:
        """`[n]` as of `flat_indices`, site after site."""
        return flat_indices(jnp.concatenate([x.reshape(-1) for x in self.ids]), self.num_rows)


def reads_of(program: Program) -> Any:
    """As `touched` of a traced function, with `Reads` in place of distinct indices."""
    found: list[Reads | None] = [None] * len(program.leaves)
    for leaf, read in _reads(program, "read").items():
        found[leaf] = Reads([site.lines(i) for site, i in read], read[0][0].num_rows)
    return program.treedef.unflatten(found)


def is_reads(x: Any) -> bool:
    """`isinstance(x, Reads)`, to be given to `jax.tree.map(..., is_leaf=)`."""
    return isinstance(x, Reads)


def distinct_rows(found: Any) -> Any:
    """A tree of `Reads` as one of distinct indices."""
    return jax.tree.map(_distinct, found, is_leaf=is_reads)


def _distinct(read: Reads) -> Array:
    ids = read.indices
    return distinct(ids, read.num_rows, min(ids.size, read.num_rows)).indices


def check_ids(fun: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., None]:
    """Checks that every id `fun` looks up is a row of its table.

    Opt-in: the lookups themselves follow the policy of their mode. Called outside `jit` it raises
    at once; inside `jit` it is to be functionalised by `jax.experimental.checkify.checkify`.

    Args:
      fun: any function of arrays, such as the loss.
      argnums: which positional arguments hold the tables.

    Returns:
      A function of the same arguments that returns nothing. It looks at the ids of every table
      `[V, *features]` before they are clipped or filled.

    Raises:
      jax.experimental.checkify.JaxRuntimeError: an id is out of range. The message names the id,
        the table and the line of the lookup.
      TypeError: `fun` is no function, or `argnums` no argument numbers.
      ValueError: rows are read inside a `while_loop`.

    Example:
      >>> import jax.numpy as jnp, sparse_embed as se
      >>> from jax.experimental import checkify
      >>> check = se.check_ids(lambda params, ids: params["user"][ids].sum())
      >>> err, _ = checkify.checkify(check)({"user": jnp.ones((6, 2))}, jnp.array([1, 9]))
      >>> err.get().split(",")[0]
      "id 9 is out of range for params['user'] float32[6"
    """

    check_function(fun, "se.check_ids(fun)", "se.check_ids(loss_fn)(params, batch)")
    argnums = argument_numbers(argnums, "se.check_ids(fun, argnums)")

    def check_fun(*args: Any, **kwargs: Any) -> None:
        program = trace(fun, argnums, args, kwargs)
        for leaf, read in _reads(program, "asked").items():
            for site, ids in read:
                _check(ids.reshape(-1), program, leaf, site)

    return check_fun


def _check(ids: Array, program: Program, leaf: int, site: Site) -> None:
    if not ids.size:
        return
    text = f"{program.names[leaf]} {describe(program.leaves[leaf])}, looked up at {site.line}"
    bad = ((ids < 0) | (ids >= site.read.num_rows)) & (ids != PADDED)
    checkify.check(
        ~jnp.any(bad),
        "id {id} is out of range for " + text.replace("{", "{{").replace("}", "}}"),
        id=ids[jnp.argmax(bad)],
    )


def _reads(
    program: Program, lists: Literal["read", "asked"]
) -> dict[int, list[tuple[Site, Array]]]:
    """For each leaf that is read only by row: its sites and their ids."""
    leaves = program.leaves
    found = {k for k, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0) and leaf.size}
    cut: frozenset[int] = frozenset()
    while True:
        walk = Walk(program.shapes, lists, cut)
        plan = walk.plan(program.jaxpr, program.tags(found), [True] * len(program.jaxpr.outvars))
        if walk.in_while and lists == "read":
            names = [program.names[k] for k in sorted(walk.in_while)]
            raise ValueError(
                message(
                    "se.touched(fun): rows are read inside a while_loop, so they cannot be listed.",
                    ", ".join(names),
                    "jax.lax.scan, or fori_loop with constant bounds, around the lookup",
                )
            )
        returned = frozenset().union(*(t.read for t in plan.out_tags))
        kept = found & walk.looked_up.keys() - {u.leaf for u in walk.whole_uses} - returned
        if kept == found and walk.to_cut <= cut:
            break
        found, cut = kept, cut | walk.to_cut
    reads: dict[int, list[tuple[Site, Array]]] = {k: [] for k in sorted(found)}
    for site, ids in _ids(program, plan, found):
        for leaf in site.leaves:
            reads[leaf].append((site, ids))
    return reads


def _ids(program: Program, plan: Plan, found: set[int]) -> Iterator[tuple[Site, Array]]:
    args = [Leaf(k, x) if k in found else x for k, x in enumerate(program.leaves)]
    _, ids = rerun(plan, program.jaxpr, program.consts, args, [()] * len(plan.sites))
    return zip(plan.sites, ids, strict=True)
