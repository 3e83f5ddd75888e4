"""The benchmarks run, at sizes where their times mean nothing."""

import importlib.util
import json
import shutil
import sys
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
    monkeypatch.setattr(exact, "PAIRS", {k: exact.PAIRS[k] for k in ("sgd, momentum",)})
    out = tmp_path / "out.json"
    exact.main(["--tiny", "--json", str(out)])
    assert "| se.exact |" in capsys.readouterr().out
    found = json.loads(out.read_text())["tables"]
    assert {row["step"] for row in found["steps"]} == {"se.lazy", "se.exact"}
    assert all(row["ms (median)"] > 0 for rows in found.values() for row in rows)


def test_compile(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    script, out = importlib.import_module("compile"), tmp_path / "out.json"
    monkeypatch.setattr(script, "ways", lambda ways=script.ways: dict(list(ways().items())[:3]))
    script.main(["--tiny", "--json", str(out)])
    assert capsys.readouterr().out == out.with_suffix(".md").read_text()
    rows = json.loads(out.read_text())["tables"]["compile"]
    assert len(rows) == 2 * 3 + 2  # of tables of other heights there is no stack
    assert all(row["trace s"] > 0 and row["compile s"] > 0 for row in rows)


def test_gpu(monkeypatch, tmp_path, capsys):
    """The script for a GPU runs without one when tiny, and else leaves it at one line."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    gpu = importlib.import_module("gpu")
    out = tmp_path / "out.json"
    with_torch = importlib.util.find_spec("torch") is not None
    options = ["--torch-python", sys.executable] if with_torch else []
    assert gpu.main(["--tiny", "--json", str(out), *options]) == 0
    assert capsys.readouterr().out == out.with_suffix(".md").read_text()
    found = json.loads(out.read_text())["tables"]["steps"]
    assert len(found) == (11 if with_torch else 6)
    assert all(row["enqueued"] > 0 for row in found)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert gpu.main([]) == 0
    assert gpu.main(["--json", str(tmp_path / "full.json")]) == 2
    assert capsys.readouterr().out.count("no GPU: ") == 2
    assert not (tmp_path / "full.json").exists()


def test_pages(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    pages = importlib.import_module("pages")
    out, before = tmp_path / "out.json", vars(pages.se.tuning).copy()
    pages.main(["--tiny", "--json", str(out)])
    assert capsys.readouterr().out == out.with_suffix(".md").read_text()
    found = json.loads(out.read_text())["tables"]
    assert len(found["kept"]) == 2 * len(pages.MODELS) and len(found["huge"]) == 8
    assert all(row["ms (median)"] > 0 for rows in found.values() for row in rows)
    assert vars(pages.se.tuning) == before


@pytest.fixture
def peers(monkeypatch):
    """The module `benchmarks/peers.py`."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("peers")


@pytest.mark.parametrize("table", ["pooled", "unpooled", "rows", "ids", "width", "memory"])
def test_peers(peers, table, monkeypatch, tmp_path, capsys):
    """Without peers: a line says of each that it is left out."""
    contest, few = importlib.import_module("_contest"), ("row-wise adagrad", "adam")
    monkeypatch.setattr(contest, "OPTIMIZERS", {k: contest.OPTIMIZERS[k] for k in few})
    monkeypatch.setattr(contest, "BY_HAND", few[1:])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if table == "rows":  # and the SGD that this table has beside Adam
        monkeypatch.setitem(contest.OPTIMIZERS, "sgd", contest.SHARED["sgd"])
    out, nowhere = tmp_path / "out.json", str(tmp_path / "python")
    peers.main(["--tiny", "--only", table, "--json", str(out), "--peers-python", nowhere])
    printed = capsys.readouterr().out
    assert printed.split() == out.with_suffix(".md").read_text().split()
    assert printed.count("Left out: ") == 3
    found = json.loads(out.read_text())
    (rows, *_) = found["tables"][table].values()
    assert {"sparse_embed", "dense optax"} <= {row["step"] for row in rows}
    assert all(row.get("ms (median)", 1) > 0 for row in rows)
    figure = tmp_path / f"out-{table}.svg"
    assert figure.exists() == (table in peers.FIGURES)
    assert not figure.exists() or "ms a step" in figure.read_text()


def test_limit(peers, tmp_path):
    """The program of limit.cc trains as we do."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    contest, (num_rows, d), bags = importlib.import_module("_contest"), (50, 8), (12, 5)
    batches = peers.zipf(num_rows, bags, 0.8)[:4]
    start, end = tmp_path / "start", tmp_path / "end"
    w = contest.dense_leaf(d)
    begun = {"table": contest.arrays(num_rows, d)["table"], "w": w}
    np.concatenate([np.ravel(begun["table"]), w]).tofile(start)
    with peers.Others(tmp_path / "python") as others:
        ids = others.file("ids", batches)
        ways = others.limit((num_rows, d), bags, ids, start)
        for (optimizer, _), way in ways.items():
            init, step = contest.ours(optimizer, contest.pooled_loss)
            params = jax.tree.map(jax.numpy.copy, begun)
            state = init(params)
            for number, batch in enumerate(batches):
                way.run(number)
                params, state, _ = step(params, state, batch)
            others.save_limit(optimizer, end)
            want = np.concatenate([np.ravel(params["table"]), params["w"]])
            np.testing.assert_allclose(np.fromfile(end, np.float32), want, rtol=1e-4, atol=1e-7)
            assert np.abs(want - np.fromfile(start, np.float32)).max() > 1e-5
    assert len(ways) == 4
