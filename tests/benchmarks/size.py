"""The size and the words of the project: modules and lines by package, circles, and words that stop a reader.

`make size` prints them. Circles and words have tests too (tests/test_architecture.py, tests/test_language.py).
"""

from __future__ import annotations

import ast
import json
from collections import Counter

from tests.language import find_bare_names, find_private_words
from tests.test_architecture import MODULES, ROOT, imports_of

PACKAGES = ("flows", "tasks", "serving", "deployments", "infra", "tests")


def count_modules(package: str) -> tuple[int, int]:
    """Return how many modules a package has, `__init__` files apart, and how many lines all its files have."""
    files = list((ROOT / package).rglob("*.py"))
    return sum(path.stem != "__init__" for path in files), sum(path.read_text().count("\n") for path in files)


def modules_behind(module: str) -> set[str]:
    """Return the modules of this project that a module imports, directly or through others."""
    found: set[str] = set()
    todo = [module]
    while todo:
        for name in imports_of(MODULES[todo.pop()]):
            if name in MODULES and name not in found and MODULES[name].stem != "__init__":
                found.add(name)
                todo.append(name)
    return found


def main() -> None:
    """Print a table, then one JSON object."""
    sizes = {package: count_modules(package) for package in PACKAGES}
    product = [size for package, size in sizes.items() if package != "tests"]
    words = Counter(word for path in MODULES.values() for word in find_private_words(path.read_text()))
    names = [f"{module}.{name}" for module, path in MODULES.items() for name in find_bare_names(path.read_text())]
    long_functions, functions = 0, 0
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                long_functions += (node.end_lineno or node.lineno) - node.body[0].lineno >= 30
    for package, (modules, lines) in sizes.items():
        print(f"{package:12} {modules:4} modules {lines:7,} lines")
    figures = {
        "modules": sum(modules for modules, _ in product),
        "lines": sum(lines for _, lines in product),
        "modules_behind_flows_batch": len(modules_behind("flows.batch")),
        "readme_lines": (ROOT / "README.md").read_text().count("\n"),
        "private_words": sum(words.values()),
        "bare_names": len(names),
        "functions_within_30_lines": round(1 - long_functions / functions, 3),
    }
    print(*(f"{word}: {count}" for word, count in words.most_common()), *names, sep="\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
