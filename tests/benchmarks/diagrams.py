"""Draw the Mermaid diagrams of docs/ as SVG for the site, whose pages then need no Mermaid.

`make diagrams` fetches Mermaid by npm, pinned by hash, and draws in Debian's chromium. Drawings of former texts are
deleted.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from docs.site.hooks import MERMAID, find_diagram

DOCS = Path(__file__).parents[2] / "docs"
MERMAID_VERSION = "11.16.0"
MERMAID_SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"
DRAW = """async (text) => {
    mermaid.initialize({startOnLoad: false, theme: "neutral", htmlLabels: false, flowchart: {htmlLabels: false}});
    return (await mermaid.render("diagram", text)).svg;
}"""


def main() -> None:
    """Draw every diagram whose drawing is missing, and delete drawings of no diagram."""
    texts = {find_diagram(text): text for page in DOCS.rglob("*.md") for text in MERMAID.findall(page.read_text())}
    for drawn in set((DOCS / "images").glob("diagram-*.svg")) - set(texts):
        drawn.unlink()
    missing = {path: text for path, text in texts.items() if not path.exists()}
    if missing:
        draw_diagrams(missing)
    sys.stdout.write(f"{len(texts)} diagrams, {len(missing)} drawn\n")


def draw_diagrams(texts: dict[Path, str]) -> None:
    """Draw these texts into their files."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        script = fetch_mermaid(Path(folder))
        with playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"]) as browser:
            page = browser.new_page()
            page.add_script_tag(path=script)
            for path, text in texts.items():
                svg = str(page.evaluate(DRAW, text))
                # As an image it has no page to fill: it gets the size that Mermaid would let it grow to.
                width = re.search(r"max-width: ([\d.]+)px", svg)
                path.write_text(svg.replace('width="100%"', f'width="{width.group(1)}"', 1) if width else svg)


def fetch_mermaid(folder: Path) -> Path:
    """Download Mermaid and return its script; exits where it is not the one that is pinned."""
    subprocess.run(["npm", "pack", "--silent", f"mermaid@{MERMAID_VERSION}"], cwd=folder, check=True)
    with tarfile.open(folder / f"mermaid-{MERMAID_VERSION}.tgz") as archive:
        archive.extract("package/dist/mermaid.min.js", folder, filter="data")
    script = folder / "package" / "dist" / "mermaid.min.js"
    if hashlib.sha256(script.read_bytes()).hexdigest() != MERMAID_SHA256:
        sys.exit(f"mermaid {MERMAID_VERSION} must have the SHA-256 {MERMAID_SHA256}, but has another.")
    return script


if __name__ == "__main__":
    main()
