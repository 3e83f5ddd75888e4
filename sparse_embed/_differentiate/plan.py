"""What the walk finds out and the rerun follows: sites, steps, plans."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_embed._container import Form, widened
from sparse_embed._core import Axes, JaxprEqn, manual_axes
from sparse_embed._differentiate.tags import Path, Tag
from sparse_embed._views import RowRead


@dataclass(frozen=True)
class Site:
    """One row read whose ids leave the program, and whose taps come in.

    Args:
      read: the read.
      leaves: the leaves whose rows are listed here.
      lists: which of its `Ids` leave the program; with "listed" there is a tap for each leaf.
      line: the user's line.
      shape: shape of the ids as seen from the plan that holds the site: `[*outer, *lead]`, with
        one outer axis for each `scan` and `shard_map` in between.
      axes: mesh axes over which the ids differ between devices.
      path: the views between the read and the leaves.
      row_axes: the axes of the leaves along which their rows run, in the order of the ids.
      sizes: how many there are along each.
      bag: the axis of the ids, counted from the last, over which the program adds the rows up
        right away; `None` if it does not. The taps are then those of the sums.
    """

    read: RowRead
    leaves: tuple[int, ...]
    lists: str
    line: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    path: Path = ()
    row_axes: Axes = (0,)
    sizes: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return prod(self.sizes)

    def form(self, leaf: Array) -> Form:
        """How the rows of a leaf lie in it."""
        return Form(leaf.shape, tuple(sorted(self.row_axes)))

    def flat(self, ids: Sequence[Array]) -> Array:
        """Row numbers of the leaves, of ids along each of `row_axes`."""
        order = sorted(range(len(ids)), key=lambda j: self.row_axes[j])
        number = widened(ids[order[0]])
        for j in order[1:]:
            number = number * self.sizes[j] + ids[j]
        return number

    bag: int | None = None

    def lines(self, ids: Array) -> Array:
        """Its ids as `[l, b]`: a line for each place in a bag, one line where there is none."""
        if self.bag is None:
            return ids.reshape(1, -1)
        ids = jnp.moveaxis(ids, self.bag, 0)
        return ids.reshape(ids.shape[0], -1)

    @property
    def tap_shape(self) -> tuple[int, ...]:
        """`shape`, without the axis that is summed."""
        if self.bag is None:
            return self.shape
        axis = len(self.shape) + self.bag
        return self.shape[:axis] + self.shape[axis + 1 :]

    def nothing(self) -> Array:
        """Ids, where the read does not happen."""
        return jnp.full(self.shape, 0 if self.lists == "asked" else self.num_rows, jnp.int32)

    def under(self, length: int, axes: tuple[str, ...]) -> "Site":
        """The same site, seen from outside an axis of `length`."""
        return replace(self, shape=(length, *self.shape), axes=axes)


@dataclass
class Step:
    """What the rerun does at one equation.

    Args:
      kind: what happens, by name.
      plans: plans of the jaxprs inside the equation.
      sites: the sites inside, as seen from outside the equation.
      keep: for each operand, whether it stays delayed when those jaxprs are entered.
      read: for a row read, how it reads.
      visit: for what is delayed, the number that paths know it by.
    """

    kind: str
    plans: tuple["Plan", ...] = ()
    sites: list[Site] = field(default_factory=list)
    keep: tuple[bool, ...] = ()
    read: RowRead | None = None
    visit: int = -1

    @property
    def bag(self) -> int | None:
        """For a row read: the axis over which its rows are added up in the same step."""
        return self.sites[0].bag if self.kind == "read" and self.sites else None

    @property
    def summed(self) -> set[int]:
        """Outputs that are rows already added up."""
        if self.kind == "call":
            return self.plans[0].summed
        return {0} if self.bag is not None else set()


@dataclass
class Plan:
    """The steps of one jaxpr, by equation number, and its sites in the order of the steps.

    `summed`: outputs that are rows already added up, as the equation outside would do.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    out_tags: list[Tag] = field(default_factory=list)
    summed: set[int] = field(default_factory=set)


class WholeUse(NamedTuple):
    """A differentiated use of a leaf that is not a row read."""

    leaf: int
    primitive: str
    line: str


def site_axes(eqn: JaxprEqn, site: Site) -> tuple[str, ...]:
    """The axes of a `shard_map` along which the ids of a site inside are laid out."""
    manual = manual_axes(eqn)
    if not eqn.params.get("check_vma", False):
        return manual
    return tuple(a for a in manual if a in site.axes)
