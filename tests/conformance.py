"""What `se.lazy` makes of every transformation of optax: the table, and the page written from it.

To add a transformation, add a row to `SUBJECTS`: its name as it is written after `optax.`, how to
build it, the verdict, and a note or, where it is refused, words of the reason. The laws of
`test_conformance.py` run over all rows and say what a row claims wrongly. Then write
`docs/conformance.md` anew, with `python tests/conformance.py`, and commit both.

A public name of optax that makes no transformation goes into `OTHER_NAMES`; most are recognised
without that (losses, schedules, states and other types).
"""

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"

# The parameters that the laws update. `kernel` has as many columns as `items` has rows. `users` is
# so tall that a copy of it stands out in the memory of a compiled step.
HEIGHT = 20_000
SHAPES = {"bias": (6,), "items": (6, 4), "kernel": (4, 6), "scale": (), "users": (HEIGHT, 2, 3)}
TABLES = ("items", "users")
MATRICES = ("items", "kernel")


@dataclass(frozen=True)
class Subject:
    """A transformation and what is expected of it.

    Args:
      name: as it is written after `optax.`.
      verdict: `"exact"`: all of the table and the state are as with dense optax. `"lazy"`: touched
        rows are as with dense optax, all others stay. `"refused"`: with `reason`. `"not
        applicable"`: it asks for another loop or other params; optax says `reason`.
      make: builds it.
      note: what a user should know.
      variant: arguments that set this row apart from others of the same name.
      reason: words of the error.
      at: where it is refused, `"init"` or `"update"`.
      extra: `params -> extra arguments` of `update`.
      leaves: the parameters that it can take; all by default.
      strict: it does not take unknown extra arguments, in stock optax either.
    """

    name: str
    verdict: str
    make: Callable[[], optax.GradientTransformation]
    note: str = ""
    variant: str = ""
    reason: str = ""
    at: str = "init"
    extra: Callable[[Any], dict[str, Any]] = lambda params: {}
    leaves: tuple[str, ...] = tuple(SHAPES)
    strict: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}({self.variant})" if self.variant else self.name

    @property
    def accepted(self) -> bool:
        return self.verdict in ("exact", "lazy")

    def build(self) -> optax.GradientTransformation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.make()


def loss(params: Any) -> jax.Array:
    """A loss that reads the tables by row, for what evaluates the loss inside `update`."""
    total = jnp.zeros(())
    for name, x in params.items():
        total += jnp.sum(jnp.take(x, jnp.array([1, 3]), axis=0) ** 2 if name in TABLES else x**2)
    return total


def every_leaf(params: Any, of: Callable[[str], Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: of(path[-1].key), params)


def tables(params: Any) -> Any:
    return every_leaf(params, lambda name: name in TABLES)


def kinds(params: Any) -> Any:
    return every_leaf(params, lambda name: "tables" if name in TABLES else "rest")


def with_value(params: Any) -> dict[str, Any]:
    return {"value": jnp.float32(1.5)}


def with_value_fn(params: Any) -> dict[str, Any]:
    return {"value": loss(params), "grad": jax.grad(loss)(params), "value_fn": loss}


def even(step: jax.Array) -> jax.Array:
    return step % 2 == 0


def adam() -> optax.GradientTransformation:
    return optax.adam(0.1)


contrib = optax.contrib
MATRIX = "works on the whole matrix"
NORM = "needs the norm of all rows of the parameters"
TOUCHED_NORM = "the norm is had from the touched rows: all others add zero"
MOMENTS = "the moments of a row decay when it is touched; counts are global"
RANDOM = "draws one number for every entry of the table"
INNER = "as the inner transformation"
LATE = (
    "only rows touched in the emitting step move; what another row gathered is overwritten when it "
    "is touched in the first step of a later round"
)

Make = Callable[[], optax.GradientTransformation]


def exact(name: str, make: Make, note: str = "", **more: Any) -> Subject:
    return Subject(name, "exact", make, note, **more)


def lazy(name: str, make: Make, note: str = MOMENTS, **more: Any) -> Subject:
    return Subject(name, "lazy", make, note, **more)


def refused(name: str, make: Make, note: str, **more: Any) -> Subject:
    return Subject(name, "refused", make, note, **more)


def foreign(name: str, make: Make, note: str, **more: Any) -> Subject:
    return Subject(name, "not applicable", make, note, **more)


SUBJECTS = [
    # --- optimizers -----------------------------------------------------------------------------
    lazy("adabelief", lambda: optax.adabelief(0.1)),
    lazy("adadelta", lambda: optax.adadelta(0.1)),
    refused(
        "adafactor",
        lambda: optax.adafactor(0.1),
        "needs the root mean square of all rows of the parameters",
        reason="scale_by_param_block_rms adds up all rows",
    ),
    lazy(
        "adafactor",
        lambda: optax.adafactor(0.1, multiply_by_parameter_scale=False),
        "while the table has a dimension below `min_dim_size_to_factor` (128); " + MOMENTS,
        variant="multiply_by_parameter_scale=False",
    ),
    refused(
        "adafactor",
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
        "keeps statistics of the columns",
        variant="min_dim_size_to_factor=2",
        reason="its state mixes the rows of a table with other numbers",
    ),
    exact("adagrad", lambda: optax.adagrad(0.1)),
    lazy("adam", adam, MOMENTS + '; `clock="row"` counts for each row'),
    lazy(
        "adam",
        lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16, nesterov=True),
        variant="mu_dtype=bfloat16, nesterov=True",
    ),
    lazy("adamax", lambda: optax.adamax(0.1)),
    lazy("adamaxw", lambda: optax.adamaxw(0.1), MOMENTS + "; weight decay when touched"),
    lazy("adamw", lambda: optax.adamw(0.1), MOMENTS + "; weight decay when touched"),
    lazy(
        "adan",
        lambda: optax.adan(0.1),
        "the previous gradient of a row is that of its last touch; " + MOMENTS,
    ),
    lazy("amsgrad", lambda: optax.amsgrad(0.1)),
    refused(
        "fromage", lambda: optax.fromage(0.1), NORM, reason="scale_by_trust_ratio adds up all rows"
    ),
    refused("lamb", lambda: optax.lamb(0.1), NORM, reason="scale_by_trust_ratio adds up all rows"),
    refused("lars", lambda: optax.lars(0.1), NORM, reason="scale_by_trust_ratio adds up all rows"),
    refused(
        "lbfgs",
        lambda: optax.lbfgs(0.1),
        "a history of whole gradients, and a line search",
        at="update",
        reason="its state mixes the rows of a table with other numbers",
        extra=with_value_fn,
    ),
    refused(
        "lbfgs",
        lambda: optax.lbfgs(0.1, linesearch=None),
        "inner products with a history of whole gradients",
        variant="linesearch=None",
        reason="in scale_by_lbfgs needs all rows at once",
    ),
    lazy("lion", lambda: optax.lion(0.1), MOMENTS + "; weight decay when touched"),
    lazy("nadam", lambda: optax.nadam(0.1)),
    lazy("nadamw", lambda: optax.nadamw(0.1), MOMENTS + "; weight decay when touched"),
    refused(
        "noisy_sgd",
        lambda: optax.noisy_sgd(0.1, key=0),
        RANDOM,
        reason="`add` in add_noise takes an array made for every row",
    ),
    lazy(
        "novograd",
        lambda: optax.novograd(0.1),
        "the norm of the gradient is had from the touched rows; " + MOMENTS,
    ),
    lazy("optimistic_adam", lambda: optax.optimistic_adam(0.1), "deprecated in optax; " + MOMENTS),
    lazy("optimistic_adam_v2", lambda: optax.optimistic_adam_v2(0.1)),
    lazy(
        "optimistic_gradient_descent",
        lambda: optax.optimistic_gradient_descent(0.1),
        "the previous gradient of a row is that of its last touch",
    ),
    exact("polyak_sgd", lambda: optax.polyak_sgd(0.1), TOUCHED_NORM, extra=with_value),
    lazy("radam", lambda: optax.radam(0.1)),
    lazy("rmsprop", lambda: optax.rmsprop(0.1)),
    lazy("rmsprop", lambda: optax.rmsprop(0.1, centered=True), variant="centered=True"),
    lazy("rmsprop", lambda: optax.rmsprop(0.1, momentum=0.9), variant="momentum=0.9"),
    lazy(
        "rprop", lambda: optax.rprop(0.1), "signs are compared with those of the row's last touch"
    ),
    exact("sgd", lambda: optax.sgd(0.1)),
    lazy(
        "sgd",
        lambda: optax.sgd(0.1, momentum=0.9),
        "momentum moves a row when it is touched",
        variant="momentum=0.9",
    ),
    lazy(
        "sgd",
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        "momentum moves a row when it is touched",
        variant="momentum=0.9, nesterov=True",
    ),
    exact("sign_sgd", lambda: optax.sign_sgd(0.1)),
    lazy("signum", lambda: optax.signum(0.1), "momentum moves a row when it is touched"),
    refused(
        "sm3",
        lambda: optax.sm3(0.1),
        "keeps the largest squares of the columns",
        reason="scale_by_sm3 compares all rows",
        leaves=("bias", "items", "kernel", "users"),
    ),
    lazy("yogi", lambda: optax.yogi(0.1)),
    # --- transformations ------------------------------------------------------------------------
    refused(
        "adaptive_grad_clip",
        lambda: optax.adaptive_grad_clip(0.1),
        "needs the norms of the columns of the parameters",
        reason="adaptive_grad_clip adds up all rows",
    ),
    lazy(
        "add_decayed_weights", lambda: optax.add_decayed_weights(0.1), "weight decay when touched"
    ),
    refused(
        "add_noise",
        lambda: optax.add_noise(0.1, 0.1, key=0),
        RANDOM,
        reason="`add` in add_noise takes an array made for every row",
    ),
    lazy(
        "apply_every",
        lambda: optax.apply_every(3),
        LATE + '; `clock="row"` makes every row emit at its own third touch',
    ),
    exact("centralize", lambda: optax.centralize()),
    exact("clip", lambda: optax.clip(0.1)),
    exact(
        "clip_by_block_rms",
        lambda: optax.clip_by_block_rms(0.1),
        "the mean is over all entries of the table",
    ),
    exact("clip_by_global_norm", lambda: optax.clip_by_global_norm(0.5), TOUCHED_NORM),
    lazy("ema", lambda: optax.ema(0.9)),
    exact("freeze", lambda: optax.freeze(tables), "frozen tables get zero updates"),
    exact("identity", lambda: optax.identity()),
    lazy(
        "keep_params_nonnegative",
        lambda: optax.keep_params_nonnegative(),
        "negative entries of a row are mended when it is touched; exact where there are none",
    ),
    refused(
        "measure_with_ema",
        lambda: optax.measure_with_ema(optax.tree.norm, 0.9),
        "a part of `monitor`, no transformation of gradients",
        reason="turns the updates into another tree",
    ),
    refused(
        "monitor",
        lambda: optax.monitor({"norm": optax.tree.norm}),
        "its first update changes the tree of its state; `snapshot` does the same for one number",
        reason="turns the state into another tree",
    ),
    exact("normalize_by_update_norm", lambda: optax.normalize_by_update_norm(), TOUCHED_NORM),
    exact("scale", lambda: optax.scale(-0.1)),
    lazy("scale_by_adadelta", lambda: optax.scale_by_adadelta()),
    lazy("scale_by_adam", lambda: optax.scale_by_adam()),
    lazy("scale_by_adamax", lambda: optax.scale_by_adamax()),
    lazy("scale_by_adan", lambda: optax.scale_by_adan()),
    lazy("scale_by_amsgrad", lambda: optax.scale_by_amsgrad()),
    refused(
        "scale_by_backtracking_linesearch",
        lambda: optax.scale_by_backtracking_linesearch(5),
        "evaluates the loss along the whole update",
        at="update",
        reason="in scale_by_backtracking_linesearch needs all rows at once",
        extra=with_value_fn,
    ),
    lazy("scale_by_belief", lambda: optax.scale_by_belief()),
    refused(
        "scale_by_distance_over_gradients",
        lambda: optax.scale_by_distance_over_gradients(),
        "needs the distance of all rows from their start",
        reason="scale_by_distance_over_gradients adds up all rows",
    ),
    lazy(
        "scale_by_factored_rms",
        lambda: optax.scale_by_factored_rms(),
        "while the table has a dimension below `min_dim_size_to_factor` (128); " + MOMENTS,
    ),
    refused(
        "scale_by_factored_rms",
        lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        "keeps statistics of the columns",
        variant="min_dim_size_to_factor=2",
        reason="its state mixes the rows of a table with other numbers",
    ),
    refused(
        "scale_by_lbfgs",
        lambda: optax.scale_by_lbfgs(),
        "inner products with a history of whole gradients",
        reason="in scale_by_lbfgs needs all rows at once",
    ),
    exact(
        "scale_by_learning_rate",
        lambda: optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.01, 9)),
        "schedules count every step",
    ),
    lazy("scale_by_lion", lambda: optax.scale_by_lion()),
    lazy(
        "scale_by_novograd",
        lambda: optax.scale_by_novograd(),
        "the norm of the gradient is had from the touched rows; " + MOMENTS,
    ),
    lazy(
        "scale_by_optimistic_gradient",
        lambda: optax.scale_by_optimistic_gradient(),
        "the previous gradient of a row is that of its last touch",
    ),
    refused(
        "scale_by_param_block_norm",
        lambda: optax.scale_by_param_block_norm(),
        NORM,
        reason="scale_by_param_block_norm adds up all rows",
    ),
    refused(
        "scale_by_param_block_rms",
        lambda: optax.scale_by_param_block_rms(),
        "needs the root mean square of all rows of the parameters",
        reason="scale_by_param_block_rms adds up all rows",
    ),
    exact("scale_by_polyak", lambda: optax.scale_by_polyak(), TOUCHED_NORM, extra=with_value),
    lazy("scale_by_radam", lambda: optax.scale_by_radam()),
    lazy("scale_by_rms", lambda: optax.scale_by_rms()),
    lazy(
        "scale_by_rprop",
        lambda: optax.scale_by_rprop(0.1),
        "signs are compared with those of the row's last touch",
    ),
    exact("scale_by_rss", lambda: optax.scale_by_rss()),
    exact(
        "scale_by_schedule",
        lambda: optax.scale_by_schedule(optax.linear_schedule(0.1, 0.01, 9)),
        "schedules count every step",
    ),
    exact("scale_by_sign", lambda: optax.scale_by_sign()),
    refused(
        "scale_by_sm3",
        lambda: optax.scale_by_sm3(),
        "keeps the largest squares of the columns",
        reason="scale_by_sm3 compares all rows",
        leaves=("bias", "items", "kernel", "users"),
    ),
    lazy("scale_by_stddev", lambda: optax.scale_by_stddev()),
    refused(
        "scale_by_trust_ratio",
        lambda: optax.scale_by_trust_ratio(),
        NORM,
        reason="scale_by_trust_ratio adds up all rows",
    ),
    lazy("scale_by_yogi", lambda: optax.scale_by_yogi()),
    refused(
        "scale_by_zoom_linesearch",
        lambda: optax.scale_by_zoom_linesearch(5),
        "evaluates the loss along the whole update",
        at="update",
        reason="in scale_by_zoom_linesearch needs all rows at once",
        extra=with_value_fn,
    ),
    exact("set_to_zero", lambda: optax.set_to_zero()),
    exact(
        "snapshot",
        lambda: optax.snapshot("norm", optax.tree.norm),
        "for what the touched rows determine, such as the norm of the gradient",
    ),
    exact(
        "stateless",
        lambda: optax.stateless(lambda u, p: jax.tree.map(lambda x: -0.1 * x, u)),
        "for functions that work on each row alone",
    ),
    lazy(
        "stateless_with_tree_map",
        lambda: optax.stateless_with_tree_map(lambda g, p: -0.1 * (g + p)),
        "for functions that work on each row alone",
    ),
    lazy("trace", lambda: optax.trace(0.9)),
    exact("zero_nans", lambda: optax.zero_nans()),
    # --- wrappers -------------------------------------------------------------------------------
    lazy(
        "MultiSteps",
        lambda: optax.MultiSteps(adam(), 3),
        LATE,
        variant="adam, 3",
    ),
    lazy(
        "MultiSteps",
        lambda: optax.MultiSteps(adam(), 3, use_grad_mean=False),
        "only rows touched in the emitting step move; other sums wait until their row is there",
        variant="adam, 3, use_grad_mean=False",
    ),
    lazy("apply_if_finite", lambda: optax.apply_if_finite(adam(), 3), INNER, variant="adam, 3"),
    lazy(
        "chain",
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 20))
        ),
        INNER,
        variant="clip_by_global_norm, adamw(schedule)",
    ),
    refused(
        "chain",
        lambda: optax.chain(adam(), optax.clip_by_global_norm(0.5)),
        "clipping after momentum needs the updates of all rows: clip first",
        variant="adam, clip_by_global_norm",
        reason="adds up all rows",
    ),
    lazy(
        "conditionally_mask",
        lambda: optax.conditionally_mask(adam(), even),
        INNER,
        variant="adam, even",
    ),
    lazy(
        "conditionally_transform",
        lambda: optax.conditionally_transform(adam(), even),
        INNER,
        variant="adam, even",
    ),
    refused(
        "flatten",
        lambda: optax.flatten(adam()),
        "joins all leaves in one vector",
        variant="adam",
        reason="in flatten needs all rows at once",
    ),
    lazy(
        "inject_hyperparams",
        lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 9)),
        INNER,
        variant="adam(schedule)",
    ),
    lazy(
        "inject_stateful_hyperparams",
        lambda: optax.inject_stateful_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 9)),
        INNER,
        variant="adam(schedule)",
    ),
    foreign(
        "lookahead",
        lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5),
        "its params are pairs of fast and slow ones",
        variant="sgd",
        reason="has no attribute 'fast'",
    ),
    lazy("masked", lambda: optax.masked(adam(), tables), INNER, variant="adam, tables"),
    exact(
        "masked",
        lambda: optax.masked(adam(), lambda p: every_leaf(p, lambda name: name not in TABLES)),
        INNER,
        variant="adam, dense leaves",
    ),
    lazy(
        "multi_transform",
        lambda: optax.multi_transform({"tables": adam(), "rest": optax.sgd(0.1)}, kinds),
        INNER,
        variant="tables: adam, rest: sgd",
    ),
    lazy(
        "named_chain",
        lambda: optax.named_chain(("clip", optax.clip(0.1)), ("adam", adam())),
        INNER,
        variant="clip, adam",
    ),
    lazy(
        "partition",
        lambda: optax.partition({"tables": adam(), "rest": contrib.muon(0.1)}, kinds),
        INNER,
        variant="tables: adam, rest: muon",
    ),
    refused(
        "partition",
        lambda: optax.partition(
            {
                "tables": contrib.muon(
                    0.1,
                    muon_weight_dimension_numbers=lambda p: jax.tree.map(
                        lambda x: contrib.MuonDimensionNumbers(), p
                    ),
                ),
                "rest": adam(),
            },
            kinds,
        ),
        "what is wrong is the part that gets a table",
        variant="tables: muon, rest: adam",
        at="update",
        reason="in scale_by_muon needs all rows at once",
    ),
    lazy(
        "selective_transform",
        lambda: optax.selective_transform(
            adam(), freeze_mask={name: name == "bias" for name in SHAPES}
        ),
        INNER,
        variant="adam, freeze_mask=bias",
    ),
    lazy(
        "with_extra_args_support",
        lambda: optax.with_extra_args_support(adam()),
        INNER,
        variant="adam",
    ),
    # --- contrib --------------------------------------------------------------------------------
    lazy(
        "contrib.acprop",
        lambda: contrib.acprop(0.1),
        "as in dense optax, a row first touched after the first step is divided by `eps`; "
        + MOMENTS,
    ),
    lazy("contrib.ademamix", lambda: contrib.ademamix(0.1)),
    lazy("contrib.adopt", lambda: contrib.adopt(0.1)),
    exact("contrib.cocob", lambda: contrib.cocob(0.1)),
    refused(
        "contrib.dadapt_adamw",
        lambda: contrib.dadapt_adamw(0.1),
        "estimates one distance from the moments of all rows",
        reason="in dadapt_adamw needs all rows at once",
    ),
    foreign(
        "contrib.differentially_private_aggregate",
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, 0),
        "takes one gradient for each example",
        reason="expects `grads` to have a batch dimension",
        at="update",
    ),
    refused(
        "contrib.dog",
        lambda: contrib.dog(),
        "needs the distance of all rows from their start",
        reason="scale_by_dog adds up all rows",
    ),
    refused(
        "contrib.dowg",
        lambda: contrib.dowg(),
        "needs the distance of all rows from their start",
        reason="scale_by_dowg adds up all rows",
    ),
    foreign(
        "contrib.dpsgd",
        lambda: contrib.dpsgd(0.1, 1.0, 0.1, 0),
        "takes one gradient for each example",
        reason="expects `grads` to have a batch dimension",
        at="update",
    ),
    refused(
        "contrib.galore",
        lambda: contrib.galore(0.1, rank=2),
        MATRIX,
        variant="rank=2",
        reason="`svd` in scale_by_galore needs all rows at once",
    ),
    refused(
        "contrib.hutchinson_estimator_diag_hessian",
        lambda: contrib.hutchinson_estimator_diag_hessian(jax.random.key(0)),
        RANDOM,
        at="update",
        extra=lambda p: {"obj_fn": loss},
        reason="a value is made for every row of the table",
    ),
    lazy("contrib.madgrad", lambda: contrib.madgrad(0.1)),
    refused(
        "contrib.mechanize",
        lambda: contrib.mechanize(optax.sgd(0.1)),
        "inner products with the distance of all rows from their start",
        variant="sgd",
        reason="mechanize adds up all rows",
    ),
    refused(
        "contrib.momo",
        lambda: contrib.momo(0.1),
        "inner products with the momentum of all rows",
        reason="in momo needs all rows at once",
        extra=with_value,
    ),
    refused(
        "contrib.momo_adam",
        lambda: contrib.momo_adam(0.1),
        "inner products with the momentum of all rows",
        reason="in momo_adam needs all rows at once",
        extra=with_value,
    ),
    refused(
        "contrib.muon",
        lambda: contrib.muon(0.1),
        MATRIX + "; tables of 3 dimensions are left to its Adam and accepted",
        reason="in scale_by_muon needs all rows at once",
        leaves=MATRICES,
    ),
    exact("contrib.normalize", lambda: contrib.normalize(), TOUCHED_NORM),
    refused(
        "contrib.prodigy",
        lambda: contrib.prodigy(0.1),
        "estimates one distance from the moments of all rows",
        reason="in prodigy needs all rows at once",
    ),
    exact(
        "contrib.reduce_on_plateau", lambda: contrib.reduce_on_plateau(patience=2), extra=with_value
    ),
    lazy(
        "contrib.sam",
        lambda: contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
        "both steps of a pair must read the same rows: one of the first alone stays displaced",
        variant="sgd, normalized sgd",
        strict=True,
    ),
    refused(
        "contrib.sam",
        lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
        "reads the table by row inside its update",
        variant="opaque_mode=True",
        at="update",
        reason="`gather` in the transform needs all rows at once",
        extra=lambda p: {"grad_fn": lambda q, i: jax.grad(loss)(q)},
    ),
    lazy("contrib.scale_by_acprop", lambda: contrib.scale_by_acprop(), "as `contrib.acprop`"),
    lazy("contrib.scale_by_ademamix", lambda: contrib.scale_by_ademamix()),
    lazy("contrib.scale_by_adopt", lambda: contrib.scale_by_adopt()),
    exact("contrib.scale_by_cocob", lambda: contrib.scale_by_cocob()),
    refused(
        "contrib.scale_by_galore",
        lambda: contrib.scale_by_galore(rank=2),
        MATRIX,
        variant="rank=2",
        reason="`svd` in scale_by_galore needs all rows at once",
        leaves=MATRICES,
    ),
    lazy("contrib.scale_by_madgrad", lambda: contrib.scale_by_madgrad(0.1)),
    refused(
        "contrib.scale_by_muon",
        lambda: contrib.scale_by_muon(
            weight_dimension_numbers=lambda p: jax.tree.map(
                lambda x: contrib.MuonDimensionNumbers(), p
            )
        ),
        MATRIX,
        reason="in scale_by_muon needs all rows at once",
        leaves=MATRICES,
    ),
    lazy("contrib.scale_by_simplified_ademamix", lambda: contrib.scale_by_simplified_ademamix()),
    lazy(
        "contrib.schedule_free",
        lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
        "the average of a row moves when it is touched; counts and weights are global",
        variant="sgd",
    ),
    lazy(
        "contrib.schedule_free_adamw",
        lambda: contrib.schedule_free_adamw(0.1),
        "the average of a row moves when it is touched; counts and weights are global",
    ),
    lazy(
        "contrib.schedule_free_sgd",
        lambda: contrib.schedule_free_sgd(0.1),
        "the average of a row moves when it is touched; counts and weights are global",
    ),
    lazy("contrib.simplified_ademamix", lambda: contrib.simplified_ademamix(0.1)),
    refused(
        "contrib.sophia",
        lambda: contrib.sophia(0.1),
        "estimates the Hessian of the whole table with random numbers",
        at="update",
        extra=lambda p: {"obj_fn": loss},
        reason="in scale_by_sophia",
    ),
    lazy(
        "contrib.split_real_and_imaginary",
        lambda: contrib.split_real_and_imaginary(adam()),
        INNER,
        variant="adam",
    ),
]


# --- is every public name of optax classified? ----------------------------------------------------

NAMESPACES = {"": optax, "transforms.": optax.transforms, "contrib.": optax.contrib}

# Names of these modules are what the module is called, unless they make a transformation.
KINDS = [
    optax.losses,
    optax.schedules,
    optax.projections,
    optax.perturbations,
    optax.second_order,
    optax.assignment,
    optax.microbatching,
    optax.tree,
    optax.tree_utils,
]

OTHER_NAMES = frozenset(
    """
    GradientTransformation GradientTransformationExtraArgs WrappedSchedule
    MaskOrFn OptState Params Schedule ScalarOrSchedule Updates
    apply_updates incremental_update periodic_update init_empty_state value_and_grad_from_state
    per_example_global_norm_clip per_example_layer_norm_clip
    transforms.unitwise_clip transforms.unitwise_norm
    skip_large_updates skip_not_finite contrib.schedule_free_eval_params
    global_norm safe_norm safe_root_mean_squares safe_increment safe_int32_increment
    matrix_inverse_pth_root power_iteration nnls multi_normal scale_gradient
    bias_correction update_infinity_moment update_moment update_moment_per_elem_norm
    tree_map_params
    """.split()
)


def public_names() -> Iterator[tuple[str, Any]]:
    """What a user may type after `optax.`; what is there under two names, once."""
    for prefix, namespace in NAMESPACES.items():
        for name, value in vars(namespace).items():
            again = prefix and vars(optax).get(name) is value
            if not (name.startswith("_") or isinstance(value, types.ModuleType) or again):
                yield prefix + name, value


def makes_a_transformation(value: Any) -> bool:
    """Whether its annotations say that it returns or takes a transformation."""
    if isinstance(value, type):
        return hasattr(value, "init") and hasattr(value, "update")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return False
    annotations = [signature.return_annotation]
    annotations += [p.annotation for p in signature.parameters.values()]
    return any("GradientTransformation" in str(a) for a in annotations)


def unclassified() -> list[str]:
    """Public names of the installed optax that are neither a row nor known to be something else."""
    rows = {s.name for s in SUBJECTS}
    known = [value for module in KINDS for value in vars(module).values()]
    found = []
    for name, value in public_names():
        if name in rows or name in OTHER_NAMES:
            continue
        is_type = isinstance(value, type) or any(value is x for x in known)
        if makes_a_transformation(value) or not is_type:
            found.append(name)
    return found


def present(subject: Subject) -> bool:
    """Whether the installed optax has it: old names go as new ones come."""
    value: Any = optax
    for part in subject.name.split("."):
        value = vars(value).get(part)
    return value is not None


# --- the page -------------------------------------------------------------------------------------

_HEAD = """\
# What `se.lazy` makes of each optax transformation

Written by `python tests/conformance.py` from the table in that file; every row of it is tested.

- **exact**: the whole table and the optimizer's state are as with dense optax.
- **lazy**: touched rows are as with dense optax; all other rows, and their state, stay as they are.
- **refused**: raises with the reason, at `init` or, where only the gradients tell, at `update`.
- **not applicable**: it asks for another loop or other parameters than `se.lazy` is for.

| `optax.` | verdict | reason or note |
|---|---|---|
"""


def page() -> str:
    """The text of `docs/conformance.md`."""
    lines = []
    for s in SUBJECTS:
        told = f"{s.note} (“{s.reason}”)" if s.verdict == "refused" else s.note
        where = " at `update`" if s.verdict == "refused" and s.at == "update" else ""
        lines.append(f"| `{s.label}` | {s.verdict}{where} | {told} |\n")
    return _HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
