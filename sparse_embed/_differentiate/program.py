"""A user's function as a program: traced once, and its tables found."""

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_embed._core import (
    CHECKPOINTS,
    PACKAGE,
    as_jaxpr,
    describe,
    is_float,
    message,
    path_name,
)
from sparse_embed._differentiate.plan import Plan, WholeUse
from sparse_embed._differentiate.tags import OF_LEAVES, Tag, leaf_tag
from sparse_embed._differentiate.walk import Walk

Tables = Callable[[tuple[Any, ...], Any], bool] | Any | None


@dataclass
class Program:
    """`fun` traced over the leaves of its differentiated arguments; all else is closed over."""

    jaxpr: Any
    consts: Sequence[Any]
    leaves: list[Any]  # values of the differentiated leaves
    paths: list[tuple[Any, ...]]  # their key paths
    names: list[str]  # as the user would write them: params['user']
    treedef: Any  # of the differentiated argument, or of the tuple of them
    output: Callable[[Sequence[Any]], Any]  # rebuilds what `fun` returned from the outputs

    def tags(self, tables: set[int]) -> list[Tag]:
        """The tag of each input: its own number where it is followed."""
        other = Tag(origin=OF_LEAVES)
        return [leaf_tag(k) if k in tables else other for k in range(len(self.leaves))]

    def at(self, tree: Any) -> "Program":
        """The same program, of other values of the differentiated argument."""
        return replace(self, leaves=jax.tree.leaves(tree))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the leaves."""
        return [jnp.shape(x) for x in self.leaves]


def trace(
    fun: Callable[..., Any], argnums: int | Sequence[int], args: tuple, kwargs: dict
) -> Program:
    """Traces `fun` at `args`.

    Args:
      fun: the user's function.
      argnums: the differentiated arguments.
      args: all positional arguments.
      kwargs: keyword arguments, never differentiated.

    Returns:
      The program. Leaves of the output that are not arrays are kept aside and put back.
    """
    several = not isinstance(argnums, int)
    numbers = tuple(argnums) if not isinstance(argnums, int) else (argnums,)
    numbers = tuple(n + len(args) if n < 0 else n for n in numbers)
    if not all(0 <= n < len(args) for n in numbers):
        raise ValueError(
            message(
                f"argnums={argnums!r}: there is no such positional argument.",
                f"{len(args)} positional arguments",
                "pass the parameters by position, or another argnums",
            )
        )
    chosen = tuple(args[n] for n in numbers)
    tree = chosen if several else chosen[0]
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    kept: dict[str, Any] = {}

    def flat(*leaves: Any) -> list[Any]:
        new = jax.tree.unflatten(treedef, leaves)
        full = list(args)
        for n, arg in zip(numbers, new if several else (new,), strict=True):
            full[n] = arg
        outs, kept["treedef"] = jax.tree.flatten(fun(*full, **kwargs))
        # Numbers of Python and numpy stay what they are in aux, as in JAX; the value is an array.
        arrays = [
            isinstance(x, jax.Array) or (i == 0 and isinstance(x, _NUMBERS))
            for i, x in enumerate(outs)
        ]
        kept["outs"] = [None if array else x for x, array in zip(outs, arrays, strict=True)]
        return [x for x, array in zip(outs, arrays, strict=True) if array]

    leaves = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for _, x in with_paths]
    jaxpr, consts = as_jaxpr(flat, *leaves)

    def output(arrays: Sequence[Any]) -> Any:
        left = iter(arrays)
        outs = [next(left) if x is None else x for x in kept["outs"]]
        return kept["treedef"].unflatten(outs)

    paths = [path for path, _ in with_paths]
    names = _names(fun, numbers, several, paths)
    return Program(jaxpr, consts, leaves, paths, names, treedef, output)


_NUMBERS = (int, float, complex, np.number, np.ndarray)


def _names(fun: Callable, numbers: Sequence[int], several: bool, paths: list[tuple]) -> list[str]:
    try:
        words = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        words = []
    roots = [words[n] if n < len(words) else f"args[{n}]" for n in numbers]
    if not several:
        return [path_name(path, roots[0]) for path in paths]
    return [path_name(path[1:], roots[path[0].idx]) for path in paths]


def find_tables(program: Program, tables: Tables, live: Sequence[bool]) -> tuple[set[int], Plan]:
    """Chooses the leaves whose gradient is row-sparse.

    Args:
      program: the traced function.
      tables: as in `value_and_grad`.
      live: for each output, whether it is differentiated.

    Returns:
      Their numbers, and the plan that reads them by row.

    Raises:
      ValueError: `tables` names a leaf that is used whole.
    """
    named = _named(program, tables)
    found = {
        k
        for k, leaf in enumerate(program.leaves)
        if getattr(leaf, "ndim", 0)
        and leaf.size
        and is_float(leaf)
        and (named is None or k in named)
    }
    told: set[int] = set()
    cut: frozenset[int] = frozenset()
    while True:
        walk = Walk(program.shapes, cut=cut)
        plan = walk.plan(program.jaxpr, program.tags(found), live)
        _report(program, walk, named is not None, told)
        kept = found - {use.leaf for use in walk.whole_uses}
        if named is None:  # constant slices are no lookups
            kept &= walk.looked_up.keys()
        if kept == found and walk.to_cut <= cut:
            return found, plan
        found, cut = kept, cut | walk.to_cut


def _named(program: Program, tables: Tables) -> set[int] | None:
    if tables is None:
        return None
    if callable(tables):
        flags = [
            tables(path, leaf) for path, leaf in zip(program.paths, program.leaves, strict=True)
        ]
    else:
        flags, treedef = jax.tree.flatten(tables)
        if treedef != program.treedef:
            raise ValueError(
                message(
                    "tables=: the tree of bools must be like the differentiated argument.",
                    f"{treedef}, but the argument is {program.treedef}",
                    "tables=lambda path, leaf: 'embed' in jax.tree_util.keystr(path)",
                )
            )
    return {k for k, flag in enumerate(flags) if flag}


def _report(program: Program, walk: Walk, strict: bool, told: set[int]) -> None:
    """One warning, or error, for each table that is also used whole and was not `told`."""
    for use in walk.whole_uses:
        if use.leaf in told or not (strict or use.leaf in walk.looked_up):
            continue
        told.add(use.leaf)
        text = _whole_use_text(program, use, strict)
        if strict:
            raise ValueError(text)
        warnings.warn(text, UserWarning, stacklevel=_user_level())


_LIBRARIES = (PACKAGE, os.path.dirname(jax.__file__) + os.sep)


def _user_level() -> int:
    """The `stacklevel` at which `_report` meets the first call outside this package and jax."""
    frames = traceback.walk_stack(sys._getframe(1))
    files = (frame.f_code.co_filename for frame, _ in frames)
    return next((n for n, file in enumerate(files, 1) if not file.startswith(_LIBRARIES)), 1)


_ADVICE = {
    "custom_jvp_call": "apply it to the rows, after the lookup: f(table[ids])",
    "custom_vjp_call": "pass rows, not the table, to the custom rule: f(table[ids])",
    "dot_general": "a matrix product with all rows needs the dense gradient; sample rows instead",
    "gather": "all reads of it along the same axes, of table.reshape(-1, num_features) say",
    "scan": "the table as it is in the body, table[number, ids] with the number of the round",
    "while": "jax.lax.scan, or fori_loop with constant bounds, around the lookup",
}


def _whole_use_text(program: Program, use: WholeUse, strict: bool) -> str:
    leaf, name = program.leaves[use.leaf], program.names[use.leaf]
    operation = "checkpoint" if use.primitive in CHECKPOINTS else use.primitive
    return message(
        f"the gradient of {name} is dense: `{operation}` needs the whole table.",
        f"{name} {describe(leaf)}, used at {use.line}",
        _ADVICE.get(use.primitive, "the operation on rows, after the lookup: f(table[ids])")
        + (
            "; or this leaf left out of tables="
            if strict
            else "; or tables= to choose the leaves (any other leaf is dense without a word)"
        ),
    )
