"""Tells the observer of pytest's own process which file of tests is at work, and what that file imports.

A process opens a module once, for whichever file of tests comes first. So imports are noted where they are asked for:
those at the top of a module as its own, and those within functions as of the file of tests that is at work.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Generator, Iterable, Mapping
from types import ModuleType
from typing import Any

import pytest
from _pytest.fixtures import FixtureDef, SubRequest

from tests.selection.observer import Observer, find_observer

PACKAGES = frozenset({"flows", "tasks", "serving", "deployments", "infra", "tests"})
# Fixtures of these scopes serve several files of tests, and are set up for the first.
_SHARED = ("session", "package")

_import_statement = builtins.__import__
_import_module = importlib.import_module
_execute = FixtureDef.execute


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Begin before anything of the project is imported."""
    if (observer := find_observer()) is not None:
        observer.set_reader("pytest")
        _note_imports(observer)
        _note_fixtures(observer)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Work for a file of tests while it is imported."""
    if isinstance(collector, pytest.Module):
        _work_for(collector.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Work for the file of tests of this test."""
    _work_for(item.nodeid.partition("::")[0])
    return (yield)


def _work_for(path: str) -> None:
    observer = find_observer()
    if observer is None or observer.reader == path:
        return
    observer.set_reader(path)
    _forget_what_was_read()


def _forget_what_was_read() -> None:
    """Have the next file of tests read what a process otherwise keeps, and would have noted for this one alone."""
    if (processes := sys.modules.get("serving.model.process_handle")) is not None:
        # The process that all those of models come from.
        processes.FIRST_PROCESSES.close()
    if (flows := sys.modules.get("flows")) is not None:
        # Names that the package has imported when they were first used.
        for name in vars(flows)["_MODULE_BY_NAME"]:
            vars(flows).pop(name, None)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES:
            for kept in list(vars(module).values()):
                if isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()


def _note_fixtures(observer: Observer) -> None:
    def execute(self: FixtureDef[Any], request: SubRequest) -> Any:
        if self.scope not in _SHARED:
            return _execute(self, request)
        # PYTHONPATH, which hands the reader down, separates by colons.
        before, fixture = observer.reader, f"{self.baseid}@{self.argname}"
        observer.note(before, fixture)
        if self.cached_result is not None:
            return _execute(self, request)
        observer.set_reader(fixture)
        try:
            return _execute(self, request)
        finally:
            observer.set_reader(before)

    FixtureDef.execute = execute  # type: ignore[method-assign]


def _note_imports(observer: Observer) -> None:
    def import_statement(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - as Python names it
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Iterable[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        module = _import_statement(name, globals, locals, fromlist or (), level)
        # The project has no relative imports.
        if name.partition(".")[0] in PACKAGES and not level:
            importer = (globals or {}).get("__file__") or ""
            is_top = locals is globals and importer.startswith(observer.root)
            note(importer[len(observer.root) :] if is_top else observer.reader, name, fromlist or ())
        return module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        module = _import_module(name, package)
        note(observer.reader, module.__name__, ())
        return module

    def note(reader: str, name: str, names: Iterable[str]) -> None:
        parts = name.split(".")
        asked = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        module = sys.modules.get(name)
        for each in names:
            # A module of a package, or what it has from elsewhere.
            asked |= {f"{name}.{each}", str(getattr(getattr(module, each, None), "__module__", ""))}
        for each in asked:
            file = getattr(sys.modules.get(each), "__file__", None)
            if isinstance(file, str) and file.startswith(observer.root):
                observer.note(reader, file[len(observer.root) :])

    builtins.__import__ = import_statement
    importlib.import_module = import_module
    importlib.metadata.import_module = import_module  # type: ignore[attr-defined]
