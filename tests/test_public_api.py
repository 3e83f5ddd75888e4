"""The contract: names and signatures; the house rules: docstrings, layers, file sizes."""

import ast
import inspect
import re
import textwrap
import types

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


# A shape in brackets: `[]`, `[n]`, `[V, *features]`, `[..., l]`.
SHAPE = re.compile(r"\[(\*?[A-Za-z_.]+( [-+] 1)?(, )?|\.\.\.(, )?)*\]")
# These are given functions and trees, whose arrays may have any shape.
NO_SHAPES = {"train_step", "audit", "assert_row_sparse", "lazy", "Tuning", "AuditReport"}


def missing_sections(name: str, value) -> list[str]:
    """Sections that the docstring of a public function or class should have and has not."""
    doc = inspect.getdoc(value) or ""
    called = definition(value)
    wanted = ["Example", ">>>"]
    if called is not None and arguments(called):
        wanted.append("Args:")
    if called is not None and not inspect.isclass(value):
        wanted.append("Raises:")
        nothing = isinstance(called.returns, ast.Constant) and called.returns.value is None
        wanted += [] if nothing else ["Returns:"]
    missing = [section for section in wanted if section not in doc]
    described = doc.split("Example")[0]
    if "Args:" in wanted and name not in NO_SHAPES and not SHAPE.search(described):
        missing.append("a shape in brackets")
    return missing


@pytest.mark.parametrize("name", sorted(public_names(se)))
def test_docstring_is_complete(name):
    missing = missing_sections(name, public_names(se)[name])
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
          x: `[n, *features]`.

        Returns:
          A number.

        Raises:
          ValueError: always.

        Example:
          >>> 1
          1
        """
        raise ValueError(x)

    sections = ["Example", ">>>", "Args:", "Raises:", "Returns:", "a shape in brackets"]
    assert missing_sections("bare", bare) == sections
    assert missing_sections("full", full) == []
    assert not SHAPE.search("params['user'][3] and x[i, 0]")
