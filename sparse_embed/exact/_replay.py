"""`replay`: any row-separable optimizer, exactly, by making the steps that rows missed."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_embed._core import describe, message, path_name, while_tracing
from sparse_embed._update import StateLayout, check_state, state_layout
from sparse_embed.exact._ledger import Constant, Counts, Ledger
from sparse_embed.exact._optimizer import Exact
from sparse_embed.exact._rest_step import Program, RestStep, program_of
from sparse_embed.exact._table import Block, Table
from sparse_embed.exact._transform import ExactTransformation, transformation


def replay(inner: optax.GradientTransformation) -> ExactTransformation:
    """Any row-separable optax transformation, exactly: missed steps are made up one by one.

    Before it is read, a row that missed n steps gets n updates of `inner` with the gradient zero,
    at the counts of those steps. That is the dense optimizer's own arithmetic, at the cost of the
    longest gap times the rows of a block: for where there is no closed form, or gaps are short.

    Args:
      inner: the dense optimizer. What moves a row without a gradient must be that row, its state,
        and counts that go up by one each step.

    Returns:
      The transformation, with `settle`. Beside the dense state it keeps `[num_rows]` last steps.

    Raises:
      TypeError: `inner` is not an optax transformation.
      ValueError: at `init`, where `inner` needs the whole matrix, or where a row without a
        gradient depends on anything else, such as the loss or gradients of other rows.

    Example:
      >>> import jax.numpy as jnp, optax, sparse_embed as se
      >>> tx = se.exact.replay(optax.adan(0.1))
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> step = se.train_step(lambda p, ids: p["table"][ids].sum(), tx)
      >>> params, opt_state, _ = step(params, tx.init(params), jnp.array([3]))
      >>> params, opt_state, loss = step(params, opt_state, jnp.array([8]))
      >>> params, opt_state = tx.settle(params, opt_state)
      >>> params["table"][3, 0].item() < 0.9
      True
    """
    if not callable(getattr(inner, "update", None)) or hasattr(inner, "settle"):
        raise TypeError(
            message(
                "se.exact.replay(inner): inner must be an optax transformation.",
                describe(inner),
                "se.exact.replay(optax.adan(1e-3))",
            )
        )
    return transformation(Replay(optax.with_extra_args_support(inner)))


@dataclass(frozen=True)
class Replay(Exact):
    """`dense`, with missed steps made up one by one."""

    dense: optax.GradientTransformationExtraArgs
    on_rows: dict[Any, list[int]] = field(default_factory=dict, compare=False)  # kept: it is slow

    @property
    def inner(self) -> optax.GradientTransformation:
        return self.dense

    def tables(self, params: Any, inner_state: Any, step: Array) -> dict[int, Table]:
        with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
        layout = self._layout(params)
        state = check_state(layout, inner_state)
        leaves = [leaf for _, leaf in with_paths]
        program = program_of(self.dense, params, layout)
        none = Ledger(Constant(0.0), None, False, (), jnp.float32)
        counts = Counts(step, step, step)
        found = {}
        for k in self._rows_of(program, leaves, layout):
            own = RestStep(program, leaves, layout, state, k)
            catch_up, ahead = partial(_catch_up, own), cache(partial(_ahead, own))
            name = path_name(with_paths[k][0])
            found[k] = Table(name, catch_up, catch_up, none, ahead, step, counts)
        return found

    def held(self, params: Any, inner_state: Any) -> list[dict[str, Array]]:
        layout = self._layout(params)
        state = check_state(layout, inner_state)
        return [
            {str(i): state[i] for i, table in enumerate(layout.table) if table == k}
            for k in range(len(jax.tree.leaves(params)))
        ]

    def with_held(self, params: Any, inner_state: Any, held: list[dict[str, Array]]) -> Any:
        layout = self._layout(params)
        state = check_state(layout, inner_state)
        for own in held:
            for i, rows in own.items():
                state[int(i)] = rows
        return layout.treedef.unflatten(state)

    def check(self, params: Any) -> None:
        """Rows without a gradient must not depend on what is not known of missed steps."""
        _refuse_accumulators(jax.eval_shape(self.dense.init, params))
        layout = self._layout(params)
        with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
        program = program_of(self.dense, params, layout)
        leaves = jax.tree.leaves(params)
        with while_tracing():
            for k in self._rows_of(program, leaves, layout):
                if not _only_its_own(program, leaves, layout, k):
                    name = path_name(with_paths[k][0])
                    raise ValueError(
                        message(
                            "se.exact.replay(inner): a row without a gradient is moved by more "
                            "than itself and the step count, so missed steps cannot be made up.",
                            f"the update of {name} depends on the loss, gradients of other rows, "
                            "or a number of the state that does not go up by one each step",
                            "se.lazy(inner), or that transform outside of se.exact.replay",
                        )
                    )

    def _rows_of(self, program: Program, leaves: list[Any], layout: StateLayout) -> list[int]:
        """The leaves that can be run on rows; any other is refused as a table by `lazy`."""
        shapes = tuple((jnp.shape(x), jnp.result_type(x).name) for x in leaves)
        key = layout.treedef, shapes
        if key not in self.on_rows:
            self.on_rows[key] = [
                k for k in range(len(leaves)) if _runs_on_rows(program, leaves, layout, k)
            ]
        return self.on_rows[key]

    def _layout(self, params: Any) -> StateLayout:
        leaves = jax.tree.leaves(params)
        tables = [k for k, x in enumerate(leaves) if jnp.ndim(x) and jnp.size(x)]
        return state_layout(self.dense, params, tables)


def _catch_up(one_step: RestStep, block: Block) -> tuple[Array, dict[str, Array]]:
    """The rows of a block after the steps that they missed, oldest step first."""
    longest = jnp.max(block.missed, initial=0)

    def step(made: Array, rows: tuple[Array, dict[str, Array]]) -> Any:
        left = longest - made
        new = one_step(block.indices, *rows, left)
        due = block.missed >= left

        def chosen(new: Array, old: Array) -> Array:
            return jnp.where(due.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        return jax.tree.map(chosen, new, rows)

    return jax.lax.fori_loop(0, longest, step, (block.w, block.moments))


def _ahead(one_step: RestStep, steps: int) -> tuple[Array, Array]:
    """No sums; and what the next step does to a made-up row, as no other optimizer would."""
    w, own = _made_up_rows(one_step, 1)
    new, after = one_step(jnp.arange(1), w, own, jnp.int32(-steps))
    numbers = [new - w, *jax.tree.leaves(after)]
    mark = jnp.stack([jnp.mean(x.astype(jnp.float32)) for x in numbers])
    return jnp.zeros(0, jnp.float32), mark


def _refuse_accumulators(inner_state: Any) -> None:
    kinds = (optax.MultiStepsState, optax.ApplyEvery)
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, kinds):
            raise ValueError(
                message(
                    "se.exact.replay(inner): inner gathers gradients over several steps, so a step "
                    "without a gradient may still move a row by an earlier one.",
                    f"a state of type {type(node).__name__}",
                    "grads = grads_1 + grads_2 for a table's RowSparse gradients, then one update",
                )
            )


def _runs_on_rows(program: Program, leaves: list[Any], layout: StateLayout, k: int) -> bool:
    if not (jnp.ndim(leaves[k]) and jnp.size(leaves[k])):
        return False
    try:
        jax.eval_shape(lambda: _tried(program, leaves, layout, k, 1.0))
    except ValueError:
        return False
    return True


def _only_its_own(program: Program, leaves: list[Any], layout: StateLayout, k: int) -> bool:
    """Whether rows of leaf k depend on nothing but themselves and counts of the steps made."""
    same = _alike(*(_tried(program, leaves, layout, k, x) for x in (1.0, 2.5)))
    trials = ((1.0, 10), (1.0, 11), (float("nan"), 10))
    return same and all(
        _made_up_step(program, leaves, layout, k, unknown, count).counts_go_up()
        for unknown, count in trials
    )


def _tried(program: Program, leaves: list[Any], layout: StateLayout, k: int, unknown: float) -> Any:
    """A rest step on made-up rows."""
    one_step = _made_up_step(program, leaves, layout, k, unknown, 10)
    return one_step(jnp.arange(2), *_made_up_rows(one_step, 2), jnp.int32(3))


def _made_up_step(
    program: Program, leaves: list[Any], layout: StateLayout, k: int, unknown: float, count: int
) -> RestStep:
    state = [_made_up(x, count) for x in layout.shapes]
    return RestStep(program, leaves, layout, state, k, unknown)


def _made_up_rows(one_step: RestStep, n: int) -> tuple[Array, dict[str, Array]]:
    like, layout, k = one_step.leaves[one_step.k], one_step.layout, one_step.k
    own = {
        str(i): 0.5 * jnp.ones((n, *x.shape[1:]), x.dtype)
        for i, x in enumerate(layout.shapes)
        if layout.table[i] == k
    }
    return 0.7 * jnp.ones((n, *jnp.shape(like)[1:]), jnp.result_type(like)), own


def _made_up(x: Any, count: int) -> Array:
    """A leaf of a state: its counts, and 0.5 for all other numbers."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.full(x.shape, 0.5 if jnp.issubdtype(x.dtype, jnp.floating) else count, x.dtype)


def _alike(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: jnp.allclose(x, y, rtol=1e-5, equal_nan=True), a, b)
    return all(map(bool, jax.tree.leaves(same)))
