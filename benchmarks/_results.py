"""The command line of a benchmark, and the files that it writes."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def command_line(doc: str | None, only: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have: `size`, `only` and `json` of what it parses.

    Args:
      doc: of the script.
      only: what `--only TABLE` does there: `make bench` gives it to all of them.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", default="full")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="size")
    parser.add_argument("--only", metavar="TABLE", help=only)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write OUT and OUT.md")
    return parser


def heading(title: str, facts: dict[str, Any]) -> list[str]:
    """How the text of a report begins."""
    return [f"# {title}", ", ".join(f"{k} {v}" for k, v in facts.items())]


def write(out: Path | None, data: dict[str, Any], text: Sequence[str]) -> None:
    """Writes numbers to `out` and text beside it; nothing for `None`."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1) + "\n")
        out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
