"""What keeps the house easy to read: short functions, small constructors, few modules in the root."""

import ast
from collections.abc import Iterator

import pytest
from house import ROOT, sources

MOST_LINES, MOST_PARAMETERS = 60, 7
PARSERS = {"hvdtrain.cli.make_parser"}  # a list of words, which is read as one


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below ``node`` under its full name."""
    for child in ast.iter_child_nodes(node):
        inside = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
        if isinstance(child, ast.FunctionDef):
            yield inside, child
        yield from functions(child, inside)


FUNCTIONS = dict(pair for module, text in sources().items() for pair in functions(ast.parse(text), module))


def lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: ast.FunctionDef) -> int:
    """Without ``self``."""
    return len(function.args.args) + len(function.args.kwonlyargs) - 1


def test_a_function_fits_a_screen():
    assert {name: n for name, f in FUNCTIONS.items() if (n := lines(f)) > MOST_LINES and name not in PARSERS} == {}


def test_a_constructor_that_needs_more_wants_an_object():
    made = {name: f for name, f in FUNCTIONS.items() if name.endswith(".__init__")}
    assert len(made) > 50
    assert {name: n for name, f in made.items() if (n := parameters(f)) > MOST_PARAMETERS} == {}


def test_the_root_holds_what_a_reader_meets_first():
    assert len(list((ROOT / "hvdtrain").glob("*.py"))) <= 16


def test_the_walk_is_read_in_one_sitting():
    assert len((ROOT / "hvdtrain" / "train.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize("word", ["allreduce", "whole", "lm", "seq2seq", "classify", "adamw"])
def test_the_walk_names_no_mode(word: str):
    assert word not in (ROOT / "hvdtrain" / "train.py").read_text().lower().replace("whole checkpoint", "")
