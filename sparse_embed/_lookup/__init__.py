"""The verbs that read rows: `lookup`, `lookup_bag`, `renorm`.

In: a table `[V, *features]` and ids of any shape.
Out: its rows, summed into bags or bounded in norm; plain differentiable JAX.
Never: a gradient. `_differentiate` sees these reads as it sees any `table[ids]`.
"""

from sparse_embed._lookup.bag import lookup_bag as lookup_bag
from sparse_embed._lookup.lookup import lookup as lookup
from sparse_embed._lookup.renorm import renorm as renorm
