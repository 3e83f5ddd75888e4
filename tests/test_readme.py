"""Every Python block of the README runs, each on its own."""

import re
import textwrap
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
# A block that must not be run is marked ```python no-run
_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)```python[ \t]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.M | re.S
)


def blocks(text: str) -> list[tuple[int, str]]:
    """The line and the code of every block to run."""
    found = _BLOCK.finditer(text)
    return [(text.count("\n", 0, m.start("code")), textwrap.dedent(m["code"])) for m in found]


BLOCKS = blocks(README.read_text(encoding="utf-8"))


def test_there_are_blocks():
    assert BLOCKS


@pytest.mark.parametrize("line, code", BLOCKS, ids=[f"line{line}" for line, _ in BLOCKS])
def test_block(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The newlines make a traceback name the line of the README.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "__main__"})


def test_blocks_are_found():
    text = (
        "```python\na = 1\n```\n"
        "```python no-run\nb = 1\n```\n"
        "```sh\nmake\n```\n"
        "- item\n\n  ```python\n  if True:\n      c = 1\n  ```\n"
    )
    assert blocks(text) == [(1, "a = 1\n"), (12, "if True:\n    c = 1\n")]
