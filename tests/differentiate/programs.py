"""Programs that read tables, and what `se.value_and_grad` must make of each.

The laws of `test_value_and_grad.py` and `test_touched.py` run over `PROGRAMS`. A table has `V`
rows, far more than anything else has entries, so that a table-sized temporary array shows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import sparse_embed as se

V, D = 20_000, 8
IDS = np.array([3, V - 1, 0, 3, 7, 3], np.int32)
OTHER = np.array([11, 3, 12], np.int32)
GRID = np.array([[3, 9, 3], [V - 1, 0, 9], [5, 5, 5], [6, 3, 0]], np.int32)
OUTSIDE = np.array([3, V, V + 5, -1, -V, -V - 1, 2**31 - 1, -(2**31), 3], np.int32)


@dataclass(frozen=True)
class Program:
    """A loss of `(params, batch)` and what is expected of its gradient.

    Args:
      name: name of the program.
      loss: the loss; with `has_aux` it returns `(loss, aux)`.
      params: builds the parameters.
      batch: builds the batch.
      sparse: names of the leaves with a row-sparse gradient. All others have a dense one.
      warns: leaf -> operation, for leaves of which a warning says that they are used whole.
      listed: the rows listed in the gradient: a function of the batch, or the name or names of the
        entries of the batch that hold them; a dict of these by leaf; `None` where hard to say.
      touched: the rows read, where they are not just those listed.
      row_axes: the axes along which rows of a leaf run, where they are not the first one.
      rtol: relative tolerance of the gradient.
      ulps: how far the value may be off outside `jit`. There dense JAX runs the operations of a
        library function of its own, such as `jnp.mean`, as one compiled block, or all rows of
        a table at once, and rounds differently.
      jit_ulps: how far it may be off inside `jit`: XLA adds up some columns in another order.
      modes: in which modes it runs. JIT: outside it adds nothing that another program has not.
      lean: whether it has no table-sized temporary array.
    """

    name: str
    loss: Callable[[Any, Any], Any]
    params: Callable[[], Any]
    batch: Callable[[], Any]
    sparse: tuple[str, ...]
    warns: dict[str, str] = field(default_factory=dict)
    listed: Any = "ids"
    touched: Any = None
    row_axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    has_aux: bool = False
    rtol: float = 1e-5
    ulps: int = 0
    jit_ulps: int = 0
    modes: tuple[str, ...] = ("eager", "jit")
    lean: bool = True

    def is_named(self, path: tuple, names: Any) -> bool:
        """Whether one of `names` is a part of a leaf's key path."""
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return any(part in names for part in parts)

    def axes(self, path: tuple) -> tuple[int, ...]:
        """The axes along which the rows of a leaf run."""
        return self.row_axes.get(getattr(path[-1], "key", ""), (0,))

    def rows(self, batch: Any, path: tuple, of: Any, num_rows: int = V) -> np.ndarray | None:
        """The ascending distinct rows that `of` (`listed` or `touched`) names for a leaf."""
        if isinstance(of, dict):
            of = of[jax.tree_util.keystr(path, simple=True)]
        if of is None:
            return None
        keys = (of,) if isinstance(of, str) else of
        rows = of(batch) if callable(of) else [batch[key] for key in keys]
        flat = np.concatenate([np.zeros(0, np.int64), *(np.ravel(r) for r in rows)])
        return np.unique(flat[(flat >= 0) & (flat < num_rows)]).astype(np.int64)


PROGRAMS: dict[str, Program] = {}
JIT = ("jit",)


def arrays(**shapes: Any) -> Callable[[], dict[str, jax.Array]]:
    """Builds float32 parameters of these shapes, or of `(shape, dtype)`."""

    def build():
        rng, built = np.random.default_rng(0), {}
        for name, shape in shapes.items():
            typed = len(shape) == 2 and isinstance(shape[0], tuple)
            shape, dtype = shape if typed else (shape, jnp.float32)
            values = rng.normal(size=shape)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                values = values + 1j * rng.normal(size=shape)
            built[name] = jnp.asarray(values, dtype)
        return built

    return build


T_AND_W = arrays(t=(V, D), w=(D,))
A_B_W = arrays(a=(V, D), b=(V, D), w=(D,))


def program(
    params: Callable = T_AND_W,
    sparse: str = "t",
    batch: dict | None = None,
    name: str = "",
    **expected: Any,
) -> Callable:
    """Registers a loss; `sparse` are names with blanks between, `batch` is `{"ids": IDS}`."""
    entries = {"ids": IDS} if batch is None else batch

    def register(loss: Callable) -> Callable:
        key = name or loss.__name__
        assert key not in PROGRAMS
        built = functools.partial(jax.tree.map, jnp.asarray, entries)
        PROGRAMS[key] = Program(key, loss, params, built, tuple(sparse.split()), **expected)
        return loss

    return register


def head(rows, w):
    """A loss of rows `[..., D]` in which every row has a gradient of its own."""
    return jnp.sum(jnp.tanh(rows * w))


def no_nan(rows):
    return jnp.where(jnp.isnan(rows), 0, rows)


def wrapped(batch):
    """Rows of ids as numpy reads them: negative ones count from the end."""
    ids = np.asarray(batch["ids"], np.int64)
    return [np.where(ids < 0, ids + V, ids)]


def clipped(batch):
    return [np.clip(np.asarray(batch["ids"], np.int64), 0, V - 1)]


def clipped_after_wrapping(batch):
    return [np.clip(wrapped(batch)[0], 0, V - 1)]


def nothing(batch):
    return []


# --- reads ----------------------------------------------------------------------------------


@program()
def index(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(modes=JIT)
def index_with_colon(p, b):
    return head(p["t"][b["ids"], :], p["w"])


@program(batch={"ids": GRID}, modes=JIT)
def index_2d(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(batch={"ids": GRID[None, :, :, None]}, modes=JIT)
def index_4d(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(sparse="", batch={"ids": np.zeros((0,), np.int32)})  # jnp reads nothing at all
def index_nothing(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(modes=JIT)
def index_constant_array(p, b):
    return head(p["t"][IDS], p["w"])


@program()
def take_fill(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0), p["w"])


@program(modes=JIT)
def take_clip(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0, mode="clip"), p["w"])


@program(batch={"ids": OUTSIDE}, listed=lambda b: [np.asarray(b["ids"], np.int64) % V])
def take_wrap(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0, mode="wrap"), p["w"])


@program()
def at_get_fill(p, b):
    return head(p["t"].at[b["ids"]].get(mode="fill", fill_value=2.0), p["w"])


@program(modes=JIT)
def at_get_sorted_unique(p, b):
    ids = jnp.unique(b["ids"], size=4)
    rows = p["t"].at[ids].get(indices_are_sorted=True, unique_indices=True)
    return head(rows, p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped)
def outside_index(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped)
def outside_promise(p, b):
    return head(p["t"].at[b["ids"]].get(mode="promise_in_bounds"), p["w"])


# The nearest row is read, but it gets no gradient.
@program(batch={"ids": OUTSIDE}, touched=clipped, modes=JIT)
def outside_promise_no_wrap(p, b):
    rows = p["t"].at[b["ids"]].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return head(rows, p["w"])


@program(batch={"ids": OUTSIDE}, listed=clipped_after_wrapping, modes=JIT)
def outside_clip(p, b):
    return head(p["t"].at[b["ids"]].get(mode="clip"), p["w"])


@program(batch={"ids": OUTSIDE}, listed=clipped, modes=JIT)
def outside_take_clip(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0, mode="clip"), p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped, modes=JIT)
def outside_fill(p, b):
    return head(p["t"].at[b["ids"]].get(mode="fill", fill_value=0.5), p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped, modes=JIT)
def outside_take_nan(p, b):
    return head(no_nan(jnp.take(p["t"], b["ids"], axis=0)), p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped, modes=JIT)
def outside_take_is_nan(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0), p["w"])


@program(batch={"ids": OUTSIDE}, listed=wrapped, modes=JIT)
def outside_fill_after_row_operations(p, b):
    return head(jnp.exp(2 * p["t"]).at[b["ids"]].get(mode="fill", fill_value=0.5), p["w"])


@program(batch={"ids": np.array([3, 255, 0, 3, 128], np.uint8)})
def uint8_ids(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(batch={"ids": np.array([3, 127, 0, 3], np.int8)}, modes=JIT)
def int8_ids(p, b):
    return head(jnp.take(p["t"], b["ids"], axis=0), p["w"])


@program(batch={"ids": np.array([3, V - 1, 2**16 - 1], np.uint16)}, modes=JIT)
def uint16_ids_outside(p, b):
    return head(no_nan(jnp.take(p["t"], b["ids"], axis=0)), p["w"])


@program(batch={"ids": np.array([3, 2**32 - 1, 2**31, V - 1], np.uint32)}, modes=JIT)
def uint32_ids_outside(p, b):
    return head(no_nan(jnp.take(p["t"], b["ids"], axis=0)), p["w"])


@program(batch={"ids": np.array(7, np.int32)})
def scalar_id(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(batch={"ids": np.array(-1, np.int32)}, listed=lambda b: [[V - 1]], modes=JIT)
def negative_scalar_id(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(sparse="")
def python_int(p, b):
    return head(p["t"][3], p["w"]) + head(p["t"][-1], p["w"])


@program(sparse="", modes=JIT)
def first_row(p, b):
    return head(p["t"][0], p["w"])


@program(sparse="")
def first_rows(p, b):
    return head(p["t"][:10], p["w"])


@program(sparse="", modes=JIT)
def strided_rows(p, b):
    return head(p["t"][2:10:2], p["w"])


@program(listed=lambda b: [IDS, [1], [4, 6]])
def constant_rows_and_lookup(p, b):
    rows = [p["t"][b["ids"]], p["t"][1:2], p["t"][4:8:2]]
    return head(jnp.concatenate(rows), p["w"])


@program()
def vmapped_index(p, b):
    return head(jax.vmap(lambda i: p["t"][i])(b["ids"]), p["w"])


@program(batch={"ids": GRID}, modes=JIT)
def vmapped_twice(p, b):
    return head(jax.vmap(jax.vmap(lambda i: p["t"][i], out_axes=1))(b["ids"]).sum(1), p["w"][0])


@program()
def vmapped_dynamic_index(p, b):
    read = functools.partial(lax.dynamic_index_in_dim, p["t"], keepdims=False)
    return head(jax.vmap(read)(b["ids"]), p["w"])


def three_from(batch):
    return [np.clip(batch["ids"], 0, V - 3)[..., None] + np.arange(3)]


@program(listed=three_from, modes=JIT)
def vmapped_dynamic_slice(p, b):
    rows = jax.vmap(lambda i: lax.dynamic_slice(p["t"], (i, 0), (3, D)))(b["ids"])
    return head(rows * jnp.arange(1.0, 4.0)[:, None], p["w"])


@program(batch={"ids": np.array(V - 1, np.int32)}, listed=three_from)
def dynamic_slice_rows(p, b):
    return head(lax.dynamic_slice_in_dim(p["t"], b["ids"], 3), p["w"])


@program(batch={"ids": IDS, "y": np.linspace(0, 1, 6, dtype=np.float32)})
def per_example_loss(p, b):
    def example(i, y):
        return jnp.square(jnp.dot(p["t"][i], p["w"]) - y)

    return jnp.mean(jax.vmap(example)(b["ids"], b["y"]))


@program(arrays(t=(V,), w=(D,)))
def table_1d(p, b):
    return head(p["t"][b["ids"]][:, None], p["w"])


@program(arrays(t=(V, 2, 4), w=(4,)))
def table_3d(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(arrays(t=(V, 1), w=(D,)), modes=JIT)
def table_of_one_column(p, b):
    return head(p["t"][b["ids"]], p["w"])


@program(arrays(t=((V, D), jnp.bfloat16), w=(D,)), rtol=2e-2)
def table_bfloat16(p, b):
    return head(p["t"][b["ids"]].astype(jnp.float32), p["w"])


@program(arrays(t=((V, D), jnp.float16), w=(D,)), rtol=4e-3, modes=JIT)
def table_float16(p, b):
    return head(p["t"][b["ids"]].astype(jnp.float32), p["w"])


@program(arrays(t=((V, D), jnp.complex64), w=(D,)), modes=JIT)
def table_complex(p, b):
    return jnp.sum(jnp.abs(p["t"][b["ids"]] * p["w"]) ** 2)


@program(batch={"ids": IDS, "mask": np.array([1, 0, 1, 1, 0, 1], bool)}, modes=JIT)
def masked_rows(p, b):
    return head(jnp.where(b["mask"][:, None], p["t"][b["ids"]], 0), p["w"])


# --- models ---------------------------------------------------------------------------------


def nnx_embed(dtype):
    return nnx.Embed(V, D, dtype=dtype, rngs=nnx.Rngs(0))


class LinenBag(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        rows = nn.Embed(V, D, dtype=self.dtype)(ids)
        return nn.Dense(1, dtype=self.dtype)(rows)


def linen(model):
    def params():
        return model.init(jax.random.key(0), jnp.asarray(GRID))["params"]

    def loss(p, b):
        return jnp.sum(jnp.tanh(model.apply({"params": p}, b["ids"]).astype(jnp.float32)))

    return params, loss


for _dtype, _rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
    _params, _loss = linen(LinenBag(_dtype))
    _name = f"linen_embed_{_dtype.__name__}"
    program(_params, "embedding", {"ids": GRID}, _name, rtol=_rtol, modes=JIT)(_loss)


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.RNN(nn.OptimizedLSTMCell(5))(nn.Embed(V, D)(ids))


_params, _loss = linen(LinenLSTM())
program(_params, "embedding", {"ids": GRID}, "linen_lstm", modes=JIT)(_loss)


@program(lambda: nnx_embed(jnp.float32), "embedding")
def nnx_module_as_it_is(model, b):
    return head(model(b["ids"]), 1)


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.remat(nn.Embed)(V, D)(ids)


_params, _loss = linen(LinenRemat())
program(_params, "embedding", {"ids": GRID}, "linen_remat", modes=JIT)(_loss)


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D)
        return embed.attend(embed(ids))


_params, _loss = linen(LinenTied())
program(_params, "", {"ids": GRID}, "linen_tied", warns={"embedding": "dot_general"}, rtol=1e-4)(
    _loss
)


def nnx_state(dtype):
    graph = nnx.graphdef(nnx.eval_shape(lambda: nnx_embed(dtype)))

    def loss(p, b):
        return head(nnx.merge(graph, p)(b["ids"]).astype(jnp.float32), 1)

    return lambda: nnx.state(nnx_embed(dtype)), loss


for _dtype, _rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
    _params, _loss = nnx_state(_dtype)
    _name = f"nnx_embed_{_dtype.__name__}"
    program(_params, "embedding", name=_name, rtol=_rtol, modes=JIT)(_loss)


@program(lambda: eqx.nn.Embedding(V, D, key=jax.random.key(0)), "weight")
def equinox_embedding(model, b):
    return head(jax.vmap(model)(b["ids"]), 1)


@program(lambda: eqx.nn.Embedding(V, D, key=jax.random.key(0)), "weight", {"ids": GRID}, modes=JIT)
def equinox_embedding_2d(model, b):
    return head(jax.vmap(jax.vmap(model))(b["ids"]), 1)


# --- loops and branches ---------------------------------------------------------------------


def recur(t, w):
    """A round of a recurrence that reads one row."""
    return lambda h, i: (jnp.tanh(h * w + t[i]), h[0])


@program()
def scan(p, b):
    h, ys = lax.scan(recur(p["t"], p["w"]), jnp.zeros(D), b["ids"])
    return jnp.sum(h) + jnp.sum(ys)


@program(modes=JIT)
def scan_reverse_unroll(p, b):
    h, ys = lax.scan(recur(p["t"], p["w"]), jnp.zeros(D), b["ids"], reverse=True, unroll=2)
    return jnp.sum(h) + jnp.sum(ys)


@program(batch={"ids": GRID}, modes=JIT)
def scan_of_blocks(p, b):
    def block(h, ids):
        return jnp.tanh(h * p["w"] + p["t"][ids].sum(0)), None

    return jnp.sum(lax.scan(block, jnp.zeros(D), b["ids"])[0])


@program(batch={"ids": GRID})
def nested_scan(p, b):
    def outer(h, ids):
        return lax.scan(recur(p["t"], p["w"]), h, ids)

    h, ys = lax.scan(outer, jnp.zeros(D), b["ids"])
    return jnp.sum(h) + jnp.sum(ys)


@program(batch={"ids": GRID})
def vmapped_scan(p, b):
    def one(ids):
        return lax.scan(recur(p["t"], p["w"]), jnp.zeros(D), ids)[0]

    return jnp.sum(jax.vmap(one)(b["ids"]))


@program()
def scan_of_no_rounds(p, b):
    h, _ = lax.scan(recur(p["t"], p["w"]), jnp.zeros(D), b["ids"][:0])
    return jnp.sum(h) + head(p["t"][b["ids"]], p["w"])


@program()
def lax_map(p, b):
    return jnp.sum(lax.map(lambda i: jnp.tanh(p["t"][i] * p["w"]), b["ids"]))


@program(modes=JIT)
def lax_map_batched(p, b):
    return jnp.sum(lax.map(lambda i: jnp.tanh(p["t"][i] * p["w"]), b["ids"], batch_size=4))


@program()
def fori_loop_static(p, b):
    def body(k, h):
        return jnp.tanh(h * p["w"] + p["t"][b["ids"][k]])

    return jnp.sum(lax.fori_loop(0, 6, body, jnp.zeros(D)))


@program()
def table_in_carry(p, b):
    def body(carry, i):
        t, h = carry
        return (t, jnp.tanh(h * p["w"] + t[i])), None

    (_, h), _ = lax.scan(body, (p["t"], jnp.zeros(D)), b["ids"])
    return jnp.sum(h)


@program(modes=JIT)
def table_in_carry_is_read_behind_the_loop(p, b):
    def body(carry, i):
        t, h = carry
        return (t, jnp.tanh(h * p["w"] + t[i])), None

    (t, h), _ = lax.scan(body, (2 * p["t"], jnp.zeros(D)), b["ids"])
    return jnp.sum(h) + head(t[b["ids"]], p["w"])


def chain(batch):
    """The rows that a walk `i -> 7 i + 3` visits."""
    rows = [int(batch["ids"][0])]
    for _ in range(5):
        rows.append((7 * rows[-1] + 3) % V)
    return [rows]


@program(listed=chain)
def ids_in_carry(p, b):
    def body(carry, _):
        i, h = carry
        return ((7 * i + 3) % V, jnp.tanh(h * p["w"] + p["t"][i])), None

    (_, h), _ = lax.scan(body, (b["ids"][0], jnp.zeros(D)), None, length=6)
    return jnp.sum(h)


@program(listed=None, modes=JIT)
def ids_of_the_hidden_state(p, b):
    def body(h, i):
        j = (jnp.abs(h[0]) * 1e4).astype(jnp.int32) % V
        return jnp.tanh(h * p["w"] + p["t"][i] - p["t"][j]), None

    return jnp.sum(lax.scan(body, jnp.ones(D), b["ids"])[0])


FLAGGED = {"ids": IDS, "flags": np.array([1, 0, 1, 0, 0, 1], bool)}
TWO_WAYS = {"ids": IDS, "other": OTHER}


def cond_loss(p, b):
    return lax.cond(
        b["flag"],
        lambda t, w: head(t[b["ids"]], w),
        lambda t, w: head(2 * t[b["other"]], w),
        p["t"],
        p["w"],
    )


for _flag, _taken in ((True, "ids"), (False, "other")):
    program(
        batch=TWO_WAYS | {"flag": np.array(_flag)}, name=f"cond_{_flag}".lower(), listed=_taken
    )(cond_loss)


@program(batch={"ids": IDS, "flag": np.array(False)}, listed=nothing)
def cond_with_one_reader(p, b):
    def read():
        return head(p["t"][b["ids"]], p["w"])

    return lax.cond(b["flag"], read, lambda: jnp.sum(p["w"]))


@program(
    batch=FLAGGED,
    listed=lambda b: [IDS[[0, 2, 5]], [11]],
)
def cond_in_scan(p, b):
    def body(h, x):
        i, flag = x
        row = lax.cond(flag, lambda: p["t"][i], lambda: 2 * p["t"][11])
        return jnp.tanh(h * p["w"] + row), None

    return jnp.sum(lax.scan(body, jnp.zeros(D), (b["ids"], b["flags"]))[0])


def by_flag(batch):
    return [np.where(batch["flags"], batch["ids"], batch["ids"] // 2)]


@program(batch=FLAGGED, listed=by_flag, modes=JIT)
def cond_in_scan_with_lookups(p, b):
    def body(h, x):
        i, flag = x
        row = lax.cond(flag, lambda: p["t"][i], lambda: 2 * p["t"][i // 2])
        return jnp.tanh(h * p["w"] + row), None

    return jnp.sum(lax.scan(body, jnp.zeros(D), (b["ids"], b["flags"]))[0])


# jax makes a cond with a predicate for each example into both branches and a select, of copies of
# the table.
@program(batch=FLAGGED, listed=lambda b: [b["ids"], b["ids"] // 2])
def vmapped_cond(p, b):
    def one(i, flag):
        return lax.cond(flag, lambda: p["t"][i], lambda: 2 * p["t"][i // 2])

    return head(jax.vmap(one)(b["ids"], b["flags"]), p["w"])


@program(
    batch=TWO_WAYS | {"branch": np.array(2, np.int32)}, listed=lambda b: [b["ids"], b["other"]]
)
def switch(p, b):
    def both(t):
        return head(t[b["ids"]], p["w"]) + head(t[b["other"]], 2 * p["w"])

    branches = [lambda t: head(t[b["ids"]], p["w"]), lambda t: jnp.sum(p["w"]), both]
    return lax.switch(b["branch"], branches, p["t"])


@program(batch={"ids": np.array(7, np.int32)}, listed=lambda b: [[(7 * 2**5) % V]])
def while_that_makes_ids(p, b):
    def step(i):  # the read decides nothing, but it is there
        return 2 * i + (jnp.sum(p["t"][i]) > 1e9).astype(i.dtype)

    i = lax.while_loop(lambda i: i < 200, step, b["ids"])
    return head(p["t"][i], p["w"])


# --- transformations inside -----------------------------------------------------------------


@program()
def checkpoint(p, b):
    @jax.checkpoint
    def block(t, w):
        return head(jnp.sin(t[b["ids"]]), w)

    return block(p["t"], p["w"])


@program()
def checkpoint_in_scan_with_policy(p, b):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    body = jax.checkpoint(recur(p["t"], p["w"]), policy=policy, prevent_cse=False)
    return jnp.sum(lax.scan(body, jnp.zeros(D), b["ids"])[0])


@program(modes=JIT)
def checkpoint_twice(p, b):
    @jax.checkpoint
    def outer(t):
        inner = jax.checkpoint(lambda t: jnp.sin(t[b["ids"]]))
        return head(inner(2 * t), p["w"])

    return outer(p["t"])


@program()
def nested_jit(p, b):
    @jax.jit
    def rows(t, ids):
        return jax.jit(lambda t: t[ids])(t)

    return head(rows(p["t"], b["ids"]), p["w"])


@program(batch=TWO_WAYS, listed=("ids", "other"))
def one_jit_called_twice(p, b):
    rows = jax.jit(lambda t, ids: t[ids])
    ids, other = b["ids"][:3], b["other"]
    tail = head(p["t"][b["ids"][3:]], p["w"])
    return head(rows(p["t"], ids), p["w"]) + head(rows(p["t"], other), 2 * p["w"]) + tail


def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("d",))


for _check, _spec in ((True, "d"), (False, "d"), (True, None), (False, None)):

    def _shard_mapped(p, b, check=_check, spec=_spec):
        def local(t, w, ids):
            return lax.psum(head(t[ids], w), "d")

        mapped = jax.shard_map(
            local, mesh=mesh(), in_specs=(P(), P(), P(spec)), out_specs=P(), check_vma=check
        )
        return mapped(p["t"], p["w"], b["ids"])

    _how = f"shard_map_{'varying' if _spec else 'replicated'}_ids{'' if _check else '_unchecked'}"
    _modes = ("eager", "jit") if _check and _spec else JIT  # outside jit it is slow
    program(name=_how, modes=_modes)(_shard_mapped)


for _check in (True, False):

    def _scan_in_shard_map(p, b, check=_check):
        def local(t, w, ids):
            h = jnp.zeros(D)
            if check:
                h = lax.pcast(h, "d", to="varying")
            return lax.psum(jnp.sum(lax.scan(recur(t, w), h, ids)[0]), "d")

        mapped = jax.shard_map(
            local, mesh=mesh(), in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=check
        )
        return mapped(p["t"], p["w"], b["ids"])

    _how = f"scan_in_shard_map{'' if _check else '_unchecked'}"
    program(name=_how, modes=JIT)(_scan_in_shard_map)


@program()
def shard_map_with_sharded_output(p, b):
    mapped = jax.shard_map(
        lambda t, ids: jnp.tanh(t)[ids], mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d")
    )
    return head(mapped(p["t"], b["ids"]), p["w"])


@program(sparse="", warns={"t": "shard_map"}, modes=JIT)
def shard_map_of_a_sharded_table(p, b):
    def local(t, ids):
        mine = ids - lax.axis_index("d") * (V // 2)
        rows = t.at[mine].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return lax.psum(rows, "d")

    mapped = jax.shard_map(local, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P())
    return head(mapped(p["t"], b["ids"]), p["w"])


@jax.custom_vjp
def clip_gradient(x):
    return jnp.sin(x)


def _clip_bwd(x, g):
    return (jnp.clip(g * jnp.cos(x), -0.1, 0.1),)


clip_gradient.defvjp(lambda x: (jnp.sin(x), x), _clip_bwd)


@jax.custom_jvp
def odd_cube(x):
    return x**3


odd_cube.defjvp(lambda x, dx: (x[0] ** 3, 7.0 * x[0] ** 2 * dx[0]))


@program()
def custom_vjp_on_rows(p, b):
    return head(clip_gradient(p["t"][b["ids"]]), p["w"])


@program()
def custom_jvp_on_rows(p, b):
    return head(odd_cube(jax.nn.relu(p["t"][b["ids"]])), p["w"])


@program(modes=JIT)
def custom_vjp_on_rows_in_scan(p, b):
    def body(h, i):
        return jnp.tanh(h * p["w"] + clip_gradient(p["t"][i])), None

    return jnp.sum(lax.scan(body, jnp.zeros(D), b["ids"])[0])


# --- several reads, several tables ----------------------------------------------------------


@program(batch=TWO_WAYS, listed=("ids", "other"))
def two_lookups(p, b):
    return head(p["t"][b["ids"]], p["w"]) + head(p["t"][b["other"]], 2 * p["w"])


@program(batch=TWO_WAYS, listed=("ids", "other"))
def query_and_key(p, b):
    key = jnp.take(p["t"], b["other"], axis=0) * p["w"]
    return jnp.sum(jnp.tanh(p["t"][b["ids"]] @ key.T))


@program(A_B_W, "a b", TWO_WAYS, listed={"a": "ids", "b": "other"})
def two_tables(p, b):
    return head(p["a"][b["ids"]], p["w"]) + head(p["b"][b["other"]], 2 * p["w"])


@program(A_B_W, "a b")
def sum_of_tables(p, b):
    return head((p["a"] + p["b"])[b["ids"]], p["w"])


@program(A_B_W, "a b", modes=JIT)
def weighted_sum_of_tables(p, b):
    return head((p["a"] + 2 * p["b"])[b["ids"]], p["w"])


@program(A_B_W, "a b", TWO_WAYS, listed={"a": ("ids", "other"), "b": "ids"}, modes=JIT)
def product_of_tables_and_lookup(p, b):
    return head((p["a"] * p["b"])[b["ids"]], p["w"]) + head(p["a"][b["other"]], p["w"])


def _links(t):
    return (jnp.abs(t) * 1e4).astype(jnp.int32) % V


@program(A_B_W, "a b", listed={"a": "ids", "b": None})
def dependent_lookups(p, b):
    rows = p["a"][b["ids"]]
    return head(p["b"][_links(rows[:, 0])] + rows, p["w"])


@program(A_B_W, "a b", listed={"a": nothing, "b": None}, touched={"a": "ids", "b": None})
def lookup_only_for_ids(p, b):
    return head(p["b"][_links(p["a"][b["ids"]][:, 0])], p["w"])


@program(listed=None)
def dependent_lookups_in_one_table(p, b):
    rows = p["t"][b["ids"]]
    return head(p["t"][_links(rows[:, 0])] + rows, p["w"])


def _shared():
    t = T_AND_W()["t"]
    return {"a": t, "b": t, "w": jnp.ones(D)}


@program(_shared, "a b", TWO_WAYS, listed={"a": "ids", "b": "other"})
def one_array_as_two_leaves(p, b):
    return head(p["a"][b["ids"]], p["w"]) + head(p["b"][b["other"]], 2 * p["w"])


# --- row-wise operations before the read ----------------------------------------------------


@program(rtol=2e-2)
def cast_then_read(p, b):
    return head(p["t"].astype(jnp.bfloat16)[b["ids"]].astype(jnp.float32), p["w"])


@program(modes=JIT)
def read_then_cast(p, b):
    return head(p["t"][b["ids"]].astype(jnp.bfloat16).astype(jnp.float32), p["w"])


@program(arrays(t=(V, D), w=(D,), s=()))
def scaled(p, b):
    return head((p["t"] * p["s"] / np.sqrt(D))[b["ids"]], p["w"])


@program(modes=JIT)
def scaled_by_column(p, b):
    return head((p["t"] * p["w"] - 1)[b["ids"]], p["w"])


@program()
def rows_of_norm_1(p, b):
    t = p["t"] / jnp.linalg.norm(p["t"], axis=1, keepdims=True)
    return head(t[b["ids"]], p["w"])


@program(ulps=2)
def softmax_of_rows(p, b):
    return head(jax.nn.softmax(p["t"], axis=-1)[b["ids"]], p["w"])


@program(arrays(t=(V, D), w=(2, 4)), modes=JIT)
def heads(p, b):
    return head(p["t"].reshape(V, 2, 4)[b["ids"]], p["w"])


@program(arrays(t=(V, 2, 4), w=(D,)), modes=JIT)
def heads_joined(p, b):
    return head(p["t"].transpose(0, 2, 1).reshape(V, -1)[b["ids"]], p["w"])


@program(modes=JIT)
def columns_then_read(p, b):
    return head(p["t"][:, 2:6][b["ids"]], p["w"][:4])


@program(batch={"ids": IDS, "mask": np.arange(V).reshape(V, 1).astype(np.float32) % 2}, modes=JIT)
def mask_of_rows(p, b):
    return head((p["t"] * b["mask"])[b["ids"]], p["w"])


@program(batch={"ids": IDS, "mask": np.arange(V) % 2 == 1}, modes=JIT)
def where_rows(p, b):
    return head(jnp.where(b["mask"][:, None], p["t"], 0.0)[b["ids"]], p["w"])


@program(arrays(t=(V, D), u=(V, 2), v=(2, D), w=(D,)), lean=False)
def low_rank(p, b):
    return head((p["t"] + p["u"] @ p["v"])[b["ids"]], p["w"])


@program()
def barrier(p, b):
    t, w = lax.optimization_barrier((p["t"], p["w"]))
    return head(t[b["ids"]], w)


@program(batch=TWO_WAYS, touched=("ids", "other"))
def stopped_table(p, b):
    target = head(lax.stop_gradient(p["t"])[b["other"]], p["w"])
    return head(p["t"][b["ids"]], p["w"]) + target


@program(batch=TWO_WAYS, touched=("ids", "other"), modes=JIT)
def stopped_rows(p, b):
    target = head(lax.stop_gradient(p["t"][b["other"]]), p["w"])
    return head(p["t"][b["ids"]], p["w"]) + target


@program(listed=nothing, touched="ids")
def stopped_alone(p, b):
    return head(lax.stop_gradient(p["t"])[b["ids"]], p["w"])


@program(
    A_B_W,
    "a b",
    TWO_WAYS,
    listed={"a": "ids", "b": nothing},
    touched={"a": "ids", "b": "other"},
    ulps=1,
)
def target_network(p, b):
    target = lax.stop_gradient(jnp.max(p["b"][b["other"]] @ p["w"]))
    return jnp.mean((p["a"][b["ids"]] @ p["w"] - target) ** 2)


@program(touched="ids", listed="ids", modes=JIT)
def straight_through(p, b):
    rows = p["t"][b["ids"]]
    return head(rows + lax.stop_gradient(jnp.round(rows) - rows), p["w"])


# --- what is done with the rows -------------------------------------------------------------


@program(batch={"ids": GRID}, modes=JIT)
def bag(p, b):
    return head(p["t"][b["ids"]].sum(1), p["w"])


@program(batch={"ids": IDS, "bags": np.array([0, 0, 1, 2, 2, 2], np.int32)}, modes=JIT)
def bag_by_segment_sum(p, b):
    rows = jax.ops.segment_sum(p["t"][b["ids"]], b["bags"], num_segments=4)
    return head(rows, p["w"])


@program()
def associative_scan(p, b):
    return head(lax.associative_scan(jnp.multiply, p["t"][b["ids"]]), p["w"])


@program(modes=JIT)
def one_layer_attention(p, b):
    x = p["t"][b["ids"]]
    return head(jax.nn.softmax(x @ x.T) @ x, p["w"])


# --- outputs --------------------------------------------------------------------------------


@program(has_aux=True)
def aux(p, b):
    rows = p["t"][b["ids"]]
    kept = {"rows": rows, "n": b["ids"].size, "half": 0.5, "none": None, "key": jax.random.key(1)}
    return head(rows, p["w"]), kept


@program(has_aux=True, modes=("eager",))
def aux_that_is_no_array(p, b):
    rows = p["t"][b["ids"]]
    kept = {"name": "loss", "rows": rows, "why": (len, None), "flag": True, "n": np.int8(3)}
    return head(rows, p["w"]), kept


def _negative_zeros():
    return {"t": jnp.full((V, D), -0.0), "w": jnp.ones(D)}


@program(_negative_zeros, has_aux=True)
def sign_of_zero(p, b):
    rows = p["t"][b["ids"]]
    return head(rows, p["w"]), rows


@program(has_aux=True, touched={"t": None})
def aux_is_the_table(p, b):
    return head(p["t"][b["ids"]], p["w"]), (p["t"], p)


@program(has_aux=True, touched={"t": None}, lean=False)
def aux_is_made_of_the_table(p, b):
    return head(p["t"][b["ids"]], p["w"]), (jnp.max(p["t"]), 2 * p["t"])


# --- se.lookup, se.lookup_bag ---------------------------------------------------------------

LOOKUP_OPTIONS = {
    "": ({}, wrapped),
    "_padding": ({"padding_idx": 3}, lambda b: [[0, 7, V - 1]]),
    "_padding_last": ({"padding_idx": -1}, lambda b: [[0, 3, 7]]),
    "_by_freq": ({"scale_grad_by_freq": True}, wrapped),
    "_clip": ({"mode": "clip"}, clipped),
    "_all": (
        {"mode": "clip", "padding_idx": 3, "scale_grad_by_freq": True},
        lambda b: [[0, 7, V - 1]],
    ),
}
for _name, (_options, _listed) in LOOKUP_OPTIONS.items():

    def _lookup_loss(p, b, options=_options):
        return head(se.lookup(p["t"], b["ids"], **options), p["w"])

    # A constant row, the padding, is read as well.
    _pad = [_options["padding_idx"] % V] if "padding_idx" in _options else []
    _touched = functools.partial(lambda b, listed, pad: [*listed(b), pad], listed=_listed, pad=_pad)
    program(name=f"lookup{_name}", listed=_listed, touched=_touched)(_lookup_loss)


@program(batch={"ids": OUTSIDE})
def lookup_outside(p, b):
    return head(no_nan(se.lookup(p["t"], b["ids"])), p["w"])


@program(batch={"ids": OUTSIDE}, listed=clipped, modes=JIT)
def lookup_outside_clip(p, b):
    return head(se.lookup(p["t"], b["ids"], mode="clip"), p["w"])


@program(arrays(t=((V, D), jnp.bfloat16), w=(D,)), rtol=2e-2, modes=JIT)
def lookup_bfloat16_by_freq(p, b):
    rows = se.lookup(p["t"], b["ids"], scale_grad_by_freq=True)
    return head(rows.astype(jnp.float32), p["w"])


@program(listed=lambda b: [[3, 7, V - 1]], touched="ids", modes=JIT)
def lookup_of_scaled_table_in_scan(p, b):
    def body(h, i):
        return jnp.tanh(h * p["w"] + se.lookup(2 * p["t"], i, padding_idx=0)), None

    return jnp.sum(lax.scan(body, jnp.zeros(D), b["ids"])[0])


WEIGHTS = np.linspace(-1, 2, GRID.size, dtype=np.float32)
BAGS = {"ids": GRID, "weights": WEIGHTS.reshape(GRID.shape)}
FLAT_BAGS = {"ids": GRID.reshape(-1), "weights": WEIGHTS}
FLAT_BAGS["offsets"] = np.array([0, 5, 5, 11], np.int32)
FLAT_BAGS["walls"] = np.array([0, 5, 5, 11, 12], np.int32)
FLAT_BAGS["segment_ids"] = np.array([0, 2, 2, 1, 0, 0, 2, 1, 1, 0, 0, 2], np.int32)


def bag_program(name, batch, arrays_of_batch=(), listed="ids", **options):
    def loss(p, b):
        given = {key if key != "walls" else "offsets": b[key] for key in arrays_of_batch}
        return head(no_nan(se.lookup_bag(p["t"], b["ids"], **given, **options)), p["w"])

    program(batch=batch, name=f"lookup_bag_{name}", listed=listed, modes=JIT)(loss)


for _combiner in ("sum", "mean", "sqrtn", "max", "min"):
    bag_program(_combiner, BAGS, combiner=_combiner)
    bag_program(f"{_combiner}_offsets", FLAT_BAGS, ("offsets",), combiner=_combiner)
    bag_program(
        f"{_combiner}_segments", FLAT_BAGS, ("segment_ids",), combiner=_combiner, num_segments=4
    )
    bag_program(
        f"{_combiner}_padding",
        BAGS,
        combiner=_combiner,
        padding_idx=3,
        listed=lambda b: [[0, 5, 6, 9, V - 1]],
    )
for _combiner in ("sum", "mean", "sqrtn"):
    bag_program(f"{_combiner}_weights", BAGS, ("weights",), combiner=_combiner)
bag_program("weights_segments", FLAT_BAGS, ("weights", "segment_ids"), num_segments=3)
bag_program("walls", FLAT_BAGS, ("walls",), num_segments=4)
bag_program("outside_clip", {"ids": OUTSIDE[None]}, mode="clip", listed=clipped)
bag_program("outside_fill", {"ids": OUTSIDE[:, None]})


# --- dense, and correct ---------------------------------------------------------------------


@program(sparse="", warns={"t": "gather"}, batch={"ids": IDS, "columns": IDS % D}, modes=JIT)
def elements_and_rows(p, b):
    return jnp.sum(jnp.tanh(p["t"][b["ids"], b["columns"]])) + head(p["t"][b["ids"]], p["w"])


@program(
    batch={"ids": IDS, "entries": np.arange(48).reshape(6, D) * 416},
    row_axes={"t": (0, 1)},
    listed=lambda b: [np.arange(48).reshape(6, D) * 416 * D + np.arange(D)],
    modes=JIT,
)
def take_along_axis(p, b):
    return head(jnp.take_along_axis(p["t"], b["entries"], axis=0), p["w"])


@program(modes=JIT)
def take_along_axis_of_whole_rows(p, b):
    return head(jnp.take_along_axis(p["t"], b["ids"][:, None], axis=0), p["w"])


@jax.custom_vjp
def custom_lookup(t, ids):
    return t[ids]


custom_lookup.defvjp(
    lambda t, ids: (t[ids], (t, ids)),
    lambda res, g: (jnp.zeros_like(res[0]).at[res[1]].add(3 * g), None),
)


@program(sparse="", warns={"t": "custom_vjp_call"}, modes=JIT)
def custom_vjp_lookup(p, b):
    return head(custom_lookup(p["t"], b["ids"]), p["w"])


@program(sparse="", warns={"t": "custom_vjp_call"}, modes=JIT)
def custom_vjp_on_table(p, b):
    return head(clip_gradient(p["t"])[b["ids"]], p["w"])


@program(sparse="", warns={"t": "custom_jvp_call"}, modes=JIT)
def custom_jvp_on_table(p, b):
    return head(odd_cube(p["t"])[b["ids"]], p["w"])


@program(sparse="", warns={"t": "custom_jvp_call"})
def relu_on_table(p, b):
    return head(jax.nn.relu(p["t"])[b["ids"]], p["w"])


@program(sparse="", warns={"t": "dot_general"}, rtol=1e-4)
def tied_softmax(p, b):
    h = p["t"][b["ids"]] * p["w"]
    return -jnp.sum(jax.nn.log_softmax(h @ p["t"].T)[:, 0])


@program(sparse="", warns={"t": "dot_general"}, rtol=1e-4, modes=JIT)
def tied_einsum(p, b):
    h = p["t"][b["ids"]] * p["w"]
    return jnp.sum(jnp.tanh(jnp.einsum("bd,vd->bv", h, p["t"])))


@program(sparse="", warns={"t": "reduce_sum"})
def l2(p, b):
    return head(p["t"][b["ids"]], p["w"]) + 1e-2 * jnp.sum(p["t"] ** 2)


@program(sparse="", warns={"t": "reduce_sum"}, modes=JIT)
def l2_in_scan(p, b):
    def body(h, i):
        return jnp.tanh(h * p["w"] + p["t"][i]) + 1e-6 * jnp.sum(p["t"] ** 2), None

    return jnp.sum(lax.scan(body, jnp.zeros(D), b["ids"])[0])


@program(
    A_B_W, "b", TWO_WAYS, warns={"a": "reduce_sum"}, listed={"b": "other"}, lean=False, modes=JIT
)
def l2_of_one_of_two(p, b):
    loss = head(p["a"][b["ids"]], p["w"]) + head(p["b"][b["other"]], p["w"])
    return loss + 1e-2 * jnp.sum(p["a"] ** 2)


@program(A_B_W, "", warns={"a": "reduce_sum", "b": "reduce_sum"}, modes=JIT)
def l2_of_a_sum(p, b):
    t = p["a"] + p["b"]
    return head(t[b["ids"]], p["w"]) + 1e-2 * jnp.sum(t**2)


@program(batch=TWO_WAYS, lean=False, touched={"t": None}, modes=JIT)
def norm_under_stop_gradient(p, b):
    scale = lax.stop_gradient(jnp.linalg.norm(p["t"]))
    return head(p["t"][b["ids"]] / scale, p["w"])


@program(sparse="", modes=JIT)
def l2_alone(p, b):
    return jnp.sum(p["t"] ** 2) + head(1, p["w"])


@program(sparse="", modes=JIT)
def one_hot(p, b):
    return head(jax.nn.one_hot(b["ids"], V) @ p["t"], p["w"])


@program(sparse="", warns={"t": "dot_general"}, modes=JIT)
def one_hot_and_lookup(p, b):
    return head(jax.nn.one_hot(b["ids"], V) @ p["t"] + p["t"][b["ids"]], p["w"])


@program(sparse="", modes=JIT)
def scan_over_table(p, b):
    h, _ = lax.scan(lambda h, row: (jnp.tanh(h * p["w"] + row), None), jnp.zeros(D), p["t"])
    return jnp.sum(h)


@program(sparse="", warns={"t": "scan"})
def scan_over_table_and_lookup(p, b):
    h, _ = lax.scan(lambda h, row: (jnp.tanh(h * p["w"] + row), None), jnp.zeros(D), p["t"])
    return jnp.sum(h) + head(p["t"][b["ids"]], p["w"])


@program(sparse="")
def unused(p, b):
    return head(1, p["w"])


@program(sparse="", warns={"t": "cond"}, batch={"ids": IDS, "flag": np.array(True)})
def table_out_of_cond(p, b):
    t = lax.cond(b["flag"], lambda: p["t"], lambda: 2 * p["t"])
    return head(t[b["ids"]], p["w"])


@program(sparse="", warns={"t": "scan"}, modes=JIT)
def table_changed_in_carry(p, b):
    def body(t, i):
        return t * 0.5, t[i]

    _, rows = lax.scan(body, p["t"], b["ids"])
    return head(rows, p["w"])


@program(sparse="", warns={"t": "checkpoint"}, modes=JIT)
def table_out_of_checkpoint(p, b):
    return head(jax.checkpoint(jnp.sin)(p["t"])[b["ids"]], p["w"])
