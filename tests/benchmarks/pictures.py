"""The pictures of the README: the terminal of a real `make demo`, and the plot of its run.

`make pictures` trains, registers, scores and publishes in a new folder, and writes docs/images/.
"""

from __future__ import annotations

import base64
import re
import sys
import tempfile
from pathlib import Path

from deployments.demo import __main__ as demo
from deployments.demo.prepare import console

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Run the demo with its console recorded, then save what it showed."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        console.record = True
        console.width = 132
        sys.argv = ["make demo", "--folder", folder]
        demo.main()
        (IMAGES / "demo.svg").write_text(console.export_svg(title="make demo"))
        (page,) = Path(folder).glob("predictions/_overnight/*/report.html")
        found = re.search(r'"rows done over time" src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)', page.read_text())
        if found is None:
            sys.exit(f"{page} must hold the plot of the run as an SVG, but has none.")
        (IMAGES / "run.svg").write_bytes(base64.b64decode(found.group(1)))


if __name__ == "__main__":
    main()
