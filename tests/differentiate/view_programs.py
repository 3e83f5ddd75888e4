"""Programs that read rows through a view of a table, each in every context a read may stand in.

They are added to `PROGRAMS`; `VIEWS` are those without a context.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from programs import A_B_W, GRID, IDS, JIT, OTHER, PROGRAMS, D, V, arrays, head, no_nan, program

import sparse_embed as se

F = 3  # tables of a stack
ORDER = np.random.default_rng(0).permutation(V).astype(np.int32)
MASK = np.arange(V) % 3 != 0


class View(NamedTuple):
    """A table made of parameters, and which of their rows its rows are.

    Args:
      shape: of the leaf `t`.
      of: `t -> the view`, which is read at ids along axis 0.
      rows: `ids -> rows of t`, -1 where there is none.
      row_axes: along which the rows of `t` run.
      features: of a row read.
    """

    shape: tuple[int, ...]
    of: Callable[[Any], Any]
    rows: Callable[[np.ndarray], np.ndarray]
    row_axes: tuple[int, ...] = (0,)
    features: tuple[int, ...] = (D,)


def _but(bad: Any, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(bad(ids), -1, rows)


T, STACK = (V, D), (F, V, D)
VIEWS = {
    "slice": View(T, lambda t: t[1:], lambda i: np.minimum(i, V - 2) + 1),
    "first_rows": View(T, lambda t: t[: V // 2], lambda i: np.minimum(i, V // 2 - 1)),
    "strided": View(T, lambda t: t[1::3], lambda i: 3 * np.minimum(i, (V - 2) // 3) + 1),
    "rows_and_columns": View(
        T, lambda t: t[1:, 2:5], lambda i: np.minimum(i, V - 2) + 1, features=(3,)
    ),
    "padded": View(
        T, lambda t: jnp.pad(t, ((1, 0), (0, 0))), lambda i: _but(lambda i: i < 1, i, i - 1)
    ),
    "padded_between": View(
        T,
        lambda t: lax.pad(t, 1.0, [(2, 0, 1), (0, 1, 0)]),
        lambda i: _but(lambda i: (i < 2) | (i % 2 == 1), i, (i - 2) // 2),
        features=(D + 1,),
    ),
    "pad_row_in_front": View(
        T,
        lambda t: jnp.concatenate([jnp.ones((1, D)), t]),
        lambda i: _but(lambda i: i < 1, i, i - 1),
    ),
    "set_to_zero": View(T, lambda t: t.at[0].set(0.0), lambda i: _but(lambda i: i == 0, i, i)),
    "several_set": View(
        T,
        lambda t: t.at[jnp.array([7, 9, 7, V])].set(jnp.arange(4.0)[:, None]),
        lambda i: _but(lambda i: (i == 7) | (i == 9), i, i),
    ),
    "masked": View(T, lambda t: jnp.where(MASK[:, None], t, 2.0), lambda i: i),
    "frozen": View(T, lambda t: jnp.where(MASK[:, None], t, lax.stop_gradient(t)), lambda i: i),
    "flipped": View(T, lambda t: jnp.flip(t, 0), lambda i: V - 1 - i),
    "flipped_both": View(T, lambda t: t[::-1, ::-1], lambda i: V - 1 - i),
    "rolled": View(T, lambda t: jnp.roll(t, 5, axis=0), lambda i: (i - 5) % V),
    "lines": View((V // 4, 4 * D), lambda t: t.reshape(V, D), lambda i: i // 4, features=(D,)),
    "scaled_slice_of_a_flip": View(
        T,
        lambda t: 2 * jnp.flip(t.astype(jnp.float32), 0)[3:],
        lambda i: V - 4 - np.minimum(i, V - 4),
    ),
    "repeated": View(T, lambda t: jnp.repeat(t, 2, axis=0), lambda i: i // 2),
    "tiled": View(T, lambda t: jnp.tile(t, (2, 1)), lambda i: i % V),
    "stacked_with_itself": View(T, lambda t: jnp.stack([t, 2 * t])[1], lambda i: i),
    "broadcast": View(T, lambda t: jnp.broadcast_to(t, (2, *T))[1], lambda i: i),
    "second_half": View(
        T, lambda t: jnp.split(t, 2)[1], lambda i: np.minimum(i, V // 2 - 1) + V // 2
    ),
    "window": View(
        T, lambda t: lax.dynamic_slice_in_dim(t, 5, V - 9), lambda i: np.minimum(i, V - 10) + 5
    ),
    "overwritten": View(
        T,
        lambda t: lax.dynamic_update_slice(t, jnp.ones((3, D)), (2, 0)),
        lambda i: _but(lambda i: (i >= 2) & (i < 5), i, i),
    ),
    "transposed": View((D, V), lambda t: t.T, lambda i: i, (1,)),
    "norms_of_columns": View(
        (D, V), lambda t: (t / jnp.linalg.norm(t, axis=0)).T, lambda i: i, (1,)
    ),
    "heads": View((D, V, 2), lambda t: t.transpose(1, 2, 0), lambda i: i, (1,), (2, D)),
    "one_table": View(STACK, lambda t: t.reshape(F * V, D), lambda i: i, (0, 1)),
    "member": View(STACK, lambda t: t[1], lambda i: V + i, (0, 1)),
    "columns_of_a_stack": View(STACK, lambda t: jnp.swapaxes(t, 0, 1)[:, 2], lambda i: i, (1,)),
}

CONTEXTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "plain": lambda of, t, b: of(t)[b["ids"]],
    "take": lambda of, t, b: no_nan(jnp.take(of(t), b["ids"], axis=0)),
    "scan": lambda of, t, b: lax.scan(lambda c, i: (c, of(t)[i]), 0, b["ids"])[1],
    "vmap": lambda of, t, b: jax.vmap(lambda i: of(t)[i])(b["ids"]),
    "cond": lambda of, t, b: lax.cond(
        b["flag"], lambda t: of(t)[b["ids"]], lambda t: 2 * of(t)[b["ids"]], t
    ),
    "checkpoint": lambda of, t, b: jax.checkpoint(lambda t: of(t)[b["ids"]])(t),
}


def _loss(view: View, context: str) -> Callable[[Any, Any], Any]:
    def loss(p, b):
        return head(CONTEXTS[context](view.of, p["t"], b), p["w"])

    return loss


def _rows(view: View, context: str, listed: bool) -> Callable[[Any], Any]:
    def of(batch):
        ids = np.asarray(batch["ids"], np.int64)
        height = jax.eval_shape(view.of, jax.ShapeDtypeStruct(view.shape, jnp.float32)).shape[0]
        if context == "take":
            ids = ids[ids < height]
        rows = view.rows(np.minimum(ids, height - 1))
        # Beyond it the nearest row is read, and gets no gradient where many are read at once.
        return [rows[(ids < height) | (not listed) | (context in ("scan", "vmap"))]]

    return of


for _name, _view in VIEWS.items():
    for _context in CONTEXTS:
        _last = arrays(t=_view.shape, w=_view.features[-1:])
        program(
            _last,
            batch={"ids": IDS, "flag": np.array(True)},
            name=f"view_{_name}_{_context}",
            listed=_rows(_view, _context, True),
            touched=_rows(_view, _context, False),
            row_axes={"t": _view.row_axes},
            modes=("eager", "jit") if _context == "plain" else JIT,
            ulps=2,
            jit_ulps=2 if _name == "norms_of_columns" else 0,
        )(_loss(_view, _context))
PLAIN = [PROGRAMS[f"view_{name}_plain"] for name in VIEWS]


# --- several tables, and reads of their own kind --------------------------------------------------


@program(
    A_B_W,
    "a b",
    listed={"a": lambda b: [2 * IDS[2 * IDS < V]], "b": lambda b: [2 * IDS[2 * IDS >= V] - V]},
    modes=JIT,
)
def view_of_two_tables(p, b):
    return head(jnp.concatenate([p["a"], p["b"]])[2 * b["ids"]], p["w"])


@program(A_B_W, "a b", modes=JIT, listed=None)
def view_of_a_table_and_its_slice(p, b):
    t = jnp.concatenate([p["a"][1:], p["a"][:1] + p["b"][:1]])
    return head(t[b["ids"]], p["w"]) + head(p["a"][b["ids"]], p["w"])


@program(batch={"ids": IDS, "order": ORDER}, listed=lambda b: [ORDER[IDS]], modes=JIT)
def view_in_another_order(p, b):
    return head(p["t"][b["order"]][b["ids"]], p["w"])


@program(batch={"ids": IDS, "order": ORDER}, listed=lambda b: [ORDER[IDS]], modes=JIT)
def view_in_another_order_taken(p, b):
    order = jnp.take(p["t"], b["order"], axis=0, mode="clip")
    return head(jnp.take(order, b["ids"], axis=0, mode="clip"), p["w"])


@program(batch={"ids": IDS, "by": np.array(3)}, listed=lambda b: [(IDS - 3) % V], modes=JIT)
def view_rolled_by_what_the_batch_says(p, b):
    return head(jnp.roll(p["t"], b["by"], axis=0)[b["ids"]], p["w"])


@program(batch={"ids": IDS}, listed=lambda b: [IDS], modes=JIT, lean=False)
def view_row_set_to_a_parameter(p, b):
    return head(p["t"].at[1].set(p["w"])[b["ids"]], p["w"])


@program(
    batch={"ids": np.array([1, 5, V, V + 3, -1, -V - 4])},
    listed=lambda b: [2, 6, V - 1],
    touched=lambda b: [1, 2, 6, V - 1],
    modes=JIT,
)
def view_ids_outside(p, b):
    return head(p["t"][1:][b["ids"]], p["w"])


@program(batch={"ids": np.array([1, 5, V, V + 3, -1])}, listed=lambda b: [2, 6, V - 1], modes=JIT)
def view_ids_outside_fill(p, b):
    return head(no_nan(jnp.take(p["t"][1:], b["ids"], axis=0)), p["w"])


STACK_W = arrays(t=STACK, w=(D,))
PAIRS = {"f": np.array([0, 2, 2, 1, 0, 2], np.int32), "ids": IDS}
IN_STACK: Any = {"row_axes": {"t": (0, 1)}, "listed": lambda b: [PAIRS["f"] * V + IDS]}
BY_TABLE: Any = {
    "row_axes": {"t": (0, 1)},
    "listed": lambda b: [np.arange(F)[:, None] * V + GRID[:F]],
}


@program(STACK_W, batch=PAIRS, **IN_STACK)
def stack_at_pairs(p, b):
    return head(p["t"][b["f"], b["ids"]], p["w"])


@program(STACK_W, batch=PAIRS, modes=JIT, **IN_STACK)
def stack_in_scan(p, b):
    return head(lax.scan(lambda c, i: (c, p["t"][i[0], i[1]]), 0, (b["f"], b["ids"]))[1], p["w"])


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_by_table(p, b):
    return head(p["t"][jnp.arange(F)[:, None], b["ids"]], p["w"])


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_by_vmap(p, b):
    return head(jax.vmap(lambda t, ids: t[ids])(p["t"], b["ids"]), p["w"])


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_by_vmapped_lookup(p, b):
    return head(jax.vmap(se.lookup)(p["t"], b["ids"]), p["w"])


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_by_vmapped_bag(p, b):
    return head(jax.vmap(lambda t, ids: se.lookup_bag(t, ids[None]))(p["t"], b["ids"]), p["w"])


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_table_by_table(p, b):
    return sum(head(p["t"][f][b["ids"][f]], p["w"]) for f in range(F))


@program(
    arrays(embedding=STACK, w=(D,)),
    "embedding",
    {"ids": GRID[:F]},
    modes=JIT,
    row_axes={"embedding": (0, 1)},
    listed=BY_TABLE["listed"],
)
def stack_of_linen_embed(p, b):
    embed = nn.vmap(nn.Embed, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
    rows = embed(V, D).apply({"params": {"embedding": p["embedding"]}}, b["ids"])
    return head(rows, p["w"])


def _equinox_stack(model, b):
    weight, ids = model["t"], b["ids"]
    embed = eqx.nn.Embedding(weight=weight[0])
    embeds = eqx.tree_at(lambda m: m.weight, embed, weight)
    rows = eqx.filter_vmap(lambda e, own: jax.vmap(e)(own))(embeds, ids)
    return head(rows, model["w"])


program(STACK_W, batch={"ids": GRID[:F]}, name="stack_of_equinox", modes=JIT, **BY_TABLE)(
    _equinox_stack
)


@nnx.vmap(in_axes=(0, 0))
def _embed(embed, ids):
    return embed(ids)


@program(STACK_W, batch={"ids": GRID[:F]}, modes=JIT, **BY_TABLE)
def stack_of_nnx_embed(p, b):
    embed = nnx.Embed(1, D, rngs=nnx.Rngs(0))
    embed.num_embeddings, embed.embedding = V, nnx.Param(p["t"])
    return head(_embed(embed, b["ids"]), p["w"])


@program(sparse="", warns={"t": "gather"}, modes=JIT)
def parts_of_rows(p, b):
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    rows = lax.gather(p["t"], b["ids"][:, None], numbers, (1, 3), mode="clip")
    return head(rows, p["w"][:3])


@program(
    arrays(t=(V, D), w=(1,)),
    batch={"ids": IDS, "columns": IDS % D},
    row_axes={"t": (0, 1)},
    listed=lambda b: [IDS * D + IDS % D],
)
def elements(p, b):
    return head(p["t"][b["ids"], b["columns"]], p["w"])


@program(arrays(t=(D, V), w=(D,)), row_axes={"t": (1,)}, modes=JIT)
def take_along_the_second_axis(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=1).T, p["w"])


@program(STACK_W, "", PAIRS, warns={"t": "gather"}, modes=JIT)
def stack_read_in_two_ways(p, b):
    return head(p["t"][b["f"], b["ids"]], p["w"]) + head(p["t"][b["f"]], p["w"])


@program(
    arrays(t=(40, 40, D), w=(D,)),
    batch={"f": OTHER, "ids": OTHER + 3},
    listed=None,
    modes=JIT,
    row_axes={"t": (0, 1)},
    lean=False,
)
def stack_and_its_transpose(p, b):
    return head((p["t"] + 2 * p["t"].transpose(1, 0, 2))[b["f"], b["ids"]], p["w"])


OUT_OF_ORDER = np.where(np.arange(V) % 3, ORDER, V + ORDER)  # a third is outside


@program(
    batch={"ids": IDS, "order": OUT_OF_ORDER},
    modes=JIT,
    listed=lambda b: [OUT_OF_ORDER[IDS]],
    touched=lambda b: [np.minimum(OUT_OF_ORDER[IDS], V - 1)],
)
def view_in_an_order_partly_outside(p, b):
    return head(p["t"][b["order"]][b["ids"]], p["w"])


@program(batch={"id": np.array(190, np.uint8)}, listed=lambda b: [490], modes=JIT)
def view_at_a_narrow_id(p, b):
    return head(lax.dynamic_index_in_dim(p["t"][300:600], b["id"]), p["w"])


@program(batch={"ids": IDS}, listed=lambda b: [IDS[IDS > 0] - 1], modes=JIT, rtol=1e-2)
def view_padded_then_cast(p, b):
    padded = jnp.concatenate([jnp.zeros((1, D)), p["t"]]).astype(jnp.bfloat16)
    return head(padded[b["ids"]].astype(jnp.float32), p["w"])


# --- dense, and not in silence --------------------------------------------------------------------


@program(STACK_W, "", {"ids": GRID[:F]}, warns={"t": "scan"}, modes=JIT)
def scan_over_stack(p, b):
    return head(lax.scan(lambda c, x: (c, x[0][x[1]]), 0, (p["t"], b["ids"]))[1], p["w"])


@program(sparse="", warns={"t": "sort"}, modes=JIT)
def sorted_table(p, b):
    return head(jnp.sort(p["t"], axis=0)[b["ids"]], p["w"])


@program(sparse="", warns={"t": "cumsum"}, modes=JIT, rtol=1e-4)
def running_sum_of_rows(p, b):
    return head(jnp.cumsum(p["t"], axis=0)[b["ids"]], p["w"])


@program(sparse="", warns={"t": "reshape"}, modes=JIT)
def rows_cut_and_joined(p, b):
    return head(p["t"].reshape(V // 2, 2, D // 2, 2).reshape(V // 4, 4 * D)[b["ids"] // 4], 1.0)


@program(arrays(b=(D,), w=(4, D)), "", {"x": np.ones((6, 4), np.float32), "y": IDS % D}, modes=JIT)
def bias_of_a_softmax(p, b):
    """A bias is no table, though one entry of what it is added to is read."""
    return -jnp.sum(jax.nn.log_softmax(b["x"] @ p["w"] + p["b"])[jnp.arange(6), b["y"]])


@program(arrays(b=(D,), w=(4, D)), "", {"x": np.ones(4, np.float32), "y": np.array(3)}, modes=JIT)
def bias_of_one_example(p, b):
    return -jax.nn.log_softmax(b["x"] @ p["w"] + p["b"])[b["y"]]


@program(
    arrays(e=(V, D), pos=(1, 6, D), w=(D,)),
    "e",
    {"ids": IDS[None], "last": np.array([2])},
    listed={"e": "ids"},
    modes=JIT,
    lean=False,
)
def positions_of_a_batch_of_one(p, b):
    h = p["e"][b["ids"]] + p["pos"]
    return head(h[jnp.arange(1), b["last"]], p["w"])
