"""What every table needs: steps timed in turns, compiled memory, machine facts, markdown."""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

MB = 1e6  # bytes


class Way:
    """One way to make a step, on big arrays that it shares with the other ways of a table.

    `step(params, opt_state, ids) -> (params, opt_state, loss)` donates its arrays; what comes back
    goes into `arrays`, where the next way finds it. So a table of ten ways needs the memory of
    one. Only arrays smaller than the embedding table (counts, moments of the dense leaf) are kept
    for each way.

    Args:
      name: of the row in the table.
      init: `params -> opt_state`.
      step: compiled and donated.
      arrays: `table`, and moments `m0`, `m1`, all `[V, d]`.
      w: `[d]`, the dense leaf.
    """

    def __init__(self, name: str, init: Callable, step: Callable, arrays: dict, w: Any):
        self.name, self.step, self.arrays = name, step, arrays
        one_row = {"table": jnp.zeros((1, *w.shape)), "w": jnp.copy(w)}
        self.own, self.treedef = jax.tree.flatten((one_row, init(one_row)))
        tall = [i for i, x in enumerate(self.own) if x.shape == one_row["table"].shape]
        # The last moment is a sum of squares in Adam and Adagrad alike, so it is the same array.
        moments = ["m0", "m1"][-len(tall) + 1 :]
        self.shared = dict(zip(tall, ["table", *moments], strict=False))

    def state(self) -> Any:
        """`(params, opt_state)` as they are now."""
        leaves = list(self.own)
        for i, name in self.shared.items():
            leaves[i] = self.arrays[name]
        return self.treedef.unflatten(leaves)

    def keep(self, state: Any) -> None:
        """Takes over what a step returned."""
        self.own = jax.tree.leaves(state)
        for i, name in self.shared.items():
            self.arrays[name], self.own[i] = self.own[i], None

    def run(self, ids: Any) -> float:
        """Makes a step; its seconds, from the call until every result is there."""
        state = self.state()
        start = time.perf_counter()
        *state, loss = jax.block_until_ready(self.step(*state, ids))
        seconds = time.perf_counter() - start
        self.keep(tuple(state))
        assert np.isfinite(loss), self.name
        return seconds


def in_turns(
    ways: Sequence[Any],
    batches: Sequence[Sequence[Any]],
    rounds: int,
    timed: int = 2,
    warm: int = 1,
) -> list[list[float]]:
    """Times several ways side by side, so that a slow minute of the machine hits all of them.

    In every round each way has a turn: `warm` steps that are not timed, in which its own working
    set comes back into the caches and its threads to life, then `timed` ones. One whole round goes
    before, to compile.

    Args:
      ways: each with `run(ids) -> seconds`.
      batches: for each way the ids to go through, in an order of its own.
      rounds: how many turns each way gets.
      timed: timed steps of a turn.
      warm: steps before them.

    Returns:
      For each way its `rounds * timed` times, in seconds.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    made = 0
    for number in range(rounds + 1):
        for way, ids, mine in zip(ways, batches, seconds, strict=True):
            turn = []
            for _ in range(warm + timed):
                turn.append(way.run(ids[made % len(ids)]))
                made += 1
            mine += turn[warm:] if number else []
    return seconds


def times(seconds: Sequence[float]) -> dict[str, Any]:
    """The columns that describe one way's times."""
    low, middle, high = (1e3 * np.quantile(seconds, q) for q in (0.25, 0.5, 0.75))
    return {"ms (median)": _digits(middle), "quartiles": f"{_digits(low):g}-{_digits(high):g}"}


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a over median of b."""
    return _digits(np.median(a) / np.median(b))


def _digits(x: float) -> float:
    """`x` to three digits."""
    return float(f"{x:.3g}")


def memory(compiled: Any) -> dict[str, float]:
    """MB of a compiled step: its arguments, what it makes anew, and scratch memory."""
    m = compiled.memory_analysis()
    return {
        "arguments MB": _digits(m.argument_size_in_bytes / MB),
        "of them in place": _digits(m.alias_size_in_bytes / MB),
        "scratch MB": _digits(m.temp_size_in_bytes / MB),
    }


def peak_mb(run: Callable[[], Any]) -> float | str:
    """By how many MB the resident memory of the process rises while `run` runs, as Linux tells."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what others have freed must not be used again unseen
        before = _status_mb(status, "VmRSS")
        reset.write_text("5")  # the peak is counted from here on
        run()
        return _digits(max(_status_mb(status, "VmHWM") - before, 0.0))
    except (OSError, AttributeError, KeyError):
        return "unknown"


def _status_mb(status: Path, key: str) -> float:
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(found[key].split()[0]) * 1024 / MB


def machine() -> dict[str, Any]:
    """The facts on which times depend. No names of hosts, users or folders."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        named = (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if ":" in x)
        model = next((x for x in named if "CPU" in x or "EPYC" in x or "Xeon" in x), model)
    device = jax.devices()[0]
    malloc = {k: os.environ[k] for k in ("GLIBC_TUNABLES",) if os.environ.get(k)}
    return malloc | {
        "device": model if device.platform == "cpu" else device.device_kind,
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "load average at the start": _digits(os.getloadavg()[0]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table with the keys of the first row as its head."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([r[k] for k in head] for r in rows)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(x: Any) -> str:
    return f"{x:,}".removesuffix(".0") if isinstance(x, int | float) else str(x)
