"""MovieLens ratings as click-through data: ids of fields, of genre bags and of crosses.

A rating of 4 or 5 is a click. Nothing here is computed from a rating other than the label
itself, so the test ratings cannot leak into a feature.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from movielens import MovieLens

Columns = dict[str, np.ndarray]  # every array has the ratings as its first axis

FIELDS = ("user", "item", "age", "gender", "occupation", "zip", "year")
CROSSES = (
    ("user", "decade"),
    ("user", "year"),
    ("item", "age"),
    ("item", "gender"),
    ("item", "occupation"),
    ("item", "region"),
)
AGE_STARTS = (18, 25, 35, 45, 50, 56)  # the age groups of MovieLens-1M


def build(data: MovieLens, num_rows: int, drop_threes: bool = False) -> tuple[Columns, int]:
    """The columns of every rating, and how many rows the table of fields needs.

    Args:
      data: ratings, users and items.
      num_rows: rows of the hashed table; crosses are hashed into `[0, num_rows)`.
      drop_threes: leave out the ratings of 3, neither liked nor disliked.

    Returns:
      `fields [n, f]` and `genres [n, g]` with `weights [n, g]` (a bag: 1 / its size, 0 for
      padding), ids of one small table; `crosses [n, c]` and `genre_crosses [n, g]` (the
      user crossed with each genre; same weights), ids of the hashed table; `label [n]`.
    """
    keep = np.flatnonzero(data.rating != 3) if drop_threes else slice(None)
    user, item = data.user[keep], data.item[keep]
    values = {
        "user": user,
        "item": item,
        "age": np.digitize(data.age, AGE_STARTS)[user],
        "gender": data.gender[user],
        "occupation": data.occupation[user],
        "zip": np.array([code[:2] for code in data.zip_code])[user],
        "region": np.array([code[:1] for code in data.zip_code])[user],
        "year": data.year[item],
        "decade": data.year[item] // 10,
    }
    code = {name: np.unique(v, return_inverse=True)[1] for name, v in values.items()}
    genre, weights = (bag[item] for bag in genre_bags(data.genres))  # [n, g]

    sizes = [code[name].max() + 1 for name in FIELDS]
    starts = np.cumsum([0, *sizes])
    columns = {
        "fields": np.stack([code[n] + s for n, s in zip(FIELDS, starts, strict=False)], 1),
        "genres": genre + starts[-1],
        "crosses": np.stack(
            [hashed(k, code[a], code[b], num_rows) for k, (a, b) in enumerate(CROSSES)], 1
        ),
        "genre_crosses": hashed(len(CROSSES), code["user"][:, None], genre, num_rows),
    }
    columns = {name: ids.astype(np.int32) for name, ids in columns.items()}
    label = (data.rating[keep] >= 4).astype(np.float32)
    num_fields = int(starts[-1] + genre.max() + 1)
    return {**columns, "weights": weights, "label": label}, num_fields


def genre_bags(genres: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Each item's genre codes, padded with 0 to the longest bag, and their mean weights."""
    names = sorted({name for bag in genres for name in bag})
    width = max(map(len, genres))
    codes = np.zeros((len(genres), width), int)  # [i, g]
    weights = np.zeros((len(genres), width), np.float32)  # [i, g]
    for row, bag in enumerate(genres):
        codes[row, : len(bag)] = [names.index(name) for name in bag]
        weights[row, : len(bag)] = 1 / max(len(bag), 1)
    return codes, weights


def hashed(salt: int, a: np.ndarray, b: np.ndarray, num_rows: int) -> np.ndarray:
    """The row of the cross `(a, b)`: a mix of both codes and of the cross's own salt."""
    mixed = np.zeros(a.shape, np.uint64)
    for code in (np.full_like(a, salt), a, b):
        mixed = _splitmix64(mixed + code.astype(np.uint64))
    return mixed % np.uint64(num_rows)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random 80/10/10: the indices of training, validation and test ratings."""
    order = np.random.default_rng(seed).permutation(n)
    return tuple(np.split(order, [int(n * 0.8), int(n * 0.9)]))


def take(columns: Columns, rows: np.ndarray) -> Columns:
    """The given ratings of every column."""
    return {name: column[rows] for name, column in columns.items()}


def batches(columns: Columns, rows: np.ndarray, size: int, seed: int) -> Iterator[Columns]:
    """Full batches of the given ratings, shuffled anew for each pass, for ever."""
    if size > len(rows):
        raise ValueError(
            f"batches(columns, rows, size={size}): there are {len(rows)} ratings to train "
            f"on; take a size of at most {len(rows)}"
        )
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        for start in range(0, len(order) - size + 1, size):
            yield take(columns, order[start : start + size])
