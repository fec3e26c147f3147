"""The graph of what each file of the project needs: what it imports, what it names, and what is declared.

A node is a file, by its path from the root; a fixture of a conftest.py is a node of its own, `PATH::FIXTURE`, so that a
test needs the fixtures that it names and no others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

PACKAGES = ("flows", "tasks", "serving", "deployments", "infra", "tests")
# The package that imports each of its names when it is first used.
LAZY = "flows/__init__.py"
EDGES = Path(__file__).with_name("edges.toml")
_MODULE = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
_FILE = re.compile(r"[\w@-]+(?:/[\w@-]+)*(?:\.[\w-]+)+|(?:infra/docker/)?Dockerfile")
_WORD = re.compile(r"\w+")
# Files in which names of modules and files are looked for. Pages are not: they name much that nothing reads by them.
_SEARCHED = (".py", ".yaml", ".yml", ".service", ".ipynb", "Dockerfile")
# What is larger is data, and names no module.
_TEXT_BYTES_MAX = 400_000
_FixtureNode = ast.FunctionDef | ast.AsyncFunctionDef


class UnknownEdgeError(Exception):
    """A declaration in edges.toml names no file, or lacks its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """What edges.toml declares.

    `edges` are pairs of patterns: who reads or starts, and what. `everything` are patterns of files that reach every
    test; `nothing` those of files that no test of a server reads.
    """

    edges: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    everything: tuple[str, ...]
    nothing: tuple[str, ...]


def read_declarations(path: Path = EDGES) -> Declarations:
    """Read edges.toml.

    Raises:
        UnknownEdgeError: An entry has no reason.
    """
    content = tomllib.loads(path.read_text())
    for entry in [each for kind in ("edge", "everything", "nothing") for each in content.get(kind, [])]:
        if not entry.get("reason"):
            message = f"each entry of {path.name} must have a reason, got {entry}: say why it is there"
            raise UnknownEdgeError(message)
    return Declarations(
        edges=tuple((tuple(entry["reader"]), tuple(entry["reads"])) for entry in content.get("edge", [])),
        everything=tuple(entry["files"] for entry in content.get("everything", [])),
        nothing=tuple(entry["files"] for entry in content.get("nothing", [])),
    )


@dataclass(frozen=True)
class Graph:
    """What each node needs, directly."""

    needs: Mapping[str, frozenset[str]]

    @cached_property
    def needed_by(self) -> Mapping[str, frozenset[str]]:
        """The same, from what is needed to those that need it."""
        turned: dict[str, set[str]] = {}
        for node, others in self.needs.items():
            for other in others:
                turned.setdefault(other, set()).add(node)
        return {node: frozenset(others) for node, others in turned.items()}

    def find_chains(self, changed: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return each node that a change of files reaches, with the shortest chain from one of them to it."""
        chains = {node: (node,) for node in sorted(changed)}
        waiting = deque(chains)
        while waiting:
            node = waiting.popleft()
            for other in sorted(self.needed_by.get(node, ())):
                if other not in chains:
                    chains[other] = (*chains[node], other)
                    waiting.append(other)
        return chains


def list_files(root: Path) -> list[str]:
    """Return the files of a checkout, those that git does not know yet among them, by their paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (root / path).is_file()})


def build_graph(root: Path, files: Sequence[str], declarations: Declarations) -> Graph:
    """Build the graph of a checkout.

    Args:
        root: Its folder.
        files: Its files, with those that a change has removed: who still names one of these needs it.
        declarations: What edges.toml declares.

    Raises:
        UnknownEdgeError: A declaration names no file.
    """
    modules = {name_module(path): path for path in files if path.endswith(".py") and path.split("/")[0] in PACKAGES}
    needs: dict[str, set[str]] = {path: set() for path in files}
    for importer, imported in _find_imports(root):
        if importer in modules:
            needs[modules[importer]] |= {modules[name] for name in _with_parents(imported) if name in modules}
    names = _FileNames(files, modules, root)
    for path in files:
        # What `flows` imports when a name is first used is needed by who uses the name.
        skipped = path == LAZY or is_named(path, declarations.everything)
        if not skipped and path.endswith(_SEARCHED) and (text := _read_text(root / path)):
            needs[path] |= names.find(path, text, known=needs[path]) - {path}
        if path.startswith("tests/") and path.endswith(".py"):
            needs[path] |= {near for near in _list_conftests(path) if near in needs} - {path}
    _add_fixtures(root, files, needs, names)
    for readers, reads in declarations.edges:
        found = set().union(*(_match_some(pattern, files) for pattern in reads))
        for reader in {each for pattern in readers for each in _match_some(pattern, needs)}:
            needs[reader] |= found - {reader}
    return Graph({node: frozenset(others) for node, others in needs.items()})


def is_named(path: str, patterns: Iterable[str]) -> bool:
    """Return whether one of some patterns names a path: `*` stands for no `/`, and `**` for any text."""
    return any(_compile_pattern(pattern).fullmatch(path) for pattern in patterns)


@cache
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    parts = [re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**")]
    return re.compile(".*".join(parts))


def _match_some(pattern: str, nodes: Iterable[str]) -> list[str]:
    """Return the nodes that a pattern of edges.toml names, of which there must be one."""
    found = [node for node in nodes if is_named(node, [pattern])]
    if not found:
        message = f"each side of a declared edge must name a file, got {pattern}, which names none: mend {EDGES.name}"
        raise UnknownEdgeError(message)
    return found


def name_module(path: str) -> str:
    """Return the name by which the module in a file is imported."""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def _find_imports(root: Path) -> Iterator[tuple[str, str]]:
    """Yield pairs of modules, the first of which imports the second, wherever in its file; none for types alone."""
    import grimp

    # It finds packages on the path of this process, so that is where the checkout must be.
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            yield importer, imported


def _with_parents(module: str) -> list[str]:
    """Return a module and the packages around it, whose __init__.py runs first."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _list_conftests(path: str) -> list[str]:
    return [f"{folder}/conftest.py" for folder in PurePosixPath(path).parents if str(folder) != "."]


def _read_text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _TEXT_BYTES_MAX:
        return ""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


class _FileNames:
    """Finds the files that a text names: modules by their dotted names, others by the end of their paths."""

    def __init__(self, files: Sequence[str], modules: Mapping[str, str], root: Path) -> None:
        self.modules = modules
        self.by_name: dict[str, list[str]] = {}
        for path in files:
            self.by_name.setdefault(path.rpartition("/")[2], []).append(path)
        self.lazy = _find_lazy_names(root, modules)

    def find(self, path: str, text: str, known: Collection[str]) -> set[str]:
        """Return what a file names: in the strings of its code, or in its text where it is no Python.

        `known` is what the file needs anyway.
        """
        found = self.find_in(text, near=path)
        if path.endswith(".py") and any(each not in known for each in found if not each.endswith("__main__.py")):
            # To parse a file takes most of the time, and most names are those of imports.
            found = self.find_in("\n".join(_list_strings(ast.parse(text))), near=path)
        return found | self.find_lazy(text)

    def find_in(self, strings: str, near: str) -> set[str]:
        """Return what strings name; of several files with one name, those in the folder of `near` come first."""
        found: set[str] = set()
        for match in _MODULE.finditer(strings):
            # With `-m`, a package runs its __main__.
            run = [*_with_parents(match[0]), f"{match[0]}.__main__"]
            found |= {self.modules[name] for name in run if name in self.modules}
        folder = near.rpartition("/")[0]
        for match in _FILE.finditer(strings):
            paths = [path for path in self.by_name.get(match[0].rpartition("/")[2], []) if path.endswith(match[0])]
            found |= set([path for path in paths if path == f"{folder}/{match[0]}"] or paths)
        # Messages of the product name pages that a user should read. Only tests read pages.
        return found if near.startswith("tests/") else {path for path in found if not path.endswith(".md")}

    def find_lazy(self, text: str) -> set[str]:
        if not self.lazy or not re.search(r"\b(from|import) flows\b", text):
            return set()
        return {path for word in set(_WORD.findall(text)) for path in self.lazy.get(word, ())}


def _find_lazy_names(root: Path, modules: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that `flows` imports when they are first used, with the files that these run."""
    path = root / LAZY
    if not path.is_file():
        return {}
    return {
        alias.asname or alias.name: [modules[name] for name in _with_parents(str(node.module)) if name in modules]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _list_strings(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of some code, docstrings left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            # A string that stands for itself is a docstring: it tells, and nothing is done with it.
            node.value.value = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _add_fixtures(root: Path, files: Sequence[str], needs: dict[str, set[str]], names: _FileNames) -> None:
    """Make a node of each fixture of a conftest.py, and have tests need those that they name.

    What a fixture imports when it runs is needed by it, and no longer by its conftest.py.
    """
    conftests = [path for path in files if path.endswith("conftest.py") and (root / path).is_file()]
    fixtures: dict[str, list[str]] = {}
    bodies: dict[str, _FixtureNode] = {}
    for path in conftests:
        tree = ast.parse((root / path).read_text())
        found = {node.name: node for node in tree.body if isinstance(node, _FixtureNode) and _is_fixture(node)}
        in_fixtures = {id(inner) for node in found.values() for inner in ast.walk(node)}
        kept = _find_imported(
            (node for node in ast.walk(tree) if id(node) not in in_fixtures and not _is_for_types(node, tree)), names
        )
        outside = ast.Module([node for node in tree.body if node not in found.values()], [])
        kept |= names.find_in("\n".join(_list_strings(outside)), near=path)
        needs[path] = (kept | {near for near in _list_conftests(path) if near in needs}) - {path}
        for name, node in found.items():
            fixtures.setdefault(name, []).append(f"{path}::{name}")
            bodies[f"{path}::{name}"] = node
    for fixture, node in bodies.items():
        path = fixture.partition("::")[0]
        needs[fixture] = {path} | _find_imported(ast.walk(node), names)
        needs[fixture] |= names.find_in("\n".join(_list_strings(node)), near=path)
        needs[fixture] |= names.find_lazy(ast.unparse(node))
        needs[fixture] |= {each for word in _list_names(node) for each in fixtures.get(word, ())} - {fixture}
    for path in files:
        if path.startswith("tests/") and path.endswith(".py") and path not in conftests and (root / path).is_file():
            words = set(_WORD.findall((root / path).read_text()))
            folders = [near for near in _list_conftests(path) if near in needs]
            needs[path] |= {
                each for word in words for each in fixtures.get(word, ()) if each.partition("::")[0] in folders
            }


def _is_fixture(node: _FixtureNode) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def _list_names(node: _FixtureNode) -> set[str]:
    asked = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    return asked | set(_WORD.findall("\n".join(_list_strings(node))))


def _is_for_types(node: ast.AST, tree: ast.Module) -> bool:
    return any(
        isinstance(each, ast.If) and "TYPE_CHECKING" in ast.unparse(each.test) and node in ast.walk(each)
        for each in tree.body
    )


def _find_imported(nodes: Iterable[ast.AST], names: _FileNames) -> set[str]:
    imported: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {names.modules[name] for each in imported for name in _with_parents(each) if name in names.modules}
