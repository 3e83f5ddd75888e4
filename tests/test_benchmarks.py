"""The benchmarks run, at sizes where their times mean nothing."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture
def steps(monkeypatch):
    """The module `benchmarks/steps.py`."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("steps")


@pytest.mark.parametrize("table", ["flat", "pooled", "tall", "phases"])
def test_steps(steps, table, tmp_path, capsys):
    out = tmp_path / "out.json"
    steps.main(["--tiny", "--only", table, "--json", str(out)])
    assert "| ms (median) |" in out.with_suffix(".md").read_text()
    assert "| ms (median) |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found["tables"]) == {table}
    for rows in found["tables"][table].values():
        assert len(rows) >= 2
        assert all(row.get("ms (median)", 1) > 0 for row in rows)


def test_ways_train_alike(steps):
    """Ways of the same optimizer agree, on a batch that touches every row."""
    found = {}
    for (optimizer, way), (init, step) in steps.competitors().items():
        shared = steps.arrays(6, 4)
        ids = steps.uniform(6, (40, 2))[0]
        made = steps.Way(way, init, step, shared, steps.dense_leaf(4))
        made.run(ids)
        made.run(ids)
        found.setdefault(optimizer, []).append(jax.tree.leaves(made.state()[0]))
    for params in found.values():
        for other in params[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params[0], other)
