"""Limits that keep the code readable, besides those that ruff checks."""

import ast
from functools import cache
from pathlib import Path

from conftest import ROOT

FOLDERS = ("fiddler_opt", "runtime", "tests", "benchmarks", "profiles", "examples")
MAX_FILE_LINES = 250
MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 100
MAX_TUPLE_ASSIGNMENTS = 0.03  # of all assignments; one per line is easier to debug


def sources(*endings: str) -> list[Path]:
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return [path for path in files if path.suffix in endings]


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """The definitions and assignments of all files."""
    trees = ((path, ast.parse(path.read_text())) for path in sources(".py"))
    kinds = (ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if type(node) in kinds]


def test_files_and_lines_are_short():
    for path in sources(".py", ".cpp", ".h"):
        lines = path.read_text().splitlines()
        assert len(lines) <= MAX_FILE_LINES, path
        assert max(map(len, lines), default=0) <= MAX_COLUMNS, path


def test_functions_are_short():
    for path, node in nodes():
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_assignments_are_one_per_line():
    every = [node for _, node in nodes() if not isinstance(node, ast.FunctionDef)]
    several = [
        node
        for node in every
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    assert len(several) <= MAX_TUPLE_ASSIGNMENTS * len(every)
