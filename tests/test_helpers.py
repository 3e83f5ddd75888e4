"""The helpers notice what they are there to notice."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import count_compilations, executed_notebook, temp_bytes


def test_tests_see_two_cpu_devices():
    assert len(jax.devices("cpu")) == 2


def test_a_repeated_call_is_not_a_compilation():
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    with count_compilations() as first:
        double(x)
    with count_compilations() as second:
        double(x)
    assert len(first) == 1
    assert second == []


def test_a_call_with_another_shape_is_a_compilation():
    def double(x):
        return 2 * x

    double = jax.jit(double)
    short, long = jnp.ones(3), jnp.ones(4)
    double(short)
    with count_compilations() as compiled:
        double(long)
    assert compiled == ["jit(double)"]


def test_a_raise_inside_the_block_leaves_nothing_behind():
    double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
    with pytest.raises(KeyError), count_compilations() as compiled:
        raise KeyError
    double(x)
    assert compiled == []


def test_temp_bytes_sees_a_table_sized_copy():
    table = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    row = jax.ShapeDtypeStruct((64,), jnp.float32)

    def in_place(table, row):
        return table.at[7].add(row)

    def through_a_copy(table, row):
        return jnp.sort(table.at[7].add(row).reshape(-1))[:3]

    small = temp_bytes(in_place, table, row, donate=(0,))
    large = temp_bytes(jax.jit(through_a_copy), table, row)
    assert small < 10_000 <= 1000 * 64 * 4 <= large


def test_executed_notebook(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["not code"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!pip list\n", "x = 2"]},
        {"cell_type": "code", "source": "def twice():\n    return 2 * x\n\ny = twice()"},
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert executed_notebook(path)["y"] == 4

    cells.append({"cell_type": "code", "source": ["assert y == 5"]})
    path.write_text(json.dumps({"cells": cells}))
    with pytest.raises(AssertionError):
        executed_notebook(path)
