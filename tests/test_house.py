"""The house rules: rooms and floors, faces, small files."""

import ast
from pathlib import Path

import pytest

import sparse_embed as se

PACKAGE = Path(se.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# A room imports only from floors below its own. The package's `__init__` stands above them all.
FLOORS = [
    {"_core"},
    {"_container", "transforms", "_on_rows", "_views"},
    {"_lookup", "_differentiate", "_update"},
    {"_lazy", "_audit"},
    {"exact"},
    {"_step"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
INSIDE = sorted(file for file in FILES if "/" in file and not file.endswith("__init__.py"))


def imports(source: str, file: str) -> list[tuple[str, str]]:
    """What a file takes from this package: `("_core.errors", "message")`, however it is written.

    The name is "" where a module is imported whole; the module "" for the package itself.
    """
    package = ["sparse_embed", *Path(file).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    own = [(module.split("."), name) for module, name in found]
    return [(".".join(parts[1:]), name) for parts, name in own if parts[0] == "sparse_embed"]


def wrong_imports(
    source: str, file: str, floor: dict[str, int], faces: dict[str, set]
) -> list[str]:
    """What a file in a room imports against the rules."""
    room, wrong = file.split("/")[0], []
    for module, name in imports(source, file):
        other, _, inside = (module or name).partition(".")
        if other == room:
            continue
        if other not in floor or not module:
            wrong.append(f"{module or name}: take it from the face of a room")
        elif floor[other] >= floor[room]:
            wrong.append(f"{other} is not on a floor below {room}")
        elif inside or name not in faces[other]:
            wrong.append(f"{module}.{name}: past the face of {other}")
    return wrong


def exported(source: str) -> set[str]:
    """The names that a face re-exports."""
    return {
        alias.asname
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }


FACES = {room: exported((PACKAGE / room / "__init__.py").read_text()) for room in FLOOR}


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FLOOR), "place it in FLOORS of tests/test_house.py"
    assert {file for file in FILES if "/" not in file} == {"__init__.py"}


@pytest.mark.parametrize("file", INSIDE)
def test_imports_point_down_and_through_faces(file):
    assert wrong_imports(FILES[file].read_text(), file, FLOOR, FACES) == []


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_files_of_a_room_import_each_other_without_a_circle(room):
    files = {Path(f).stem: f for f in INSIDE if f.startswith(f"{room}/")}
    needs = {}
    for stem, file in files.items():
        taken = [m if m != room else f"{m}.{n}" for m, n in imports(FILES[file].read_text(), file)]
        inside = {module.split(".")[1] for module in taken if module.startswith(f"{room}.")}
        assert inside <= files.keys(), f"{file} imports the face of its own room"
        needs[stem] = inside
    while free := {stem for stem, inside in needs.items() if not inside}:
        needs = {stem: inside - free for stem, inside in needs.items() if stem not in free}
    assert not needs, f"a circle among {sorted(needs)}"


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_face_says_what_the_room_is_for(room):
    doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    lines = doc.splitlines()
    assert 4 <= len(lines) <= 7, f"the docstring of {room}"
    starts = [line.split(":")[0] for line in lines]
    assert all(word in starts for word in ("In", "Out", "Never")), f"the docstring of {room}"


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_face_shows_nothing_that_no_other_room_uses(room):
    public = exported(FILES["__init__.py"].read_text())
    used = {
        name
        for file in INSIDE
        if not file.startswith(f"{room}/")
        for module, name in imports(FILES[file].read_text(), file)
        if module == room
    }
    hidden = room.startswith("_")
    assert FACES[room] <= used | (public if hidden else FACES[room])


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from sparse_embed._low import f", []),
        ("import jax\nfrom optax import adam", []),
        ("from sparse_embed._mid.other import g", []),
        ("from .other import g", []),
        ("from sparse_embed._low.file import f", ["_low.file.f: past the face of _low"]),
        ("from sparse_embed._low import hidden", ["_low.hidden: past the face of _low"]),
        ("import sparse_embed._low.file", ["_low.file.: past the face of _low"]),
        ("from .._low.file import f", ["_low.file.f: past the face of _low"]),
        ("from sparse_embed._high import f", ["_high is not on a floor below _mid"]),
        ("from sparse_embed._beside import f", ["_beside is not on a floor below _mid"]),
        ("from sparse_embed import lookup", ["lookup: take it from the face of a room"]),
        ("from sparse_embed import _low", ["_low: take it from the face of a room"]),
        ("import sparse_embed as se", [": take it from the face of a room"]),
    ],
)
def test_a_wrong_import_is_noticed(source, expected):
    floor = {"_low": 0, "_mid": 1, "_beside": 1, "_high": 2}
    faces = {room: {"f"} for room in floor}
    assert wrong_imports(source, "_mid/file.py", floor, faces) == expected


@pytest.mark.parametrize("file", sorted(FILES))
def test_no_lazy_imports(file):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for function in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(function, functions):
            for node in ast.walk(function):
                assert not isinstance(node, (ast.Import, ast.ImportFrom)), (
                    f"{file}:{node.lineno}: import at the top of the file"
                )


@pytest.mark.parametrize("file", sorted(FILES))
def test_file_is_small(file):
    lines = len(FILES[file].read_text().splitlines())
    assert lines <= 250, f"{file} has {lines} lines, more than 250: does it hold two ideas?"


def test_no_module_is_called_utils():
    assert not [file for file in FILES if "utils" in file]
