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


@pytest.fixture
def distance(monkeypatch):
    """The module `benchmarks/distance.py`."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("distance")


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


def test_distance(distance, tmp_path, capsys):
    out = tmp_path / "out.json"
    distance.main(["--tiny", "--json", str(out)])
    printed = capsys.readouterr().out
    assert "| distance |" in printed and printed == out.with_suffix(".md").read_text()
    assert out.with_suffix(".svg").read_text().count("training step -->") == 2
    for run in json.loads(out.read_text())["runs"]:
        ends = {name: found["distance"][-1] for name, found in run["rules"].items()}
        assert ends.pop("dense") == 0
        assert ends.pop("`se.exact`, settled") < 1e-5
        assert len(ends) == 3 and min(ends.values()) > 0.1


def test_rules_agree_without_gaps(distance):
    """Where every step reads every row, all rules are Adam."""
    ids, target = np.arange(5).repeat(2), np.linspace(-1, 1, 10)[:, None].astype(np.float32)
    found = {}
    for name, rule in distance.rules(lambda count: 0.1 / (1 + count)).items():
        params = {"table": jax.numpy.zeros((5, 1))}
        state = rule.init(params)
        for _ in range(4):
            params, state, _ = rule.step(params, state, ids, target)
        found[name] = rule.read(params, state)["table"]
    for name, table in found.items():
        np.testing.assert_allclose(table, found["dense"], rtol=1e-5, err_msg=name)


def test_exact_beside_lazy(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    exact = importlib.import_module("exact")
    monkeypatch.setattr(exact, "PAIRS", {k: exact.PAIRS[k] for k in ("sgd, momentum", "rmsprop")})
    out = tmp_path / "out.json"
    exact.main(["--tiny", "--json", str(out)])
    assert "| se.exact |" in capsys.readouterr().out
    found = json.loads(out.read_text())["tables"]
    assert {row["step"] for row in found["steps"]} == {"se.lazy", "se.exact"}
    assert all(row["ms (median)"] > 0 for rows in found.values() for row in rows)
