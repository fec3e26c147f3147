"""Conditions of one's own on the statistics of a column, as SQL that can do nothing but compare and count."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.batch.column_statistics import ColumnStatistics, TableStatistics
from tasks.batch.drift import ColumnDrift

if TYPE_CHECKING:
    import polars as pl

_QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
_TEXTS = ("column_name", "side", "kind")
_FIGURES = ("rows", "null_rate", "infinite", "mean", "deviation", "minimum", "maximum", *_QUANTILES, "distinct_sampled")
_TABLE = ("table_rows", "reject_rate")
# What a condition may name: a column of the table of statistics, a row for each column of the run.
COLUMNS = (
    *_TEXTS,
    *(f"{prefix}{name}" for name in (*_FIGURES, *_TABLE) for prefix in ("", "baseline_")),
    *("null_rate_change", "mean_shift", "psi", "ks"),
)
_WORDS = {
    *("and", "or", "not", "between", "in", "is", "null", "true", "false", "case", "when", "then", "else", "end"),
    *("abs", "least", "greatest", "coalesce", "sqrt", "ln", "exp", "round", "power"),
}
_TOKEN = re.compile(r"\s+|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|'[^']*'|(?P<name>[A-Za-z_]\w*)|<>|<=|>=|!=|[-+*/%(),<>=]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionOutcome:
    """Why a column does not keep a condition: it is false, or null; with the values that the condition names."""

    is_null: bool
    values: str


def check_condition(condition: str) -> None:
    """Check that a condition can do nothing but compare: every word of it is a statistic or one of a short list.

    Raises:
        ValueError: It has another word, or is no condition.
    """
    _find_names(condition)
    frame = _make_frame([])
    expression = _compile(condition)
    import polars as pl  # noqa: PLC0415 - a run without conditions does not need it

    try:
        kind = frame.select(expression).dtypes[0]
    except pl.exceptions.PolarsError as error:
        raise ValueError(_refuse(condition, str(error).split("\n")[0])) from None
    if kind != pl.Boolean:
        raise ValueError(_refuse(condition, f"one of the type {kind}"))


def _find_names(condition: str) -> list[str]:
    """Return the statistics that a condition names. Raises ValueError for any other word."""
    names, at = [], 0
    while at < len(condition):
        token = _TOKEN.match(condition, at)
        if token is None:
            raise ValueError(_refuse(condition, f"the sign {condition[at]!r}"))
        name = token["name"]
        if name in COLUMNS:
            names.append(name)
        elif name is not None and name.lower() not in _WORDS:
            raise ValueError(_refuse(condition, f"the word {name!r}"))
        at = token.end()
    return list(dict.fromkeys(names))


def _refuse(condition: str, found: str) -> str:
    return (
        f"condition must be a condition in SQL on {', '.join(COLUMNS[:4])} and the other statistics of a column, got "
        f"{found} in {condition[:80]!r}; docs/gate.md lists them"
    )


def _compile(condition: str) -> pl.Expr:
    import polars as pl  # noqa: PLC0415 - a run without conditions does not need it

    try:
        return pl.sql_expr(condition)
    except (pl.exceptions.PolarsError, pl.exceptions.SQLInterfaceError) as error:
        raise ValueError(_refuse(condition, str(error).split("\n")[0])) from None


def find_false_columns(
    condition: str, drifts: Sequence[ColumnDrift], statistics: TableStatistics, baseline: TableStatistics | None
) -> Iterator[tuple[ColumnDrift, ConditionOutcome]]:
    """Yield the columns of which a condition is false or null, with the values that it names."""
    present = [drift for drift in drifts if drift.current is not None]
    rows = [_tabulate_column(drift, statistics, baseline) for drift in present]
    if not rows:
        return
    names = _find_names(condition)
    results = _make_frame(rows).select(_compile(condition).alias("kept")).to_series()
    # A condition without a name in it has one value for all columns.
    kept = results.to_list() * (len(rows) if len(results) == 1 else 1)
    for drift, row, is_kept in zip(present, rows, kept, strict=False):
        if not is_kept:
            values = ", ".join(f"{name} {_show(row[name])}" for name in names)
            yield drift, ConditionOutcome(is_null=is_kept is None, values=values)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def _make_frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    import polars as pl  # noqa: PLC0415 - a run without conditions does not need it

    return pl.DataFrame(rows, schema={name: pl.String if name in _TEXTS else pl.Float64 for name in COLUMNS})


def _tabulate_column(
    drift: ColumnDrift, statistics: TableStatistics, baseline: TableStatistics | None
) -> dict[str, Any]:
    """Return the row of a column in the table of statistics, with null for what is not known."""
    now, then = drift.current, drift.baseline
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"column_name": drift.name, "side": drift.side, "kind": now.kind if now else None}
    row |= _list_figures(now, "") | _list_figures(then, "baseline_")
    for prefix, table in (("", statistics), ("baseline_", baseline)):
        if table is not None:
            row |= {f"{prefix}table_rows": table.rows, f"{prefix}reject_rate": table.reject_rate}
    row |= {"null_rate_change": drift.null_rate.value, "mean_shift": drift.mean.value}
    row |= {"psi": drift.psi.value, "ks": drift.ks.value}
    return {name: _as_known(value) for name, value in row.items()}


def _list_figures(column: ColumnStatistics | None, prefix: str) -> dict[str, Any]:
    if column is None:
        return {}
    figures = {name: getattr(column, name) for name in _FIGURES if name not in _QUANTILES}
    figures |= {name: column.quantiles.quantile(share) for name, share in _QUANTILES.items()}
    return {f"{prefix}{name}": value for name, value in figures.items()}


def _as_known(value: Any) -> Any:
    """Return a statistic as a condition sees it: what is not a number is not known."""
    if isinstance(value, str) or value is None:
        return value
    return None if value != value else float(value)  # noqa: PLR0124 - true of NaN alone
