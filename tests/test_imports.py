"""Import rules between folders."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

# A folder or a top-level module may import those below it in its list, never those above.
RUNTIME = [
    "__main__",
    "cli",
    "uses",
    "flags",
    "flag_checks",
    "flag_types",
    "serving",
    "loading",
    "generation",
    "ranks",
    "engine",
    "kernels",
    "weights",
    "models",
    "plan",
    "encodings",
    "system",
    "command",
    "errors",
]
PLANNER = ["entry", "cli", "commands", "insight", "measure", "solve", "inputs", "units"]
PACKAGES = {
    "fiddler_run": (ROOT / "runtime" / "fiddler_run", RUNTIME),
    "fiddler_opt": (ROOT / "fiddler_opt", PLANNER),
}
NEEDS_TORCH = {"measure", "insight/probe.py"}  # the rest of the planner runs without it


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    folder, _ = PACKAGES[package]
    files = (path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path for path in files
    }


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The names that a module imports, also inside functions; our own as dotted modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known.keys() or {node.module}
    return found


def test_folders_import_only_lower_folders():
    for package, (_, order) in PACKAGES.items():
        known = modules(package)
        for name, path in known.items():
            own = order.index(name.split(".")[1])
            for other in imported(path, known) & known.keys():
                assert order.index(other.split(".")[1]) >= own, (
                    f"{name} imports {other}, which is above it"
                )


def test_no_import_cycles():
    known = modules("fiddler_run") | modules("fiddler_opt")
    uses = {name: imported(path, known) & known.keys() for name, path in known.items()}
    while uses:
        leaves = {name for name, used in uses.items() if not used & uses.keys()}
        assert leaves, f"modules that import each other: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in leaves}


def test_runtime_never_imports_planner():
    for name, path in modules("fiddler_run").items():
        assert not any(other.startswith("fiddler_opt") for other in imported(path, {})), name


def test_only_measuring_modules_import_torch():
    folder, _ = PACKAGES["fiddler_opt"]
    for name, path in modules("fiddler_opt").items():
        place = path.relative_to(folder)
        if place.parts[0] not in NEEDS_TORCH and str(place) not in NEEDS_TORCH:
            assert not {other.split(".")[0] for other in imported(path, {})} & {
                "torch",
                "transformers",
            }, name


def test_planning_loads_no_torch():
    code = (
        "import sys, fiddler_opt.cli, fiddler_opt.solve.compiler; sys.exit(bool({'torch',"
        " 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
