"""The borders between the packages."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT


def imported(path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return modules | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", sorted((ROOT / "runtime" / "fiddler_run").rglob("*.py")), ids=lambda path: path.name)
def test_the_runtime_never_imports_the_planner(path):
    assert not any(module.startswith("fiddler_opt") for module in imported(path))


@pytest.mark.parametrize("path", sorted((ROOT / "fiddler_opt").glob("*.py")), ids=lambda path: path.name)
def test_only_the_measuring_modules_import_torch(path):
    if not path.name.startswith(("bench_", "trace_")):
        assert not any(module.split(".")[0] in ("torch", "transformers") for module in imported(path))


def test_planning_loads_no_torch():
    code = "import sys, fiddler_opt.cli, fiddler_opt.compiler; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
