"""Figures as a person reads them: a column for each place, case or night, and one for what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 160


def show(title: str, found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, str]) -> None:
    """Print the figures of each beside what they must reach; one that some lack is left open there."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", *found, "wanted"):
        table.add_column(column)
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        table.add_row(name, *(told(figures.get(name)) for figures in found.values()), wanted.get(name, ""))
    Console(width=WIDTH).print(table)


def told(value: Any) -> str:
    """Return a figure as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {told(figure)}" for name, figure in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(told(each) for each in value)
    if value is None or isinstance(value, bool | str):
        return "" if value is None else str(value)
    return f"{value:,}"
