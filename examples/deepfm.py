"""The click model of `ctr.py`, in ordinary flax nnx: nothing here knows of sparse_embed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from click_features import CROSSES, FIELDS, Columns
from flax import nnx


class DeepFM(nnx.Module):
    """A factorization machine over the fields, and an MLP over fields and crosses.

    Args:
      num_fields: rows of the table of fields.
      num_rows: rows of the tables of hashed crosses.
      dim: features of an embedding.
      cross_dropout: how often a cross is left out in training; 1 leaves them untrained.
      rngs: where the initial values come from.

    References:
      Guo et al. 2017, DeepFM: A Factorization-Machine based Neural Network for CTR
      Prediction, https://arxiv.org/abs/1703.04247
    """

    def __init__(
        self,
        num_fields: int,
        num_rows: int,
        dim: int,
        cross_dropout: float,
        rngs: nnx.Rngs,
    ):
        def table(rows: int, features: int, std: float) -> nnx.Embed:
            init = nnx.initializers.normal(std)
            return nnx.Embed(rows, features, embedding_init=init, rngs=rngs)

        self.fields = table(num_fields, dim, std=0.01)
        self.field_bias = table(num_fields, 1, std=0.0)
        self.crosses = table(num_rows, dim, std=0.01)
        self.cross_bias = table(num_rows, 1, std=0.0)
        num_vectors = len(FIELDS) + len(CROSSES) + 2  # and the two bags of genres
        self.hidden = nnx.Linear(num_vectors * dim, 64, rngs=rngs)
        self.hidden_2 = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        # Most crosses are seen only a dozen times: they are dropped often, and whole.
        self.drop_crosses = nnx.Dropout(cross_dropout, broadcast_dims=(2,))

    def __call__(self, batch: Columns, key: jax.Array | None = None) -> jax.Array:
        """Logits `[b]`. A `key` turns dropout on, as in training."""
        rngs = None if key is None else nnx.Rngs(key)
        random = {"deterministic": key is None, "rngs": rngs}
        weights = batch["weights"][..., None]  # [b, g, 1]

        def read(table: nnx.Embed, ids: str, bag: str) -> jax.Array:  # [b, k + 1, features]
            mean = (weights * table(batch[bag])).sum(1, keepdims=True)
            return jnp.concatenate([table(batch[ids]), mean], axis=1)

        field = read(self.fields, "fields", "genres")
        field_bias = read(self.field_bias, "fields", "genres")
        cross = self.drop_crosses(read(self.crosses, "crosses", "genre_crosses"), **random)
        cross_bias = read(self.cross_bias, "crosses", "genre_crosses")
        cross_bias = self.drop_crosses(cross_bias, **random)

        first = field_bias.sum((1, 2)) + cross_bias.sum((1, 2))
        second = (field.sum(1) ** 2 - (field**2).sum(1)).sum(-1) / 2

        deep = jnp.concatenate([field, cross], axis=1).reshape(len(field), -1)
        deep = nnx.relu(self.hidden(self.dropout(deep, **random)))
        deep = nnx.relu(self.hidden_2(self.dropout(deep, **random)))
        return first + second + self.out(deep)[:, 0]
