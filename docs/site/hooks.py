"""Pages of the site that are no files of docs/: the README and its neighbours, notebooks, the API reference, diagrams.

mkdocs calls the functions whose names begin with `on_`.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
# Pages of the reference by the packages that hold their names; the first that fits counts.
TOPICS = {
    "flows": ("flows", "Flows"),
    "tasks.batch": ("batch", "Batch runs"),
    "tasks.endpoint": ("endpoint", "Endpoints"),
    "serving": ("endpoint", "Endpoints"),
    "tasks.stream": ("stream", "Streams"),
    "tasks.scheduler": ("scheduler", "Choice of the mode"),
    "tasks.spot": ("spot", "Deadlines"),
}
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=link_within_site((ROOT / name).read_text())))
    for page, text in make_reference().items():
        files.append(File.generated(config, f"reference/{page}.md", content=text))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for path, content in convert_notebook(notebook).items():
            files.append(File.generated(config, f"notebooks/{path}", content=content))
    css = (Path(__file__).parent / "site.css").read_text()
    files.append(File.generated(config, "stylesheets/site.css", content=css))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs passes them by name
    """Put drawn diagrams in place of their Mermaid text, so that no page needs Mermaid; link to pages of notebooks."""

    def draw(found: re.Match[str]) -> str:
        image = find_diagram(found.group(1))
        if not image.exists():
            message = f"{page.file.src_uri} has a diagram that is not drawn yet: make diagrams"
            raise PluginError(message)
        above = "../" * page.file.src_uri.count("/")
        return f"![A diagram]({above}images/{image.name}){{ .diagram }}"

    if not page.file.src_uri.startswith("notebooks/"):
        markdown = re.sub(r"(\]\([^)]*)\.ipynb\)", r"\1.md)", markdown)
    return MERMAID.sub(draw, markdown)


def find_diagram(text: str) -> Path:
    """Return where the drawing of a Mermaid text is, by its digest: a text that changes must be drawn again."""
    return ROOT / "docs" / "images" / f"diagram-{hashlib.sha256(text.encode()).hexdigest()[:12]}.svg"


def link_within_site(text: str) -> str:
    """Return a page of the top folder with its links as they are in the site."""
    text = re.sub(r"(\]\()docs/", r"\1", text)
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def make_reference() -> dict[str, str]:
    """Return the pages of the API reference, as directives to mkdocstrings, by name."""
    pages: dict[str, list[str]] = defaultdict(list)
    for name, module in find_public_names().items():
        topic, title = next(found for package, found in TOPICS.items() if module.startswith(package))
        if not pages[topic]:
            pages[topic] += [f"# {title}", "Everything on this page is imported from `flows`."]
        pages[topic].append(f"::: {module}.{name}")
    tree, names = read_errors()
    options = "\n    options:\n      show_bases: true"
    pages["errors"] = ["# Errors", "Errors are imported from `serving.errors`.", f"```text\n{tree}\n```"]
    pages["errors"] += [f"::: serving.errors.{name}{options}" for name in names]
    return {topic: "\n\n".join(lines) + "\n" for topic, lines in pages.items()}


def find_public_names() -> dict[str, str]:
    """Return the module of each name in `flows.__all__`, read from the source: nothing is imported."""
    tree = ast.parse((ROOT / "flows" / "__init__.py").read_text())
    modules = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    public: Any = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return {name: modules[name] for name in public}


def read_errors() -> tuple[str, list[str]]:
    """Return the tree of errors as their module describes it, and their names."""
    module = ast.parse((ROOT / "serving" / "errors.py").read_text())
    _, _, tree = (ast.get_docstring(module) or "").partition("\n\n")
    return tree, [node.name for node in module.body if isinstance(node, ast.ClassDef)]


def convert_notebook(notebook: Path) -> dict[str, str | bytes]:
    """Return the page of a notebook with the output that it holds, and its pictures, by path."""
    content = nbformat.read(notebook, as_version=4)
    text, resources = MarkdownExporter().from_notebook_node(content, {"output_files_dir": notebook.stem})
    return {f"{notebook.stem}.md": text, **{str(name): data for name, data in resources["outputs"].items()}}
