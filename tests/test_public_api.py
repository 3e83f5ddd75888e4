"""The contract: names and signatures; the house rules: docstrings, layers, file sizes."""

import ast
import inspect
import textwrap
import types
from pathlib import Path

import pytest

import sparse_embed as se

# --- names and signatures -----------------------------------------------------------------

# Outside programs rely on these. `None`: the name alone is promised.
CONTRACT = {
    "RowSparse": "(indices, rows, shape)",
    "coalesce": "(grad, *, size=None, return_counts=False)",
    "lookup": "(table, ids, *, padding_idx=None, scale_grad_by_freq=False, mode='fill')",
    "lookup_bag": (
        "(table, ids, *, weights=None, combiner='sum', offsets=None, segment_ids=None,"
        " num_segments=None, padding_idx=None, mode='fill')"
    ),
    "renorm": "(table, ids, max_norm, norm_type=2.0)",
    "value_and_grad": "(fun, argnums=0, has_aux=False, *, tables=None)",
    "grad": "(fun, argnums=0, has_aux=False, *, tables=None)",
    "touched": "(fun, argnums=0)",
    "lazy": "(inner, *, clock='global')",
    "train_step": "(loss_fn, tx, *, argnums=0, has_aux=False)",
    "global_norm": None,
    "clip_by_global_norm": None,
    "audit": "(step, *args)",
    "assert_row_sparse": "(step, *args)",
}


def signature(fn, promised: str) -> str:
    """The signature of `fn` without annotations and without options beyond the promise."""
    namespace: dict = {}
    exec(f"def stub{promised}: ...", namespace)
    names = inspect.signature(namespace["stub"]).parameters
    kept = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(fn).parameters.values()
        if p.name in names or p.kind is not p.KEYWORD_ONLY or p.default is p.empty
    ]
    return str(inspect.Signature(kept))


@pytest.mark.parametrize("name", CONTRACT)
def test_name_is_exported(name):
    assert hasattr(se, name)


@pytest.mark.parametrize("name", [name for name, promised in CONTRACT.items() if promised])
def test_signature_is_the_promised_one(name):
    assert signature(getattr(se, name), CONTRACT[name]) == CONTRACT[name]


def test_an_option_may_be_added_and_nothing_else():
    promised = "(a, *, b=1)"
    assert signature(lambda a, *, b=1, c=2: 0, promised) == promised
    assert signature(lambda a, c=2, *, b=1: 0, promised) != promised
    assert signature(lambda a, *, b=1, c: 0, promised) != promised
    assert signature(lambda a, b=1: 0, promised) != promised
    assert signature(lambda a, *, b=2: 0, promised) != promised


# --- docstrings ---------------------------------------------------------------------------


def public_names(namespace: types.ModuleType) -> dict[str, object]:
    """What a user may type after `se.`, public submodules of the package included."""
    found: dict[str, object] = {}
    names = [name for name in vars(namespace) if not name.startswith("_")]
    for name in getattr(namespace, "__all__", names):
        value = getattr(namespace, name)
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith(f"{namespace.__name__}."):
                found |= {f"{name}.{key}": x for key, x in public_names(value).items()}
        elif callable(value):
            found[name] = value
    return found


def definition(value) -> ast.FunctionDef | None:
    """What runs when `value` is called; `None` for a class without an `__init__`."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    if isinstance(node, ast.ClassDef):
        return next((f for f in node.body if getattr(f, "name", "") == "__init__"), None)
    return node


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    found = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return [arg for arg in found if arg.arg != "self"]


def missing_sections(value) -> list[str]:
    """Sections that the docstring of a public function or class should have and has not."""
    doc = inspect.getdoc(value) or ""
    called = definition(value)
    wanted = ["Example", ">>>"]
    if called is not None and arguments(called):
        wanted.append("Args:")
    if called is not None and any(isinstance(node, ast.Raise) for node in ast.walk(called)):
        wanted.append("Raises:")
    return [section for section in wanted if section not in doc]


@pytest.mark.parametrize("name", sorted(public_names(se)))
def test_docstring_is_complete(name):
    missing = missing_sections(public_names(se)[name])
    assert not missing, f"the docstring of se.{name} lacks {missing}"


@pytest.mark.parametrize("name", sorted(public_names(se)))
def test_arguments_are_annotated(name):
    called = definition(public_names(se)[name])
    if called is not None:
        bare = [arg.arg for arg in arguments(called) if arg.annotation is None]
        assert not bare, f"se.{name}: no type for {bare}"
        assert called.returns or called.name == "__init__", f"se.{name}: no result type"


def test_an_incomplete_docstring_is_noticed():
    def bare(x):
        raise ValueError(x)

    def full(x):
        """One line.

        Args:
          x: a number.

        Raises:
          ValueError: always.

        Example:
          >>> 1
          1
        """
        raise ValueError(x)

    assert missing_sections(bare) == ["Example", ">>>", "Args:", "Raises:"]
    assert missing_sections(full) == []


# --- layers and files ---------------------------------------------------------------------

PACKAGE = Path(se.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# A module imports only from lower levels. `__init__` of the package stands above them all.
LEVELS = [
    {"_errors", "_segments", "_jaxpr", "_blocks", "_hlo", "_report", "_tuning", "exact._ledger"},
    {"_params_ema", "_rowwise_adagrad", "_ids", "_rowwise", "_reads", "_live", "_layout"}
    | {"_pages", "_seal", "_first_seen", "_each_block", "_reductions", "exact._rest"},
    {"_row_sparse", "_scratch", "_lookup", "_renorm", "_bag_reduce", "_plan", "_delayed", "_idle"}
    | {"exact._momentum", "exact._adaptive", "exact._state"},
    {"_coalesce", "_listed", "_bag", "_tags", "_replay", "_on_rows"}
    | {"exact._table", "exact._checks"},
    {"_walk", "_sweep", "_update", "_staged", "exact._catch_up"},
    {"_program", "_filled", "_separable", "_lazy_state", "exact._rest_step"},
    {"_differentiate", "_touched", "_settled", "_audit", "_block_program"},
    {"_grad", "_row_pass"},
    {"_later", "_train_step"},
    {"_in_blocks"},
    {"_lazy"},
    {"_norms", "exact._transform"},
    {"exact._closed_form", "exact._replay"},
    {"exact._build"},
    {"exact._sgd", "exact._rmsprop", "exact._adam", "exact._adamax"},
    {"exact"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def module_name(file: str) -> str:
    """`exact._adam` for `exact/_adam.py`, `exact` for `exact/__init__.py`."""
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, file: str, modules: set[str]) -> set[str]:
    """Which of `modules` the file imports, however the import is written.

    `"__init__"` stands for the package itself, and for a name that is taken from it.
    """
    package = ["sparse_embed", *Path(file).parent.parts]
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            targets |= {f"{start}.{alias.name}" for alias in node.names}
    found = set()
    for target in targets:
        if target.split(".")[0] == "sparse_embed":
            inside = target.removeprefix("sparse_embed").lstrip(".") + "."
            # The longest match: the module itself, not the packages around it.
            owners = [m for m in modules if inside.startswith(f"{m}.")]
            found.add(max(owners, key=len, default="__init__"))
    return found


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"__init__.py"}))
def test_imports_point_down(file):
    name = module_name(file)
    place = "place it in LEVELS of tests/test_public_api.py"
    assert name in LEVEL, f"{file} is on no level: {place}"
    modules = {module_name(other) for other in FILES} - {"__init__"}
    for other in imported_modules(FILES[file].read_text(), file, modules):
        assert other != "__init__", f"{file} imports the package itself: name the module"
        assert other in LEVEL, f"{other} is on no level: {place}"
        assert LEVEL[other] < LEVEL[name], (
            f"{file} (level {LEVEL[name]}) imports {other} (level {LEVEL[other]}):"
            " imports point down; move the code, or the module in LEVELS"
        )


@pytest.mark.parametrize(
    "source, file, expected",
    [
        ("from sparse_embed._a import f", "_b.py", {"_a"}),
        ("from sparse_embed import _a", "_b.py", {"_a"}),
        ("import sparse_embed._a as a", "_b.py", {"_a"}),
        ("from ._a import f", "_b.py", {"_a"}),
        ("from . import _a", "_b.py", {"_a"}),
        ("from .._a import f", "exact/_c.py", {"_a"}),
        ("from ._d import f", "exact/_c.py", {"exact._d"}),
        ("from sparse_embed.exact import adam", "_b.py", {"exact"}),
        ("import sparse_embed as se", "_b.py", {"__init__"}),
        ("from sparse_embed import lookup", "_b.py", {"__init__"}),
        ("import jax\nfrom optax import adam", "_b.py", set()),
    ],
)
def test_every_spelling_of_an_import_is_seen(source, file, expected):
    assert imported_modules(source, file, {"_a", "_ab", "exact", "exact._d"}) == expected


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
    assert not [file for file in FILES if "utils" in module_name(file)]
