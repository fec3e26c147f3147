"""The pages of the documentation, and the fenced blocks in them, which tests run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def read_blocks(page: Path, text: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, or of a text of it, in order."""
    content = page.read_text() if text is None else text
    found = re.findall(r"^```(\w*)\n(.*?)^```$", content, flags=re.MULTILINE | re.DOTALL)
    return [Block(page=page, language=language, text=text) for language, text in found]
