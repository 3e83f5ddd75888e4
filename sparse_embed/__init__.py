"""Row-sparse gradients for embedding tables: any optax optimizer, at the cost of the rows read."""

from sparse_embed import exact as exact
from sparse_embed import transforms as transforms
from sparse_embed._audit import AuditReport as AuditReport
from sparse_embed._audit import assert_row_sparse as assert_row_sparse
from sparse_embed._audit import audit as audit
from sparse_embed._container import RowSparse as RowSparse
from sparse_embed._container import coalesce as coalesce
from sparse_embed._core import Tuning as Tuning
from sparse_embed._core import tuning as tuning
from sparse_embed._differentiate import check_ids as check_ids
from sparse_embed._differentiate import grad as grad
from sparse_embed._differentiate import touched as touched
from sparse_embed._differentiate import value_and_grad as value_and_grad
from sparse_embed._lazy import LazyState as LazyState
from sparse_embed._lazy import LazyTransformation as LazyTransformation
from sparse_embed._lazy import clip_by_global_norm as clip_by_global_norm
from sparse_embed._lazy import global_norm as global_norm
from sparse_embed._lazy import lazy as lazy
from sparse_embed._lookup import lookup as lookup
from sparse_embed._lookup import lookup_bag as lookup_bag
from sparse_embed._lookup import renorm as renorm
from sparse_embed._step import train_step as train_step
from sparse_embed.transforms import ParamsEmaState as ParamsEmaState
from sparse_embed.transforms import RowwiseAdagradState as RowwiseAdagradState
from sparse_embed.transforms import params_ema as params_ema
from sparse_embed.transforms import rowwise_adagrad as rowwise_adagrad

__version__ = "0.1.0"
