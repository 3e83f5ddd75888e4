"""`lazy`: any optax transformation on the touched rows; norms of mixed trees.

In: an optax transformation, then trees of gradients, state and parameters.
Out: an optax transformation whose trees may hold `RowSparse`.
Never: a list of optimizer names. What cannot be run on rows is refused by its equations.
"""

from sparse_embed._lazy.lift import LazyTransformation as LazyTransformation
from sparse_embed._lazy.lift import lazy as lazy
from sparse_embed._lazy.norms import clip_by_global_norm as clip_by_global_norm
from sparse_embed._lazy.norms import global_norm as global_norm
from sparse_embed._lazy.separable import moved_without_gradient as moved_without_gradient
from sparse_embed._lazy.state import LazyState as LazyState
