"""Huge pages: that the kernel gives them, for which arrays they are asked, and where not."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tuned

import sparse_embed as se
from sparse_embed._core import pages as _pages
from sparse_embed._core.pages import ask_for_huge_pages

MB = 1 << 20
SMAPS = Path("/proc/self/smaps")


def huge_bytes(x: jax.Array) -> int:
    """How much of an array's memory lies in huge pages, as the kernel says."""
    start, end = x.unsafe_buffer_pointer(), x.unsafe_buffer_pointer() + x.nbytes
    found, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(address, 16) for address in name.split("-"))
            inside = first < end and start < last
        elif inside and name == "AnonHugePages:":
            found += 1024 * int(rest[0])
    return found


def has_huge_pages() -> bool:
    """Whether this kernel moves memory to huge pages when asked; now and then it is too busy."""
    if sys.platform != "linux" or not SMAPS.exists() or not _pages._allowed():
        return False
    x = jnp.ones(8 * MB)
    for _ in range(5):
        ask_for_huge_pages(x)
    return huge_bytes(x) > 0


@pytest.fixture
def asked(monkeypatch):
    """The addresses of the arrays for which huge pages are asked, as long as the test runs."""
    found = []
    monkeypatch.setattr(_pages, "_ask", lambda start, size: found.append(start))
    monkeypatch.setattr(_pages, "_allowed", lambda: True)
    return found


@pytest.mark.skipif(not has_huge_pages(), reason="no huge pages to be had here")
def test_the_kernel_gives_them():
    x = jnp.ones(16 * MB)
    assert huge_bytes(x) == 0
    for _ in range(5):
        ask_for_huge_pages({"x": x})
    assert huge_bytes(x) >= x.nbytes / 2
    np.testing.assert_array_equal(x, 1)


def test_init_asks_for_table_and_state(asked):
    params = {"table": jnp.ones((MB, 4)), "small": jnp.ones(3)}
    state = se.lazy(optax.adam(0.1)).init(params).inner_state[0]
    arrays = params["table"], state.mu["table"], state.nu["table"]
    assert sorted(asked) == sorted(x.unsafe_buffer_pointer() for x in arrays)


def test_init_of_exact_asks_for_the_clock_too(asked):
    state = se.exact.adam(0.1).init(jnp.ones((MB, 4)))
    assert {state.clocks.last_step.unsafe_buffer_pointer()} < set(asked)


def test_only_the_first_step_asks(asked):
    tx, params = se.lazy(optax.sgd(0.1)), jnp.ones((MB, 4))
    step = se.train_step(lambda table, ids: table[ids].sum(), tx)
    state, table = tx.init(params), params.unsafe_buffer_pointer()
    asked.clear()
    params, state, _ = step(params, state, jnp.array([1, 2]))
    step(params, state, jnp.array([1, 2]))
    assert asked == [table]


def test_not_asked(asked):
    tx, table = se.lazy(optax.adam(0.1)), jnp.ones((MB, 4))
    with tuned(huge_pages=False):
        tx.init(table)
    jax.jit(tx.init)(table)
    assert asked == []


def test_whatever_is_no_large_array_is_left_alone(asked):
    x, y = jnp.ones(MB), jnp.ones(MB)
    y.delete()
    ask_for_huge_pages({"x": x, "y": y, "small": jnp.ones(3), "key": jax.random.key(0), "n": 3})
    jax.jit(lambda x: ask_for_huge_pages(x))(x)
    assert asked == [x.unsafe_buffer_pointer()]


def test_pages_that_reach_beyond_an_array_are_left_alone(monkeypatch):
    class Library:
        def __init__(self, name):
            self.madvise = lambda start, size, advice: asked.append((start, size))
            self.madvise.argtypes = None

    asked = []
    monkeypatch.setattr(_pages.ctypes, "CDLL", Library)
    _pages._ask(2 * MB + 64, 7 * MB)
    _pages._ask(2 * MB, 4 * MB)
    _pages._ask(3 * MB, 2 * MB)  # no whole page inside
    assert asked == [(4 * MB, 4 * MB)] * 2 + [(2 * MB, 4 * MB)] * 2


@pytest.mark.parametrize(
    "setting, allowed", [("always [madvise] never", True), ("always madvise [never]", False)]
)
def test_where_the_system_gives_none(tmp_path, monkeypatch, setting, allowed):
    file = tmp_path / "enabled"
    file.write_text(setting)
    monkeypatch.setattr(_pages, "_SETTING", file)
    monkeypatch.setattr(_pages.sys, "platform", "linux")
    assert _pages._allowed() == allowed
    monkeypatch.setattr(_pages, "_SETTING", tmp_path / "none")
    assert not _pages._allowed()
