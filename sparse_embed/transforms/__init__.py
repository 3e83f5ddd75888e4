"""Optax transformations that optax lacks.

In: what any optax transformation is made with.
Out: a stock `optax.GradientTransformation`, for dense gradients too, or inside `se.lazy`.
Never: a `RowSparse`. Rows are the business of `lazy`, not of an optimizer's formula.
"""

from sparse_embed.transforms._params_ema import ParamsEmaState as ParamsEmaState
from sparse_embed.transforms._params_ema import params_ema as params_ema
from sparse_embed.transforms._rowwise_adagrad import RowwiseAdagradState as RowwiseAdagradState
from sparse_embed.transforms._rowwise_adagrad import rowwise_adagrad as rowwise_adagrad
