"""MovieLens-100K for the examples: fetched when an example runs, never committed.

The ratings come from the `recbole==1.2.1` wheel, which carries the 943 users, 1,682
items and 100,000 ratings of ML-100K as three small text files. `pip download` puts the
wheel into a cache folder; it is read as a zip and never installed. The wheel is MIT; the
data keeps GroupLens' terms (research use, no redistribution), so copy it nowhere else.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGE = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
CACHE = Path.home() / ".cache" / "sparse_embed"


class MovieLens(NamedTuple):
    """Ratings, and what is known of each user and item; ids count from 0.

    `n` ratings, `u` users, `i` items.
    """

    user: np.ndarray  # [n] row of the user arrays
    item: np.ndarray  # [n] row of the item arrays
    rating: np.ndarray  # [n] 1 to 5
    age: np.ndarray  # [u] years
    gender: np.ndarray  # [u] text
    occupation: np.ndarray  # [u] text
    zip_code: np.ndarray  # [u] text
    year: np.ndarray  # [i] of release; 0 where unknown
    genres: list[list[str]]  # i lists


def fetch(data_dir: Path = CACHE) -> Path:
    """The wheel's path inside `data_dir`, downloaded first if it is not there.

    Raises:
      SystemExit: the wheel is not there and pip cannot get it; with a message, not a trace.
    """
    wheel = Path(data_dir) / WHEEL
    if wheel.exists():
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    download = ["pip", "download", "--no-deps", "--quiet", "-d", str(wheel.parent), PACKAGE]
    done = subprocess.run([sys.executable, "-m", *download], capture_output=True, text=True)
    if done.returncode != 0 or not wheel.exists():
        said = (done.stderr or done.stdout).strip().splitlines() or ["(nothing)"]
        raise SystemExit(
            f"MovieLens-100K: `pip download --no-deps {PACKAGE}` failed.\n"
            f"pip's last line: {said[-1]}\n"
            f"Without a network, run that command on another machine and put {WHEEL} into "
            f"{wheel.parent} (or name its folder with --data-dir)."
        )
    return wheel


def read_table(wheel: zipfile.ZipFile, path: str) -> list[list[str]]:
    """The rows of a tab-separated file, without its first line (the columns' names)."""
    return [line.split("\t") for line in wheel.read(path).decode().splitlines()[1:]]


def load(data_dir: Path = CACHE) -> MovieLens:
    """ML-100K, read from the wheel in `data_dir`."""
    with zipfile.ZipFile(fetch(data_dir)) as wheel:
        ratings, users, items = (
            read_table(wheel, f"{FOLDER}.{end}") for end in ("inter", "user", "item")
        )
    user_row = {row[0]: number for number, row in enumerate(users)}
    item_row = {row[0]: number for number, row in enumerate(items)}
    age, gender, occupation, zip_code = zip(*(row[1:5] for row in users), strict=True)
    return MovieLens(
        user=np.array([user_row[row[0]] for row in ratings]),
        item=np.array([item_row[row[1]] for row in ratings]),
        rating=np.array([float(row[2]) for row in ratings]),
        age=np.array(age, int),
        gender=np.array(gender),
        occupation=np.array(occupation),
        zip_code=np.array(zip_code),
        year=np.array([int(row[2]) if row[2].isdigit() else 0 for row in items]),
        genres=[row[3].split() for row in items],
    )


def synthetic(n: int = 4000, seed: int = 0) -> MovieLens:
    """Made-up data of the same shape, for tests: taste is a rank-2 product plus noise."""
    rng = np.random.default_rng(seed)
    users, items = 100, 150
    user, item = rng.integers(users, size=n), rng.zipf(1.3, size=n) % items
    taste, style = rng.normal(size=(users, 2)), rng.normal(size=(items, 2))
    score = (taste[user] * style[item]).sum(1) + style[item, 0] + rng.normal(size=n) / 2
    names = np.array(["drama", "comedy", "war", "western"])
    return MovieLens(
        user=user,
        item=item,
        rating=np.clip(np.round(score + 3.3), 1, 5),
        age=rng.integers(10, 70, size=users),
        gender=rng.choice(["M", "F"], size=users),
        occupation=rng.choice(["doctor", "student", "writer"], size=users),
        zip_code=rng.integers(10000, 99999, size=users).astype(str),
        year=rng.integers(1930, 1999, size=items),
        genres=[list(rng.permutation(names)[:k]) for k in rng.integers(1, 4, size=items)],
    )
