"""Reads the text of a compiled XLA program: its buffers, and the user's lines behind them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<args>.*)"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), ")


@dataclass
class Instruction:
    """One instruction of a compiled program."""

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...] | None  # None for a tuple
    operands: list[str]
    called: list[str]  # computations it runs
    op_name: str  # jax's name; for a parameter, that of the argument
    frame: int | None
    number: int | None  # of a parameter
    is_root: bool


@dataclass
class Computation:
    """A list of instructions, in the order of execution."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


@dataclass
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    aliased: set[int]  # numbers of the parameters whose buffer becomes an output
    frames: dict[int, tuple[str, int, int | None]]  # id -> (file, line, parent id)

    def buffered(self) -> Iterator[Computation]:
        """The computations whose results are arrays in memory: not the insides of fusions."""
        todo, seen = [self.entry], set()
        while todo:
            name = todo.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            computation = self.computations[name]
            yield computation
            for i in computation.instructions.values():
                if i.op in ("while", "conditional", "call", "async-start"):
                    todo += i.called

    def line(self, frame: int | None, is_users: Callable[[str], bool]) -> str:
        """`file.py:12`: the innermost frame in a user's file; else the innermost of all."""
        first = ""
        while frame is not None and frame in self.frames:
            file, line, frame = self.frames[frame]
            first = first or f"{file}:{line}"
            if is_users(file):
                return f"{file}:{line}"
        return first


def parse(text: str) -> Program:
    """Parses `compiled.as_text()`.

    Args:
      text: the text of one compiled module.

    Returns:
      The program.
    """
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in lines:
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found["name"], Computation())
            entry = found["name"] if found["entry"] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.instructions[found["name"]] = _instruction(found, line)
    header = lines[0] if lines else ""
    aliases = header.split("input_output_alias=", 1)[-1].split("entry_computation", 1)[0]
    aliased = {int(n) for n in _ALIAS.findall(aliases)} if "input_output_alias" in header else set()
    return Program(computations, entry, aliased, _frames(lines))


def _instruction(found: re.Match[str], line: str) -> Instruction:
    rest = found["args"]
    inside, _, attributes = _close(rest)
    branches = _BRANCHES.search(attributes)
    called = _CALLED.findall(attributes)
    called += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
    array = re.match(r"(\w+)\[([\d,]*)\]", found["type"])
    shape = tuple(int(d) for d in array[2].split(",") if d) if array else None
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', attributes)
    return Instruction(
        name=found["name"],
        op=found["op"],
        dtype=array[1] if array else "",
        shape=shape,
        operands=re.findall(r"%([\w.\-]+)", inside),
        called=called,
        op_name=op_name[1].replace("\\'", "'") if op_name else "",
        frame=int(frame[1]) if frame else None,
        number=int(inside) if found["op"] == "parameter" else None,
        is_root=bool(found["root"]),
    )


def _close(text: str) -> tuple[str, str, str]:
    """Splits behind the parenthesis that closes an operand list."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], ")", text[i + 1 :]
    return text, "", ""


def _frames(lines: list[str]) -> dict[int, tuple[str, int, int | None]]:
    """The stack frames in the header of a module."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif current is not None and (row := re.match(r"^(\d+) (.*)$", line)):
            current[int(row[1])] = row[2]
        elif line.startswith(("%", "ENTRY")):
            break
    number = re.compile(r"(\w+)=(\d+)")
    files = {k: v.strip('"') for k, v in tables.get("FileNames", {}).items()}
    places = {k: dict(number.findall(v)) for k, v in tables.get("FileLocations", {}).items()}
    frames: dict[int, tuple[str, int, int | None]] = {}
    for k, v in tables.get("StackFrames", {}).items():
        fields = dict(number.findall(v))
        place = places.get(int(fields.get("file_location_id", 0)), {})
        file = files.get(int(place.get("file_name_id", 0)), "")
        parent = int(fields.get("parent_frame_id", 0)) - 1  # XLA counts parents from one, 1 is none
        frames[k] = (file, int(place.get("line", 0)), parent if parent > 0 else None)
    return frames
