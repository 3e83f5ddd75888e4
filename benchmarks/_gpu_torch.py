"""What `gpu.py` measures and how, and PyTorch's steps. No jax here: another Python may run it.

    python benchmarks/_gpu_torch.py full    # prints a line of JSON, for gpu.py to read

Letters: T tables of V rows and d features, n ids for each of them.
"""

import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

SEED = 0
POWER = 1.05
RATE = 1e-3
MOMENTS = {"sgd": (), "adagrad": ("m1",), "adam": ("m0", "m1")}  # m1 is a sum of squares in both

# NVIDIA/recsys-examples, corelib/dynamicemb/benchmark/benchmark_results.json: forward, and backward
# with the update in it, of FBGEMM's SplitTableBatchedEmbeddingBagsCodegen, with CUDA events.
PUBLISHED = "ms of FBGEMM as published, one H100"
PUBLISHED_MS = {"sgd": 0.959, "adam": 1.352}


class Sizes(NamedTuple):
    """What is measured, and how often."""

    tables: int = 10
    rows: int = 1_677_721
    d: int = 128
    ids: int = 104_857  # of each table
    batches: int = 8  # then they come again
    copied: int = 1_000_000_000  # floats, to measure the bandwidth
    rounds: int = 50  # steps that are waited for one by one
    enqueued: int = 20  # steps before one wait
    queues: int = 5


SIZES = {
    "full": Sizes(),
    "quick": Sizes(rows=167_772, ids=10_485, copied=100_000_000, rounds=20, queues=3),
    "tiny": Sizes(2, 60, 4, 40, 2, 1000, 2, 2, 1),  # for the tests
}


def power_law(sizes: Sizes) -> np.ndarray:
    """Ids `[batches, T, n]`, drawn as NVIDIA's benchmark draws them: row k with weight k**-1.05.

    A low id is a frequent one, so that frequent rows are neighbours.
    """
    draws = np.random.default_rng(SEED).random((sizes.batches, sizes.tables, sizes.ids))
    low = float(sizes.rows) ** (1 - POWER)
    ids = (draws * (low - 1) + 1) ** (1 / (1 - POWER))
    return np.minimum(ids, sizes.rows - 1).astype(np.int32)


def bytes_needed(optimizer: str, distinct: float, sizes: Sizes) -> float:
    """Bytes that a row-sparse step has to move.

    Forward: the distinct rows are read, every looked-up row is written. Backward: every cotangent
    is read, and ids are sorted, 64 bytes for each of them. Update: of a distinct row the parameters
    and each moment are read and written.
    """
    ids, row = sizes.tables * sizes.ids, 4 * sizes.d
    forward = distinct * row + ids * row
    backward = ids * row + 64 * ids
    return forward + backward + distinct * 2 * row * (1 + len(MOMENTS[optimizer]))


def floors(distinct: float, sizes: Sizes, speed: float) -> tuple[list, dict[str, float]]:
    """Of each optimizer the bytes and their time at `speed` bytes a second: a table, and the ms."""
    rows, floor_ms = [], {}
    for name in MOMENTS:
        moved = bytes_needed(name, distinct, sizes)
        floor_ms[name] = 1e3 * moved / speed
        row = {"optimizer": name, "MB a step": round(moved / 1e6, 3)}
        row["ms at copy bandwidth"] = float(f"{floor_ms[name]:.3g}")
        published = PUBLISHED_MS.get(name, "-") if sizes == SIZES["full"] else "-"
        rows.append(row | {PUBLISHED: published})
    return rows, floor_ms


def timed(go: Callable[[int], Any], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds a step, of `go(number of steps)`, which waits for the last one."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        go(count)
        return (time.perf_counter() - start) / count

    go(3)
    return {
        "waited": [seconds(1) for _ in range(sizes.rounds)],
        "enqueued": [seconds(sizes.enqueued) for _ in range(sizes.queues)],
    }


def torch_rows(sizes: Sizes, torch: Any) -> Iterator[dict[str, Any]]:
    """Every optimizer on the same parameters, its state made anew.

    A step is `functional.embedding` of each table, which is what `nn.Embedding` calls, `backward`
    from given cotangents, and the optimizer's step.
    """
    cuda, optim = torch.cuda.is_available(), torch.optim
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(SEED)
    tables = [torch.empty(sizes.rows, sizes.d, device=device) for _ in range(sizes.tables)]
    tables = [torch.nn.Parameter(x.uniform_(-0.05, 0.05)) for x in tables]
    shape = (sizes.ids, sizes.d)
    cotangents = [1e-3 * torch.randn(shape, device=device) for _ in tables]
    batches = torch.as_tensor(power_law(sizes)).to(device, torch.int64)

    def measured(sparse: bool, make: Callable[..., Any], **options: Any) -> dict[str, list[float]]:
        optimizer, endless = make(tables, lr=RATE, **options), itertools.cycle(batches)

        def go(count: int) -> None:
            for _, ids in zip(range(count), endless):  # noqa: B905
                read = zip(ids, tables, strict=True)
                rows = [torch.nn.functional.embedding(i, x, sparse=sparse) for i, x in read]
                torch.autograd.backward(rows, cotangents)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()

        return timed(go, sizes)

    for name, step, *how in (
        ("sgd", "torch, sparse=True", True, optim.SGD),
        ("sgd", "torch, dense", False, optim.SGD),
        ("adagrad", "torch, sparse=True", True, optim.Adagrad),
        ("adam", "torch, sparse=True, SparseAdam", True, optim.SparseAdam),
        ("adam", "torch, dense, fused", False, optim.Adam),
    ):
        row = {"optimizer": name, "step": step}
        options = {"fused": True} if step.endswith("fused") else {}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            row |= measured(*how, **options)
            yield row | ({"peak": torch.cuda.max_memory_allocated()} if cuda else {})
        except torch.cuda.OutOfMemoryError:
            yield row | {"failed": "out of memory"}
        for x in tables:
            x.grad = None
        gc.collect()


def in_another_python(python: str, size: str) -> dict[str, Any]:
    """Runs this file: what it prints, `{"torch": version, "rows": of the table}`."""
    done = subprocess.run([python, __file__, size], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print("PyTorch could not be measured.", file=sys.stderr)
        return {"torch": "failed", "rows": []}
    return json.loads(done.stdout.splitlines()[-1])


def main(size: str) -> None:
    """Measures PyTorch's steps, on a GPU unless the size is tiny."""
    import torch

    if size != "tiny" and not torch.cuda.is_available():
        sys.exit("no GPU that this PyTorch can use")
    rows = list(torch_rows(SIZES[size], torch))
    print(json.dumps({"torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1])
