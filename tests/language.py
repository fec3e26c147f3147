"""Words and names that stop a reader, found in source text: used by a test and by `make size`."""

from __future__ import annotations

import ast
import re

# Metaphors, old-fashioned words and names of a project's own making. docs/architecture.md has the words to use instead.
PRIVATE_WORDS = re.compile(
    r"\b((?i:anew|mend(?:ed|s)?|dearest|whoever|hush|bur(?:y|ied)|heeding|peek(?:ed)?|recall(?:ed)?|flips?|flaws?|felt|feel"
    r"|errand|doors?|stations?|as it comes|in hand|the house|rooms)|Standing|Wanted|company|in_hand|Ear)\b"
)
BARE_NAMES = {
    *("at", "on", "of", "by", "in", "to", "with", "without", "behind", "before", "after", "apart", "alone", "again"),
    *("gone", "each", "whole", "when", "why", "less", "more", "most", "least", "rest", "other", "none", "nothing"),
    *("once", "lately", "absent", "dead", "late", "ahead", "already"),
}


def find_private_words(text: str) -> list[str]:
    """Return every private word in a text, as often as it occurs."""
    return PRIVATE_WORDS.findall(text)


def find_bare_names(source: str) -> list[str]:
    """Return the names of functions and classes that are a bare preposition, adjective or adverb."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name.strip("_").lower() in BARE_NAMES
    ]
