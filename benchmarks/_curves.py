"""The figures of `peers.py`: step time against one size, on logarithmic axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LOOKS = {  # colours of Okabe and Ito; markers and dashes tell the lines apart without them
    "sparse_embed": ("#D55E00", "o", "-"),
    "dense optax": ("#0072B2", "s", "--"),
    "torch EmbeddingBag, SparseAdam": ("#009E73", "^", "-."),
}
SECOND = ("#CC79A7", "D", ":")  # where ours has another optimizer than Adam


def draw(rows: Sequence[dict[str, Any]], x: str, label: str, title: str, path: Path) -> None:
    """One line for each step and optimizer. The same file for the same numbers."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    panel = figure.subplots()
    for optimizer, step in dict.fromkeys((row["optimizer"], row["step"]) for row in rows):
        mine = [row for row in rows if (row["optimizer"], row["step"]) == (optimizer, step)]
        color, marker, dashes = LOOKS[step] if optimizer == "adam" else SECOND
        name = step if "Adam" in step else f"{step}, {optimizer}"
        look = dict(color=color, marker=marker, linestyle=dashes, markersize=4, label=name)
        panel.plot([row[x] for row in mine], [row["ms (median)"] for row in mine], **look)
    panel.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a step (median)")
    panel.set_title(title, fontsize=9)
    panel.grid(True, which="major", linewidth=0.4, alpha=0.5)
    panel.legend(fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "peers"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
