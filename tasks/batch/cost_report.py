"""What runs cost, as a person reads it: a table, a plot, and a page that needs nothing else."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prefect.client.orchestration import get_client

from tasks.batch.costs import RunCost
from tasks.common.artifacts import make_table
from tasks.common.formatting import data_uri, encode_png, in_words
from tasks.common.names import describe_model, find_last_folder
from tasks.scheduler.prices import format_usd

UNKNOWN = "not known"
_INK, _GRID = "#1f2933", "#e4e7eb"
_TIMES_SHOWN, _RUN_CHARACTERS = 3, 12
# Dark to light, so that they differ in a print without colours too.
_SERIES = (
    ("spent", "what it cost", "#1f5f8b", "o"),
    ("on_demand", "on-demand machines alone", "#d9822b", "s"),
    ("always_on", "an endpoint that is always on", "#9aa5b1", "^"),
)
_ASSUMPTIONS = (
    "Amounts are in dollars; those of nights are in the currency of the prices that nights are given.",
    "What a run cost is the price of its machines for the seconds that its calls, or the machines of its night, took.",
    "On-demand machines alone: the same seconds at the on-demand price. Of a night: its rows at the rate measured.",
    "An endpoint that is always on: as many on-demand machines as the run had at a time, since the run before it.",
    "Whether these would keep up with requests is not looked at here; choose_mode does that.",
    "Storage, requests to it, and the machines of Prefect and MLflow are not counted.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationCosts:
    """What the published runs of one destination cost, the oldest first."""

    destination: str
    runs: Sequence[RunCost]


def tabulate_costs(runs: Sequence[RunCost]) -> list[dict[str, str]]:
    """Return runs as rows of a table, the newest first."""
    return [
        {
            "planned (UTC)": f"{run.planned_at:%Y-%m-%d %H:%M}",
            "run": run.run,
            "model": describe_model(run.model),
            "rows": f"{run.rows:,}",
            "machines worked": UNKNOWN if run.machine_seconds is None else in_words(run.machine_seconds),
            "cost": _format(run.spent, at_least=run.is_lower_bound),
            "on-demand alone": _format(run.on_demand, at_least=run.is_lower_bound),
            "always-on endpoint": _format(run.always_on),
            "a million rows": _format(run.spent_per_million_rows, at_least=run.is_lower_bound),
        }
        for run in reversed(runs)
    ]


def sum_costs(runs: Sequence[RunCost]) -> str:
    """Return the sum of what is known in a sentence; each comparison is over the runs that know both."""
    known = [run.spent for run in runs if run.spent is not None]
    if not known:
        return f"What the {len(runs)} runs cost is not known."
    plural = "run" if len(known) == 1 else "runs"
    sentences = [f"{len(known)} of {len(runs)} {plural} have a known cost, {format_usd(sum(known))} in all."]
    for words, pairs in (
        ("on-demand machines alone", [(run.spent, run.on_demand) for run in runs]),
        ("an endpoint that is always on", [(run.spent, run.always_on) for run in runs]),
    ):
        both = [(spent, other) for spent, other in pairs if spent is not None and other is not None and other > 0]
        if both:
            spent, other = sum(each for each, _ in both), sum(each for _, each in both)
            sentences.append(
                f"{len(both)} of them cost {format_usd(spent)}, {spent / other:.1%} of {format_usd(other)} for {words}."
            )
    return " ".join(sentences)


def list_notes(runs: Sequence[RunCost]) -> list[str]:
    """Return what is not known of which runs, each reason once."""
    by_note: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            by_note.setdefault(note, []).append(f"{run.planned_at:%Y-%m-%d %H:%M}")
    notes = []
    for note, at in by_note.items():
        more = f" and {len(at) - _TIMES_SHOWN} earlier" if len(at) > _TIMES_SHOWN else ""
        notes.append(f"{', '.join(at[-_TIMES_SHOWN:])}{more}: {note}.")
    return notes


def _format(amount: float | None, *, at_least: bool = False) -> str:
    if amount is None:
        return UNKNOWN
    return f"at least {format_usd(amount)}" if at_least else format_usd(amount)


def plot_costs(destinations: Sequence[DestinationCosts]) -> bytes | None:
    """Draw what each run cost over time, one row of axes for each destination; return a PNG, None without a price.

    A value that is not known is left out: no line goes through where it would be.
    """
    names = [name for name, *_ in _SERIES]
    known = [
        each for each in destinations if any(getattr(run, name) is not None for run in each.runs for name in names)
    ]
    if not known:
        return None
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: PLC0415 - a second of imports
    from matplotlib.figure import Figure  # noqa: PLC0415 - the same

    figure = Figure(figsize=(9, 0.4 + 2.9 * len(known)), dpi=110, layout="constrained")
    for axes, each in zip(figure.subplots(len(known), squeeze=False)[:, 0], known, strict=True):
        at = [run.planned_at for run in each.runs]
        for name, label, colour, marker in _SERIES:
            amounts = [getattr(run, name) for run in each.runs]
            values = [float("nan") if amount is None else amount for amount in amounts]
            axes.plot(at, values, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
        axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.yaxis.set_major_formatter(lambda amount, _: format_usd(amount))
        axes.yaxis.set_minor_formatter("")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
        locator = AutoDateLocator(maxticks=8)  # type: ignore[no-untyped-call]  # matplotlib leaves it without types
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]  # the same
        title = f"{find_last_folder(each.destination)}: dollars a run, on a logarithmic axis"
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return encode_png(figure)


def make_cost_page(destinations: Sequence[DestinationCosts]) -> bytes:
    """Return costs as one HTML page that needs nothing else."""
    png = plot_costs(destinations)
    image = "" if png is None else f'<img alt="dollars of each run over time" src="{data_uri(png)}">'
    sections = "".join(_make_section(each) for each in destinations)
    assumptions = "".join(f"<li>{html.escape(each)}</li>" for each in _ASSUMPTIONS)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What runs cost</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;color:{_INK};max-width:76rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}}
td,th{{padding:.25rem .8rem .25rem 0;border-bottom:1px solid {_GRID};text-align:right;white-space:nowrap}}
td:nth-child(-n+3),th:nth-child(-n+3){{text-align:left}}td:nth-child(2){{font-family:ui-monospace,monospace;font-size:13px}}
.unknown{{color:#7b8794}}img{{max-width:100%}}li,p{{max-width:60rem}}div{{overflow-x:auto}}</style>
<h1>What runs cost</h1>{image}
{sections}<h2>How it is computed</h2><ul>{assumptions}</ul></html>
""".encode()


def _make_section(costs: DestinationCosts) -> str:
    rows = tabulate_costs(costs.runs)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(_make_cell(name, value) for name, value in row.items())}</tr>" for row in rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in list_notes(costs.runs))
    unknown = f"<p>What is not known, and why:</p><ul>{notes}</ul>" if notes else ""
    return (
        f"<h2>{html.escape(costs.destination)}</h2><p>{html.escape(sum_costs(costs.runs))}</p>"
        f"<div><table><tr>{head}</tr>{body}</table></div>{unknown}"
    )


def _make_cell(name: str, value: str) -> str:
    if value == UNKNOWN:
        return f'<td class="unknown">{UNKNOWN}</td>'
    if name == "run":
        return f'<td title="{html.escape(value)}">{html.escape(value[:_RUN_CHARACTERS])}</td>'
    return f"<td>{html.escape(value)}</td>"


def publish_costs(destinations: Sequence[DestinationCosts]) -> None:
    """Put the costs of each destination among Prefect's artifacts: a table, by a key of its own that keeps its past."""
    with get_client(sync_client=True) as client:
        for each in destinations:
            rows = [{name: value for name, value in row.items() if name != "run"} for row in tabulate_costs(each.runs)]
            client.create_artifact(make_table(name_artifact(each.destination), rows, sum_costs(each.runs)))


def name_artifact(destination: str) -> str:
    """Return the key of a destination's artifact: lower-case letters, digits and dashes, and no two are equal."""
    words = re.sub(r"[^a-z0-9]+", "-", find_last_folder(destination).lower()).strip("-")
    return f"costs-{words}-{hashlib.sha256(destination.encode()).hexdigest()[:8]}"
