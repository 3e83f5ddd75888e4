"""The steps of torch and FBGEMM, made on request: run by `_others.py` in an environment of theirs.

First prints the versions as JSON. Then each line of stdin is JSON: what `Trained` takes, and the
number of a batch; the answer is the seconds of that step. A way is made when first asked for.
"""

import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

RATE = 1e-3
ADAGRAD = partial(torch.optim.Adagrad, initial_accumulator_value=0.1)  # as optax; FBGEMM has 0
SPARSE = {
    "sgd": torch.optim.SGD,
    "adagrad": ADAGRAD,
    "adam": torch.optim.SparseAdam,  # takes no dense leaf
}
DENSE = {
    "sgd": torch.optim.SGD,
    "adagrad": ADAGRAD,
    "row-wise adagrad": ADAGRAD,
    "adam": torch.optim.Adam,
}
FBGEMM = {
    "sgd": "EXACT_SGD",
    "adagrad": "EXACT_ADAGRAD",
    "row-wise adagrad": "EXACT_ROWWISE_ADAGRAD",
}


class Trained:
    """A model and its optimizers.

    Args:
      library: torch or fbgemm.
      optimizer: a name in `SPARSE` or `FBGEMM`.
      shape: `[V, d]` of the table.
      bags: `[b, f]` of a batch.
      pooled: whether the rows of each bag are summed before the head.
      ids: a file of int32 `[batches, b, f]`.
      start: `[V, d]` and `[d]` as they are to start, in a test; else made here.
    """

    def __init__(
        self,
        library: str,
        optimizer: str,
        shape: Sequence[int],
        bags: Sequence[int],
        pooled: bool,
        ids: str,
        start: Any = None,
    ):
        self.batches = read(ids, tuple(bags))
        if start is None:
            start = torch.empty(*shape).uniform_(-0.05, 0.05), torch.randn(shape[1]) / 8
        self.w = start[1].clone().requires_grad_()
        made = torch_rows if library == "torch" else fbgemm_rows
        self.rows, self.table, self.optimizers = made(start[0], optimizer, bags, pooled)
        self.optimizers.append(DENSE[optimizer]([self.w], lr=RATE))

    def run(self, batch: int) -> float:
        """Makes a step; its seconds."""
        ids = self.batches[batch]
        start = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = torch.tanh(self.rows(ids) @ self.w).mean()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        seconds = time.perf_counter() - start
        assert math.isfinite(loss.item())
        return seconds


@cache
def read(path: str, bags: tuple[int, ...]) -> torch.Tensor:
    """`[batches, b, f]` int64: other ids they would make into these themselves."""
    return torch.from_numpy(np.fromfile(path, np.int32).reshape(-1, *bags).astype(np.int64))


def torch_rows(table: torch.Tensor, optimizer: str, bags: Sequence[int], pooled: bool) -> tuple:
    """`(ids -> rows, table, optimizers)` of torch."""
    del bags
    more: dict[str, Any] = {"mode": "sum"} if pooled else {}
    kind = torch.nn.EmbeddingBag if pooled else torch.nn.Embedding
    rows = kind.from_pretrained(table, freeze=False, sparse=True, **more)
    return rows, rows.weight, [SPARSE[optimizer]([rows.weight], lr=RATE)]


def fbgemm_rows(table: torch.Tensor, optimizer: str, bags: Sequence[int], pooled: bool) -> tuple:
    """The same of FBGEMM, whose backward pass makes the update."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as ops
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    assert pooled
    rows = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, EmbeddingLocation.HOST, ops.ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, FBGEMM[optimizer]),
        learning_rate=RATE,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
    )
    (weight,) = rows.split_embedding_weights()
    weight.data.copy_(table)
    offsets = torch.arange(0, bags[0] * bags[1] + 1, bags[1])
    return (lambda ids: rows(ids.reshape(-1), offsets)), weight, []


def versions() -> dict[str, str]:
    """Of what is there."""
    found = {"torch": torch.__version__}
    try:
        import fbgemm_gpu  # noqa: F401

        found["fbgemm"] = importlib.metadata.version("fbgemm-gpu-cpu")
    except (ImportError, OSError):  # not there, or not made for this machine
        pass
    return found


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not come among the answers
    torch.set_num_threads(os.cpu_count() or 1)
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, without its warning
    print(json.dumps(versions()), file=answers, flush=True)
    made: dict[str, Callable[[int], float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        batch, name = asked.pop("batch"), json.dumps(asked)
        if name not in made:
            made[name] = Trained(**asked).run
        print(made[name](batch), file=answers, flush=True)


if __name__ == "__main__":
    main()
