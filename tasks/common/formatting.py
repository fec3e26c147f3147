"""How reports show values: durations in words, texts of plots, plots as PNG, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MINUTE, _HOUR = 60, 3600
# What is markup within a line. Underscores within words are none.
_MARKUP = re.compile(r"[\\`*|<\[\]]|(?<!\w)_|_(?!\w)")


def in_words(seconds: float) -> str:
    """Return seconds in at most two units: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min; a negative span keeps its sign."""
    if math.isinf(seconds):
        return "an endless time"
    if seconds < 0:
        return f"-{in_words(-seconds)}"
    if seconds < _MINUTE - 0.5:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"  # noqa: PLR2004
    if seconds < _HOUR - 0.5:
        minutes, rest = divmod(round(seconds), _MINUTE)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / _MINUTE), _MINUTE)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def in_fine_words(seconds: float) -> str:
    """Return seconds as `in_words` does, and what is less than one in milliseconds."""
    return in_words(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def escape_markdown(text: str) -> str:
    """Return a text as a cell of a table in Markdown shows it, on one line and without markup of its own."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def data_uri(picture: bytes) -> str:
    """Return a PNG or an SVG as a data URI."""
    kind = "svg+xml" if picture.startswith(b"<svg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def cut_text(text: str, characters: int) -> str:
    """Return text of at most so many characters: the last is an ellipsis where some are left out."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def shorten_label(text: str, characters: int) -> str:
    """Return text as matplotlib shows it: cut, on one line, and with no formula between two dollars."""
    return " ".join(cut_text(text, characters).split()).replace("$", r"\$")


def encode_png(figure: Figure, **options: Any) -> bytes:
    """Return a figure as a PNG; the options are those of its `savefig`."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", **options)
    return sink.getvalue()
