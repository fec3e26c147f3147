"""What must hold of the imports of every module, whatever modules there are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "deployments": {"deployments", "flows", "tasks", "serving", "infra"},
    "flows": {"flows", "tasks", "serving"},
    "tasks": {"tasks", "serving"},
    "serving": {"serving"},
    "infra": {"infra"},
}
TOP_LEVEL = {
    *("flows", "tasks", "serving", "deployments", "infra", "tests", "docs", "pyproject.toml"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "Makefile", "constraints.txt"),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
}


def list_tracked_files() -> list[str]:
    """Return the files of the checkout, or skip the test in a tree that is none, such as an unpacked archive."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("no git checkout here: the list of files comes from git")
    return tracked


def imports_of(path: Path) -> Iterator[str]:
    """Yield every module that a file imports when it runs, at its top or inside a function."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one cycle, or nothing where there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            cycle = visit(other, [*trail, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    upward = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / package).rglob("*.py")
        for name in imports_of(path)
        if name.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[package]
    }

    assert set() == upward


def test_serving_never_imports_prefect() -> None:
    assert set() == {
        path for path in (ROOT / "serving").rglob("*.py") if "prefect" in {n.split(".")[0] for n in imports_of(path)}
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {other for other in imports_of(path) if other in MODULES and other != name and path.stem != "__init__"}
        for name, path in MODULES.items()
    }

    assert [] == find_cycle(graph)


def test_a_circle_of_imports_is_found() -> None:
    assert ["b", "c"] == find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_every_package_says_what_it_does() -> None:
    assert [] == [
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if path.stem == "__init__" and not ast.get_docstring(ast.parse(path.read_text()))
    ]


def test_finding_a_run_complete_imports_neither_prefect_nor_torch() -> None:
    heavy = "{'prefect', 'torch', 'matplotlib'}"
    code = f"import sys, tasks.batch.resolve, tasks.batch.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "set()" == done.stdout.strip()


def test_the_top_level_is_the_packages_and_a_few_files() -> None:
    tracked = list_tracked_files()

    assert set() == {path.split("/")[0] for path in tracked if not path.startswith(".")} - TOP_LEVEL
