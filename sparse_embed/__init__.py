"""Row-sparse gradients for embedding tables: any optax optimizer, at the cost of the rows read."""

from sparse_embed import exact as exact
from sparse_embed._audit import assert_row_sparse as assert_row_sparse
from sparse_embed._audit import audit as audit
from sparse_embed._bag import lookup_bag as lookup_bag
from sparse_embed._coalesce import coalesce as coalesce
from sparse_embed._grad import grad as grad
from sparse_embed._grad import value_and_grad as value_and_grad
from sparse_embed._lazy import LazyTransformation as LazyTransformation
from sparse_embed._lazy import lazy as lazy
from sparse_embed._lazy_state import LazyState as LazyState
from sparse_embed._lookup import lookup as lookup
from sparse_embed._norms import clip_by_global_norm as clip_by_global_norm
from sparse_embed._norms import global_norm as global_norm
from sparse_embed._params_ema import ParamsEmaState as ParamsEmaState
from sparse_embed._params_ema import params_ema as params_ema
from sparse_embed._renorm import renorm as renorm
from sparse_embed._report import AuditReport as AuditReport
from sparse_embed._row_sparse import RowSparse as RowSparse
from sparse_embed._rowwise_adagrad import RowwiseAdagradState as RowwiseAdagradState
from sparse_embed._rowwise_adagrad import rowwise_adagrad as rowwise_adagrad
from sparse_embed._touched import check_ids as check_ids
from sparse_embed._touched import touched as touched
from sparse_embed._train_step import train_step as train_step
from sparse_embed._tuning import Tuning as Tuning
from sparse_embed._tuning import tuning as tuning
