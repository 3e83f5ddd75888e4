"""Two CPU devices, no display, compiled programs kept, and the fixtures every test may use."""

import os
import shutil
from pathlib import Path

# Before jax starts its backends. Flags that are already set stay.
_flags = os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=2".strip()
# Most of the time of the suite is compilation; on one of two cores that goes best on one thread.
if "xla_cpu_parallel_codegen_split_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("MPLBACKEND", "agg")

# What did not change since the last run need not be compiled again: two thirds of the time.
CACHE = Path(__file__).parents[1] / ".jax_cache"
CACHE_BYTES = 2 << 30
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begins the kept programs anew once they are too many: jax itself drops none."""
    worker = hasattr(session.config, "workerinput")
    if not worker and sum(f.stat().st_size for f in CACHE.glob("*")) > CACHE_BYTES:
        shutil.rmtree(CACHE)


@pytest.fixture
def key():
    """A fixed key: a failure can be run again."""
    return jax.random.key(0)


@pytest.fixture(params=[lambda fn: fn, jax.jit], ids=["eager", "jit"])
def maybe_jit(request):
    """Runs the test twice: with functions as they are, and compiled."""
    return request.param
