"""The exact optimizers, each beside the dense optax optimizer whose numbers it must give."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import QUICKLY

import sparse_embed as se

exact = se.exact

ROWS, WIDTH, BATCH, STEPS = 400, 3, 12, 1000


class Subject(NamedTuple):
    """`exact` and `dense` make the two optimizers from a schedule.

    Args:
      exact: schedule to the exact optimizer.
      dense: schedule to the dense one.
      peak: the peak of the schedule.
      float64: the bound on the distance in float64, over the distance travelled.
      touch_all: whether the first step must touch every row, as dense optax is NaN elsewhere.
      mixed: whether the tree has a matrix too, with a dense gradient.
    """

    exact: Any
    dense: Any
    peak: float = 0.01
    float64: float = 1e-10
    touch_all: bool = False
    mixed: bool = False


def rate(peak: float) -> optax.Schedule:
    """Warm-up and cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, 100, STEPS, peak / 100)


GROWING = optax.linear_schedule(0.01, 0.3, STEPS)  # a weight decay
CLIP = optax.clip_by_global_norm(0.05)


def _decay(moment: Any, decay: Any, mask: Any = None) -> Any:
    return lambda r: optax.chain(
        moment, optax.add_decayed_weights(decay, mask), optax.scale_by_learning_rate(r)
    )


def not_w(params: Any) -> Any:
    return {name: name != "w" for name in params}


MOMENTS = 1e-9  # the rule of two moments: as near as its tolerance asks for

SUBJECTS = {
    "sgd": Subject(exact.sgd, optax.sgd, 0.5),
    "sgd, L2": Subject(
        lambda r: exact.sgd(r, weight_decay=0.1),
        _decay(optax.identity(), 0.1),  # as optax.chain(add_decayed_weights, sgd)
        0.2,
    ),
    "momentum": Subject(lambda r: exact.sgd(r, 0.9), lambda r: optax.sgd(r, 0.9), 0.03),
    "nesterov, clipped, growing decay": Subject(
        lambda r: exact.sgd(r, 0.9, True, weight_decay=GROWING, before=CLIP),
        lambda r: optax.chain(CLIP, _decay(optax.trace(0.9, True), GROWING)(r)),
        0.2,
        mixed=True,
    ),
    "momentum 0": Subject(lambda r: exact.sgd(r, 0.0), lambda r: optax.sgd(r, 0.0), 0.5),
    "ema": Subject(
        exact.ema, lambda r: optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(r)), 0.5
    ),
    "ema, biased, decay": Subject(
        lambda r: exact.ema(r, 0.95, debias=False, weight_decay=0.1),
        _decay(optax.ema(0.95, debias=False), 0.1),
        0.2,
    ),
    "adagrad": Subject(exact.adagrad, optax.adagrad, 0.1),
    "adagrad, decay, mask": Subject(
        lambda r: exact.adagrad(r, weight_decay=0.1, mask=not_w),
        _decay(optax.scale_by_rss(), 0.1, not_w),
        0.1,
        mixed=True,
    ),
    "rmsprop": Subject(exact.rmsprop, optax.rmsprop),
    "rmsprop, eps outside": Subject(
        lambda r: exact.rmsprop(r, 0.95, 1e-6, 0.1, False),
        lambda r: optax.rmsprop(r, 0.95, 1e-6, 0.1, False),
    ),
    "rmsprop, centered, unbiased": Subject(
        lambda r: exact.rmsprop(r, centered=True, bias_correction=True),
        lambda r: optax.rmsprop(r, centered=True, bias_correction=True),
    ),
    "rmsprop, momentum": Subject(
        lambda r: exact.rmsprop(r, momentum=0.9), lambda r: optax.rmsprop(r, momentum=0.9), 0.002
    ),
    "rmsprop, centered, nesterov": Subject(
        lambda r: exact.rmsprop(r, centered=True, momentum=0.8, nesterov=True),
        lambda r: optax.rmsprop(r, centered=True, momentum=0.8, nesterov=True),
        0.002,
        mixed=True,
    ),
    "adadelta": Subject(exact.adadelta, optax.adadelta, 5.0),
    "adam": Subject(exact.adam, optax.adam, float64=MOMENTS),
    "adam, eps 0": Subject(
        lambda r: exact.adam(r, eps=0.0), lambda r: optax.adam(r, eps=0.0), touch_all=True
    ),
    "adam, eps 1e-3": Subject(
        lambda r: exact.adam(r, eps=1e-3), lambda r: optax.adam(r, eps=1e-3), float64=MOMENTS
    ),
    "adam, eps_root": Subject(
        lambda r: exact.adam(r, eps_root=1e-6), lambda r: optax.adam(r, eps_root=1e-6)
    ),
    "adam, b2 0.95": Subject(
        lambda r: exact.adam(r, b2=0.95), lambda r: optax.adam(r, b2=0.95), float64=MOMENTS
    ),
    "adam, b1 above b2": Subject(
        lambda r: exact.adam(r, 0.95, 0.9), lambda r: optax.adam(r, 0.95, 0.9), 0.005
    ),
    "adamw, clipped": Subject(
        lambda r: exact.adamw(r, weight_decay=0.1, before=CLIP),
        lambda r: optax.chain(CLIP, optax.adamw(r, weight_decay=0.1)),
        float64=MOMENTS,
    ),
    "adamw, growing decay, mask": Subject(
        lambda r: exact.adamw(r, weight_decay=GROWING, mask=not_w),
        lambda r: optax.adamw(r, weight_decay=GROWING, mask=not_w),
        float64=MOMENTS,
        mixed=True,
    ),
    "nadam, eps 0": Subject(
        lambda r: exact.nadam(r, eps=0.0), lambda r: optax.nadam(r, eps=0.0), touch_all=True
    ),
    "nadamw": Subject(exact.nadamw, optax.nadamw, float64=MOMENTS),
    "amsgrad": Subject(exact.amsgrad, optax.amsgrad),
    "amsgrad, biased, eps_root, decay": Subject(
        lambda r: exact.amsgrad(
            r, eps_root=1e-6, bias_correction_mu=False, bias_correction_nu=False, weight_decay=0.1
        ),
        _decay(
            optax.scale_by_amsgrad(
                eps_root=1e-6, bias_correction_mu=False, bias_correction_nu=False
            ),
            0.1,
        ),
        mixed=True,
    ),
    "adamax": Subject(exact.adamax, optax.adamax),
    "adamax, large eps": Subject(
        lambda r: exact.adamax(r, b2=0.99, eps=1e-3), lambda r: optax.adamax(r, b2=0.99, eps=1e-3)
    ),
    "adamaxw": Subject(
        lambda r: exact.adamaxw(r, weight_decay=0.1), lambda r: optax.adamaxw(r, weight_decay=0.1)
    ),
    "yogi": Subject(exact.yogi, optax.yogi, float64=MOMENTS),
    "adabelief": Subject(exact.adabelief, optax.adabelief),
    "adabelief, nesterov, decay": Subject(
        lambda r: exact.adabelief(r, nesterov=True, weight_decay=0.1),
        _decay(optax.scale_by_belief(nesterov=True), 0.1),
        mixed=True,
    ),
    "lion": Subject(
        lambda r: exact.lion(r, weight_decay=0.3),
        lambda r: optax.lion(r, weight_decay=0.3),
        0.003,
        mixed=True,
    ),
    "lion, no decay": Subject(
        lambda r: exact.lion(r, weight_decay=0.0), lambda r: optax.lion(r, weight_decay=0.0), 0.003
    ),
}

# Every family is run in both; variants in float64, and in tests/test_exact_gaps.py.
FLOAT32 = """
sgd, L2; nesterov, clipped, growing decay; ema; adagrad, decay, mask; rmsprop, momentum; adadelta;
adam; adam, eps 0; adamw, growing decay, mask; nadamw; amsgrad; adamaxw; yogi; adabelief; lion
"""
FLOAT32 = [name.strip() for name in FLOAT32.replace("\n", " ").split(";")]
ONLY_FLOAT32 = {"rmsprop, momentum", "adagrad, decay, mask", "nadamw", "amsgrad", "adamaxw"}
FLOAT64 = [name for name in SUBJECTS if name not in ONLY_FLOAT32]

REPLAYED = {
    "adan": optax.adan,
    "novograd": optax.novograd,
    "ademamix": optax.contrib.ademamix,
    "L2 under momentum": lambda r: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(r, momentum=0.9)
    ),
    "clip, adamw": lambda r: optax.chain(CLIP, optax.adamw(r)),
    "injected adam": lambda r: optax.inject_hyperparams(optax.adam)(r, b1=0.8),
    "adam, average": lambda r: optax.chain(optax.adam(r), se.params_ema(0.99)),
    "partition": lambda r: optax.partition(
        {"tables": optax.adam(r), "rest": optax.contrib.muon(r)},
        {"a": "tables", "w": "rest", "s": "tables"},
    ),
}


W = np.random.default_rng(4).normal(size=(WIDTH, 2))


def new_params(dtype: Any, mixed: bool = False) -> dict[str, Any]:
    """A table, and a scalar that gets a dense gradient; a matrix too where a subject is mixed."""
    draw = np.random.default_rng(1)
    params = {
        "a": 0.1 * draw.normal(size=(ROWS, WIDTH)),
        "w": W,
        "s": np.ones(()),
    }
    return {k: jnp.asarray(x, dtype) for k, x in params.items() if mixed or k != "w"}


def batches(dtype: Any) -> tuple[Any, Any]:
    """`[STEPS, BATCH]` Zipf ids, with gaps up to the whole run, and targets."""
    draw = np.random.default_rng(2)
    weights = 1 / np.arange(1, ROWS + 1) ** 1.3
    ids = draw.choice(ROWS, (STEPS, BATCH), p=weights / weights.sum()).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(draw.normal(size=(STEPS, BATCH)), dtype)


def every_row(dtype: Any) -> tuple[Any, Any]:
    """A batch that reads all rows."""
    return jnp.arange(ROWS, dtype=jnp.int32), jnp.zeros(ROWS, dtype)


def loss_fn(params: dict[str, Any], batch: Any) -> Any:
    ids, targets = batch
    rows = params["a"][ids]
    w = params.get("w", jnp.asarray(W, rows.dtype))
    out = jnp.tanh(rows @ w).sum(-1) * params["s"]
    return jnp.mean((out - targets) ** 2)


def dense_step(tx: Any) -> Any:
    """Stock JAX and optax."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


class Run(NamedTuple):
    """A run: params and state at several points, and every loss."""

    params: list[Any]
    states: list[Any]
    losses: np.ndarray


def run(tx: Any, subject: Subject, dtype: Any, *, steps: int = STEPS, points: int = 4) -> Run:
    """Trains, and looks at everything `points` times; an exact optimizer settles all rows then."""
    settle = getattr(tx, "settle", None)
    row_sparse = settle is not None or "lazy" in tx.update.__qualname__
    step = se.train_step(loss_fn, tx) if row_sparse else dense_step(tx)
    ids, targets = batches(dtype)
    size = steps // points
    cut = [(ids[i : i + size], targets[i : i + size]) for i in range(0, steps, size)]

    # In float64 the bounds are so near that the rounding of a sum shows.
    @functools.partial(jax.jit, compiler_options=QUICKLY if dtype == jnp.float32 else None)
    def part(carry: Any, batches: Any) -> Any:
        def one(carry: Any, batch: Any) -> Any:
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        carry, losses = jax.lax.scan(one, carry, batches)
        if settle is None:
            return carry, losses
        params, state = settle(*carry)
        return (params, state.unsettled()), losses

    params = new_params(dtype, subject.mixed)
    state, losses = tx.init(params), np.zeros(0)
    if subject.touch_all:
        params, state, _ = jax.jit(lambda *args: step(*args))(params, state, every_row(dtype))
    found_params, found_states = [], []
    for own in cut:
        (params, state), some = part((params, state), own)
        losses = np.append(losses, np.asarray(some, np.float64))
        found_params.append(params)
        found_states.append(state if settle is None else state.inner_state)
    return Run(found_params, found_states, losses)


def distance(got: Any, want: Any, start: Any) -> float:
    """`|got - want| / |want - start|` over all entries of the trees."""

    def norm(a: Any, b: Any) -> float:
        parts = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return np.sqrt(sum(np.sum((np.float64(x) - np.float64(y)) ** 2) for x, y in parts))

    return norm(got, want) / norm(want, start)
