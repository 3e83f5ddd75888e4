"""What several test files need: compilations, memory, notebooks."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparse_embed as se

# For programs that run a few times on a few rows: most of their time is compilation.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # the older of two code generators takes a third of the time
    QUICKLY["xla_cpu_use_fusion_emitters"] = False

_COMPILED = re.compile(r"Finished XLA compilation of (.+) in ")


class _Names(logging.Handler):
    """Collects the names of the functions whose compilation jax logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := _COMPILED.match(record.getMessage()):
            self.names.append(found[1])


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Collects what XLA compiles inside the block, operations outside any `jit` included.

    Yields:
      The list of names, which grows: `[]` at the end where nothing was compiled.
    """
    handler = _Names()
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield handler.names
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def tuned(**numbers: Any) -> Iterator[None]:
    """Within it, `se.tuning` has these numbers."""
    before = {name: getattr(se.tuning, name) for name in numbers}
    try:
        for name, number in numbers.items():
            setattr(se.tuning, name, number)
        yield
    finally:
        for name, number in before.items():
            setattr(se.tuning, name, number)


def numbers(x: Any) -> np.ndarray:
    """A leaf in float64; of the row numbers of a `RowSparse` what lies behind them."""
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x, np.float64)


def small_blocks(rows: int) -> contextlib.AbstractContextManager[None]:
    """Within it, steps are traced to go through a table so few rows at a time."""
    return tuned(block_rows=rows, window_bytes=1)


def temp_bytes(fn: Callable, *args: Any, donate: tuple[int, ...] = ()) -> int:
    """Scratch memory of the compiled `fn(*args)`: neither arguments nor results.

    Args:
      fn: a function, or one that is jitted already (then `donate` must be left out).
      *args: arguments, or `jax.ShapeDtypeStruct`s in their place; nothing is run.
      donate: positions of the arguments to donate.
    """
    assert not (donate and hasattr(fn, "lower")), "jitted already: donate there"
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn, donate_argnums=donate)
    return jitted.lower(*args).compile().memory_analysis().temp_size_in_bytes


def executed_notebook(path: Path) -> dict[str, Any]:
    """Runs the code cells of a notebook one after another.

    Lines that start with `%` or `!` are left out: they speak to Jupyter.

    Args:
      path: the `.ipynb` file.

    Returns:
      The variables that the cells leave behind.
    """
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    variables: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            kept = ("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
            code = compile("\n".join(kept), f"{path}[cell {number}]", "exec")
            exec(code, variables)
    return variables
