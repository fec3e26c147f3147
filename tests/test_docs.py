"""Whatever README and docs tell people to run is there, and is called as it wants to be."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from deployments.command_line import app
from tests.pages import ROOT, Block, read_blocks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("flows", "tasks", "serving", "deployments", "infra")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name_of(value: object) -> str:
    """Return a name for a test of a block, a page or a command."""
    if isinstance(value, Block):
        return f"{value.page.stem}-{value.text.strip().splitlines()[0][:40]}"
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


PYTHON = [block for page in PAGES for block in read_blocks(page) if block.language == "python"]
TEXT = "\n".join(page.read_text() for page in PAGES)
MODULES = sorted(set(re.findall(r"python -m ([a-z_.]+[a-z_])", TEXT)) - {"pip", "venv", "build"})
TARGETS = sorted(
    set(
        re.findall(
            r"`?\bmake ([a-z][a-z-]+)(?=[`\s]|$)",
            "\n".join(
                [*re.findall(r"`(make [^`]+)`", TEXT), *(block.text for page in PAGES for block in read_blocks(page))]
            ),
        )
    )
)


def calls_of_ours(tree: ast.Module) -> Iterator[tuple[ast.Call, Any]]:
    """Yield every call of a name that a block imports from this project, with what it calls."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
            module = importlib.import_module(str(node.module))
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node, names[node.func.id]


@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_in_the_docs_compiles_and_calls_what_is_there(block: Block) -> None:
    tree = ast.parse(block.text)

    for call, called in calls_of_ours(tree):
        given = {str(keyword.arg): keyword.value for keyword in call.keywords}
        if isinstance(called, type) and issubclass(called, BaseModel):
            assert set() == set(given) - set(called.model_fields), f"{called.__name__} has no such fields"
            required = {name for name, field in called.model_fields.items() if field.is_required()}
            assert set() == required - set(given), f"{called.__name__} needs these fields"
        else:
            inspect.signature(called).bind(*call.args, **given)


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_in_the_docs_is_there(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_the_docs_run_explains_itself(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stderr
    options = set(re.findall(rf"python -m {re.escape(module)}((?: --?[a-z][a-z-]*(?: [A-Z\w.\-/:]+)?)+)", TEXT))
    for option in {name for found in options for name in re.findall(r"--[a-z-]+", found)}:
        assert option in done.stdout


COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for page in PAGES
        for block in read_blocks(page)
        for line in block.text.splitlines()
        if line.startswith("overnight ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_in_the_docs_reads(command: str) -> None:
    _, *arguments = shlex.split(command.partition(" && ")[0])
    context: Any = typer.main.get_command(app).make_context("overnight", arguments)
    while rest := [*getattr(context, "_protected_args", ()), *context.args]:
        name, found, rest = context.command.resolve_command(context, rest)
        context = found.make_context(name, rest, parent=context)

    assert "overnight" != context.info_name


def test_every_deployment_in_the_docs_is_there() -> None:
    from prefect.flows import load_flow_from_entrypoint

    content = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())
    flows = {each["entrypoint"]: load_flow_from_entrypoint(each["entrypoint"]).name for each in content["deployments"]}
    deployed = {f"{flows[each['entrypoint']]}/{each['name']}" for each in content["deployments"]}
    named = set(re.findall(rf"\b((?:{'|'.join(set(flows.values()))})/[a-z][a-z-]*)\b", TEXT))

    assert named
    assert set() == named - deployed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_of_the_project(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]

    assert [] == [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_docs_are_there(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(OURS)}|tests|docs)/[\w./-]*)`", page.read_text())

    assert [] == [name for name in named if not (ROOT / name).exists()]


def test_the_readme_fits_on_a_few_screens() -> None:
    assert (ROOT / "README.md").read_text().count("\n") < 150
