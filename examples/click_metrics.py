"""How good a click predictor is, and what simple predictors reach on the same split."""

from __future__ import annotations

import numpy as np
from click_features import FIELDS, Columns


def auc(label: np.ndarray, logit: np.ndarray) -> float:
    """The chance that a click is ranked above a non-click, ties counted as a half.

    Examples:
      >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
      1.0
      >>> auc(np.array([0, 1]), np.array([0.5, 0.5]))
      0.5
    """
    _, place, count = np.unique(logit, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # 1 for the lowest, ties averaged
    clicks = int((label > 0).sum())
    above = rank[label > 0].sum() - clicks * (clicks + 1) / 2
    return float(above / (clicks * (len(label) - clicks)))


def log_loss(label: np.ndarray, logit: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels."""
    logit = logit.astype(np.float64)
    return float(np.mean(np.logaddexp(0, logit) - label * logit))


def score(label: np.ndarray, logit: np.ndarray) -> dict[str, float]:
    """Both metrics by name."""
    return {"auc": auc(label, logit), "log_loss": log_loss(label, logit)}


def in_words(scores: dict[str, float]) -> str:
    """The metrics as they are printed."""
    return f"AUC {scores['auc']:.4f}, log-loss {scores['log_loss']:.4f}"


def baselines(columns: Columns, parts: tuple) -> dict[str, dict[str, float]]:
    """Test scores of three predictors fitted on the training ratings.

    Args:
      columns: as from `click_features.build`.
      parts: indices of training, validation and test, as from `click_features.split`.
    """
    train, _, test = parts
    label = columns["label"]
    user, item = (columns["fields"][:, FIELDS.index(name)] for name in ("user", "item"))
    rate = label[train].mean()
    logits = {
        "click rate": np.full(len(label), np.log(rate / (1 - rate))),
        "click rate of the item": item_rate(item, label, train),
        "logistic on user and item": additive_logistic(user, item, label, train),
    }
    return {name: score(label[test], logit[test]) for name, logit in logits.items()}


def item_rate(item, label, train, prior: float = 10.0) -> np.ndarray:
    """Log-odds of each rating's item, its clicks smoothed by `prior` average ratings."""
    rate, size = label[train].mean(), item.max() + 1
    clicks = np.bincount(item[train], label[train], size) + prior * rate
    shown = np.bincount(item[train], minlength=size) + prior
    return np.log(clicks / (shown - clicks))[item]


def additive_logistic(user, item, label, train, l2: float = 1.0, rounds: int = 60):
    """Logistic regression on user and item alone, by Newton steps in turn."""
    bias = 0.0
    sides = {"user": user, "item": item}
    effects = {name: np.zeros(ids.max() + 1) for name, ids in sides.items()}

    def logit(rows=slice(None)):
        return bias + sum(effects[name][ids[rows]] for name, ids in sides.items())

    for _ in range(rounds):
        for name, ids in sides.items():
            p, size = 1 / (1 + np.exp(-logit(train))), len(effects[name])
            slope = np.bincount(ids[train], p - label[train], size) + l2 * effects[name]
            effects[name] -= slope / (np.bincount(ids[train], p * (1 - p), size) + l2)
        p = 1 / (1 + np.exp(-logit(train)))
        bias -= np.sum(p - label[train]) / np.sum(p * (1 - p))
    return logit()
