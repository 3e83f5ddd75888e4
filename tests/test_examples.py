"""The examples run, learn something, and say what to do without a network."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

for module in ("flax", "tqdm", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_ctr_learns_and_saves_its_figure(tmp_path, capsys):
    ctr = importlib.import_module("ctr")
    figure = tmp_path / "ctr.png"
    small = "--synthetic --rows 4096 --dim 8 --batch-size 256 --lr 0.02 --steps 60 --audit"
    result = ctr.main(f"{small} --sweep --timed-steps 5 --figure {figure}".split())

    losses = result["losses"]
    assert len(losses) == 60 and np.isfinite(losses).all()
    assert np.mean(losses[-12:]) < np.mean(losses[:12])
    assert len(result["epochs"]) == 5 and result["best"]["test"]["auc"] > 0.6
    assert set(result["ms_per_step"]) == {4096}
    assert set(result["ms_per_step"][4096]) == {"sparse", "dense"}
    assert all(ms > 0 for ms in result["ms_per_step"][4096].values())
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "row-sparse: yes" in printed and f"figure: {figure}" in printed


def test_ctr_help_explains_every_option(capsys):
    ctr = importlib.import_module("ctr")
    with pytest.raises(SystemExit):
        ctr.main(["--help"])
    explained = " ".join(capsys.readouterr().out.split("options:")[1].split())
    options = [word for word in explained.split() if word.startswith("--")]
    assert {"--mode", "--rows", "--epochs", "--steps", "--seed", "--quick"} <= set(options)
    assert explained.count("(default:") == len(options) - 1  # all but --help show theirs


def test_the_features_of_a_rating_do_not_depend_on_ratings():
    features = importlib.import_module("click_features")
    data = importlib.import_module("movielens").synthetic()
    one, _ = features.build(data, 512)
    other, _ = features.build(data._replace(rating=6 - data.rating), 512)
    for name in one.keys() - {"label"}:
        np.testing.assert_array_equal(one[name], other[name])
    assert one["crosses"].min() >= 0 and one["crosses"].max() < 512


def test_the_parts_of_the_split_are_disjoint_and_complete():
    parts = importlib.import_module("click_features").split(1000)
    assert [len(part) for part in parts] == [800, 100, 100]
    assert sorted(np.concatenate(parts)) == list(range(1000))


def test_a_batch_larger_than_the_data_is_refused():
    batches = importlib.import_module("click_features").batches
    with pytest.raises(ValueError, match="size=8.*there are 5 ratings.*size of at most 5"):
        next(batches({"label": np.ones(9)}, np.arange(5), 8, seed=0))


def test_auc_counts_the_pairs_in_the_right_order():
    auc = importlib.import_module("click_metrics").auc
    rng = np.random.default_rng(0)
    label, logit = rng.integers(2, size=60), rng.integers(10, size=60) / 10
    above = logit[label == 1][:, None] - logit[label == 0]
    assert auc(label, logit) == pytest.approx(np.mean((above > 0) + (above == 0) / 2))


def test_movielens_offline_says_what_failed_and_what_to_do(monkeypatch, tmp_path):
    movielens = importlib.import_module("movielens")

    def no_network(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and command[-1] == "recbole==1.2.1"
        said = "WARNING: retry\nERROR: no route\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=said)

    monkeypatch.setattr(movielens.subprocess, "run", no_network)
    with pytest.raises(SystemExit) as error:
        movielens.load(tmp_path / "cache")
    failed, said, instead = str(error.value).splitlines()
    assert failed == "MovieLens-100K: `pip download --no-deps recbole==1.2.1` failed."
    assert said == "pip's last line: ERROR: no route"
    for part in ("recbole-1.2.1-py3-none-any.whl", str(tmp_path / "cache"), "--data-dir"):
        assert part in instead


def test_movielens_uses_a_wheel_that_is_there(monkeypatch, tmp_path):
    movielens = importlib.import_module("movielens")
    monkeypatch.setattr(movielens.subprocess, "run", None)  # pip must not be called
    files = {
        "inter": "user_id\titem_id\trating\ttimestamp\n7\t3\t4\t0\n",
        "user": "user_id\tage\tgender\toccupation\tzip_code\n7\t24\tM\twriter\t85711\n",
        "item": "item_id\ttitle\tyear\tclass\n2\tA\t\tDrama\n3\tB\t1995\tWar Drama\n",
    }
    with zipfile.ZipFile(tmp_path / movielens.WHEEL, "w") as wheel:
        for end, text in files.items():
            wheel.writestr(f"{movielens.FOLDER}.{end}", text)
    data = movielens.load(tmp_path)
    assert [x.tolist() for x in (data.user, data.item, data.rating)] == [[0], [1], [4.0]]
    assert data.year.tolist() == [0, 1995] and data.genres == [["Drama"], ["War", "Drama"]]


def test_rare_rows_exact_ends_like_dense_and_lazy_elsewhere(capsys):
    rare_rows = importlib.import_module("rare_rows")
    small = "--synthetic --epochs 4 --lrs 0.01 --l2s 0.1 --dim 3 --seeds 1 --rows"
    result = rare_rows.main(small.split())

    table = result["table"]
    assert set(table) == {"dense", "lazy", "exact"}  # with one rate there is none to choose
    for name in ("rmse", "rare", "loss"):
        assert table["exact"][name] == pytest.approx(table["dense"][name], rel=1e-5)
        assert table["lazy"][name] != pytest.approx(table["dense"][name], rel=1e-4)
    assert table["dense"]["rmse"] < 1.05  # 1.12 is the deviation of the ratings
    assert table["exact"]["off"] < 1e-4 and table["lazy"]["off"] > 0.01
    assert "test ratings are of items rated <= 10 times" in capsys.readouterr().out


def test_rare_rows_times_each_mode_at_a_height(monkeypatch):
    rare_rows = importlib.import_module("rare_rows")
    monkeypatch.setattr(rare_rows, "MODES", ("dense", "lazy"))  # exact is slow to compile
    args = rare_rows.parse(["--timed-steps", "2"])
    timings = rare_rows.time_steps(importlib.import_module("movielens").synthetic(), 4096, args)
    assert set(timings) == {"dense", "lazy", "settle"}
    assert all(ms > 0 for ms in timings.values())


def test_rare_rows_spreads_ids_over_a_taller_table():
    columns = importlib.import_module("rare_rows").make_columns
    data = importlib.import_module("movielens").synthetic()
    tall = columns(data, 4096)
    for name, ids in (("user", data.user), ("item", data.item)):
        pairs = set(zip(ids, tall[name], strict=True))  # one row for each id, and back
        assert len(pairs) == len(set(ids)) == len(set(tall[name]))
        assert tall[name].max() > 2048


def test_rare_rows_help_explains_every_option(capsys):
    rare_rows = importlib.import_module("rare_rows")
    with pytest.raises(SystemExit):
        rare_rows.main(["--help"])
    explained = " ".join(capsys.readouterr().out.split("options:")[1].split())
    options = [word for word in explained.split() if word.startswith("--")]
    assert {"--rows", "--rare", "--lrs", "--seeds", "--split"} <= set(options)
    assert explained.count("(default:") == len(options) - 1  # all but --help show theirs
