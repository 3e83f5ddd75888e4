"""Two CPU devices, no display, and the fixtures that every test may use."""

import os

# Before jax starts its backends. Flags that are already set stay.
_flags = os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=2".strip()
# Most of the time of the suite is compilation; on one of two cores that goes best on one thread.
if "xla_cpu_parallel_codegen_split_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def key():
    """A fixed key: a failure can be run again."""
    return jax.random.key(0)


@pytest.fixture(params=[lambda fn: fn, jax.jit], ids=["eager", "jit"])
def maybe_jit(request):
    """Runs the test twice: with functions as they are, and compiled."""
    return request.param
